"""One-shot pruning: exact counts, the best weights, and a network that is the masked one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dst
import dst.pruning.weights
from dst.mam import MAMLinear, SparseMAMLinear, to_mam
from dst.pruning import SCOPES, SCORES
from dst.pruning.score import Score
from dst.pruning.select import kept_keys
from dst.pruning.weights import DenseWeights
from growth import InputError
from growth.peak_memory import PeakMemory

SIZES = (20 * 30, 30 * 14)
Make = Callable[[], nn.Sequential]


def perceptron() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 14), nn.ReLU(), nn.Linear(14, 5)
    )


def with_mam() -> nn.Sequential:
    return to_mam(perceptron(), beta=0.25)


def already_sparse() -> nn.Sequential:
    return dst.prune(with_mam(), keep=0.6, score="random")


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        (torch.randn(n, 20, generator=generator), torch.randint(5, (n,), generator=generator))
        for n in (8, 8, 3)
    ]


def alive(model: nn.Module) -> list[int]:
    return [layer.alive for layer in dst.sparse_layers(model).values()]


@pytest.mark.parametrize("make", [perceptron, with_mam, already_sparse])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("score", SCORES)
def test_every_score_keeps_exactly_so_many(score: str, scope: str, make: Make) -> None:
    model = make()
    dense = dst.densify(copy.deepcopy(model))  # in whose MAM layers zeros compete
    old = dict(model.named_modules())
    prune = {"score": score, "scope": scope, "batches": batches, "seed": 5}
    pruned = dst.prune(copy.deepcopy(model), keep=0.137, **prune)
    again = dst.prune(model, keep=0.137, **prune)
    assert again is model
    if scope == "local":
        assert alive(model) == [round(0.137 * size) for size in SIZES]
    assert sum(alive(model)) == round(0.137 * sum(SIZES))
    for name, layer in dst.sparse_layers(model).items():
        before, twin = old[name], pruned.get_submodule(name)
        assert torch.equal(layer.topology.keys(), twin.topology.keys())
        assert isinstance(layer, SparseMAMLinear) == (make is not perceptron)
        assert layer.bias is before.bias and layer.training == before.training
        assert getattr(layer, "beta", 1) == (1 if make is perceptron else 0.25)
        kept = torch.zeros(dense[int(name)].weight.numel(), dtype=torch.bool)
        kept[layer.topology.keys()] = True
        dense[int(name)].weight.data *= kept.view_as(dense[int(name)].weight)
        assert torch.equal(layer.dense_weight(), dense[int(name)].weight)
    assert model[4] is old["4"]
    x = torch.randn(6, 20)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)


def test_global_keeps_the_best_of_all_and_local_of_each() -> None:
    for scope in SCOPES:
        model = perceptron()
        weights = [model[at].weight.detach().abs().flatten() for at in (0, 2)]
        dst.prune(model, keep=0.2, score="magnitude", scope=scope)
        kept = [model[at].topology.keys() for at in (0, 2)]
        chosen = [torch.zeros_like(w, dtype=torch.bool) for w in weights]
        for mask, keys in zip(chosen, kept, strict=True):
            mask[keys] = True
        pairs = [(w[m].min(), w[~m].max()) for w, m in zip(weights, chosen, strict=True)]
        if scope == "local":
            assert all(worst > best for worst, best in pairs)
        else:
            assert min(worst for worst, _ in pairs) > max(best for _, best in pairs)


def test_pruning_in_two_steps_is_pruning_in_one() -> None:
    once = dst.prune(with_mam(), keep=0.1, score="magnitude")
    twice = dst.prune(with_mam(), keep=0.4, score="magnitude")
    first = twice[0]
    handle = first.register_forward_hook(lambda module, args, y: y + 1)
    dst.prune(twice, keep=0.1, score="magnitude")
    assert twice[0] is not first
    assert sum(alive(twice)) == round(0.1 * sum(SIZES)) < first.alive + 200
    for at in (0, 2):
        assert torch.equal(once[at].topology.keys(), twice[at].topology.keys())
        assert torch.equal(once[at].values, twice[at].values)
    x = torch.randn(3, 20)
    torch.testing.assert_close(twice[0](x), once[0](x) + 1)
    handle.remove()  # the user's, and still in force
    torch.testing.assert_close(twice[0](x), once[0](x))


class _Given(Score):
    def read(self, rows: slice) -> Tensor:
        return self.table[rows].flatten().clone()


@settings(deadline=None, max_examples=60)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    levels=st.integers(1, 5),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**20),
)
def test_ties_go_to_the_earlier_layer_and_the_lower_key(
    shapes: list[tuple[int, int]], levels: int, share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-30, 30, (levels,), generator=generator)
    scores = []
    for at, shape in enumerate(shapes):
        own = _Given(DenseWeights(str(at), nn.Linear(*shape[::-1])), 0)
        own.table = scale[torch.randint(levels, shape, generator=generator)]
        own.table *= torch.randint(2, shape, generator=generator)
        scores.append(own)
    table = torch.cat([own.table.flatten() for own in scores]).numpy()
    layer = np.repeat(np.arange(len(shapes)), [a * b for a, b in shapes])
    count = max(len(shapes), round(share * table.size))
    # The best of every layer, then the best of all others, both the first of equals.
    order = np.argsort(-table, kind="stable")
    best = [order[layer[order] == at][0] for at in range(len(shapes))]
    rest = [place for place in order if place not in best]
    expected = np.sort(best + rest[: count - len(best)])
    starts = np.searchsorted(layer, np.arange(len(shapes)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dst.pruning.weights, "TILE", 7)
        found = list(kept_keys(scores, [(len(scores), count)]))
    places = [keys.numpy() + start for (_, keys), start in zip(found, starts, strict=True)]
    assert np.concatenate(places).tolist() == expected.tolist()


def test_a_layer_is_never_left_without_a_weight() -> None:
    model = perceptron()
    model[2].weight.data *= 1e-6
    best = int(model[2].weight.abs().argmax())
    first = model[0].weight.detach().abs().flatten().topk(19).indices.sort().values
    dst.prune(model, keep=20, score="magnitude")
    assert torch.equal(model[0].topology.keys(), first)
    assert model[2].topology.keys().tolist() == [best]
    assert alive(dst.prune(perceptron(), keep=1e-4, score="random", scope="local")) == [1, 1]


def test_layers_that_are_pruned() -> None:
    assert list(dst.sparse_layers(dst.prune(perceptron(), keep=0.5, score="random"))) == ["0", "2"]
    mixed = to_mam(perceptron(), layers=("2",))
    assert list(dst.sparse_layers(dst.prune(mixed, keep=0.5, score="random"))) == ["2"]
    last = dst.prune(perceptron(), keep=0.5, score="random", layers="last")
    assert list(dst.sparse_layers(last)) == ["4"]
    shared = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    shared.append(shared[0])
    dst.prune(shared, keep=3, layers="0", batches=[(torch.randn(5, 4), torch.randint(4, (5,)))])
    assert shared[0] is shared[2]
    assert shared[0].alive == 3
    assert isinstance(dst.prune(MAMLinear(5, 4), keep=5, score="magnitude"), SparseMAMLinear)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_convolutions_by_random_and_magnitude() -> None:
    for score in ("random", "magnitude"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 4, (1, 2), padding="same"))
        weight = model[0].weight.detach().clone()
        twin = dst.prune(copy.deepcopy(model), keep=0.3, score=score, layers="*", scope="local")
        kept = twin[0].dense_weight() != 0
        assert int(kept.sum()) == round(0.3 * weight.numel())
        assert torch.equal(twin[0].dense_weight(), weight * kept)
        if score == "magnitude":
            assert weight[kept].abs().min() > weight[~kept].abs().max()
        again = dst.prune(twin, keep=0.1, score="magnitude", layers="*", scope="local")
        with torch.no_grad():
            for dense, sparse in zip(model, again, strict=True):
                dense.weight.copy_(sparse.dense_weight())
        x = torch.randn(2, 3, 7, 9)
        torch.testing.assert_close(again(x), model(x))


def test_batches_may_be_a_generator_and_the_loss_another() -> None:
    loss = partial(F.cross_entropy, weight=torch.tensor([1.0, 0, 0, 0, 0]))
    wanted = dst.prune(with_mam(), keep=50, batches=batches, loss=loss)
    found = dst.prune(with_mam(), keep=50, batches=iter(batches()), loss=loss)
    other = dst.prune(with_mam(), keep=50, batches=batches())
    keys = [
        torch.cat([m[at].topology.keys() + 600 * at for at in (0, 2)])
        for m in (wanted, found, other)
    ]
    assert torch.equal(keys[0], keys[1])
    assert not torch.equal(keys[0], keys[2])


class _Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.unused = nn.Linear(20, 6), nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.view(1, -1, 20)).view(len(x), -1)


def _with_nan() -> nn.Sequential:
    model = perceptron()
    model[2].weight.data[3, 4] = torch.nan
    return model


def _tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 5))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("message", "make", "options"),
    [
        ("keep 1.0 must be a share strictly between", perceptron, {"keep": 1.0}),
        ("keep nan must be", perceptron, {"keep": float("nan")}),
        ("keep 1021 is 1021 weights of 2 layers, where 1020", perceptron, {"keep": 1021}),
        ("keep 1 is 1 weights of 2 layers", perceptron, {"keep": 1}),
        ("keep 0.7 is 714 weights of 2 layers, where 612", already_sparse, {"keep": 0.7}),
        ("does not divide", perceptron, {"keep": 40, "scope": "local"}),
        ("'gradeint' is unknown: did you mean gradient", perceptron, {"score": "gradeint"}),
        ("scope 'locale' is unknown: did you mean local", perceptron, {"scope": "locale"}),
        ("give batches of a pruning set", perceptron, {"batches": None}),
        ("batches hold no sample", perceptron, {"batches": []}),
        ("layer '2' has weights that are NaN", _with_nan, {"score": "random"}),
        (
            "scores of layer '0' hold NaN",
            perceptron,
            {"batches": [(torch.full((1, 20), torch.nan), torch.zeros(1).long())]},
        ),
        ("no batch reached the layers unused", _Turned, {"layers": "unused", "score": "selection"}),
        ("does not depend on the layers unused", _Turned, {"layers": "unused"}),
        (r"shape \(1, 8, 20\) for 8 samples", _Turned, {"layers": "inner"}),
        ("has nothing to prune", nn.ReLU, {}),
        ("convolutions, which must be named", lambda: nn.Conv2d(1, 1, 1), {}),
        ("layer '0' is a convolution", lambda: nn.Sequential(nn.Conv2d(1, 1, 1)), {"layers": "0"}),
        (
            "2 groups",
            lambda: nn.Sequential(nn.Conv2d(2, 2, 1, groups=2)),
            {"layers": "0", "score": "random"},
        ),
        ("'7' matches none of 0, 2, 4", perceptron, {"layers": "7"}),
        ("shares its weight with 1", _tied, {}),
        (
            "blocks of",
            lambda: nn.Sequential(dst.SparseLinear(8, 8, density=0.5, block=(4, 4))),
            {"layers": "0"},
        ),
        (
            "computes its weight",
            lambda: nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(20, 5))),
            {"layers": "0"},
        ),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    message: str, make: Callable[[], nn.Module], options: dict[str, object]
) -> None:
    model = make()
    modules, training = list(model.modules()), model.training
    with pytest.raises(InputError, match=message) as caught:
        dst.prune(model, **{"keep": 0.1, "batches": batches, **options})
    assert "\n" not in str(caught.value)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert model.training == training
    assert not any(m._forward_hooks for m in modules)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be read")
@pytest.mark.parametrize("score", ["gradient", "magnitude-selection", "magnitude"])
def test_scores_take_four_bytes_a_weight(score: str) -> None:
    def model(size: int) -> nn.Module:
        return nn.Sequential(MAMLinear(size, size, beta=0.5), nn.Linear(size, 3))

    def data(size: int) -> list[tuple[Tensor, Tensor]]:
        return [(torch.randn(4, size), torch.randint(3, (4,)))]

    big, size = model(4096), 4096
    dst.prune(model(64), keep=0.5, score=score, batches=data(64))  # loads and compiles
    with PeakMemory(torch.device("cpu")) as peak:
        dst.prune(big, keep=0.002, score=score, batches=data(size))
    accumulators = 0 if score == "magnitude" else 4 * size**2
    assert peak.bytes is not None
    assert peak.bytes < 1.5 * accumulators + 40e6 * (not accumulators), f"{peak.bytes / 1e6:.0f} MB"
