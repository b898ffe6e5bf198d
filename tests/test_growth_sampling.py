"""Growth from a part of the connections: random subsets, the longest vectors, averaged maps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch import Tensor

import growth.conv_pairs
from growth import (
    ConvPairs,
    Exact,
    Grid,
    Gse,
    InputError,
    JoinedPairs,
    LinearPairs,
    Pairs,
    Pooled,
    RowPairs,
    StoredGradient,
    Subblock,
)
from growth.rescore import is_dear, rescoring_flops, scores_at

NONE = torch.empty(0, dtype=torch.int64)
SAMPLINGS = ["uniform", "norm", "sign"]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _linear(samples: int, n_in: int, n_out: int, seed: int = 0) -> LinearPairs:
    generator = _generator(seed)
    x = torch.randn(samples, n_in, generator=generator)
    return LinearPairs(x, torch.randn(samples, n_out, generator=generator))


def _conv(
    channels: int = 5, n_out: int = 6, size: int = 6, batch: int = 2, seed: int = 0
) -> ConvPairs:
    generator = _generator(seed)
    x = torch.randn(batch, channels, size, size + 1, generator=generator)
    # Some channels matter more than others.
    x *= torch.randn(channels, 1, 1, generator=generator).exp()
    dz = torch.randn(batch, n_out, -(-size // 2), size, generator=generator)
    dz *= torch.randn(n_out, 1, 1, generator=generator).exp()
    return ConvPairs(x, dz, (3, 2), (2, 1), (1, 0))


def _scores(pairs: Pairs, grid: Grid) -> Tensor:
    """Of every connection, float64, from the unfolded vectors: (grid.size,)."""
    x, dz = (vectors.double() for vectors in pairs.vectors())
    products = dz.T @ x
    return (products.abs() if grid.block == (1, 1) else grid.pool(products)).flatten()


def _keys(found: growth.Connections, grid: Grid) -> Tensor:
    return found.row * grid.n_cols + found.col


def _best(scores: Tensor, count: int) -> list[int]:
    return scores.topk(count).indices.sort().values.tolist()


# Scores of candidates.


@pytest.mark.parametrize("block", [(1, 1), (2, 2), (4, 3), (5, 7)])
@pytest.mark.parametrize("entries", [1, 50, 1 << 20])
def test_scores_of_candidates(
    monkeypatch: pytest.MonkeyPatch, block: tuple[int, int], entries: int
) -> None:
    monkeypatch.setattr(growth.rescore, "_ENTRIES", entries)
    for pairs in (_linear(7, 23, 17), _conv(), JoinedPairs([_conv(), _conv(seed=1)], 0.5)):
        grid = Grid.of(pairs.n_out, pairs.n_in, pairs.taps, block)
        expected = _scores(pairs, grid)
        for keys in (NONE, torch.arange(0, grid.size, 3), torch.arange(grid.size)):
            scores = scores_at(pairs, grid, keys)
            torch.testing.assert_close(scores.double(), expected[keys], rtol=1e-4, atol=1e-4)


def test_scores_that_are_no_numbers_are_refused() -> None:
    pairs = StoredGradient(torch.tensor([[torch.nan]]))  # inf - inf, of products that overflow
    with pytest.raises(InputError, match="not numbers"):
        scores_at(pairs, Grid.of(1, 1, 1, (1, 1)), torch.tensor([0]))


def test_many_scores_cost_a_dense_gradient() -> None:
    pairs = _linear(7, 40, 30)
    grid = Grid.of(30, 40, 1, (2, 2))
    assert not is_dear(pairs, grid, 12) and is_dear(pairs, grid, 13)
    assert rescoring_flops(pairs, grid, 12) == 2 * 7 * 48
    assert rescoring_flops(pairs, grid, 13) == 2 * 7 * 1200


# Guided stochastic exploration.


def _node_weights(vectors: Tensor, sampling: str) -> list[Tensor]:
    """Distributions over the nodes, equally likely."""
    if sampling == "uniform":
        weights = [torch.ones(vectors.shape[1])]
    elif sampling == "norm":
        weights = [vectors.abs().sum(0)]
    else:  # of two examples, the signs agree or they do not
        weights = [(vectors[0] + vectors[1]).abs(), (vectors[0] - vectors[1]).abs()]
    return [w.double() / w.double().sum() for w in weights]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("block", [(1, 1), (1, 2), (2, 2)])
def test_pairs_are_drawn_by_the_weights_of_their_nodes(
    sampling: str, block: tuple[int, int]
) -> None:
    """Of a subset of one, the one is grown: its frequencies are those of the draws. The signs of x
    and dz are the same ones, which makes rows and columns dependent."""
    x = torch.tensor([[1.0, 2, 0, 3, 1], [1, -1, 0, 3, 2]])
    dz = torch.tensor([[1.0, 1, 4], [1, -1, 2]])
    grid = Grid.of(3, 5, 1, block)
    expected = torch.zeros(3, 5, dtype=torch.float64)
    of_rows, of_cols = _node_weights(dz, sampling), _node_weights(x, sampling)
    for rows, cols in zip(of_rows, of_cols, strict=True):
        expected += rows[:, None] * cols / len(of_rows)
    if sampling == "uniform":
        expected = torch.full((grid.n_rows, grid.n_cols), 1 / grid.size)
    else:
        pad = (0, grid.n_cols * block[1] - 5, 0, grid.n_rows * block[0] - 3)
        expected = torch.nn.functional.pad(expected, pad)
        expected = expected.view(grid.n_rows, block[0], grid.n_cols, block[1]).sum((1, 3))
    expected = expected.flatten()
    hits, generator, draws = torch.zeros(grid.size), _generator(5), 1000
    for _ in range(draws):
        found = Gse(sampling)((x, dz), 1, NONE, block=block, generator=generator)
        hits[_keys(found, grid)] += 1
    possible = expected > 0
    assert hits[~possible].sum() == 0
    statistic = ((hits - draws * expected)[possible] ** 2 / (draws * expected[possible])).sum()
    freedom = int(possible.sum()) - 1
    assert statistic < freedom + 3.1 * math.sqrt(2 * freedom) + 3  # 99.9 %
    assert statistic > freedom / 8


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
def test_the_best_of_the_subset_grow(sampling: str, block: tuple[int, int]) -> None:
    """The subset is as large as what is active; what grows beats a subset chosen blindly, and a
    subset that is everything finds what the exact search does."""
    for pairs in (_linear(9, 40, 30), _conv()):
        grid = Grid.of(pairs.n_out, pairs.n_in, pairs.taps, block)
        scores = _scores(pairs, grid)
        active = torch.arange(0, grid.size, 3)
        count = max(1, grid.size // 40)
        strategy = Gse(sampling)
        found = strategy(pairs, count, active, block=block, generator=_generator(1))
        torch.testing.assert_close(
            found.score.double(), scores[_keys(found, grid)], rtol=1e-4, atol=1e-4
        )
        assert not torch.isin(_keys(found, grid), active).any()
        assert count <= found.report["subset"] < active.numel()
        assert found.report["made_up"] == 0
        free = torch.ones(grid.size, dtype=torch.bool)
        free[active] = False
        assert found.score.double().mean() > scores[free].mean()
        everything = Gse(sampling, subset=3000 / active.numel() * grid.size)
        found = everything(pairs, count, active, block=block, generator=_generator(1))
        if sampling == "uniform":
            assert found.report["subset"] == free.sum()
            scores[active] = -1
            assert _keys(found, grid).tolist() == _best(scores, count)


@pytest.mark.parametrize("sampling", ["norm", "sign"])
def test_what_cannot_be_drawn_is_made_up(sampling: str) -> None:
    """All weight is on one pair, which is active; the rest is drawn uniformly."""
    x, dz = torch.zeros(3, 6), torch.zeros(3, 5)
    x[0, 2], dz[0, 1] = 1.0, 2.0
    hits = torch.zeros(30)
    for seed in range(400):
        found = Gse(sampling)((x, dz), 4, torch.tensor([8]), generator=_generator(seed))
        assert found.report["made_up"] == found.report["subset"] == 4
        hits[found.row * 6 + found.col] += 1
    assert hits[8] == 0 and hits.sum() == 1600
    assert hits[hits > 0].numel() == 29 and hits.max() < 100
    found = Gse(sampling)((x, dz), 1, NONE)
    assert (found.row.item(), found.col.item(), found.score.item()) == (1, 2, 2.0)


@pytest.mark.parametrize("sampling", ["norm", "sign"])
def test_vectors_without_weight_are_drawn_uniformly(sampling: str) -> None:
    zero = Gse(sampling)((torch.zeros(3, 40), torch.zeros(3, 30)), 25, NONE)
    assert zero.score.sum() == 0 and zero.row.unique().numel() > 10
    huge = torch.full((3, 40), 1e38)
    found = Gse(sampling)((huge, torch.full((3, 30), 1e-38)), 25, NONE)
    assert found.row.unique().numel() > 10


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_random_choices_are_of_its_generator_alone(sampling: str) -> None:
    pairs, strategy = _linear(9, 40, 30), Gse(sampling)
    grid = Grid.of(30, 40, 1, (1, 1))
    keys = []
    for seed in (None, None, 1, 1, 2):
        torch.manual_seed(len(keys))
        before = torch.random.get_rng_state()
        generator = None if seed is None else _generator(seed)
        found = strategy(pairs, 20, torch.arange(100), generator=generator)
        assert torch.equal(torch.random.get_rng_state(), before)
        keys.append(_keys(found, grid).tolist())
    assert keys[0] == keys[1] and keys[2] == keys[3]
    assert keys[2] != keys[4] != keys[0]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_convolution_is_its_unfolded_input(
    monkeypatch: pytest.MonkeyPatch, sampling: str
) -> None:
    conv = _conv()
    unfolded = LinearPairs(*conv.vectors())
    monkeypatch.setattr(growth.conv_pairs, "CHUNK_FLOATS", 200)  # several chunks
    wide, narrow = (
        Gse(sampling)(pairs, 15, torch.arange(0, 180, 4), generator=_generator(3))
        for pairs in (conv, unfolded)
    )
    assert torch.equal(wide.row, narrow.row) and torch.equal(wide.col, narrow.col)
    torch.testing.assert_close(wide.score, narrow.score, rtol=1e-4, atol=1e-4)


def test_a_subset_of_a_wide_layer_needs_no_more_memory_than_its_size() -> None:
    pairs = _linear(2, 65536, 65536)
    active = torch.arange(0, 65536 * 65536, 65536 * 4)
    with LargestTensor() as watch:
        found = Gse("norm")(pairs, 2000, active, generator=_generator())
    assert watch.largest <= 2 * 65536
    assert found.row.numel() == 2000 and found.flops < 2 * 2 * (2 * 65536 + 17000)


@pytest.mark.parametrize("subset", [0.0, -1.0, float("nan"), float("inf")])
def test_subsets_that_cannot_be(subset: float) -> None:
    with pytest.raises(InputError, match="subset"):
        Gse(subset=subset)


def test_an_unknown_sampling_is_refused() -> None:
    with pytest.raises(InputError, match="'wedge' is unknown: choose uniform, norm, sign"):
        Gse("wedge")


# The longest vectors.


@st.composite
def _queries(draw: st.DrawFn) -> tuple[Pairs, int, Tensor, tuple[int, int], float]:
    seed = draw(st.integers(0, 10_000))
    n_out = draw(st.integers(1, 14))
    pairs: Pairs
    if draw(st.booleans()):
        pairs = _conv(draw(st.integers(1, 7)), n_out, seed=seed)
        if draw(st.booleans()):
            pairs = JoinedPairs([pairs, _conv(pairs.n_in // 6, n_out, seed=seed + 1)])
    else:
        pairs = _linear(draw(st.integers(1, 5)), draw(st.integers(1, 20)), n_out, seed)
    if draw(st.booleans()):
        pairs = RowPairs(pairs, 0, n_out)
    block = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    grid = Grid.of(pairs.n_out, pairs.n_in, pairs.taps, block)
    alive = draw(st.integers(0, grid.size))
    active = torch.randperm(grid.size, generator=_generator(seed))[:alive].sort().values
    count = draw(st.integers(0, grid.size - alive))
    return pairs, count, active, block, draw(st.sampled_from([0.1, 0.35, 0.7, 1.0]))


def _chosen(norms: Tensor, share: float) -> set[int]:
    """The largest, the lowest number first among equals."""
    count = max(1, math.ceil(share * norms.numel()))
    order = sorted(range(norms.numel()), key=lambda i: (-float(norms[i]), i))
    return set(order[:count])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(_queries())
def test_the_best_of_the_subblock(
    query: tuple[Pairs, int, Tensor, tuple[int, int], float],
) -> None:
    pairs, count, active, block, share = query
    grid = Grid.of(pairs.n_out, pairs.n_in, pairs.taps, block)
    found = Subblock(share)(pairs, count, active, block=block)
    scores = _scores(pairs, grid)
    x, dz = (vectors.square().sum(0) for vectors in pairs.vectors())
    of_rows = torch.stack([rows.sum() for rows in dz.split(block[0])])
    per_channel = x.view(pairs.taps, -1).sum(0)
    of_channels = torch.stack([some.sum() for some in per_channel.split(block[1])])
    taken, used = set(active.tolist()), found.report["share"]
    per_tap = grid.n_cols // grid.taps

    def free(share: float) -> list[int]:
        rows, channels = _chosen(of_rows, share), _chosen(of_channels, share)
        return [
            key
            for key in range(grid.size)
            if key // grid.n_cols in rows
            and key % grid.n_cols % per_tap in channels
            and key not in taken
        ]

    inside = torch.tensor(free(used), dtype=torch.int64)
    best = inside[scores[inside].topk(count).indices].sort().values
    assert _keys(found, grid).tolist() == best.tolist()
    torch.testing.assert_close(found.score.double(), scores[best], rtol=1e-4, atol=1e-4)
    # No larger than needed.
    smaller = share
    while smaller < used:
        assert len(free(smaller)) < count
        smaller = min(1.0, smaller * 1.25)
    assert smaller == used
    if share == 1:
        exact = Exact()(pairs, count, active, block=block)
        assert torch.equal(_keys(found, grid), _keys(exact, grid))


def test_a_subblock_catches_most_of_the_gradient() -> None:
    """Neurons of lognormal norm: an eighth of the products, nine tenths of what they sum to."""
    pairs, generator = _linear(64, 300, 200), _generator(3)
    x = pairs.x.relu() * torch.randn(300, generator=generator).exp()
    pairs = LinearPairs(x, pairs.dz * torch.randn(200, generator=generator).exp())
    exact, found = (strategy(pairs, 600, NONE) for strategy in (Exact(), Subblock()))
    assert found.report["share"] == 0.35 and 0.12 < found.report["of_all"] < 0.13
    assert found.score.sum() > 0.93 * exact.score.sum()
    dense = 2 * 64 * 300 * 200
    assert found.flops <= 0.13 * dense + 2 * 64 * 500


def test_a_subblock_is_enlarged_past_what_is_active() -> None:
    x, dz = torch.arange(10.0, 0, -1)[None], torch.ones(1, 4)
    # Rows 0 and 1, columns 0 to 3 are the sub-block, all of it active.
    active = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13])
    found = Subblock()((x, dz), 1, active)
    assert (found.row.tolist(), found.col.tolist()) == ([0], [4])
    assert found.report["share"] == 0.35 * 1.25


def test_a_stored_gradient_has_no_lengths() -> None:
    with pytest.raises(InputError, match="no vectors"):
        Subblock()(StoredGradient(torch.ones(4, 5)), 1, NONE)


def test_no_convolution_is_unfolded_for_a_subblock() -> None:
    x, dz = torch.randn(8, 40, 24, 24), torch.randn(8, 40, 24, 24)
    pairs = ConvPairs(x, dz, (3, 3), padding=(1, 1))
    with LargestTensor() as watch:
        found = Subblock()(pairs, 100, NONE)
    assert watch.largest <= x.numel()
    assert 0 < found.flops <= 2 * pairs.samples * (14 * 14 * 9 + 400)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_shares_that_cannot_be(share: float) -> None:
    with pytest.raises(InputError, match="share"):
        Subblock(share)


# Averaged maps.


def _maps(smooth: bool, size: int = 9) -> ConvPairs:
    generator = _generator(2)
    x = torch.randn(6, 12, size, size, generator=generator)
    dz = torch.randn(6, 30, size, size, generator=generator)
    if smooth:
        x, dz = (torch.nn.functional.avg_pool2d(v, 5, 1, 2) for v in (x, dz))
    return ConvPairs(x, dz, (3, 3), padding=(1, 1))


@pytest.mark.parametrize("block", [(1, 1), (2, 2)])
def test_the_best_of_twice_as_many_candidates(block: tuple[int, int]) -> None:
    """Candidates by the averaged maps, scores by the whole ones."""
    pairs = _maps(smooth=False)
    grid = Grid.of(30, 108, 9, block)
    active = torch.arange(0, grid.size, 7)
    scores, coarse = _scores(pairs, grid), _scores(pairs.pooled(), grid)
    coarse[active] = -1
    count = 48 // (block[0] * block[1])
    candidates = torch.tensor(_best(coarse, 2 * count))
    best = candidates[scores[candidates].topk(count).indices].sort().values
    found = Pooled()(pairs, count, active, block=block)
    assert found.report == {"search": "pool", "pooled": "yes", "candidates": 2 * count}
    assert _keys(found, grid).tolist() == best.tolist()
    torch.testing.assert_close(found.score.double(), scores[best], rtol=1e-4, atol=1e-4)
    samples = 6 * 25  # the maps are of odd size
    assert 0 < found.flops <= 2 * samples * 30 * 108 + 2 * 6 * 81 * 96


def test_smooth_maps_lose_little() -> None:
    pairs = _maps(smooth=True, size=8)
    exact, found = Exact()(pairs, 40, NONE), Pooled()(pairs, 40, NONE)
    assert found.report["pooled"] == "yes"
    assert found.score.sum() > 0.95 * exact.score.sum()


@pytest.mark.parametrize(
    ("pairs", "count"),
    [
        (_linear(5, 60, 50), 10),
        (_maps(smooth=False), 65),  # twice that is over .04 of 3240: it costs all of G
        (ConvPairs(torch.ones(2, 8, 1, 9), torch.ones(2, 8, 1, 9), (1, 1)), 1),
        (_maps(smooth=False), 0),
    ],
)
def test_where_nothing_is_gained_the_search_is_exact(pairs: Pairs, count: int) -> None:
    exact, found = Exact()(pairs, count, NONE), Pooled()(pairs, count, NONE)
    assert torch.equal(found.row, exact.row) and torch.equal(found.col, exact.col)
    if count:
        assert found.report["pooled"] == "no" and found.flops == exact.flops


def test_no_convolution_is_unfolded_for_averages() -> None:
    pairs = _maps(smooth=False, size=24)
    with LargestTensor() as watch:
        Pooled()(pairs, 40, NONE)
    assert watch.largest <= max(pairs.dz.numel(), 6 * 12 * 26 * 26)


@pytest.mark.parametrize("candidates", [0.5, float("nan"), float("inf")])
def test_candidates_that_cannot_be(candidates: float) -> None:
    with pytest.raises(InputError, match="candidates"):
        Pooled(candidates)
