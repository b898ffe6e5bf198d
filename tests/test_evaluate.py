"""``growth.evaluate`` against recall and mass computed from the whole gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import growth
from growth import ConvPairs, Exact, InputError, JoinedPairs, LinearPairs, Quality
from growth.connections import Connections, Grid
from growth.peak_memory import PeakMemory

NONE = torch.empty(0, dtype=torch.int64)
CPU = torch.device("cpu")


class _Given:
    """Returns the keys that it was made with, and scores that are not theirs."""

    needs_pairs, observes = True, False

    def __init__(self, keys: list[int], n_cols: int, metric: str | None = None) -> None:
        self.key, self.n_cols = torch.tensor(sorted(keys), dtype=torch.int64), n_cols
        if metric is not None:
            self.metric = metric
        self.seen: dict[str, Any] = {}

    def __call__(self, pairs: Any, count: int, active: Tensor, **options: Any) -> Connections:
        self.seen = options
        lies = torch.full((self.key.numel(),), 1e9)
        row, col = self.key // self.n_cols, self.key % self.n_cols
        return Connections(row, col, lies, 77, {"search": "given", "share": 0.5})


def _score(x: Tensor, dz: Tensor, metric: str) -> np.ndarray:
    x64, dz64 = x.double().numpy(), dz.double().numpy()
    product = dz64.T @ x64
    if metric == "l2":
        return -np.square(dz64.T[:, None, :] - x64.T[None, :, :]).sum(2)
    return np.abs(product) if metric == "abs-ip" else product


@pytest.mark.parametrize("metric", ["abs-ip", "ip", "l2"])
@pytest.mark.parametrize("seed", range(4))
def test_recall_and_mass_of_any_choice(metric: str, seed: int) -> None:
    torch.manual_seed(seed)
    x, dz = torch.randn(6, 13), torch.randn(6, 9)
    score = _score(x, dz, metric).ravel()
    rng = np.random.default_rng(seed)
    active = np.sort(rng.choice(117, 20, replace=False))
    free = np.setdiff1d(np.arange(117), active)
    best = free[np.argsort(-score[free])][:15]
    chosen = np.concatenate([best[:9], rng.choice(np.setdiff1d(free, best), 6, replace=False)])
    strategy = _Given(chosen.tolist(), 13, metric)
    quality = growth.evaluate(strategy, (x, dz), 15, torch.from_numpy(active))
    assert quality.recall == 9 / 15
    found, most = score[chosen].sum(), score[best].sum()
    expected = most / found if metric == "l2" else found / most
    assert quality.mass == pytest.approx(expected, rel=1e-5) and quality.mass < 1


def test_products_that_are_all_negative() -> None:
    x, dz = torch.rand(5, 6) + 0.1, -torch.rand(5, 4) - 0.1
    score = _score(x, dz, "ip").ravel()
    order = np.argsort(-score)
    strategy = _Given(order[1:4].tolist(), 6, "ip")
    quality = growth.evaluate(strategy, (x, dz), 3, NONE)
    assert quality.recall == pytest.approx(2 / 3)
    assert quality.mass == pytest.approx(score[order[:3]].sum() / score[order[1:4]].sum(), rel=1e-5)


@pytest.mark.parametrize("block", [(2, 3), (4, 4), (1, 2)])
def test_blocks_by_frobenius_norm(block: tuple[int, int]) -> None:
    torch.manual_seed(1)
    x, dz = torch.randn(6, 13), torch.randn(6, 9)
    gradient = dz.double().T @ x.double()
    grid = Grid.of(9, 13, 1, block)
    score = grid.pool(gradient).flatten().numpy()
    order = np.argsort(-score)
    chosen = [*order[:2].tolist(), int(order[-1])]
    quality = growth.evaluate(_Given(chosen, grid.n_cols), (x, dz), 3, NONE, block=block)
    assert quality.recall == pytest.approx(2 / 3)
    assert quality.mass == pytest.approx(score[chosen].sum() / score[order[:3]].sum(), rel=1e-5)


def test_ties_at_the_threshold_count_as_found() -> None:
    """Columns 0 to 3 are equal: any two of the four are as good as any others."""
    x = torch.randn(8, 1).repeat(1, 6)
    x[:, 4:] *= torch.tensor([3.0, 0.5])
    dz = torch.randn(8, 1)
    for ties in ([0, 1], [2, 3], [0, 3]):
        quality = growth.evaluate(_Given([*ties, 4], 6), (x, dz), 3, NONE)
        assert quality.recall == 1 and quality.mass == pytest.approx(1)
    quality = growth.evaluate(_Given([0, 1, 5], 6), (x, dz), 3, NONE)
    assert quality.recall == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearPairs(torch.randn(7, 10), torch.randn(7, 12)),
        lambda: JoinedPairs([LinearPairs(torch.randn(4, 10), torch.randn(4, 12))] * 2, 0.5),
        lambda: ConvPairs(torch.randn(2, 4, 6, 6), torch.randn(2, 12, 4, 4), (3, 3)),
        lambda: growth.StoredGradient(torch.randn(12, 10)),
        lambda: LinearPairs(torch.randn(7, 10).half(), torch.randn(7, 12).half()),
    ],
    ids=["linear", "joined", "conv", "stored", "half"],
)
@pytest.mark.parametrize("block", [(1, 1), (2, 2)])
def test_the_exact_searches_find_all(
    make: Callable[[], growth.Pairs], block: tuple[int, int]
) -> None:
    torch.manual_seed(2)
    for strategy in (Exact(), growth.Dense()):
        quality = growth.evaluate(strategy, make(), 5, torch.tensor([0, 3]), block=block)
        assert quality.recall == 1 and quality.mass == pytest.approx(1, abs=1e-6)
        assert quality.seconds > 0 and quality.reference_seconds > 0


def test_what_is_passed_on_and_what_is_told() -> None:
    x, dz = torch.randn(6, 5), torch.randn(6, 4)
    strategy, generator = _Given([1, 2], 5), torch.Generator()
    reference = _Given([1, 3], 5)
    quality = growth.evaluate(
        strategy, (x, dz), 2, NONE, generator=generator, state="kept", reference=reference
    )
    assert strategy.seen == {"block": (1, 1), "generator": generator, "state": "kept"}
    assert "state" not in reference.seen and "generator" not in reference.seen
    assert quality.flops == quality.reference_flops == 77
    assert quality.report == {"search": "given", "share": 0.5}


def test_a_wrapped_strategy_has_the_metric_of_the_one_inside() -> None:
    x, dz = torch.randn(6, 5), torch.randn(6, 4)
    strategy = growth.Averaged(Exact("ip"), rank=4, decay=0.0)
    state = strategy.observe((x, dz), None)
    quality = growth.evaluate(strategy, (x, dz), 6, NONE, state=state)
    assert quality.recall == 1
    # The scores are the strategy's own, whatever the reference goes by.
    quality = growth.evaluate(strategy, (x, dz), 6, NONE, state=state, reference=Exact("abs-ip"))
    assert quality.mass > 1


def test_of_nothing_everything_is_found() -> None:
    quality = growth.evaluate(Exact(), (torch.randn(3, 4), torch.randn(3, 2)), 0, NONE)
    assert (quality.recall, quality.mass) == (1, 1)
    zeros = torch.zeros(3, 4), torch.zeros(3, 2)
    quality = growth.evaluate(_Given([6, 7], 4), zeros, 2, NONE)
    assert (quality.recall, quality.mass) == (1, 1)


def test_global_randomness_and_the_vectors_are_left_alone() -> None:
    x, dz = torch.randn(6, 5), torch.randn(6, 4)
    before = torch.get_rng_state(), x.clone(), dz.clone()
    qualities: list[Quality] = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        qualities.append(growth.evaluate(growth.Random(), (x, dz), 4, NONE, generator=generator))
    assert qualities[0].recall == qualities[1].recall and qualities[0].mass == qualities[1].mass
    assert all(
        torch.equal(a, b) for a, b in zip(before, (torch.get_rng_state(), x, dz), strict=True)
    )


def test_bad_queries_are_refused() -> None:
    x, dz = torch.randn(6, 5), torch.randn(6, 4)
    with pytest.raises(InputError, match="cannot grow 21"):
        growth.evaluate(Exact(), (x, dz), 21, NONE)
    with pytest.raises(InputError, match="NaN or inf"):
        growth.evaluate(Exact(), (x * torch.nan, dz), 2, NONE)
    with pytest.raises(InputError, match="needs recorded vectors"):
        growth.evaluate(growth.Random(), growth.NoVectors(5, 4, 1, CPU), 2, NONE)


def _measurable() -> bool:
    with PeakMemory(CPU) as peak:
        pass
    return peak.bytes is not None


@pytest.mark.skipif(not _measurable(), reason="the kernel does not tell the peak of a process")
def test_the_peak_of_memory_that_is_gone_again() -> None:
    for megabytes in (64, 160):
        with PeakMemory(CPU) as peak:
            torch.ones(megabytes << 18)
            torch.ones(megabytes << 17)
        assert peak.bytes is not None
        assert megabytes - 2 < peak.bytes / (1 << 20) < megabytes + 16
    with PeakMemory(CPU) as peak:
        torch.ones(16)
    assert peak.bytes is not None and peak.bytes < 8 << 20


def test_where_the_peak_cannot_be_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    with PeakMemory(torch.device("meta")) as peak:
        pass
    assert peak.bytes is None
    monkeypatch.setattr("growth.peak_memory._CLEAR", tmp_path / "no" / "such")
    x, dz = torch.randn(6, 5), torch.randn(6, 4)
    assert growth.evaluate(Exact(), (x, dz), 2, NONE).memory is None
