"""One suite of invariants for every growth strategy, and what each one promises by itself."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch import Tensor

import growth
from growth import (
    METRICS,
    STRATEGIES,
    ConvPairs,
    Dense,
    Exact,
    Faiss,
    InputError,
    JoinedPairs,
    LinearPairs,
    MissingLibraryError,
    NoVectors,
    Random,
    from_unfold_order,
)

NONE = torch.empty(0, dtype=torch.int64)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _integers(*shape: int, seed: int, low: int = -3, high: int = 3) -> Tensor:
    """Small whole numbers: their products are exact in float32, and tie often."""
    return torch.randint(low, high + 1, shape, generator=_generator(seed)).float()


def _keys(found: growth.Connections, n_cols: int) -> list[int]:
    return (found.row * n_cols + found.col).tolist()


def _check(found: growth.Connections, count: int, active: Tensor, n_rows: int, n_cols: int) -> None:
    """Exactly ``count`` inactive connections of the grid, sorted, each once."""
    assert found.row.dtype == found.col.dtype == torch.int64
    assert found.row.shape == found.col.shape == found.score.shape == (count,)
    assert found.score.is_floating_point() and not found.score.requires_grad
    if count:
        assert int(found.row.min()) >= 0 and int(found.row.max()) < n_rows
        assert int(found.col.min()) >= 0 and int(found.col.max()) < n_cols
    keys = _keys(found, n_cols)
    assert keys == sorted(set(keys))
    assert not set(keys) & set(active.tolist())


@pytest.fixture(params=sorted(STRATEGIES))
def strategy(request: pytest.FixtureRequest) -> growth.Strategy:
    """Every registered strategy with its defaults."""
    try:
        return STRATEGIES[request.param]()
    except MissingLibraryError as error:
        pytest.skip(str(error))


# What every strategy must do.

SHAPES = [(1, 1, 1), (4, 1, 7), (4, 7, 1), (1, 6, 9), (8, 9, 6), (3, 20, 4)]


@pytest.mark.parametrize(("batch", "n_in", "n_out"), SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_exactly_count_inactive_ones(
    strategy: growth.Strategy, batch: int, n_in: int, n_out: int, share: float
) -> None:
    size = n_in * n_out
    active = torch.randperm(size, generator=_generator(1))[: int(share * size)].sort().values
    x, dz = torch.randn(batch, n_in), torch.randn(batch, n_out)
    left = size - active.numel()
    for count in sorted({0, 1, left // 2, left}):
        found = strategy((x, dz), count, active, generator=_generator())
        _check(found, count, active, n_out, n_in)


@pytest.mark.parametrize("kind", ["zero", "constant", "ties", "one heavy row", "zero gradient"])
def test_degenerate_vectors(strategy: growth.Strategy, kind: str) -> None:
    x, dz = torch.ones(4, 9), torch.ones(4, 7)
    if kind == "zero":
        x, dz = x * 0, dz * 0
    elif kind == "ties":
        x, dz = _integers(4, 9, seed=1, low=-1, high=1), _integers(4, 7, seed=2, low=-1, high=1)
    elif kind == "one heavy row":
        dz[:, 3] = 1e6
    elif kind == "zero gradient":
        dz = dz * 0
    active = torch.arange(0, 63, 4)
    for count in (1, 20, 63 - active.numel()):
        first = strategy((x, dz), count, active, generator=_generator())
        _check(first, count, active, 7, 9)
        again = strategy((x, dz), count, active, generator=_generator())
        assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))


def test_deterministic_and_blind_to_the_global_state(strategy: growth.Strategy) -> None:
    x, dz = torch.randn(6, 30), torch.randn(6, 20)
    torch.manual_seed(1)
    first = strategy((x, dz), 50, NONE, generator=_generator(3))
    torch.manual_seed(2)
    again = strategy((x, dz), 50, NONE, generator=_generator(3))
    assert _keys(first, 30) == _keys(again, 30)
    assert torch.equal(first.score, again.score)


def test_all_that_is_left(strategy: growth.Strategy) -> None:
    active = torch.tensor([0, 1, 2, 3, 11, 12, 13, 14, 29])
    found = strategy((torch.randn(3, 5), torch.randn(3, 6)), 21, active, generator=_generator())
    assert _keys(found, 5) == sorted(set(range(30)) - set(active.tolist()))


def test_nothing_left_and_nothing_asked(strategy: growth.Strategy) -> None:
    found = strategy((torch.ones(2, 3), torch.ones(2, 2)), 0, torch.arange(6))
    _check(found, 0, torch.arange(6), 2, 3)


@pytest.mark.parametrize("count", [-1, 7, 100])
def test_more_than_is_left_is_refused(strategy: growth.Strategy, count: int) -> None:
    with pytest.raises(InputError, match=rf"cannot grow {count} .* 6 of 12"):
        strategy((torch.ones(2, 4), torch.ones(2, 3)), count, torch.arange(6))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "dz"])
def test_what_is_not_finite_is_refused(strategy: growth.Strategy, where: str, bad: float) -> None:
    x, dz = torch.ones(2, 4), torch.ones(2, 3)
    (x if where == "x" else dz)[1, 2] = bad
    with pytest.raises(InputError, match="NaN or inf"):
        strategy((x, dz), 2, NONE)


@pytest.mark.parametrize(
    ("active", "message"),
    [
        ([3, 1], "sorted and unique"),
        ([1, 1], "sorted and unique"),
        ([-1, 3], r"lie in \[0, 12\).*not -1\.\.3"),
        ([3, 12], r"lie in \[0, 12\).*not 3\.\.12"),
        ([[1, 2]], "1-D int64"),
        ([1.0, 2.0], "1-D int64"),
    ],
)
def test_bad_active_keys_are_refused(
    strategy: growth.Strategy, active: list[Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        strategy((torch.ones(2, 4), torch.ones(2, 3)), 1, torch.tensor(active))


@pytest.mark.parametrize(
    ("x", "dz", "message"),
    [
        (torch.ones(2, 4), torch.ones(3, 3), "same batch"),
        (torch.ones(4), torch.ones(3), "same batch"),
        (torch.ones(2, 5, 4), torch.ones(2, 3), "same batch"),
        (torch.ones(0, 4), torch.ones(0, 3), "not be empty"),
        (torch.ones(2, 0), torch.ones(2, 3), "not be empty"),
        (torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 3), "floating point"),
    ],
)
def test_wrong_shapes_are_refused(
    strategy: growth.Strategy, x: Tensor, dz: Tensor, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        strategy((x, dz), 1, NONE)


@pytest.mark.parametrize("block", [(0, 1), (1, 0), (-2, 2)])
def test_blocks_must_be_positive(strategy: growth.Strategy, block: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="positive"):
        strategy((torch.ones(2, 4), torch.ones(2, 3)), 1, NONE, block=block)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(strategy: growth.Strategy, dtype: torch.dtype) -> None:
    """Whole numbers are exact in every dtype, so that the answer is the one of float32."""
    x, dz = _integers(5, 8, seed=1), _integers(5, 6, seed=2)
    wide = strategy((x, dz), 12, NONE, generator=_generator())
    other = strategy((x.to(dtype), dz.to(dtype)), 12, NONE, generator=_generator())
    assert _keys(wide, 8) == _keys(other, 8)
    torch.testing.assert_close(other.score.float(), wide.score)


def test_half_precision_products_do_not_overflow(strategy: growth.Strategy) -> None:
    """300 * 300 is beyond float16, which holds up to 65504."""
    x, dz = torch.full((2, 4), 300.0).half(), torch.full((2, 3), 300.0).half()
    x[:, 2] = 400
    found = strategy((x, dz), 3, NONE, generator=_generator())
    _check(found, 3, NONE, 3, 4)
    assert found.score.isfinite().all()


def test_inputs_of_any_layout_and_with_a_graph(strategy: growth.Strategy) -> None:
    x, dz = _integers(5, 8, seed=1), _integers(5, 6, seed=2)
    wanted = strategy((x, dz), 12, NONE, generator=_generator())
    strided = (x.T.contiguous().T, torch.cat([dz, dz], 1)[:, :6])
    graph = (x.clone().requires_grad_(), dz.clone().requires_grad_())
    deep = (x[:, None], dz[:, None])
    for vectors in (strided, graph, deep):
        found = strategy(vectors, 12, NONE, generator=_generator())
        _check(found, 12, NONE, 6, 8)
        assert _keys(found, 8) == _keys(wanted, 8)


def test_inputs_are_left_as_they_are(strategy: growth.Strategy) -> None:
    x, dz, active = _integers(5, 8, seed=1), _integers(5, 6, seed=2), torch.tensor([1, 5, 9])
    copies = x.clone(), dz.clone(), active.clone()
    strategy((x, dz), 12, active, generator=_generator())
    pairs = JoinedPairs([LinearPairs(x, dz)])
    strategy(pairs, 12, active, generator=_generator())
    assert all(torch.equal(a, b) for a, b in zip((x, dz, active), copies, strict=True))


def test_joined_recordings_are_one_batch(strategy: growth.Strategy) -> None:
    x, dz = _integers(6, 8, seed=1), _integers(6, 5, seed=2)
    parts = JoinedPairs([LinearPairs(x[:2], dz[:2]), LinearPairs(x[2:], dz[2:])])
    whole = strategy((x, dz), 11, NONE, generator=_generator())
    joined = strategy(parts, 11, NONE, generator=_generator())
    assert _keys(whole, 8) == _keys(joined, 8)
    assert torch.equal(whole.score, joined.score)


def test_needs_pairs_tells_the_truth(strategy: growth.Strategy) -> None:
    sizes = NoVectors(4, 3, 1, torch.device("cpu"))
    if strategy.needs_pairs:
        with pytest.raises(InputError, match="needs recorded vectors"):
            strategy(sizes, 2, NONE, generator=_generator())
    else:
        _check(strategy(sizes, 2, NONE, generator=_generator()), 2, NONE, 3, 4)


# The exact search.


def _brute_force(
    pairs: growth.Pairs, count: int, active: Tensor, metric: str, block: tuple[int, int]
) -> tuple[list[int], np.ndarray]:
    """Keys and scores by (score descending, key ascending), from loops in float64."""
    chunks = [(x.double().numpy(), dz.double().numpy()) for x, dz in pairs.chunks()]
    x = np.concatenate([x for x, _ in chunks])
    dz = np.concatenate([dz for _, dz in chunks])
    products = dz.T @ x
    if metric == "ip":
        scores = products
    elif metric == "l2":
        scores = -((dz.T[:, None, :] - x.T[None, :, :]) ** 2).sum(2)
    elif block == (1, 1):
        scores = np.abs(products)
    else:
        channels = pairs.n_in // pairs.taps
        rows = []
        for top in range(0, pairs.n_out, block[0]):
            rows.append(
                [
                    np.sqrt(
                        (
                            products[
                                top : top + block[0],
                                tap * channels + left : tap * channels
                                + min(left + block[1], channels),
                            ]
                            ** 2
                        ).sum()
                    )
                    for tap in range(pairs.taps)
                    for left in range(0, channels, block[1])
                ]
            )
        scores = np.array(rows)
    flat = scores.ravel()
    taken = set(active.tolist())
    left = [key for key in range(flat.size) if key not in taken]
    order = sorted(left, key=lambda key: (-flat[key], key))
    keys = sorted(order[:count])
    return keys, flat[keys]


def _vectors(kind: str, batch: int, n_in: int, n_out: int, seed: int) -> tuple[Tensor, Tensor]:
    x, dz = _integers(batch, n_in, seed=seed), _integers(batch, n_out, seed=seed + 1)
    if kind == "equal norms":
        x, dz = x.sign() + (x == 0), dz.sign() + (dz == 0)
    elif kind == "heavy row":
        dz[:, seed % n_out] *= 50
    elif kind == "negative":
        x, dz = x.abs() + 1, -dz.abs() - 1
    elif kind == "constant":
        x, dz = torch.ones_like(x), torch.ones_like(dz)
    elif kind == "zero":
        dz = torch.zeros_like(dz)
    elif kind == "rising":  # every tile beats all before it
        x, dz = torch.ones_like(x), torch.arange(1.0, n_out + 1).expand(batch, -1).clone()
    return x, dz


KINDS = ["random", "equal norms", "heavy row", "negative", "constant", "zero", "rising"]


@st.composite
def _queries(draw: st.DrawFn) -> tuple[growth.Pairs, int, Tensor, str, tuple[int, int], int]:
    batch = draw(st.integers(1, 5))
    n_out = draw(st.integers(1, 12))
    kind, seed = draw(st.sampled_from(KINDS)), draw(st.integers(0, 10_000))
    metric = draw(st.sampled_from(METRICS))
    blocks = st.tuples(st.integers(1, 4), st.integers(1, 4))
    block = draw(blocks) if metric == "abs-ip" else (1, 1)
    if draw(st.booleans()):
        kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 2)))
        channels, out = draw(st.integers(1, 5)), (draw(st.integers(1, 3)), 2)
        size = (out[0] + kernel[0] - 1, out[1] + kernel[1] - 1)
        x, dz = _vectors(kind, batch * size[0] * size[1], channels, n_out, seed)
        dz = dz[: batch * out[0] * out[1]]
        pairs: growth.Pairs = ConvPairs(
            x.view(batch, *size, channels).permute(0, 3, 1, 2),
            dz.view(batch, *out, n_out).permute(0, 3, 1, 2),
            kernel,
        )
    else:
        pairs = LinearPairs(*_vectors(kind, batch, draw(st.integers(1, 12)), n_out, seed))
    grid = growth.Grid.of(pairs.n_out, pairs.n_in, pairs.taps, block)
    alive = draw(st.integers(0, grid.size))
    active = torch.randperm(grid.size, generator=_generator(seed))[:alive].sort().values
    count = draw(st.integers(0, grid.size - alive))
    tile_floats = draw(st.sampled_from([1, pairs.n_in * block[0] * 2, 4 << 20]))
    return pairs, count, active, metric, block, tile_floats


@settings(max_examples=250, deadline=None, derandomize=True)
@given(_queries())
def test_exact_equals_brute_force(
    query: tuple[growth.Pairs, int, Tensor, str, tuple[int, int], int],
) -> None:
    pairs, count, active, metric, block, tile_floats = query
    found = Dense(metric, tile_floats)(pairs, count, active, block=block)
    keys, scores = _brute_force(pairs, count, active, metric, block)
    n_cols = growth.Grid.of(pairs.n_out, pairs.n_in, pairs.taps, block).n_cols
    assert _keys(found, n_cols) == keys
    np.testing.assert_allclose(found.score.numpy(), scores, rtol=1e-6, atol=1e-6)


def test_exact_by_hand() -> None:
    """G = dz^T x = [[2, -8, 1], [4, 0, -2]]."""
    pairs = (torch.tensor([[2.0, 0.0, -1.0], [0.0, 8.0, 0.0]]), torch.tensor([[1.0, 2], [-1, 0]]))
    pairs = (pairs[0] * torch.tensor([1.0, 1.0, -1.0]), pairs[1])
    product = pairs[1].T @ pairs[0]
    assert product.tolist() == [[2.0, -8.0, 1.0], [4.0, 0.0, 2.0]]
    found = Exact()(pairs, 3, torch.tensor([3]))
    # |G| = 8 and then 2 twice, of which both fit.
    assert _keys(found, 3) == [0, 1, 5] and found.score.tolist() == [2.0, 8.0, 2.0]
    assert _keys(Exact()(pairs, 2, torch.tensor([3])), 3) == [0, 1]  # the lower key of a tie
    assert _keys(Exact("ip")(pairs, 2, NONE), 3) == [0, 3]
    # Distances: column i of x to column j of dz, (2, 0) to (1, -1) being 2.
    l2 = Exact("l2")(pairs, 6, NONE)
    assert l2.score.tolist() == [-2.0, -82.0, -1.0, 0.0, -68.0, -1.0]


def test_exact_keeps_its_candidates_in_bounds() -> None:
    """Far more candidates than the buffer holds: every tile beats all that was before it."""
    n_out, n_in = 600, 500
    x, dz = torch.ones(1, n_in), torch.arange(1.0, n_out + 1)[None]
    found = Dense(tile_floats=2 * n_in)((x, dz), 1250, NONE)
    # The two highest rows whole, and the lowest keys of the third.
    whole = range(598 * n_in, 600 * n_in)
    assert _keys(found, n_in) == [*range(597 * n_in, 597 * n_in + 250), *whole]


def test_exact_never_holds_the_gradient() -> None:
    pairs = LinearPairs(torch.randn(4, 2000), torch.randn(4, 1000))
    with LargestTensor() as watch:
        Dense(tile_floats=20_000)(pairs, 100, NONE)
    assert watch.largest <= 3 * 100 + (64 << 10) + 20_000


def test_exact_products_that_overflow_still_count_or_are_refused() -> None:
    """1e30 is finite and its square is not."""
    x, dz = torch.full((3, 5), 1e30), torch.full((3, 4), 1e30)
    _check(Exact()((x, dz), 7, NONE), 7, NONE, 4, 5)
    with pytest.raises(InputError, match="only 0 of 7 connections have a finite score"):
        Exact("ip")((x, -dz), 7, NONE)


def test_exact_counts_its_operations() -> None:
    found = Exact()((torch.ones(7, 5), torch.ones(7, 3)), 2, NONE)
    assert found.flops == 2 * 7 * 5 * 3


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_exact_metrics_of_single_neurons_refuse_blocks(metric: str) -> None:
    with pytest.raises(InputError, match="single neurons"):
        Exact(metric)((torch.ones(2, 4), torch.ones(2, 4)), 1, NONE, block=(2, 2))


@pytest.mark.parametrize("kind", [Exact, Faiss])
def test_unknown_metric_is_refused(kind: Any) -> None:
    with pytest.raises(InputError, match="'cosine' is unknown: choose abs-ip, ip, l2"):
        kind(metric="cosine")


def test_l2_of_two_recordings_adds_up() -> None:
    """The distance is that of the long vectors, not the sum of two searches."""
    x, dz = _integers(6, 5, seed=3), _integers(6, 4, seed=4)
    parts = JoinedPairs([LinearPairs(x[:1], dz[:1]), LinearPairs(x[1:], dz[1:])])
    keys, scores = _brute_force(LinearPairs(x, dz), 8, NONE, "l2", (1, 1))
    found = Exact("l2")(parts, 8, NONE)
    assert _keys(found, 5) == keys and found.score.tolist() == scores.tolist()


# Random growth.


@pytest.mark.parametrize(("count", "limit"), [(4, 36.1), (12, 36.1)])  # chi-square, 14 df, 99.9 %
def test_random_is_uniform_over_what_is_inactive(count: int, limit: float) -> None:
    """Few of many (drawn with rejection) and most of few (a permutation)."""
    active = torch.tensor([0, 1, 7, 13, 19])
    sizes, generator = NoVectors(5, 4, 1, torch.device("cpu")), _generator(7)
    hits = torch.zeros(20)
    draws = 1500
    for _ in range(draws):
        found = Random()(sizes, count, active, generator=generator)
        hits[found.row * 5 + found.col] += 1
    assert hits[active].sum() == 0
    free = torch.ones(20, dtype=torch.bool)
    free[active] = False
    expected = draws * count / 15
    # Without replacement the counts vary less, by the share that is not drawn.
    statistic = ((hits[free] - expected) ** 2 / expected).sum() / (1 - count / 15)
    assert statistic * 14 / 15 < limit
    assert statistic > 2  # nor too even to be random


def test_random_subsets_are_equally_likely() -> None:
    """All 28 pairs out of 8: drawing single ones uniformly would not be enough."""
    sizes, generator = NoVectors(4, 2, 1, torch.device("cpu")), _generator(11)
    hits: dict[tuple[int, ...], int] = {}
    draws = 2800
    for _ in range(draws):
        key = tuple(_keys(Random()(sizes, 2, NONE, generator=generator), 4))
        hits[key] = hits.get(key, 0) + 1
    assert len(hits) == 28
    assert sum((n - 100) ** 2 / 100 for n in hits.values()) < 55.5  # 27 df, 99.9 %


@pytest.mark.parametrize("seed", [0, 1])
def test_random_draws_from_its_generator_alone(seed: int) -> None:
    sizes = NoVectors(50, 40, 1, torch.device("cpu"))
    one = Random()(sizes, 20, NONE, generator=_generator(seed))
    other = Random()(sizes, 20, NONE, generator=_generator(seed + 1))
    assert _keys(one, 50) != _keys(other, 50)
    assert torch.equal(one.score, torch.zeros(20))


def test_random_never_builds_the_grid() -> None:
    n = 65536
    active = torch.arange(0, n * n, n + 1)
    with LargestTensor() as watch:
        found = Random()(NoVectors(n, n, 1, torch.device("cpu")), 100_000, active)
    assert watch.largest <= 150_000
    _check(found, 100_000, active, n, n)
    # Rows and columns are spread over the whole range.
    assert abs(float(found.row.double().mean()) / n - 0.5) < 0.01
    assert abs(float(found.col.double().mean()) / n - 0.5) < 0.01


def test_random_counts_blocks() -> None:
    found = Random()(NoVectors(18, 7, 1, torch.device("cpu")), 10, NONE, block=(4, 4))
    _check(found, 10, NONE, 2, 5)


# Columns of a convolution.


def test_columns_convert_to_unfold_order_and_back() -> None:
    channels, taps = 3, 4
    inside = torch.arange(channels * taps)
    outside = torch.tensor([c * taps + tap for tap in range(taps) for c in range(channels)])
    assert torch.equal(growth.to_unfold_order(inside, channels, taps), outside)
    assert torch.equal(from_unfold_order(outside, channels, taps), inside)
