"""Every implementation of the sparse products, by itself, against a dense float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from sparse_case import Case, topology_of

from dst import SparseConv2d
from growth import Grid
from triton_kernels import blas, blocks, blocks_cpu, blocks_tiles, conv_cpu, csr, csr_cpu, forms
from triton_kernels.waves import Memory, waves

OF_BLOCKS = [forms.BLOCKS, forms.BLOCKS_CPU, forms.BLOCKS_TILES]
OF_ENTRIES = [forms.BLOCKS, forms.BLOCKS_CPU, forms.CSR, forms.CSR_CPU]


def _skip_unless_available(form: forms.Form) -> None:
    x = torch.empty(0)
    if form is forms.CSR and not csr.available(x.device):
        pytest.skip("PyTorch was built without MKL")
    if form is forms.CSR_CPU and not csr_cpu.available(x):
        pytest.skip("numba is not installed")
    if form is forms.BLOCKS_CPU and not blocks_cpu.available(x):
        pytest.skip("this PyTorch has no batched BLAS")
    if form is forms.BLOCKS_TILES and not blocks_tiles.available(x, (16, 16)):
        pytest.skip("numba is not installed, or the processor has no fused multiply-add")


def _check(form: forms.Form, case: Case, batch: int, dtype: torch.dtype) -> None:
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype]
    layout, grid = case.topology.layout, case.grid
    values = case.values.detach().to(dtype)
    weight = case.weight.to(dtype).double()
    x, dy = torch.randn(batch, case.n_in).to(dtype), torch.randn(batch, grid.n_out).to(dtype)
    y = form.forward(x, values, *layout[:3], grid.n_out)
    dx = form.input_gradient(dy, values, *layout[3:6], case.n_in)
    gradient = form.weight_gradient(x, dy, *layout[:3], len(values), grid.block)
    assert y.dtype == dx.dtype == gradient.dtype == dtype
    close = {"rtol": tolerance, "atol": tolerance * max(1, batch) ** 0.5}
    torch.testing.assert_close(y.double(), x.double() @ weight.T, **close)
    torch.testing.assert_close(dx.double(), dy.double() @ weight, **close)
    case.values.grad = gradient.to(case.values.dtype)
    case.check_gradient(dy.double().T @ x.double(), close["atol"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alive", ["none", "one", "some", "all"])
@pytest.mark.parametrize("block", [(16, 16), (32, 16), (3, 5)])
@pytest.mark.parametrize("form", [*OF_BLOCKS, forms.CSR_CPU], ids=lambda form: form.name)
def test_blocks(form: forms.Form, block: tuple[int, int], alive: str, dtype: torch.dtype) -> None:
    _skip_unless_available(form)
    if form is forms.BLOCKS_TILES and any(side % 16 for side in block):
        pytest.skip("not blocks for tiles")
    torch.manual_seed(0)
    for n_out, n_in, batch in ((70, 37, 9), (32, 64, 1), (1, 50, 3)):
        wide = torch.float64 if dtype == torch.bfloat16 else dtype
        case = Case(topology_of(Grid.of(n_out, n_in, 1, block), alive), wide)
        _check(form, case, batch, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alive", ["none", "one", "some", "all"])
@pytest.mark.parametrize("form", OF_ENTRIES, ids=lambda form: form.name)
def test_single_weights(form: forms.Form, alive: str, dtype: torch.dtype) -> None:
    """Batches below, at and above the tiles of 16, 32 and 64."""
    _skip_unless_available(form)
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.bfloat16 else dtype
    case = Case(topology_of(Grid.of(23, 37, 1, (1, 1)), alive), wide)
    for batch in (1, 16, 31, 64, 150):
        _check(form, case, batch, dtype)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    block=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    batch=st.integers(0, 20),
    alive=st.sampled_from(["none", "one", "some", "all"]),
    seed=st.integers(0, 100),
)
def test_any_topology(
    shape: tuple[int, int], block: tuple[int, int], batch: int, alive: str, seed: int
) -> None:
    torch.manual_seed(seed)
    case = Case(topology_of(Grid.of(*shape, 1, block), alive, seed=seed), torch.float64, seed)
    x = torch.empty(0, dtype=torch.float64)
    _check(forms.linear_form(x, block), case, batch, torch.float64)


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_a_batch_in_several_pieces(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_cpu, "ROWS", rows)
    monkeypatch.setattr(blocks, "CHUNK_FLOATS", rows * 16)
    case = Case(topology_of(Grid.of(37, 18, 1, (4, 4)), "some"), torch.float64)
    for form in (forms.BLOCKS, forms.BLOCKS_CPU):
        _check(form, case, 9, torch.float64)


@pytest.mark.parametrize("positions", [1, 150, 1 << 20])
def test_images_in_several_pieces(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides that leave a remainder, kernels of more than an image's padding, and dilation."""
    monkeypatch.setattr(conv_cpu, "POSITIONS", positions)
    torch.manual_seed(0)
    for kernel, stride, padding, dilation in (
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((5, 5), (3, 2), (2, 2), (2, 2)),
        ((2, 2), (2, 3), (0, 0), (1, 1)),
        ((11, 11), (4, 4), (2, 2), (1, 1)),
    ):
        taps = kernel[0] * kernel[1]
        case = Case(topology_of(Grid.of(21, 10 * taps, taps, (8, 4)), "some"), torch.float64)
        layout, how = case.topology.layout, (kernel, stride, padding, dilation)
        x = torch.randn(5, 10, 14, 13, dtype=torch.float64, requires_grad=True)
        dense = case.weight.view(21, *kernel, 10).permute(0, 3, 1, 2).clone().requires_grad_()
        y = F.conv2d(x, dense, None, stride, padding, dilation)
        dy = torch.randn_like(y)
        y.backward(dy)
        values = case.values.detach()
        own = conv_cpu.forward(x.detach(), values, *layout[:3], 21, *how)
        dx = conv_cpu.input_gradient(dy, values, *layout[3:6], x.detach(), *how)
        at = (*layout[:3], len(values), (8, 4))
        case.values.grad = conv_cpu.weight_gradient(x.detach(), dy, *at, *how)
        torch.testing.assert_close(own, y)
        torch.testing.assert_close(dx, x.grad)
        case.check_gradient(dense.grad.permute(0, 2, 3, 1).flatten(1), 1e-11)


