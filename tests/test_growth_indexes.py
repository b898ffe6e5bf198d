"""Growth by nearest-neighbour libraries: what every index must do, and what each promises."""

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import growth
from growth import (
    METRICS,
    ConvPairs,
    Exact,
    Faiss,
    InputError,
    JoinedPairs,
    LinearPairs,
    MissingLibraryError,
    faiss_search,
    neighbours,
    nmslib_search,
    running_top,
)

NONE = torch.empty(0, dtype=torch.int64)

# Every index of every library, by the strategy's name.
INDEXES = [
    *(("faiss", kind) for kind in faiss_search.KINDS),
    *(("nmslib", kind) for kind in nmslib_search.KINDS),
]
# Those that find everything when they are asked for all neighbours.
EXHAUSTIVE = [("faiss", "flat"), ("faiss", "range"), ("nmslib", "brute-force")]

needs_faiss = pytest.mark.usefixtures("faiss")


def _build(library: str, **options: Any) -> Any:
    pytest.importorskip(library, reason=f"{library} is missing: pip install 'sparsegrow[cpu]'")
    return growth.STRATEGIES[library](**options)


@pytest.fixture
def faiss() -> Any:
    return pytest.importorskip("faiss", reason="faiss is missing: pip install 'sparsegrow[cpu]'")


@pytest.fixture(params=INDEXES, ids="-".join)
def index(request: pytest.FixtureRequest) -> growth.Strategy:
    """Every index with the defaults of its strategy."""
    library, kind = request.param
    return _build(library, index=kind)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=_generator(seed))


def _integers(*shape: int, seed: int, low: int = -3, high: int = 3) -> Tensor:
    """Small whole numbers: their products are exact in float32, and tie often."""
    return torch.randint(low, high + 1, shape, generator=_generator(seed)).float()


def _keys(found: growth.Connections, n_in: int) -> list[int]:
    return (found.row * n_in + found.col).tolist()


def _check(found: growth.Connections, count: int, active: Tensor, n_out: int, n_in: int) -> None:
    """Exactly ``count`` inactive connections of the matrix, sorted, each once."""
    assert found.row.dtype == found.col.dtype == torch.int64
    assert found.row.shape == found.col.shape == found.score.shape == (count,)
    keys = _keys(found, n_in)
    assert keys == sorted(set(keys))
    assert not set(keys) & set(active.tolist())
    if count:
        assert int(found.row.min()) >= 0 and int(found.row.max()) < n_out
        assert int(found.col.min()) >= 0 and int(found.col.max()) < n_in


def _all_scores(x: Tensor, dz: Tensor, metric: str) -> np.ndarray:
    """(n_out, n_in), one pair after the other in float64."""
    scores = np.empty((dz.shape[1], x.shape[1]))
    for row, col in np.ndindex(*scores.shape):
        a, b = dz[:, row].double().numpy(), x[:, col].double().numpy()
        product = float((a * b).sum())
        distance = float(((a - b) ** 2).sum())
        scores[row, col] = {"abs-ip": abs(product), "ip": product, "l2": -distance}[metric]
    return scores


def _best(scores: np.ndarray, count: int, active: Tensor) -> list[int]:
    """Keys by (score descending, key ascending)."""
    flat, taken = scores.ravel(), set(active.tolist())
    left = [key for key in range(flat.size) if key not in taken]
    return sorted(sorted(left, key=lambda key: (-flat[key], key))[:count])


def _share_active(size: int, share: float, seed: int) -> Tensor:
    order = torch.randperm(size, generator=_generator(seed))
    return order[: int(share * size)].sort().values


