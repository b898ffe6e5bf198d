"""SET, sparse evolutionary training (Mocanu et al. 2018)."""

from dst.drop import signed_magnitude
from dst.methods.base import DropGrow, MethodEntry, UpdateDefaults
from dst.schedules import UpdateSchedule
from growth import Random


def sparse_evolutionary_training(schedule: UpdateSchedule, seed: int = 0) -> DropGrow:
    """Drop the weights closest to zero, of either sign in equal shares; grow as many at random
    among all that are then inactive; step as usual. Most later work that is called SET drops by
    magnitude alone: ``dataclasses.replace(method, drop=drop.magnitude)``."""
    return DropGrow(schedule, signed_magnitude, Random(), seed, skips_step=False)


ENTRY = MethodEntry(
    sparse_evolutionary_training,
    "random growth",
    # zeta = 0.3 once an epoch, to the end.
    defaults=UpdateDefaults("1ep", 0.3, "constant", 1.0),
    growths=("random",),
)
