"""Multiply-and-max/min and its gradients against plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triton_kernels import mam_gpu, mam_scatter
from triton_kernels.layout import Layout
from triton_kernels.require import interpreting

# The interpreter's bfloat16 is not to be trusted.
HALVES = [torch.float16] + ([] if interpreting() else [torch.bfloat16])
DTYPES = [torch.float32, *HALVES]
SHAPES = [(1, 1, 1), (3, 13, 18), (9, 10, 3)]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, so that a small case has several: it takes milliseconds an input."""
    if interpreting():
        monkeypatch.setattr(mam_gpu, "choose_launch", lambda n_in: mam_gpu.Launch(8, 16, 4, 2, 4))
        monkeypatch.setattr(mam_gpu, "SECOND_PASS", (16, 4))
        monkeypatch.setattr(mam_gpu, "SPARSE", (16, 4, 4))
        monkeypatch.setattr(mam_scatter, "TILE", 16)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, seed: int, largest: int = 2) -> Tensor:
    """Whole numbers, of whose products many are equal and every sum is exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def best(products: list[float]) -> int:
    """The first NaN, or the first of the largest."""
    found = 0
    for j, product in enumerate(products):
        if (math.isnan(product) and not math.isnan(products[found])) or product > products[found]:
            found = j
    return found


def oracle(x: Tensor, weight: Tensor, rounded: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Products of two narrow numbers are exact in float64, and rounded once."""
    products = (x.double().cpu()[:, None] * weight.double().cpu()).to(rounded).double()
    shape = products.shape[:2]
    rows = products.flatten(0, 1).tolist()
    high = torch.tensor([best(row) for row in rows])
    low = torch.tensor([best([-p for p in row]) for row in rows])
    flat = products.flatten(0, 1)
    values = (flat.gather(1, high[:, None]) + flat.gather(1, low[:, None])).view(shape)
    return values, high.view(shape), low.view(shape)


def check(x: Tensor, weight: Tensor, *, packed: bool = False) -> mam_gpu.Winners:
    """Winners exactly, the value to the last bit, and the counts."""
    found = mam_gpu.winners(x, weight, packed=packed)
    rounded = x.dtype if packed else torch.float32
    values, high, low = oracle(x, weight, rounded)
    assert found.values.dtype == x.dtype and found.arg_max.dtype == torch.int32
    assert torch.equal(found.arg_max.cpu(), high.int())
    assert torch.equal(found.arg_min.cpu(), low.int())
    expected = values.float().to(x.dtype)
    torch.testing.assert_close(found.values.cpu(), expected, rtol=0, atol=0, equal_nan=True)

    counts = torch.full(weight.shape, 5, dtype=torch.int32, device=x.device)
    mam_gpu.count_selections(x, weight, counts, packed=packed)
    for arg in (high, low):
        counts -= F.one_hot(arg, weight.shape[1]).sum(0).to(counts)
    assert (counts == 5).all()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n_in", "n_out"), SHAPES)
