"""RigL (Evci et al. 2020, "Rigging the lottery: making all tickets winners")."""

from dst.drop import magnitude
from dst.methods.base import DropGrow, MethodEntry, UpdateDefaults
from dst.schedules import UpdateSchedule
from growth import Exact


def rigl(schedule: UpdateSchedule, seed: int = 0) -> DropGrow:
    """Drop the smallest |w|, grow the largest |gradient| over everything not kept, at zero; the
    update takes the place of the optimizer's step. The gradient is formed a tile at a time."""
    return DropGrow(schedule, magnitude, Exact(), seed)


ENTRY = MethodEntry(
    rigl,
    "growth by gradient",
    # Table 1 of the paper: alpha = 0.3, Delta T = 100, T_end at 75 % of the run.
    defaults=UpdateDefaults("100", 0.3, "cosine", 0.75),
    growths=("exact",),
)
