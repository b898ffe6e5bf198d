"""The GPU's implementations of the products, called the way that layers call them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sparse_case import Case, topology_of

from growth import Grid
from triton_kernels import forms


@pytest.mark.parametrize("block", [(16, 16), (32, 16), (1, 1)])
def test_linear(block: tuple[int, int], device: torch.device) -> None:
    form = forms.CSR_GPU if block == (1, 1) else forms.BLOCKS_GPU
    case = Case(topology_of(Grid.of(37, 50, 1, block), "some"), torch.float32)
    layout = [t.to(device) for t in case.topology.layout[:6]]
    values, weight = case.values.detach().to(device), case.weight
    x, dy = torch.randn(20, 50, device=device), torch.randn(20, 37, device=device)
    close = {"rtol": 1e-4, "atol": 1e-4}
    y = form.forward(x, values, *layout[:3], 37)
    torch.testing.assert_close(y.cpu().double(), x.cpu().double() @ weight.T, **close)
    if form.takes_bias:
        bias = torch.randn(37, device=device)
        torch.testing.assert_close(form.forward(x, values, *layout[:3], 37, bias), y + bias)
    dx = form.input_gradient(dy, values, *layout[3:], 50)
    torch.testing.assert_close(dx.cpu().double(), dy.cpu().double() @ weight, **close)
    gradient = form.weight_gradient(x, dy, *layout[:3], len(values), block)
    case.values.grad = gradient.cpu()
    case.check_gradient(dy.cpu().double().T @ x.cpu().double(), 1e-4)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_conv(order: torch.memory_format, device: torch.device) -> None:
    """The results lie in memory as PyTorch's own would."""
    form, taps, how = forms.CONV_GPU, 9, ((3, 3), (2, 1), (1, 1), (1, 1))
    case = Case(topology_of(Grid.of(20, 17 * taps, taps, (16, 16)), "some"), torch.float32)
    layout = [t.to(device) for t in case.topology.layout[:6]]
    values = case.values.detach().to(device)
    x = torch.randn(2, 17, 6, 5).contiguous(memory_format=order)
    wide = x.double().requires_grad_()
    dense = case.weight.view(20, 3, 3, 17).permute(0, 3, 1, 2).clone().requires_grad_()
    expected = F.conv2d(wide, dense, None, *how[1:])
    dy = torch.randn_like(expected)
    expected.backward(dy)
    x, g = x.to(device), dy.float().to(device)
    y = form.forward(x, values, *layout[:3], 20, *how)
    dx = form.input_gradient(g, values, *layout[3:], x, *how)
    gradient = form.weight_gradient(x, g, *layout[:3], len(values), (16, 16), *how)
    for found, reference in ((y, expected), (dx, wide.grad)):
        assert found.is_contiguous(memory_format=order)
        torch.testing.assert_close(found.cpu().double(), reference.detach(), rtol=1e-4, atol=1e-4)
    case.values.grad = gradient.cpu()
    assert dense.grad is not None
    case.check_gradient(dense.grad.permute(0, 2, 3, 1).flatten(1), 1e-3)
