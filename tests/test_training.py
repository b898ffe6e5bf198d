"""Runs from the command line's flags to the report: every method, resume, refusals."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dst
import train
from dst import checkpoint, tracking
from dst.data import AUGMENTATIONS, DATASETS, eval_batches, load
from dst.methods import METHODS
from dst.models import build
from dst.presets import PRESETS
from dst.recipes.session import CHECKPOINT
from dst.redistribute import REDISTRIBUTIONS
from dst.training import run
from growth import STRATEGIES, Exact, Random

ROOT = Path(train.__file__).parent
# 1297 training images of 8 x 8: 20 steps of 64 an epoch.
SMALL = ["--data=digits", "--batch=64", "--epochs=1", "--model=mlp-32-32"]


def go(tmp_path, *flags):
    return run(train.parse([*SMALL, f"--out={tmp_path}", *flags]))


def main(monkeypatch, capsys, *flags):
    """Exit status and what stands on stderr."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as stop:
        train.main()
    return stop.value.code, capsys.readouterr().err


def without_time(folder):
    lines = tracking.read(folder)
    for line in lines:
        for key in ("time", "growth_seconds", "wall_seconds"):
            line.pop(key, None)
    return lines


def assert_same_run(one: Path, other: Path):
    tensors, state = checkpoint.load(one / CHECKPOINT)
    others, other_state = checkpoint.load(other / CHECKPOINT)
    assert set(tensors) == set(others)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    for key in ("seconds", "metrics_bytes"):
        state.pop(key), other_state.pop(key)
    assert state == other_state
    assert without_time(one) == without_time(other)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_the_default_model_20_steps(tmp_path, method):
    flags = [f"--method={method}", "--model=wrn-16-1"]
    if METHODS[method].defaults:
        flags.append("--update-interval=5")
    summary = go(tmp_path, *flags)
    folder = next(tmp_path.iterdir())
    lines = tracking.read(folder)
    losses = [line["train"]["loss"] for line in lines if line["kind"] == "epoch"]
    assert len(losses) == 1 and losses[0] < 3.0
    updates = [line for line in lines if line["kind"] == "update"]
    defaults = METHODS[method].defaults
    assert len(updates) == (0 if defaults is None else 2 + (defaults.end == 1.0))
    if method == "dense":
        assert summary.density == 1.0 and summary.inference_flops == summary.dense_inference_flops
    else:
        assert abs(summary.density - 0.1) < 1e-3
        assert summary.inference_flops < 0.6 * summary.dense_inference_flops
    if updates:
        assert sum(updates[0]["grown"].values()) > 0
        assert summary.explored_share > 0.1 and summary.growth_seconds > 0
    if method == "rigl":
        # The update replaces the step: one weight gradient's worth less, one dense one more.
        static = 3 * summary.inference_flops * 64 * 20
        assert summary.training_flops != static


@pytest.mark.parametrize("growth", STRATEGIES)
def test_every_growth_strategy_trains(tmp_path, growth):
    if growth in ("faiss", "nmslib"):
        pytest.importorskip(growth, reason="the extra 'cpu' brings it")
    block = "--block=4" if growth == "blocks" else "--block=1"
    go(
        tmp_path,
        f"--growth={growth}",
        block,
        "--update-interval=5",
        "--update-fraction=0.4",
        "--name=a",
    )
    updates = [line for line in tracking.read(tmp_path / "a") if line["kind"] == "update"]
    assert [line["step"] for line in updates] == [5, 10]
    assert sum(updates[0]["grown"].values()) > 0
    assert all(line["search"].keys() == {"1", "4", "7"} for line in updates)
    reports = updates[0]["search"].values()
    assert all(reports) or growth == "random"
    served = (tmp_path / "a" / "report.md").read_text()
    assert re.search(r"\| growth \| \w.* for 1, 4, 7", served) or growth == "random"
    choices = checkpoint.load(tmp_path / "a" / CHECKPOINT)[1]["updater"]["choices"]
    assert (choices.keys() == {"1", "4", "7"}) == (growth in ("auto", "blocks"))


