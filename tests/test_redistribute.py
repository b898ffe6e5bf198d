"""Counts that move between layers, and between the groups of a layer."""

import dataclasses
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dst import (
    METHODS,
    DropGrow,
    InputError,
    SparseLinear,
    TopologyUpdater,
    UpdateSchedule,
    rigl,
    similarity,
    sparse_layers,
    sparsify,
)
from dst.drop import magnitude
from dst.parts import parts
from dst.redistribute import REDISTRIBUTIONS, apportion
from growth import Exact, LinearPairs, Momentum


def _by_hand(total: int, weights: list[int], limits: list[int]) -> list[int]:
    """Exact fractions; what does not fit anywhere is dealt out anew among the others."""
    shares, left, rest = [0] * len(limits), total, [i for i, n in enumerate(limits) if n]
    while left:
        weight = {i: Fraction(weights[i]) for i in rest}
        if not sum(weight.values()):
            weight = dict.fromkeys(rest, Fraction(1))
        exact = {i: left * weight[i] / sum(weight.values()) for i in rest}
        over = {i for i in rest if exact[i] >= limits[i]}
        for i in over:
            shares[i], left = limits[i], left - limits[i]
        if not over:
            whole = {i: int(exact[i]) for i in rest}
            missing = left - sum(whole.values())
            order = sorted(rest, key=lambda i: (whole[i] - exact[i], i))
            for i in rest:
                shares[i] = whole[i] + (i in order[:missing])
            break
        rest = [i for i in rest if i not in over]
    return shares


@settings(deadline=None, max_examples=400)
@given(st.lists(st.tuples(st.integers(0, 64), st.integers(0, 50)), min_size=1), st.floats(0, 1))
def test_apportioned_shares(entries: list[tuple[int, int]], fullness: float) -> None:
    weights, limits = [w for w, _ in entries], [n for _, n in entries]
    total = int(fullness * sum(limits))
    shares = apportion(total, [float(w) for w in weights], limits)
    assert sum(shares) == total
    assert all(0 <= share <= limit for share, limit in zip(shares, limits, strict=True))
    assert (
        sum(abs(a - b) for a, b in zip(shares, _by_hand(total, weights, limits), strict=True)) <= 2
    )


def test_apportioned_by_hand() -> None:
    assert apportion(10, [1, 1, 2], [9, 9, 9]) == [3, 2, 5]
    assert apportion(10, [1, 1, 8], [9, 9, 4]) == [3, 3, 4]
    assert apportion(7, [0, 0, 1], [9, 9, 3]) == [2, 2, 3]
    assert apportion(0, [1.0], [0]) == [0]
    with pytest.raises(InputError, match="5 connections do not fit into 4"):
        apportion(5, [1.0, 1.0], [2, 2])


def _model() -> nn.Sequential:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU())
    return sparsify(model.append(nn.Linear(12, 6)), density=0.3, distribution="erk", skip=())


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 20)).square().sum().backward()


@pytest.mark.parametrize("how", [name for name, f in REDISTRIBUTIONS.items() if f])
@pytest.mark.parametrize("regrow", [True, False])
def test_what_is_grown_follows_the_mean_of_each_layer(how: str, regrow: bool) -> None:
    model = _model()
    layers = sparse_layers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    growth = Momentum() if how == "momentum" else Exact()
    method = DropGrow(
        UpdateSchedule(3, 100, 0.4),
        magnitude,
        growth,
        regrow=regrow,
        redistribute=how,
        skips_step=False,
        keep_regrown=False,
    )
    updater = TopologyUpdater(model, optimizer, method)
    total = sum(layer.topology.alive for layer in layers.values())
    moved = False
    for step in range(1, 13):
        _step(model, optimizer)
        before = {n: layer.topology.alive for n, layer in layers.items()}
        room = {n: layer.topology.grid.size - before[n] for n, layer in layers.items()}
        if step % 3 == 0:
            means = {}
            for name, layer in layers.items():
                slots = layer.topology.slots.long()
                means[name] = {
                    "magnitude": layer.values.detach()[slots].abs().mean(),
                    "gradient": layer.values.grad[slots].abs().mean(),
                }.get(how)
            if how == "momentum":
                # The updater has not seen this step yet: do what it will do.
                seen = {n: updater.states[n].clone() for n in layers}
                records = updater._recorder.records()
                seen = {n: Momentum().observe(records[n], seen[n]) for n in layers}
                means = {
                    n: seen[n].flatten()[layer.topology.keys()].abs().mean()
                    for n, layer in layers.items()
                }
            share = method.schedule.fraction_at(step)
            dropped = {n: int(share * before[n]) for n in layers}
            limits = [room[n] + (dropped[n] if regrow else 0) for n in layers]
            if not regrow:
                dropped = {n: min(dropped[n], room[n]) for n in layers}
            expected = apportion(sum(dropped.values()), [float(means[n]) for n in layers], limits)
        updater.step()
        optimizer.step()
        after = {n: layer.topology.alive for n, layer in layers.items()}
        assert sum(after.values()) == total
        if step % 3 == 0:
            assert after == {
                n: before[n] - dropped[n] + e for (n, e) in zip(layers, expected, strict=True)
            }
            moved |= after != before
    assert moved
    for layer in layers.values():
        free = layer.topology.free_slots()
        assert not layer.values[free].any()
        assert not optimizer.state[layer.values]["momentum_buffer"][free].any()


