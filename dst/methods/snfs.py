"""SNFS, sparse networks from scratch, also called sparse momentum (Dettmers & Zettlemoyer 2019)."""

from dst.drop import magnitude
from dst.methods.base import DropGrow, MethodEntry, UpdateDefaults
from dst.schedules import UpdateSchedule
from growth import Momentum


def sparse_momentum(schedule: UpdateSchedule, seed: int = 0) -> DropGrow:
    """Drop the smallest |w|; give what was dropped to the layers in proportion to the mean |M| of
    their alive weights; grow the largest |M|, M a decayed sum of the dense gradients of all steps;
    step as usual. Keeps a dense matrix a layer and computes a dense weight gradient at every
    step."""
    return DropGrow(
        schedule, magnitude, Momentum(), seed, skips_step=False, redistribute="momentum"
    )


ENTRY = MethodEntry(
    sparse_momentum,
    "growth by dense momentum, redistributed over layers",
    # Half of the weights once an epoch, annealed by a cosine over the whole run.
    defaults=UpdateDefaults("1ep", 0.5, "cosine", 1.0),
    growths=("momentum",),
)