class Decides:
    """Decides once, by its first vectors, from which seed it draws what grows in a layer."""

    needs_pairs, observes = True, False

    def __call__(self, pairs, count, active, *, block=(1, 1), generator=None, state=None):
        why = "told"
        if state is None:
            score = Exact()(pairs, min(1, count), active[:0]).score.sum()
            state, why = str(int(score * 1e6)), "the first vectors"
        seed = int(state) + active.numel() + int(active.sum())
        drawn = torch.Generator().manual_seed(seed)
        found = Random()(pairs, count, active, block=block, generator=drawn)
        return found._replace(report={"search": "draw", "why": why}, state=state)


def test_what_growth_decided_is_kept_over_a_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(STRATEGIES, "random", dataclasses.make_dataclass("D", [], bases=(Decides,)))
    flags = [*SMALL, "--growth=random", "--update-interval=4", "--checkpoint-interval=1"]
    flags.append(f"--out={tmp_path}")
    run(train.parse([*flags, "--name=whole"]))
    told = capsys.readouterr().out
    step = dst.TopologyUpdater.step

    def interrupted(updater):
        if updater.steps == 6:
            raise KeyboardInterrupt
        return step(updater)

    with monkeypatch.context() as patch:
        patch.setattr(dst.TopologyUpdater, "step", interrupted)
        assert main(patch, capsys, *flags, "--name=stopped")[0] == 1
    choices = checkpoint.load(tmp_path / "stopped" / CHECKPOINT)[1]["updater"]["choices"]
    assert choices.keys() == {"1", "4", "7"}
    run(train.parse([f"--resume={tmp_path / 'stopped'}"]))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    # Said once, at the first update.
    for choice in choices.values():
        assert told.count(f"growth: {choice} for 1 layer (the first vectors)") == 1
    assert "growth: " not in capsys.readouterr().out
    searches = [line["search"] for line in tracking.read(tmp_path / "whole") if "search" in line]
    assert [{report["why"] for report in search.values()} for search in searches] == [
        {"the first vectors"},
        {"told"},
        {"told"},
    ]


def _alexnet():
    """With a narrow classifier: its own 54 of 57 million weights would take minutes."""
    with torch.device("meta"):
        model = build("alexnet-small", in_channels=1, image_size=8, classes=10)
        for at, n_in, n_out in ((1, 9216, 64), (4, 64, 64), (6, 64, 10)):
            model.classifier[at] = torch.nn.Linear(n_in, n_out)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_alexnet(method):
    """Two updates and steps after them, without evaluation, checkpoint and report."""
    entry = METHODS[method]
    data = load("digits", data_dir="")
    model = _alexnet()
    if entry.sparse:
        model = dst.sparsify(model, density=0.1, distribution="erk")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    updater = dst.TopologyUpdater(model, optimizer, entry.build(dst.UpdateSchedule(3, 8, 0.3), 0))
    losses = []
    for images, labels in itertools.islice(eval_batches(data.train, data, 4), 7):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        if not updater.step():
            optimizer.step()
        losses.append(loss.item())
    assert all(loss < 3.0 for loss in losses)
    if entry.defaults is not None:
        assert updater.last.step == 6 and sum(updater.last.grown.values()) > 1000
    if entry.sparse:
        assert abs(dst.model_density(model) - 0.1) < 1e-3


def test_it_learns(tmp_path):
    summary = go(tmp_path, "--epochs=8", "--model=mlp-64-64", "--density=0.2")
    assert summary.test_accuracy > 0.9


def test_the_report_and_its_plots(tmp_path):
    summary = go(tmp_path, "--update-interval=4")
    folder = next(tmp_path.iterdir())
    report = (folder / "report.md").read_text()
    assert f"{summary.test_accuracy:.2%}" in report
    for name in ("accuracy", "density", "explored", "changed", "time"):
        assert f"({name}.png)" in report
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # The folder's config reproduces the run.
    again = run(train.parse([f"--config={folder / 'config.json'}", "--name=again"]))
    assert again.test_loss == summary.test_loss
    assert_same_run(folder, tmp_path / "again")


