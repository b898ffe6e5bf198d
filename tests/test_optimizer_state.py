"""Every dense optimizer of ``torch.optim`` follows a topology, found here by introspection."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from dst import (
    InputError,
    SparseLayer,
    TopologyUpdater,
    UpdateSchedule,
    resize,
    rigl,
    sparse_layers,
    sparsify,
)
from dst.optimizer_state import reset_slots
from dst.topology import Change

# Optimizers that cannot train a sparse layer's values (capacity, bh, bw) at all.
REFUSING = {
    "SparseAdam": "takes sparse gradients alone",
    "Muon": "orthogonalises matrices: takes 2-D parameters alone",
}
# Switches that cannot be tried on a CPU.
UNTRIED = {
    "capturable": "for CUDA graphs",
    "differentiable": "steps inside autograd, which leaf parameters refuse",
}
OPTIONS: dict[str, Any] = {
    "foreach": True,
    "fused": True,
    "amsgrad": True,
    "maximize": True,
    "centered": True,
    "decoupled_weight_decay": True,
    "weight_decay": 0.01,
    "momentum": 0.9,
}
# No fused form on the CPU.
NOT_FUSED_ON_CPU = {"Rprop", "ASGD", "NAdam", "RAdam", "Adadelta", "Adamax", "RMSprop"}


class Variant(NamedTuple):
    """An optimizer class with arguments."""

    cls: type[Optimizer]
    arguments: dict[str, Any]

    def __call__(self, model: nn.Module) -> Optimizer:
        return self.cls(model.parameters(), **self.arguments)

    def __str__(self) -> str:
        words = [f"{k}={v}" for k, v in self.arguments.items() if k not in ("lr", "max_iter")]
        return "-".join([self.cls.__name__, *words])


def _classes() -> list[type[Optimizer]]:
    found = [
        cls
        for _, cls in inspect.getmembers(torch.optim, inspect.isclass)
        if issubclass(cls, Optimizer) and cls is not Optimizer
    ]
    return [cls for cls in found if cls.__name__ not in (*REFUSING, "LBFGS")]


def _variants() -> list[Variant]:
    variants = []
    for cls in _classes():
        accepted = inspect.signature(cls).parameters
        base: dict[str, Any] = {"lr": 0.03}
        if cls.__name__ == "Adagrad":
            base["initial_accumulator_value"] = 0.5
        variants.append(Variant(cls, base))
        for option, value in OPTIONS.items():
            if option not in accepted or (option == "fused" and cls.__name__ in NOT_FUSED_ON_CPU):
                continue
            # Climbing, the units must not saturate, or no gradient is left.
            slow = {"lr": 0.003} if option == "maximize" else {}
            variants.append(Variant(cls, {**base, **slow, option: value}))
    sgd, rms = torch.optim.SGD, torch.optim.RMSprop
    nesterov = {"lr": 0.03, "momentum": 0.9, "nesterov": True}
    variants += [
        Variant(sgd, nesterov),
        Variant(sgd, {**nesterov, "fused": True}),
        Variant(sgd, {"lr": 0.03, "momentum": 0.9, "dampening": 0.5, "foreach": True}),
        Variant(rms, {"lr": 0.03, "momentum": 0.9, "centered": True}),
        Variant(torch.optim.AdamW, {"lr": 0.03, "amsgrad": True, "fused": True}),
    ]
    return variants


VARIANTS = _variants()


def test_every_optimizer_is_tried_or_has_its_reason() -> None:
    names = {cls.__name__ for cls in _classes()}
    assert names >= {"SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adafactor"}
    assert {v.cls.__name__ for v in VARIANTS} == names
    switches = {
        name
        for cls in _classes()
        for name, parameter in inspect.signature(cls).parameters.items()
        if isinstance(parameter.default, bool)
    }
    assert switches <= {*OPTIONS, *UNTRIED, "nesterov"}


@pytest.mark.parametrize("name", REFUSING)
def test_those_left_out_do_refuse(name: str) -> None:
    cls = getattr(torch.optim, name, None)
    if cls is None:
        pytest.skip(f"this PyTorch has no {name}")
    values = nn.Parameter(torch.randn(3, 2, 2))
    values.grad = torch.randn(3, 2, 2)
    with pytest.raises((ValueError, RuntimeError)):
        cls([values]).step()


@pytest.mark.parametrize("name", sorted(NOT_FUSED_ON_CPU))
def test_those_not_tried_fused_have_no_fused_form_here(name: str) -> None:
    values = nn.Parameter(torch.randn(3, 2, 2))
    values.grad = torch.randn(3, 2, 2)
    with pytest.raises((TypeError, RuntimeError)):
        getattr(torch.optim, name)([values], fused=True).step()


def _net(block: int = 1) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 5))
    return sparsify(model, density=0.5, block=block, skip=())


def _loss(model: nn.Module, step: int) -> Tensor:
    random = torch.Generator().manual_seed(step)
    x, y = torch.randn(9, 7, generator=random), torch.randn(9, 5, generator=random)
    return F.mse_loss(model(x), y)


def _train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = _loss(model, step)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert bool(torch.as_tensor(loss).isfinite())


def _copy(state: Any) -> Any:
    """Deep, tensors and all that may hold them."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {k: _copy(v) for k, v in state.items()}
    return [_copy(v) for v in state] if isinstance(state, list) else state


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_identical(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_identical, a, b))
    return a == b