def test_winners(
    batch: int, n_in: int, n_out: int, dtype: torch.dtype, device: torch.device
) -> None:
    x, weight = normal(batch, n_in, seed=1), normal(n_out, n_in, seed=2)
    check(x.to(device, dtype), weight.to(device, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_products_the_first_wins(dtype: torch.dtype, device: torch.device) -> None:
    """Within a tile, across tiles and across shares; 0 equals -0."""
    x, weight = integers(7, 29, seed=1), integers(9, 29, seed=2)
    x[0], x[1], weight[0], weight[1] = 0, -0.0, 1, -1
    check(x.to(device, dtype), weight.to(device, dtype))


@pytest.mark.parametrize("programs", [1, 2])
def test_shares_of_the_inputs(
    programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All inputs in one program; several tiles a share and a last one of fewer."""
    monkeypatch.setattr(mam_gpu, "PROGRAMS", programs)
    for draw in (integers, normal):
        check(draw(3, 19, seed=1).to(device), draw(5, 19, seed=2).to(device))


@pytest.mark.parametrize("n_in", [40, 2060])
def test_as_it_is_launched(
    n_in: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    if n_in > 2048 and interpreting():
        pytest.skip("minutes in the interpreter")
    x, weight = integers(3, n_in, seed=1, largest=9), normal(2, n_in, seed=2)
    check(x.to(device), weight.to(device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_wins_and_infinity_counts(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = normal(7, 25, seed=1), normal(8, 25, seed=2)
    x[1, 10] = weight[2, 17] = torch.nan
    x[2, 24] = weight[3, 0] = torch.inf
    x[3, 12] = weight[4, 15] = -torch.inf
    x[4, 22], weight[5, 22] = torch.inf, 0
    x[5], weight[6] = torch.nan, -torch.inf
    check(x.to(device, dtype), weight.to(device, dtype))


def test_one_sign(device: torch.device) -> None:
    """The largest of negative products is negative, and not 0; that of -inf is -inf."""
    x, weight = normal(4, 21, seed=1).abs(), -normal(5, 21, seed=2).abs()
    found = check(x.to(device), weight.to(device))
    assert (found.values < 0).all()
    weight[:] = -torch.inf
    check(x.to(device) + 1, weight.to(device))


def test_no_product_is_approximated(device: torch.device) -> None:
    """Products that differ in the last bit of float32, far beyond that of half precision."""
    x = 1 + torch.arange(20).flip(0)[None] * 2.0**-23
    check(x.to(device), torch.ones(2, 20, device=device))
    x, weight = 1 + torch.arange(20)[None] * 2.0**-10, 1 + integers(3, 20, seed=1, largest=9) / 1024
    check(x.half().to(device), weight.half().to(device))


@pytest.mark.parametrize("dtype", HALVES)
def test_packed_products_are_rounded(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = normal(5, 30, seed=1), normal(9, 30, seed=2)
    x[1, 20] = torch.nan
    check(x.to(device, dtype), weight.to(device, dtype), packed=True)


def test_any_strides_and_pieces(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mam_gpu, "CELLS", 45)
    x, weight = integers(6, 5, seed=1).to(device).T, integers(12, 12, seed=2).to(device).T
    check(x, weight[:, ::2])
    check(x[:1].expand(5, 6), weight[::2, 6:])
    check_gradients(6, 20, 15, torch.float32, device)


def test_no_samples(device: torch.device) -> None:
    x, weight = torch.empty(0, 20, device=device), torch.ones(5, 20, device=device)
    found = mam_gpu.winners(x, weight)
    assert [t.shape for t in found] == [(0, 5)] * 3
    mam_gpu.count_selections(x, weight, torch.zeros(5, 20, dtype=torch.int32, device=device))
    dy, *args = found
    assert mam_gpu.input_gradient(dy, weight, *args).shape == (0, 20)
    assert (mam_gpu.weight_gradient(dy, x, *args) == 0).all()


def hand_scattered(
    dy: Tensor, x: Tensor, weight: Tensor, args: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    dy, x, weight = (t.double().cpu() for t in (dy, x, weight))
    dx, dweight = torch.zeros_like(x), torch.zeros_like(weight)
    for arg in args:
        for b in range(len(dy)):
            for i, a in enumerate(arg[b].tolist()):
                if a >= 0:
                    dx[b, a] += dy[b, i] * weight[i, a]
                    dweight[i, a] += dy[b, i] * x[b, a]
    return dx, dweight


def check_gradients(
    batch: int, n_in: int, n_out: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Whatever the winners were: every sum to the last bit, in both ways."""
    x, weight = normal(batch, n_in, seed=1).to(dtype), normal(n_out, n_in, seed=2).to(dtype)
    dy = (normal(batch, n_out, seed=3) * 1e-3).to(dtype)
    # Few columns, so that many terms meet, and some winners are both.
    args = [integers(batch, n_out, seed=s, largest=n_in // 8).abs().int() for s in (4, 5)]
    args[1][0] = args[0][0]
    dx, dweight = hand_scattered(dy, x, weight, (args[0], args[1]))
    x, weight, dy, *args = (t.to(device) for t in (x, weight, dy, *args))
    out = torch.ones_like(weight)
    for deterministic in (True, False):
        how = {"deterministic": deterministic}
        tolerance = {"rtol": 0, "atol": 0} if deterministic else {}
        found = mam_gpu.input_gradient(dy, weight, *args, **how)
        torch.testing.assert_close(found.cpu(), dx.to(dtype), **tolerance)
        found = mam_gpu.weight_gradient(dy, x, *args, **how)
        torch.testing.assert_close(found.cpu(), dweight.to(dtype), **tolerance)
    assert mam_gpu.weight_gradient(dy, x, *args, out=out) is out
    torch.testing.assert_close(out.cpu(), (1 + dweight).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n_in", "n_out"), [(1, 1, 1), (5, 24, 7), (9, 17, 18)])
def test_gradients(
    batch: int, n_in: int, n_out: int, dtype: torch.dtype, device: torch.device
) -> None:
    check_gradients(batch, n_in, n_out, dtype, device)


def test_gradients_of_any_magnitude(device: torch.device) -> None:
    """Terms 2^200 apart, overflow, and what is infinite or NaN where it belongs."""
    magnitudes = torch.tensor([2.0**-60, 1.0, 2.0**20, 0.0, 2.0**70, 2.0**-126])
    x = normal(4, 6, seed=1) * magnitudes
    weight, dy = normal(6, 6, seed=2) * magnitudes, normal(4, 6, seed=3) * magnitudes
    dy[1, 2], x[2, 4], weight[3, 3] = torch.inf, torch.nan, -torch.inf
    args = [integers(4, 6, seed=s, largest=5).abs().int() for s in (4, 5)]
    expected = hand_scattered(dy, x, weight, (args[0], args[1]))
    x, weight, dy, *args = (t.to(device) for t in (x, weight, dy, *args))
    dx = mam_gpu.input_gradient(dy, weight, *args)
    dweight = mam_gpu.weight_gradient(dy, x, *args)
    for found, wanted in zip((dx, dweight), expected, strict=True):
        torch.testing.assert_close(
            found.cpu(), wanted.float(), rtol=2e-7, atol=2.0**-148, equal_nan=True
        )
        assert not found.isfinite().all()


class SparseCase:
    """A random weight of single weights, in scrambled slots with NaN in the free ones: layout and
    values; rows: of each row, {column: (position, value)}."""

    def __init__(
        self, n_out: int, n_in: int, density: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(n_out)
        mask = torch.rand(n_out, n_in, generator=generator) < density
        if 0 < density < 1 and n_out > 3:
            mask[1], mask[2], mask[3, 0] = False, True, False
        rows, cols = mask.nonzero(as_tuple=True)
        alive = len(rows)
        slots = torch.randperm(alive + 3, generator=generator)[:alive]
        drawn = integers(alive, seed=1)
        self.values = torch.full((alive + 3, 1, 1), torch.nan)
        self.values[slots, 0, 0] = drawn
        self.values = self.values.to(device, dtype)
        self.weight = torch.zeros(n_out, n_in)
        self.weight[rows, cols] = drawn
        self.slots, self.columns = slots, cols
        self.rows: list[dict[int, int]] = [{} for _ in range(n_out)]
        for k in range(alive):
            self.rows[rows[k]][int(cols[k])] = k
        order = (cols * n_out + rows).argsort()
        by_row = (F.pad(mask.sum(1).cumsum(0), (1, 0)), cols, slots)
        by_column = (F.pad(mask.sum(0).cumsum(0), (1, 0)), rows[order], slots[order])
        metadata = [t.int().to(device) for t in (*by_row, *by_column)]
        self.layout = Layout(*metadata, n_out=n_out, taps=1, channels=n_in)

    def check(self, x: Tensor, absent: str) -> mam_gpu.Winners:
        n_in = self.weight.shape[1]
        found = mam_gpu.sparse_winners(x, self.values, self.layout, absent=absent)
        counts = torch.zeros(len(self.values), dtype=torch.int32, device=x.device)
        mam_gpu.count_sparse_selections(x, self.values, self.layout, counts, absent=absent)
        high_found, low_found = found.arg_max.tolist(), found.arg_min.tolist()
        products = (x.double().cpu()[:, None] * self.weight.double()).float().tolist()
        values, counted = torch.zeros(found.values.shape), torch.zeros_like(counts).cpu()
        for i, row in enumerate(self.rows):
            competing = [j for j in range(n_in) if absent == "zero" or j in row]
            for b in range(len(x)):
                mine = [products[b][i][j] if j in row else 0.0 for j in competing]
                if not mine:
                    assert high_found[b][i] == low_found[b][i] == -1
                    continue
                high, low = best(mine), best([-p for p in mine])
                values[b, i] = mine[high] + mine[low]
                for arg, winner in ((high_found, high), (low_found, low)):
                    k = row.get(competing[winner], -1)
                    assert arg[b][i] == k
                    if k >= 0:
                        counted[self.slots[k]] += 1
        assert found.values.dtype == x.dtype
        torch.testing.assert_close(
            found.values.cpu(), values.to(x.dtype), rtol=0, atol=0, equal_nan=True
        )
        assert torch.equal(counts.cpu(), counted)
        return found


@pytest.mark.parametrize("absent", ["zero", "none"])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_winners(
    dtype: torch.dtype, density: float, absent: str, device: torch.device
) -> None:
    case = SparseCase(6, 14, density, dtype, device)
    case.check(integers(5, 14, seed=5).to(device, dtype), absent)
    case = SparseCase(1, 1, density, dtype, device)
    case.check(integers(1, 1, seed=5).to(device, dtype), absent)


@pytest.mark.parametrize("absent", ["zero", "none"])
def test_sparse_nan_and_infinity(absent: str, device: torch.device) -> None:
    """NaN in an input counts where its weight is alive alone."""
    case = SparseCase(7, 20, 0.5, torch.float32, device)
    x = normal(20, 20, seed=1)
    x[1, 4], x[2, 5], x[3], x[4] = torch.nan, torch.inf, torch.nan, -torch.inf
    case.check(x.to(device), absent)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [True, False])
def test_sparse_gradients(deterministic: bool, dtype: torch.dtype, device: torch.device) -> None:
    case = SparseCase(7, 20, 0.4, dtype, device)
    x = integers(9, 20, seed=1).to(device, dtype)
    _, *args = case.check(x[:4], "zero")
    assert any((arg < 0).any() for arg in args)
    _, *args = mam_gpu.sparse_winners(x, case.values, case.layout)
    dy = integers(9, 7, seed=2, largest=3).to(device, dtype)
    columns = [torch.where(a < 0, -1, F.pad(case.columns, (0, 1))[a.cpu().long()]) for a in args]
    dx, dweight = hand_scattered(dy, x, case.weight, (columns[0], columns[1]))

    how = {"deterministic": deterministic}
    found = mam_gpu.sparse_input_gradient(dy, case.values, case.layout, *args, **how)
    assert torch.equal(found.cpu(), dx.to(dtype))
    capacity = len(case.values)
    found = mam_gpu.sparse_weight_gradient(dy, x, case.layout, *args, capacity, **how)
    expected = torch.zeros(capacity, 1, 1, dtype=torch.float64)
    for i, row in enumerate(case.rows):
        for column, k in row.items():
            expected[case.slots[k]] = dweight[i, column]
    assert torch.equal(found.cpu(), expected.to(dtype))


def test_sparse_without_weights_or_samples(device: torch.device) -> None:
    for density, batch in ((0.0, 4), (0.5, 0)):
        case = SparseCase(5, 8, density, torch.float32, device)
        x, dy = torch.ones(batch, 8, device=device), torch.ones(batch, 5, device=device)
        _, *args = case.check(x, "zero")
        assert (mam_gpu.sparse_input_gradient(dy, case.values, case.layout, *args) == 0).all()
        capacity = len(case.values)
        grad = mam_gpu.sparse_weight_gradient(dy, x, case.layout, *args, capacity)
        assert grad.shape == (capacity, 1, 1) and (grad == 0).all()


def test_wrong_shapes_are_refused(device: torch.device) -> None:
    x, weight = torch.ones(4, 6, device=device), torch.ones(5, 6, device=device)
    found = mam_gpu.winners(x, weight)
    counts = torch.zeros(5, 7, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"counts must be int32 \(5, 6\), contiguous"):
        mam_gpu.count_selections(x, weight, counts)
    with pytest.raises(ValueError, match=r"dy \(4, 6\) must be \(batch, 5\)"):
        mam_gpu.input_gradient(x, weight, *found[1:])
    with pytest.raises(ValueError, match=r"winners must be int32 \(4, 5\), like dy, not .*int64"):
        mam_gpu.input_gradient(found.values, weight, found.arg_max.long(), found.arg_min)
    with pytest.raises(ValueError, match=r"out \(5, 5\) must be \(5, 6\)"):
        mam_gpu.weight_gradient(*found[:1], x, *found[1:], out=weight[:, :5])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(500, 900, device=device).to(dtype)
    weight = torch.randn(700, 900, device=device).to(dtype)
    dy = torch.randn(500, 700, device=device).to(dtype)

    def run() -> tuple[Tensor, ...]:
        values, *args = mam_gpu.winners(x, weight)
        counts = torch.zeros(700, 900, dtype=torch.int32, device=device)
        mam_gpu.count_selections(x, weight, counts)
        gradients = (
            mam_gpu.input_gradient(dy, weight, *args),
            mam_gpu.weight_gradient(dy, x, *args),
        )
        return (values, *args, counts, *gradients)

    once = run()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(run(), once, strict=True))


@pytest.mark.gpu
def test_large(device: torch.device) -> None:
    """Against PyTorch's own reductions, on a size at which programs run side by side."""
    x, weight = torch.randn(300, 2100, device=device), torch.randn(500, 2100, device=device)
    found = mam_gpu.winners(x, weight)
    products = x[:, None] * weight
    high, low = products.max(2), products.min(2)
    assert torch.equal(found.values, high.values + low.values)
    assert torch.equal(found.arg_max, high.indices.int())
    assert torch.equal(found.arg_min, low.indices.int())