def test_a_ramp_counts_what_was_alive_at_each_step(tmp_path):
    """From dense to .1: the FLOPs lie between those of the two, and follow the recorded density."""
    flags = ["--density-start=1", "--density=0.1", "--update-interval=4", "--distribution=uniform"]
    summary = go(tmp_path, *flags, "--skip=none", "--name=ramp")
    lines = [line for line in tracking.read(tmp_path / "ramp") if line["kind"] == "update"]
    # 12 steps before the last update: at every fourth one the density falls, from 1 at first.
    alive = [1.0] * 4 + [line["density"] for line in lines for _ in range(4)]
    assert abs(alive[-1] - 0.1) < 1e-3
    share = sum([*alive, *[alive[-1]] * 20][:20]) / 20
    searched = summary.training_flops / summary.dense_training_flops - share
    # Three searches, each a third of a dense step.
    assert searched == pytest.approx(len(lines) / 3 / 20, abs=2e-3)
    assert "density over the run" in (tmp_path / "ramp" / "report.md").read_text().lower()


def test_folders_are_numbered_and_never_overwritten(tmp_path, monkeypatch, capsys):
    go(tmp_path)
    go(tmp_path)
    assert sorted(p.name[-2:] for p in tmp_path.iterdir()) == ["-1", "-2"]
    go(tmp_path, "--name=mine")
    status, words = main(monkeypatch, capsys, *SMALL, f"--out={tmp_path}", "--name=mine")
    assert status == 2 and "--resume" in words and words.count("\n") == 1


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    go(tmp_path, "--name=a")
    before = without_time(tmp_path / "a")
    run(train.parse([f"--resume={tmp_path / 'a'}"]))
    assert without_time(tmp_path / "a") == before


def test_a_checkpoint_of_another_version_is_refused_and_nothing_is_lost(
    tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", "sparsegrow-checkpoint-0")
        go(tmp_path, "--name=old")
    before = (tmp_path / "old" / tracking.METRICS).read_bytes()
    status, words = main(monkeypatch, capsys, f"--resume={tmp_path / 'old'}")
    assert status == 2 and "not a checkpoint of this version" in words and words.count("\n") == 1
    assert (tmp_path / "old" / tracking.METRICS).read_bytes() == before


RESUMED = [
    "--data=digits",
    "--batch=64",
    "--epochs=5",
    "--model=wrn-10-1",
    "--dropout=0.2",
    "--threads=1",
    "--checkpoint-interval=7",
    "--update-interval=6",
    "--update-average=3",
]


@pytest.mark.parametrize(
    "more",
    [
        ["--optimizer=sgd"],
        ["--optimizer=adamw"],
        # Dense momentum, counts that move between layers, and fewer from update to update.
        ["--method=snfs", "--density=0.1", "--density-start=0.7", "--density-ramp=linear"],
    ],
    ids=["sgd", "adamw", "snfs"],
)
def test_killed_in_mid_epoch_and_resumed_is_bit_for_bit(tmp_path, more):
    flags = [*RESUMED, f"--out={tmp_path}", "--lr=0.01", *more]

    def start(*words):
        command = [sys.executable, str(ROOT / "train.py"), *words]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)

    killed = start(*flags, "--name=killed")
    whole = tmp_path / "whole"
    path = tmp_path / "killed" / CHECKPOINT
    deadline = time.monotonic() + 120
    while not path.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "the run ended before it was killed"
    step = checkpoint.load(path)[1]["step"]
    assert step % 20 != 0, "the checkpoint is not one of mid-epoch"
    assert start(f"--resume={tmp_path / 'killed'}").wait() == 0
    run(train.parse([*flags, "--name=whole"]))
    assert_same_run(tmp_path / "killed", whole)


