"""Training steps of layers that are typical of a network, to be measured by ``calibrate``."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from triton_kernels import costs, scattered_cpu
from triton_kernels.conv import sparse_conv2d
from triton_kernels.conv_cpu import Geometry
from triton_kernels.layout import Layout
from triton_kernels.linear import sparse_linear

LEAST_ROUNDS = 3


class Case(NamedTuple):
    """A layer with alive blocks drawn at random, and its input. size: of a convolution's maps, of
    3 x 3 taps with its padding; 0 for a linear layer."""

    n_out: int
    channels: int
    batch: int
    density: float
    size: int = 0


# From what a perceptron has to what no longer fits into a cache, few samples and many.
LINEAR = (
    Case(128, 128, 32, 0.2),
    Case(64, 512, 64, 0.4),
    Case(128, 256, 512, 0.2),
    Case(256, 256, 64, 0.1),
    Case(512, 512, 256, 0.3),
    Case(1024, 1024, 32, 0.1),
    Case(1024, 1024, 256, 0.02),
    Case(1024, 1024, 256, 0.4),
    Case(256, 1024, 1024, 0.1),
    Case(2048, 2048, 32, 0.1),
    Case(2048, 2048, 256, 0.05),
    Case(768, 3072, 768, 0.1),
    Case(4096, 2048, 128, 0.05),
    Case(4096, 4096, 64, 0.05),
)
# Single weights, and blocks, where they cost about as much as scattered ones.
CROWDED = (Case(2048, 2048, 256, 0.5), Case(4096, 4096, 128, 0.4), Case(2048, 2048, 256, 0.8))
CROWDED_BLOCKS, CROWDED_SIDES = (Case(2048, 2048, 256, 0.85),), (16, 32, 64, 128)
CONV = (
    Case(64, 64, 8, 0.1, 16),
    Case(64, 64, 2, 0.5, 16),
    Case(64, 32, 2, 0.2, 32),
    Case(128, 256, 4, 0.5, 8),
    Case(256, 128, 16, 0.05, 8),
    Case(128, 64, 4, 0.3, 32),
    Case(256, 256, 16, 0.3, 4),
    Case(320, 320, 8, 0.05, 8),
    Case(320, 320, 2, 0.5, 8),
)
# For blocks that, without numba, take so long that nobody would use them at more.
SLOW = (
    Case(128, 128, 32, 0.2),
    Case(256, 256, 64, 0.1),
    Case(512, 512, 32, 0.1),
    Case(512, 512, 256, 0.05),
    Case(256, 1024, 512, 0.02),
    Case(1024, 1024, 64, 0.02),
)
SLOW_CONV = tuple(case._replace(density=case.density / 5) for case in CONV)
SIDES, SLOW_SIDES = (1, 8, 16, 24, 32, 64, 128), (2, 4)
CONV_SIDES, SLOW_CONV_SIDES = (8, 16, 32, 64), (2, 4)
# At which scattered weights are measured: single ones go another way.
DENSE_SIDES = (1, 8, 32)
HALF_SIDES = (1, 8, 32)


class Step(NamedTuple):
    """A training step to be measured, and its seconds so far."""

    layer: costs.Layer
    way: str
    call: Callable[[], object]
    seconds: list[float]

    @property
    def ns(self) -> float:
        """The shortest, since whatever else the machine does only adds to it."""
        return 1e9 * min(self.seconds)


class Sample(NamedTuple):
    """side: of its blocks. dense: whether its weight is scattered as well."""

    case: Case
    side: int
    dtype: torch.dtype
    dense: bool

    def layer(self, device: str = "cpu") -> costs.Layer:
        case, (rows, padded) = self.case, (self.case.batch, self.case.batch)
        if case.size:
            shape = case.batch, case.channels, case.size, case.size
            geometry = Geometry.of(shape, (3, 3), (1, 1), (1, 1), (1, 1))
            rows, padded = case.batch * case.size**2, case.batch * geometry.positions
        taps = 9 if case.size else 1
        layer = costs.Layer(
            *(case.n_out, taps * case.channels, taps, (self.side, self.side), 0),
            *(rows, padded, self.dtype.itemsize, device),
        )
        return layer._replace(alive=max(1, round(case.density * layer.size)))


def samples() -> Iterator[Sample]:
    """What a CPU is measured by."""
    groups = (
        *((SIDES, LINEAR), ((1,), CROWDED), (CROWDED_SIDES, CROWDED_BLOCKS), (SLOW_SIDES, SLOW)),
        *(((1, *CONV_SIDES), CONV), (SLOW_CONV_SIDES, SLOW_CONV)),
    )
    for sides, cases in groups:
        for side, case in itertools.product(sides, cases):
            if min(case.n_out, case.channels) < 2 * side:
                continue
            dense = side in DENSE_SIDES
            yield Sample(case, side, torch.float32, dense)
            # A machine may have nothing for half precision but plain loops.
            if side in HALF_SIDES and case.n_out * case.channels * case.batch <= 1 << 28:
                yield Sample(case, side, torch.bfloat16, dense)


def steps_of(sample: Sample, device: str = "cpu") -> Iterator[Step]:
    """One of its sparse products, if there are any, and, if asked, one for each way to multiply by
    its weight when it is scattered."""
    case, side, dtype, dense = sample
    layer = sample.layer(device)
    how: dict[str, Any] = {"device": device, "dtype": dtype}
    layout = layout_of(layer)
    maps = (case.size, case.size) if case.size else ()
    values = torch.randn(layer.alive, side, side, **how, requires_grad=True)
    x = torch.randn(case.batch, case.channels, *maps, **how, requires_grad=True)
    dy = torch.randn(case.batch, case.n_out, *maps, **how)

    def step(compute: str, by_loops: bool = False) -> Callable[[], object]:
        def call() -> object:
            scattered_cpu.by_loops = by_loops
            try:
                return run()
            finally:
                scattered_cpu.by_loops = None

        def run() -> object:
            if case.size:
                y = sparse_conv2d(x, values, layout, (3, 3), padding=(1, 1), compute=compute)
            else:
                y = sparse_linear(x, values, layout, compute=compute)
            return torch.autograd.grad(y, (x, values), dy)

        return call

    if device != "cpu" or costs.sparse_work(layer):
        yield Step(layer, "sparse", step("sparse"), [])
    if dense:
        yield Step(layer, "dense", step("dense"), [])
        if device == "cpu" and len(costs.dense_works(layer)) > 1:
            yield Step(layer, "loops", step("dense", by_loops=True), [])


def layout_of(layer: costs.Layer) -> Layout:
    """Its alive blocks, drawn at random."""
    alive = torch.zeros(layer.size, dtype=torch.bool)
    alive[torch.randperm(layer.size)[: layer.alive]] = True
    n_rows = -(-layer.n_out // layer.block[0])
    slots = (alive.cumsum(0) - 1).int().view(n_rows, -1)
    alive = alive.view(n_rows, -1)

    def order(alive: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        offsets = F.pad(alive.sum(1).cumsum(0), (1, 0)).int()
        return offsets, alive.nonzero()[:, 1].int(), slots[alive]

    tensors = [t.to(layer.device) for t in (*order(alive, slots), *order(alive.T, slots.T))]
    channels = layer.n_in // layer.taps
    return Layout(*tensors, layer.n_out, layer.taps, channels)  # type: ignore[call-arg, arg-type]


def measure(steps: Sequence[Step], seconds: float) -> None:
    """For about so long, all of them in turns, so that a slower time of the machine meets all
    alike, and so that each finds its memory as cold as between the other layers of a network."""
    for step in steps:
        step.call()  # compiles
    start = time.perf_counter()
    for rounds in itertools.count(1):
        for step in steps:
            _wait(step)
            before = time.perf_counter()
            step.call()
            _wait(step)
            step.seconds.append(time.perf_counter() - before)
        if rounds >= LEAST_ROUNDS and time.perf_counter() - start >= seconds:
            break


def _wait(step: Step) -> None:
    if step.layer.device == "cuda":
        torch.cuda.synchronize()
