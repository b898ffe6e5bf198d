"""The command behind docs/results.md: skips what is done, continues what was cut off."""

import json
import sys
from pathlib import Path

import pytest

# Last: a benchmark is called as the package that it measures.
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import experiments
import results
import results_page

from dst.recipes.fit import Fit

GROUP = experiments.Group(
    "tiny",
    "A tiny group",
    ("--data=digits", "--model=mlp-16", "--epochs=3", "--checkpoint-interval=5"),
    {"dense": ("--method=dense",), "static-0.2": ("--method=static", "--density=0.2"),
     "set-0.2": ("--method=set", "--density=0.2", "--update-interval=4")},
    seeds=2,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results, "FOLDERS", tmp_path / "runs")
    monkeypatch.setattr(results_page, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(results_page, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(results_page, "PAGE", tmp_path / "results.md")
    for module in (experiments, results_page.experiments):
        monkeypatch.setattr(module, "GROUPS", {"tiny": GROUP})


def _stored(job):
    return json.loads(results.result_file(job).read_text())


def test_every_group_names_runs_that_can_be():
    """Of the real groups: flags that parse and pass the checks, and no name twice."""
    import importlib

    from dst.config import check
    from train import parse

    real = importlib.reload(experiments)
    jobs = real.jobs(list(real.GROUPS))
    assert len({(job.group, job.name) for job in jobs}) == len(jobs)
    for job in jobs:
        if job.seed == 0:
            check(parse(list(job.flags)))
    compared = set(real.GROUPS["mlp-strokes"].variants)
    methods = [*real.METHODS, *real.FURTHER]
    assert {f"{m}-{d}" for m in methods for d in (0.1, 0.05, 0.02)} | {"dense"} == compared


def test_a_run_that_was_cut_off_goes_on_and_is_the_same(monkeypatch):
    job = experiments.jobs(["tiny"])[2]
    assert job.name == "set-0.2-0" and not results.is_done(job)
    results.run(job)
    whole = _stored(job)
    results.result_file(job).unlink()

    def cut_off(self, epoch):
        if epoch == 1:
            raise RuntimeError("killed")
        return log_epoch(self, epoch)

    log_epoch = Fit._log_epoch
    with monkeypatch.context() as patch:
        patch.setattr(Fit, "_log_epoch", cut_off)
        with pytest.raises(RuntimeError, match="killed"):
            results.run(job)
    folder = results.FOLDERS / "tiny" / job.name
    assert (folder / "checkpoint.safetensors").exists() and not results.is_done(job)

    resumed_from = []
    load = Fit.load

    def watched(self, tensors, state):
        resumed_from.append(state["step"])
        return load(self, tensors, state)

    monkeypatch.setattr(Fit, "load", watched)
    results.run(job)
    assert resumed_from and resumed_from[0] > 0
    again = _stored(job)
    assert again["cpu_seconds"] is None and whole["cpu_seconds"] > 0
    for name in ("test_accuracy", "test_loss", "training_flops", "explored_share"):
        assert again["final"][name] == whole["final"][name]
    assert results.is_done(job) and not folder.exists()


def test_done_means_whole_and_of_the_same_flags():
    job = experiments.jobs(["tiny"])[1]
    results.run(job)
    assert results.is_done(job)
    assert not results.is_done(job._replace(flags=(*job.flags, "--lr=0.3")))
    file = results.result_file(job)
    file.write_text(file.read_text()[:40])
    assert not results.is_done(job)


def test_a_folder_of_other_flags_is_begun_anew():
    job = experiments.jobs(["tiny"])[1]
    folder = results.FOLDERS / "tiny" / job.name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"method": "rigl"}')
    results.run(job)
    assert _stored(job)["final"]["explored_share"] == pytest.approx(0.2, abs=0.02)


def test_the_page_says_what_is_there_and_what_is_missing():
    for job in experiments.jobs(["tiny"]):
        if job.name != "dense-1":
            results.run(job)
    results_page.write()
    page = results_page.PAGE.read_text()
    assert "5 runs on" in page and "1 runs are still missing" in page
    accuracies = [100 * _stored(j)["final"]["test_accuracy"] for j in experiments.jobs(["tiny"])
                  if j.variant == "set-0.2"]  # fmt: skip
    half = 12.706 * abs(accuracies[0] - accuracies[1]) / 2
    assert f"| 0.2 | set | {sum(accuracies) / 2:.2f} ± {half:.2f} |" in page
    assert "density 0.2:" in page and "static: *set*" in page


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [((1.0, 1.1), "beats"), ((-1.0, -1.1), "loses to"), ((1.0, -0.5), "not told apart from")],
)
def test_verdicts(differences, verdict):
    runs = {
        "static-0.2": {s: {"final": {"test_accuracy": 0.5}} for s in (0, 1)},
        "set-0.2": {
            s: {"final": {"test_accuracy": 0.5 + d / 100}} for s, d in enumerate(differences)
        },
    }
    assert results_page._verdicts(runs) == f"- density 0.2: {verdict} static: *set*."
