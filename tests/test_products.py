"""Sparse products against a dense float64 reference, both gradients, and how PyTorch sees them."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from largest_tensor import LargestTensor
from sparse_case import Case, topology_of
from torch import Tensor, nn

from dst import SparseConv2d, SparseLinear
from growth import Grid
from triton_kernels import (
    Layout,
    gather,
    scatter,
    sparse_conv2d,
    sparse_linear,
)

WAYS = ["dense", "sparse"]
BLOCKS = [(1, 1), (2, 3), (4, 4), (16, 16)]
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("cc", "gcc", "clang", "cl")),
    reason="torch.compile needs a C compiler",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alive", ["none", "one", "some", "all"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("compute", WAYS)
def test_linear(compute: str, block: tuple[int, int], alive: str, dtype: torch.dtype) -> None:
    """Ragged in both directions; free slots hold NaN, which no product may read."""
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.manual_seed(0)
    for n_out, n_in, leading in ((7, 10, (5,)), (37, 18, (2, 3)), (16, 16, ()), (1, 1, (1,))):
        case = Case(topology_of(Grid.of(n_out, n_in, 1, block), alive), dtype)
        x = torch.randn(*leading, n_in, dtype=dtype, requires_grad=True)
        bias = torch.randn(n_out, dtype=dtype, requires_grad=True)
        y = sparse_linear(x, case.values, case.topology.layout, bias, compute=compute)
        assert y.dtype == dtype and y.shape == (*leading, n_out)
        wide = x.detach().double().requires_grad_()
        weight = case.weight.clone().requires_grad_()
        expected = F.linear(wide, weight, bias.detach().double())
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
        dy = torch.randn_like(y)
        y.backward(dy)
        expected.backward(dy.double())
        torch.testing.assert_close(x.grad.double(), wide.grad, rtol=tolerance, atol=tolerance)
        case.check_gradient(weight.grad, tolerance)
        torch.testing.assert_close(bias.grad, dy.reshape(-1, n_out).sum(0))


GEOMETRIES: list[dict[str, Any]] = [
    {"kernel": (3, 3), "padding": (1, 1)},
    {"kernel": (1, 1)},
    {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"kernel": (2, 3), "stride": (3, 2), "padding": (2, 1), "dilation": (2, 1)},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alive", ["none", "one", "some", "all"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"{g['kernel']}")
@pytest.mark.parametrize("compute", WAYS)
def test_conv2d(
    compute: str, geometry: dict[str, Any], block: tuple[int, int], alive: str, dtype: torch.dtype
) -> None:
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.manual_seed(0)
    how = {name: size for name, size in geometry.items() if name != "kernel"}
    kernel = geometry["kernel"]
    taps = kernel[0] * kernel[1]
    for channels, n_out, batch in ((5, 7, 2), (17, 3, 1)):
        case = Case(topology_of(Grid.of(n_out, channels * taps, taps, block), alive), dtype)
        x = torch.randn(batch, channels, 6, 7, dtype=dtype, requires_grad=True)
        bias = torch.randn(n_out, dtype=dtype)
        how["compute"] = compute
        y = sparse_conv2d(x, case.values, case.topology.layout, kernel, bias, **how)
        assert y.dtype == dtype
        wide = x.detach().double().requires_grad_()
        weight = case.weight.clone().requires_grad_()
        dense = weight.view(n_out, *kernel, channels).permute(0, 3, 1, 2)
        del how["compute"]
        expected = F.conv2d(wide, dense, bias.double(), **how)
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
        dy = torch.randn_like(y)
        y.backward(dy)
        expected.backward(dy.double())
        torch.testing.assert_close(x.grad.double(), wide.grad, rtol=tolerance, atol=tolerance)
        case.check_gradient(weight.grad, tolerance)


def test_conv2d_without_a_batch() -> None:
    case = Case(topology_of(Grid.of(4, 27, 9, (1, 1)), "some"), torch.float32)
    x = torch.randn(3, 5, 6)
    y = sparse_conv2d(x, case.values, case.topology.layout, (3, 3))
    batched = sparse_conv2d(x[None], case.values, case.topology.layout, (3, 3))
    assert y.shape == (4, 3, 4) and torch.equal(y, batched[0])


@pytest.mark.parametrize("block", BLOCKS[:2])
@pytest.mark.parametrize("compute", WAYS)
def test_empty_batch(compute: str, block: tuple[int, int]) -> None:
    case = Case(topology_of(Grid.of(7, 10, 1, block), "some"), torch.float32)
    x = torch.zeros(0, 10, requires_grad=True)
    y = sparse_linear(x, case.values, case.topology.layout, compute=compute)
    assert y.shape == (0, 7)
    y.sum().backward()
    assert x.grad.shape == (0, 10) and (case.values.grad == 0).all()


@pytest.mark.parametrize("block", BLOCKS[:2])
@pytest.mark.parametrize("compute", WAYS)
def test_inputs_and_gradients_of_any_layout(compute: str, block: tuple[int, int]) -> None:
    case = Case(topology_of(Grid.of(7, 10, 1, block), "some"), torch.float64)
    x = torch.randn(10, 5, dtype=torch.float64).T.requires_grad_()
    y = sparse_linear(x, case.values, case.topology.layout, compute=compute)
    y[:, 0].sum().backward()  # the gradient of y is expanded, not dense
    torch.testing.assert_close(y, x @ case.weight.T)
    dy = torch.zeros(5, 7, dtype=torch.float64)
    dy[:, 0] = 1
    torch.testing.assert_close(x.grad, dy @ case.weight)
    case.check_gradient(dy.T @ x.detach(), 1e-12)


@pytest.mark.parametrize("compute", WAYS)
@pytest.mark.parametrize("block", BLOCKS[:2])
def test_only_what_is_needed(compute: str, block: tuple[int, int]) -> None:
    """A frozen weight, and an input without a gradient."""
    case = Case(topology_of(Grid.of(5, 6, 1, block), "some"), torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    sparse_linear(x, case.values, case.topology.layout, compute=compute).sum().backward()
    case.check_gradient(torch.ones(5, 3).double() @ x, 1e-12)
    case.values.grad = None
    x.requires_grad_()
    frozen = case.values.detach()
    sparse_linear(x, frozen, case.topology.layout, compute=compute).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 5).double() @ case.weight)
    assert not sparse_linear(x.detach(), frozen, case.topology.layout).requires_grad


@pytest.mark.parametrize("block", BLOCKS[:2])
@pytest.mark.parametrize("compute", WAYS)
def test_linear_gradcheck(compute: str, block: tuple[int, int]) -> None:
    topology = topology_of(Grid.of(5, 7, 1, block), "some", spare=1)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    values = torch.randn(topology.capacity, *block, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *args: sparse_linear(args[0], args[1], topology.layout, args[2], compute=compute),
        (x, values, bias),
    )


@pytest.mark.parametrize("compute", WAYS)
@pytest.mark.parametrize("block", BLOCKS[:2])
def test_conv2d_gradcheck(block: tuple[int, int], compute: str) -> None:
    topology = topology_of(Grid.of(3, 2 * 6, 6, block), "some", spare=1)
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    values = torch.randn(topology.capacity, *block, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *args: sparse_conv2d(
            *args, topology.layout, (3, 2), stride=(2, 1), padding=(1, 0), compute=compute
        ),
        (x, values),
    )


def _conv_y(x: Tensor, values: Tensor, layout: Layout, compute: str) -> Tensor:
    x = x.view(-1, 2, 3, 3)
    return sparse_conv2d(x, values, layout, (3, 3), compute=compute).flatten(1)


PRODUCTS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "linear": (lambda x, v, layout, compute: sparse_linear(x, v, layout, compute=compute), 1),
    "conv": (_conv_y, 9),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", BLOCKS[:2])
@pytest.mark.parametrize(
    ("product", "compute"), [(product, way) for product in ("linear", "conv") for way in WAYS]
)
def test_autocast(product: str, compute: str, block: tuple[int, int], dtype: torch.dtype) -> None:
    """Backward inside of it, as some loops do, and outside."""
    run, taps = PRODUCTS[product]
    for backward_inside in (False, True):
        torch.manual_seed(0)
        case = Case(topology_of(Grid.of(5, 18, taps, block), "some"), torch.float32)
        x = torch.randn(4, 18, requires_grad=True)
        dy = torch.randn(4, 5)
        with torch.autocast("cpu", dtype):
            y = run(x, case.values, case.topology.layout, compute)
            assert y.dtype == dtype
            if backward_inside:
                y.backward(dy.to(dtype))
        if not backward_inside:
            y.backward(dy.to(dtype))
        # x comes in PyTorch's order (C, kh, kw), the weight's columns are (kh, kw, C).
        order = torch.arange(18).view(2, 9).T.flatten() if taps == 9 else torch.arange(18)
        seen = x.detach().double()[:, order]
        torch.testing.assert_close(y.double(), seen @ case.weight.T, rtol=0.05, atol=0.1)
        expected = torch.zeros(4, 18).double()
        expected[:, order] = dy.double() @ case.weight
        assert x.grad.dtype == torch.float32
        torch.testing.assert_close(x.grad.double(), expected, rtol=0.05, atol=0.1)
        case.check_gradient(dy.double().T @ seen, 0.1)


@pytest.mark.parametrize("compute", WAYS)
@pytest.mark.parametrize("block", BLOCKS[:2])
def test_autocast_leaves_double_alone_as_torch_does(compute: str, block: tuple[int, int]) -> None:
    case = Case(topology_of(Grid.of(5, 6, 1, block), "some"), torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, case.weight).dtype == torch.float64
        y = sparse_linear(x, case.values, case.topology.layout, compute=compute)
        y.sum().backward()
    torch.testing.assert_close(y, x @ case.weight.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", BLOCKS[:2])
@pytest.mark.parametrize("compute", WAYS)
def test_half_precision(compute: str, block: tuple[int, int], dtype: torch.dtype) -> None:
    case = Case(topology_of(Grid.of(9, 12, 1, block), "some"), dtype)
    x = torch.randn(4, 12).to(dtype)
    y = sparse_linear(x, case.values, case.topology.layout, compute=compute)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), x.double() @ case.weight.T, rtol=0.02, atol=0.05)
    y.sum().backward()
    case.check_gradient(torch.ones(9, 4).double() @ x.double(), 0.05)


@pytest.mark.parametrize("block", BLOCKS[:2])
@pytest.mark.parametrize("compute", WAYS)
def test_linear_opcheck(compute: str, block: tuple[int, int]) -> None:
    case = Case(topology_of(Grid.of(5, 7, 1, block), "some", spare=0), torch.float32)
    values = case.values.detach().nan_to_num(0).requires_grad_()
    x = torch.randn(3, 7, requires_grad=True)
    layout = case.topology.layout
    torch.library.opcheck(
        torch.ops.sparsegrow.linear.default, (x, values, None, *layout[:6], 5, compute == "sparse")
    )
    bias = torch.randn(5, requires_grad=True)
    torch.library.opcheck(
        torch.ops.sparsegrow.linear.default, (x, values, bias, *layout[:6], 5, compute == "sparse")
    )
    dy = torch.randn(3, 5)
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            torch.ops.sparsegrow.linear_backward.default,
            (dy, x.detach(), values.detach(), *layout[:6], compute == "sparse", *needs),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("compute", WAYS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_conv2d_opcheck(memory_format: torch.memory_format, compute: str) -> None:
    case = Case(topology_of(Grid.of(5, 27, 9, (2, 2)), "some", spare=0), torch.float32)
    values = case.values.detach().nan_to_num(0).requires_grad_()
    x = torch.randn(2, 3, 6, 5).to(memory_format=memory_format).requires_grad_()
    layout = case.topology.layout
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1))
    torch.library.opcheck(
        torch.ops.sparsegrow.conv2d.default,
        (x, values, *layout[:6], 5, *geometry, compute == "sparse"),
    )
    dy = torch.randn(2, 5, 6, 5).to(memory_format=memory_format)
    torch.library.opcheck(
        torch.ops.sparsegrow.conv2d_backward.default,
        (dy, x.detach(), values.detach(), *layout[:6], *geometry, compute == "sparse", True, True),
        test_utils=("test_schema", "test_faketensor"),
    )


@needs_compiler
def test_compiled_model_equals_eager() -> None:
    """One model with every way to compute, because a compilation takes seconds."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        SparseConv2d(2, 3, 3, padding=1, density=0.5, generator=generator),
        nn.ReLU(),
        nn.Flatten(),
        SparseLinear(48, 6, density=0.3, compute="dense", generator=generator),
        SparseLinear(6, 7, density=0.5, compute="sparse", generator=generator),
        SparseLinear(7, 5, density=0.5, block=(2, 2), compute="sparse", generator=generator),
    )
    x = torch.randn(2, 2, 4, 4)
    results = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compute", WAYS)
