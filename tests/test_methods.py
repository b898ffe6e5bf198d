"""What holds for every method of ``dst.METHODS``, and what drop and grow promises in particular."""

import copy
import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dst import (
    METHODS,
    Change,
    DropGrow,
    InputError,
    SparseLayer,
    TopologyUpdater,
    Unchanging,
    UpdateSchedule,
    resize,
    rigl,
    similarity,
    sparse_evolutionary_training,
    sparse_layers,
    sparsify,
)
from dst.methods import Method
from dst.methods.base import Choices, States
from growth import Exact, Pairs

# name -> layer changes of one update
Changes = dict[str, Change]

CHANGING = [name for name, entry in METHODS.items() if entry.defaults is not None]


class _Net(nn.Module):
    """Ragged sizes on purpose: 3 channels and 9 outputs do not divide by a block of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2)
        self.fc1 = nn.Linear(32, 9)
        self.fc2 = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def _net(block: int = 1, density: float = 0.4, free: int = 0) -> nn.Module:
    torch.manual_seed(1)
    model = sparsify(_Net().double(), density=density, block=block, skip=(), seed=3)
    for layer in sparse_layers(model).values():
        resize(layer, None, layer.topology.capacity + free)
    return model


def _batch(seed: int, size: int = 6) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, 6, 6, dtype=torch.float64, generator=random)
    return x, torch.randint(4, (size,), generator=random)


def _sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def _backward(model: nn.Module, optimizer: torch.optim.Optimizer, *batches: Any) -> Tensor:
    """Gradient of the mean loss over micro-batches of one size."""
    optimizer.zero_grad()
    loss = torch.zeros(())
    for x, y in batches:
        loss = F.cross_entropy(model(x), y) / len(batches)
        loss.backward()
    return loss.detach()


def _topologies(model: nn.Module) -> dict[str, list[int]]:
    return {name: la.topology.keys().tolist() for name, la in sparse_layers(model).items()}


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}


def _same_changes(a: Changes, b: Changes) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[n].dropped, b[n].dropped) and torch.equal(a[n].grown, b[n].grown) for n in a
    )


class _Witness:
    """A method as it is, whose every plan is checked and kept."""

    def __init__(self, method: Method, model: nn.Module) -> None:
        self.method, self.model = method, model
        self.skips_step, self.observes = method.skips_step, method.observes
        self.average_decay = method.average_decay
        self.observe, self.audit = method.observe, method.audit
        self.due, self.recording = method.due, method.recording
        self.initial_blocks = method.initial_blocks
        self.plans: list[Changes] = []

    def plan(
        self,
        layers: Mapping[str, SparseLayer],
        records: Mapping[str, Pairs],
        step: int,
        states: States,
        choices: Choices,
    ) -> Changes:
        before, random = _copied(self.model.state_dict()), torch.get_rng_state()
        gradients = {n: p.grad.clone() for n, p in self.model.named_parameters()}
        kept = _copied(states)
        plan = self.method.plan(layers, records, step, states, choices)
        assert _same_changes(plan, self.method.plan(layers, records, step, states, choices))
        assert all(torch.equal(kept[name], state) for name, state in states.items())
        after = self.model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before if k in after)
        assert all(torch.equal(gradients[n], p.grad) for n, p in self.model.named_parameters())
        assert torch.equal(random, torch.get_rng_state())

        assert plan.keys() == layers.keys()
        for name, change in plan.items():
            self._check(change, layers[name], step)
        assert sum(change.dropped.numel() for change in plan.values()) == sum(
            change.grown.numel() for change in plan.values()
        )
        self.plans.append(plan)
        return plan

    def _check(self, change: Change, layer: SparseLayer, step: int) -> None:
        for keys in (change.dropped, change.grown):
            assert keys.dtype == torch.int64 and keys.dim() == 1
            assert bool((keys.diff() > 0).all())
        alive, grid = set(layer.topology.keys().tolist()), layer.topology.grid
        dropped, grown = set(change.dropped.tolist()), set(change.grown.tolist())
        assert dropped <= alive
        assert all(0 <= key < grid.size for key in grown)
        assert not grown & (alive - dropped)
        assert isinstance(self.method, DropGrow)
        if self.method.redistribute != "none":
            return
        assert len(dropped) == len(grown)
        expected = math.floor(self.method.schedule.fraction_at(step) * len(alive))
        if self.method.keep_regrown:
            assert not grown & dropped
            assert len(grown) <= expected
        else:
            assert len(grown) == expected


@pytest.mark.parametrize(
    ("name", "keep_regrown"),
    [*((name, True) for name in METHODS), *((name, False) for name in CHANGING)],
)
@pytest.mark.parametrize("block", [1, 2])
def test_every_method_keeps_its_promises(name: str, block: int, keep_regrown: bool) -> None:
    entry = METHODS[name]
    torch.manual_seed(1)
    model = _net(block, free=2) if entry.sparse else _Net().double()
    method = entry.build(UpdateSchedule(2, 24, 0.4), 0)
    if isinstance(method, DropGrow):
        method = dataclasses.replace(method, keep_regrown=keep_regrown)
        witness = _Witness(method, model)
    optimizer = _sgd(model)
    changing = isinstance(method, DropGrow)
    moves = changing and method.redistribute != "none"
    updater = TopologyUpdater(model, optimizer, witness if changing else method)
    layers = sparse_layers(model)
    alive = {n: (la.topology.alive, la.alive) for n, la in layers.items()}
    first = _topologies(model)
    total = sum(blocks for blocks, _ in alive.values())
    for step in range(1, 21):
        loss = _backward(model, optimizer, _batch(step))
        assert bool(loss.isfinite())
        replaced = updater.step()
        assert replaced == (changing and method.skips_step and step % 2 == 0)
        if not replaced:
            optimizer.step()
        assert sum(layer.topology.alive for layer in layers.values()) == total
        for n, layer in layers.items():
            free = layer.topology.free_slots()
            if not moves:
                # In weights, a ragged block may be grown for a whole one: not in blocks.
                assert layer.topology.alive == alive[n][0]
                assert layer.alive == alive[n][1] or block != 1
                assert free.numel() == 2
            assert not layer.values[free].any()
            assert not layer.values.grad[free].any()
            # Padding of edge blocks: what is stored is what the dense weight shows.
            assert layer.values.count_nonzero() == layer.dense_weight().count_nonzero()
            assert not optimizer.state[layer.values].get("momentum_buffer", free)[free].any()
    if changing:
        assert len(witness.plans) == 10
        assert _topologies(model) != first
    else:
        assert _topologies(model) == first
        assert not updater.recording


@pytest.mark.parametrize("name", CHANGING)
def test_two_runs_are_equal_and_another_seed_is_not_for_random_growth(name: str) -> None:
    def run(seed: int) -> dict[str, list[int]]:
        model = _net()
        optimizer = _sgd(model)
        updater = TopologyUpdater(
            model, optimizer, METHODS[name].build(UpdateSchedule(2, 9, 0.4), seed)
        )
        for step in range(4):
            _backward(model, optimizer, _batch(step))
            if not updater.step():
                optimizer.step()
        return _topologies(model)

    assert run(0) == run(0)
    assert (run(0) != run(1)) == (name == "set")


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("name", ["rigl", "similarity"])
def test_averaging_over_steps_equals_one_update_over_the_joined_batch(
    name: str, block: int
) -> None:
    batches = [_batch(step) for step in range(3)]
    joined = (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))

    def run(average: int, steps: list[Any]) -> dict[str, list[int]]:
        model = _net(block)
        optimizer = _sgd(model, lr=0.0)  # so that all three steps have the same weights
        method = METHODS[name].build(UpdateSchedule(3, 9, 0.4, average=average), 0)
        updater = TopologyUpdater(model, optimizer, method)
        for at, batch in enumerate(steps):
            assert updater.recording == (at >= 3 - average)
            _backward(model, optimizer, batch)
            if not updater.step():
                optimizer.step()
        assert updater.last is not None and updater.last.step == 3
        return _topologies(model)

    averaged = run(3, batches)
    assert averaged == run(1, [batches[0], batches[1], joined])
    assert averaged != run(1, batches)


class _Listener(_Witness):
    """Keeps the gradients that its plans search."""

    def plan(
        self,
        layers: Mapping[str, SparseLayer],
        records: Mapping[str, Pairs],
        step: int,
        states: States,
        choices: Choices,
    ) -> Changes:
        self.gradients = {name: p.products(0, p.n_out) for name, p in records.items()}
        return super().plan(layers, records, step, states, choices)


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_the_average_decays_with_every_step(decay: float, micro: int) -> None:
    """With every step, not with every micro-batch of one."""
    steps = [[_batch(10 * step + i) for i in range(micro)] for step in range(6)]

    def gradients(schedule: UpdateSchedule, batches: list[Any]) -> list[dict[str, Tensor]]:
        model = _net()
        optimizer = _sgd(model, lr=0.0)
        listener = _Listener(rigl(schedule), model)
        updater = TopologyUpdater(model, optimizer, listener)
        found = []
        for batch in batches:
            _backward(model, optimizer, *batch)
            assert updater.holds_records == updater.recording
            updater.step()
            if updater.last is not None and updater.last.step == updater.steps:
                found.append(listener.gradients)
        return found

    # Zero learning rate, and updates that change nothing: all steps have the same weights.
    averaging = UpdateSchedule(3, 99, 1e-9, average=3, average_decay=decay)
    each = gradients(UpdateSchedule(1, 99, 1e-9), steps)
    averaged = gradients(averaging, steps)
    assert len(averaged) == 2 and len(each) == 6
    for at, found in enumerate(averaged):
        first, second, third = each[3 * at : 3 * at + 3]
        for name, gradient in found.items():
            expected = decay**2 * first[name] + decay * second[name] + third[name]
            torch.testing.assert_close(gradient, expected)


@dataclasses.dataclass
class _Told:
    """Decides in each layer by its name's length; keeps what it was told."""

    told: list[Any] = dataclasses.field(default_factory=list)
    needs_pairs, observes = True, False

    def __call__(self, pairs: Any, count: int, active: Tensor, **options: Any) -> Any:
        self.told.append(options["state"])
        found = Exact()(pairs, count, active, block=options["block"])
        return found._replace(report={"search": "told"}, state=f"{pairs.n_out} outputs")


