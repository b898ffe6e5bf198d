"""The block-sparse products against a dense product in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from triton_kernels import block_sparse, tuning
from triton_kernels.layout import Layout
from triton_kernels.require import interpreting
from triton_kernels.tuning import Launch

# The interpreter's bfloat16 is not to be trusted.
DTYPES = [torch.float32, torch.float16] + ([] if interpreting() else [torch.bfloat16])
# (n_out, n_in, batch, share of alive blocks)
SHAPES = [(70, 90, 5, 0.5), (128, 128, 33, 1.0), (37, 200, 17, 0.1), (200, 37, 1, 0.3)]
BLOCKS = [(16, 16), (32, 32), (64, 64), (128, 128), (16, 64), (64, 16), (128, 16), (32, 128)]
# More than one program and step of every kind, whatever the block.
SMALL = {
    "forward": Launch(16, 32, 4, 2),
    "input_gradient": Launch(16, 32, 4, 2),
    "weight_gradient": Launch(16, 128, 4, 2),
}


class Case(NamedTuple):
    """weight: the dense float64 (n_out, n_in). alive: bool, by element of it."""

    layout: Layout
    values: Tensor
    weight: Tensor
    alive: Tensor


def integers(*shape: int, seed: int = 0, largest: int = 3) -> Tensor:
    """Whole numbers, of which every sum is exact: the result is known to the last bit."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).double()


def topology(n_rows: int, n_cols: int, share: float, seed: int) -> Tensor:
    """Which blocks are alive: bool (n_rows, n_cols). With more than one row and column, the first
    row and the last column are empty, unless all blocks are alive."""
    alive = torch.rand(n_rows, n_cols, generator=torch.Generator().manual_seed(seed)) < share
    if share < 1:
        alive[0, :] &= n_rows == 1
        alive[:, -1] &= n_cols == 1
    return alive


