"""Growth by a decayed sum of the gradient in low rank, against the dense sum in float64."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch import Tensor, nn

import dst
from growth import (
    Averaged,
    ConvPairs,
    Exact,
    InputError,
    JoinedPairs,
    LinearPairs,
    Momentum,
    Pairs,
    Random,
)

NONE = torch.empty(0, dtype=torch.int64)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _matrix(state: Tensor, n_in: int) -> Tensor:
    """The sum that a state stands for, float64."""
    state = state.double()
    return state[:, n_in:].T @ state[:, :n_in]


def _steps(
    steps: int,
    samples: int,
    n_in: int,
    n_out: int,
    rank: int,
    *,
    seed: int = 0,
    noise: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Iterator[LinearPairs]:
    """Gradients whose rows lie in one space of ``rank`` dimensions of falling weight, and noise."""
    generator = _generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    basis = normal(rank, n_in) / torch.arange(1, rank + 1)[:, None]
    for _ in range(steps):
        x = normal(samples, rank) @ basis + noise * normal(samples, n_in)
        yield LinearPairs(x.to(dtype), normal(samples, n_out).to(dtype))


def _dense(steps: list[LinearPairs], decay: float) -> Tensor:
    total = torch.zeros(steps[0].n_out, steps[0].n_in, dtype=torch.float64)
    for pairs in steps:
        total = decay * total + pairs.dz.double().T @ pairs.x.double()
    return total


def _observed(strategy: Averaged, steps: list[Pairs]) -> Tensor:
    state = None
    for pairs in steps:
        state = strategy.observe(pairs, state)
    assert state is not None
    return state


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from([1, 3, 20, 90]),  # samples: factorised as they are, or sketched
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(1, 6),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    st.booleans(),
)
def test_a_sum_of_low_rank_is_kept_to_rounding(
    samples: int, shape: tuple[int, int], rank: int, more: int, decay: float, double: bool
) -> None:
    dtype = torch.float64 if double else torch.float32
    steps = list(_steps(5, samples, *shape, rank, seed=samples + rank, dtype=dtype))
    state = _observed(Averaged(rank=rank + more, decay=decay), steps)
    assert state.dtype == dtype
    assert state.shape == (min(rank + more, *shape), sum(shape))
    expected = _dense(steps, decay)
    error = (_matrix(state, shape[0]) - expected).norm()
    assert error <= (1e-12 if double else 1e-5) * expected.norm()


@pytest.mark.parametrize("samples", [8, 200])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_a_sum_of_higher_rank_is_nearly_its_best_truncation(samples: int, noise: float) -> None:
    """Of each step's sum within a tenth; what all steps cut off adds up to somewhat more."""
    steps = list(_steps(6, samples, 120, 90, rank=60, noise=noise))
    for rank in (8, 16, 32):
        strategy, state = Averaged(rank=rank), None
        for pairs in steps:
            expected = pairs.dz.double().T @ pairs.x.double()
            if state is not None:
                expected += 0.9 * _matrix(state, 120)
            state = strategy.observe(pairs, state)
            error = (_matrix(state, 120) - expected).norm()
            best = torch.linalg.svdvals(expected)[rank:].norm()
            rounding = 1e-5 * expected.norm()
            assert best - rounding <= error <= 1.1 * best + rounding
        expected = _dense(steps, 0.9)
        error = (_matrix(state, 120) - expected).norm()
        assert error <= 1.3 * torch.linalg.svdvals(expected)[rank:].norm()


def test_the_factors_are_of_equal_norm_and_orthogonal() -> None:
    state = _observed(Averaged(rank=5), list(_steps(3, 50, 40, 30, rank=5)))
    right, left = state[:, :40], state[:, 40:]
    torch.testing.assert_close(right.norm(dim=1), left.norm(dim=1))
    for factor in (right, left):
        products = factor @ factor.T
        assert (products - products.diag().diag()).abs().max() < 1e-3 * products.max()


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_two_hundred_steps_stay_in_bounds(decay: float) -> None:
    strategy, state = Averaged(rank=4, decay=decay), None
    largest, total = 0.0, 0.0
    for pairs in _steps(200, 12, 25, 20, rank=25, noise=0.1):
        state = strategy.observe(pairs, state)
        assert state.shape == (4, 45)
        # A truncation is never larger than the sum that it truncates.
        total = decay * total + float((pairs.dz.T @ pairs.x).norm())
        largest = float(_matrix(state, 25).norm())
        assert largest <= total * (1 + 1e-5)
    assert largest > 0