def test_what_growth_decides_is_kept_and_told_again() -> None:
    model = _net()
    optimizer, strategy = _sgd(model), _Told()
    method = dataclasses.replace(similarity(UpdateSchedule(2, 9, 0.4)), growth=strategy)
    updater = TopologyUpdater(model, optimizer, method)
    for step in range(4):
        _backward(model, optimizer, _batch(step))
        updater.step()
        optimizer.step()
    expected = {"conv1": "6 outputs", "conv2": "8 outputs", "fc1": "9 outputs", "fc2": "4 outputs"}
    assert strategy.told == [*[None] * 4, *expected.values()]
    assert updater.choices == updater.state_dict()["choices"] == expected
    assert updater.last is not None
    assert {name: search.choice for name, search in updater.last.searches.items()} == expected
    twin = TopologyUpdater(model, optimizer, method)
    assert twin.choices == {}
    twin.load_state_dict(updater.state_dict())
    assert twin.choices == expected and twin.updates == 2


def test_nothing_is_decided_where_nothing_is_grown() -> None:
    model = _net()
    optimizer, strategy = _sgd(model), _Told()
    method = dataclasses.replace(similarity(UpdateSchedule(1, 9, 1e-9)), growth=strategy)
    updater = TopologyUpdater(model, optimizer, method)
    for step in range(2):
        _backward(model, optimizer, _batch(step))
        updater.step()
    assert updater.choices == {} and set(strategy.told) == {None}


