"""Density that changes over a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from growth import InputError

RAMPS = ("cubic", "linear")


@dataclass(frozen=True)
class DensityRamp:
    """Alive blocks of every layer, from one number to another in the course of a run.

    start, final: by the layer's name. end: the step from which ``final`` holds. shape: of the way
    between, with u = step / end: ``cubic`` final + (start - final) (1 - u)^3, which drops most at
    first (Zhu & Gupta 2017, gradual pruning), or ``linear``.
    """

    start: Mapping[str, int]
    final: Mapping[str, int]
    end: int
    shape: str = "cubic"

    def __post_init__(self) -> None:
        if self.shape not in RAMPS:
            raise InputError(f"ramp {self.shape!r} is unknown: choose {', '.join(RAMPS)}")
        if self.end < 1:
            raise InputError(f"a density ramp must end at step 1 or later, not {self.end}")
        if set(self.start) != set(self.final):
            names = sorted(set(self.start) ^ set(self.final))
            raise InputError(f"a density ramp needs both counts of every layer: {names} has one")

    def at(self, layer: str, step: int) -> int:
        """Blocks of ``layer`` alive after an update at ``step``."""
        if layer not in self.start:
            raise InputError(f"the density ramp knows no layer {layer!r}")
        start, final = self.start[layer], self.final[layer]
        left = 1 - min(1.0, step / self.end)
        return round(final + (start - final) * (left**3 if self.shape == "cubic" else left))