def _key_of_slot(layer: SparseLayer) -> Tensor:
    keys = torch.full((layer.topology.capacity,), -1)
    keys[layer.topology.slots.long()] = layer.topology.keys()
    return keys


def _start(variant: Variant, name: str) -> float:
    """State of a connection that the optimizer has not seen a gradient of."""
    if variant.cls is torch.optim.Adagrad and name == "sum":
        return variant.arguments["initial_accumulator_value"]
    if variant.cls is torch.optim.Rprop and name == "step_size":
        return variant.arguments["lr"]
    if variant.cls is torch.optim.Adamax and name == "exp_inf":
        return 1e-8  # the maximum of |g| + eps, which a step without a gradient leaves
    return 0.0


def _topology_update(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """One update that moves half of all connections, without a step of the optimizer; returns the
    slots of each layer that it emptied or filled anew."""
    layers = sparse_layers(model)
    before = {name: _key_of_slot(layer) for name, layer in layers.items()}
    method = rigl(UpdateSchedule(1, 9, 0.5, "constant"))
    updater = TopologyUpdater(model, optimizer, method)
    optimizer.zero_grad()
    _loss(model, 100).backward()
    assert updater.step()
    return {name: before[name] != _key_of_slot(layer) for name, layer in layers.items()}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_an_update_resets_the_grown_slots_alone(variant: Variant) -> None:
    model = _net(block=2)
    optimizer = variant(model)
    _train(model, optimizer, range(5))
    before = {name: _copy(optimizer.state.get(p, {})) for name, p in model.named_parameters()}
    weights = {name: _copy(p) for name, p in model.named_parameters()}
    changed = _topology_update(model, optimizer)

    layers, written, kept_state = sparse_layers(model), set(), set()
    for name, parameter in model.named_parameters():
        layer_name, _, kind = name.rpartition(".")
        after = optimizer.state.get(parameter, {})
        assert before[name].keys() == after.keys()
        if kind != "values":
            assert _identical(before[name], after), name
            assert torch.equal(weights[name], parameter)
            continue
        new = changed[layer_name]
        assert new.any() and not new.all()
        assert torch.equal(parameter[~new], weights[name][~new])
        assert not parameter[new].any()
        for key, state in after.items():
            old = before[name][key]
            if not isinstance(state, Tensor) or state.dim() == 0:
                assert _identical(old, state), key
                continue
            assert state.shape[0] == layers[layer_name].topology.capacity, key
            assert torch.equal(state[~new], old[~new]), key
            fresh = torch.full_like(state[new], _start(variant, key))
            assert torch.equal(state[new], fresh), key
            kept_state.add(key)
            if not torch.equal(old[new], fresh):
                written.add(key)
    assert written == kept_state, "a state that was never written tests nothing"
    _train(model, optimizer, range(5, 8))
    for name, layer in layers.items():
        grown = layer.values[changed[name]]
        assert bool(grown.isfinite().all()) and bool(grown.any())


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.Adagrad], ids=lambda c: c.__name__)
@pytest.mark.parametrize("form", ["groups", "named", "tensor lr", "scheduler"])
def test_the_way_an_optimizer_was_built_does_not_matter(cls: Any, form: str) -> None:
    model = _net()
    start = {"initial_accumulator_value": 0.25} if cls is torch.optim.Adagrad else {}
    if form == "groups":
        bias = [p for n, p in model.named_parameters() if n.endswith("bias")]
        values = [p for n, p in model.named_parameters() if n.endswith("values")]
        optimizer = cls([{"params": bias, "lr": 0.1}, {"params": values, "lr": 0.03}], **start)
    elif form == "named":
        optimizer = cls(model.named_parameters(), lr=0.03, **start)
    elif form == "tensor lr":
        optimizer = cls(model.parameters(), lr=torch.tensor(0.03), foreach=False, **start)
    else:
        optimizer = cls(model.parameters(), lr=0.03, **start)
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    _train(model, optimizer, range(3))
    changed = _topology_update(model, optimizer)
    for name, layer in sparse_layers(model).items():
        key, expected = ("sum", 0.25) if start else ("exp_avg_sq", 0.0)
        state = optimizer.state[layer.values][key]
        assert bool((state[changed[name]] == expected).all())
        assert bool((state[~changed[name]] != expected).any())
    _train(model, optimizer, range(3, 5))