@pytest.mark.parametrize("name", CHANGING)
def test_gradient_accumulation_equals_the_full_batch(name: str) -> None:
    def run(micro: int) -> nn.Module:
        model = _net()
        optimizer = _sgd(model)
        updater = TopologyUpdater(
            model, optimizer, METHODS[name].build(UpdateSchedule(2, 12, 0.4), 0)
        )
        for step in range(6):
            x, y = _batch(step)
            _backward(model, optimizer, *zip(x.chunk(micro), y.chunk(micro), strict=True))
            if not updater.step():
                optimizer.step()
        return model

    whole, halves = run(1), run(2)
    assert _topologies(whole) == _topologies(halves)
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def _one_update(method: DropGrow, model: nn.Module, lr: float = 0.05) -> TopologyUpdater:
    """A step of SGD, then one that updates; the optimizer does not step after the update."""
    optimizer = _sgd(model, lr)
    updater = TopologyUpdater(model, optimizer, method)
    _backward(model, optimizer, _batch(0))
    updater.step()
    optimizer.step()
    _backward(model, optimizer, _batch(1))
    updater.step()
    return updater


def _regrowth(keep: bool) -> tuple[dict[str, Tensor], nn.Module, TopologyUpdater, Changes]:
    """One update that drops most and grows it over everything, so that much comes back."""
    model = _net(density=0.6)
    method = dataclasses.replace(rigl(UpdateSchedule(2, 9, 0.9, "constant")), keep_regrown=keep)
    witness = _Witness(method, model)
    optimizer = _sgd(model)
    updater = TopologyUpdater(model, optimizer, witness)
    _backward(model, optimizer, _batch(0))
    updater.step()
    optimizer.step()
    _backward(model, optimizer, _batch(1))
    before = {n: la.dense_weight().detach() for n, la in sparse_layers(model).items()}
    updater.step()
    return before, model, updater, witness.plans[0]


