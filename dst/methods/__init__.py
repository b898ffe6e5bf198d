"""The methods by name."""

from dst.methods import dense, rigl, set, similarity, snfs, static
from dst.methods.base import DropGrow, Method, MethodEntry, Unchanging, UpdateDefaults

# One line a method: it then appears in --help and in the tests that every method must pass.
METHODS: dict[str, MethodEntry] = {
    "dense": dense.ENTRY,
    "static": static.ENTRY,
    "set": set.ENTRY,
    "rigl": rigl.ENTRY,
    "snfs": snfs.ENTRY,
    "similarity": similarity.ENTRY,
}

# Ways of training of several phases, with a recipe each.
PIPELINES: dict[str, str] = {"mam": "train with multiply-and-max/min, prune, fine-tune"}


def entry_of(name: str) -> MethodEntry:
    """Of a method; a pipeline begins dense, and neither drops nor grows."""
    return dense.ENTRY if name in PIPELINES else METHODS[name]


__all__ = [
    "METHODS",
    "PIPELINES",
    "DropGrow",
    "Method",
    "MethodEntry",
    "Unchanging",
    "UpdateDefaults",
    "entry_of",
]
