"""Density that changes over a run."""

import dataclasses

import pytest
import torch
from torch import nn

import dst
from dst import DensityRamp, InputError, UpdateSchedule, density_ramp, sparse_layers, sparsify
from dst.parts import parts


def test_counts_by_hand() -> None:
    cubic = DensityRamp({"a": 1000}, {"a": 200}, end=10)
    assert [cubic.at("a", step) for step in (0, 5, 9, 10, 99)] == [1000, 300, 201, 200, 200]
    linear = DensityRamp({"a": 100}, {"a": 300}, end=4, shape="linear")
    assert [linear.at("a", step) for step in (0, 1, 2, 3, 4)] == [100, 150, 200, 250, 300]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (({}, {}, 0), "must end at step 1 or later"),
        (({"a": 1}, {}, 3), "'a'"),
        (({}, {}, 3, "square"), "'square' is unknown: choose cubic, linear"),
    ],
)
def test_ramps_that_cannot_be(arguments, words: str) -> None:
    with pytest.raises(InputError, match=words):
        DensityRamp(*arguments)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 24), nn.Linear(24, 4)
    )


def _train(model: nn.Module, method: dst.DropGrow, steps: int) -> list[dict[str, int]]:
    """Alive blocks of every layer after each step; checks slots, values and state on the way."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    updater = dst.TopologyUpdater(model, optimizer, method)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(3, 2, 4, 4)).square().mean().backward()
        if not updater.step():
            optimizer.step()
        for layer in sparse_layers(model).values():
            free = layer.topology.free_slots()
            assert not layer.values[free].any()
            for state in optimizer.state[layer.values].values():
                assert state.shape == layer.values.shape and not state[free].any()
            assert layer.topology.capacity <= 2 * layer.topology.alive
        seen.append({n: la.topology.alive for n, la in sparse_layers(model).items()})
    return seen


@pytest.mark.parametrize("name", ["set", "rigl", "snfs", "similarity"])
@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize(("start", "final"), [(1.0, 0.1), (0.6, 0.2), (0.1, 0.5)])
def test_every_method_follows_the_ramp(name: str, block: int, start: float, final: float) -> None:
    kind = {"distribution": "erk", "block": block, "skip": ()}
    model = sparsify(_net(), density=start, ramp_to=final, **kind)
    # The other end only says which layers are sparse at all.
    reference = sparsify(_net(), density=final, ramp_to=min(start, 0.99), **kind)
    assert abs(dst.model_density(model) - start) < 0.02
    ramp = density_ramp(model, to=final, end=8, distribution="erk")
    method = dst.METHODS[name].build(UpdateSchedule(2, 100, 0.3), 0)
    seen = _train(model, dataclasses.replace(method, ramp=ramp), 10)
    for step, alive in enumerate(seen, 1):
        wanted = {n: ramp.at(n, step - step % 2) for n in alive}
        if name == "snfs":  # moves them between layers, not beyond the sum
            assert sum(alive.values()) == sum(wanted.values())
        else:
            assert alive == wanted
    # Counts are those of a network that begins at the final density.
    expected = {n: la.topology.alive for n, la in sparse_layers(reference).items()}
    if name == "snfs":
        assert sum(seen[-1].values()) == sum(expected.values())
    else:
        assert seen[-1] == expected
    assert abs(dst.model_density(model) - final) < 0.02


def test_layers_that_are_dense_at_one_end_only() -> None:
    """At .6 ERK makes the last layer dense; it must be able to lose connections."""
    model = sparsify(_net(), density=0.6, ramp_to=0.1, distribution="erk", skip=())
    layers = sparse_layers(model)
    assert set(layers) == {"0", "3", "4"} and layers["4"].density == layers["0"].density == 1.0
    kept_dense = sparsify(_net(), density=0.6, distribution="erk", skip=())
    assert set(sparse_layers(kept_dense)) == {"3"}


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk"])
def test_dense_at_the_start_is_the_dense_network(distribution: str) -> None:
    model = sparsify(_net(), density=1.0, ramp_to=0.3, distribution=distribution, skip=())
    x = torch.randn(2, 2, 4, 4)
    assert torch.allclose(model(x), _net()(x), atol=1e-6)


def test_groups_of_rows_share_the_ramp() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = sparsify(nn.ModuleDict({"a": attention}), density=0.8, ramp_to=0.25, skip=())
    layer = sparse_layers(model)["a.in_proj"]
    ramp = density_ramp(model, to=0.25, end=4)
    method = dataclasses.replace(dst.similarity(UpdateSchedule(1, 9, 0.2)), ramp=ramp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    updater = dst.TopologyUpdater(model, optimizer, method)
    for _ in range(4):
        x = torch.randn(2, 5, 8)
        optimizer.zero_grad()
        model["a"](x, x, x)[0].square().mean().backward()
        updater.step()
        alive = [part.alive for part in parts({"a": layer})]
        assert max(alive) - min(alive) <= 1
    assert alive == [8] * 6  # a quarter of 4 x 8


@pytest.mark.parametrize(("density", "ramp_to"), [(1.2, 0.1), (0.0, 0.1), (0.5, 1.0), (0.5, -1.0)])
def test_densities_that_cannot_be(density: float, ramp_to: float) -> None:
    with pytest.raises(InputError, match="density"):
        sparsify(_net(), density=density, ramp_to=ramp_to)


@pytest.mark.parametrize("to", [1.5, 1.0, 0.0, -1.0, float("nan")])
def test_ramps_to_densities_that_cannot_be(to: float) -> None:
    model = sparsify(_net(), density=0.5, ramp_to=0.2, distribution="erk")
    with pytest.raises(InputError, match="strictly between 0 and 1"):
        density_ramp(model, to=to, end=3, distribution="erk")
    with pytest.raises(InputError, match="'erks' is unknown"):
        density_ramp(model, to=0.2, end=3, distribution="erks")


def test_products_are_chosen_anew_along_the_ramp() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024))
    layer = sparsify(model, density=1.0, ramp_to=0.02, skip=())[0]
    x = torch.randn(4096, 1024)
    layer(x)
    first = layer.chosen
    assert first.alive == 1024 * 1024 and first.way == "dense"
    keys = layer.topology.keys()
    layer.topology.edit(dst.Change(keys[1024 * 1000 :], keys[:0]))
    layer(x)
    assert layer.chosen is first  # 2 % fewer
    layer.topology.edit(dst.Change(keys[1024 * 20 : 1024 * 1000], keys[:0]))
    layer(x)
    assert layer.chosen.alive == 1024 * 20 and layer.chosen.way == "sparse"


def test_a_model_whose_counts_changed_loads_into_a_fresh_one() -> None:
    model = sparsify(_net(), density=0.3, skip=())
    method = dst.METHODS["snfs"].build(UpdateSchedule(2, 100, 0.5), 0)
    _train(model, method, 10)
    fresh = sparsify(_net(), density=0.3, skip=())
    before = {n: la.topology.capacity for n, la in sparse_layers(fresh).items()}
    assert before != {n: la.topology.capacity for n, la in sparse_layers(model).items()}
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(2, 2, 4, 4)
    assert torch.equal(fresh(x), model(x))
    _train(fresh, method, 4)
    # And back: room that is not needed goes as well.
    again = sparsify(_net(), density=0.3, skip=())
    fresh.load_state_dict(again.state_dict())
    assert torch.equal(fresh(x), again(x))
    assert before == {n: la.topology.capacity for n, la in sparse_layers(fresh).items()}


def test_a_final_density_that_rounds_to_no_block_names_the_layer() -> None:
    model = sparsify(_net(), density=0.5, ramp_to=0.002, skip=())
    with pytest.raises(InputError, match="layer '0', at the ramp's end"):
        density_ramp(model, to=0.002, end=3)