def _scattered(layer: SparseLayer, tensor: Tensor) -> Tensor:
    """Per-slot values at their keys, flat."""
    flat = torch.zeros(layer.topology.grid.size, dtype=tensor.dtype)
    flat[layer.topology.keys()] = tensor.detach().view(-1)[layer.topology.slots.long()]
    return flat


def test_a_regrown_connection_goes_on_or_starts_afresh() -> None:
    _, kept, kept_updater, kept_plan = _regrowth(keep=True)
    _, fresh, fresh_updater, fresh_plan = _regrowth(keep=False)
    assert _topologies(kept) == _topologies(fresh)
    came_back = 0
    for name, plan in fresh_plan.items():
        back = plan.grown[torch.isin(plan.grown, plan.dropped)]
        came_back += back.numel()
        assert not torch.isin(back, kept_plan[name].dropped).any()
        for model, updater, goes_on in (
            (kept, kept_updater, True),
            (fresh, fresh_updater, False),
        ):
            layer = sparse_layers(model)[name]
            velocity = updater.optimizer.state[layer.values]["momentum_buffer"]
            for tensor in (layer.values, velocity, layer.values.grad):
                assert bool((_scattered(layer, tensor)[back] != 0).any()) == goes_on, name
    assert came_back > 50


def test_survivors_keep_their_weights_in_an_update() -> None:
    before, model, _, plan = _regrowth(keep=True)
    for name, layer in sparse_layers(model).items():
        after = layer.dense_weight().detach()
        changed = int((before[name] != after).sum())
        assert changed <= plan[name].dropped.numel()
        assert bool((after[before[name] != after] == 0).all())


@pytest.mark.parametrize("name", CHANGING)
def test_without_regrowth_the_dropped_stay_away_and_no_more_is_dropped_than_can_grow(
    name: str,
) -> None:
    method = METHODS[name].build(UpdateSchedule(2, 9, 0.5, "constant"), 0)
    assert isinstance(method, DropGrow)
    method = dataclasses.replace(method, regrow=False, keep_regrown=False)
    model = _net(density=0.9)
    before = {n: set(keys) for n, keys in _topologies(model).items()}
    _one_update(method, model)
    for n, keys in _topologies(model).items():
        size = sparse_layers(model)[n].topology.grid.size
        expected = min(math.floor(0.5 * len(before[n])), size - len(before[n]))
        assert 0 < expected < math.floor(0.5 * len(before[n]))
        assert len(keys) == len(before[n])
        assert len(set(keys) - before[n]) == len(before[n] - set(keys)) == expected


