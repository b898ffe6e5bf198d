"""Pruning scores: each against a loop over single samples in float64."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dst
import dst.pruning.weights
from dst.mam import to_mam
from dst.pruning import SCORES
from dst.pruning.layers import chosen_weights
from dst.pruning.walk import walk

WIDTHS = (9, 13, 7)
Batches = list[tuple[Tensor, Tensor]]


class Net(nn.Module):
    """Two layers to prune and a head; x: (batch, ..., 9). The second may be used twice."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(a, b) for a, b in pairwise(WIDTHS))
        self.back = nn.Linear(WIDTHS[2], WIDTHS[1])
        self.drop, self.act = nn.Dropout(0.5), nn.ReLU(inplace=True)
        self.head = nn.Linear(WIDTHS[2], 4)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.drop(self.act(self.first(x))))
        if self.twice:
            x = self.second(torch.tanh(self.back(x)))
        x = torch.tanh(x)
        return self.head(x if x.dim() == 2 else x.flatten(1, -2).mean(1))


def net(beta: float | None, **options: bool) -> Net:
    """beta: of its two MAM layers; None: without any."""
    model = Net(**options)
    return model if beta is None else to_mam(model, layers=("first", "second"), beta=beta)


def drawn(*positions: int, sizes: tuple[int, ...] = (5, 3)) -> Batches:
    return [(torch.randn(n, *positions, WIDTHS[0]), torch.randint(4, (n,))) for n in sizes]


def read(model: nn.Module, score: str, batches: Batches) -> dict[str, Tensor]:
    """The scores of the first two layers, as matrices; NaN where nothing is alive."""
    weights = chosen_weights(model, ("first", "second"), SCORES[score])
    scores = {own.name: SCORES[score](own, 0) for own in weights}
    if SCORES[score].needs != "nothing":
        walk(model, scores, batches, F.cross_entropy)
    found = {}
    for own in weights:
        matrix = torch.full((own.total,), torch.nan)
        for rows in own.tiles():
            matrix[own.keys(rows)] = scores[own.name].read(rows)
        found[own.name] = matrix.view(own.n_rows, own.n_cols)
    return found


