"""The dense network that a sparse one is compared with."""

from dst.methods.base import MethodEntry, Unchanging

ENTRY = MethodEntry(lambda schedule, seed: Unchanging(), "all weights", sparse=False)
