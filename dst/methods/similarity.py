"""Growth by similarity search (Palaj 2023, "Sparse neural network training from scratch")."""

from dst.drop import magnitude
from dst.methods.base import DropGrow, MethodEntry, UpdateDefaults
from dst.schedules import UpdateSchedule
from growth import STRATEGIES, Exact


def similarity(schedule: UpdateSchedule, seed: int = 0) -> DropGrow:
    """Drop the smallest |w|; grow the pairs of neurons whose activations and output gradients are
    the most similar, by any growth strategy; step as usual, because updates may come at every
    step."""
    return DropGrow(schedule, magnitude, Exact(), seed, skips_step=False)


ENTRY = MethodEntry(
    similarity,
    "growth by similarity search",
    # Updates each epoch, as in the thesis' table 3.3, with its largest K; decay and end are RigL's,
    # because the thesis has none. Its own are --update-decay=constant --update-end=1.
    defaults=UpdateDefaults("1ep", 0.1, "cosine", 0.75),
    growths=("exact", *(name for name in STRATEGIES if name != "exact")),
)
