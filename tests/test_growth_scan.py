"""The norm-ordered scan, the running top-K and the active keys, each against brute force."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import growth.active
import growth.scan
from growth import METRICS, Exact
from growth.active import ActiveKeys
from growth.running_top import RunningTop, select_best
from growth.scan import column_norms, scan

NONE = np.empty(0, np.int64)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _vectors(kind: str, depth: int, n: int, seed: int) -> Tensor:
    """Small whole numbers, whose products are exact in float32 and tie often."""
    x = torch.randint(-3, 4, (depth, n), generator=_generator(seed)).float()
    if kind == "equal norms":
        return x.sign() + (x == 0)
    if kind == "heavy":
        x[:, seed % n] *= 50
    elif kind == "negative":
        return -x.abs() - 1
    elif kind == "constant":
        return torch.ones_like(x)
    elif kind == "zero":
        return torch.zeros_like(x)
    elif kind == "rising":
        return torch.arange(1.0, n + 1).expand(depth, n).contiguous()
    elif kind == "floats":
        return torch.randn(depth, n, generator=_generator(seed))
    return x


KINDS = [
    "integers", "equal norms", "heavy", "negative", "constant", "zero", "rising", "floats"
]  # fmt: skip


def _scores(x: Tensor, dz: Tensor, metric: str) -> np.ndarray:
    """All scores in float64, one loop a row."""
    x64, dz64 = x.double().numpy(), dz.double().numpy()
    rows = []
    for row in dz64.T:
        products = (row[:, None] * x64).sum(0)
        if metric == "l2":
            products = -((row[:, None] - x64) ** 2).sum(0)
        rows.append(np.abs(products) if metric == "abs-ip" else products)
    return np.array(rows)


@st.composite
def _queries(draw: st.DrawFn) -> tuple[Tensor, Tensor, np.ndarray, int, str]:
    depth, n_in, n_out = draw(st.integers(1, 5)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    seed = draw(st.integers(0, 10_000))
    x = _vectors(draw(st.sampled_from(KINDS)), depth, n_in, seed)
    dz = _vectors(draw(st.sampled_from(KINDS)), depth, n_out, seed + 1)
    size = n_in * n_out
    alive = draw(st.integers(0, size))
    active = torch.randperm(size, generator=_generator(seed))[:alive].sort().values.numpy()
    count = min(size - alive, draw(st.integers(0, size)))
    return x, dz, active, count, draw(st.sampled_from(METRICS))


def _small_tiles(patch: pytest.MonkeyPatch) -> None:
    """Many tiles, waves and compactions on few neurons."""
    for name, value in (
        ("TILE_ROWS", 4),
        ("TILE_COLS", 7),
        ("_ALIGN", 2),
        ("_SINGLE_COST", 2),
        ("_MARKED_SHARE", 0.3),
    ):
        patch.setattr(growth.scan, name, value)


@settings(max_examples=800, deadline=None, derandomize=True)
@given(_queries(), st.sampled_from(["float32", "bfloat16"]), st.sampled_from([0, 5, 1000]))
def test_scan_equals_brute_force(
    query: tuple[Tensor, Tensor, np.ndarray, int, str], screen: str, slack: int
) -> None:
    x, dz, active, count, metric = query
    scores = _scores(x, dz, metric).ravel()
    top = RunningTop(count, np.float32, slack=slack + 1)
    with pytest.MonkeyPatch.context() as patch:
        _small_tiles(patch)
        cost = scan(x, dz, top, ActiveKeys(active, scores.size, 0), metric, screen)
    keys, found = top.result()
    free = np.setdiff1d(np.arange(scores.size), active)
    order = free[np.lexsort((free, -scores[free]))]
    assert 0 <= cost.share <= 1
    if torch.equal(x, x.round()) and torch.equal(dz, dz.round()):
        assert keys.tolist() == sorted(order[:count].tolist())
    else:  # rounding decides between neighbours
        assert np.unique(keys).size == count and not np.isin(keys, active).any()
        if count:
            assert scores[keys].min() >= scores[order[count - 1]] - 1e-5 * np.abs(scores).max()
    np.testing.assert_allclose(found, scores[keys], rtol=1e-5, atol=1e-5)


def _synthetic(n: int, depth: int, seed: int) -> Tensor:
    """Eight shared directions, noise, and norms spread as those of a trained layer's neurons."""
    g = _generator(seed)
    shared = torch.randn(depth, 8, generator=g) @ torch.randn(8, n, generator=g)
    noisy = shared + torch.randn(depth, n, generator=g)
    return noisy * torch.randn(n, generator=g).exp()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("screen", ["float32", "bfloat16"])
