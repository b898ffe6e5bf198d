"""``--method mam`` from its flags to its report: phases, resume in each of them, refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import dst
import train
from dst import checkpoint, tracking
from dst.config import Config
from dst.errors import StoppedError
from dst.pruning import SCOPES, SCORES
from dst.recipes.fit import Fit
from dst.recipes.mam import CURVE, Plan, _pruning_images, plan
from dst.recipes.setup import load_data
from dst.report import Summary
from dst.training import run
from growth import InputError

# 1297 training images: 20 steps of 64 an epoch.
SMALL = ["--method=mam", "--data=digits", "--model=mlp-24-16", "--batch=64", "--optimizer=adam"]
SMALL += ["--lr=0.01", "--lr-schedule=constant", "--weight-decay=0", "--augment=none"]
SMALL += ["--epochs=4", "--vanish-epochs=2", "--finetune-epochs=2", "--keep=0.1"]
WEIGHTS = 64 * 24 + 24 * 16
IMAGES = 140  # of the validation split


def go(folder: Path, *flags: str) -> Summary:
    return run(train.parse([*SMALL, *flags, f"--out={folder}"]))


def phases(folder: Path) -> dict[str, dict]:
    return {line["phase"]: line for line in tracking.read(folder) if line["kind"] == "phase"}


def test_phases_of_a_run(tmp_path: Path) -> None:
    summary = go(tmp_path, "--name=a")
    lines = tracking.read(tmp_path / "a")
    found = phases(tmp_path / "a")
    assert list(found) == ["trained", "pruned", "fine-tuned"]
    assert found["trained"]["test"]["accuracy"] > 0.6
    assert found["pruned"]["test"]["accuracy"] < found["trained"]["test"]["accuracy"]
    assert found["fine-tuned"]["test"]["accuracy"] == summary.test_accuracy > 0.6
    kept = round(0.1 * WEIGHTS)
    assert found["trained"]["weights"] == WEIGHTS + 160
    assert found["pruned"]["weights"] == found["fine-tuned"]["weights"] == kept + 160
    # 3 FLOPs a weight with max and min, 2 with the sum.
    assert found["trained"]["inference_flops"] == 3 * WEIGHTS + 320
    assert summary.inference_flops == 2 * kept + 320
    # The first step is an ordinary one. Both products for the rest of 2 epochs, max and min alone
    # for 2 more, the kept weights' sum for the last 2; and a pass over validation images to score.
    rest, outputs = 6 * 160, 24 + 16
    alone, linear = 3 * WEIGHTS + 8 * outputs, 6 * WEIGHTS
    steps = linear + 39 * (alone + linear) + 40 * alone + 40 * 6 * kept + 120 * rest
    assert summary.training_flops == 64 * steps + IMAGES * (alone + rest)
    betas = [line.get("beta") for line in lines if line["kind"] == "epoch"]
    assert betas[2:] == [0, 0, None, None] and 0 < betas[1] < betas[0] < 1
    report = (tmp_path / "a" / "report.md").read_text()
    assert f"| pruned | {found['pruned']['val']['accuracy']:.2%} |" in report
    assert "(beta.png)" in report
    assert (tmp_path / "a" / "beta.png").read_bytes().startswith(b"\x89PNG")
    tensors, _ = checkpoint.load(tmp_path / "a" / "checkpoint.safetensors")
    alive = sum(tensors[f"model/{n}.topology.cols"].numel() for n in (1, 4))
    assert alive == kept


def test_a_curve_and_no_fine_tuning(tmp_path: Path) -> None:
    """Every score, both scopes; the checkpoint is the pruned network's all the same."""
    flags = ["--prune-curve", "--finetune-epochs=0", "--prune-images=30", "--after-prune=mam"]
    summary = go(tmp_path, "--name=a", "--epochs=2", "--vanish-epochs=1", *flags)
    lines = [line for line in tracking.read(tmp_path / "a") if line["kind"] == "curve"]
    found = {(line["score"], line["scope"], line["keep"]): line["test"] for line in lines}
    # Not where fewer than a weight a layer would be left.
    shares = 1 + sum(keep * WEIGHTS >= 2 for keep in CURVE)
    assert len(found) == len(lines) == len(SCORES) * len(SCOPES) * shares
    trained = phases(tmp_path / "a")["trained"]["test"]
    assert all(test == trained for (_, _, keep), test in found.items() if keep == 1)
    # The weights that pruning kept are those of this score's curve.
    assert list(phases(tmp_path / "a")) == ["trained", "pruned"]
    assert found["gradient", "global", 0.1] == phases(tmp_path / "a")["pruned"]["test"]
    assert summary.test_accuracy == found["gradient", "global", 0.1]["accuracy"]
    tensors, state = checkpoint.load(tmp_path / "a" / "checkpoint.safetensors")
    assert tensors["model/1.values"].shape[1:] == (1, 1) and state["kept"] == {"phase": "finetune"}
    assert "(curve.png)" in (tmp_path / "a" / "report.md").read_text()
    run(train.parse([f"--resume={tmp_path / 'a'}"]))
    assert list(phases(tmp_path / "a")) == ["trained", "pruned"]


def test_pruning_images_are_drawn(tmp_path: Path) -> None:
    """In some data sets the classes stand one after another."""
    config = train.parse([*SMALL, "--prune-images=40", "--prune-on=train"])
    data = load_data(config)
    images = _pruning_images(config, data)
    assert len(images) == 40 and len(images.labels.unique()) > 6
    assert torch.equal(_pruning_images(config, data).labels, images.labels)


