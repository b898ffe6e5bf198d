"""Scattered products on the CPU with numba: against plain scattering, and a float64 reference."""

from __future__ import annotations

import gc
import importlib.util
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from largest_tensor import LargestTensor
from sparse_case import Case, topology_of
from torch import Tensor, nn

from dst import Change, SparseLinear, Topology
from growth import Grid
from triton_kernels import (
    constants,
    costs,
    gather,
    registers,
    scatter,
    scatter_cpu,
    scattered_cpu,
    sparse_conv2d,
    sparse_linear,
    strips_cpu,
    vectors,
    waiting,
    waves,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba is not installed"
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of any size, in many pieces; NaN in the memory that they are given."""
    plain = waiting.room
    monkeypatch.setattr(waiting, "room", lambda *args: plain(*args).fill_(torch.nan))
    monkeypatch.setattr(scatter_cpu, "LEAST_ENTRIES", 0)
    monkeypatch.setattr(scatter_cpu, "_SHARED", 0)
    monkeypatch.setattr(waiting, "PIECE_BYTES", 1 << 11)


def _nan(like: Tensor) -> Tensor:
    return torch.full_like(like, torch.nan)


@pytest.mark.parametrize("alive", ["none", "one", "some", "all"])
@pytest.mark.parametrize("block", [(1, 1), (3, 2), (16, 16), (5, 40), (2, 5), (20, 3)])
def test_scatter_and_gather(block: tuple[int, int], alive: str) -> None:
    """In both orders of a weight; NaN in free slots, and in what is written to."""
    for n_out, taps, channels in ((7, 1, 10), (37, 6, 18), (32, 1, 48), (1, 9, 1)):
        grid = Grid.of(n_out, taps * channels, taps, block)
        case = Case(topology_of(grid, alive), torch.float32)
        values, index = case.values.detach(), case.topology.layout[:3]
        expected = scatter(values, *index, n_out, taps, channels)
        gradient = torch.randn(n_out, taps, channels)
        for dense in (_nan(expected), _nan(expected.mT.contiguous()).mT):
            scatter_cpu.scatter(values, *index, dense)
            assert torch.equal(dense, expected)
            dense.copy_(gradient)
            found = scatter_cpu.gather(dense, values, *index)
            assert torch.equal(found, gather(gradient, *index, len(values), grid.block))
            wanted, found, slots = found, _nan(values), index[2].long()
            piece = scatter_cpu.Piece.whole(index, n_out)
            scatter_cpu.get(found, piece, scatter_cpu.Dense.of(dense))
            assert torch.equal(found[slots], wanted[slots])


@pytest.mark.parametrize(
    ("block", "dtype", "tolerance"),
    [
        ((1, 1), torch.float32, 1e-5),
        ((16, 16), torch.float32, 1e-5),
        ((5, 40), torch.float32, 1e-5),
        ((16, 16), torch.bfloat16, 0.02),
    ],
)
@pytest.mark.parametrize("alive", ["none", "some", "all"])
def test_linear(block: tuple[int, int], dtype: torch.dtype, tolerance: float, alive: str) -> None:
    torch.manual_seed(0)
    for n_out, n_in, batch in ((70, 37, 9), (32, 64, 1), (1, 50, 3), (24, 16, 0)):
        case = Case(topology_of(Grid.of(n_out, n_in, 1, block), alive), dtype)
        layout = case.topology.layout
        for bias in (None, torch.randn(n_out, dtype=dtype, requires_grad=True)):
            case.values.grad = None
            x = torch.randn(batch, n_in, dtype=dtype, requires_grad=True)
            wide = x.detach().double()
            y = sparse_linear(x, case.values, layout, bias)
            expected = F.linear(wide, case.weight, None if bias is None else bias.detach().double())
            close = {"rtol": tolerance, "atol": 10 * tolerance}
            torch.testing.assert_close(y.double(), expected, **close)
            dy = torch.randn_like(y)
            y.backward(dy)
            torch.testing.assert_close(x.grad.double(), dy.double() @ case.weight, **close)
            case.check_gradient(dy.double().T @ wide, 10 * tolerance)


def test_one_gradient_alone() -> None:
    case = Case(topology_of(Grid.of(30, 20, 1, (4, 4)), "some"), torch.float32)
    index, values = case.topology.layout[:3], case.values.detach()
    x, dy = torch.randn(20, 6).T, torch.randn(6, 30)
    both = scattered_cpu.backward(dy, x, values, *index, True, True)
    dx, none = scattered_cpu.backward(dy, x, values, *index, True, False)
    assert torch.equal(dx, both[0]) and none.numel() == 0
    none, dvalues = scattered_cpu.backward(dy, x, values, *index, False, True)
    assert torch.equal(dvalues, both[1]) and none.numel() == 0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("block", [(1, 1), (4, 3)])
def test_conv2d(block: tuple[int, int], memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    for channels, n_out, kernel in ((5, 13, (3, 2)), (1, 4, (3, 3)), (6, 9, (1, 1))):
        taps = kernel[0] * kernel[1]
        grid = Grid.of(n_out, channels * taps, taps, block)
        case = Case(topology_of(grid, "some"), torch.float32)
        x = torch.randn(2, channels, 6, 7).to(memory_format=memory_format).requires_grad_()
        y = sparse_conv2d(x, case.values, case.topology.layout, kernel, torch.ones(n_out))
        wide = x.detach().double().requires_grad_()
        weight = case.weight.view(n_out, *kernel, channels).permute(0, 3, 1, 2).clone()
        expected = F.conv2d(wide, weight.requires_grad_()) + 1
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
        assert y.is_contiguous(memory_format=memory_format)
        dy = torch.randn_like(y)
        y.backward(dy)
        expected.backward(dy.double())
        torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-4)
        case.check_gradient(weight.grad.permute(0, 2, 3, 1).flatten(1), 1e-4)


@pytest.mark.parametrize("block", [(1, 1), (3, 2), (20, 16)])
def test_the_result_does_not_depend_on_threads(block: tuple[int, int]) -> None:
    case = Case(topology_of(Grid.of(61, 40, 1, block), "some"), torch.float32)
    index, values = case.topology.layout[:3], case.values.detach()
    other, threads = torch.randn(61, 1, 40), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            dense = _nan(other)
            scatter_cpu.scatter(values, *index, dense)
            found.append((dense, scatter_cpu.gather(other, values, *index)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][i], other[i]) for other in found[1:] for i in (0, 1))


def test_no_dense_weight_or_gradient_is_made() -> None:
    layer = SparseLinear(300, 360, density=0.1, block=(4, 4), compute="dense")
    x = torch.randn(8, 300, requires_grad=True)
    with LargestTensor() as watch:
        layer(x).sum().backward()
    assert watch.largest <= layer.values.numel()


@pytest.mark.parametrize("alive", ["one", "some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_columns_as_bits(alive: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as by their numbers, in order and not, in pieces and whole, with free slots."""
    torch.manual_seed(0)
    used = []
    for n_out, n_in in ((1, 1), (7, 15), (40, 16), (33, 61), (64, 160)):
        grid = Grid.of(n_out, n_in, 1, (1, 1))
        case = Case(topology_of(grid, alive), dtype)
        *offsets, slots = case.topology.layout[:3]
        for index in ((*offsets, slots), (*offsets, slots.flip(0)), (*offsets, slots + 3)):
            values = torch.randn(int(index[2].max()) + 2, 1, 1).to(dtype)
            x, dy = torch.randn(5, n_in).to(dtype), torch.randn(5, n_out).to(dtype)
            found = []
            for share in (0, 2):
                monkeypatch.setattr(scatter_cpu, "_CROWDED", share)
                copies = tuple(t.clone() for t in index)  # of which nothing is remembered
                y = scattered_cpu.forward(x, values, *copies, n_out)
                dx, dvalues = scattered_cpu.backward(dy, x, values, *copies, True, True)
                found.append((y, dx, dvalues))
                bits = scatter_cpu.pieces(values, copies, n_out, n_in)[0].bits
                used.append((share, dtype, bits is not None))
                if bits is not None:
                    assert bits.ordered == (index[2].tolist() == list(range(len(slots))))
            for a, b in zip(*found, strict=True):
                assert torch.equal(a, b)
            expected = scatter(values, *index, n_out, 1, n_in)[:, 0]
            torch.testing.assert_close(
                found[0][0].double(), x.double() @ expected.double().T, rtol=0.02, atol=0.1
            )
    if registers.expands():
        assert all(
            by_bits == (share == 0 and kind == torch.float32) for share, kind, by_bits in used
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_single_weights_lie_dense(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not scattered, unless in another order: the same results, then."""
    calls: list[None] = []
    plain = scatter_cpu._share
    monkeypatch.setattr(scatter_cpu, "_share", lambda *args: calls.append(plain(*args)))
    torch.manual_seed(0)
    case = Case(Topology(Grid.of(34, 50, 1, (1, 1)), torch.arange(34 * 50)), dtype)
    (*offsets, slots), values = case.topology.layout[:3], case.values.detach()
    x, dy, bias = (torch.randn(*size).to(dtype) for size in ((7, 50), (7, 34), (34,)))
    found = []
    for order in (slots, slots.flip(0)):
        held = torch.empty_like(values)
        held[order.long()] = values[slots.long()]
        y = scattered_cpu.forward(x, held, *offsets, order, 34, bias)
        dx, dvalues = scattered_cpu.backward(dy, x, held, *offsets, order, True, True)
        found.append([y, dx, dvalues[order.long()]])
        assert bool(calls) == (order is not slots)
    torch.testing.assert_close(*found)
    expected = x.double() @ case.weight.T + bias.double()
    torch.testing.assert_close(found[0][0].double(), expected, rtol=0.02, atol=0.1)
    dx, dvalues = scattered_cpu.backward(dy, x, values, *offsets, slots, False, False)
    assert dx.numel() == dvalues.numel() == 0


SHAPES = (
    *((128, 48, True), (150, 48, False), (250, 125, True), (64, 1, False), (320, 48, True)),
    *((63, 16, True), (57, 16, True), (56, 16, False), (40, 48, False), (64, 17, False)),
)
PRODUCTS = ("forward", "input_gradient", "weight_gradient")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The products that loops make, and ``put`` where a weight is scattered."""
    calls: list[str] = []

    def count(module: Any, name: str) -> None:
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: calls.append(name) or plain(*args))

    for name in PRODUCTS:
        count(strips_cpu, name)
    count(scatter_cpu, "put")
    return calls


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("block", [(1, 1), (3, 2), (5, 16), (16, 3), (16, 32)])
def test_loops_multiply_by_what_is_scattered(
    block: tuple[int, int], with_bias: bool, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the BLAS does, whole and in pieces; but only where they can, and where asked or where they
    are the faster ones. A whole weight is scattered once."""
    torch.manual_seed(0)
    for (n_out, n_in, fits), dtype in itertools.product(SHAPES, (torch.float32, torch.float64)):
        case = Case(topology_of(Grid.of(n_out, n_in, 1, block), "some"), dtype)
        can = fits and dtype == torch.float32
        layout, bias = case.topology.layout, torch.randn(n_out).to(dtype) if with_bias else None
        dy, x = torch.randn(n_out, 37).to(dtype).T, torch.randn(n_in, 37).to(dtype).T
        x.requires_grad_()
        wide = x.detach().double()
        expected = F.linear(wide, case.weight, None if bias is None else bias.double())
        for by_loops, slow in ((True, 1.0), (False, 0.0), (None, 0.0), (None, 1.0)):
            monkeypatch.setattr(waiting, "PIECE_BYTES", 1 << 20)
            ns = {"scattered_cpu linear": {1: (0.5, *4 * [0.0])}, costs.LOOPS: {1: 5 * (slow,)}}
            monkeypatch.setattr(constants, "on_cpu", lambda ns=ns: constants.OnCpu(ns, True))
            monkeypatch.setattr(scattered_cpu, "by_loops", by_loops)
            x.grad = case.values.grad = None
            called.clear()
            y = sparse_linear(x, case.values, layout, bias)
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
            y.backward(dy)
            torch.testing.assert_close(
                x.grad.double(), dy.double() @ case.weight, rtol=1e-5, atol=1e-4
            )
            case.check_gradient(dy.double().T @ wide, 1e-4)
            wanted = slow == 0 if by_loops is None else by_loops
            products = PRODUCTS if wanted and can else ()
            assert sorted(called) == sorted([*products, "put"])


@pytest.mark.parametrize("by_loops", [False, True])
@pytest.mark.parametrize("block", [(1, 1), (8, 4)])
def test_pieces_of_a_weight(
    block: tuple[int, int], by_loops: bool, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 128, 128 and 64 rows; of 64 and 40. Each gradient alone as well."""
    monkeypatch.setattr(scattered_cpu, "by_loops", by_loops)
    for n_out, n_in, high, count in ((320, 45, 128, 3), (104, 48, 64, 2)):
        monkeypatch.setattr(waiting, "PIECE_BYTES", high * 48 * 4)
        case = Case(topology_of(Grid.of(n_out, n_in, 1, block), "some"), torch.float32)
        x, dy, bias = torch.randn(9, n_in), torch.randn(9, n_out), torch.randn(n_out)
        dx, dweight = dy.double() @ case.weight, dy.double().T @ x.double()
        for need_x, need_values in ((True, True), (True, False), (False, True)):
            case.values.grad = None
            own = x.clone().requires_grad_(need_x)
            values = case.values if need_values else case.values.detach()
            called.clear()
            y = sparse_linear(own, values, case.topology.layout, bias)
            expected = x.double() @ case.weight.T + bias.double()
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
            y.backward(dy)
            if need_x:
                torch.testing.assert_close(own.grad.double(), dx, rtol=1e-5, atol=1e-4)
            if need_values:
                case.check_gradient(dweight, 1e-4)
            products = ["forward", *need_x * ["input_gradient"], *need_values * ["weight_gradient"]]
            loops = sorted(name for name in called if name != "put")
            assert loops == sorted(by_loops * count * products)
            assert called.count("put") == count * (1 + need_x)
        none = torch.empty(0, n_in, requires_grad=True)
        case.values.grad = None
        y = sparse_linear(none, case.values, case.topology.layout, bias)
        assert y.shape == (0, n_out)
        y.sum().backward()
        assert not case.values.grad.any() and none.grad.shape == none.shape


def test_another_way_in_backward_than_in_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(topology_of(Grid.of(64, 48, 1, (2, 2)), "some"), torch.float32)
    monkeypatch.setattr(waiting, "PIECE_BYTES", 1 << 20)
    for first in (True, False):
        x = torch.randn(5, 48, requires_grad=True)
        monkeypatch.setattr(scattered_cpu, "by_loops", first)
        y = sparse_linear(x, case.values, case.topology.layout)
        monkeypatch.setattr(scattered_cpu, "by_loops", not first)
        y.sum().backward()
        expected = case.weight.sum(0).expand(5, -1)
        torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_stays_out_of_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(topology_of(Grid.of(64, 46, 1, (4, 4)), "all"), torch.float32)
    monkeypatch.setattr(waiting, "PIECE_BYTES", 1 << 20)
    for by_loops in (True, False):
        monkeypatch.setattr(scattered_cpu, "by_loops", by_loops)
        case.values.grad = None
        y = sparse_linear(torch.randn(3, 46), case.values, case.topology.layout)
        y.backward(torch.full_like(y, torch.inf))
        edge = case.values.grad[torch.tensor([slot for slot, _, c in case.places() if c.stop > 44])]
        assert len(edge) == 16 and not edge[:, :, 2:].any() and not edge[:, :, :2].isfinite().any()


@pytest.mark.skipif(not registers.expands(), reason="the processor does not spread by a mask")
def test_what_lies_in_strips_is_moved_by_bits_as_by_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    for n_out, n_in, alive in itertools.product((1, 16, 37, 64), (1, 16, 33, 160), ("some", "all")):
        case = Case(topology_of(Grid.of(n_out, n_in, 1, (1, 1)), alive), torch.float32)
        *offsets, slots = case.topology.layout[:3]
        for order in (slots, slots.flip(0), slots + 3):
            values, gradient = torch.randn(len(slots) + 5, 1, 1), torch.randn(n_out, 1, n_in)
            monkeypatch.setattr(waiting, "PIECE_BYTES", 1 << 20)
            (piece,) = scatter_cpu.pieces(values, (*offsets, order), n_out, n_in)
            expected = scatter(values, *offsets, order, n_out, 1, n_in)[:, 0]
            assert piece.bits is not None
            for one in (piece, piece._replace(bits=None)):
                strips = _nan(torch.empty(strips_cpu.shape(n_out, n_in)))
                assert strips.shape[2] == vectors.WIDTH
                scatter_cpu.put(values, one, strips_cpu.dense(strips, n_out, n_in))
                assert torch.equal(_rows(strips)[:n_out, :n_in], expected)
                assert _rows(strips)[n_out:].isnan().all()
                strips = _strips(gradient[:, 0])
                found = _nan(values)
                scatter_cpu.get(found, one, strips_cpu.dense(strips, n_out, n_in))
                wanted = gather(gradient, *offsets, order, len(values), (1, 1))
                assert torch.equal(found[order.long()], wanted[order.long()])
                assert found.isnan().sum() == len(values) - len(order)


def _rows(strips: Tensor) -> Tensor:
    return strips.transpose(0, 1).flatten(1)


def _strips(dense: Tensor) -> Tensor:
    """NaN beyond the last row and column."""
    strips = _nan(torch.empty(strips_cpu.shape(*dense.shape)))
    padded = F.pad(dense, (0, -dense.shape[1] % 16, 0, -len(dense) % 64), value=torch.nan)
    return strips.copy_(padded.view(strips.shape[1], -1, 16).transpose(0, 1))


@pytest.mark.parametrize("alive", ["none", "one", "some", "all"])
@pytest.mark.parametrize("block", [(2, 3), (5, 40), (17, 1), (20, 16), (40, 5)])
def test_blocks_that_lie_in_strips(block: tuple[int, int], alive: str) -> None:
    torch.manual_seed(0)
    for n_out, n_in in ((7, 10), (37, 18), (64, 48), (130, 33)):
        case = Case(topology_of(Grid.of(n_out, n_in, 1, block), alive), torch.float32)
        values, index = case.values.detach(), case.topology.layout[:3]
        piece = scatter_cpu.Piece.whole(index, n_out)
        strips = _nan(torch.empty(strips_cpu.shape(n_out, n_in)))
        scatter_cpu.put(values, piece, strips_cpu.dense(strips, n_out, n_in))
        expected = scatter(values, *index, n_out, 1, n_in)[:, 0]
        assert torch.equal(_rows(strips)[:n_out, :n_in], expected)
        gradient = torch.randn(n_out, n_in)
        found, slots = _nan(values), index[2].long()
        scatter_cpu.get(found, piece, strips_cpu.dense(_strips(gradient), n_out, n_in))
        wanted = gather(gradient[:, None], *index, len(values), block)
        assert torch.equal(found[slots], wanted[slots])
        assert found.isnan().sum() == (len(values) - len(slots)) * block[0] * block[1]


def test_pieces_of_whole_blocks_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    for n_out, n_in, bh, size in itertools.product((1, 64, 100, 999), (1, 70), (1, 3, 48), (2, 4)):
        for most in (1, 50, 64, 300, 2000):
            monkeypatch.setattr(waiting, "PIECE_BYTES", most * n_in * size)
            rows = scatter_cpu.rows_at_once(n_out, n_in, bh, size)
            fit = waiting.PIECE_BYTES // (-(-n_in // 16) * 16 * size)
            if size == 2 or fit >= -(-n_out // 64) * 64:
                assert rows == n_out
            elif fit >= bh:
                assert rows <= fit and rows % bh == 0
                # No more of them than have to be, unless they are cut at other blocks.
                assert -(-n_out // rows) <= -(-n_out // max(bh, (fit - 191) // bh * bh))
                assert rows % 64 == 0 or fit < 192
            else:
                assert rows == bh


@pytest.mark.skipif(not registers.expands(), reason="the processor does not spread by a mask")
def test_by_bits_columns_lie_side_by_side() -> None:
    case = Case(topology_of(Grid.of(32, 48, 1, (1, 1)), "all"), torch.float32)
    piece, *_ = scatter_cpu.pieces(case.values, case.topology.layout[:3], 32, 48)
    for dense in (torch.empty(48, 1, piece.outputs).permute(2, 1, 0), torch.empty(32, 6, 8)):
        with pytest.raises(ValueError, match="do not lie side by side"):
            scatter_cpu.put(case.values, piece, scatter_cpu.Dense.of(dense))


def test_training_after_inference_mode() -> None:
    layer = SparseLinear(40, 30, density=0.5, compute="dense")
    x = torch.randn(8, 40, requires_grad=True)
    y = layer(x)
    with torch.inference_mode():
        layer(x)
        layer(x.detach())
    y.sum().backward()
    layer(x.detach()).sum().backward()
    found = layer.values.grad.clone()
    layer.values.grad = None
    for _ in range(2):
        layer(x).sum().backward()
    torch.testing.assert_close(found, layer.values.grad)


def test_the_same_values_in_layers_of_two_shapes() -> None:
    case = Case(topology_of(Grid.of(12, 10, 1, (1, 1)), "some"), torch.float32)
    layout = case.topology.layout
    x, maps = torch.randn(6, 10), torch.randn(2, 10, 3, 1)
    x, maps = x.requires_grad_(), maps.requires_grad_()
    for order in (1, -1):
        x.grad = maps.grad = None
        outputs = [
            sparse_linear(x, case.values, layout),
            sparse_conv2d(maps, case.values, layout, (1, 1)),
        ]
        for y in outputs[::order]:
            y.sum().backward()
        expected = case.weight.sum(0)
        torch.testing.assert_close(x.grad.double(), expected.expand(6, -1))
        torch.testing.assert_close(maps.grad.double(), expected[:, None, None].expand(2, -1, 3, 1))


def test_the_same_values_in_layers_whose_strips_are_as_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting, "PIECE_BYTES", 1 << 20)
    monkeypatch.setattr(scattered_cpu, "by_loops", True)
    case = Case(topology_of(Grid.of(64, 48, 1, (16, 16)), "some"), torch.float32)
    layout = case.topology.layout
    x = torch.randn(6, 48, requires_grad=True)
    y = sparse_linear(x, case.values, layout)
    sparse_linear(x, case.values, layout._replace(n_out=63))
    y.sum().backward()
    expected = case.weight.sum(0).expand(6, -1)
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_room_is_left_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = SparseLinear(64, 64, density=0.5, compute="dense").to(dtype)
        monkeypatch.setattr(waiting, "PIECE_BYTES", 1 << 11)
        layer(torch.randn(2, 64, dtype=dtype)).sum().backward()
        room = waiting._waiting.room
        assert room is None or room.nbytes <= 1 << 11


def test_a_default_device_is_not_looked_at() -> None:
    layer, x = SparseLinear(64, 48, density=0.5, compute="dense"), torch.randn(4, 64)
    blocks = SparseLinear(64, 48, density=0.5, block=(16, 16), compute="sparse")
    with torch.device("meta"):
        for one in (layer, blocks):
            y = one(x)
            assert y.device.type == "cpu"
            y.backward(torch.ones_like(y))


def test_what_is_remembered_of_a_layout_goes_with_it() -> None:
    gc.collect()
    before = len(waves.memory._known)
    x = torch.randn(4, 64, requires_grad=True)
    layers = [
        SparseLinear(64, 48, density=0.5, block=(b, b), compute=compute)
        for b in (1, 16)
        for compute in ("dense", "sparse")
    ]
    for layer in layers:
        layer(x).sum().backward()
    assert len(waves.memory._known) > before
    del layer, layers
    gc.collect()
    assert len(waves.memory._known) <= before


def test_it_follows_values_and_topology() -> None:
    """Steps of an optimizer, and a change of what is alive, beside a dense twin."""
    torch.manual_seed(0)
    layer = SparseLinear(40, 30, density=0.3, block=(2, 4), compute="dense").double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(8, 40).double()
    for step in range(4):
        if step == 2:
            dead = torch.arange(150)[~torch.isin(torch.arange(150), layer.topology.keys())]
            slots, _ = layer.topology.edit(Change(layer.topology.keys()[:7], dead[:7]))
            with torch.no_grad():
                layer.values[slots] = torch.randn(7, 2, 4).double()
        twin = nn.Linear(40, 30).double()
        twin.load_state_dict({"weight": layer.dense_weight(), "bias": layer.bias})
        for module in (layer, twin):
            module.zero_grad()
            module(x).square().sum().backward()
        torch.testing.assert_close(layer(x), twin(x))
        index = layer.topology.layout[:3]
        expected = gather(twin.weight.grad[:, None], *index, len(layer.values), (2, 4))
        torch.testing.assert_close(layer.values.grad, expected)
        optimizer.step()


def _kept() -> list[Tensor]:
    return [kept.weight for kept in waiting._waiting.weights.values()]


def test_a_weight_waits_for_its_backward_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 20 * 30 * 4
    monkeypatch.setattr(waiting, "PIECE_BYTES", 1 << 20)
    monkeypatch.setattr(waiting, "WAITING_BYTES", 2 * size)
    made: list[int] = []
    plain = scatter_cpu.put

    def counted(*args: Any) -> None:
        made.append(1)
        plain(*args)

    monkeypatch.setattr(scatter_cpu, "put", counted)
    layers = [SparseLinear(30, 20, density=0.4, compute="dense") for _ in range(3)]
    x = torch.randn(4, 30, requires_grad=True)
    outputs = [layer(x) for layer in layers]
    assert len(_kept()) == 2  # of three, the last two fit
    for y in reversed(outputs):
        y.sum().backward(retain_graph=True)
    assert len(made) == 4 and not _kept()
    outputs[0].sum().backward()
    assert len(made) == 5

    with torch.no_grad():
        layers[0](x.detach())
    layers[0](x.detach())  # no gradient of x: the weight is not needed again
    assert not _kept()
    y = layers.pop()(x)
    assert len(_kept()) == 1
    del y, outputs
    gc.collect()
    layers.clear()
    gc.collect()
    assert not _kept()


def test_what_was_kept_is_not_used_for_another_weight() -> None:
    case = Case(topology_of(Grid.of(20, 12, 1, (1, 1)), "some"), torch.float32)
    index, values = case.topology.layout[:3], case.values.detach()
    weight, lies = torch.randn(20, 12), (20, 12)
    for change in (None, values, index[1]):
        waiting.keep(weight, lies, values, index)
        if change is not None:
            change.add_(0)
        found = waiting.take(lies, values, index)
        assert found is (weight if change is None else None)
        assert waiting.take(lies, values, index) is None
    waiting.keep(weight, lies, values, index)
    assert waiting.take(lies, values, (*index[:2], index[2].clone())) is None
    waiting.keep(weight, lies, values, index)
    assert waiting.take(lies, values.clone(), index) is None
    with torch.inference_mode():
        assert waiting.take(lies, torch.ones(3, 1, 1), index) is None
    assert waiting.take((20, 1, 12), values, index) is None


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.empty(3, 1, 1)
    assert scatter_cpu.available(values, 9)
    assert not scatter_cpu.available(values.to("meta"), 9)
    monkeypatch.setattr(scatter_cpu, "LEAST_ENTRIES", 10)
    assert not scatter_cpu.available(values, 9)
    monkeypatch.setattr(scatter_cpu, "_numba", lambda: False)
    assert not scatter_cpu.available(values, 10)
