"""Autocast and ``GradScaler`` with topology updates, on the CPU."""

import dataclasses
import math
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler

from dst import DropGrow, TopologyUpdater, UpdateSchedule, rigl, similarity, sparse_layers, sparsify
from growth import Exact


def _net() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 3)
    )
    return sparsify(model, density=0.4, skip=())


def _topologies(model: nn.Module) -> list[list[int]]:
    return [layer.topology.keys().tolist() for layer in sparse_layers(model).values()]


def _batch(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    return torch.randn(8, 2, 6, 6, generator=random), torch.randint(3, (8,), generator=random)


class _Run:
    """A loop as the updater's documentation has it."""

    def __init__(self, method: DropGrow, scaler: GradScaler, dtype: torch.dtype) -> None:
        self.model = _net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.scaler, self.dtype = scaler, dtype
        self.updater = TopologyUpdater(self.model, self.optimizer, method, scaler=scaler)

    def step(self, step: int, factor: float = 1.0) -> bool:
        x, y = _batch(step)
        with torch.autocast("cpu", self.dtype):
            loss = F.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        self.scaler.scale(loss * factor).backward()
        replaced = self.updater.step()
        if not replaced:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return replaced

    def steps(self, steps: Iterable[int]) -> None:
        for step in steps:
            self.step(step)


@pytest.mark.parametrize("replaces", [True, False])
@pytest.mark.parametrize(
    ("dtype", "scale", "factor"),
    [
        # Overflows by itself, and not once the scaler has backed off.
        (torch.float16, 2.0**40, 1.0),
        (torch.bfloat16, 2.0**8, math.inf),
    ],
)
def test_an_update_whose_gradients_overflow_is_skipped_with_its_step(
    dtype: torch.dtype, scale: float, factor: float, replaces: bool
) -> None:
    scaler = GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-35)
    method = dataclasses.replace(rigl(UpdateSchedule(1, 9, 0.3)), skips_step=replaces)
    run = _Run(method, scaler, dtype)
    topologies = _topologies(run.model)
    weights = [p.detach().clone() for p in run.model.parameters()]

    assert not run.step(0, factor)
    assert any(not p.grad.isfinite().all() for p in run.model.parameters())
    assert run.updater.skipped == 1 and run.updater.last is None
    assert not run.updater.holds_records
    assert _topologies(run.model) == topologies
    for before, after in zip(weights, run.model.parameters(), strict=True):
        assert torch.equal(before, after)
    assert scaler.get_scale() == scale * 2.0**-35

    assert run.step(1) == replaces
    assert run.updater.skipped == 1 and run.updater.last is not None
    assert run.updater.last.step == 2
    assert _topologies(run.model) != topologies
    moved = any(
        not torch.equal(before, after)
        for before, after in zip(weights, run.model.parameters(), strict=True)
        if after.dim() == 1  # biases, which no update touches
    )
    assert moved != replaces


def test_an_overflow_outside_of_the_sparse_layers_skips_the_update_too() -> None:
    run = _Run(rigl(UpdateSchedule(1, 9, 0.3)), GradScaler("cpu"), torch.bfloat16)
    topologies = _topologies(run.model)
    bias = sparse_layers(run.model)["0"].bias
    hook = bias.register_hook(lambda grad: grad * math.inf)
    assert not run.step(0)
    assert run.updater.skipped == 1 and _topologies(run.model) == topologies
    assert run.scaler.get_scale() == 2.0**15  # backed off: the scaler skipped as well
    hook.remove()
    assert run.step(1)


@pytest.mark.parametrize("metric", ["abs-ip", "l2"])
def test_the_scale_has_no_influence_on_what_grows(metric: str) -> None:
    def run(scale: float, growth_factor: float = 2.0) -> tuple[list[list[int]], list[Tensor]]:
        # With an average of 3, vectors recorded under several scales are searched together; the
        # l2 metric depends on the length of a single one.
        scaler = GradScaler(
            "cpu", init_scale=scale, growth_interval=1 if growth_factor > 1.5 else 10**6
        )
        method = similarity(UpdateSchedule(3, 20, 0.4, average=3))
        method = dataclasses.replace(method, growth=Exact(metric=metric))
        # Powers of two are exact in bfloat16, which has the exponents of float32.
        trained = _Run(method, scaler, torch.bfloat16)
        trained.steps(range(9))
        assert trained.updater.skipped == 0
        assert (scaler.get_scale() == scale) == (growth_factor < 1.5)
        return _topologies(trained.model), [p.detach() for p in trained.model.parameters()]

    expected, weights = run(1.0, growth_factor=1.0)
    assert expected != _topologies(_net())
    for scale, factor in ((2.0**10, 1.0), (1.0, 2.0), (2.0**10, 2.0)):
        topologies, others = run(scale, factor)
        assert topologies == expected
        assert all(map(torch.equal, weights, others))


def test_the_scaled_and_the_plain_gradient_choose_alike_in_half_precision() -> None:
    def run(scale: float) -> list[list[int]]:
        method = similarity(UpdateSchedule(1, 20, 0.4))
        trained = _Run(method, GradScaler("cpu", init_scale=scale), torch.float16)
        # Large enough that no gradient underflows at scale 1, small enough for scale 2**10.
        assert not trained.step(0, factor=8.0)
        assert trained.updater.skipped == 0
        return _topologies(trained.model)

    assert run(1.0) == run(2.0**10) != _topologies(_net())


def test_a_disabled_scaler_changes_nothing() -> None:
    method = rigl(UpdateSchedule(2, 20, 0.4))
    plain = _Run(method, GradScaler("cpu", init_scale=1.0, growth_interval=10**6), torch.bfloat16)
    disabled = _Run(method, GradScaler("cpu", enabled=False), torch.bfloat16)
    for run in (plain, disabled):
        run.steps(range(6))
    assert _topologies(plain.model) == _topologies(disabled.model)
    for a, b in zip(plain.model.parameters(), disabled.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sparse_layer_autocasts_as_its_dense_twin(dtype: torch.dtype) -> None:
    layer = _net()[3]
    x = torch.randn(5, 64)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        twin = F.linear(x, layer.dense_weight(), layer.bias)
    assert y.dtype == twin.dtype == dtype
    torch.testing.assert_close(y, twin, rtol=2e-2, atol=2e-2)
    y.float().square().sum().backward()
    assert layer.values.grad.dtype == torch.float32