# What every index must do.


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("library", "kind"), INDEXES)
@pytest.mark.parametrize(
    ("batch", "n_in", "n_out"), [(1, 1, 1), (4, 1, 7), (4, 7, 1), (1, 6, 9), (3, 20, 4)]
)
def test_exactly_count_inactive_ones_with_their_true_scores(
    library: str, kind: str, metric: str, batch: int, n_in: int, n_out: int
) -> None:
    strategy = _build(library, index=kind, metric=metric)
    x, dz = _normal(batch, n_in, seed=1), _normal(batch, n_out, seed=2)
    wanted = _all_scores(x, dz, metric)
    for share in (0.0, 0.4, 0.9):
        active = _share_active(n_in * n_out, share, seed=3)
        left = n_in * n_out - active.numel()
        for count in sorted({0, 1, left // 2, left}):
            found = strategy((x, dz), count, active)
            _check(found, count, active, n_out, n_in)
            np.testing.assert_allclose(
                found.score.numpy(), wanted.ravel()[_keys(found, n_in)], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("library", "kind"), INDEXES)
@pytest.mark.parametrize("vectors", ["zero", "constant", "ties", "duplicates", "heavy", "no dz"])
def test_degenerate_vectors(library: str, kind: str, metric: str, vectors: str) -> None:
    strategy = _build(library, index=kind, metric=metric)
    x, dz = torch.ones(4, 9), torch.ones(4, 7)
    if vectors == "zero":
        x, dz = x * 0, dz * 0
    elif vectors == "ties":
        x, dz = _integers(4, 9, seed=1, low=-1, high=1), _integers(4, 7, seed=2, low=-1, high=1)
    elif vectors == "duplicates":
        x, dz = _normal(4, 1, seed=1).expand(-1, 9), _normal(4, 1, seed=2).expand(-1, 7)
    elif vectors == "heavy":
        dz[:, 3] = 1e6
    elif vectors == "no dz":
        dz = dz * 0
    active = torch.arange(0, 63, 4)
    for count in (1, 20, 63 - active.numel()):
        first = strategy((x, dz), count, active)
        _check(first, count, active, 7, 9)
        again = strategy((x, dz), count, active)
        assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))


@pytest.fixture
def threads(faiss: Any) -> Iterator[Any]:
    """Sets the threads of PyTorch and faiss."""
    before = torch.get_num_threads(), faiss.omp_get_max_threads()

    def set_threads(count: int) -> None:
        torch.set_num_threads(count)
        faiss.omp_set_num_threads(count)

    yield set_threads
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


@pytest.mark.parametrize(("library", "kind"), INDEXES)
@pytest.mark.parametrize("ties", [False, True])
def test_the_same_whatever_the_threads_and_the_global_state(
    library: str, kind: str, ties: bool, threads: Any
) -> None:
    """Few links, so that a graph built otherwise would give other answers."""
    strategy = _build(
        library, k_similar=0.05, index=kind, **({} if kind == "brute-force" else {"links": 4})
    )
    x, dz = _normal(24, 700, seed=1), _normal(24, 300, seed=2)
    if ties:
        x, dz = x[:4].sign(), dz[:4].sign()
    answers = []
    for count in (1, 3, 2, 1):
        threads(count)
        torch.manual_seed(count)
        np.random.seed(count)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        answers.append(strategy((x, dz), 2000, NONE))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()
    for other in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answers[0][:3], other[:3], strict=True))
        assert answers[0].flops == other.flops and answers[0].report == other.report


def test_settings_of_faiss_are_left_as_they_were(faiss: Any, threads: Any) -> None:
    threads(3)
    before = faiss.cvar.distance_compute_blas_threshold
    for kind in faiss_search.KINDS:
        Faiss(index=kind)((_normal(3, 40, seed=1), _normal(3, 30, seed=2)), 50, NONE)
        assert faiss.omp_get_max_threads() == 3
        assert faiss.cvar.distance_compute_blas_threshold == before


def test_inputs_of_any_dtype_and_layout_are_left_alone(index: growth.Strategy) -> None:
    """Whole numbers are exact in every dtype, so that the answer is always the same."""
    x, dz, active = _integers(5, 18, seed=1), _integers(5, 16, seed=2), torch.tensor([1, 5, 99])
    wanted = index((x, dz), 40, active)
    parts = [LinearPairs(x[:2], dz[:2]), LinearPairs(x[2:].half(), dz[2:].bfloat16())]
    for vectors in (
        (x.half(), dz.half()),
        (x.bfloat16(), dz.bfloat16()),
        (x.double(), dz),
        (x.T.contiguous().T, torch.cat([dz, dz], 1)[:, :16]),
        (x.clone().requires_grad_(), dz[:, None][:, 0]),
        JoinedPairs(parts),
    ):
        copies = [t.clone() for t in vectors] if isinstance(vectors, tuple) else []
        found = index(vectors, 40, active)
        assert _keys(found, 18) == _keys(wanted, 18)
        assert torch.equal(found.score, wanted.score)
        assert not found.score.requires_grad
        for now, copy in zip(vectors if copies else (), copies, strict=True):
            assert torch.equal(now, copy)
    assert active.tolist() == [1, 5, 99]


def test_a_convolution_is_its_unfolded_vectors(index: growth.Strategy) -> None:
    x, dz = _integers(3, 4, 6, 5, seed=1), _integers(3, 7, 3, 2, seed=2)
    pairs = ConvPairs(x, dz, (3, 2), stride=(2, 2), padding=(1, 0))
    whole = torch.nn.functional.unfold(x, (3, 2), padding=(1, 0), stride=2)
    # (batch, channels * taps, positions) to (batch * positions, taps * channels).
    whole = whole.view(3, 4, 6, 6).permute(0, 3, 2, 1).reshape(18, 24)
    flat = dz.flatten(2).transpose(1, 2).reshape(18, 7)
    found, wanted = index(pairs, 30, NONE), index((whole, flat), 30, NONE)
    _check(found, 30, NONE, 7, 24)
    assert _keys(found, 24) == _keys(wanted, 24) and torch.equal(found.score, wanted.score)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("library", "kind"), INDEXES)