def test_steps_without_a_gradient() -> None:
    zero = LinearPairs(torch.ones(50, 12), torch.zeros(50, 9))
    strategy = Averaged(rank=4, decay=0.5)
    state = strategy.observe(zero, strategy.observe(zero, None))
    assert torch.equal(state, torch.zeros(4, 21))
    found = strategy(zero, 7, NONE, state=state)
    assert found.row.shape == (7,) and torch.equal(found.score, torch.zeros(7))
    (pairs,) = _steps(1, 50, 12, 9, rank=3)
    state = strategy.observe(pairs, state)
    before = _matrix(state, 12)
    after = _matrix(strategy.observe(zero, state), 12)
    torch.testing.assert_close(after, before / 2, rtol=1e-4, atol=1e-4)


def _conv(batch: int, seed: int, scale: float = 1.0) -> ConvPairs:
    generator = _generator(seed)
    x = torch.randn(batch, 3, 7, 6, generator=generator)
    dz = torch.randn(batch, 5, 4, 2, generator=generator)
    return ConvPairs(x, dz, (3, 2), (2, 3), (1, 0), scale=scale)


@pytest.mark.parametrize("batch", [1, 6])
def test_convolutions_and_joined_recordings(batch: int) -> None:
    """At full rank the search is the one of the dense sum, blocks at a tap included."""
    steps = [JoinedPairs([_conv(batch, seed), _conv(2, seed + 9, 0.5)], 0.5) for seed in range(3)]
    averaged, momentum = Averaged(rank=64, decay=0.8), Momentum(0.8)
    low_rank, dense = None, None
    for pairs in steps:
        low_rank, dense = averaged.observe(pairs, low_rank), momentum.observe(pairs, dense)
    assert low_rank.shape == (5, 18 + 5)
    torch.testing.assert_close(_matrix(low_rank, 18), dense.double(), rtol=1e-4, atol=1e-4)
    for block in ((1, 1), (2, 2)):
        found = averaged(steps[-1], 6, NONE, block=block, state=low_rank)
        expected = momentum(steps[-1], 6, NONE, block=block, state=dense)
        assert torch.equal(found.row, expected.row) and torch.equal(found.col, expected.col)
        torch.testing.assert_close(found.score, expected.score, rtol=1e-4, atol=1e-4)


def test_without_a_past_the_step_is_searched() -> None:
    (pairs,) = _steps(1, 30, 14, 11, rank=9)
    found, exact = Averaged()(pairs, 20, NONE), Exact()(pairs, 20, NONE)
    assert torch.equal(found.row, exact.row) and torch.equal(found.col, exact.col)
    assert torch.equal(found.score, exact.score)


def test_the_wrapped_strategy_searches() -> None:
    steps = list(_steps(3, 30, 14, 11, rank=5))
    strategy = Averaged(Exact("ip"), rank=11, decay=0.5)
    expected = _dense(steps, 0.5)
    active = torch.arange(0, 154, 5)
    found = strategy(steps[-1], 12, active, state=_observed(strategy, steps))
    scores = expected.flatten().clone()
    scores[active] = -torch.inf
    assert (found.row * 14 + found.col).tolist() == scores.topk(12).indices.sort().values.tolist()
    scores = expected[found.row, found.col].float()
    torch.testing.assert_close(found.score, scores, rtol=1e-4, atol=1e-4)


def test_no_dense_gradient_is_ever_held() -> None:
    (pairs,) = _steps(1, 60, 3000, 2000, rank=10)
    strategy = Averaged(rank=8)
    with LargestTensor() as watch:
        state = strategy.observe(pairs, None)
        strategy.observe(pairs, state)
    assert watch.largest <= 60 * 3000


def test_the_same_whatever_the_random_state_and_the_number_of_threads() -> None:
    steps = list(_steps(3, 100, 700, 500, rank=10, noise=0.1))
    states = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(threads)
            drawn = torch.random.get_rng_state()
            states.append(_observed(Averaged(rank=6), steps))
            assert torch.equal(torch.random.get_rng_state(), drawn)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_a_state_goes_on_from_where_it_was_saved() -> None:
    steps = list(_steps(4, 20, 30, 25, rank=8))
    strategy = Averaged(rank=4)
    saved = _observed(strategy, steps[:2])
    copy = saved.clone()
    rest = strategy.observe(steps[3], strategy.observe(steps[2], copy))
    assert torch.equal(rest, _observed(strategy, steps))