def test_resume_before_the_first_checkpoint_starts_over(tmp_path):
    go(tmp_path, "--name=a")
    go(tmp_path, "--name=b")
    (tmp_path / "b" / CHECKPOINT).unlink()
    run(train.parse([f"--resume={tmp_path / 'b'}"]))
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_full_disk_stops_the_run_and_resume_finishes_it(tmp_path, monkeypatch, capsys):
    flags = [*SMALL, "--epochs=3", f"--out={tmp_path}"]
    real, calls = checkpoint.save_file, []

    def full(tensors, target, metadata):
        calls.append(target)
        if len(calls) == 2:
            target.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, target, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        status, words = main(patch, capsys, *flags, "--name=full")
    assert status == 1 and "No space left" in words and words.count("\n") == 1
    assert checkpoint.load(tmp_path / "full" / CHECKPOINT)[1]["step"] == 20
    assert [p.name for p in (tmp_path / "full").glob(".*")] == []
    run(train.parse([f"--resume={tmp_path / 'full'}"]))
    run(train.parse([*flags, "--name=whole"]))
    assert_same_run(tmp_path / "full", tmp_path / "whole")


def test_a_full_disk_for_the_report(tmp_path, monkeypatch, capsys):
    go(tmp_path, "--name=a")
    (tmp_path / "a" / "report.md").unlink()
    (tmp_path / "a" / "report.md").symlink_to("/dev/full")
    status, words = main(monkeypatch, capsys, f"--resume={tmp_path / 'a'}")
    assert status == 1 and "No space left" in words and words.count("\n") == 1


def test_a_full_disk_for_the_metrics(tmp_path):
    """A limit on the size of files stands for the disk."""
    flags = [*SMALL, "--epochs=12", "--checkpoint-interval=1000ep", "--name=a", f"--out={tmp_path}"]
    command = f"ulimit -f 4; exec {sys.executable} {ROOT / 'train.py'} {' '.join(flags)}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "cannot write the metrics" in done.stderr and "Traceback" not in done.stderr


def test_a_loss_of_nan_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch, capsys):
    flags = [*SMALL, "--epochs=4", f"--out={tmp_path}", "--name=nan", "--optimizer=sgd"]
    status, words = main(
        monkeypatch, capsys, *flags, "--lr=1e30", "--warmup=60", "--checkpoint-interval=1"
    )
    assert status == 1 and "became" in words and words.count("\n") == 1
    tensors, state = checkpoint.load(tmp_path / "nan" / CHECKPOINT)
    assert state["step"] > 0
    assert all(t.isfinite().all() for name, t in tensors.items() if name.startswith("model/"))


def test_damaged_checkpoints_are_refused_in_one_line(tmp_path, monkeypatch, capsys):
    go(tmp_path, "--name=a")
    path = tmp_path / "a" / CHECKPOINT
    good = path.read_bytes()
    metrics = (tmp_path / "a" / tracking.METRICS).read_bytes()
    for bad in (good[:1000], b"not a checkpoint", good[:-9] + bytes([good[-9] ^ 4]) + good[-8:]):
        path.write_bytes(bad)
        status, words = main(monkeypatch, capsys, f"--resume={tmp_path / 'a'}")
        assert status == 2 and str(path) in words and words.count("\n") == 1
        assert (tmp_path / "a" / tracking.METRICS).read_bytes() == metrics


