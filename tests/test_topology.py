"""The topology against a plain dictionary of key -> slot."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dst import Change, SparseLinear, Topology, resize
from growth import Grid, InputError

BUFFERS = ("row_offsets", "cols", "slots", "col_offsets", "rows_t", "slots_t")


def _tensor(keys: Any) -> Tensor:
    return torch.tensor(sorted(keys), dtype=torch.int64)


def _snapshot(topology: Topology) -> list[Any]:
    return [topology.capacity, *(getattr(topology, name).clone() for name in BUFFERS)]


def _unchanged(topology: Topology, before: list[Any]) -> bool:
    now = _snapshot(topology)
    return now[0] == before[0] and all(map(torch.equal, now[1:], before[1:]))


def _check(topology: Topology, model: dict[int, int]) -> None:
    """Every view of the topology against the model: key -> slot."""
    grid = topology.grid
    keys = sorted(model)
    assert topology.alive == len(keys)
    assert topology.keys().tolist() == keys
    assert topology.rows().tolist() == [key // grid.n_cols for key in keys]
    assert topology.cols.tolist() == [key % grid.n_cols for key in keys]
    assert topology.slots.tolist() == [model[key] for key in keys]
    assert topology.row_offsets.tolist() == [
        sum(key // grid.n_cols < row for key in keys) for row in range(grid.n_rows + 1)
    ]
    by_column = sorted(keys, key=lambda key: (key % grid.n_cols, key // grid.n_cols))
    assert topology.rows_t.tolist() == [key // grid.n_cols for key in by_column]
    assert topology.slots_t.tolist() == [model[key] for key in by_column]
    assert topology.col_offsets.tolist() == [
        sum(key % grid.n_cols < col for key in keys) for col in range(grid.n_cols + 1)
    ]
    assert all(getattr(topology, name).dtype == torch.int32 for name in BUFFERS)
    free = sorted(set(range(topology.capacity)) - set(model.values()))
    assert topology.free_slots().tolist() == free
    # Sizes and fan-in weight by weight.
    (bh, bw), across = grid.block, grid.n_cols // grid.taps
    fan_in, sizes = [0] * grid.n_out, []
    for key in keys:
        row, col = key // grid.n_cols, key % grid.n_cols % across
        outputs = [j for j in range(row * bh, row * bh + bh) if j < grid.n_out]
        inputs = [i for i in range(col * bw, col * bw + bw) if i < grid.channels]
        sizes.append(len(outputs) * len(inputs))
        for j in outputs:
            fan_in[j] += len(inputs)
    assert topology.sizes().tolist() == sizes
    assert topology.fan_in().tolist() == fan_in


@st.composite
def _grids(draw: st.DrawFn) -> Grid:
    block = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    taps = draw(st.sampled_from([1, 1, 2, 6]))
    return Grid.of(draw(st.integers(1, 9)), draw(st.integers(1, 7)) * taps, taps, block)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(_grids(), st.data())
def test_edits_follow_the_model(grid: Grid, data: st.DataObject) -> None:
    everything = list(range(grid.size))
    alive = data.draw(st.permutations(everything))[: data.draw(st.integers(0, grid.size))]
    spare = data.draw(st.integers(0, 4))
    topology = Topology(grid, torch.tensor(alive, dtype=torch.int64), len(alive) + spare)
    # Slots follow the sorted keys at first.
    model = {key: slot for slot, key in enumerate(sorted(alive))}
    _check(topology, model)
    for _ in range(3):
        dropped = data.draw(st.sets(st.sampled_from(sorted(model)))) if model else set()
        may_grow = sorted(set(everything) - (set(model) - dropped))
        room = topology.capacity - len(model) + len(dropped)
        grown = data.draw(st.sets(st.sampled_from(may_grow), max_size=room)) if may_grow else set()
        free = set(range(topology.capacity)) - set(model.values())
        pool = sorted(free | {model[key] for key in dropped})
        taken, freed = topology.edit(Change(_tensor(dropped), _tensor(grown)))
        for key in dropped:
            del model[key]
        model.update(zip(sorted(grown), pool, strict=False))
        _check(topology, model)
        assert taken.tolist() == pool[: len(grown)]
        assert freed.tolist() == pool[len(grown) :]


def test_edit_by_hand() -> None:
    """2 x 3 blocks: 1 and 3 go, 0 takes the slot of 1, the lower of the two that fell free."""
    topology = Topology(Grid.of(2, 3, 1, (1, 1)), torch.tensor([5, 1, 3]))
    taken, freed = topology.edit(Change(torch.tensor([1, 3]), torch.tensor([0])))
    assert topology.keys().tolist() == [0, 5] and topology.slots.tolist() == [0, 2]
    assert taken.tolist() == [0] and freed.tolist() == [1]
    # The free slot 1 is lower than slot 2 of the one that goes.
    taken, freed = topology.edit(Change(torch.tensor([5]), torch.tensor([4])))
    assert topology.slots.tolist() == [0, 1]
    assert taken.tolist() == [1] and freed.tolist() == [2]


def test_a_key_dropped_and_grown_is_reset() -> None:
    topology = Topology(Grid.of(2, 3, 1, (1, 1)), torch.tensor([1, 3, 5]))
    taken, freed = topology.edit(Change(torch.tensor([3]), torch.tensor([3])))
    assert topology.keys().tolist() == [1, 3, 5] and topology.slots.tolist() == [0, 1, 2]
    assert taken.tolist() == [1] and freed.numel() == 0


@pytest.mark.parametrize(
    ("dropped", "grown", "message"),
    [
        ([0], [], "not alive"),
        ([9], [], "not alive"),
        ([-1], [], "not alive"),
        ([1, 1], [], "dropped twice"),
        ([1, 1], [0, 2], "dropped twice"),
        ([], [3], "alive twice"),
        ([], [0, 0], "alive twice"),
        ([1], [6], r"lie in \[0, 6\)"),
        ([1], [-1], r"lie in \[0, 6\)"),
        ([1], [0, 2, 4], "cannot grow 3 blocks into 2 free slots"),
        ([], [0, 2], "cannot grow 2 blocks into 1 free slots"),
    ],
)
def test_refused_edits_change_nothing(dropped: list[int], grown: list[int], message: str) -> None:
    spare = 2 if grown == [0, 0] else 1
    topology = Topology(Grid.of(2, 3, 1, (1, 1)), torch.tensor([1, 3, 5]), 3 + spare)
    before = _snapshot(topology)
    change = Change(*(torch.tensor(keys, dtype=torch.int64) for keys in (dropped, grown)))
    with pytest.raises(InputError, match=message):
        topology.edit(change)
    assert _unchanged(topology, before)
    if "cannot grow" not in message:
        assert not topology.valid(change)


def test_a_valid_change_is_made_without_waiting_for_the_device() -> None:
    """Fake tensors have shapes, but no data: they refuse whatever a GPU would be waited for."""
    grid = Grid.of(8, 24, 2, (2, 3))
    with FakeTensorMode():
        topology = Topology(grid, torch.arange(0)).to("cuda:0")
        topology.capacity = 9
        for name, size in (("row_offsets", 5), ("cols", 7), ("slots", 7)):
            setattr(topology, name, torch.empty(size, dtype=torch.int32, device="cuda:0"))
        change = Change(*(torch.empty(n, dtype=torch.int64, device="cuda:0") for n in (3, 4)))
        assert topology.valid(change).shape == ()
        taken, freed = topology.edit(change, validated=True)
        assert (taken.numel(), freed.numel(), topology.alive) == (4, 1, 8)
        assert topology.rows_t.shape == topology.slots_t.shape == (8,)
        with pytest.raises(DataDependentOutputException):
            topology.edit(change)


@pytest.mark.parametrize(
    ("keys", "capacity", "message"),
    [
        ([1, 1], None, "alive twice"),
        ([0, 6], None, r"lie in \[0, 6\) for 2 x 3 blocks, not 0\.\.6"),
        ([-1, 2], None, r"not -1\.\.2"),
        ([0, 1, 2], 2, "3 alive blocks exceed the capacity 2"),
    ],
)
def test_wrong_keys_are_refused(keys: list[int], capacity: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Topology(Grid.of(2, 3, 1, (1, 1)), torch.tensor(keys), capacity)


def test_find() -> None:
    topology = Topology(Grid.of(2, 3, 1, (1, 1)), torch.tensor([5, 1, 3]))
    assert topology.find(torch.tensor([5, 1])).tolist() == [2, 0]
    empty = Topology(Grid.of(2, 3, 1, (1, 1)), torch.empty(0, dtype=torch.int64))
    assert empty.find(torch.empty(0, dtype=torch.int64)).numel() == 0
    for searched, key in ((topology, 4), (topology, 6), (empty, 0)):
        with pytest.raises(InputError, match="not alive"):
            searched.find(torch.tensor([key]))


def test_state_dict_round_trip_with_another_count() -> None:
    grid = Grid.of(7, 10, 2, (2, 2))
    source = Topology(grid, torch.arange(0, 24, 3), 12)
    source.edit(Change(torch.tensor([0, 6]), torch.tensor([1])))
    state = source.state_dict()
    assert set(state) == {"row_offsets", "cols", "slots"}  # the transposed order is derived
    target = Topology(grid, torch.tensor([2, 4]), 12)
    target.load_state_dict(state)
    _check(target, dict(zip(source.keys().tolist(), source.slots.tolist(), strict=True)))
    assert _unchanged(target, _snapshot(source))
    # The loaded topology shares nothing with the state.
    target.edit(Change(torch.tensor([1]), torch.tensor([], dtype=torch.int64)))
    assert torch.equal(state["cols"], source.cols)


def test_layer_state_dict_round_trip() -> None:
    layer = SparseLinear(6, 5, density=0.4, generator=torch.Generator().manual_seed(1))
    other = SparseLinear(6, 5, density=0.4, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(layer.topology.keys(), other.topology.keys())
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer.dense_weight(), other.dense_weight())


def _damage(state: dict[str, Tensor], how: str) -> None:
    if how == "offsets fall":
        state["row_offsets"][1] = 3
    elif how == "offsets short":
        state["row_offsets"] = state["row_offsets"][:-1]
    elif how == "offsets start late":
        state["row_offsets"] += 1
    elif how == "column missing":
        state["cols"] = state["cols"][:-1]
    elif how == "slot missing":
        state["slots"] = state["slots"][:-1]
    elif how == "column out of range":
        state["cols"][-1] = 3
    elif how == "column negative":
        state["cols"][0] = -1
    elif how == "column twice":
        state["cols"][1] = state["cols"][0]
    elif how == "columns unsorted":
        state["cols"][:2] = state["cols"][:2].flip(0)
    elif how == "slot twice":
        state["slots"][0] = state["slots"][1]
    elif how == "slot out of range":
        state["slots"][0] = 4
    elif how == "slot negative":
        state["slots"][0] = -1


@pytest.mark.parametrize(
    "how",
    [
        "offsets fall", "offsets short", "offsets start late", "column missing", "slot missing",
        "column out of range", "column negative", "column twice", "columns unsorted", "slot twice",
        "slot out of range", "slot negative",
    ],
)  # fmt: skip
def test_damaged_state_is_refused_and_changes_nothing(how: str) -> None:
    grid = Grid.of(2, 3, 1, (1, 1))
    topology = Topology(grid, torch.tensor([0, 2, 3, 4]))
    before = _snapshot(topology)
    state = {name: tensor.clone() for name, tensor in topology.state_dict().items()}
    assert state["row_offsets"].tolist() == [0, 2, 4]
    _damage(state, how)
    with pytest.raises(RuntimeError, match=r"offsets|columns|slots|alive twice"):
        topology.load_state_dict(state)
    assert _unchanged(topology, before)


def test_missing_and_foreign_state_is_refused() -> None:
    topology = Topology(Grid.of(2, 3, 1, (1, 1)), torch.tensor([0, 2]))
    state = topology.state_dict()
    del state["slots"]
    with pytest.raises(RuntimeError, match=r"Missing key.*slots"):
        topology.load_state_dict(state)
    wide = Topology(Grid.of(3, 3, 1, (1, 1)), torch.tensor([0, 2]))
    with pytest.raises(RuntimeError, match="not those of 2 block rows"):
        topology.load_state_dict(wide.state_dict())
    full = Topology(topology.grid, torch.arange(6))
    with pytest.raises(RuntimeError, match=r"slots must be unique and lie in \[0, 2\)"):
        topology.load_state_dict(full.state_dict())


def test_metadata_is_int32_even_where_keys_are_not() -> None:
    """2^32 possible connections."""
    n = 65536
    keys = torch.tensor([0, n - 1, n * (n - 1), n * n - 1])
    topology = Topology(Grid.of(n, n, 1, (1, 1)), keys)
    assert all(getattr(topology, name).dtype == torch.int32 for name in BUFFERS)
    assert topology.keys().tolist() == keys.tolist()
    topology.edit(Change(keys[:1], torch.tensor([n * n - 2])))
    assert topology.keys().tolist() == [n - 1, n * (n - 1), n * n - 2, n * n - 1]
    assert topology.rows_t.tolist() == [n - 1, n - 1, 0, n - 1]


def test_resize_keeps_slots_that_fit() -> None:
    topology = Topology(Grid.of(3, 3, 1, (1, 1)), torch.arange(5))
    topology.edit(Change(torch.tensor([1, 2]), torch.tensor([8])))
    slots = {0: 0, 8: 1, 3: 3, 4: 4}
    _check(topology, slots)
    topology.resize(9)
    _check(topology, slots)
    assert topology.free_slots().tolist() == [2, 5, 6, 7, 8]
    topology.resize(5)
    _check(topology, slots)
    topology.resize(4)  # slot 4 does not fit: all move, in key order
    _check(topology, {0: 0, 3: 1, 4: 2, 8: 3})
    before = _snapshot(topology)
    with pytest.raises(InputError, match="capacity 3 is less than the 4 alive blocks"):
        topology.resize(3)
    assert _unchanged(topology, before)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", None])
@pytest.mark.parametrize("capacity", [4, 5, 9])
def test_resize_moves_values_and_optimizer_state_together(
    optimizer: str | None, capacity: int
) -> None:
    layer = SparseLinear(3, 3, density=5 / 9, generator=torch.Generator().manual_seed(0))
    kinds: dict[str | None, Any] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adam": torch.optim.Adam,
    }
    opt = kinds[optimizer](layer.parameters()) if optimizer else None
    layer(torch.randn(4, 3)).square().sum().backward()
    if opt is not None:
        opt.step()
    first = layer.topology.keys()[:1]
    taken, freed = layer.topology.edit(Change(first, first[:0]))
    with torch.no_grad():
        layer.values[freed] = 0

    def by_key(tensor: Tensor) -> Tensor:
        return tensor[layer.topology.slots.long()].clone()

    parameter, weight = layer.values, layer.dense_weight().detach()
    gradient = by_key(layer.values.grad)
    state = {} if opt is None else opt.state[layer.values]
    before = {name: by_key(t) for name, t in state.items() if t is not None and t.dim() == 3}
    assert len(before) == {"sgd": 1, "adam": 2, None: 0}[optimizer]
    resize(layer, opt, capacity)
    assert layer.values is parameter and layer.values.shape == (capacity, 1, 1)
    assert layer.values.grad.shape == layer.values.shape
    assert torch.equal(by_key(layer.values.grad), gradient)
    assert torch.equal(layer.dense_weight(), weight)
    for name, rows in before.items():
        tensor = opt.state[layer.values][name]
        assert tensor.shape == layer.values.shape
        assert torch.equal(by_key(tensor), rows)
        assert (tensor[layer.topology.free_slots()] == 0).all()
    assert (layer.values[layer.topology.free_slots()] == 0).all()
    layer(torch.randn(4, 3)).square().sum().backward()
    if opt is not None:
        opt.step()