def test_a_layer_without_room_gives_to_the_others() -> None:
    model = _model()
    layers = sparse_layers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = dataclasses.replace(
        rigl(UpdateSchedule(1, 100, 0.5, "constant")), redistribute="magnitude"
    )
    with torch.no_grad():
        layers["4"].values.mul_(1e6)
    updater = TopologyUpdater(model, optimizer, method)
    total = sum(layer.topology.alive for layer in layers.values())
    for _ in range(2):
        _step(model, optimizer)
        updater.step()
    assert layers["4"].density == 1.0
    assert sum(layer.topology.alive for layer in layers.values()) == total


def test_weights_without_a_finite_mean_are_refused() -> None:
    model = _model()
    method = dataclasses.replace(
        rigl(UpdateSchedule(1, 100, 0.5)), redistribute="gradient", growth=Exact()
    )
    for layer in sparse_layers(model).values():
        layer.values.grad = torch.full_like(layer.values, float("inf"))
    records = {
        name: LinearPairs(torch.randn(3, la.in_features), torch.randn(3, la.out_features))
        for name, la in sparse_layers(model).items()
    }
    with pytest.raises(InputError, match="layer '0' in what is grown became inf"):
        method.plan(sparse_layers(model), records, 1, {})


def test_redistribution_by_momentum_needs_one() -> None:
    model = _model()
    method = dataclasses.replace(similarity(UpdateSchedule(1, 9, 0.5)), redistribute="momentum")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    updater = TopologyUpdater(model, optimizer, method)
    _step(model, optimizer)
    with pytest.raises(InputError, match="needs growth by momentum"):
        updater.step()


# Groups of rows.


def _grouped(groups: int, block: tuple[int, int] = (1, 1)) -> SparseLinear:
    torch.manual_seed(4)
    return SparseLinear(10, 12, density=0.4, block=block, row_groups=groups)


@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
@pytest.mark.parametrize("make", [rigl, similarity])
def test_a_group_is_planned_like_a_layer_of_its_own(make, block: tuple[int, int]) -> None:
    """Three groups of four outputs against three layers of four outputs."""
    whole = _grouped(3, block)
    own = parts({"fc": whole})
    assert [part.name for part in own] == ["fc[0]", "fc[1]", "fc[2]"]
    assert len({part.alive for part in own}) == 1
    method = make(UpdateSchedule(1, 9, 0.5, "constant"))
    x, dz = torch.randn(5, 10), torch.randn(5, 12)
    change = method.plan({"fc": whole}, {"fc": LinearPairs(x, dz)}, 1, {})["fc"]
    dropped, grown, flops = [], [], 0
    for at, part in enumerate(own):
        layer = SparseLinear(10, 4, keys=part.keys(), block=block)
        with torch.no_grad():
            layer.values[layer.topology.slots.long()] = part.take(whole.values.detach())
        records = {"fc": LinearPairs(x, dz[:, 4 * at : 4 * at + 4])}
        alone = method.plan({"fc": layer}, records, 1, {})["fc"]
        dropped.append(alone.dropped + part.offset)
        grown.append(alone.grown + part.offset)
        flops += alone.flops
    assert torch.equal(change.dropped, torch.cat(dropped)) and change.dropped.numel()
    assert torch.equal(change.grown, torch.cat(grown))
    assert change.flops == flops > 0


def test_groups_keep_their_counts_under_random_growth_and_momentum() -> None:
    for name in ("set", "snfs"):
        model = nn.Sequential(_grouped(3))
        layer = model[0]
        method = METHODS[name].build(UpdateSchedule(1, 50, 0.5), 0)
        if name == "snfs":
            method = dataclasses.replace(method, redistribute="none")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        updater = TopologyUpdater(model, optimizer, method)
        first = layer.topology.keys()
        before = [part.alive for part in parts({"0": layer})]
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(6, 10)).square().sum().backward()
            updater.step()
            optimizer.step()
        assert [part.alive for part in parts({"0": layer})] == before
        assert not torch.equal(layer.topology.keys(), first)