@pytest.mark.parametrize("block", [1, 2])
def test_random_initialisation_of_grown_connections(block: int) -> None:
    method = sparse_evolutionary_training(UpdateSchedule(2, 9, 0.4))
    method = dataclasses.replace(method, grown_init="random")
    models = [_net(block, free=1) for _ in range(2)]
    before = {n: set(keys) for n, keys in _topologies(models[0]).items()}
    for model in models:
        _one_update(method, model)
    for name, layer in sparse_layers(models[0]).items():
        twin = sparse_layers(models[1])[name]
        assert torch.equal(layer.values, twin.values)
        topology = layer.topology
        new = torch.tensor([key not in before[name] for key in topology.keys().tolist()])
        assert new.any()
        slots = topology.slots.long()[new]
        grown = layer.values.detach()[slots]
        assert bool(grown.flatten(1).any(1).all())
        assert grown.abs().max() <= topology.fan_in()[topology.fan_in() > 0].min() ** -0.5
        assert (grown > 0).any() and (grown < 0).any()
        # Neither padding nor free slots may get a value.
        assert layer.values.count_nonzero() == layer.dense_weight().count_nonzero()
        velocity = torch.zeros_like(grown)
        assert torch.equal(layer.values.grad[slots], velocity)


def test_zero_initialisation_of_grown_connections() -> None:
    model = _net()
    before = {n: set(keys) for n, keys in _topologies(model).items()}
    _one_update(rigl(UpdateSchedule(2, 9, 0.4)), model)
    for name, layer in sparse_layers(model).items():
        new = [k for k in layer.topology.keys().tolist() if k not in before[name]]
        assert new and not _scattered(layer, layer.values)[new].any()


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("name", CHANGING)
def test_an_update_replaces_the_step_or_not(name: str, skips: bool) -> None:
    method = METHODS[name].build(UpdateSchedule(2, 5, 0.3), 0)
    assert isinstance(method, DropGrow)
    assert method.skips_step == (name == "rigl")  # as each paper has it
    model = _net()
    optimizer = _sgd(model)
    updater = TopologyUpdater(model, optimizer, dataclasses.replace(method, skips_step=skips))
    returned = []
    for step in range(6):
        _backward(model, optimizer, _batch(step))
        returned.append(updater.step())
    assert returned == [False, skips, False, skips, False, False]


@dataclasses.dataclass(frozen=True)
class _Scripted(Unchanging):
    """Does one after the other what it was given, an update at every step."""

    changes: tuple[Changes, ...] = ()

    def due(self, step: int) -> bool:
        return True

    def plan(
        self,
        layers: Mapping[str, SparseLayer],
        records: Mapping[str, Pairs],
        step: int,
        states: States,
        choices: Choices = MappingProxyType({}),
    ) -> Changes:
        return self.changes[step - 1]


def test_a_method_may_drop_and_grow_different_numbers() -> None:
    model = _net()
    layer = sparse_layers(model)["fc1"]
    optimizer = _sgd(model)
    _backward(model, optimizer, _batch(0))
    optimizer.step()
    keys = layer.topology.keys()
    inactive = torch.tensor(sorted(set(range(layer.topology.grid.size)) - set(keys.tolist())))
    less = {"fc1": Change(keys[2:9], inactive[:2])}
    more = {"fc1": Change(keys[20:21], inactive[2:7])}
    taken = {*keys.tolist(), *inactive[:7].tolist()} - {*keys[2:9].tolist(), int(keys[20])}
    many = torch.tensor(sorted(set(range(layer.topology.grid.size)) - taken))[:3]
    too_many = {"fc1": Change(keys[:0], many)}
    updater = TopologyUpdater(model, optimizer, _Scripted(changes=(less, more, too_many)))
    velocity = optimizer.state[layer.values]["momentum_buffer"]
    for change, free in ((less, 5), (more, 1)):
        _backward(model, optimizer, _batch(1))
        assert not updater.step()
        slots = layer.topology.free_slots()
        assert slots.numel() == free
        for tensor in (layer.values, layer.values.grad, velocity):
            assert not tensor[slots].any()
        grown = layer.topology.slots.long()[layer.topology.find(change["fc1"].grown)]
        for tensor in (layer.values, layer.values.grad, velocity):
            assert not tensor[grown].any()
        optimizer.step()
        assert not layer.values[slots].any()
    assert layer.topology.alive == keys.numel() - 1
    # More than fits reallocates the values; the step that follows still has its gradient.
    _backward(model, optimizer, _batch(1))
    kept, gradient = layer.dense_weight(), _scattered(layer, layer.values.grad)
    assert not updater.step() and updater.last is not None and updater.last.resized
    assert layer.topology.alive == layer.topology.capacity == keys.numel() + 2
    assert torch.equal(layer.dense_weight(), kept)
    assert torch.equal(_scattered(layer, layer.values.grad), gradient)
    optimizer.step()
    assert not torch.equal(layer.dense_weight(), kept)


