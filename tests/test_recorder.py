"""The recorder: what it captures equals the dense weight gradient, and it leaves nothing behind."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import growth
from dst import SparseConv2d, SparseLinear
from growth import InputError, Recorder, record


def _columns(gradient: Tensor) -> Tensor:
    """A weight gradient in the order of ``products``: (n_out, n_in)."""
    return gradient if gradient.dim() == 2 else gradient.permute(0, 2, 3, 1).flatten(1)


def _products(pairs: growth.Pairs) -> Tensor:
    return pairs.products(0, pairs.n_out)


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules())


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual), rtol=1e-4, atol=1e-4)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "linear 3-D": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "linear 1-D": (lambda: nn.Linear(6, 5), (6,)),
    "conv": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 7, 8)),
    "conv 1x1": (lambda: nn.Conv2d(3, 4, 1, bias=False), (2, 3, 5, 5)),
    "conv geometry": (
        lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
        (2, 3, 7, 8),
    ),
    "conv same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 7, 8)),
    "conv same, even": (lambda: nn.Conv2d(3, 4, (2, 4), padding="same"), (2, 3, 7, 8)),
    "conv same, dilated": (
        lambda: nn.Conv2d(3, 4, (2, 3), padding="same", dilation=(3, 2)),
        (2, 3, 7, 8),
    ),
    "conv valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 7, 8)),
    "conv reflect": (
        lambda: nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"),
        (2, 3, 7, 8),
    ),
    "conv circular, same": (
        lambda: nn.Conv2d(3, 4, 4, padding="same", padding_mode="circular"),
        (2, 3, 7, 8),
    ),
    "conv replicate, strided": (
        lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="replicate"),
        (2, 3, 7, 8),
    ),
    "conv unbatched": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 7, 8)),
    "conv unbatched reflect": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        (3, 7, 8),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("wanted", ["input too", "weight alone"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_dense_layers(name: str, wanted: str) -> None:
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = build()
    x = torch.randn(shape, requires_grad=wanted == "input too")
    with record(layer) as records:
        y = layer(x)
        y.backward(torch.randn_like(y))
    _close(_products(records[""]), _columns(layer.weight.grad))


def _dense_twin(layer: Any) -> Callable[[Tensor, Tensor], Tensor]:
    if isinstance(layer, SparseLinear):
        return lambda x, weight: F.linear(x, weight, layer.bias)
    return lambda x, weight: F.conv2d(
        layer.pad(x), weight, layer.bias, layer.stride, layer.padding, layer.dilation
    )


SPARSE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: SparseLinear(6, 5, density=0.3), (4, 6)),
    "linear, sparse": (lambda: SparseLinear(6, 5, density=0.3, compute="sparse"), (4, 6)),
    "linear 3-D, blocks": (lambda: SparseLinear(6, 5, density=0.5, block=(2, 4)), (2, 3, 6)),
    "conv": (lambda: SparseConv2d(3, 4, 3, density=0.3), (2, 3, 7, 8)),
    "conv geometry": (
        lambda: SparseConv2d(3, 4, (3, 2), (2, 1), (2, 1), (1, 2), density=0.3, block=(2, 2)),
        (2, 3, 7, 8),
    ),
    "conv same, even": (
        lambda: SparseConv2d(3, 4, (2, 4), padding="same", density=0.3),
        (2, 3, 7, 8),
    ),
    "conv unbatched": (lambda: SparseConv2d(3, 4, 3, padding=1, density=0.3), (3, 7, 8)),
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_layers_give_the_gradient_of_the_dense_weight(name: str) -> None:
    """Also where nothing is alive: that is what growth needs."""
    build, shape = SPARSE[name]
    torch.manual_seed(0)
    layer = build()
    x = torch.randn(shape)
    with record(layer) as records:
        y = layer(x)
        dy = torch.randn_like(y)
        y.backward(dy)
    weight = layer.dense_weight().detach().requires_grad_()
    dense = _dense_twin(layer)(x, weight)
    torch.testing.assert_close(dense, y)
    dense.backward(dy)
    _close(_products(records[""]), _columns(weight.grad))
    assert records[""].taps == layer.topology.grid.taps


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def _train(model: nn.Module, batch: int = 4) -> None:
    model(torch.randn(batch, 6)).square().sum().backward()


def test_nothing_is_left_when_stopped() -> None:
    model = _mlp()
    recorder = Recorder(model)
    assert _hooks(model) == 0 and not recorder.recording
    recorder.start()
    recorder.start()  # twice is once
    assert _hooks(model) == 2 and recorder.recording
    _train(model)
    recorder.stop()
    assert _hooks(model) == 0 and not recorder.recording
    assert not recorder.empty and set(recorder.records()) == {"0", "2"}
    kept = weakref.ref(recorder["0"].x)
    recorder.clear()
    gc.collect()
    assert kept() is None and recorder.empty and recorder.records() == {}
    _train(model)
    assert recorder.empty


def test_stopped_by_an_exception() -> None:
    model = _mlp()
    with pytest.raises(RuntimeError, match="on purpose"), record(model):
        raise RuntimeError("on purpose")
    assert _hooks(model) == 0


def test_forward_without_backward_keeps_no_tensor() -> None:
    model = _mlp()
    with record(model) as records:
        x = torch.randn(4, 6)
        alive = weakref.ref(x)
        model(x)
        del x
        gc.collect()
        assert alive() is None and records.empty
        with torch.no_grad():
            y = model(torch.randn(4, 6))
        with torch.inference_mode():
            model(torch.randn(4, 6))
        assert y._backward_hooks is None and records.empty
    with pytest.raises(InputError, match="'0' was not recorded: no backward pass"):
        records["0"]


def test_evaluation_between_forward_and_backward_changes_nothing() -> None:
    model = _mlp()
    with record(model) as records:
        loss = model(torch.randn(4, 6)).square().sum()
        model.eval()
        with torch.no_grad():
            model(torch.randn(9, 6))
        model.train()
        loss.backward()
    assert records["0"].samples == 4
    _close(_products(records["0"]), model[0].weight.grad)


def test_a_layer_called_twice() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 5)
    with record(layer) as records:
        layer(layer(torch.randn(4, 5)).relu()).square().sum().backward()
    assert records[""].samples == 8
    _close(_products(records[""]), layer.weight.grad)


def test_gradient_accumulation() -> None:
    model = _mlp()
    with record(model) as records:
        _train(model, 4)
        _train(model, 3)
    for name, layer in (("0", model[0]), ("2", model[2])):
        assert records[name].samples == 7
        _close(_products(records[name]), layer.weight.grad)


def test_inplace_relu_after_the_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 5), nn.ReLU(True)
    )
    with record(model) as records:
        model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    for name, layer in (("0", model[0]), ("3", model[3])):
        _close(_products(records[name]), _columns(layer.weight.grad))


def test_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), SparseLinear(8, 5, density=0.5))
    with record(model) as records:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(torch.randn(4, 6))
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
    assert records["0"].dz.dtype == torch.bfloat16
    products = _products(records["0"])
    assert products.dtype == torch.float32
    # x is recorded before the cast, so that only bfloat16's own rounding is between the two.
    torch.testing.assert_close(products, model[0].weight.grad, rtol=0.05, atol=0.05)
    # The keys that are alive have the gradient of the values.
    keys = model[2].topology.keys()
    alive = _products(records["2"]).flatten()[keys]
    torch.testing.assert_close(alive, model[2].values.grad.flatten(), rtol=0.05, atol=0.05)


def test_loss_scale_is_taken_out_when_recorded() -> None:
    model = _mlp()
    scale = 1024.0
    with record(model, loss_scale=lambda: scale) as records:
        (model(torch.randn(4, 6)).square().sum() * scale).backward()
        first = {name: model[int(name)].weight.grad / scale for name in ("0", "2")}
        model.zero_grad()
        scale = 2.0  # GradScaler changes it between steps
        (model(torch.randn(3, 6)).square().sum() * scale).backward()
    for name, layer in (("0", model[0]), ("2", model[2])):
        _close(_products(records[name]), first[name] + layer.weight.grad / scale)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_records_once(reentrant: bool) -> None:
    model = _mlp()
    x = torch.randn(4, 6, requires_grad=True)
    with record(model) as records:
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert records["0"].samples == 4
    _close(_products(records["0"]), model[0].weight.grad)


def test_input_given_by_name() -> None:
    layer = nn.Linear(6, 5)
    with record(layer) as records:
        layer(input=torch.randn(4, 6)).square().sum().backward()
    _close(_products(records[""]), layer.weight.grad)


def test_frozen_layers_and_frozen_models() -> None:
    model = _mlp()
    model[0].requires_grad_(False)
    with record(model) as records:
        _train(model)
    assert set(records.records()) == {"2"}
    model[2].requires_grad_(False)
    with record(model) as records:
        model(torch.randn(4, 6, requires_grad=True)).sum().backward()
    assert set(records.records()) == {"0", "2"}


def test_groups_are_left_out_or_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    assert list(Recorder(model)) == ["1"]
    with pytest.raises(InputError, match=r"'0' is a Conv2d: only linear .* without groups"):
        Recorder(model, ["0"])
    with pytest.raises(InputError, match="'2' is a BatchNorm2d"):
        Recorder(model, ["1", "2"])
    with pytest.raises(InputError, match="no layer '7' to record in Sequential"):
        Recorder(model, ["7"])


def test_only_the_named_layers_are_recorded() -> None:
    model = _mlp()
    with record(model, ["2", "2"]) as records:
        assert _hooks(model) == 1
        _train(model)
    assert list(records) == ["2"] and records["2"].samples == 4


def test_user_hooks_stay() -> None:
    model = _mlp()
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    with record(model):
        _train(model)
    _train(model)
    assert len(calls) == 2 and _hooks(model) == 1


def test_recorded_vectors_grow_the_largest_gradients() -> None:
    """The whole way: record, search, and compare with the dense gradient's order."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, padding=1)
    with record(layer) as records:
        layer(torch.randn(2, 3, 6, 6)).square().sum().backward()
    found = growth.Exact()(records[""], 10, torch.empty(0, dtype=torch.int64))
    best = layer.weight.grad.flatten(1).abs().flatten().topk(10).indices.sort().values
    columns = growth.to_unfold_order(found.col, 3, 9)
    assert torch.equal((found.row * 27 + columns).sort().values, best)
