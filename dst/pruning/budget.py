"""How many weights a pruning keeps."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from dst.pruning.weights import Weights
from growth import InputError


def budget(weights: Sequence[Weights], keep: float | int, scope: str) -> list[tuple[int, int]]:
    """How many weights to keep of how many layers: of all together, or of each."""
    number = isinstance(keep, Integral)
    if number and scope == "local":
        raise InputError(
            f"keep {keep} is a number of weights, which scope 'local' does not divide among the "
            "layers: give a share in (0, 1)"
        )
    if not number and not 0 < keep < 1:
        raise InputError(
            f"keep {keep} must be a share strictly between 0 and 1, or a whole number of weights"
        )
    groups = [[own] for own in weights] if scope == "local" else [list(weights)]
    counts = []
    for group in groups:
        total, alive = (sum(n) for n in zip(*((own.total, own.size) for own in group), strict=True))
        count = int(keep) if number else round(keep * total)
        if scope == "local":
            count = max(1, count)
        if not len(group) <= count <= alive:
            of = f"layer {group[0].name!r}" if len(group) == 1 else f"{len(group)} layers"
            raise InputError(
                f"keep {keep} is {count} weights of {of}, where {alive} are alive: keep at least "
                "one a layer, and no more than there are"
            )
        counts.append((len(group), count))
    return counts