def test_a_layer_too_small_to_drop_from_is_left_alone() -> None:
    # floor(0.3 x 3) = 0 of the last layer, while the first one changes.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 1))
    sparsify(model, density=0.5, skip=())
    first = _topologies(model)
    optimizer = _sgd(model)
    updater = TopologyUpdater(model, optimizer, rigl(UpdateSchedule(1, 9, 0.3, "constant")))
    optimizer.zero_grad()
    model(torch.randn(5, 10)).square().mean().backward()
    assert updater.step()
    assert updater.last is not None and updater.last.grown["1"] == 0
    assert _topologies(model)["1"] == first["1"]
    assert _topologies(model)["0"] != first["0"]


def test_explored_share_counts_what_was_ever_alive() -> None:
    model = _net()
    optimizer = _sgd(model)
    method = sparse_evolutionary_training(UpdateSchedule(1, 9, 0.4))
    updater = TopologyUpdater(model, optimizer, method)
    ever = {n: set(keys) for n, keys in _topologies(model).items()}
    for step in range(4):
        _backward(model, optimizer, _batch(step))
        updater.step()
        optimizer.step()
        for n, keys in _topologies(model).items():
            ever[n] |= set(keys)
    sizes = {n: la.topology.grid.size for n, la in sparse_layers(model).items()}
    assert updater.explored() == {n: len(keys) / sizes[n] for n, keys in ever.items()}
    total = sum(len(keys) for keys in ever.values()) / sum(sizes.values())
    assert updater.explored_share() == pytest.approx(total)
    assert total > 0.45


def test_updater_resumes_where_it_was_saved() -> None:
    def updater_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> TopologyUpdater:
        return TopologyUpdater(model, optimizer, rigl(UpdateSchedule(2, 20, 0.4, average=2)))

    model = _net()
    optimizer = _sgd(model)
    updater = updater_of(model, optimizer)
    for step in range(4):
        _backward(model, optimizer, _batch(step))
        if not updater.step():
            optimizer.step()
    again = _net()
    again.load_state_dict(model.state_dict())
    resumed_optimizer = _sgd(again)
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = updater_of(again, resumed_optimizer)
    resumed.load_state_dict(updater.state_dict())
    assert resumed.recording == updater.recording
    for step in range(4, 8):
        for m, o, u in ((model, optimizer, updater), (again, resumed_optimizer, resumed)):
            _backward(m, o, _batch(step))
            if not u.step():
                o.step()
    assert _topologies(model) == _topologies(again)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert updater.explored() == resumed.explored()
    # In the middle of an average there is something that no checkpoint holds.
    _backward(model, optimizer, _batch(8))
    updater.step()
    with pytest.raises(RuntimeError, match="save after it"):
        updater.state_dict()


def test_models_without_sparse_layers() -> None:
    model = _Net().double()
    optimizer = _sgd(model)
    with pytest.raises(InputError, match="_Net has no sparse layer to update"):
        TopologyUpdater(model, optimizer, rigl(UpdateSchedule(2, 9, 0.3)))
    updater = TopologyUpdater(model, optimizer, Unchanging())
    _backward(model, optimizer, _batch(0))
    assert not updater.step()
    assert updater.explored_share() == 0.0


def test_optimizer_built_before_sparsify_is_refused() -> None:
    model = _Net().double()
    optimizer = _sgd(model)
    sparsify(model, density=0.4, skip=())
    with pytest.raises(InputError, match="values of layer 'conv1': build it after"):
        TopologyUpdater(model, optimizer, rigl(UpdateSchedule(2, 9, 0.3)))


