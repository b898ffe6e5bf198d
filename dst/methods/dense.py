"""The dense network that a sparse one is compared with."""

from dst.methods.base import MethodEntry, Unchanging

ENTRY = MethodEntry(lambda schedule, seed: Unchanging(), "every weight there is", sparse=False)