@pytest.mark.parametrize("compute", ["auto", "dense", "sparse"])
def test_an_image_smaller_than_the_kernel_is_refused(compute: str) -> None:
    layer = SparseConv2d(16, 16, 5, density=0.5, block=(16, 16), compute=compute)
    with pytest.raises((ValueError, RuntimeError), match=r"too small for kernel|greater than"):
        layer(torch.randn(1, 16, 4, 4))


def test_convolution_forms_no_weight() -> None:
    taps, channels, n_out = 9, 320, 320
    case = Case(topology_of(Grid.of(n_out, channels * taps, taps, (16, 16)), "one"), torch.float32)
    x, how = torch.randn(1, channels, 4, 4), ((3, 3), (1, 1), (1, 1), (1, 1))
    layout, values = case.topology.layout, case.values.detach()
    with LargestTensor() as watch:
        y = conv_cpu.forward(x, values, *layout[:3], n_out, *how)
        conv_cpu.input_gradient(y, values, *layout[3:6], x, *how)
        conv_cpu.weight_gradient(x, y, *layout[:3], len(values), (16, 16), *how)
    assert watch.largest < n_out * channels * taps / 20


def test_the_result_does_not_depend_on_threads() -> None:
    """Of unstructured products, whose rows are shared out."""
    if not csr_cpu.available(torch.empty(0)):
        pytest.skip("numba is not installed")
    case = Case(topology_of(Grid.of(400, 300, 1, (1, 1)), "some"), torch.float32)
    layout, values = case.topology.layout, case.values.detach()
    x, dy = torch.randn(70, 300), torch.randn(70, 400)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            y = csr_cpu.forward(x, values, *layout[:3], 400)
            gradient = csr_cpu.weight_gradient(x, dy, *layout[:3], len(values))
            found.append((y, gradient))
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