def test_exact_at_a_width_where_it_scans(metric: str, screen: str) -> None:
    """Real tiles; every pair beyond rounding of the threshold, and no other."""
    x, dz = _synthetic(1500, 24, 1), _synthetic(1100, 24, 2)
    active = torch.randperm(1500 * 1100, generator=_generator(0))[:100_000].sort().values
    found = Exact(metric, screen)((x, dz), 2000, active)
    assert 0 < found.report["computed"] < (0.5 if metric == "abs-ip" else 1)
    scores = (dz.double().T @ x.double()).flatten()
    if metric == "l2":
        norms = x.double().square().sum(0) + dz.double().square().sum(0)[:, None]
        scores = 2 * scores - norms.flatten()
    scores = scores.abs() if metric == "abs-ip" else scores
    scores[active] = -torch.inf
    threshold = scores.topk(2000).values.min()
    keys = found.row * 1500 + found.col
    doubt = 1e-6 * (threshold.abs() + 1)
    assert torch.isin((scores > threshold + doubt).nonzero().squeeze(1), keys).all()
    assert (scores[keys] >= threshold - doubt).all()
    assert keys.unique().numel() == 2000 and not torch.isin(keys, active).any()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    pairs = (_synthetic(1200, 16, 3), _synthetic(900, 16, 4))
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(Exact()(pairs, 5000, torch.arange(0, 900 * 1200, 7)))
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:3], other[:3], strict=True))


def test_more_ties_than_there_is_room_for() -> None:
    """A million equal scores, of which the lowest keys win."""
    found = Exact()((torch.ones(2, 1024), torch.ones(2, 1024)), 1500, torch.arange(0, 3000, 2))
    keys = (found.row * 1024 + found.col).tolist()
    assert keys == list(range(1, 3000, 2))


def test_one_heavy_row_ends_the_search_early() -> None:
    x, dz = torch.rand(4, 1024) + 1, torch.rand(4, 1024)
    dz[:, 700] = 1000
    found = Exact()((x, dz), 500, torch.empty(0, dtype=torch.int64))
    assert found.row.unique().tolist() == [700] and found.report["computed"] <= 0.25


@pytest.mark.parametrize("value", [1e25, 1e-25])
def test_norms_beyond_the_range_of_squares(value: float) -> None:
    """The squares of these overflow, or vanish, where their products do not."""
    x, dz = _synthetic(1024, 3, 5), _synthetic(1024, 3, 6)
    plain = Exact()((x, dz), 300, torch.empty(0, dtype=torch.int64))
    power = 2.0 ** round(np.log2(value))  # scaling by a power of two rounds nothing
    scaled = Exact()((x * power, dz / power), 300, torch.empty(0, dtype=torch.int64))
    assert torch.equal(plain.row, scaled.row) and torch.equal(plain.col, scaled.col)
    assert scaled.report["computed"] < 0.5


def test_norms() -> None:
    vectors = torch.tensor([[3.0, 0, 1e30, 1e-30], [4.0, 0, 1e30, 1e-30]])
    np.testing.assert_allclose(
        column_norms(vectors), [5, 0, 1e30 * 2**0.5, 1e-30 * 2**0.5], rtol=1e-6
    )
    np.testing.assert_allclose(
        column_norms(torch.full((4, 1), 1e300, dtype=torch.float64)), [2e300]
    )


