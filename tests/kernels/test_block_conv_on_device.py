"""The convolution kernels against their plain reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels import block_conv, tuning
from triton_kernels import block_conv_reference as reference
from triton_kernels.require import interpreting

# The interpreter's bfloat16 is not to be trusted.
DTYPES = [torch.float32, torch.float16] + ([] if interpreting() else [torch.bfloat16])
GEOMETRIES: list[tuple[tuple[int, int], ...]] = [
    # kernel, stride, padding, dilation
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((3, 2), (2, 1), (1, 0), (1, 2)),
    ((2, 3), (3, 2), (2, 1), (2, 1)),
    ((2, 1), (1, 3), (5, 4), (1, 1)),
]
BLOCKS = [(16, 16), (16, 32), (64, 16), (32, 128), (128, 64)]


def integers(*shape: int, seed: int, largest: int = 2) -> Tensor:
    """Whole numbers, of which every sum is exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


class Case:
    """A random weight with its input and the gradient of its output, in whole numbers.

    values: (capacity, bh, bw) in scrambled slots, NaN in the free ones; by_row and by_column:
    offsets, index and slots. geometry: kernel, stride, padding and dilation.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        geometry: tuple[tuple[int, int], ...] = GEOMETRIES[4],
        block: tuple[int, int] = (16, 16),
        n_out: int = 37,
        channels: int = 41,
        size: tuple[int, int] = (7, 6),
        batch: int = 2,
        alive: str = "some",
        dtype: torch.dtype = torch.float32,
        metadata: torch.dtype = torch.int32,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.geometry, self.block, self.n_out = geometry, block, n_out
        bh, bw = block
        n_rows, across = -(-n_out // bh), -(-channels // bw)
        mask = torch.zeros(n_rows, geometry[0][0] * geometry[0][1] * across, dtype=torch.bool)
        if alive == "all":
            mask[:] = True
        elif alive == "one":
            mask[-1, -1] = True
        elif alive == "some":
            mask = torch.rand(mask.shape, generator=generator) < 0.4
            mask[n_rows // 2] = mask.shape[1] == 1
            mask[0, -1] = True
        rows, cols = mask.nonzero(as_tuple=True)
        self.capacity = rows.numel() + 2
        slots = torch.randperm(self.capacity, generator=generator)[: rows.numel()]
        values = torch.full((self.capacity, bh, bw), torch.nan)
        for row, col, slot in zip(rows.tolist(), cols.tolist(), slots.tolist(), strict=True):
            values[slot] = integers(bh, bw, seed=seed + slot)
            values[slot, n_out - row * bh :] = 0
            values[slot, :, channels - col % across * bw :] = 0
        self.values = values.to(device, dtype)

        def compressed(counts: Tensor, index: Tensor, order: Tensor) -> list[Tensor]:
            offsets = F.pad(counts.cumsum(0), (1, 0))
            return [t.to(device, metadata) for t in (offsets, index[order], slots[order])]

        self.by_row = compressed(mask.sum(1), cols, torch.arange(rows.numel()))
        self.by_column = compressed(mask.sum(0), rows, (cols * n_rows + rows).argsort())
        self.x = self._channels_last(integers(batch, channels, *size, seed=seed + 1)).to(
            device, dtype
        )
        out = reference.output_size(self.x.shape, *geometry)
        self.dy = self._channels_last(integers(batch, n_out, *out, seed=seed + 2)).to(device, dtype)
        self.bias = integers(n_out, seed=seed + 3).to(device, dtype)

    @staticmethod
    def _channels_last(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    def forward(self, **how: Any) -> Tensor:
        return block_conv.forward(
            self.x, self.values, *self.by_row, self.n_out, *self.geometry, **how
        )

    def input_gradient(self, **how: Any) -> Tensor:
        shape = tuple(self.x.shape)
        return block_conv.input_gradient(
            self.dy, self.values, *self.by_column, shape, *self.geometry, **how
        )

    def weight_gradient(self, **how: Any) -> Tensor:
        weight = (*self.by_row, self.capacity, self.block)
        return block_conv.weight_gradient(self.x, self.dy, *weight, *self.geometry, **how)

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """y, dx and dvalues in float64, on the CPU."""
        x, dy, values = (t.double().cpu() for t in (self.x, self.dy, self.values))
        by_row = [t.cpu() for t in self.by_row]
        return (
            reference.forward(x, values, *by_row, self.n_out, *self.geometry),
            reference.input_gradient(dy, values, *by_row, tuple(x.shape), *self.geometry),
            reference.weight_gradient(x, dy, *by_row, self.capacity, self.block, *self.geometry),
        )

    def check(self) -> None:
        """All three products, to the last bit."""
        found = (self.forward(), self.input_gradient(), self.weight_gradient())
        for actual, expected in zip(found, self.expected(), strict=True):
            assert actual.dtype == self.x.dtype
            assert torch.equal(actual.cpu(), expected.to(self.x.dtype))
        for image in found[:2]:
            assert image.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_geometries(geometry: tuple[tuple[int, int], ...], device: torch.device) -> None:
    Case(device, geometry=geometry).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks(block: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Edge blocks are padded in both directions, and a layer may be smaller than one block."""
    Case(device, block=block, n_out=75, channels=90, size=(5, 4), dtype=dtype).check()


@pytest.mark.parametrize("alive", ["none", "one", "all"])
def test_how_many_are_alive(alive: str, device: torch.device) -> None:
    Case(device, alive=alive).check()