def test_resume_refuses_other_settings(tmp_path, monkeypatch, capsys):
    go(tmp_path, "--name=a")
    status, words = main(monkeypatch, capsys, f"--resume={tmp_path / 'a'}", "--lr=0.5")
    assert status == 2 and "cannot change lr" in words
    status, words = main(monkeypatch, capsys, f"--resume={tmp_path / 'nothing'}")
    assert status == 2 and "not the folder of a run" in words


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model=wnr-16-1"], "wrn"),
        (["--model=wrn-17-1"], "6n"),
        (["--model=a/b"], "unknown model"),
        (["--seed=99999999999999999999999"], "seed"),
        (["--update-interval=1e308ep"], "update-interval"),
        (["--data=mnist", "--data-dir=nowhere"], "nowhere"),
        (["--block=64"], "larger than every layer"),
        (["--density=0.0001", "--distribution=uniform"], "rounds to no"),
        (["--batch=5000"], "batch 5000"),
        (["--warmup=1000"], "warm-up"),
        (["--update-interval=1", "--method=rigl"], "trains nothing"),
        (["--update-average=50", "--update-interval=10"], "average"),
        (["--skip=conv*"], "matches none"),
        (["--device=cudda"], "cudda"),
        (["--name=a/b"], "folder's name"),
        (["--val-size=5000"], "5000"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(tmp_path, monkeypatch, capsys, flags, words):
    status, printed = main(monkeypatch, capsys, *SMALL, f"--out={tmp_path}", *flags)
    assert status == 2 and words in printed and printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(tmp_path, monkeypatch, capsys):
    status, printed = main(monkeypatch, capsys, *SMALL, f"--out={tmp_path}", "--device=cuda")
    assert status == 2 and "no GPU" in printed


def test_a_run_too_short_for_its_updates_says_so(tmp_path, caplog):
    go(tmp_path, "--method=rigl")
    assert "never be updated" in caplog.text


def test_a_batch_of_one(tmp_path):
    go(tmp_path, "--batch=1", "--lr=0.001", "--val-size=0", "--update-interval=500")
    lines = tracking.read(next(tmp_path.iterdir()))
    assert all("val" not in line for line in lines)


def test_amp_and_compile_and_workers(tmp_path):
    exact = go(tmp_path, "--update-interval=5", "--workers=0")
    bf16 = go(tmp_path, "--update-interval=5", "--amp=bf16", "--workers=1")
    assert abs(exact.test_accuracy - bf16.test_accuracy) < 0.1
    compiled = go(tmp_path, "--update-interval=5", "--compile", "--density=0.3")
    eager = go(tmp_path, "--update-interval=5", "--density=0.3")
    assert abs(compiled.test_loss - eager.test_loss) < 0.02


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    go(tmp_path, "--wandb=offline", "--name=w")
    assert list((tmp_path / "w" / "wandb").glob("offline-run-*/*.wandb"))
    assert checkpoint.load(tmp_path / "w" / CHECKPOINT)[1]["wandb_id"]


def test_wandb_starts_by_itself_under_a_sweep_agent(monkeypatch, tmp_path):
    assert tracking.start_wandb("auto", "p", tmp_path, {}, None) is None
    started = {}

    class Wandb:
        @staticmethod
        def init(**options):
            started.update(options)
            return "a run"

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert tracking.start_wandb("auto", "p", tmp_path, {}, None) == "a run"
    assert started["mode"] == "online"
    assert tracking.start_wandb("off", "p", tmp_path, {}, None) is None


def test_help_names_every_method_and_growth(capsys, monkeypatch):
    status, _ = 0, monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        train.main()
    words = capsys.readouterr().out
    assert stop.value.code in (0, None) and status == 0
    words = re.sub(r"[\s│]+", " ", words)
    for entries in (METHODS, PRESETS):
        for name, entry in entries.items():
            assert f"{name} ({entry.summary})" in words, name
    for names in (STRATEGIES, REDISTRIBUTIONS, DATASETS, AUGMENTATIONS):
        assert ", ".join(names) in words, names
    assert "--growth.k-similar" in words and "timm:NAME" in words


def test_a_real_process_prints_one_line_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--density=nan"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_torchrun_with_two_workers(tmp_path):
    """The topology after a run of two workers equals that of one with the same global batch."""
    flags = [*SMALL, f"--out={tmp_path}", "--threads=1", "--update-interval=4", "--density=0.2"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=2", str(ROOT / "train.py"), *flags, "--name=two"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run(train.parse([*flags, "--name=one"]))
    two, one = (checkpoint.load(tmp_path / n / CHECKPOINT)[0] for n in ("two", "one"))
    compared = 0
    for name, tensor in one.items():
        if name.endswith((".cols", ".row_offsets")):
            assert torch.equal(tensor, two[name]), name
            compared += 1
    assert compared >= 4
    assert json.loads((tmp_path / "two" / "config.json").read_text())["run"]["name"] == "two"