class Plain(nn.Module):
    """A layer, dense or sparse, of whatever beta, with all products written out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        sparse = isinstance(layer, dst.SparseLayer)
        self.weight = (layer.dense_weight() if sparse else layer.weight).detach().clone()
        self.weight.requires_grad_()
        self.alive = torch.ones_like(self.weight, dtype=torch.bool)
        if sparse:
            self.alive = torch.zeros_like(self.alive)
            self.alive.view(-1)[layer.topology.keys()] = True
        self.bias, self.beta = layer.bias.detach(), getattr(layer, "beta", 1.0)
        self.won: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        products = x[..., None, :] * self.weight
        high, low = products.max(-1), products.min(-1)
        self.won.append((high.indices, low.indices))
        mixed = self.beta * products.sum(-1) + (1 - self.beta) * (high.values + low.values)
        return mixed + self.bias

    def masked(self, matrix: Tensor) -> Tensor:
        return matrix.masked_fill(~self.alive, torch.nan)


def plain(model: Net) -> tuple[Net, dict[str, Plain]]:
    copied = copy.deepcopy(model).eval().double()
    copied.first, copied.second = Plain(copied.first), Plain(copied.second)
    return copied, {"first": copied.first, "second": copied.second}


def naive_gradient(model: Net, batches: Batches) -> dict[str, Tensor]:
    model, layers = plain(model)
    weights = [layer.weight for layer in layers.values()]
    sums, samples = [torch.zeros_like(w) for w in weights], 0
    for inputs, labels in batches:
        for x, label in zip(inputs, labels, strict=True):
            loss = F.cross_entropy(model(x[None].double()), label[None])
            for total, w, g in zip(sums, weights, torch.autograd.grad(loss, weights), strict=True):
                total += (g * w).abs().detach()
            samples += 1
    return {
        name: layer.masked(total / samples)
        for (name, layer), total in zip(layers.items(), sums, strict=True)
    }


def naive_selection(model: Net, batches: Batches) -> dict[str, Tensor]:
    """Every row of an input of a layer is a sample."""
    model, layers = plain(model)
    for inputs, _ in batches:
        model(inputs.double())
    found = {}
    for name, layer in layers.items():
        total, seen = torch.zeros_like(layer.weight), 0
        for highs, lows in layer.won:
            rows = highs.shape[-1]
            pairs = zip(
                highs.reshape(-1, rows).tolist(), lows.reshape(-1, rows).tolist(), strict=True
            )
            for high, low in pairs:
                seen += 1
                for i, (a, b) in enumerate(zip(high, low, strict=True)):
                    for j in {a, b}:
                        total[i, j] += 1
        found[name] = layer.masked(total / seen)
    return found


def agree(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    for name, matrix in expected.items():
        torch.testing.assert_close(
            found[name], matrix.detach().float(), rtol=rtol, atol=1e-7, equal_nan=True
        )


BETAS = (None, 0.0, 0.3, 1.0)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("positions", [(), (6,), (2, 3)])
@pytest.mark.parametrize("beta", BETAS)
def test_gradient_is_the_mean_of_single_samples(
    beta: float | None, positions: tuple[int, ...], twice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dst.pruning.weights, "TILE", 40)  # several tiles a layer
    model, batches = net(beta, twice=twice), drawn(*positions)
    agree(read(model, "gradient", batches), naive_gradient(model, batches))


@pytest.mark.parametrize("positions", [(), (6,)])
@pytest.mark.parametrize("beta", BETAS)
def test_gradient_of_sparse_layers(
    beta: float | None, positions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dst.pruning.weights, "TILE", 20)
    model, batches = net(beta), drawn(*positions)
    dst.prune(model, keep=0.3, score="magnitude", layers=("first", "second"))
    with torch.no_grad():  # a row without any, and slots in another order than keys
        layer, keys = model.first, model.first.topology.keys()
        gone = keys[keys < 2 * WIDTHS[0]]
        new = torch.arange(WIDTHS[0] * 4, WIDTHS[0] * 5)
        layer.topology.edit(dst.Change(gone, new[~torch.isin(new, keys)][: len(gone)]))
        layer.values.normal_()
        layer.values[layer.topology.free_slots()] = 0
    agree(read(model, "gradient", batches), naive_gradient(model, batches))
    agree(read(model, "selection", batches), naive_selection(model, batches))


@pytest.mark.parametrize("positions", [(), (6,)])
@pytest.mark.parametrize("beta", BETAS)
def test_selection_is_the_share_of_samples(beta: float | None, positions: tuple[int, ...]) -> None:
    model, batches = net(beta, twice=True), drawn(*positions)
    batches[0][0][1] = 0  # all products are equal: one weight is arg-max and arg-min
    expected = naive_selection(model, batches)
    agree(read(model, "selection", batches), expected)
    weighted = {name: m * getattr(model, name).weight.abs() for name, m in expected.items()}
    agree(read(model, "magnitude-selection", batches), weighted)


def test_a_weight_that_won_twice_has_twice_the_gradient() -> None:
    model, batches = net(0.3), drawn()
    with torch.no_grad():  # each output has one product that is not zero, or ties throughout
        model.first.weight[:, 1:] = 0
        batches[0][0][0] = 0
    agree(read(model, "gradient", batches), naive_gradient(model, batches))


def test_magnitude_and_random() -> None:
    model = net(None)
    agree(read(model, "magnitude", []), {"first": model.first.weight.abs()})
    numbers = read(model, "random", [])
    assert min(float(m.min()) for m in numbers.values()) >= 0
    assert torch.cat([m.flatten() for m in numbers.values()]).unique().numel() > 200
    assert all(torch.equal(m, read(model, "random", [])[name]) for name, m in numbers.items())


@pytest.mark.parametrize("score", ["gradient", "selection"])
def test_half_precision(score: str) -> None:
    model, batches = net(0.3), drawn(4, sizes=(16,))
    naive = naive_gradient if score == "gradient" else naive_selection
    with torch.autocast("cpu", torch.bfloat16):
        found = read(model, score, batches)
    for name, matrix in naive(model, batches).items():
        assert torch.corrcoef(torch.stack([found[name], matrix]).flatten(1))[0, 1] > 0.95


@pytest.mark.parametrize("score", ["gradient", "magnitude-selection"])
def test_scoring_leaves_no_trace(score: str) -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.BatchNorm1d(9), Net())
    model[2].drop.eval()
    model[0].weight.requires_grad_(False)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    batches = drawn()
    wanted, state = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    with torch.no_grad():
        kind = SCORES[score]
        own = {w.name: kind(w, 0) for w in chosen_weights(model, ("0", "2.second"), kind)}
        walk(model, own, batches, F.cross_entropy)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    assert modes == [m.training for m in model.modules()]
    assert wanted == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_without_trainable_parameters_and_a_transformer() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(24, 4)
    )
    model.requires_grad_(False)
    batches = [(torch.randn(6, 3, 8), torch.randint(4, (6,)))]
    dst.prune(model, keep=50, layers="0.linear*", batches=batches)
    assert sum(layer.alive for layer in dst.sparse_layers(model).values()) == 50
    assert not any(p.requires_grad for p in model.parameters())