@pytest.mark.parametrize("samples", [3, 90])
def test_another_layers_state_is_refused(samples: int) -> None:
    (pairs,) = _steps(1, samples, 14, 11, rank=5)
    for state in (torch.zeros(11, 24), torch.zeros(25), torch.zeros(2, 11, 25)):
        with pytest.raises(InputError, match="another layer's"):
            Averaged().observe(pairs, state)
        with pytest.raises(InputError, match="another layer's"):
            Averaged()(pairs, 1, NONE, state=state)
    wide = LinearPairs(pairs.x.double(), pairs.dz.double())
    with pytest.raises(InputError, match=r"float32.*float64"):
        Averaged().observe(wide, torch.zeros(11, 25))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_step_or_a_state_that_is_not_finite_is_refused(poison: float) -> None:
    (pairs,) = _steps(1, 30, 14, 11, rank=5)
    state = Averaged().observe(pairs, None)
    before = state.clone()
    bad = LinearPairs(pairs.x.clone(), pairs.dz)
    bad.x[2, 1] = poison
    with pytest.raises(InputError, match="do not observe this step"):
        Averaged().observe(bad, state)
    assert torch.equal(state, before)
    state[1, 1] = poison
    with pytest.raises(InputError, match="average holds NaN or inf: begin it anew"):
        Averaged()(pairs, 3, NONE, state=state)


@pytest.mark.parametrize("samples", [3, 300])
def test_a_sum_beyond_the_range_of_its_precision_is_refused(samples: int) -> None:
    pairs = LinearPairs(torch.full((samples, 14), 1e30), torch.full((samples, 11), 1e30))
    with pytest.raises(InputError, match="exceeds the range"):
        Averaged(rank=2).observe(pairs, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    (pairs,) = _steps(1, 30, 14, 11, rank=5)
    half = LinearPairs(pairs.x.to(dtype), pairs.dz.to(dtype), 0.125)
    state = Averaged().observe(half, None)
    assert state.dtype == torch.float32
    expected = half.dz.double().T @ half.x.double() / 8
    torch.testing.assert_close(_matrix(state, 14), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_wrapped() -> None:
    for strategy in (Momentum(), Random(), Averaged()):
        with pytest.raises(InputError, match=f"{type(strategy).__name__} does not search"):
            Averaged(strategy)
    with pytest.raises(InputError, match="'l2' compares the vectors"):
        Averaged(Exact("l2"))


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_decays_that_cannot_be(decay: float) -> None:
    with pytest.raises(InputError, match=r"decay .* must lie in \[0, 1\]"):
        Averaged(decay=decay)


def test_a_rank_is_at_least_one() -> None:
    with pytest.raises(InputError, match="rank 0 "):
        Averaged(rank=0)


def test_operations_by_hand() -> None:
    """Four products with a sketch of 12 columns; or one factorisation of 5 + 4 vectors."""
    wide, few = (LinearPairs(torch.ones(n, 30), torch.ones(n, 20)) for n in (100, 5))
    assert Averaged(rank=4).observe_flops(wide) == 4 * 2 * (100 + 4) * 12 * 50
    assert Averaged(rank=4).observe_flops(few) == 2 * 9 * 9 * 50
    assert Momentum().observe_flops(wide) == 2 * 100 * 30 * 20


def test_an_update_counts_them() -> None:
    model = nn.Sequential(dst.SparseLinear(30, 20, density=0.2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy = Averaged(rank=4)
    method = replace(dst.similarity(dst.UpdateSchedule(3, 9, 0.3, "constant")), growth=strategy)
    updater = dst.TopologyUpdater(model, optimizer, method)
    for _ in range(3):
        model(torch.randn(100, 30)).square().sum().backward()
        if not updater.step():
            optimizer.step()
        optimizer.zero_grad()
    assert 0 < updater.last.flops <= 2 * 4 * 30 * 20  # a search of the four factors
    assert updater.observed_flops == 3 * (4 * 2 * (100 + 4) * 12 * 50)
    assert updater.states["0"].shape == (4, 50)