@pytest.mark.parametrize("seed", range(4))
def test_random_cases(seed: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    kernel, stride, dilation = ((draw(1, 3), draw(1, 3)) for _ in range(3))
    padding = (draw(0, 3), draw(0, 3))
    least = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    Case(
        device,
        geometry=(kernel, stride, padding, dilation),
        block=[(16, 16), (32, 16), (16, 64)][draw(0, 2)],
        n_out=draw(1, 50),
        channels=draw(1, 50),
        size=(least[0] + draw(0, 4), least[1] + draw(0, 4)),
        batch=draw(1, 4),
        seed=seed,
    ).check()


@pytest.mark.parametrize(("tile_m", "tile_k"), [(16, 16), (64, 32), (32, 128)])
def test_any_cut_into_programs(tile_m: int, tile_k: int, device: torch.device) -> None:
    """A step takes a part of a block, a block, or several; whole numbers are summed exactly."""
    case = Case(device, block=(16, 32), geometry=GEOMETRIES[3])
    product = tuning.Launch(tile_m, tile_k, 4, 2)
    with tuning.overridden(
        {
            "conv_forward": product,
            "conv_input_gradient": product,
            "conv_weight_gradient": tuning.Launch(tile_m, max(32, tile_k), 4, 2),
        }
    ):
        case.check()


def test_positions_are_split(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program has a few positions, and finds its row among many."""
    monkeypatch.setattr(block_conv, "LEAST_CHUNK", 32)
    monkeypatch.setattr(block_conv, "SEARCHED", 2)
    with tuning.overridden({"conv_weight_gradient": tuning.Launch(16, 32, 4, 2)}):
        case = Case(device, n_out=100, channels=16, geometry=GEOMETRIES[3], batch=5)
        assert torch.equal(case.weight_gradient().cpu(), case.expected()[2].float())


@pytest.mark.parametrize("relu", [False, True])
def test_bias_and_relu(relu: bool, device: torch.device) -> None:
    """Rows without a block get the bias."""
    case = Case(device)
    expected = case.expected()[0] + case.bias.double().cpu().view(-1, 1, 1)
    y = case.forward(bias=case.bias, relu=relu).cpu()
    assert torch.equal(y, (expected.relu() if relu else expected).float())


def test_relu_keeps_nan(device: torch.device) -> None:
    case = Case(device, alive="all")
    case.x[0, 0, 3, 3] = torch.nan
    assert torch.equal(case.forward(relu=True).isnan(), case.forward().isnan())
    assert case.forward().isnan().any()


def test_other_strides(device: torch.device) -> None:
    case = Case(device)
    x, dy = case.x, case.dy
    case.x, case.dy = x.contiguous(), dy.contiguous()
    case.check()
    case.x, case.dy = x[:1].expand(2, -1, -1, -1), dy[:1, :, :1, :1].expand(2, *dy.shape[1:])
    case.check()
    case.dy = dy[:1, :1].expand(2, *dy.shape[1:])
    case.values = torch.stack([case.values, case.values], dim=-1)[..., 0]
    case.check()


def test_nothing_beside_the_channels_is_read(device: torch.device) -> None:
    """What lies between two positions, or around the image, is NaN."""
    case = Case(device)
    for name in ("x", "dy"):
        image = getattr(case, name)
        wide = F.pad(image, (2, 3, 1, 2, 0, 7), value=torch.nan)
        wide = wide.contiguous(memory_format=torch.channels_last)
        setattr(case, name, wide[:, : image.shape[1], 1:-2, 2:-3])
        assert torch.equal(getattr(case, name), image)
    case.check()


def test_wide_metadata(device: torch.device) -> None:
    Case(device, metadata=torch.int64).check()


def test_an_order_made_before(device: torch.device) -> None:
    case = Case(device)
    order = block_conv.input_order(*case.by_column, 3, *case.geometry)
    case.by_column = [case.by_column[0].fill_(-1)] * 3
    assert torch.equal(case.input_gradient(order=order).cpu(), case.expected()[1].float())


def test_no_images(device: torch.device) -> None:
    Case(device, batch=0).check()


@pytest.mark.parametrize("tf32", [False, True])
def test_precision(tf32: bool, device: torch.device) -> None:
    """tf32, or half precision, would lose the low bits of these products."""
    case = Case(device, alive="one", channels=16, size=(3, 3))
    case.x = case.x * 100_001
    found = (
        case.forward(tf32=tf32),
        case.input_gradient(tf32=tf32),
        case.weight_gradient(tf32=tf32),
    )
    for actual, expected in zip(found, case.expected(), strict=True):
        if not tf32:
            assert torch.equal(actual.cpu(), expected.float())
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-2, atol=1e4)


@pytest.mark.gpu
def test_far_apart_images(device: torch.device) -> None:
    """Offsets beyond 2^31."""
    case = Case(device, dtype=torch.float16)
    for name in ("x", "dy"):
        image = getattr(case, name)
        far = torch.empty((1 << 31) + 2 * image.numel(), dtype=torch.float16, device=device)
        strides = ((1 << 31) + 16, *image.stride()[1:])
        setattr(case, name, far.as_strided(image.shape, strides).copy_(image))
    case.check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time(dtype: torch.dtype, device: torch.device) -> None:
    shape = {"n_out": 160, "channels": 160, "size": (16, 16), "batch": 64}
    case = Case(device, geometry=GEOMETRIES[3], dtype=dtype, **shape)
    case.x, case.dy = torch.randn_like(case.x), torch.randn_like(case.dy)
    runs = (case.forward, case.input_gradient, case.weight_gradient)
    once = [run() for run in runs]
    for _ in range(100):
        assert all(torch.equal(run(), first) for run, first in zip(runs, once, strict=True))