@pytest.mark.parametrize("mixed", [False, True])
def test_products_that_overflow_are_refused_or_valid(
    library: str, kind: str, metric: str, mixed: bool
) -> None:
    """1e30 is finite and its square is not; of mixed signs, the products are NaN."""
    strategy = _build(library, index=kind, metric=metric)
    x, dz = torch.full((3, 20), 1e30), torch.full((3, 14), 1e30)
    if mixed:
        x, dz = x * (_normal(3, 20, seed=1).sign()), dz * (_normal(3, 14, seed=2).sign())
    try:
        found = strategy((x, dz), 30, NONE)
    except InputError as error:
        assert "finite score" in str(error) or "overflow" in str(error)
    else:
        _check(found, 30, NONE, 14, 20)
        assert not found.score.isnan().any() and not (found.score == -torch.inf).any()


@pytest.mark.parametrize(("library", "kind"), INDEXES)
def test_overflow_to_minus_infinity_alone_is_refused(library: str, kind: str) -> None:
    strategy = _build(library, index=kind, metric="ip")
    with pytest.raises(InputError, match=r"finite score|overflow"):
        strategy((torch.full((2, 3), 1e30), torch.full((2, 4), -1e30)), 5, NONE)


def test_what_no_index_reaches_is_made_up_exactly() -> None:
    """One list of a hundred vectors is visited, and all connections are wanted."""
    strategy = _build("faiss", index="ivf", nprobe=0.01)
    x, dz = _normal(6, 100, seed=1), _normal(6, 9, seed=2)
    active = _share_active(900, 0.1, seed=3)
    found = strategy((x, dz), 810, active)
    _check(found, 810, active, 9, 100)
    assert 0 < found.report["completed exactly"] < 810 and found.report["k"] == 100
    np.testing.assert_allclose(
        found.score, _all_scores(x, dz, "abs-ip").ravel()[_keys(found, 100)], rtol=1e-4, atol=1e-5
    )
    few = strategy((x, dz), 700, active)
    _check(few, 700, active, 9, 100)


def test_reports_say_how_it_searched(index: Any) -> None:
    found = index((_normal(6, 50, seed=1), _normal(6, 40, seed=2)), 100, NONE)
    assert found.report["search"].endswith(index.index)
    assert found.report["queries repeated"] == found.report["completed exactly"] == 0
    if index.index != "range":
        assert found.report["k"] == 8  # ceil(50 * .15)
    assert found.flops > 0


def test_nothing_asked_costs_nothing(index: growth.Strategy) -> None:
    found = index((_normal(6, 50, seed=1), _normal(6, 40, seed=2)), 0, NONE)
    _check(found, 0, NONE, 40, 50)
    assert found.flops == 0


def test_blocks_are_refused(index: growth.Strategy) -> None:
    with pytest.raises(InputError, match=r"single neurons, not blocks of \(2, 2\): use 'exact'"):
        index((torch.ones(2, 4), torch.ones(2, 4)), 1, NONE, block=(2, 2))


# The searches that find everything.


def _vectors(kind: str, batch: int, n_in: int, n_out: int, seed: int) -> tuple[Tensor, Tensor]:
    x, dz = _integers(batch, n_in, seed=seed), _integers(batch, n_out, seed=seed + 1)
    if kind == "heavy row":
        dz[:, seed % n_out] *= 50
    elif kind == "negative":
        x, dz = x.abs() + 1, -dz.abs() - 1
    elif kind == "constant":
        x, dz = torch.ones_like(x), torch.ones_like(dz)
    elif kind == "zero":
        dz = torch.zeros_like(dz)
    elif kind == "rising":  # every query beats all before it
        x, dz = torch.ones_like(x), torch.arange(1.0, n_out + 1).expand(batch, -1).clone()
    return x, dz


