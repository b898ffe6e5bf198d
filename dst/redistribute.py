"""Which layers the connections that were dropped go to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from dst.drop import block_norms
from dst.parts import Part
from growth import InputError


def by_magnitude(part: Part, state: Tensor | None) -> float:
    """Mean |w| of the alive blocks."""
    return _mean(block_norms(part.take(part.layer.values.detach())))


def by_gradient(part: Part, state: Tensor | None) -> float:
    """Mean |gradient| of the alive blocks in this step, which costs nothing to know."""
    gradient = part.layer.values.grad
    return 0.0 if gradient is None else _mean(block_norms(part.take(gradient)))


def by_momentum(part: Part, state: Tensor | None) -> float:
    """Mean |M| of the alive blocks, M the dense momentum that growth keeps (Dettmers &
    Zettlemoyer 2019)."""
    if state is None:
        raise InputError("redistribution by momentum needs growth by momentum, which keeps one")
    scores = state.abs() if part.grid.block == (1, 1) else part.grid.pool(state)
    return _mean(scores.flatten()[part.keys()])


def _mean(scores: Tensor) -> float:
    return float(scores.double().mean()) if scores.numel() else 0.0


Redistribution = Callable[[Part, Tensor | None], float]

# None keeps every layer's count.
REDISTRIBUTIONS: dict[str, Redistribution | None] = {
    "none": None,
    "magnitude": by_magnitude,
    "gradient": by_gradient,
    "momentum": by_momentum,
}


def apportion(total: int, weights: Sequence[float], limits: Sequence[int]) -> list[int]:
    """``total`` in whole shares proportional to ``weights``, none above its limit.

    What a share would exceed its limit by goes to the others, in proportion again; once only
    weights of zero are left, equally. The largest remainders round up, the first among equals.
    Raises InputError where the limits together are less than the total.
    """
    if total > sum(limits):
        raise InputError(f"{total} connections do not fit into {sum(limits)} free places")
    shares = [0] * len(limits)
    left = total
    open_ = [i for i, limit in enumerate(limits) if limit > 0]
    while left:
        weight = {i: weights[i] for i in open_}
        whole = sum(weight.values())
        if whole <= 0:
            weight, whole = dict.fromkeys(open_, 1.0), float(len(open_))
        exact = {i: left * (weight[i] / whole) for i in open_}
        full = [i for i in open_ if exact[i] >= limits[i]]
        if full:
            for i in full:
                shares[i] = limits[i]
                left -= limits[i]
            open_ = [i for i in open_ if i not in full]
            continue
        for i in open_:
            shares[i] = int(exact[i])
        missing = left - sum(shares[i] for i in open_)
        largest = sorted(open_, key=lambda i: (int(exact[i]) - exact[i], i))
        for i in largest[:missing]:
            shares[i] += 1
        break
    return shares


def mean_weights(
    how: Redistribution, every: Sequence[Part], states: Sequence[Tensor | None]
) -> list[float]:
    """Of every part, not negative and finite. Raises InputError for NaN or inf."""
    weights = [how(part, state) for part, state in zip(every, states, strict=True)]
    for part, weight in zip(every, weights, strict=True):
        if not math.isfinite(weight):
            raise InputError(
                f"the share of layer {part.name!r} in what is grown became {weight}: "
                "lower the learning rate"
            )
    return weights
