"""RigL and SET, connection by connection, against references that share no code with ours.

The multi-layer perceptron is written out in NumPy: dense weights and masks, its own forward and
backward pass, SGD with momentum. The convolutional twin takes its gradients from autograd on dense
masked weights. Both share ``_update``, one plain drop and grow over sorted lists.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dst import (
    DropGrow,
    TopologyUpdater,
    UpdateSchedule,
    rigl,
    sparse_evolutionary_training,
    sparse_layers,
    sparse_momentum,
    sparsify,
)
from dst.drop import magnitude
from dst.seeding import generator
from growth.sampling import sample_outside

INTERVAL, UPDATES, END, ALPHA = 3, 20, 66, 0.5
LR, MOMENTUM, DECAY = 0.1, 0.9, 1e-3

Array = np.ndarray


@dataclass
class _Weight:
    """One layer: w, mask, velocity and gradient as flat arrays in key order, and its bias."""

    w: Array
    mask: Array
    bias: Array
    v: Array = field(init=False)
    bias_v: Array = field(init=False)

    def __post_init__(self) -> None:
        self.v, self.bias_v = np.zeros_like(self.w), np.zeros_like(self.bias)

    def sgd(self, grad: Array, bias_grad: Array) -> None:
        grad = (grad + DECAY * self.w) * self.mask
        self.v = MOMENTUM * self.v + grad
        self.w = self.w - LR * self.v
        self.bias_v = MOMENTUM * self.bias_v + bias_grad + DECAY * self.bias
        self.bias = self.bias - LR * self.bias_v


@dataclass
class _Seen:
    """What a run met, so that a test can tell that it tested something."""

    dropped: int = 0
    regrown: int = 0
    grown_without_gradient: int = 0
    tied_drops: int = 0


def _smallest(w: Array, alive: list[int], count: int) -> list[int]:
    return sorted(alive, key=lambda i: (abs(w[i]), i))[:count]


def _smallest_of_either_sign(w: Array, alive: list[int], count: int) -> list[int]:
    zeros = [i for i in alive if w[i] == 0][:count]
    left = count - len(zeros)
    positive, negative = [i for i in alive if w[i] > 0], [i for i in alive if w[i] < 0]
    of_positive = round(left * len(positive) / max(1, len(positive) + len(negative)))
    return zeros + _smallest(w, positive, of_positive) + _smallest(w, negative, left - of_positive)


def _update(
    layer: _Weight,
    grad: Array,
    step: int,
    drop: Callable[[Array, list[int], int], list[int]],
    grow: Callable[[list[int], int], list[int]],
    seen: _Seen,
) -> Array:
    """Change w, mask and v in place; returns the mask of the connections that went on."""
    alive = [int(i) for i in np.flatnonzero(layer.mask)]
    count = math.floor(ALPHA / 2 * (1 + math.cos(math.pi * step / END)) * len(alive))
    dropped = drop(layer.w, alive, count)
    assert len(set(dropped)) == count
    kept = sorted(set(alive) - set(dropped))
    grown = grow(kept, count)
    assert len(set(grown)) == count and not set(grown) & set(kept)

    largest = max((abs(layer.w[i]) for i in dropped), default=0.0)
    seen.tied_drops += any(abs(layer.w[i]) == largest for i in kept)
    seen.dropped += count
    seen.regrown += len(set(grown) & set(dropped))
    seen.grown_without_gradient += sum(grad[i] == 0 for i in grown)
    went_on = np.zeros_like(layer.mask)
    went_on[kept] = 1
    went_on[[i for i in grown if i in dropped]] = 1
    layer.mask = went_on.copy()
    layer.mask[grown] = 1
    layer.w, layer.v = layer.w * went_on, layer.v * went_on
    return went_on


def _largest_gradients(grad: Array) -> Callable[[list[int], int], list[int]]:
    def grow(kept: list[int], count: int) -> list[int]:
        free = sorted(set(range(grad.size)) - set(kept), key=lambda i: (-abs(grad[i]), i))
        return free[:count]

    return grow


def _same_draw(name: str, step: int, size: int) -> Callable[[list[int], int], list[int]]:
    def grow(kept: list[int], count: int) -> list[int]:
        taken = torch.tensor(kept, dtype=torch.int64)
        return sample_outside(taken, size, count, generator(5, name, step)).tolist()

    return grow


def _weight_in_key_order(dense: torch.Tensor) -> Array:
    """(out, in) or (out, C, kh, kw) -> flat, columns in (kh, kw, C) order."""
    if dense.dim() == 4:
        dense = dense.permute(0, 2, 3, 1)
    return dense.detach().reshape(-1).numpy().copy()


def _reference_of(model: nn.Module) -> dict[str, _Weight]:
    weights = {}
    for name, layer in sparse_layers(model).items():
        w = _weight_in_key_order(layer.dense_weight())
        mask = np.zeros_like(w)
        mask[layer.topology.keys().numpy()] = 1
        weights[name] = _Weight(w, mask, layer.bias.detach().numpy().copy())
    return weights


def _forward_backward(
    weights: list[_Weight], x: Array, y: Array, loss: str
) -> tuple[float, list[Array], list[Array]]:
    """Loss, dense weight gradients (flat) and bias gradients of a ReLU network."""
    inputs, h = [], x
    for at, layer in enumerate(weights):
        inputs.append(h)
        z = h @ (layer.w * layer.mask).reshape(layer.bias.size, -1).T + layer.bias
        h = np.maximum(z, 0) if at < len(weights) - 1 else z
    if loss == "mse":
        value, dz = np.mean((h - y) ** 2), 2 * (h - y) / h.size
    else:
        shifted = h - h.max(1, keepdims=True)
        p = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
        rows = np.arange(len(h))
        value = -np.mean(np.log(p[rows, y]))
        dz = p.copy()
        dz[rows, y] -= 1
        dz /= len(h)
    grads, bias_grads = [], []
    for at in reversed(range(len(weights))):
        layer = weights[at]
        grads.insert(0, (dz.T @ inputs[at]).ravel())
        bias_grads.insert(0, dz.sum(0))
        dz = dz @ (layer.w * layer.mask).reshape(layer.bias.size, -1) * (inputs[at] > 0)
    return float(value), grads, bias_grads


def _assert_same(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, _Weight]
) -> None:
    for name, layer in sparse_layers(model).items():
        expected = weights[name]
        alive = np.flatnonzero(expected.mask)
        np.testing.assert_array_equal(layer.topology.keys().numpy(), alive, err_msg=name)
        w = _weight_in_key_order(layer.dense_weight())
        np.testing.assert_allclose(w, expected.w, rtol=1e-9, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(
            layer.bias.detach().numpy(), expected.bias, rtol=1e-9, atol=1e-12
        )
        velocity = optimizer.state[layer.values].get("momentum_buffer")
        if velocity is not None:
            velocity = velocity.view(-1)[layer.topology.slots.long()].numpy()
            np.testing.assert_allclose(velocity, expected.v[alive], rtol=1e-9, atol=1e-12)


def _network(compute: str) -> nn.Sequential:
    torch.manual_seed(11)
    model = nn.Sequential(
        nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 4)
    ).double()
    sparsify(model, density=0.5, skip=(), compute=compute, seed=1)
    with torch.no_grad():
        for layer in sparse_layers(model).values():
            # Coarse weights, so that drops tie; and a unit that never fires.
            layer.values.copy_((layer.values * 10).round() / 10)
        model[2].bias[3] = -100.0
    return model


def _train_both(method: DropGrow, drop: Callable[..., list[int]], loss: str, compute: str) -> _Seen:
    model = _network(compute)
    weights = _reference_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    updater = TopologyUpdater(model, optimizer, method)
    random, seen = np.random.default_rng(7), _Seen()
    for step in range(1, INTERVAL * UPDATES + 1):
        x = random.standard_normal((8, 12))
        x[:, 7:] = 0  # inputs whose weights have no gradient, so that growth must break ties
        y = random.standard_normal((8, 4)) if loss == "mse" else random.integers(0, 4, 8)
        output, target = model(torch.from_numpy(x)), torch.from_numpy(y)
        ours = F.mse_loss(output, target) if loss == "mse" else F.cross_entropy(output, target)
        optimizer.zero_grad()
        ours.backward()
        replaced = updater.step()
        if not replaced:
            optimizer.step()

        value, grads, bias_grads = _forward_backward(list(weights.values()), x, y, loss)
        assert ours.item() == pytest.approx(value, rel=1e-9)
        due = step % INTERVAL == 0
        assert replaced == (due and method.skips_step)
        for (name, layer), grad, bias_grad in zip(weights.items(), grads, bias_grads, strict=True):
            if due:
                grow = (
                    _largest_gradients(grad)
                    if method.skips_step
                    else _same_draw(name, step, grad.size)
                )
                # The gradient of what was just grown belongs to no weight of this step.
                grad = grad * _update(layer, grad, step, drop, grow, seen)
            if not replaced:
                layer.sgd(grad, bias_grad)
        _assert_same(model, optimizer, weights)
    assert seen.dropped > 100
    assert seen.regrown > 0
    return seen


@pytest.mark.parametrize(("loss", "compute"), [("mse", "sparse"), ("cross-entropy", "dense")])
def test_rigl_equals_the_reference(loss: str, compute: str) -> None:
    method = rigl(UpdateSchedule(INTERVAL, END, ALPHA))
    seen = _train_both(method, _smallest, loss, compute)
    assert seen.tied_drops > 0
    assert seen.grown_without_gradient > 0


@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
def test_set_equals_the_reference(loss: str) -> None:
    method = sparse_evolutionary_training(UpdateSchedule(INTERVAL, END, ALPHA), seed=5)
    _train_both(method, _smallest_of_either_sign, loss, "dense")


def test_set_that_drops_by_magnitude_equals_the_reference() -> None:
    method = sparse_evolutionary_training(UpdateSchedule(INTERVAL, END, ALPHA), seed=5)
    method = dataclasses.replace(method, drop=magnitude)
    assert _train_both(method, _smallest, "mse", "sparse").tied_drops > 0


def _deal(total: int, weights: list[float], limits: list[int]) -> list[int]:
    """Largest remainders; layers that would overflow are filled, the others share what is left."""
    exact = [total * w / sum(weights) for w in weights]
    full = [i for i, e in enumerate(exact) if e >= limits[i]]
    if full:
        rest = [i for i in range(len(weights)) if i not in full]
        left = total - sum(limits[i] for i in full)
        inner = _deal(left, [weights[i] for i in rest], [limits[i] for i in rest])
        return [limits[i] if i in full else inner[rest.index(i)] for i in range(len(weights))]
    shares = [math.floor(e) for e in exact]
    for i in sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i)):
        if sum(shares) < total:
            shares[i] += 1
    return shares


def test_snfs_equals_the_reference() -> None:
    """Dense momentum of all steps in NumPy; counts move between the layers."""
    model = _network("sparse")
    weights = _reference_of(model)
    momenta = {name: np.zeros_like(layer.w) for name, layer in weights.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    method = sparse_momentum(UpdateSchedule(INTERVAL, END, ALPHA))
    updater = TopologyUpdater(model, optimizer, method)
    random, grown_in_all, moved = np.random.default_rng(7), 0, False
    for step in range(1, INTERVAL * 8 + 1):
        x, y = random.standard_normal((8, 12)), random.standard_normal((8, 4))
        optimizer.zero_grad()
        F.mse_loss(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        assert not updater.step()
        optimizer.step()

        _, grads, bias_grads = _forward_backward(list(weights.values()), x, y, "mse")
        grads = dict(zip(weights, grads, strict=True))
        for name, grad in grads.items():
            momenta[name] = 0.9 * momenta[name] + grad
        if step % INTERVAL == 0:
            share = ALPHA / 2 * (1 + math.cos(math.pi * step / END))
            alive = {n: [int(i) for i in np.flatnonzero(la.mask)] for n, la in weights.items()}
            count = {n: math.floor(share * len(alive[n])) for n in weights}
            kept = {
                n: sorted(set(alive[n]) - set(_smallest(la.w, alive[n], count[n])))
                for n, la in weights.items()
            }
            means = [float(np.abs(momenta[n][alive[n]]).mean()) for n in weights]
            room = [la.w.size - len(kept[n]) for n, la in weights.items()]
            dealt = dict(zip(weights, _deal(sum(count.values()), means, room), strict=True))
            moved |= dealt != count
            for name, layer in weights.items():
                grown = _largest_gradients(momenta[name])(kept[name], dealt[name])
                grown_in_all += len(grown)
                went_on = np.zeros_like(layer.mask)
                went_on[[*kept[name], *(i for i in grown if i in alive[name])]] = 1
                layer.mask = went_on.copy()
                layer.mask[grown] = 1
                layer.w, layer.v = layer.w * went_on, layer.v * went_on
                grads[name] = grads[name] * went_on
        for (name, layer), bias_grad in zip(weights.items(), bias_grads, strict=True):
            layer.sgd(grads[name], bias_grad)
        _assert_same(model, optimizer, weights)
    assert moved and grown_in_all > 100


def test_the_two_criteria_of_set_differ() -> None:
    w = np.array([0.1, 0.2, 0.3, 0.4, -1.0, -2.0])
    ours = sparse_evolutionary_training(UpdateSchedule(1, 1, 1.0)).drop(
        torch.from_numpy(w).view(-1, 1, 1), 3
    )
    assert ours.tolist() == sorted(_smallest_of_either_sign(w, list(range(6)), 3)) == [0, 1, 4]
    assert magnitude(torch.from_numpy(w).view(-1, 1, 1), 3).tolist() == [0, 1, 2]


class _ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1)
        self.second = nn.Conv2d(5, 6, (3, 2), stride=2)
        self.last = nn.Linear(6 * 2 * 3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.last(x.flatten(1))


def _dense_twin_gradients(
    weights: dict[str, _Weight], x: torch.Tensor, y: torch.Tensor
) -> tuple[list[Array], list[Array]]:
    """Gradients of the dense masked twin by autograd, weights in key order."""
    shapes = {"first": (5, 3, 3, 3), "second": (6, 3, 2, 5), "last": (4, 1, 1, 36)}
    dense, biases = [], []
    for name, (out, kh, kw, channels) in shapes.items():
        w = torch.from_numpy(weights[name].w * weights[name].mask)
        w = w.view(out, kh, kw, channels).permute(0, 3, 1, 2).contiguous()
        dense.append(w.requires_grad_())
        biases.append(torch.from_numpy(weights[name].bias).clone().requires_grad_())
    h = F.relu(F.conv2d(x, dense[0], biases[0], padding=1))
    h = F.relu(F.conv2d(h, dense[1], biases[1], stride=2))
    z = F.linear(h.flatten(1), dense[2].flatten(1), biases[2])
    grads = torch.autograd.grad(F.cross_entropy(z, y), [*dense, *biases])
    return [_weight_in_key_order(g) for g in grads[:3]], [g.numpy() for g in grads[3:]]


def test_rigl_on_convolutions_equals_the_reference() -> None:
    torch.manual_seed(3)
    model = sparsify(_ConvNet().double(), density=0.4, skip=(), seed=4)
    weights = _reference_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    updater = TopologyUpdater(model, optimizer, rigl(UpdateSchedule(INTERVAL, END, ALPHA)))
    seen = _Seen()
    for step in range(1, INTERVAL * UPDATES + 1):
        x, y = torch.randn(6, 3, 6, 6, dtype=torch.float64), torch.randint(4, (6,))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        replaced = updater.step()
        if not replaced:
            optimizer.step()
        grads, bias_grads = _dense_twin_gradients(weights, x, y)
        for layer, grad, bias_grad in zip(weights.values(), grads, bias_grads, strict=True):
            if step % INTERVAL == 0:
                _update(layer, grad, step, _smallest, _largest_gradients(grad), seen)
            else:
                layer.sgd(grad, bias_grad)
        _assert_same(model, optimizer, weights)
    assert seen.dropped > 100
    assert seen.regrown > 0
