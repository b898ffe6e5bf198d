"""The audit of a run's growth: what it says, and that it changes nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import growth
import train
from dst import METHODS, TopologyUpdater, UpdateSchedule, checkpoint, sparsify, tracking
from dst.errors import StoppedError
from dst.recipes.session import CHECKPOINT
from dst.training import run
from growth import InputError

SMALL = ["--data=digits", "--epochs=1", "--model=mlp-32-32", "--update-interval=4"]


def _go(tmp_path: Path, *flags: str) -> Path:
    run(train.parse([*SMALL, f"--out={tmp_path}", *flags]))
    name = next(flag for flag in flags if flag.startswith("--name=")).removeprefix("--name=")
    return tmp_path / name


def _of_kind(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in tracking.read(folder) if line["kind"] == kind]


@pytest.mark.parametrize(
    "flags",
    [
        ["--growth=gse", "--growth.sampling=norm"],
        ["--update-average-rank=4"],
        ["--update-average=3", "--block=4"],
    ],
    ids=lambda flags: flags[0],
)
def test_weights_are_the_same_with_and_without(tmp_path: Path, flags: list[str]) -> None:
    """Strategies that draw, that keep a state and that search several steps."""
    plain = _go(tmp_path, *flags, "--name=plain")
    audited = _go(tmp_path, *flags, "--name=audited", "--growth-audit=1")
    tensors, state = checkpoint.load(plain / CHECKPOINT)
    others, other_state = checkpoint.load(audited / CHECKPOINT)
    assert set(tensors) == set(others)
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    for key in ("seconds", "metrics_bytes"):
        state.pop(key), other_state.pop(key)
    assert state == other_state
    assert _of_kind(plain, "audit") == [] and len(_of_kind(audited, "audit")) >= 3
    final, other = (_of_kind(folder, "final")[0] for folder in (plain, audited))
    assert final["training_flops"] == other["training_flops"]


def test_every_second_update_is_audited_and_reported(tmp_path: Path) -> None:
    flags = ["--growth=subblock", "--growth.share=0.3", "--update-end=1"]
    folder = _go(tmp_path, *flags, "--name=a", "--growth-audit=2")
    audits, updates = _of_kind(folder, "audit"), _of_kind(folder, "update")
    assert [line["step"] for line in updates] == [4, 8, 12, 16]
    assert [line["step"] for line in audits] == [8, 16]
    for line in audits:
        assert line["quality"].keys() == line["time"].keys() == {"1", "4", "7"}
        for quality, time in zip(line["quality"].values(), line["time"].values(), strict=True):
            assert 0 <= quality["recall"] <= 1 and 0 <= quality["mass"] <= 1
            assert quality["report"]["search"] == "subblock"
            assert time["seconds"] > 0 and time["reference_seconds"] > 0
    assert min(q["recall"] for line in audits for q in line["quality"].values()) < 1
    clock = _of_kind(folder, "epoch")[0]["time"]
    assert clock["audit"] > 0
    growing = _of_kind(folder, "final")[0]["growth_seconds"]
    assert growing == pytest.approx(sum(v for k, v in clock.items() if k.startswith("growth")))
    report = (folder / "report.md").read_text()
    assert "| growth audit | 2 updates against the exact search: mean recall" in report
    assert "(audit.png)" in report and (folder / "audit.png").is_file()
    assert "| growth | subblock for 1, 4, 7 |" in report


def test_the_exact_search_has_a_recall_of_one(tmp_path: Path) -> None:
    folder = _go(tmp_path, "--method=rigl", "--name=a", "--growth-audit=1")
    audits = _of_kind(folder, "audit")
    assert audits and all(q["recall"] == 1 for line in audits for q in line["quality"].values())
    assert all(q["mass"] == 1 for line in audits for q in line["quality"].values())


def test_a_resumed_run_audits_the_same_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between the first update and the second, which is audited."""
    flags = ["--growth-audit=2", "--checkpoint-interval=1", "--growth=gse"]
    whole = _go(tmp_path, *flags, "--name=whole")
    with monkeypatch.context() as patch:
        _stop_at(patch, 6)
        with pytest.raises(StoppedError, match="go on with --resume"):
            _go(tmp_path, *flags, "--name=stopped")
    run(train.parse([f"--resume={tmp_path / 'stopped'}"]))
    for one, other in zip(
        _of_kind(whole, "audit"), _of_kind(tmp_path / "stopped", "audit"), strict=True
    ):
        assert one["step"] == other["step"] == 8 and one["quality"] == other["quality"]


def _stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """As if the user had interrupted the run before this step."""
    train_step = TopologyUpdater.step

    def interrupted(updater: TopologyUpdater) -> bool:
        if updater.steps == step:
            raise KeyboardInterrupt
        return train_step(updater)

    monkeypatch.setattr(TopologyUpdater, "step", interrupted)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--growth-audit=-1"], "growth-audit -1"),
        (["--growth-audit=2", "--method=set"], "leave --growth-audit away"),
        (["--growth-audit=2", "--growth=random"], "leave --growth-audit away"),
    ],
)
def test_refusals(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    words: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, f"--out={tmp_path}", *flags])
    with pytest.raises(SystemExit) as stop:
        train.main()
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and words in printed and printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_in_a_loop_of_ones_own() -> None:
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 4)), density=0.4, skip=())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = METHODS["similarity"].build(UpdateSchedule(2, 20, 0.5), 0)
    updater = TopologyUpdater(model, optimizer, method, audit=2)
    found = []
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(6, 12)).square().sum().backward()
        if not updater.step():
            optimizer.step()
        found.append(None if updater.audited is None else updater.audited.step)
    assert found == [None, None, None, 4, 4, 4, 4, 8]
    assert updater.audited is not None and updater.audited.quality.keys() == {"0", "1"}
    assert all(q.recall == 1 for q in updater.audited.quality.values())
    assert updater.audited.seconds > 0


def test_random_growth_has_nothing_to_audit() -> None:
    model = sparsify(nn.Sequential(nn.Linear(12, 10)), density=0.4, skip=())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = METHODS["set"].build(UpdateSchedule(1, 20, 0.5), 0)
    updater = TopologyUpdater(model, optimizer, method, audit=1)
    model(torch.randn(6, 12)).square().sum().backward()
    with pytest.raises(InputError, match="needs recorded vectors"):
        updater.step()
    assert isinstance(method.growth, growth.Random)  # type: ignore[attr-defined]