@pytest.mark.parametrize("name", CHANGING)
def test_a_layer_that_is_not_used_is_named_where_its_vectors_are_needed(name: str) -> None:
    class Partly(_Net):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(32, 9)

    torch.manual_seed(0)
    model = sparsify(Partly().double(), density=0.4, skip=())
    optimizer = _sgd(model)
    updater = TopologyUpdater(model, optimizer, METHODS[name].build(UpdateSchedule(1, 9, 0.3), 0))
    before = _topologies(model)
    _backward(model, optimizer, _batch(0))
    if name == "set":  # grows at random, and needs none
        updater.step()
        assert _topologies(model)["idle"] != before["idle"]
        return
    with pytest.raises(InputError, match="'idle' was not recorded"):
        updater.step()
    assert _topologies(model) == before


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", CHANGING)
def test_broken_weights_are_refused(name: str, poison: float) -> None:
    model = _net(free=1)
    optimizer = _sgd(model)
    updater = TopologyUpdater(model, optimizer, METHODS[name].build(UpdateSchedule(1, 9, 0.3), 0))
    before = _topologies(model)
    _backward(model, optimizer, _batch(0))
    layer = sparse_layers(model)["fc1"]
    with torch.no_grad():
        layer.values[layer.topology.slots[3].long()] = poison
    with pytest.raises(InputError, match="weights of layer 'fc1' hold NaN or inf"):
        updater.step()
    assert _topologies(model) == before


@pytest.mark.parametrize("where", ["sparse weight", "dense bias"])
@pytest.mark.parametrize("name", CHANGING)
def test_a_gradient_that_is_not_finite_skips_the_update(name: str, where: str) -> None:
    model = _net()
    optimizer = _sgd(model)
    updater = TopologyUpdater(model, optimizer, METHODS[name].build(UpdateSchedule(1, 9, 0.3), 0))
    before = _topologies(model)
    _backward(model, optimizer, _batch(0))
    layer = sparse_layers(model)["conv2"]
    (layer.values if where == "sparse weight" else layer.bias).grad[0] = math.nan
    assert not updater.step()
    assert updater.skipped == 1 and updater.last is None
    assert _topologies(model) == before
    assert not updater.holds_records
    _backward(model, optimizer, _batch(1))
    updater.step()
    assert updater.skipped == 1 and _topologies(model) != before


def test_a_compiled_model_runs_eagerly_while_recording_and_sees_every_change() -> None:
    def run(compiled: bool) -> tuple[nn.Module, list[float]]:
        model = _net()
        # What is at stake is the capture, and not what the default compiler makes of it.
        fast = torch.compile(model, backend="eager") if compiled else model
        optimizer = _sgd(model)
        updater = TopologyUpdater(fast, optimizer, rigl(UpdateSchedule(3, 20, 0.4)))
        losses = []
        for step in range(9):
            forward = model if updater.recording else fast
            assert updater.recording == (step % 3 == 2)
            losses.append(float(_backward(forward, optimizer, _batch(step))))
            if not updater.step():
                optimizer.step()
        return model, losses

    torch.compiler.reset()
    eager, expected = run(compiled=False)
    compiled, losses = run(compiled=True)
    assert losses == pytest.approx(expected, rel=1e-9)
    assert _topologies(eager) == _topologies(compiled)
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_forward_passes_without_a_backward_are_not_recorded() -> None:
    def run(extra: bool) -> dict[str, list[int]]:
        model = _net()
        optimizer = _sgd(model)
        updater = TopologyUpdater(model, optimizer, rigl(UpdateSchedule(1, 9, 0.4)))
        if extra:
            model(_batch(7)[0])
            with torch.no_grad():
                model(_batch(8)[0])
        _backward(model, optimizer, _batch(0))
        updater.step()
        return _topologies(model)

    assert run(extra=True) == run(extra=False)


def test_similarity_takes_any_metric() -> None:
    def run(metric: str) -> dict[str, list[int]]:
        model = _net()
        method = dataclasses.replace(
            similarity(UpdateSchedule(2, 9, 0.4)), growth=Exact(metric=metric)
        )
        _one_update(method, model)
        return _topologies(model)

    chosen = {metric: str(run(metric)) for metric in ("abs-ip", "ip", "l2")}
    assert len(set(chosen.values())) == 3


def test_unknown_initialisation_is_refused() -> None:
    with pytest.raises(InputError, match="grown init 'ones' is unknown: choose zero, random"):
        dataclasses.replace(rigl(UpdateSchedule(2, 9, 0.3)), grown_init="ones")