def test_max_and_min_may_stay(tmp_path: Path) -> None:
    summary = go(tmp_path, "--name=a", "--after-prune=mam", "--prune-scope=local")
    assert summary.inference_flops == 3 * (154 + 38) + 320
    tensors, _ = checkpoint.load(tmp_path / "a" / "checkpoint.safetensors")
    assert [tensors[f"model/{n}.topology.cols"].numel() for n in (1, 4)] == [154, 38]
    assert tensors["model/1.mix"] == 0


def test_the_same_pipeline_with_ordinary_layers(tmp_path: Path) -> None:
    go(tmp_path, "--name=a", "--neuron=mac", "--prune-score=magnitude", "--mam-layers=first")
    found = phases(tmp_path / "a")
    assert found["trained"]["inference_flops"] == 2 * (WEIGHTS + 160)
    assert found["pruned"]["weights"] == round(0.1 * 64 * 24) + 24 * 16 + 160


@pytest.mark.parametrize("stop", [3, 61, 97])
def test_stopped_and_resumed_is_bit_for_bit(
    tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the sum vanishes, with max and min, and while fine-tuning."""
    flags = ["--checkpoint-interval=9"]
    go(tmp_path, "--name=whole", *flags)
    step = Fit._train_step

    def stopping(self: Fit, *args: torch.Tensor) -> None:
        if self.step == stop:
            raise KeyboardInterrupt
        step(self, *args)

    with monkeypatch.context() as patch, pytest.raises(StoppedError, match="go on with --resume"):
        patch.setattr(Fit, "_train_step", stopping)
        go(tmp_path, "--name=cut", *flags)
    run(train.parse([f"--resume={tmp_path / 'cut'}"]))
    whole, cut = (
        checkpoint.load(tmp_path / name / "checkpoint.safetensors")[0] for name in ("whole", "cut")
    )
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    told, again = (
        [
            {k: v for k, v in line.items() if k not in ("time", "wall_seconds", "seconds")}
            for line in tracking.read(tmp_path / name)
        ]
        for name in ("whole", "cut")
    )
    assert told == again


def test_stopped_while_it_prunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(tmp_path, "--name=whole")
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(sys.modules["dst.recipes.mam"], "measure", _interrupted)
        go(tmp_path, "--name=cut")
    run(train.parse([f"--resume={tmp_path / 'cut'}"]))
    found, again = (phases(tmp_path / name) for name in ("whole", "cut"))
    assert found == again


def _interrupted(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), Plan(100, 50, 40)),
        (("--vanish-epochs=3",), Plan(100, 30, 40)),
        (("--prune-after=2",), Plan(70, 50, 30)),
        (("--prune-after=2", "--finetune-epochs=9"), Plan(70, 50, 90)),
        (("--vanish-epochs=0.5", "--prune-after=0.2"), Plan(10, 5, 90)),
        (("--prune-after=5",), Plan(100, 50, 40)),
        (("--epochs=1",), Plan(10, 5, 10)),
    ],
)
def test_plan_of_epochs(flags: tuple[str, ...], expected: Plan) -> None:
    assert plan(train.parse(["--method=mam", *flags]), 10) == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--keep=0"], "keep 0.0 must be above 0 and below 1"),
        (["--prune-score=gradeint"], "did you mean gradient"),
        (["--prune-scope=all"], "prune-scope 'all' is unknown"),
        (["--neuron=max"], "neuron 'max' is unknown"),
        (["--vanish-epochs=9"], "vanish-epochs 9.0 must be at least 0 and at most 4"),
        (["--prune-after=3"], "prune-after 3 is 5 epochs into a run of 4"),
        (["--block=16"], "prunes single weights, not blocks of 16"),
        (["--neuron=mac", "--after-prune=mam"], "use --neuron=mam"),
        (["--mam-layers=conv*"], "MAM layer 'conv*' matches none of 1, 4, 7"),
        (["--prune-images=100000"], "is more than the"),
        (["--val-size=0"], "no validation images to prune by"),
        (["--growth=exact"], "method mam grows by nothing"),
        (["--weights=nowhere.pt"], "cannot read the weights nowhere.pt"),
        (["--mam-layers=,"], "layers is empty: name some of 1, 4"),
        (["--keep=0.0003"], "keep 0.0003 is 1 weights of 2 layers"),
        (["--warmup=40"], "fine-tuning: a warm-up of 40 steps must end inside 40 steps"),
        (["--neuron=mac", "--mam-layers=conv*"], "matches none of"),
    ],
)
def test_refusals(tmp_path: Path, flags: list[str], words: str) -> None:
    with pytest.raises(InputError) as refused:
        go(tmp_path, *flags)
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_run(tmp_path: Path) -> None:
    flags = ["--method=dense", "--data=digits", "--model=mlp-24-16", "--epochs=2"]
    first = run(train.parse([*flags, f"--out={tmp_path}", "--name=first"]))
    stored = tmp_path / "first" / "checkpoint.safetensors"
    go(tmp_path, "--name=second", f"--weights={stored}", "--lr=1e-6", "--vanish-epochs=4")
    epochs = [line for line in tracking.read(tmp_path / "second") if line["kind"] == "epoch"]
    assert first.test_accuracy > 0.8 and epochs[0]["val"]["accuracy"] > 0.75
    # Its config can be read again, and names the file.
    assert json.loads((tmp_path / "second" / "config.json").read_text())["weights"] == str(stored)
    assert isinstance(dst.METHODS, dict) and Config().weights is None
