"""The unstructured kernels against dense products in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels import csr_gpu
from triton_kernels.require import interpreting

# The interpreter's bfloat16 is not to be trusted.
DTYPES = [torch.float32, torch.float16] + ([] if interpreting() else [torch.bfloat16])


def integers(*shape: int, seed: int, largest: int = 3) -> Tensor:
    """Whole numbers, of which every sum is exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


class Case:
    """A random weight: values (capacity, 1, 1) in scrambled slots, NaN in the free ones; by_row and
    by_column: offsets, index and slots; weight: (n_out, n_in), float64."""

    def __init__(
        self,
        n_out: int,
        n_in: int,
        density: float,
        dtype: torch.dtype,
        device: torch.device,
        *,
        seed: int = 0,
        metadata: torch.dtype = torch.int32,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(n_out, n_in, generator=generator) < density
        if 0 < density < 1:
            mask[n_out // 2] = False
            mask[:, n_in // 3] = False
        self.rows, self.cols = mask.nonzero(as_tuple=True)
        alive = self.rows.numel()
        self.capacity = alive + 3
        slots = torch.randperm(self.capacity, generator=generator)[:alive]
        self.weight = torch.zeros(n_out, n_in, dtype=torch.float64)
        values = torch.full((self.capacity, 1, 1), torch.nan)
        drawn = integers(alive, seed=seed + 1)
        for entry in range(alive):
            values[slots[entry]] = drawn[entry]
            self.weight[self.rows[entry], self.cols[entry]] = drawn[entry]
        self.values, self.slots = values.to(device, dtype), slots

        def compressed(counts: Tensor, index: Tensor, order: Tensor) -> list[Tensor]:
            offsets = F.pad(counts.cumsum(0), (1, 0))
            return [t.to(device, metadata) for t in (offsets, index[order], slots[order])]

        self.by_row = compressed(mask.sum(1), self.cols, torch.arange(alive))
        transposed = (self.cols * n_out + self.rows).argsort()
        self.by_column = compressed(mask.sum(0), self.rows, transposed)

    def check(self, x: Tensor, dy: Tensor) -> None:
        """All three products, to the last bit."""
        n_out, n_in = self.weight.shape
        wide_x, wide_dy = x.double().cpu(), dy.double().cpu()
        y = csr_gpu.product(x, self.values, *self.by_row, n_out)
        assert y.dtype == x.dtype and y.is_contiguous()
        assert torch.equal(y.cpu(), (wide_x @ self.weight.T).to(x.dtype))
        dx = csr_gpu.product(dy, self.values, *self.by_column, n_in)
        assert torch.equal(dx.cpu(), (wide_dy @ self.weight).to(x.dtype))
        grad = csr_gpu.weight_gradient(x, dy, *self.by_row, self.capacity)
        expected = torch.zeros(self.capacity, 1, 1, dtype=torch.float64)
        expected[self.slots, 0, 0] = (wide_dy.T @ wide_x)[self.rows, self.cols]
        assert grad.dtype == x.dtype and torch.equal(grad.cpu(), expected.to(x.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("batch", "n_in", "n_out"), [(1, 1, 1), (5, 10, 7), (16, 40, 3), (33, 19, 12), (300, 8, 9)]
)
def test_products(
    batch: int, n_in: int, n_out: int, density: float, dtype: torch.dtype, device: torch.device
) -> None:
    case = Case(n_out, n_in, density, dtype, device)
    x, dy = integers(batch, n_in, seed=5), integers(batch, n_out, seed=6)
    case.check(x.to(device, dtype), dy.to(device, dtype))


@pytest.mark.parametrize("programs", [1, 40])
def test_rows_shared_by_programs(
    programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csr_gpu, "WEIGHT_PROGRAMS", programs)
    case = Case(4, 60, 0.7, torch.float32, device)
    case.check(integers(9, 60, seed=5).to(device), integers(9, 4, seed=6).to(device))


def test_any_strides(device: torch.device) -> None:
    case = Case(12, 20, 0.4, torch.float32, device)
    x = integers(20, 6, seed=1).to(device).T
    case.check(x, integers(12, 12, seed=2).to(device)[::2])
    case.check(x[:1].expand(6, 20), integers(6, 24, seed=2).to(device)[:, ::2])
    case.values = torch.stack([case.values, case.values], dim=-1)[..., 0]
    case.check(x, integers(6, 12, seed=3).to(device))


def test_wide_metadata(device: torch.device) -> None:
    case = Case(12, 20, 0.4, torch.float32, device, metadata=torch.int64)
    case.check(integers(6, 20, seed=1).to(device), integers(6, 12, seed=2).to(device))


def test_full_precision(device: torch.device) -> None:
    """tf32 or half precision would lose the low bits of these products."""
    case = Case(12, 20, 0.4, torch.float32, device)
    x = integers(6, 20, seed=1, largest=100_000).to(device)
    case.check(x, integers(6, 12, seed=2).to(device))


def test_half_precision_is_summed_in_float32(device: torch.device) -> None:
    """2048 + 1 - 2048 is 0 in float16."""
    case = Case(1, 3, 1.0, torch.float16, device)
    slots = case.by_row[2].long()
    case.values[slots] = 1.0
    x = torch.tensor([[2048.0, 1.0, -2048.0]], dtype=torch.float16, device=device)
    assert csr_gpu.product(x, case.values, *case.by_row, 1).item() == 1.0


def test_no_samples(device: torch.device) -> None:
    case = Case(12, 20, 0.4, torch.float32, device)
    case.check(torch.empty(0, 20, device=device), torch.empty(0, 12, device=device))


def test_wrong_shapes_are_refused(device: torch.device) -> None:
    case = Case(12, 20, 0.4, torch.float32, device)
    x, dy = torch.ones(6, 20, device=device), torch.ones(5, 12, device=device)
    with pytest.raises(ValueError, match="13 offsets do not give 11 rows: 12 do"):
        csr_gpu.product(x, case.values, *case.by_row, 11)
    with pytest.raises(ValueError, match=r"dy \(5, 12\) must be \(6, 12\)"):
        csr_gpu.weight_gradient(x, dy, *case.by_row, case.capacity)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time(dtype: torch.dtype, device: torch.device) -> None:
    case = Case(700, 900, 0.05, dtype, device)
    x = torch.randn(500, 900, device=device).to(dtype)
    dy = torch.randn(500, 700, device=device).to(dtype)

    def run() -> tuple[Tensor, Tensor]:
        return (
            csr_gpu.product(x, case.values, *case.by_row, 700),
            csr_gpu.weight_gradient(x, dy, *case.by_row, case.capacity),
        )

    once = run()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(run(), once, strict=True))
