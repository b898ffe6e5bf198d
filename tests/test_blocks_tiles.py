"""Block-sparse products on the CPU that run through registers: their edges, and their threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sparse_case import Case, topology_of
from torch import Tensor

from growth import Grid
from triton_kernels import blocks_tiles, forms, gather, waves

pytest.importorskip("numba", reason="numba is not installed")

from triton_kernels import blocks_numba, registers
from triton_kernels.blocks_gradient_numba import gradient as gradient_of

if not registers.fused():
    pytest.skip("no fused multiply-add on this processor", allow_module_level=True)


def _within(n: int, width: int) -> tuple[Tensor, Tensor]:
    """(numbers, a contiguous view (n, width) in their midst), the others NaN."""
    numbers = torch.full((n * width + 200,), torch.nan)
    view = numbers[100 : 100 + n * width].view(n, width)
    view.normal_()
    return numbers, view


def _check(block: tuple[int, int], n_out: int, n_in: int, batch: int, alive: str) -> None:
    case = Case(topology_of(Grid.of(n_out, n_in, 1, block), alive), torch.float32)
    layout, values = case.topology.layout, case.values.detach()
    (_, x), (_, dy), bias = _within(batch, n_in), _within(batch, n_out), torch.randn(n_out)
    close = {"rtol": 1e-4, "atol": 1e-4 * max(1, batch, n_in, n_out) ** 0.5}
    y = blocks_tiles.forward(x, values, *layout[:3], n_out, bias)
    expected = x.double() @ case.weight.T + bias.double()
    torch.testing.assert_close(y.double(), expected, **close)
    dx = blocks_tiles.input_gradient(dy, values, *layout[3:6], n_in)
    torch.testing.assert_close(dx.double(), dy.double() @ case.weight, **close)
    case.values.grad = blocks_tiles.weight_gradient(x, dy, *layout[:3], len(values), block)
    case.check_gradient(dy.double().T @ x.double(), close["atol"])


@pytest.mark.parametrize("alive", ["none", "one", "some", "all"])
@pytest.mark.parametrize("block", [(64, 32), (48, 16), (16, 80), (128, 64)])
def test_shapes_that_fit_nothing(block: tuple[int, int], alive: str) -> None:
    """Edge blocks both ways, on either side of the middle of a panel, and batches that end inside
    of a tile or a piece. Around x and dy lies NaN."""
    torch.manual_seed(0)
    for n_out, n_in, batch in (
        (300, 200, 7),
        (129, 97, 131),
        (5, 300, 300),
        (64, 192, 64),
        (40, 40, 0),
    ):
        _check(block, n_out, n_in, batch, alive)


@pytest.mark.parametrize("features", [{"avx2": True, "fma": True}, {}], ids=["avx2", "neon"])
def test_tiles_of_other_processors(
    features: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registers, "_features", lambda: features)
    assert registers.product_tile(64, 4) == (6, 1) and registers.gradient_tile(64, 4) == (4, 1)
    _check((32, 64), 70, 150, 140, "some")


@pytest.mark.parametrize("features", [{"avx512f": True}, {"avx2": True}, {}])
@pytest.mark.parametrize("itemsize", [4, 8])
def test_tiles_divide_blocks(
    features: dict[str, bool], itemsize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registers, "_features", lambda: features)
    for width in range(16, 272, 16):
        (rows, vectors), (outputs, inputs) = (
            tile(width, itemsize) for tile in (registers.product_tile, registers.gradient_tile)
        )
        assert rows > 0 and 16 % outputs == 0
        assert width % (16 * vectors) == 0 and width % (16 * inputs) == 0


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_is_written_beside_the_result(packed: bool) -> None:
    n_out, n_in, batch, block = 70, 37, 9, (32, 32)
    case = Case(topology_of(Grid.of(n_out, n_in, 1, block), "all"), torch.float32)
    layout, values = case.topology.layout, case.values.detach()
    numbers, out = _within(batch, n_out)
    x = torch.randn(batch, n_in)
    offsets, index, slots = (t.long().numpy() for t in layout[:3])
    tile = (16, 1) if packed else registers.product_tile(32, 4)
    size = 16 * tile[0] * tile[1] + packed * blocks_numba.ROWS * n_in + 2 * 32 * 32
    rooms = np.full((2, size), np.nan, np.float32)
    blocks_numba.product(*tile, packed)(
        *(x.view(-1).numpy(), values.view(-1).numpy(), True, offsets, index, slots),
        *(np.zeros(96, np.float32), out.view(-1).numpy(), rooms, np.array([0, 3])),
        *((batch, n_in, n_out, 32, 32), 0, 1),
    )
    assert np.isnan(rooms[1]).all()
    torch.testing.assert_close(out.double(), x.double() @ case.weight.T, rtol=1e-4, atol=1e-4)
    assert numbers[:100].isnan().all() and numbers[-100:].isnan().all()


@pytest.mark.parametrize("side", [16, 32])
def test_the_result_does_not_depend_on_threads(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_tiles, "_SHARED", 1)
    torch.manual_seed(0)
    case = Case(topology_of(Grid.of(300, 200, 1, (side, side)), "some"), torch.float32)
    layout, values = case.topology.layout, case.values.detach()
    x, dy = torch.randn(150, 200), torch.randn(150, 300)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 7, 64):
            torch.set_num_threads(number)
            y = blocks_tiles.forward(x, values, *layout[:3], 300)
            dx = blocks_tiles.input_gradient(dy, values, *layout[3:6], 200)
            gradient = blocks_tiles.weight_gradient(x, dy, *layout[:3], len(values), (side, side))
            found.append((y, dx, gradient))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    torch.testing.assert_close(
        found[0][0].double(), x.double() @ case.weight.T, rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_in", [90, 9])
def test_narrow_blocks_of_many_rows(
    n_in: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is copied of them is copied in pieces; more threads than those that share it go without
    a copy, and so do blocks that hardly read it. All is exactly the same."""
    torch.manual_seed(0)
    monkeypatch.setattr(registers, "_features", lambda: {"avx512f": True})
    monkeypatch.setattr(blocks_tiles, "_SHARED", 1)
    case = Case(topology_of(Grid.of(150, n_in, 1, (32, 16)), "some"), dtype)
    layout, values, weight = case.topology.layout, case.values.detach(), case.weight
    x, dy = torch.randn(333, n_in, dtype=dtype), torch.randn(333, 150, dtype=dtype)
    used, threads = [], torch.get_num_threads()
    found = []
    run = blocks_tiles._run
    monkeypatch.setattr(
        blocks_tiles, "_run", lambda kernel, *args: used.append(kernel) or run(kernel, *args)
    )
    for piece, number, read in ((1 << 20, 1, 0.1), (4 * n_in * 100, 2, 0.1), (1, 40, 1e9)):
        monkeypatch.setattr(blocks_tiles, "PIECE_BYTES", piece)
        monkeypatch.setattr(blocks_tiles, "_READ", read)
        waves.memory._known.clear()
        try:
            torch.set_num_threads(number)
            dx = blocks_tiles.input_gradient(dy, values, *layout[3:6], n_in)
            gradient = blocks_tiles.weight_gradient(x, dy, *layout[:3], len(values), (32, 16))
        finally:
            torch.set_num_threads(threads)
        found.append((dx, gradient))
    in_strips, packed = gradient_of(16, 1, True), blocks_numba.product(16, 1, True)
    plain = blocks_numba.product(8, 1, False), gradient_of(16, 1, False)
    assert used == [packed, in_strips, packed, *[in_strips] * 4, *plain]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    error = 1e-2 if dtype == torch.bfloat16 else 1e-5
    close = {"rtol": error, "atol": 10 * error}
    torch.testing.assert_close(found[0][0].double(), dy.double() @ weight.double(), **close)
    expected = gather((dy.double().T @ x.double())[:, None], *layout[:3], len(values), (32, 16))
    torch.testing.assert_close(found[0][1].double(), expected, **close)