def test_which_loops_serve_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(0)
    if not blocks_tiles.available(x, (16, 16)):
        pytest.skip("numba is not installed, or the processor has no fused multiply-add")
    for block in ((1, 1), (4, 4), (8, 128), (128, 15)):
        assert forms.linear_form(x, block) is forms.CSR_CPU
        assert not csr_cpu.available(x.to("meta"), block)
    assert forms.linear_form(x, (16, 48)) is forms.BLOCKS_TILES
    assert forms.linear_form(x, (20, 20)) in (forms.BLOCKS_CPU, forms.BLOCKS)
    monkeypatch.setattr(blocks_tiles, "_fused", lambda: False)
    assert forms.linear_form(x, (1, 1)) is forms.CSR_CPU
    assert forms.linear_form(x, (4, 4)) in (forms.BLOCKS_CPU, forms.BLOCKS)


def test_what_multiplies_what() -> None:
    """Addresses, strides and transposes of a batch, against plain products."""
    if not blas.available(torch.float64):
        pytest.skip("this PyTorch has no batched BLAS")
    a, b = torch.randn(40, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    out = torch.full((30,), torch.nan, dtype=torch.float64)
    starts = [np.array(s, np.int64) for s in ([0, 17], [5, 20], [2, 15])]
    left = blas.Matrices(a, starts[0], 4)
    right = blas.Matrices(b, starts[1], 3, transposed=True)
    place = blas.Matrices(out, starts[2], 6)
    expected = out.clone()
    for i, j, k in zip(*(s.tolist() for s in starts), strict=True):
        product = a[i:].as_strided((2, 3), (4, 1)) @ b[j:].as_strided((5, 3), (3, 1)).T
        expected[k:].as_strided((2, 5), (6, 1)).copy_(product)
    blas.multiply(left, right, place, (2, 5, 3), [2])
    torch.testing.assert_close(out, expected, equal_nan=True)
    blas.multiply(left, right, place, (2, 5, 3), [1, 2], add=True)
    torch.testing.assert_close(out, 2 * expected, equal_nan=True)
    # Two turns at the same place, the first of them into what is there already.
    alike = [side._replace(starts=side.starts[[0, 0]]) for side in (left, right, place)]
    blas.multiply(*alike, (2, 5, 3), [1, 2])
    once = expected[2:].as_strided((2, 5), (6, 1))
    torch.testing.assert_close(out[2:].as_strided((2, 5), (6, 1)), 2 * once)
    assert not blas.available(torch.float16)


def test_no_target_is_added_to_twice_at_once() -> None:
    target = np.array([3, 0, 3, 1, 3, 0])
    turns = waves(target, 5)
    assert turns.order.tolist() == [1, 3, 0, 5, 2, 4] and turns.ends == [3, 5, 6]
    assert turns.empty.tolist() == [2, 4]
    none = waves(target[:0], 2)
    assert none.order.size == 0 and none.ends == [] and none.empty.tolist() == [0, 1]


def test_what_is_remembered_ends_with_a_change() -> None:
    memory, made = Memory(), []

    def make() -> int:
        made.append(1)
        return len(made)

    offsets, index = torch.tensor([0, 1]), torch.tensor([0])
    assert [memory.get((offsets, index), "a", make) for _ in range(3)] == [1, 1, 1]
    assert memory.get((offsets, index), "b", make) == 2
    index.add_(1)
    assert memory.get((offsets, index), "a", make) == 3
    assert memory.get((offsets, index.clone()), "a", make) == 4
    with torch.inference_mode():
        assert memory.get((torch.tensor([0]), torch.tensor([0])), "a", make) == 5


class _OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, where there is none to ask."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


@pytest.mark.parametrize(
    ("block", "dtype", "linear", "conv"),
    [
        ((16, 16), torch.bfloat16, forms.BLOCKS_GPU, forms.CONV_GPU),
        ((128, 32), torch.float32, forms.BLOCKS_GPU, forms.CONV_GPU),
        ((1, 1), torch.float16, forms.CSR_GPU, None),
    ],
)
def test_which_kernels_serve_a_gpu(
    block: tuple[int, int],
    dtype: torch.dtype,
    linear: forms.Form,
    conv: forms.Form | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forms, "_triton", lambda: True)
    monkeypatch.setattr(blocks_cpu, "available", lambda x: False)
    x = torch.empty(0, dtype=dtype).as_subclass(_OnGpu)
    assert forms.linear_form(x, block) is linear
    assert forms.conv_form(x, block) is conv
    monkeypatch.setattr(forms, "_triton", lambda: False)
    assert forms.linear_form(x, block).name not in ("block_sparse", "csr_gpu")
    assert forms.conv_form(x, block) is None