def test_bfloat16_at_its_worst_rounding() -> None:
    """Both factors and the product lose half a unit in the last of eight bits, all downwards: the
    best 22000 products look smaller than the 400 000 of the heavy neurons that they exceed."""
    samples, value = 505, 1 + 2.0**-8
    best = samples * value**2
    x, dz = torch.zeros(samples + 2, 2124), torch.zeros(samples + 2, 420)
    x[:samples, 1024:] = dz[:samples, 400:] = value
    dz[samples, :400], x[samples, :1024] = 32, best * 0.999 / 32
    x[samples + 1, :1024] = 2000  # a long vector, and orthogonal to all
    for screen in ("float32", "bfloat16"):
        top = RunningTop(22_000)
        scan(x, dz, top, ActiveKeys(NONE, 420 * 2124, 0), "abs-ip", screen)
        keys, scores = top.result()
        np.testing.assert_allclose(scores, best, rtol=1e-6)
        assert (keys // 2124 >= 400).all() and (keys % 2124 >= 1024).all()


@pytest.mark.parametrize("scale", [1e-40, 1e-38, 1.0])
def test_bfloat16_of_tiny_numbers(scale: float) -> None:
    """Of which it holds fewer bits than of others, or none."""
    x, dz = _synthetic(1100, 24, 7) * scale / 100, _synthetic(1000, 24, 8)
    none = torch.empty(0, dtype=torch.int64)
    wanted = Exact(screen="float32")((x, dz), 3000, none)
    found = Exact(screen="bfloat16")((x, dz), 3000, none)
    # A handful of bits are left in float32, too: its rounding decides between neighbours.
    scores = (dz.double().T @ x.double()).abs()
    least = scores[wanted.row, wanted.col].min()
    rounding = 2.0**-149 * 24 * (1 + dz.abs().max()) + 1e-6 * least
    assert (scores[found.row, found.col] >= least - rounding).all()
    assert (found.score.double() >= least - rounding).all()


def test_bfloat16_of_numbers_that_it_rounds_to_infinity() -> None:
    """Which times zero are no number."""
    x, dz = _synthetic(1100, 24, 7), _synthetic(1000, 24, 8)
    x[:12], dz[:12] = 3.4e38, 0
    none = torch.empty(0, dtype=torch.int64)
    wanted = Exact(screen="float32")((x, dz), 3000, none)
    found = Exact(screen="bfloat16")((x, dz), 3000, none)
    assert torch.equal(found.row, wanted.row) and torch.equal(found.col, wanted.col)
    assert (found.score > 0).all()


@pytest.mark.parametrize("screen", ["float32", "bfloat16"])
def test_products_that_are_no_numbers(screen: str) -> None:
    """Infinite products are the best; inf - inf is never chosen, and so many as asked for are."""
    x, dz = torch.ones(2, 1100), torch.ones(2, 1000)
    x[:, :300] = 1e30
    dz[:, :200] = torch.tensor([[1e30], [-1e30]])  # with the first columns no number, or infinite
    dz[:, 200:210] = 1e30  # with the first columns infinite
    found = Exact(screen=screen)((x, dz), 64_000, torch.empty(0, dtype=torch.int64))
    keys = found.row * 1100 + found.col
    assert keys.unique().numel() == 64_000 and not found.score.isnan().any()
    certain = (torch.arange(200, 210)[:, None] * 1100 + torch.arange(300)).flatten()
    assert torch.isin(certain, keys).all()
    infinite = found.score.isinf()
    assert (found.row[infinite] < 210).all() and (found.col[infinite] < 300).all()
    assert (found.score[~infinite] == 2e30).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n_in", "n_out"), [(1025, 513), (3333, 257), (259, 2050)])
def test_doubles_of_any_layout_and_ragged_tiles(metric: str, n_in: int, n_out: int) -> None:
    x, dz = _synthetic(n_in, 12, 9).double(), _synthetic(n_out, 12, 10).double()
    x[0, 0] = 1 + 2.0**-40  # nothing a float holds
    strided = x.T.contiguous().T, torch.cat([dz, dz], 1)[:, n_out:]
    active = torch.arange(0, n_in * n_out, 5)
    found = Exact(metric)(strided, 1000, active)
    assert found.report["computed"] < 1 or metric == "l2"
    scores = dz.T @ x
    if metric == "l2":
        scores = 2 * scores - x.square().sum(0) - dz.square().sum(0)[:, None]
    scores = (scores.abs() if metric == "abs-ip" else scores).flatten()
    torch.testing.assert_close(found.score, scores[found.row * n_in + found.col])
    scores[active] = -torch.inf
    wanted = scores.topk(1000).indices.sort().values
    assert torch.equal(found.row * n_in + found.col, wanted)


def test_nothing_wanted_is_nothing_computed() -> None:
    found = Exact()(
        (torch.ones(4, 1024), torch.ones(4, 1024)), 0, torch.empty(0, dtype=torch.int64)
    )
    assert found.row.numel() == 0 and found.flops == 0 and found.report["computed"] == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_inside_a_tile_is_raised_and_threads_are_as_before(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    calls = []

    def broken(self: object, *tile: object) -> None:
        calls.append(torch.get_num_threads())
        if len(calls) > 2:
            raise MemoryError("no room")

    monkeypatch.setattr(growth.scan._Scan, "_unmarked", broken)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(MemoryError, match="no room"):
            Exact()((torch.ones(4, 4096), torch.ones(4, 1024)), 10, torch.arange(5))
        assert torch.get_num_threads() == threads
        # Of a thread that begins now, too.
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == threads
    finally:
        torch.set_num_threads(before)
    assert set(calls) == {1}  # each tile is one thread's


WORKER = """
import sys, torch, torch.distributed as dist, growth
from dst.distributed import ReducedPairs

rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2)
torch.set_num_threads(1 + rank)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
g = torch.Generator().manual_seed(0)
shared = torch.randn(64, 8, generator=g)
x, dz = (
    (shared @ torch.randn(8, n, generator=g) + 0.1 * torch.randn(64, n, generator=g))
    * torch.randn(n, generator=g).exp()
    for n in (1100, 1000)
)
active = torch.arange(0, 1_100_000, 9)
own = slice(32 * rank, 32 * (rank + 1))
for name in ("exact", "dense", "lowrank", "auto"):
    search = growth.STRATEGIES[name]()
    # The loss is the mean over a worker's batch, so that its gradients are larger.
    pairs = ReducedPairs(growth.LinearPairs(x[own], 2 * dz[own]))
    found = search(pairs, 2000, active, generator=torch.Generator().manual_seed(1))
    whole = search((x, dz), 2000, active, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found.row, whole.row) and torch.equal(found.col, whole.col), name
    torch.testing.assert_close(found.score, whole.score)
    assert found.state == whole.state, name
dist.destroy_process_group()
print("equal")
"""


def test_two_workers_search_as_one(tmp_path: Path) -> None:
    """On different numbers of threads."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store")],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for worker in workers:
            out, error = worker.communicate(timeout=120)
            assert worker.returncode == 0, error
            assert out.strip() == "equal"
    finally:
        for worker in workers:
            worker.kill()


# The running top-K.


@settings(max_examples=800, deadline=None, derandomize=True)
@given(
    st.lists(
        st.integers(-3, 3) | st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=120
    ),
    st.integers(0, 120),
    st.integers(1, 20),
    st.integers(1, 50),
    st.integers(0, 1000),
    st.sampled_from([np.float32, np.float64]),
)
def test_running_top_equals_sorting(
    scores: list[float], count: int, slack: int, step: int, seed: int, dtype: Any
) -> None:
    values = np.array(scores, dtype)
    count = min(count, values.size)
    keys = np.random.default_rng(seed).permutation(values.size)
    top = RunningTop(count, dtype, slack)
    for start in range(0, values.size, step):
        part, its_keys = values[start : start + step], keys[start : start + step]
        reach = part >= top.threshold  # what lies below need not be offered
        before = top.threshold
        top.offer(its_keys[reach], part[reach])
        assert top.threshold >= before
    best = np.lexsort((keys, -values))[:count]
    found, its_scores = top.result()
    assert found.tolist() == sorted(keys[best].tolist())
    assert its_scores.tolist() == [float(values[keys == key][0]) for key in found]
    assert count == 0 or top.threshold <= values[best].min()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_running_top_of_numbers_at_the_ends_of_their_range(dtype: Any) -> None:
    """Subnormal and infinite ones, zeros of either sign, and doubles beyond any float32."""
    values = np.array([np.inf, -0.0, 0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1e-39, 1.0], dtype)
    if dtype == np.float64:
        values = np.concatenate([values, [1e300, 2e300, -1e300, 1e-300, 5e-324]])
    values = np.tile(values, 40)
    keys = np.random.default_rng(0).permutation(values.size)
    for count in range(0, values.size, 17):
        top = RunningTop(count, dtype, slack=3)
        for start in range(0, values.size, 11):
            top.offer(keys[start : start + 11], values[start : start + 11])
        found, scores = top.result()
        best = np.lexsort((keys, -values))[:count]
        assert found.tolist() == sorted(keys[best].tolist())
        assert sorted(scores) == sorted(values[best])


def test_running_top_never_takes_minus_infinity() -> None:
    top = RunningTop(3)
    top.offer(np.arange(5), np.array([1, -np.inf, 2, -np.inf, -np.inf], np.float32))
    with pytest.raises(growth.InputError, match="only 2 of 3 connections have a finite score"):
        top.result()


def test_select_best_by_hand() -> None:
    keys, scores = np.array([9, 4, 7, 1, 3]), np.array([2.0, 5, 2, 2, 2])
    assert select_best(keys, scores, 3).tolist() == [1, 3, 4]
    assert select_best(keys, scores, 0).size == 0
    assert select_best(keys, scores, 9).tolist() == [0, 1, 2, 3, 4]


# Active keys.


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(1, 500),
    st.floats(0, 1),
    st.integers(1, 70),
    st.booleans(),
    st.integers(0, 1000),
)
def test_active_keys_by_bitmap_and_by_search(
    size: int, share: float, chunk: int, bitmap: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    keys = np.sort(rng.permutation(size)[: int(share * size)])
    questions = rng.permutation(size)[: rng.integers(0, size + 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growth.active, "active_bitmap_pays", lambda *_: bitmap)
        patch.setattr(growth.active, "_CHUNK", 8 * chunk)
        at = ActiveKeys(keys, size, questions.size).absent(questions)
    absent = questions if at is None else questions[at]
    assert sorted(absent.tolist()) == sorted(set(questions.tolist()) - set(keys.tolist()))


# Memory.

MEMORY = """
import sys, torch, growth

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

n, g = 8192, torch.Generator().manual_seed(0)
x, dz = (torch.randn(64, n, generator=g) * torch.randn(n, generator=g).exp() for _ in range(2))
active = torch.randint(n * n, (n * 16,), generator=g).unique()
# Loads what is loaded once, products in bfloat16 too: of four tiles, later ones meet a threshold.
growth.Exact()((x[:, :2048], dz[:, :2048]), 10, active[:0])
before = peak()
growth.Exact()((x, dz), 65536, active)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_exact_takes_a_fraction_of_the_gradient() -> None:
    """G is 268 MB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40e6, f"{int(done.stdout) / 1e6:.0f} MB"