def test_activations_that_lie_anyhow() -> None:
    torch.manual_seed(0)
    case = Case(topology_of(Grid.of(96, 64, 1, (32, 16)), "some"), torch.float32)
    layout, values, weight = case.topology.layout, case.values.detach(), case.weight.float()
    for x, dy in (
        (torch.randn(1, 128)[:, ::2], torch.randn(1, 192)[:, ::2]),
        (torch.randn(1, 1).expand(7, 64), torch.randn(1, 1).expand(7, 96)),
        (torch.randn(64, 5).T, torch.randn(96, 5).T),
        (torch.randn(5, 65)[:, 1:], torch.randn(5, 97)[:, 1:]),
    ):
        y = blocks_tiles.forward(x, values, *layout[:3], 96)
        torch.testing.assert_close(y, x @ weight.T)
        dx = blocks_tiles.input_gradient(dy, values, *layout[3:6], 64)
        torch.testing.assert_close(dx, dy @ weight)
        found = blocks_tiles.weight_gradient(x, dy, *layout[:3], len(values), (32, 16))
        expected = gather((dy.T @ x)[:, None].contiguous(), *layout[:3], len(values), (32, 16))
        torch.testing.assert_close(found, expected)


def test_work_for_many_batches_is_not_all_kept() -> None:
    case = Case(topology_of(Grid.of(32, 32, 1, (16, 16)), "some"), torch.float32)
    index = case.topology.layout[:3]
    for batch in range(1, 40):
        blocks_tiles.forward(torch.randn(batch, 32), case.values.detach(), *index, 32)
    _, kept = waves.memory._known[index[0]]
    (work,) = (one for key, one in kept.items() if key[0] == "work")
    assert work.plan.cache_info().currsize <= 8


def test_which_blocks_they_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(0)
    assert forms.linear_form(x, (16, 48)) is forms.BLOCKS_TILES
    assert forms.linear_form(x.bfloat16(), (128, 16)) is forms.BLOCKS_TILES
    assert forms.linear_form(x, (16, 8)) is not forms.BLOCKS_TILES
    assert not blocks_tiles.available(x.to(torch.complex64), (16, 16))
    assert not blocks_tiles.available(torch.empty(0, device="meta"), (16, 16))
    monkeypatch.setattr(registers, "machine", lambda: "x86_64")
    monkeypatch.setattr(registers, "_features", lambda: {"avx2": True})
    assert not registers.fused()
    monkeypatch.setattr(registers, "machine", lambda: "aarch64")
    assert registers.fused()
