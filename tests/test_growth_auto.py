"""The choice of a search: what the cost model says, once a layer, in words and in a state."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import growth.auto
from growth import Auto, Dense, Exact, InputError, LinearPairs, StoredGradient
from triton_kernels import costs

NONE = torch.empty(0, dtype=torch.int64)


def _layer(
    n_in: int, n_out: int, samples: int, rank: int = 8, noise: float = 0.05, spread: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Shared directions, noise, and norms that differ."""
    g = torch.Generator().manual_seed(n_in + rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    shared = normal(samples, rank)
    return tuple(  # type: ignore[return-value]
        (shared @ normal(rank, n) + noise * rank**0.5 * normal(samples, n))
        * (spread * normal(n)).exp()
        for n in (n_in, n_out)
    )


def _same(one: growth.Connections, other: growth.Connections) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


def _free(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a search cost nothing by the cost model."""
    monkeypatch.setattr(growth.auto, name, lambda *_: 1e-9)


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((600, 500, 32), "the layer is small: 500 x 600, 32 samples"),
        ((144, 64, 5000), "the vectors are long for the layer: 64 x 144, 5000 samples"),
        ((2000, 1000, 2000), "the vectors are long for the layer: 1000 x 2000, 2000 samples"),
    ],
)
def test_small_layers_and_convolutions_are_accumulated(
    shape: tuple[int, int, int], why: str
) -> None:
    pairs = _layer(*shape)
    found = Auto()(pairs, 50, NONE)
    assert found.state == found.report["growth"] == "dense" and found.report["why"] == why
    assert _same(found, Dense()(pairs, 50, NONE))


def test_a_stored_gradient_is_read() -> None:
    found = Auto()(StoredGradient(torch.randn(30, 40)), 50, NONE)
    assert found.state == "dense" and found.report["why"] == "the gradient is there already"


def test_few_heavy_neurons_are_searched_exactly() -> None:
    """Norms alone rule out the most."""
    pairs = _layer(1500, 1200, 64, spread=1.5)
    found = Auto()(pairs, 500, NONE)
    assert found.state == "exact" and _same(found, Exact()(pairs, 500, NONE))
    assert found.report["why"].startswith("it computes ") and "%" in found.report["why"]
    assert float(found.report["why"].split("computes ")[1].split("%")[0]) < 20
    assert found.report["search"] == "exact" and "computed" in found.report


def test_wide_layers_of_low_rank_are_screened() -> None:
    """Equal norms rule out nothing."""
    x, dz = _layer(4000, 3000, 256)
    pairs = (x / x.norm(dim=0), dz / dz.norm(dim=0))
    found = Auto()(pairs, 20_000, NONE)
    assert found.state == "lowrank:16" and found.report["growth"] == "lowrank:16"
    assert found.report["why"].startswith("rank 16 keeps the promise, ")
    assert found.report["why"].endswith(" x as fast as exact")
    assert found.report["search"] == "low rank" and found.report["recall"] >= 0.95
    best = Exact()(pairs, 20_000, NONE)
    keys = [f.row * 4000 + f.col for f in (found, best)]
    assert torch.isin(keys[1], keys[0]).double().mean() >= 0.95
    # A promise of everything is kept by no approximation.
    assert Auto(recall=1.0)(pairs, 20_000, NONE).state == "exact"


def test_noise_is_searched_exactly() -> None:
    pairs = _layer(1500, 1200, 64, noise=100.0)
    found = Auto()(pairs, 2000, NONE)
    assert found.state == "exact" and _same(found, Exact()(pairs, 2000, NONE))
    assert found.report["why"].endswith("no rank up to 32 keeps the promise")


def test_the_cheaper_by_the_cost_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = _layer(1500, 1200, 64)
    small = Auto()(pairs, 3000, NONE)
    assert small.state == "exact" and "rank 16 would do and take" in small.report["why"]
    _free(monkeypatch, "lowrank_ns")
    monkeypatch.setattr(growth.auto, "scan_ns", lambda _o, _i, depth, *_: depth)
    found = Auto()(pairs, 3000, NONE)
    assert found.state == "lowrank:16"
    assert found.report["why"] == "rank 16 keeps the promise, 4.0 x as fast as exact"
    monkeypatch.setattr(growth.auto, "scan_ns", lambda _o, _i, depth, *_: 1 / depth)
    assert Auto()(pairs, 3000, NONE).state == "exact"


def test_the_rank_is_the_first_that_keeps_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    _free(monkeypatch, "lowrank_ns")
    monkeypatch.setattr(growth.auto, "scan_ns", lambda _o, _i, depth, *_: depth)
    pairs = _layer(1500, 1500, 128, rank=30, noise=0.01, spread=0.0)
    found = Auto()(pairs, 5000, NONE)
    assert found.state in ("lowrank:24", "lowrank:32")
    assert found.report["rank"] >= int(found.state.split(":")[1])
    assert Auto(recall=0.2)(pairs, 5000, NONE).state == "lowrank:16"


def test_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = _layer(1024, 1024, 32)
    found = Auto()(pairs, 20, NONE, block=(32, 32))
    assert found.state == "exact"
    assert found.report["why"] == "Gram matrices are the cheapest for blocks of (32, 32)"
    assert found.report["search"] == "gram"
    found = Auto()(pairs, 20, NONE, block=(2, 2))
    assert found.report["why"] == "a product is the cheapest for blocks of (2, 2)"
    assert found.report["search"] == "tiles"
    _free(monkeypatch, "lowrank_ns")
    monkeypatch.setattr(growth.auto, "gram_ns", lambda _o, _i, depth, _b: depth)
    monkeypatch.setattr(growth.auto, "tiles_ns", lambda *_: 64)
    monkeypatch.setattr(growth.auto, "gram_pays", lambda *_: False)
    found = Auto()(_layer(1600, 1600, 64), 200, NONE, block=(8, 8))
    assert found.state == "lowrank:16" and "2.0 x as fast as exact" in found.report["why"]
    assert Auto(recall=1.0)(_layer(1600, 1600, 64), 200, NONE, block=(8, 8)).state == "exact"


@pytest.mark.parametrize("state", ["exact", "dense", "lowrank:16", "lowrank:24"])
def test_a_choice_holds_for_the_next_search(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    """Nothing is chosen again, whatever the vectors are by then."""
    monkeypatch.setattr(Auto, "_choose", None)
    pairs = _layer(1500, 1200, 64)
    found = Auto()(pairs, 3000, NONE, state=state)
    assert found.state == found.report["growth"] == state
    assert found.report["why"] == "chosen before"
    search = {"exact": "exact", "dense": "dense"}.get(state, "low rank")
    assert found.report["search"] == search
    if search == "low rank":
        assert found.report["rank"] == int(state.split(":")[1])
    again = Auto()(pairs, 3000, NONE, state=found.state)
    assert _same(found, again) and again.state == state


@pytest.mark.parametrize(
    "state", ["", "fast", "lowrank", "lowrank:", "lowrank:0", "lowrank:-4", "lowrank:x", 3, 0.5]
)
def test_a_foreign_state_is_refused(state: Any) -> None:
    with pytest.raises(InputError, match="is no choice of auto: pass the state that") as error:
        Auto()(_layer(60, 50, 8), 10, NONE, state=state)
    assert "\n" not in str(error.value) and repr(state) in str(error.value)


def test_a_choice_of_low_rank_keeps_a_promise_of_everything() -> None:
    """A run that is resumed with another promise."""
    pairs = _layer(1500, 1200, 64)
    found = Auto(recall=1.0)(pairs, 3000, NONE, state="lowrank:16")
    assert _same(found, Exact()(pairs, 3000, NONE))


def test_bad_promises_are_refused() -> None:
    with pytest.raises(InputError, match=r"recall 1\.1 must be a share"):
        Auto(recall=1.1)


@pytest.mark.parametrize("kind", ["zero", "constant", "all but three active", "nothing wanted"])
def test_degenerate_layers(kind: str) -> None:
    x, dz = torch.ones(16, 1024), torch.ones(16, 800)
    count, active = 300, NONE
    if kind == "zero":
        dz = dz * 0
    elif kind == "all but three active":
        count, active = 3, torch.arange(3, 800 * 1024)
    elif kind == "nothing wanted":
        count = 0
    found = Auto()((x, dz), count, active)
    assert _same(found, Exact()((x, dz), count, active))
    assert found.state and found.report["why"]


def test_the_share_that_norms_rule_out() -> None:
    x, dz = torch.diag(torch.tensor([1.0, 2, 4])), torch.diag(torch.tensor([1.0, 3, 0]))
    products = np.outer([1.0, 2, 4], [1.0, 3, 0])
    for threshold in (0.5, 1.0, 2.5, 6.0, 12.0, 13.0):
        share = (products >= threshold).mean()
        assert growth.auto._reaching(x, dz, threshold) == pytest.approx(share)
    assert growth.auto._reaching(x, dz, 0.0) == 1
    # Rounding rules nothing out: these norms' product is 128, or a little less.
    ones = torch.ones(128, 5)
    assert growth.auto._reaching(ones, ones, 128.0) == 1


def test_auto_never_draws() -> None:
    pairs = LinearPairs(*_layer(1500, 1200, 64))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again = (Auto()(pairs, 3000, NONE) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert _same(first, again) and first.report == again.report


def test_the_constants_are_those_of_one_module() -> None:
    assert growth.auto.scan_ns is costs.scan_ns and growth.auto.gram_ns is costs.gram_ns
