"""MAM layers: what they compute, how they take the place of ordinary ones, and their schedule."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dst
from dst.flops import image_cost, layer_costs
from dst.mam import hidden_layers
from dst.models import build
from growth import InputError


def naive(x: Tensor, weight: Tensor, bias: Tensor | None, beta: float) -> Tensor:
    products = x.unsqueeze(-2) * weight
    own = products.max(-1).values + products.min(-1).values
    y = beta * products.sum(-1) + (1 - beta) * own
    return y if bias is None else y + bias


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(beta: float, bias: bool) -> None:
    torch.manual_seed(0)
    layer = dst.MAMLinear(7, 5, bias, beta=beta, dtype=torch.float64)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    dy = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = naive(x, layer.weight, layer.bias, beta)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(
        torch.autograd.grad(layer(x), leaves, dy),
        torch.autograd.grad(expected, leaves, dy),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_beta_1_is_a_linear_layer_bit_for_bit() -> None:
    layer, x = dst.MAMLinear(30, 20, beta=1.0), torch.randn(8, 30)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("absent", ["zero", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_sparse_values_and_gradients(beta: float, absent: str) -> None:
    torch.manual_seed(1)
    layer = dst.SparseMAMLinear(
        6, 9, beta=beta, absent=absent, density=0.3, compute="sparse", dtype=torch.float64
    )
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    layout = layer.topology.layout
    rows = layer.topology.rows().long()
    weight = torch.zeros(9, 6, dtype=torch.float64)
    alive = torch.zeros(9, 6, dtype=torch.bool)
    alive[rows, layout.cols.long()] = True
    weight[rows, layout.cols.long()] = layer.values.detach().view(-1)[layout.slots.long()]
    weight.requires_grad_()
    products = x.unsqueeze(1) * weight
    competing = [
        (products if absent == "zero" else products.masked_fill(~alive, sign * torch.inf))
        for sign in (-1, 1)
    ]
    own = competing[0].max(-1).values + competing[1].min(-1).values
    own = own.masked_fill(~alive.any(1) & (absent == "none"), 0.0)
    expected = beta * products.sum(-1) + (1 - beta) * own + layer.bias
    torch.testing.assert_close(layer(x), expected)
    dy = torch.randn_like(expected)
    dx, dvalues = torch.autograd.grad(layer(x), (x, layer.values), dy)
    wanted_x, wanted = torch.autograd.grad(expected, (x, weight), dy)
    torch.testing.assert_close(dx, wanted_x)
    found = dvalues.view(-1)[layout.slots.long()]
    torch.testing.assert_close(found, wanted[rows, layout.cols.long()])


def perceptron() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)
    )


def test_swapping_keeps_parameters_topology_hooks_and_mode() -> None:
    model = dst.sparsify(perceptron().eval(), density=0.5, skip=("first",))
    parameters, topology = dict(model.named_parameters()), model[2].topology
    seen: list[str] = []
    model[2].register_forward_hook(lambda *_: seen.append("called"))
    x = torch.randn(4, 8)
    before, state = model(x), torch.get_rng_state()
    model = dst.to_mam(model, beta=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(model[0], dst.MAMLinear) and isinstance(model[2], dst.SparseMAMLinear)
    assert type(model[4]) is dst.SparseLinear and not model[0].training
    assert model[2].topology is topology
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert torch.equal(model(x), before) and seen == ["called"] * 2
    dst.set_beta(model, 0.0)
    assert not torch.allclose(model(x), before)
    model = dst.to_mac(model)
    assert type(model[0]) is nn.Linear and type(model[2]) is dst.SparseLinear
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert torch.equal(model(x), before)


def test_a_model_that_is_a_layer() -> None:
    layer = nn.Linear(4, 3)
    twin = dst.to_mam(layer)
    assert isinstance(twin, dst.MAMLinear) and twin.weight is layer.weight
    assert type(dst.to_mac(twin)) is nn.Linear


def test_which_layers_by_default() -> None:
    assert hidden_layers(perceptron()) == ["0", "2"]
    vit = build("vit-small", in_channels=1, image_size=8, classes=3)
    names = hidden_layers(vit)
    assert len(names) == 12 and all(".mlp." in name for name in names)
    vit = dst.to_mam(vit, beta=0.5)
    out = vit(torch.randn(2, 1, 8, 8))
    assert out.shape == (2, 3) and len(dst.mam_layers(vit)) == 12


def test_a_transformer_of_pytorch_uses_the_swapped_layers() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = dst.to_mam(nn.TransformerEncoder(layer, 1).eval(), layers=["*.linear1", "*.linear2"])
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model(x))
    assert (fast - dst.to_mac(copy.deepcopy(model))(x)).abs().max() > 1e-3


def test_beta_is_kept_and_checked() -> None:
    layer = dst.MAMLinear(4, 3, beta=0.25)
    other = dst.MAMLinear(4, 3)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4)
    assert other.beta == 0.25 and torch.equal(other(x), layer(x))
    assert copy.deepcopy(layer).beta == 0.25
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match=r"beta .* must lie in \[0, 1\]"):
            layer.beta = wrong
    with pytest.raises(InputError, match="in_features 0"):
        dst.MAMLinear(0, 3)
    with pytest.raises(InputError, match="absent 'zreo' is unknown"):
        dst.SparseMAMLinear(4, 3, absent="zreo")
    with pytest.raises(InputError, match=r"MAM layer 'fc\*' matches none of 0, 2, 4"):
        dst.to_mam(perceptron(), layers=["fc*"])
    blocks = dst.sparsify(perceptron(), density=0.5, block=2, skip=())
    with pytest.raises(InputError, match="max and min are for single weights"):
        dst.to_mam(blocks)


def test_compiled_at_most_three_times() -> None:
    compiles = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        compiles.append(graph)
        return graph

    layer = dst.MAMLinear(6, 4, beta=1.0)
    compiled = torch.compile(layer, backend=backend)
    x = torch.randn(3, 6)
    for beta in (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0):
        layer.beta = beta
        torch.testing.assert_close(compiled(x), naive(x, layer.weight, layer.bias, beta))
    assert len(compiles) == 3


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_autocast_and_half_precision(beta: float) -> None:
    torch.manual_seed(0)
    layer, x = dst.MAMLinear(16, 8, beta=beta), torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    x, weight = x.bfloat16(), layer.weight.bfloat16()
    expected = naive(x.double(), weight.double(), layer.bias.bfloat16().double(), beta)
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(layer.bfloat16()(x).double(), expected, rtol=0.02, atol=0.02)


def test_densify_keeps_max_and_min() -> None:
    model = dst.to_mam(dst.sparsify(perceptron(), density=0.4, skip=()), beta=0.2)
    x = torch.randn(5, 8)
    before = model(x)
    model = dst.densify(model)
    assert isinstance(model[0], dst.MAMLinear) and type(model[4]) is nn.Linear
    torch.testing.assert_close(model(x), before)


def test_schedule_of_the_thesis() -> None:
    linear, parabolic = dst.BetaSchedule(20), dst.BetaSchedule(20, "parabolic")
    assert [linear.at(q) for q in (0, 5, 19, 20, 99)] == pytest.approx([1, 0.75, 0.05, 0, 0])
    for q in (0, 5, 13):
        assert parabolic.at(q) == pytest.approx((q / 20) ** 2 - 2 * q / 20 + 1)
    epochs = dst.BetaSchedule(20, interval=5)
    assert [epochs.at(q) for q in (0, 4, 5, 9, 19, 20)] == pytest.approx(
        [1, 1, 0.75, 0.75, 0.25, 0]
    )
    assert dst.BetaSchedule(0).at(0) == 0
    with pytest.raises(InputError, match="beta decay 'cosine' is unknown"):
        dst.BetaSchedule(5, "cosine")
    with pytest.raises(InputError, match="cannot vanish over -1 steps"):
        dst.BetaSchedule(-1)


def test_flops() -> None:
    """3 a weight in MAM, 2 in MAC; backward, a weight of MAC 4 and an output of MAM 8."""
    model = dst.to_mam(perceptron(), layers=["0"], beta=0.0)
    costs = layer_costs(model, torch.zeros(1, 8))
    alive = dict.fromkeys(costs, 1.0)
    rest = 16 * 12 + 12 * 3
    assert image_cost(model, costs, alive) == (3 * 128 + 2 * rest, 8 * 16 + 4 * rest)
    model[0].beta = 0.5
    assert image_cost(model, costs, alive) == (5 * 128 + 2 * rest, 8 * 16 + 4 * 128 + 4 * rest)
    model[0].beta = 1.0
    assert image_cost(model, costs, alive) == (2 * (128 + rest), 4 * (128 + rest))
