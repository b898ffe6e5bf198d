"""Named random streams: every random choice has a seed, a name and a step."""

import zlib

import numpy as np
import torch

from growth.errors import InputError


def generator(seed: int, name: str, step: int) -> torch.Generator:
    """A fresh CPU generator for the choice ``name`` at ``step`` (>= 0) of the run ``seed`` (>= 0).

    Equal arguments give equal draws on every worker, device and resume; all others give unrelated
    ones, up to a chance of 2^-32 a pair, because PyTorch's CPU generator keeps 32 bits of a seed.
    ``hash(name)`` would differ from process to process, hence the crc32.

    Raises InputError for a negative seed.
    """
    if seed < 0:
        raise InputError(f"seed {seed} is negative: give a whole number of at least 0")
    mixed = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(name.encode()), step))
    return torch.Generator().manual_seed(int(mixed.generate_state(1, np.uint64)[0]))
