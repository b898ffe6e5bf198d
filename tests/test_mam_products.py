"""Multiply-and-max/min on the CPU, both ways, against an oracle that holds every product."""

import importlib
import logging
import math
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from sparse_case import Case, topology_of
from torch import Tensor

from growth import Grid
from growth.peak_memory import PeakMemory
from triton_kernels import Layout, mam_cpu
from triton_kernels.mam import (
    count_selections,
    count_sparse_selections,
    input_gradient,
    mam,
    sparse_mam,
    sparse_winners,
    weight_gradient,
    winners,
)

module = importlib.import_module("triton_kernels.mam")
needs_numba = pytest.mark.skipif(not find_spec("numba"), reason="numba is not installed")
WAYS = [pytest.param("numba", marks=needs_numba), "pytorch"]
# More samples than a vector holds in single precision, fewer in double, here and below: every other
# combination would be compiled, for a second. Several tiles of columns.
SHAPES = {
    torch.float32: [(37, 35, 150), (45, 1, 64), (33, 67, 3)],
    torch.float64: [(3, 5, 130), (1, 1, 1), (16, 9, 63)],
    torch.bfloat16: [(37, 35, 150)],
    torch.float16: [(40, 3, 70)],
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which implementation serves the test."""
    _take(request.param, monkeypatch)
    return request.param


def _take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_installed", lambda name: name == way == "numba")


def products(x: Tensor, weight: Tensor) -> np.ndarray:
    """(batch, n_out, n_in): exact, then rounded once to what is compared."""
    exact = x.detach().double()[:, None] * weight.detach().double()
    return (exact if x.dtype == torch.float64 else exact.float()).numpy()


def check(found: tuple[Tensor, ...], expected: np.ndarray, dtype: torch.dtype) -> None:
    """Winners of a dense weight against all products. NumPy's argmax takes the first of equal
    ones, and the first NaN before everything."""
    values, arg_max, arg_min = found
    assert values.dtype == dtype and arg_max.dtype == arg_min.dtype == torch.int32
    np.testing.assert_array_equal(arg_max.numpy(), expected.argmax(2))
    np.testing.assert_array_equal(arg_min.numpy(), expected.argmin(2))
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        sums = torch.from_numpy(expected.max(2) + expected.min(2)).to(dtype)
    torch.testing.assert_close(values, sums, rtol=0, atol=0, equal_nan=True)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape)


def _ties(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape).float()


def _zeros(*shape: int) -> Tensor:
    """Of both signs, and little else."""
    return torch.where(torch.rand(shape) < 0.9, torch.randn(shape).sign() * 0.0, 1.0)


def _some(number: float, share: float = 0.02) -> Callable[..., Tensor]:
    def make(*shape: int) -> Tensor:
        return torch.where(torch.rand(shape) < share, number, torch.randn(shape))

    return make


def _infinite(*shape: int) -> Tensor:
    """Products of infinity and zero are NaN, others infinite."""
    numbers = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1.0, -2.0])
    shares = torch.tensor([1, 1, 1, 1, 30, 30.0])
    return numbers[torch.multinomial(shares, math.prod(shape), replacement=True).view(shape)]


KINDS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "random": (_random, _random),
    "ties": (_ties, _ties),
    "signed zeros": (_zeros, _zeros),
    "all negative": (lambda *s: torch.rand(s) + 0.1, lambda *s: -torch.rand(s) - 0.1),
    "all positive": (lambda *s: torch.rand(s) + 0.1, lambda *s: torch.rand(s) + 0.1),
    "overflow": (_some(1e30, 0.5), _some(-1e30, 0.5)),
    "all -inf": (lambda *s: torch.full(s, torch.inf), lambda *s: -torch.rand(s) - 0.1),
    "NaN in x": (_some(torch.nan), _random),
    "NaN in the weight": (_random, _some(torch.nan)),
    "NaN in both": (_some(torch.nan), _some(torch.nan)),
    "infinities": (_infinite, _infinite),
}


@pytest.mark.parametrize("dtype", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_winners(way: str, kind: str, dtype: torch.dtype) -> None:
    for batch, n_out, n_in in SHAPES[dtype]:
        x, weight = _operands(kind, batch, n_out, n_in, dtype)
        expected = products(x, weight)
        found = winners(x, weight)
        check(found, expected, dtype)
        counts = torch.full((n_out, n_in), 5, dtype=torch.int32)
        count_selections(x, weight, counts)
        np.testing.assert_array_equal(counts.numpy() - 5, _counted(found, (n_out, n_in)))
        assert counts.sum() == 5 * counts.numel() + 2 * batch * n_out
        torch.testing.assert_close(mam(x, weight), found.values, equal_nan=True)


def _operands(
    kind: str, batch: int, n_out: int, n_in: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    of_x, of_weight = KINDS[kind]
    return of_x(batch, n_in).to(dtype), of_weight(n_out, n_in).to(dtype)


def _counted(found: tuple[Tensor, ...], shape: tuple[int, int]) -> np.ndarray:
    counts = np.zeros(shape, np.int64)
    rows = np.broadcast_to(np.arange(shape[0]), found[1].shape)
    for arg in found[1:]:
        np.add.at(counts, (rows, arg.numpy()), 1)
    return counts


@pytest.mark.parametrize("dtype", SHAPES)
@pytest.mark.parametrize("kind", ["random", "ties"])
def test_gradients(way: str, kind: str, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 0.02)
    for batch, n_out, n_in in SHAPES[dtype]:
        x, weight = _operands(kind, batch, n_out, n_in, dtype)
        dy = torch.randn(batch, n_out).to(dtype)
        expected = products(x, weight)
        dx, dweight = np.zeros((batch, n_in)), np.zeros((n_out, n_in))
        for arg in (expected.argmax(2), expected.argmin(2)):
            for b in range(batch):
                for i in range(n_out):
                    a, slope = arg[b, i], float(dy[b, i])
                    dx[b, a] += slope * float(weight[i, a])
                    dweight[i, a] += slope * float(x[b, a])
        x.requires_grad_()
        weight.requires_grad_()
        mam(x, weight).backward(dy)
        for tensor, gradient in ((x, dx), (weight, dweight)):
            assert tensor.grad is not None and tensor.grad.dtype == dtype
            actual = tensor.grad.double().numpy()
            np.testing.assert_allclose(actual, gradient, rtol=tolerance, atol=tolerance)
            assert (actual[gradient == 0] == 0).all()
        found = winners(x.detach(), weight.detach())
        assert torch.equal(input_gradient(dy, weight, *found[1:]), x.grad)
        out = torch.ones(n_in, n_out, dtype=dtype).T
        assert weight_gradient(dy, x, *found[1:], out=out) is out
        np.testing.assert_allclose(
            out.double().numpy(), 1 + dweight, rtol=tolerance, atol=2 * tolerance
        )


class Sparse:
    """A layout, and which weights it stands for by row: columns, positions k, numbers."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.layout: Layout = case.topology.layout
        self.values, self.n_in = case.values, case.n_in
        self.weight = case.weight.to(dtype)
        ends = self.layout.row_offsets.tolist()
        self.spans = list(pairwise(ends))
        self.cols = self.layout.cols.numpy()

    def expected(self, x: Tensor, absent: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values, arg_max and arg_min, a row at a time."""
        every = products(x, self.weight)
        values = np.zeros(every.shape[:2], every.dtype)
        args = np.full((2, *values.shape), -1)
        for r, (first, last) in enumerate(self.spans):
            columns = self.cols[first:last]
            if absent == "none" and first == last:
                continue
            # The products that compete, in the order of their columns, and what each stands for.
            place = np.full(self.n_in, -1)
            place[columns] = np.arange(first, last)
            own = np.where(place >= 0, every[:, r], 0)
            if absent == "none":
                own, place = own[:, columns], place[columns]
            with np.errstate(invalid="ignore"):  # infinity minus infinity
                values[:, r] = own.max(1) + own.min(1)
            args[:, :, r] = place[own.argmax(1)], place[own.argmin(1)]
        return values, args[0], args[1]


@pytest.mark.parametrize("absent", ["zero", "none"])
@pytest.mark.parametrize("alive", ["none", "one", "some", "all"])
@pytest.mark.parametrize("kind", ["random", "ties", "all negative", "NaN in x", "infinities"])
def test_sparse_winners(way: str, kind: str, alive: str, absent: str) -> None:
    """Free slots hold NaN, which nothing may read; NaN at absent columns counts for nothing."""
    for dtype, batch, n_out, n_in in (
        (torch.float32, 37, 21, 34),
        (torch.float64, 16, 5, 70),
        (torch.bfloat16, 33, 1, 5),
    ):
        case = Case(topology_of(Grid.of(n_out, n_in, 1, (1, 1)), alive), dtype)
        if kind == "ties":
            case.values, case.weight = (t.detach().sign() for t in (case.values, case.weight))
        if kind == "infinities" and alive != "none":
            case.values.data[case.topology.slots[0]] = torch.inf
            row, column = divmod(int(case.topology.keys()[0]), n_in)
            case.weight[row, column] = torch.inf
        sparse = Sparse(case, dtype)
        x = KINDS[kind][0](batch, n_in).to(dtype)
        values, arg_max, arg_min = sparse.expected(x, absent)
        found = sparse_winners(x, case.values, sparse.layout, absent=absent)
        np.testing.assert_array_equal(found.arg_max.numpy(), arg_max)
        np.testing.assert_array_equal(found.arg_min.numpy(), arg_min)
        sums = torch.from_numpy(values).to(dtype)
        torch.testing.assert_close(found.values, sums, rtol=0, atol=0, equal_nan=True)
        counts = torch.zeros(case.topology.capacity, dtype=torch.int32)
        count_sparse_selections(x, case.values, sparse.layout, counts, absent=absent)
        expected = np.zeros(case.topology.capacity)
        won = np.concatenate([arg_max.ravel(), arg_min.ravel()])
        np.add.at(expected, sparse.layout.slots.numpy()[won[won >= 0]], 1)
        np.testing.assert_array_equal(counts.numpy(), expected)


@pytest.mark.parametrize("alive", ["none", "some", "all"])
@pytest.mark.parametrize("absent", ["zero", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_sparse_gradients(way: str, dtype: torch.dtype, absent: str, alive: str) -> None:
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 0.02)
    batch = 16 if dtype == torch.float64 else 34
    case = Case(topology_of(Grid.of(21, 26, 1, (1, 1)), alive), dtype)
    sparse = Sparse(case, dtype)
    x = torch.randn(batch, 26).to(dtype).requires_grad_()
    dy = torch.randn(batch, 21).to(dtype)
    sparse_mam(x, case.values, sparse.layout, absent=absent).backward(dy)
    dx, dweight = np.zeros((batch, 26)), torch.zeros(21, 26, dtype=torch.float64)
    own = x.detach().double()
    for arg in sparse.expected(x, absent)[1:]:
        for (b, r), k in np.ndenumerate(arg):
            if k >= 0:
                column, slope = sparse.cols[k], float(dy[b, r])
                dx[b, column] += slope * float(sparse.weight[r, column])
                dweight[r, column] += slope * own[b, column]
    assert x.grad is not None and x.grad.dtype == dtype
    np.testing.assert_allclose(x.grad.double().numpy(), dx, rtol=tolerance, atol=tolerance)
    case.check_gradient(dweight, tolerance)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("way", WAYS)
def test_any_shape(way: str, data: st.DataObject) -> None:
    """Small whole numbers, so that ties are everywhere; a sparse weight next to the dense one."""
    with pytest.MonkeyPatch.context() as patch:
        _take(way, patch)
        size = st.integers(1, 70)
        batch = data.draw(st.sampled_from([0, *range(17, 50)]))
        n_out, n_in = data.draw(size), data.draw(size)
        torch.manual_seed(data.draw(st.integers(0, 999)))
        x, weight = _ties(batch, n_in), _ties(n_out, n_in)
        check(winners(x, weight), products(x, weight), torch.float32)
        alive = data.draw(st.sampled_from(["none", "one", "some", "all"]))
        case = Case(topology_of(Grid.of(n_out, n_in, 1, (1, 1)), alive), torch.float32)
        sparse = sparse_mam(x, case.values, case.topology.layout)
        assert torch.equal(sparse, mam(x, case.weight.float()))


def test_absent_weights_are_weights_of_zero(way: str) -> None:
    case = Case(topology_of(Grid.of(20, 30, 1, (1, 1)), "some"), torch.float32)
    layout, weight = case.topology.layout, case.weight.float().requires_grad_()
    for x in (torch.randn(33, 30), torch.rand(33, 30), -torch.rand(33, 30), _ties(33, 30)):
        x.requires_grad_()
        y = sparse_mam(x, case.values, layout)
        dy = torch.randn_like(y)
        y.backward(dy)
        dx, x.grad, weight.grad = x.grad, None, None
        dense = mam(x, weight)
        dense.backward(dy)
        assert torch.equal(y, dense)
        # A dead weight's gradient to the input is zero: its products are added to dx as such.
        torch.testing.assert_close(dx, x.grad)
        case.check_gradient(weight.grad.double(), 1e-5)
        case.values.grad = None


def test_properties(way: str) -> None:
    x, weight = torch.randn(40, 70), torch.randn(9, 70)
    order = torch.randperm(70)
    assert torch.equal(mam(x, weight), mam(x[:, order], weight[:, order]))
    # All products but one are zero: it is the sum of the two winners, or of all of them.
    one_hot = torch.zeros(70, 70).fill_diagonal_(1.5)
    assert torch.equal(mam(one_hot, weight), one_hot @ weight.T)
    # A single product is both the largest and the smallest.
    assert torch.equal(mam(x[:, :1], weight[:, :1]), 2 * (x[:, :1] @ weight[:, :1].T))
    torch.testing.assert_close(mam(x, -weight), -mam(x, weight))


def test_gradcheck(way: str) -> None:
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mam, (x, weight))
    topology = topology_of(Grid.of(5, 7, 1, (1, 1)), "some", spare=1)
    values = torch.randn(topology.capacity, 1, 1, dtype=torch.float64, requires_grad=True)
    for absent in ("zero", "none"):
        assert torch.autograd.gradcheck(
            lambda x, values, absent=absent: sparse_mam(x, values, topology.layout, absent=absent),
            (x, values),
        )


@needs_numba
def test_the_same_bits_in_pieces_and_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(topology_of(Grid.of(131, 70, 1, (1, 1)), "some"), torch.float32)
    layout, results = case.topology.layout, []
    x = torch.randn(150, 70).bfloat16().float().requires_grad_()
    weight = torch.randn(131, 70).bfloat16().float().requires_grad_()
    for threads, piece in ((1, 1 << 20), (3, 1 << 20), (2, 512)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(mam_cpu, "_PIECE", piece)
        for limit in ("_SHARED_PRODUCTS", "_SHARED_SUMS"):
            monkeypatch.setattr(mam_cpu, limit, 0)
        x.grad = weight.grad = case.values.grad = None
        found = [*winners(x.detach(), weight.detach())]
        counts = torch.zeros(131, 70, dtype=torch.int32)
        count_selections(x.detach(), weight.detach(), counts)
        y = mam(x, weight) + sparse_mam(x, case.values, layout)
        y.square().sum().backward()
        assert x.grad is not None and weight.grad is not None and case.values.grad is not None
        found += [counts, y.detach(), x.grad, weight.grad, case.values.grad]
        results.append(found)
        # Half precision is copied in pieces: its products and their order are the same.
        half = mam_cpu.winners(x.detach().bfloat16(), weight.detach().bfloat16())
        assert torch.equal(half.arg_max, found[1]) and torch.equal(half.arg_min, found[2])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_any_leading_shape_and_strides(way: str) -> None:
    weight = torch.randn(66, 7).T[:, 1:].requires_grad_()  # (7, 65), not contiguous
    x = torch.randn(65, 3, 6).permute(2, 1, 0).requires_grad_()
    y = mam(x, weight)
    assert y.shape == (6, 3, 7)
    y[:, 0].sum().backward()  # the gradient of y is expanded, not dense
    own, other = (t.detach().clone().requires_grad_() for t in (x, weight))
    every = own[:, 0, None] * other
    (every.amax(2) + every.amin(2)).sum().backward()
    torch.testing.assert_close(x.grad, own.grad)
    torch.testing.assert_close(weight.grad, other.grad)
    assert mam(x.detach()[0, 0].double(), weight.double()).shape == (7,)


@pytest.mark.parametrize("batch", [0, 3])
def test_empty(way: str, batch: int) -> None:
    for n_out in (0, 4):
        x = torch.randn(batch, 5, requires_grad=True)
        weight = torch.randn(n_out, 5, requires_grad=True)
        if 0 in (batch, n_out):
            y = mam(x, weight)
            assert y.shape == (batch, n_out)
            y.sum().backward()
            assert x.grad.shape == (batch, 5) and (x.grad == 0).all()
            assert weight.grad.shape == (n_out, 5) and (weight.grad == 0).all()
    case = Case(topology_of(Grid.of(4, 5, 1, (1, 1)), "some"), torch.float32)
    y = sparse_mam(torch.ones(0, 2, 5), case.values, case.topology.layout)
    y.sum().backward()
    assert y.shape == (0, 2, 4) and (case.values.grad == 0).all()


def test_only_what_is_needed(way: str) -> None:
    x, weight = torch.randn(33, 6), torch.randn(5, 6)
    for need_x, need_weight in ((True, False), (False, True)):
        own, other = x.clone().requires_grad_(need_x), weight.clone().requires_grad_(need_weight)
        mam(own, other).sum().backward()
        assert (own.grad is None) != need_x and (other.grad is None) != need_weight
    assert not mam(x, weight).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(way: str, dtype: torch.dtype) -> None:
    x = torch.randn(34, 26, requires_grad=True)
    case = Case(topology_of(Grid.of(5, 26, 1, (1, 1)), "some"), torch.float32)
    weight = torch.randn(5, 26, requires_grad=True)
    with torch.autocast("cpu", dtype):
        dense = mam(x, weight)
        sparse = sparse_mam(x, case.values, case.topology.layout)
        assert mam(x[:3].double(), weight.double()).dtype == torch.float64
    assert dense.dtype == sparse.dtype == dtype
    check(winners(x.to(dtype), weight.to(dtype)), products(x.to(dtype), weight.to(dtype)), dtype)
    assert torch.equal(dense, winners(x.to(dtype), weight.to(dtype)).values)
    (dense.float().sum() + sparse.float().sum()).backward()
    for tensor in (x, weight, case.values):
        assert tensor.grad is not None and tensor.grad.dtype == torch.float32


def test_opcheck(way: str) -> None:
    x = torch.randn(17, 7, requires_grad=True)
    weight = torch.randn(5, 7, requires_grad=True)
    torch.library.opcheck(torch.ops.sparsegrow.mam.default, (x, weight, False, True))
    layout = topology_of(Grid.of(5, 7, 1, (1, 1)), "some", spare=0).layout
    values = torch.randn(17, 1, 1, requires_grad=True)
    for competes in (True, False):
        arguments = (x, values, *layout[:6], 5, competes)
        torch.library.opcheck(torch.ops.sparsegrow.sparse_mam.default, arguments)
    dy, tests = torch.randn(17, 5), ("test_schema", "test_faketensor")
    dense = winners(x.detach(), weight.detach())
    sparse = sparse_winners(x.detach(), values.detach(), layout)
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            torch.ops.sparsegrow.mam_backward.default,
            (dy, x.detach(), weight.detach(), *dense[1:], True, *needs),
            test_utils=tests,
        )
        torch.library.opcheck(
            torch.ops.sparsegrow.sparse_mam_backward.default,
            (dy, x.detach(), values.detach(), *layout[:6], *sparse[1:], *needs),
            test_utils=tests,
        )


@needs_numba
def test_compiled_equals_eager() -> None:
    case = Case(topology_of(Grid.of(5, 7, 1, (1, 1)), "some"), torch.float32)
    weight = torch.randn(7, 7, requires_grad=True)

    def model(x: Tensor) -> Tensor:
        return sparse_mam(mam(x, weight).relu(), case.values, case.topology.layout)

    x, results = torch.randn(6, 3, 7), []
    # What comes after the graph and its gradients are found, knows nothing of these products.
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        weight.grad = case.values.grad = None
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), weight.grad, case.values.grad])
    torch.testing.assert_close(results[0], results[1])


def test_memory_is_bounded(way: str) -> None:
    """All products of these would take 268 MB, of which the naive form holds several."""
    x = torch.randn(256, 512, requires_grad=True)
    weight = torch.randn(512, 512, requires_grad=True)
    mam(x[:33], weight).sum().backward()  # compiles
    x.grad = weight.grad = None
    with PeakMemory(torch.device("cpu")) as peak, LargestTensor() as watch:
        mam(x, weight).sum().backward()
    assert watch.largest <= 4 << 20
    if peak.bytes is not None:
        assert peak.bytes < 32 << 20, f"{peak.bytes / 2**20:.0f} MB"


def test_without_numba_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _take("pytorch", monkeypatch)
    module._say_what_is_missing.cache_clear()
    with caplog.at_level(logging.WARNING, "triton_kernels"):
        for _ in range(2):
            mam(torch.ones(2, 3), torch.ones(4, 3))
    (record,) = caplog.records
    assert "numba is not installed" in record.getMessage()


def test_wrong_inputs_are_refused() -> None:
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    layout = topology_of(Grid.of(4, 3, 1, (1, 1)), "some").layout
    values, arg = torch.ones(10, 1, 1), torch.zeros(2, 4, dtype=torch.int32)
    dy = torch.ones(2, 4)
    for match, call in {
        "x has 5 features, but the weight has 3 inputs": lambda: mam(torch.ones(2, 5), weight),
        "x has 6 features, but the weight": lambda: sparse_mam(torch.ones(2, 6), values, layout),
        r"x \(\) must be \(\.\.\., 3\)": lambda: mam(torch.ones(()), weight),
        r"x \(3,\) must be \(batch, 3\)": lambda: winners(torch.ones(3), weight),
        r"weight \(3,\) must be \(n_out, n_in\)": lambda: mam(x, weight[0]),
        "at least one input": lambda: mam(torch.ones(2, 0), torch.ones(4, 0)),
        "x is torch.float32 and the weight torch.float64": lambda: mam(x, weight.double()),
        "x is torch.int64 and": lambda: mam(x.long(), weight.long()),
        "absent is 'nothing', but must be one of zero, none": lambda: sparse_mam(
            x, values, layout, absent="nothing"
        ),
        r"values \(10, 2, 2\) must be": lambda: sparse_mam(x, torch.ones(10, 2, 2), layout),
        r"counts is torch.int64 \(4, 3\)": lambda: count_selections(x, weight, weight.long()),
        r"must be torch.int32 \(10,\)": lambda: count_sparse_selections(x, values, layout, arg),
        r"dy \(2, 3\) must be \(batch, 4\)": lambda: input_gradient(x, weight, arg, arg),
        "arg_min is torch.int64": lambda: weight_gradient(dy, x, arg, arg.long()),
        r"arg_max holds columns from 3 to 3, but must lie in \[0, 3\)": lambda: weight_gradient(
            dy, x, arg + 3, arg
        ),
        "x has 3 samples, but dy has 2": lambda: weight_gradient(dy, torch.ones(3, 3), arg, arg),
        r"out is torch.float32 \(3, 4\)": lambda: weight_gradient(dy, x, arg, arg, out=weight.T),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
