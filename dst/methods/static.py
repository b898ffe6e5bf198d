"""A sparse network whose topology stays as it was drawn."""

from dst.methods.base import MethodEntry, Unchanging

ENTRY = MethodEntry(lambda schedule, seed: Unchanging(), "fixed random topology")