def test_an_optimizer_that_cannot_be_built_anew_starts_from_zero() -> None:
    class Own(Optimizer):
        """Needs what no param group holds."""

        def __init__(self, params: Any, secret: int) -> None:
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p].setdefault("seen", torch.ones_like(p)).add_(p.grad)
                    p.sub_(group["lr"] * p.grad)
            return loss

    model = _net()
    optimizer = Own(model.parameters(), secret=1)
    _train(model, optimizer, range(3))
    changed = _topology_update(model, optimizer)
    for name, layer in sparse_layers(model).items():
        seen = optimizer.state[layer.values]["seen"]
        assert not seen[changed[name]].any() and bool(seen[~changed[name]].all())


def test_nothing_to_reset_before_the_first_step() -> None:
    model = _net()
    optimizer = torch.optim.Adam(model.parameters())
    reset_slots(optimizer, model[0].values, torch.tensor([0, 1]))
    assert not optimizer.state
    _train(model, optimizer, range(2))


def _lbfgs(model: nn.Module, line_search: str | None) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(
        model.parameters(), lr=0.1, max_iter=4, history_size=3, line_search_fn=line_search
    )


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs(line_search: str | None) -> None:
    model = _net(block=2)
    optimizer = _lbfgs(model, line_search)
    _train(model, optimizer, range(3))
    (before,) = (_copy(state) for state in optimizer.state.values())
    changed = _topology_update(model, optimizer)
    (after,) = optimizer.state.values()

    emptied = []
    for name, parameter in model.named_parameters():
        flat = torch.zeros(parameter.numel(), dtype=torch.bool)
        if name.endswith("values"):
            flat.view(parameter.shape)[changed[name.removesuffix(".values")]] = True
        emptied.append(flat)
    mask = torch.cat(emptied)

    vectors = 0
    for key, state in after.items():
        pairs = zip(state, before[key], strict=True) if isinstance(state, list) else None
        for new, old in pairs or [(state, before[key])]:
            if isinstance(new, Tensor) and new.numel() == mask.numel():
                vectors += 1
                assert not new[mask].any() and bool(old[mask].any())
                assert torch.equal(new[~mask], old[~mask])
            else:
                assert _identical(new, old), key
    assert vectors == 2 + 3 + 3  # d, prev_flat_grad, and two lists of the history's length
    _train(model, optimizer, range(3, 6))
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def _by_key(layer: SparseLayer, tensor: Tensor) -> dict[int, list[float]]:
    keys, slots = layer.topology.keys().tolist(), layer.topology.slots.tolist()
    return {k: tensor.detach()[s].flatten().tolist() for k, s in zip(keys, slots, strict=True)}


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize(
    "variant",
    [v for v in VARIANTS if v.arguments.keys() <= {"lr", "momentum", "initial_accumulator_value"}],
    ids=str,
)
def test_resize_keeps_survivors_and_their_state(variant: Variant, block: int) -> None:
    model = _net(block)
    optimizer = variant(model)
    _train(model, optimizer, range(4))
    layer = model[0]
    parameter, others = layer.values, _copy(optimizer.state.get(model[2].values, {}))

    def check(capacity: int) -> None:
        state = dict(optimizer.state.get(parameter, {}))
        dims = {k: s for k, s in state.items() if isinstance(s, Tensor) and s.dim()}
        scalars = {k: _copy(s) for k, s in state.items() if k not in dims}
        keys, output = layer.topology.keys(), layer.dense_weight()
        expected = {k: _by_key(layer, s) for k, s in dims.items()}
        weights, gradient = _by_key(layer, parameter), _by_key(layer, parameter.grad)
        last_loss = _loss(model, 50)  # kept alive, as in any training loop
        resize(layer, optimizer, capacity)
        del last_loss
        assert layer.values is parameter and parameter.shape == (capacity, block, block)
        assert _by_key(layer, parameter.grad) == gradient
        assert torch.equal(layer.topology.keys(), keys)
        assert torch.equal(layer.dense_weight(), output)
        assert _by_key(layer, parameter) == weights
        free = layer.topology.free_slots()
        assert not parameter[free].any() and not parameter.grad[free].any()
        after = optimizer.state.get(parameter, {})
        assert after.keys() == state.keys()
        for k in dims:
            assert after[k].dtype == dims[k].dtype
            assert _by_key(layer, after[k]) == expected[k]
            assert bool((after[k][free] == _start(variant, k)).all())
        assert all(_identical(after[k], scalars[k]) for k in scalars)
        assert _identical(others, optimizer.state.get(model[2].values, {}))

    first = layer.topology.capacity
    check(first + 3)
    # Put blocks into the new slots and empty low ones, so that shrinking has to move some.
    inactive = sorted(set(range(layer.topology.grid.size)) - set(layer.topology.keys().tolist()))
    nothing = torch.empty(0, dtype=torch.int64)
    layer.topology.edit(Change(nothing, torch.tensor(inactive[:3])))
    low = layer.topology.keys()[layer.topology.slots < 4].sort().values
    _, freed = layer.topology.edit(Change(low, nothing))
    with torch.no_grad():
        layer.values[freed] = 0
    reset_slots(optimizer, layer.values, freed)
    check(layer.topology.alive)
    check(layer.topology.alive + 1)
    kept = _loss(model, 51)
    resize(layer, optimizer, layer.topology.capacity + 1)
    _train(model, optimizer, range(4, 7))
    del kept
    assert layer.values.grad.shape == layer.values.shape


