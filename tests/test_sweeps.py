"""The sweep files: what W&B and benchmarks/sweep.py make of them is what train.py takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import train
from dst.config import check

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "sweeps").glob("*.yaml"))
pytest.importorskip("yaml")


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import sweep

    return sweep


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_run_is_one_that_can_be(sweep, file: Path) -> None:
    jobs = sweep.read(file)
    assert jobs and len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        config = train.parse(list(job.flags))
        check(config)
        assert config.method == "mam" and config.run.seed == job.seed


def test_grids(sweep, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "method: grid\nparameters:\n  a: {values: [1, x/y]}\n  b: {value: true}\n"
        "  seed: {values: [3, 4]}\n"
    )
    found = {job.name: job.flags for job in sweep.read(file)}
    assert list(found) == ["1-3", "1-4", "x_y-3", "x_y-4"]
    assert found["x_y-4"] == ("--a=x/y", "--b=True", "--seed=4")
    for text, words in (
        ("method: bayes\n", "method: grid"),
        ("method: grid\nparameters: {a: {min: 1}}\n", "neither a value nor values"),
        ("a: [", "is not YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            sweep.read(file)
