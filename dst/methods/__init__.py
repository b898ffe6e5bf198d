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

__all__ = ["METHODS", "DropGrow", "Method", "MethodEntry", "Unchanging", "UpdateDefaults"]
