"""Blocks by Gram matrices: the same as all of G tells, whatever rounding does."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from torch import Tensor

import growth.blocks
from growth import Blocks, Exact, Grid, InputError, LinearPairs, StoredGradient
from growth.blocks import BlockScreen, grams

NONE = torch.empty(0, dtype=torch.int64)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _vectors(kind: str, samples: int, n: int, seed: int) -> Tensor:
    """Small whole numbers, whose products are exact in float32 and tie often, or floats."""
    x = torch.randint(-3, 4, (samples, n), generator=_generator(seed)).float()
    if kind == "heavy":
        x[:, seed % n] *= 50
    elif kind == "constant":
        return torch.full_like(x, 3.0)
    elif kind == "zero":
        return torch.zeros_like(x)
    elif kind == "floats":
        return torch.randn(samples, n, generator=_generator(seed))
    return x


def _scores(pairs: LinearPairs, grid: Grid) -> np.ndarray:
    """Frobenius norms of all blocks in float64, block by block."""
    products = pairs.dz.double().numpy().T @ pairs.x.double().numpy()
    of_taps = np.split(products, grid.taps, axis=1)
    bh, bw = grid.block
    return np.array(
        [
            [
                np.sqrt((of_tap[top : top + bh, left : left + bw] ** 2).sum())
                for of_tap in of_taps
                for left in range(0, grid.channels, bw)
            ]
            for top in range(0, grid.n_out, bh)
        ]
    ).ravel()


def _best(scores: np.ndarray, active: np.ndarray, count: int) -> list[int]:
    """By score and, among equals, by lowest key."""
    free = np.setdiff1d(np.arange(scores.size), active)
    return sorted(free[np.lexsort((free, -scores[free]))][:count].tolist())


@st.composite
def _queries(draw: st.DrawFn) -> tuple[LinearPairs, Grid, Tensor, int]:
    """Most of them of more blocks than the Gram scores' margin of 32 covers."""
    taps, samples = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    channels, n_out = draw(st.integers(1, 25)), draw(st.integers(1, 60))
    block = (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    kinds, seed = st.sampled_from(["integers", "heavy", "constant", "zero", "floats"]), draw(
        st.integers(0, 10_000)
    )  # fmt: skip
    x = _vectors(draw(kinds), samples, taps * channels, seed)
    dz = _vectors(draw(kinds), samples, n_out, seed + 1)
    pairs = LinearPairs(x, dz, taps=taps)
    grid = Grid.of(n_out, pairs.n_in, taps, block)
    alive = draw(st.integers(0, grid.size // 2))
    active = torch.randperm(grid.size, generator=_generator(seed))[:alive].sort().values
    return pairs, grid, active, min(grid.size - alive, draw(st.integers(0, 60)))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(_queries(), st.sampled_from(["gram", "tiles", "auto"]))
def test_blocks_equal_brute_force(query: tuple[LinearPairs, Grid, Tensor, int], way: str) -> None:
    pairs, grid, active, count = query
    found = Blocks(way)(pairs, count, active, block=grid.block)
    scores = _scores(pairs, grid)
    keys = (found.row * grid.n_cols + found.col).numpy()
    wanted = _best(scores, active.numpy(), count)
    if torch.equal(pairs.x, pairs.x.round()) and torch.equal(pairs.dz, pairs.dz.round()):
        assert keys.tolist() == wanted
    else:  # rounding decides between neighbours
        assert keys.size == count and (np.diff(keys) > 0).all()
        assert not np.isin(keys, active.numpy()).any()
        if count:
            assert scores[keys].min() >= scores[wanted].min() - 1e-5 * scores.max()
    np.testing.assert_allclose(found.score.numpy(), scores[keys], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [(16, 16), (8, 32), (32, 8), (24, 20)])
def test_gram_matrices_are_taken_where_blocks_differ(
    block: tuple[int, int], dtype: torch.dtype
) -> None:
    x, dz = _vectors("floats", 24, 600, 0).to(dtype), _vectors("floats", 24, 500, 1).to(dtype)
    spread = torch.randn(500, generator=_generator(2)).exp().to(dtype)
    pairs = LinearPairs(x, dz * spread, taps=2)
    grid = Grid.of(500, 600, 2, block)
    active = torch.arange(0, grid.size, 3)
    found = Blocks("gram")(pairs, 40, active, block=block)
    assert found.report == {"search": "gram"} and found.score.dtype == dtype
    keys = (found.row * grid.n_cols + found.col).tolist()
    assert keys == _best(_scores(pairs, grid), active.numpy(), 40)
    assert found.flops > 0


def test_gram_matrices_are_taken_where_they_are_the_cheaper() -> None:
    x, dz = _vectors("floats", 32, 1024, 0), _vectors("floats", 32, 1024, 1)
    assert Exact()((x, dz), 20, NONE, block=(32, 32)).report["search"] == "gram"
    assert Exact()((x, dz), 20, NONE, block=(2, 2)).report["search"] == "tiles"
    assert Blocks("tiles")((x, dz), 20, NONE, block=(32, 32)).report["search"] == "dense"


@pytest.mark.parametrize("way", ["gram", "lowrank", "auto"])
@pytest.mark.parametrize("kind", ["constant", "zero"])
def test_ties_go_to_the_lowest_keys(way: str, kind: str) -> None:
    """A thousand equal blocks: Gram scores cannot tell them apart, and say so."""
    x, dz = _vectors("constant", 4, 256, 0), _vectors(kind, 4, 256, 0)
    active = torch.arange(0, 1024, 2)
    found = Blocks(way)((x, dz), 100, active, block=(8, 8))
    assert (found.row * 32 + found.col).tolist() == list(range(1, 201, 2))
    assert found.report["search"] != "gram"


def _cancelling(
    size: float, samples: int, n: int, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Small products of long vectors: what is large in x is orthogonal to what is large in dz."""
    g = _generator(seed)
    basis = torch.linalg.qr(torch.randn(samples, samples, generator=g, dtype=torch.float64))[0]
    half = samples // 2

    def mixed(own: Tensor, small: Tensor) -> Tensor:
        loud = own @ torch.randn(own.shape[1], n, generator=g, dtype=torch.float64)
        return size * loud + small @ torch.randn(small.shape[1], n, generator=g).double()

    x = mixed(basis[:, : half - 1], basis[:, -1:])
    dz = mixed(basis[:, half:-1], basis[:, -1:])
    return x.to(dtype), dz.to(dtype)


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_gram_scores_that_are_nothing_but_rounding(size: float) -> None:
    """Whatever they are, the best blocks are those of float64, to the rounding of products."""
    pairs = LinearPairs(*_cancelling(size, 16, 320, 0, torch.float32))
    grid = Grid.of(320, 320, 1, (8, 8))
    found = Blocks("gram")(pairs, 100, NONE, block=(8, 8))
    scores = _scores(pairs, grid)
    keys = (found.row * 40 + found.col).numpy()
    least = scores[_best(scores, NONE.numpy(), 100)].min()
    norms = [vectors.double().norm(dim=0).max() for vectors in (pairs.x, pairs.dz)]
    assert scores[keys].min() >= least - 1e-6 * float(norms[0] * norms[1])
    if size != 30:  # where rounding is just as large as the scores' differences, either may be
        assert found.report["search"] == ("tiles" if size == 1000 else "gram")


@pytest.mark.parametrize("samples", [64, 300, 1000])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1 + 2**-12])
def test_rounding_of_gram_scores_stays_below_its_bound(samples: int, value: float) -> None:
    """Equal numbers, whose rounding errors all have the same sign, are the worst case: the bound
    must not be crossed by blocks that are better than what was taken."""
    x, dz = torch.full((samples, 64), value), torch.full((samples, 64), value)
    grid = Grid.of(64, 64, 1, (32, 32))
    screen = BlockScreen(x, dz, grid)
    _, bounds, _ = screen.bounded(4, NONE.numpy())
    exact = 32 * 32 * (samples * float(torch.tensor(value)) ** 2) ** 2
    assert (bounds >= exact * (1 - 1e-7)).all() and (bounds <= exact * 1.001).all()


def test_grams_are_inner_products_of_matrices() -> None:
    """<A^T A, B^T B>, from packed triangles."""
    a, b = torch.randn(11, 7, 5, dtype=torch.float64), torch.randn(11, 4, 3, dtype=torch.float64)
    packed = grams(a) @ grams(b).T
    assert grams(a).shape == (7, 66)
    products = torch.einsum("dai,dbj->abij", a, b)
    torch.testing.assert_close(packed, products.square().sum((2, 3)))


def test_a_workspace_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are packed, scored and rescored a part at a time."""
    pairs = LinearPairs(_vectors("integers", 5, 130, 0), _vectors("integers", 5, 110, 1))
    whole = Blocks("gram")(pairs, 30, NONE, block=(3, 7))
    rows = np.array([0, 3, 20, 36])
    screen = BlockScreen(pairs.x, pairs.dz, Grid.of(110, 130, 1, (3, 7)))
    scores = screen.scores(rows)
    for name in ("_TABLE_FLOATS", "_WORK_FLOATS", "_GRAM_SUMMED"):
        monkeypatch.setattr(growth.blocks, name, 2)
    parts = Blocks("gram")(pairs, 30, NONE, block=(3, 7))
    assert whole.report == parts.report == {"search": "gram"}
    assert all(torch.equal(a, b) for a, b in zip(whole[:3], parts[:3], strict=True))
    np.testing.assert_array_equal(screen.scores(rows), scores)


def test_screened_rows_are_those_of_the_blocks() -> None:
    pairs = LinearPairs(_vectors("integers", 6, 45, 0), _vectors("integers", 6, 40, 1), taps=3)
    grid = Grid.of(40, 45, 3, (16, 4))
    screen, rows = BlockScreen(pairs.x, pairs.dz, grid), np.array([0, 2])
    wanted = _scores(pairs, grid).reshape(3, 12)
    np.testing.assert_allclose(screen.scores(rows), wanted[rows], rtol=1e-6)
    approximate = screen.approximate_scores(pairs.x, pairs.dz, rows)  # factors of full rank
    np.testing.assert_allclose(approximate, wanted[rows], rtol=1e-4, atol=1e-2)
    norms = pairs.dz.double().norm(dim=0)
    of_blocks = [norms[:16].norm(), norms[16:32].norm(), norms[32:].norm()]
    np.testing.assert_allclose(screen.row_norms(), of_blocks, rtol=1e-6)


@pytest.mark.parametrize("way", ["gram", "lowrank", "auto"])
@pytest.mark.parametrize(("of_x", "of_dz"), [(1e15, 1e-15), (1e30, 1e-30), (1e-12, 1.0)])
def test_gram_matrices_beyond_the_range_of_numbers(way: str, of_x: float, of_dz: float) -> None:
    """G is in the range, and so is the answer."""
    x, dz = _vectors("floats", 16, 256, 0), _vectors("floats", 16, 256, 1)
    powers = [2.0 ** round(np.log2(scale)) for scale in (of_x, of_dz)]
    plain = Blocks("tiles")((x, dz), 20, NONE, block=(8, 8))
    found = Blocks(way)((x * powers[0], dz * powers[1]), 20, NONE, block=(8, 8))
    assert torch.equal(found.row, plain.row) and torch.equal(found.col, plain.col)


@pytest.mark.parametrize("way", ["tiles", "gram", "lowrank", "auto"])
def test_blocks_of_what_has_no_vectors(way: str) -> None:
    gradient = _vectors("integers", 24, 36, 0)
    found = Blocks(way)(StoredGradient(gradient), 5, NONE, block=(4, 4))
    wanted = gradient.view(6, 4, 9, 4).square().sum((1, 3)).sqrt().flatten()
    keys = found.row * 9 + found.col
    torch.testing.assert_close(found.score, wanted[keys])
    assert keys.tolist() == _best(wanted.double().numpy(), NONE.numpy(), 5)


@pytest.mark.parametrize("way", ["tiles", "gram", "lowrank", "auto"])
def test_single_connections_are_blocks_of_one(way: str) -> None:
    x, dz = _vectors("integers", 8, 40, 0), _vectors("integers", 8, 30, 1)
    wanted = Exact()((x, dz), 50, NONE)
    found = Blocks(way)((x, dz), 50, NONE)
    assert torch.equal(found.row, wanted.row) and torch.equal(found.col, wanted.col)


def test_blocks_larger_than_the_layer() -> None:
    x, dz = _vectors("integers", 8, 20, 0), _vectors("integers", 8, 10, 1)
    for way in ("tiles", "gram", "lowrank", "auto"):
        found = Blocks(way)((x, dz), 1, NONE, block=(64, 64))
        assert found.row.tolist() == found.col.tolist() == [0]
        torch.testing.assert_close(found.score[0], (dz.T @ x).norm())


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="way 'fast' is unknown: choose auto, tiles, gram"):
        Blocks("fast")
    with pytest.raises(InputError, match="recall 2 must be a share"):
        Blocks(recall=2)
    with pytest.raises(InputError, match="rank 0 must be at least 1"):
        Blocks(rank=0)


def test_never_holds_the_gradient() -> None:
    """G has 16.8 million entries."""
    x, dz = _vectors("floats", 32, 4096, 0), _vectors("floats", 32, 4096, 1)
    dz *= torch.randn(4096, generator=_generator(2)).exp()
    for way in ("gram", "lowrank"):
        with LargestTensor() as watch:
            found = Blocks(way)((x, dz), 300, NONE, block=(16, 16))
        assert found.report["search"] == {"gram": "gram", "lowrank": "low rank"}[way]
        assert watch.largest <= 4096 * 4096 // 8