def case(
    n_out: int,
    n_in: int,
    block: tuple[int, int],
    alive: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    free: int = 3,
    seed: int = 7,
) -> Case:
    """Blocks in shuffled slots, NaN in the free ones."""
    (bh, bw), (n_rows, n_cols) = block, alive.shape
    weight = integers(n_out, n_in, seed=seed)
    elements = alive.repeat_interleave(bh, 0).repeat_interleave(bw, 1)[:n_out, :n_in]
    weight *= elements
    padded = torch.zeros(n_rows * bh, n_cols * bw, dtype=torch.float64)
    padded[:n_out, :n_in] = weight

    at = [(row, col) for row in range(n_rows) for col in range(n_cols) if alive[row, col]]
    order = torch.randperm(len(at) + free, generator=torch.Generator().manual_seed(seed)).tolist()
    slot = dict(zip(at, order, strict=False))
    values = torch.full((len(at) + free, bh, bw), torch.nan, dtype=torch.float64)
    for (row, col), place in slot.items():
        values[place] = padded[row * bh : (row + 1) * bh, col * bw : (col + 1) * bw]
    transposed = sorted(at, key=lambda entry: entry[::-1])

    def ints(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    layout = Layout(
        row_offsets=ints([sum(row < r for row, _ in at) for r in range(n_rows + 1)]),
        cols=ints([col for _, col in at]),
        slots=ints([slot[entry] for entry in at]),
        col_offsets=ints([sum(col < c for _, col in at) for c in range(n_cols + 1)]),
        rows_t=ints([row for row, _ in transposed]),
        slots_t=ints([slot[entry] for entry in transposed]),
        n_out=n_out,
        taps=1,
        channels=n_in,
    )
    return Case(layout, values.to(device, dtype), weight.to(device), elements.to(device))


def random_case(
    n_out: int,
    n_in: int,
    share: float,
    block: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 7,
) -> Case:
    alive = topology(-(-n_out // block[0]), -(-n_in // block[1]), share, seed)
    return case(n_out, n_in, block, alive, dtype, device, seed=seed)


def as_values(dense: Tensor, example: Case) -> Tensor:
    """What the weight gradient is to be: the dense one at the alive blocks, zero elsewhere."""
    layout, (capacity, bh, bw) = example.layout, example.values.shape
    rows, cols = layout.row_offsets.tolist(), layout.cols.tolist()
    padded = torch.nn.functional.pad(dense, (0, bw, 0, bh))
    values = dense.new_zeros(capacity, bh, bw)
    for row in range(len(rows) - 1):
        for entry in range(rows[row], rows[row + 1]):
            values[int(layout.slots[entry])] = padded[
                row * bh : (row + 1) * bh, cols[entry] * bw : (cols[entry] + 1) * bw
            ]
    return values


def check(example: Case, x: Tensor, dy: Tensor, bias: Tensor | None = None) -> None:
    """All three products of float64 whole numbers, to the last bit."""
    layout, values, weight, alive = example
    dtype, block = values.dtype, (values.shape[1], values.shape[2])
    x, dy = x.to(values.device), dy.to(values.device)
    y = block_sparse.forward(x.to(dtype), values, *layout[:3], layout.n_out, bias)
    expected = x @ weight.T + (0 if bias is None else bias.double())
    assert y.dtype == dtype and y.is_contiguous()
    assert torch.equal(y, expected.to(dtype))

    dx = block_sparse.input_gradient(dy.to(dtype), values, *layout[3:6], layout.n_in)
    assert dx.dtype == dtype and dx.is_contiguous()
    assert torch.equal(dx, (dy @ weight).to(dtype))

    gradient = block_sparse.weight_gradient(
        x.to(dtype), dy.to(dtype), *layout[:3], values.shape[0], block
    )
    assert gradient.dtype == dtype and gradient.is_contiguous()
    assert torch.equal(gradient, as_values(dy.T @ x * alive, example).to(dtype))


@pytest.mark.parametrize(
    ("block", "dtype"),
    # The interpreter is slow, and knows no difference between the dtypes.
    [(block, torch.float32) for block in BLOCKS] + [((16, 32), torch.float16)]
    if interpreting()
    else [(block, dtype) for block in BLOCKS for dtype in DTYPES],
)
def test_every_block(block: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Ragged sides and batch, edge blocks, an empty row and column, free slots."""
    for seed, (n_out, n_in, batch, share) in enumerate(SHAPES):
        example = random_case(n_out, n_in, share, block, dtype, device, seed)
        x, dy = integers(batch, n_in, seed=1), integers(batch, n_out, seed=2)
        bias = integers(n_out, seed=3).to(device, dtype)
        check(example, x, dy, bias if seed % 2 else None)


@pytest.mark.parametrize("block", [(16, 16), (64, 32), (128, 128)])
def test_several_programs_and_steps(block: tuple[int, int], device: torch.device) -> None:
    n_out, n_in = 3 * block[0] - 5, 5 * block[1] + 3
    example = random_case(n_out, n_in, 0.6, block, torch.float32, device)
    with tuning.overridden(SMALL):
        check(example, integers(35, n_in, seed=1), integers(35, n_out, seed=2))


def test_one_block_and_none(device: torch.device) -> None:
    alive = torch.zeros(3, 4, dtype=torch.bool)
    x, dy = integers(20, 60, seed=1), integers(20, 40, seed=2)
    bias = integers(40, seed=3).to(device)
    for _ in range(2):
        example = case(40, 60, (16, 16), alive, torch.float32, device, free=1)
        check(example, x, dy, bias.float())
        alive[2, 3] = True


def test_every_slot_is_used(device: torch.device) -> None:
    """Then the gradient's memory is not cleared first."""
    for share in (0.4, 1.0):
        alive = topology(4, 6, share, 5)
        example = case(60, 90, (16, 16), alive, torch.float32, device, free=0)
        check(example, integers(9, 90, seed=1), integers(9, 60, seed=2))


def test_no_samples(device: torch.device) -> None:
    example = random_case(40, 60, 0.5, (16, 16), torch.float32, device)
    check(example, integers(0, 60), integers(0, 40))


def test_random_numbers(device: torch.device) -> None:
    """Sums that round, up to what their length allows; float32 is not cut to tf32."""
    example = random_case(80, 150, 0.5, (32, 32), torch.float32, device)
    layout, values, weight, alive = example
    generator = torch.Generator().manual_seed(5)
    scale = 1 + torch.rand(values.shape, generator=generator).to(values) / 3
    values = values * scale
    weight = as_weight(values, example)
    x, dy = (torch.randn(45, n, generator=generator).to(device) for n in (150, 80))
    close = {"rtol": 1e-5, "atol": 1e-4}
    y = block_sparse.forward(x, values, *layout[:3], 80)
    torch.testing.assert_close(y.double(), x.double() @ weight.T, **close)
    dx = block_sparse.input_gradient(dy, values, *layout[3:6], 150)
    torch.testing.assert_close(dx.double(), dy.double() @ weight, **close)
    gradient = block_sparse.weight_gradient(x, dy, *layout[:3], values.shape[0], (32, 32))
    expected = as_values(dy.double().T @ x.double() * alive, example)
    torch.testing.assert_close(gradient.double(), expected, **close)


def as_weight(values: Tensor, example: Case) -> Tensor:
    """The dense weight in float64, of other values in the same layout."""
    layout, (_, bh, bw) = example.layout, values.shape
    offsets, cols = layout.row_offsets.tolist(), layout.cols.tolist()
    padded = torch.zeros(layout.n_out + bh, layout.n_in + bw, dtype=torch.float64)
    for row in range(len(offsets) - 1):
        for entry in range(offsets[row], offsets[row + 1]):
            padded[row * bh : (row + 1) * bh, cols[entry] * bw : (cols[entry] + 1) * bw] = values[
                int(layout.slots[entry])
            ].double()
    return padded[: layout.n_out, : layout.n_in].to(values.device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_and_bias(dtype: torch.dtype, device: torch.device) -> None:
    """Empty rows write the bias too, and NaN is not made 0."""
    example = random_case(70, 90, 0.4, (16, 16), dtype, device)
    layout, values, weight, _ = example
    assert layout.row_offsets[1] == 0
    x = integers(6, 90, seed=1).to(device)
    bias = integers(70, seed=2).to(device)
    for wide in (dtype, torch.float32):
        y = block_sparse.forward(
            x.to(dtype), values, *layout[:3], 70, bias.to(wide), relu=True, order=None
        )
        assert torch.equal(y, (x @ weight.T + bias).relu().to(dtype))
    bias[3] = torch.nan
    y = block_sparse.forward(x.to(dtype), values, *layout[:3], 70, bias.to(dtype), relu=True)
    assert y[:, 3].isnan().all() and not y[:, 4:].isnan().any()


def test_order_of_rows(device: torch.device) -> None:
    """Any permutation gives the same; the one that is offered puts the longest first."""
    example = random_case(150, 90, 0.4, (16, 16), torch.float32, device)
    layout, values, *_ = example
    x, dy = integers(9, 90, seed=1).to(device).float(), integers(9, 150, seed=2).to(device).float()
    order = block_sparse.longest_first(layout.row_offsets)
    lengths = layout.row_offsets.diff()[order.long()].tolist()
    assert lengths == sorted(lengths, reverse=True) and order.dtype == torch.int32
    y = block_sparse.forward(x, values, *layout[:3], 150)
    assert torch.equal(y, block_sparse.forward(x, values, *layout[:3], 150, order=order))
    order = block_sparse.longest_first(layout.col_offsets)
    dx = block_sparse.input_gradient(dy, values, *layout[3:6], 90)
    assert torch.equal(dx, block_sparse.input_gradient(dy, values, *layout[3:6], 90, order=order))


@pytest.mark.parametrize("shares", [2, 3, 7])
def test_shares_of_the_batch(shares: int, device: torch.device) -> None:
    """The last ones may be short, or empty. Their sums are not rounded to half precision."""
    example = random_case(70, 90, 0.5, (16, 16), torch.float16, device)
    layout, values, _, alive = example
    x, dy = (integers(75, n, seed=1, largest=24).abs().to(device) for n in (90, 70))
    with tuning.overridden(SMALL):
        gradient = block_sparse.weight_gradient(
            x.half(), dy.half(), *layout[:3], values.shape[0], (16, 16), shares=shares
        )
    expected = as_values(dy.T @ x * alive, example)
    assert expected.max() > 4096
    assert torch.equal(gradient, expected.half())


def test_strides(device: torch.device) -> None:
    """Rows apart, columns apart, one row for all: none is read as if it were dense."""
    example = random_case(70, 90, 0.5, (16, 16), torch.float32, device)
    layout, values, weight, alive = example
    wide = integers(40, 180, seed=1).to(device).float()
    dys = [integers(20, 70, seed=2).to(device).float(), torch.ones(1, 1, device=device)]
    for x in (wide[::2, 5:95], wide[:20, ::2], wide[:90, :20].T[:, :40].repeat(1, 3)[:, :90]):
        for dy in dys:
            dy = dy.expand(20, 70)
            y = block_sparse.forward(x, values, *layout[:3], 70)
            assert torch.equal(y, (x.double() @ weight.T).float())
            dx = block_sparse.input_gradient(dy, values, *layout[3:6], 90)
            assert torch.equal(dx, (dy.double() @ weight).float())
            gradient = block_sparse.weight_gradient(x, dy, *layout[:3], values.shape[0], (16, 16))
            expected = as_values(dy.double().T @ x.double() * alive, example)
            assert torch.equal(gradient, expected.float())


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
def test_infinity_stays_in_its_own_sample(device: torch.device) -> None:
    """Nothing beyond the edges or in another sample is multiplied, not even by zero."""
    example = random_case(70, 90, 0.5, (32, 32), torch.float32, device)
    layout, values, weight, _ = example
    x = torch.full((22, 95), torch.inf, device=device)
    x[:20, :90] = integers(20, 90, seed=1).to(device)
    y = block_sparse.forward(x[:20, :90], values, *layout[:3], 70)
    assert torch.equal(y, (x[:20, :90].double() @ weight.T).float())
    dy = torch.full((22, 75), torch.inf, device=device)
    dy[:20, :70] = integers(20, 70, seed=2).to(device)
    dx = block_sparse.input_gradient(dy[:20, :70], values, *layout[3:6], 90)
    assert torch.equal(dx, (dy[:20, :70].double() @ weight).float())
    gradient = block_sparse.weight_gradient(
        x[:20, :90], dy[:20, :70], *layout[:3], values.shape[0], (32, 32)
    )
    assert gradient.isfinite().all()
    x[0] = torch.inf
    y = block_sparse.forward(x[:20, :90], values, *layout[:3], 70)
    assert torch.equal(y[1:], (x[1:20, :90].double() @ weight.T).float())


def reserved(*shape: int, device: torch.device) -> Tensor:
    """Float16 of any content. Without a GPU, memory that is taken only where it is touched."""
    if device.type == "cuda":
        return torch.empty(*shape, dtype=torch.float16, device=device)
    return torch.from_numpy(np.empty(shape, dtype=np.float16))


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """A sample more than 2^31 entries in, though its number and the stride are small; and a slot
    that far into the values."""
    example = random_case(32, 40, 1.0, (16, 16), torch.float16, device)
    layout, values, weight, alive = example
    stride = (1 << 30) + 16
    memory = reserved(2 * stride + 64, device=device)
    x, dy = (memory.as_strided((3, n), (stride, 1)) for n in (40, 32))

    x.copy_(integers(3, 40, seed=1))
    y = block_sparse.forward(x, values, *layout[:3], 32)
    assert torch.equal(y, (x.double() @ weight.T).half())
    ones = torch.ones(3, 32, dtype=torch.float16, device=device)
    gradient = block_sparse.weight_gradient(x, ones, *layout[:3], values.shape[0], (16, 16))
    assert torch.equal(gradient, as_values(ones.double().T @ x.double() * alive, example).half())

    dy.copy_(integers(3, 32, seed=2))
    dx = block_sparse.input_gradient(dy, values, *layout[3:6], 40)
    assert torch.equal(dx, (dy.double() @ weight).half())
    del memory, x, dy

    far = (1 << 31) // 256 + 1
    many = reserved(far + values.shape[0], 16, 16, device=device)
    many[far:] = values
    x = integers(2, 40, seed=1).to(device)
    y = block_sparse.forward(
        x.half(), many, layout.row_offsets, layout.cols, layout.slots + far, 32
    )
    assert torch.equal(y, (x @ weight.T).half())


def test_wide_metadata(device: torch.device) -> None:
    """int64, as where a count exceeds 2^31."""
    example = random_case(70, 90, 0.5, (16, 16), torch.float32, device)
    wide = Layout(*(tensor.long() for tensor in example.layout[:6]), *example.layout[6:])
    check(example._replace(layout=wide), integers(9, 90, seed=1), integers(9, 70, seed=2))


def test_topologies_at_random(device: torch.device) -> None:
    """Fresh shapes, blocks and densities."""
    generator = torch.Generator().manual_seed(11)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for seed in range(12 if interpreting() else 100):
        block = (16 << draw(0, 4), 16 << draw(0, 4))
        n_out, n_in, batch = draw(1, 3 * block[0]), draw(1, 4 * block[1]), draw(1, 40)
        share = draw(1, 11) / 10
        example = random_case(n_out, n_in, share, block, torch.float32, device, seed)
        bias = integers(n_out, seed=3).to(device)
        check(example, integers(batch, n_in, seed=1), integers(batch, n_out, seed=2), bias)


@pytest.mark.skipif(interpreting(), reason="runs programs one after another")
@pytest.mark.parametrize("shares", [1, 4])
def test_the_same_bits_every_time(shares: int, device: torch.device) -> None:
    example = random_case(1000, 1500, 0.3, (32, 32), torch.bfloat16, device)
    layout, values, *_ = example
    x = torch.randn(3000, 1500, device=device).bfloat16()
    dy = torch.randn(3000, 1000, device=device).bfloat16()

    def products() -> list[Tensor]:
        return [
            block_sparse.forward(x, values, *layout[:3], 1000),
            block_sparse.input_gradient(dy, values, *layout[3:6], 1500),
            block_sparse.weight_gradient(
                x, dy, *layout[:3], values.shape[0], (32, 32), shares=shares
            ),
        ]

    first = products()
    for _ in range(100):
        assert all(map(torch.equal, products(), first))


@pytest.mark.skipif(interpreting(), reason="does not round to tf32")
def test_tf32_rounds(device: torch.device) -> None:
    example = random_case(64, 64, 1.0, (32, 32), torch.float32, device)
    layout, values, weight, _ = example
    x = integers(20, 64, seed=1).to(device) + 2.0**-9
    exact = block_sparse.forward(x.float(), values, *layout[:3], 64)
    rounded = block_sparse.forward(x.float(), values, *layout[:3], 64, tf32=True)
    assert torch.equal(exact, (x @ weight.T).float())
    torch.testing.assert_close(rounded, exact, rtol=0.01, atol=0.5)


def test_what_is_refused(device: torch.device) -> None:
    layout, values, *_ = random_case(70, 90, 0.5, (16, 16), torch.float32, device)
    x, dy = torch.ones(4, 90, device=device), torch.ones(4, 70, device=device)
    with pytest.raises(ValueError, match=r"16x16 in torch.float64 .* no kernel"):
        block_sparse.forward(x.double(), values.double(), *layout[:3], 70)
    with pytest.raises(ValueError, match=r"float16 and torch.float32 have no kernel"):
        block_sparse.forward(x.half(), values, *layout[:3], 70)
    with pytest.raises(ValueError, match=r"blocks of 8x16 .* use sides among 16, 32, 64, 128"):
        block_sparse.weight_gradient(x, dy, *layout[:3], 5, (8, 16))
    with pytest.raises(ValueError, match=r"values must be \(capacity, bh, bw\), not \(16, 16\)"):
        block_sparse.forward(x, values[0], *layout[:3], 70)
    with pytest.raises(ValueError, match=r"must be \(batch, features\), not \(90,\)"):
        block_sparse.forward(x[0], values, *layout[:3], 70)
    with pytest.raises(ValueError, match=r"6 offsets, .* do not describe 96 features in blocks"):
        block_sparse.forward(x, values, *layout[:3], 96)
    with pytest.raises(ValueError, match=r"bias must be \(70,\) on .*, not \(1,\)"):
        block_sparse.forward(x, values, *layout[:3], 70, x.new_ones(1))
    with pytest.raises(ValueError, match=r"x has 4 samples, but dy has 3"):
        block_sparse.weight_gradient(x, dy[:3], *layout[:3], 5, (16, 16))
    with pytest.raises(ValueError, match=r"all tensors must be on one device"):
        block_sparse.forward(x.to("meta"), values, *layout[:3], 70)