@pytest.mark.parametrize("block", BLOCKS[:2])
def test_autograd_saves_no_dense_weight(compute: str, block: tuple[int, int]) -> None:
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    generator = torch.Generator().manual_seed(0)
    linear = SparseLinear(90, 80, density=0.02, block=block, compute=compute, generator=generator)
    conv = SparseConv2d(30, 40, 3, density=0.02, block=block, generator=generator)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = linear(torch.randn(4, 90)).sum() + conv(torch.randn(1, 30, 5, 5)).sum()
    y.backward()
    assert saved and max(saved) < 90 * 80 / 4


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_sparse_compute_never_forms_the_weight(block: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = SparseLinear(600, 500, density=0.02, block=block, compute="sparse", generator=generator)
    x = torch.randn(2, 600, requires_grad=True)
    with LargestTensor() as watch:
        layer(x).sum().backward()
    assert watch.largest < 600 * 500 / 4


@pytest.mark.parametrize("taps", [1, 6])
@pytest.mark.parametrize("block", BLOCKS)
def test_scatter_and_gather_are_adjoint(block: tuple[int, int], taps: int) -> None:
    case = Case(topology_of(Grid.of(7, 5 * taps, taps, block), "some"), torch.float64)
    index = case.topology.layout[:3]
    dense = scatter(case.values.detach(), *index, 7, taps, 5)
    assert torch.equal(dense.flatten(1), case.weight)
    other = torch.randn(7, taps, 5, dtype=torch.float64)
    back = gather(other, *index, case.topology.capacity, block)
    inner = (back * case.values.detach().nan_to_num(0)).sum()
    torch.testing.assert_close(inner, (other * dense).sum())
    case.values.grad = back
    case.check_gradient(other.flatten(1), 0.0)


def test_wrong_inputs_are_refused() -> None:
    layout = topology_of(Grid.of(5, 6, 1, (1, 1)), "some").layout
    with pytest.raises(ValueError, match="x has 7 features, but the weight has 6 inputs"):
        sparse_linear(torch.ones(2, 7), torch.ones(18, 1, 1), layout)
    layout = topology_of(Grid.of(5, 27, 9, (1, 1)), "some").layout
    for shape in ((2, 4, 5, 5), (5, 5), (1, 1, 3, 5, 5)):
        with pytest.raises(ValueError, match=r"must be \(batch, 3, H, W\)"):
            sparse_conv2d(torch.ones(shape), torch.ones(53, 1, 1), layout, (3, 3))