@pytest.mark.parametrize(("library", "kind"), EXHAUSTIVE)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    metric=st.sampled_from(METRICS),
    vectors=st.sampled_from(["random", "heavy row", "negative", "constant", "zero", "rising"]),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 10_000),
    share=st.floats(0, 1),
    asked=st.floats(0, 1),
    room=st.sampled_from([1, 20, 1 << 19]),
)
def test_all_neighbours_equal_brute_force(
    library: str,
    kind: str,
    metric: str,
    vectors: str,
    shape: tuple[int, int, int],
    seed: int,
    share: float,
    asked: float,
    room: int,
) -> None:
    """Whatever the number of queries, and of candidates, that there is room for at a time."""
    strategy = _build(library, k_similar=1.0, metric=metric, index=kind)
    batch, n_in, n_out = shape
    x, dz = _vectors(vectors, batch, n_in, n_out, seed)
    active = _share_active(n_in * n_out, share, seed)
    count = int(asked * (n_in * n_out - active.numel()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "BATCH_NEIGHBOURS", room)
        patch.setattr(running_top, "SLACK", 0 if room < 100 else running_top.SLACK)
        patch.setattr(faiss_search, "RANGE_PAIRS", room)
        found = strategy((x, dz), count, active)
    scores = _all_scores(x, dz, metric)
    wanted = _best(scores, count, active)
    assert _keys(found, n_in) == wanted
    np.testing.assert_allclose(
        found.score.numpy(), scores.ravel()[_keys(found, n_in)], rtol=1e-5, atol=1e-5
    )


@needs_faiss
@pytest.mark.parametrize("metric", METRICS)
def test_range_finds_what_exact_finds(metric: str) -> None:
    x, dz = _normal(20, 300, seed=1), _normal(20, 250, seed=2) * _normal(250, seed=3).exp()
    active = _share_active(75_000, 0.2, seed=4)
    found = Faiss(index="range", metric=metric)((x, dz), 900, active)
    wanted = Exact(metric)((x, dz), 900, active)
    assert _keys(found, 300) == _keys(wanted, 300)
    torch.testing.assert_close(found.score, wanted.score, rtol=1e-4, atol=1e-4)
    assert found.flops == (2 if metric == "abs-ip" else 1) * 2 * 20 * 300 * 250


@needs_faiss
@pytest.mark.parametrize("room", [1, 1 << 22])
@pytest.mark.parametrize(
    ("metric", "dz"),
    [
        ("abs-ip", [[-1.0, 1.0], [0.0, 5.0]]),
        ("ip", [[1.0, 1.0], [0.0, 5.0]]),
        ("l2", [[2.0, 0.0], [0.0, 0.0]]),
    ],
)
def test_range_gives_a_tie_to_the_lowest_key_whatever_it_visits_first(
    metric: str, dz: list[list[float]], room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both rows are equally similar, and the second is visited first."""
    monkeypatch.setattr(faiss_search, "RANGE_PAIRS", room)
    found = Faiss(metric=metric, index="range")(
        (torch.tensor([[1.0], [0.0]]), torch.tensor(dz)), 1, NONE
    )
    assert _keys(found, 1) == [0]


@needs_faiss
def test_the_radius_keeps_most_pairs_from_being_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The candidates stay a few times the count, of a million pairs."""
    offered = []
    offer = neighbours.Candidates.offer
    monkeypatch.setattr(
        neighbours.Candidates,
        "offer",
        lambda self, keys, scores: (offered.append(keys.size), offer(self, keys, scores))[1],
    )
    monkeypatch.setattr(running_top, "SLACK", 0)
    x, dz = _normal(8, 1000, seed=1), _normal(8, 1000, seed=2) * _normal(1000, seed=3).exp()
    Faiss(index="range")((x, dz), 1000, NONE)
    assert sum(offered) < 100_000


# Neighbours, flattened.


@pytest.mark.parametrize(("library", "kind"), [("faiss", "flat"), ("nmslib", "brute-force")])
def test_pairs_of_heavy_rows_are_missed_as_figure_3_1_shows(library: str, kind: str) -> None:
    """Two of a row's five neighbours are looked at: row 0's third best, 33.1, stays unseen though
    it is the third best of all."""
    products = torch.tensor(
        [
            [40.0, 35.0, 33.1, 2.0, 1.0],
            [3.0, 9.0, 1.0, 8.0, 2.0],
            [7.0, 1.0, 2.0, 3.0, 6.0],
        ]
    )
    pairs = (products, torch.eye(3))  # dz^T x = x
    every = _build(library, k_similar=1.0, index=kind)(pairs, 4, NONE)
    few = _build(library, k_similar=0.4, index=kind)(pairs, 4, NONE)
    assert _keys(every, 5) == [0, 1, 2, 6]
    assert _keys(few, 5) == [0, 1, 6, 8]
    assert few.score.tolist() == [40.0, 35.0, 9.0, 8.0]
    assert _keys(Exact()(pairs, 4, NONE), 5) == _keys(every, 5)


@pytest.mark.parametrize(("library", "kind"), [("faiss", "flat"), ("nmslib", "brute-force")])
def test_too_few_are_asked_for_again(library: str, kind: str) -> None:
    """One neighbour a row, which is active: the first answer holds nothing."""
    x, dz = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.ones(1, 3)
    active = torch.tensor([0, 4, 8])
    found = _build(library, k_similar=0.25, metric="ip", index=kind)((x, dz), 4, active)
    assert _keys(found, 4) == [1, 2, 5, 9]
    # 1, 2 and 4 neighbours: two of each row make only 3 inactive ones.
    assert found.flops == 3 * (2 * 1 * 4 * 3)
    assert found.report == {
        "search": f"{library} {kind}",
        "k": 4,
        "queries repeated": 2,
        "completed exactly": 0,
    }


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_nmslib_gives_a_tie_at_the_last_neighbour_to_the_lowest_column(metric: str) -> None:
    """All neighbours of every query count, so that each has to be the right one."""
    x, dz = (_integers(3, n, seed=n, low=-1, high=1) for n in (200, 30))
    strategy = _build("nmslib", k_similar=0.05, metric=metric, index="brute-force")
    found = strategy((x, dz), 300, NONE)
    scores = _all_scores(x, dz, metric)
    wanted = [200 * row + key for row in range(30) for key in _best(scores[row], 10, NONE)]
    assert found.report["queries repeated"] == 0 and _keys(found, 200) == wanted


def test_abs_ip_sees_the_most_negative(index: growth.Strategy) -> None:
    x, dz = torch.tensor([[1.0, -9.0, 3.0, 0.0]]), torch.ones(1, 1)
    found = index((x, dz), 1, NONE)
    assert _keys(found, 4) == [1] and found.score.tolist() == [9.0]


@pytest.mark.parametrize(("library", "kind"), INDEXES)
def test_batches_of_queries_make_no_difference(
    library: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = _build(library, k_similar=0.1, index=kind)
    x, dz = _integers(12, 90, seed=1), _integers(12, 80, seed=2)
    active = _share_active(7200, 0.1, seed=3)
    whole = strategy((x, dz), 400, active)
    monkeypatch.setattr(neighbours, "BATCH_NEIGHBOURS", 100)
    monkeypatch.setattr(running_top, "SLACK", 0)
    monkeypatch.setattr(faiss_search, "RANGE_PAIRS", 500)
    parts = strategy((x, dz), 400, active)
    assert _keys(parts, 90) == _keys(whole, 90) and torch.equal(parts.score, whole.score)


def test_answers_are_no_larger_than_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, held = [], []

    class Index:
        flops = 0

        def search(self, query: Any, k: int) -> Any:
            sizes.append(len(query) * k)
            columns = np.tile(np.arange(k), (len(query), 1))
            return np.ones((len(query), k), np.float32), columns

    offer = neighbours.Candidates.offer
    monkeypatch.setattr(
        neighbours.Candidates,
        "offer",
        lambda self, keys, scores: (offer(self, keys, scores), held.append(self.held))[0],
    )
    monkeypatch.setattr(neighbours, "BATCH_NEIGHBOURS", 1000)
    monkeypatch.setattr(running_top, "SLACK", 50)
    pairs = LinearPairs(torch.ones(1, 100), torch.ones(1, 400))
    query = np.ones((400, 1), np.float32)
    found = neighbours.grow_from_neighbours(
        pairs,
        growth.Grid.of(400, 100, 1, (1, 1)),
        30,
        NONE,
        query,
        Index(),
        k_similar=0.2,
        metric="abs-ip",
        name="fake",
    )
    _check(found, 30, NONE, 400, 100)
    # All tie, and all are offered: both signs of 25 queries at a time.
    assert max(sizes) == 500 and sum(sizes) == 2 * 400 * 20
    assert max(held) < 2 * 30 + 50


@pytest.mark.parametrize("kind", ["ivf", "hnsw", "lsh"])
def test_too_few_answers_of_an_index_are_no_connections(kind: str) -> None:
    """What faiss marks as missing (-1) never becomes one, and is counted as missing."""
    x, dz = _normal(2, 30, seed=1), _normal(2, 5, seed=2)
    for count in (5, 60, 150):
        _check(_build("faiss", k_similar=0.1, index=kind)((x, dz), count, NONE), count, NONE, 5, 30)


# Approximate indexes.


def _clusters(batch: int, n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
    """Vectors of one length around ten directions, which any index tells apart."""
    centres = _normal(batch, 10, seed=1)
    x = centres[:, torch.arange(n_in) % 10] + 0.3 * _normal(batch, n_in, seed=2)
    dz = centres[:, torch.arange(n_out) % 10] + 0.3 * _normal(batch, n_out, seed=3)
    return x / x.norm(dim=0), dz / dz.norm(dim=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("library", "kind", "least"),
    [
        ("faiss", "ivf", 0.9),
        ("faiss", "hnsw", 0.9),
        ("faiss", "lsh", 0.6),
        ("nmslib", "hnsw", 0.9),
    ],
)
def test_recall_on_easy_vectors(library: str, kind: str, least: float, metric: str) -> None:
    """Random choice would reach one per cent."""
    x, dz = _clusters(32, 400, 300)
    wanted = set(_keys(Exact(metric)((x, dz), 1200, NONE), 400))
    found = _build(library, k_similar=0.12, metric=metric, index=kind)((x, dz), 1200, NONE)
    assert len(wanted & set(_keys(found, 400))) > least * 1200


@pytest.mark.parametrize(
    ("kind", "few", "many"),
    [
        ("ivf", {"nprobe": 0.05}, {"nprobe": 0.5}),
        ("lsh", {"bits": 0.5}, {"bits": 8}),
        ("hnsw", {"links": 2}, {"links": 32}),
    ],
)
def test_options_buy_recall(kind: str, few: dict[str, Any], many: dict[str, Any]) -> None:
    x, dz = _normal(24, 500, seed=1), _normal(24, 200, seed=2)
    wanted = set(_keys(Exact()((x, dz), 500, NONE), 500))
    recalls = []
    for options in (few, many):
        found = _build("faiss", k_similar=0.05, index=kind, **options)((x, dz), 500, NONE)
        recalls.append(len(wanted & set(_keys(found, 500))) / 500)
    assert recalls[1] > recalls[0] + 0.1


@pytest.mark.parametrize(("library", "kind"), [("faiss", "hnsw"), ("nmslib", "hnsw")])
def test_more_candidates_buy_recall_of_a_graph(library: str, kind: str) -> None:
    x, dz = _normal(24, 800, seed=1), _normal(24, 100, seed=2)
    wanted = set(_keys(Exact("l2")((x, dz), 100, NONE), 800))
    recalls = []
    for options in ((1, 1), (1, 200), (200, 200)):
        ef_search, ef_construction = options
        strategy = _build(
            library,
            k_similar=0.003,
            metric="l2",
            index=kind,
            ef_search=ef_search,
            ef_construction=ef_construction,
        )
        recalls.append(len(wanted & set(_keys(strategy((x, dz), 100, NONE), 800))))
    assert recalls[0] < recalls[1] < recalls[2]


@pytest.mark.parametrize("library", ["faiss", "nmslib"])
def test_a_graph_keeps_at_least_as_many_candidates_as_it_gives_neighbours(library: str) -> None:
    """100 of 1000, from vectors of all lengths."""
    x = _normal(24, 1000, seed=1) * _normal(1000, seed=3).exp()
    answers = []
    for ef_search in (1, 100):
        strategy = _build(library, k_similar=0.1, index="hnsw", ef_search=ef_search)
        answers.append(strategy((x, _normal(24, 100, seed=2)), 1000, NONE))
    assert _keys(answers[0], 1000) == _keys(answers[1], 1000)


@needs_faiss
@pytest.mark.parametrize("k_similar", [0.02, 0.5])
def test_lsh_ranks_by_the_metric_and_not_by_the_angle(k_similar: float) -> None:
    """One vector of each direction is long: its pairs lead, though the angles are the same."""
    x, dz = _clusters(32, 200, 50)
    x[:, ::20] *= 10
    found = Faiss(k_similar, index="lsh", bits=8)((x, dz), 5, NONE)
    assert (found.col % 20 == 0).all()


@needs_faiss
def test_long_vectors_are_folded_and_keep_their_products() -> None:
    short = np.random.default_rng(0).standard_normal((4, faiss_search.LSH_LENGTH), np.float32)
    assert faiss_search._fold(short) is short
    vectors = np.random.default_rng(1).standard_normal((300, 1700), np.float32)
    vectors[1] = vectors[0] + 0.3 * vectors[1]
    folded = faiss_search._fold(vectors)
    assert folded.shape == (300, faiss_search.LSH_LENGTH)
    wanted, products = vectors @ vectors.T, folded @ folded.T
    # 1 / sqrt(512) of the squared norms, with no bias.
    errors = (products - wanted) / 1700
    assert np.abs(errors).max() < 6 / 512**0.5 and abs(errors.mean()) < 0.2 / 512**0.5
    positive = np.abs(vectors)
    folded = faiss_search._fold(positive)
    errors = (folded @ folded.T - positive @ positive.T) / 1700
    assert np.abs(errors).max() < 6 / 512**0.5
    x, dz = _clusters(1700, 200, 150)
    wanted_keys = set(_keys(Exact()((x, dz), 300, NONE), 200))
    found = Faiss(0.2, index="lsh")((x, dz), 300, NONE)
    assert len(wanted_keys & set(_keys(found, 200))) > 150


@needs_faiss
def test_clusters_of_few_vectors_are_made_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    for n_in in (1, 2, 3, 50):
        Faiss(index="ivf")((_normal(4, n_in, seed=1), _normal(4, 6, seed=2)), 2, NONE)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@needs_faiss
def test_activations_too_large_to_cluster_are_refused() -> None:
    """faiss would abort the process."""
    with pytest.raises(InputError, match="squared norms of the activations overflow"):
        Faiss(index="ivf")((torch.full((3, 20), 1e25), torch.ones(3, 14)), 30, NONE)


# Operations.


@needs_faiss
def test_operations_of_approximate_searches() -> None:
    batch, n_in, n_out = 8, 100, 30
    pairs = (_normal(batch, n_in, seed=1), _normal(batch, n_out, seed=2))
    flat = Faiss(0.1, "ip")(pairs, 20, NONE).flops
    assert flat == 2 * batch * n_in * n_out
    # 10 lists: 10 rounds of k-means and one to fill them; the lists nearest to each query, and
    # every vector in those: all of them where all are visited.
    ivf = Faiss(0.1, "ip", index="ivf", nprobe=1.0)(pairs, 20, NONE).flops
    assert ivf == 11 * n_in * 2 * batch * 10 + n_out * 2 * batch * 10 + flat
    assert Faiss(0.1, "ip", index="ivf", nprobe=0.1)(pairs, 20, NONE).flops < ivf - flat / 2
    # 16 bits, and all products for the rescoring; few neighbours are rescored one by one.
    lsh = Faiss(0.1, "ip", index="lsh")(pairs, 20, NONE).flops
    assert lsh == 2 * batch * 16 * (n_in + n_out) + flat
    lsh = Faiss(0.01, "ip", index="lsh")(pairs, 20, NONE).flops
    assert lsh == 2 * batch * 16 * (n_in + n_out) + 2 * batch * n_out * 1
    assert 2 * batch * n_out * 10 < Faiss(0.1, "ip", index="hnsw")(pairs, 20, NONE).flops < flat


def test_operations_of_nmslib() -> None:
    batch, n_in, n_out = 8, 100, 30
    pairs = (_normal(batch, n_in, seed=1), _normal(batch, n_out, seed=2))
    brute = _build("nmslib", k_similar=0.1, index="brute-force")(pairs, 20, NONE).flops
    assert brute == 2 * (2 * batch * n_in * n_out)
    graph = _build("nmslib", k_similar=0.1, metric="l2")(pairs, 20, NONE).flops
    assert graph == 2 * batch * n_out * 10


# faiss on a GPU, without one.


@needs_faiss
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k_similar", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("most", [1, 7, 20, 64, 89, 90, 500])
def test_tiles_of_a_device_merge_to_the_whole(
    monkeypatch: pytest.MonkeyPatch, faiss: Any, metric: str, k_similar: float, most: int
) -> None:
    asked = []

    def limited(query: Any, base: Any, k: int, metric: int) -> Any:
        assert k <= most
        asked.append(len(base))
        return faiss.knn(query, base, k, metric)

    x, dz = _normal(6, 90, seed=1), _normal(6, 40, seed=2)
    active = _share_active(3600, 0.2, seed=3)
    whole = Faiss(k_similar, metric)((x, dz), 300, active)
    monkeypatch.setattr(faiss_search, "exhaustive_search", lambda *_: (limited, most))
    tiled = Faiss(k_similar, metric)((x, dz), 300, active)
    assert _keys(tiled, 90) == _keys(whole, 90)
    torch.testing.assert_close(tiled.score, whole.score)
    assert tiled.flops == whole.flops and tiled.report == whole.report
    # Tiles only where they are needed, and of as many vectors as neighbours can be asked for.
    assert set(asked) <= {90, most, 90 % most}


@needs_faiss
def test_missing_answers_of_a_tile_stay_missing(faiss: Any) -> None:
    """A tile's -1 must not become the last column of the tile before."""
    base = np.full((6, 2), 1e30, np.float32)
    index = faiss_search._Flat(base, "ip", faiss.knn, 2)
    _, cols = index.search(np.full((1, 2), -1e30, np.float32), 5)
    assert cols.tolist() == [[-1] * 5]


def test_a_gpu_is_used_where_faiss_can_use_one() -> None:
    used: dict[str, Any] = {}

    class Resources:
        def setTempMemory(self, size: int) -> None:
            used["scratch"] = size

    def knn_gpu(resources: Any, query: Any, base: Any, k: int, **options: Any) -> str:
        used.update(options, resources=resources)
        return "answer"

    module = types.SimpleNamespace(
        knn="on the CPU",
        knn_gpu=knn_gpu,
        StandardGpuResources=Resources,
        get_num_gpus=lambda: 2,
    )
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    assert faiss_search.exhaustive_search(module, cpu) == (faiss_search._knn, None)
    knn, most = faiss_search.exhaustive_search(module, cuda)
    assert knn("query", "base", 5, metric=0) == "answer" and most == 2048
    assert used["device"] == 1 and used["metric"] == 0 and used["scratch"] < 1 << 30
    assert isinstance(used["resources"], Resources)
    module.get_num_gpus = lambda: 0
    assert faiss_search.exhaustive_search(module, cuda) == (faiss_search._knn, None)
    del module.StandardGpuResources
    assert faiss_search.exhaustive_search(module, cuda) == (faiss_search._knn, None)


# Options, and libraries that are not there.


@pytest.mark.parametrize("library", ["faiss", "nmslib"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_similar": 0.0}, r"k_similar 0.0 must be a share in \(0, 1\]"),
        ({"k_similar": -0.1}, r"share in \(0, 1\]"),
        ({"k_similar": 1.5}, r"share in \(0, 1\]"),
        ({"k_similar": float("nan")}, r"share in \(0, 1\]"),
        ({"metric": "cosine"}, "'cosine' is unknown: choose abs-ip, ip, l2"),
        ({"index": "tree"}, "has no index 'tree': choose .*hnsw"),
        ({"links": 1}, "links 1 must be at least 2"),
        ({"ef_construction": 0}, "ef_construction 0 and ef_search 16 must be at least 1"),
        ({"ef_search": 0}, "at least 1"),
    ],
)
def test_options_are_checked(library: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        growth.STRATEGIES[library](**options)


@pytest.mark.parametrize("bits", [0.0, -1.0, float("inf"), float("nan")])
def test_bits_must_be_positive(bits: float) -> None:
    with pytest.raises(InputError, match="must be a positive multiple"):
        Faiss(index="lsh", bits=bits)


@pytest.mark.parametrize("nprobe", [0.0, 1.1, float("nan")])
def test_nprobe_must_be_a_share(nprobe: float) -> None:
    with pytest.raises(InputError, match=r"share of the lists in \(0, 1\]"):
        Faiss(index="ivf", nprobe=nprobe)


@pytest.mark.parametrize("library", ["faiss", "nmslib"])
def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingLibraryError, match=rf"{library}.*pip install 'sparsegrow\[cpu\]'"):
        growth.STRATEGIES[library]()


def test_nmslib_is_imported_and_searched_without_a_word() -> None:
    pytest.importorskip("nmslib", reason="nmslib is missing: pip install 'sparsegrow[cpu]'")
    code = """if True:
        import growth, torch
        vectors = torch.ones(2, 9), torch.ones(2, 9)
        growth.Nmslib()(vectors, 3, torch.empty(0, dtype=torch.int64))
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == done.stderr == ""


def test_other_words_than_the_notice_are_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ImportError), nmslib_search._without_notice():
        os.write(2, b"pip install --no-binary :all: nmslib\nlibgomp: a real problem\n")
        raise ImportError
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "libgomp: a real problem\nafter\n"


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_long_vectors_are_rotated_into_fewer_dimensions(scale: float) -> None:
    """Products with short gradients, and distances, stay; a zero vector stays zero."""
    x, dz = _normal(400, 30, seed=1), scale * _normal(400, 20, seed=2)
    x[:, 3], dz[:, 4], dz[:, 5] = 0, 0, scale * x[:, 7]  # dependent ones as well
    base, query = neighbours.whole_vectors(LinearPairs(x, dz))
    assert base.shape == (30, 50) and query.shape == (20, 50)
    products = (dz.double().T @ x.double()).numpy()
    np.testing.assert_allclose(query @ base.T, products, atol=2e-5 * np.abs(products).max())
    norms = np.linalg.norm(x.numpy(), axis=0)
    np.testing.assert_allclose(np.linalg.norm(base, axis=1), norms, rtol=1e-5)
    assert not base[3].any() and not query[4].any()
    short = neighbours.whole_vectors(LinearPairs(x[:40], dz[:40]))
    assert np.array_equal(short[0], x[:40].T.numpy())