def test_resize_refuses_and_changes_nothing() -> None:
    model = _net()
    optimizer = torch.optim.Adam(model.parameters())
    layer = model[0]
    alive = layer.topology.alive
    with pytest.raises(InputError, match=f"capacity {alive - 1} is less than the {alive} alive"):
        resize(layer, optimizer, alive - 1)
    lbfgs = _lbfgs(model, None)
    resize(layer, lbfgs, alive + 1)  # before its first step it has no state
    _train(model, lbfgs, range(2))
    with pytest.raises(InputError, match="LBFGS keeps its state in one vector"):
        resize(layer, lbfgs, alive + 2)
    assert layer.topology.capacity == layer.values.shape[0] == alive + 1
    _train(model, lbfgs, range(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_resize_keeps_the_dtype(dtype: torch.dtype) -> None:
    model = _net().to(dtype)
    layer = model[0]
    weight = layer.dense_weight()
    resize(layer, None, layer.topology.capacity + 2)
    assert layer.values.dtype == dtype and layer.values.requires_grad
    assert torch.equal(layer.dense_weight(), weight)
    model(torch.randn(4, 7, dtype=dtype)).sum().backward()
    assert layer.values.grad.dtype == dtype


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad", "Rprop"])
def test_a_layer_that_lost_everything_can_grow_again(name: str) -> None:
    model = _net(1)
    arguments = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, **arguments)
    _train(model, optimizer, range(2))
    layer = model[0]
    keys, nothing = layer.topology.keys(), torch.empty(0, dtype=torch.int64)
    layer.topology.edit(Change(keys, nothing))
    resize(layer, optimizer, 0)
    assert layer.values.shape[0] == 0
    assert torch.equal(layer.dense_weight(), torch.zeros_like(layer.dense_weight()))
    _train(model, optimizer, range(2, 4))
    resize(layer, optimizer, 5)
    taken, _ = layer.topology.edit(Change(nothing, keys[:5]))
    reset_slots(optimizer, layer.values, taken)
    _train(model, optimizer, range(4, 6))
    assert bool(layer.values.detach().any()) and bool(layer.values.isfinite().all())
