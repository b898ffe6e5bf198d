"""Batches that depend on the run's seed, the epoch and the batch's number, and on nothing else.

Hence a run can stop and go on at any batch, with any number of loader processes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from dst.data.augment import AUGMENTATIONS
from dst.data.dataset import Dataset, Split
from dst.seeding import generator
from growth.errors import InputError

Batch = tuple[Tensor, Tensor]  # images (batch, channels, h, w) float32, labels (batch,) int64


def steps_per_epoch(split: Split, batch: int) -> int:
    """How many full batches ``split`` gives; what is left over sits out this epoch."""
    if not 1 <= batch <= len(split):
        raise InputError(
            f"batch {batch} is impossible for {len(split)} images: give 1 to {len(split)}"
        )
    return len(split) // batch


def train_loader(
    split: Split,
    dataset: Dataset,
    *,
    batch: int,
    epoch: int,
    start: int,
    seed: int,
    augment: str,
    workers: int,
    rank: int = 0,
    world: int = 1,
) -> DataLoader[Batch]:
    """The batches ``start``, ``start`` + 1, ... of ``epoch``, shuffled, augmented, normalised.

    ``batch`` is the global batch; of ``world`` processes each gets its ``rank``-th equal part of
    the very batch that a single process would get. ``workers`` loader processes prepare whole
    batches (0: this process does).

    Raises InputError for a batch, start, augmentation or number of processes that cannot be.
    """
    steps = steps_per_epoch(split, batch)
    if not 0 <= start <= steps:
        raise InputError(f"start {start} is outside an epoch of {steps} batches: give 0 to {steps}")
    if workers < 0:
        raise InputError(f"workers {workers} is negative: give 0 or more loader processes")
    if augment not in AUGMENTATIONS:
        raise InputError(
            f"unknown augmentation {augment!r}: give one of {', '.join(AUGMENTATIONS)}"
        )
    if world < 1 or batch % world:
        raise InputError(
            f"batch {batch} cannot be divided equally among {world} processes: "
            "give a multiple of their number"
        )
    if not 0 <= rank < world:
        raise InputError(f"rank {rank} is outside 0 to {world - 1} of {world} processes")
    return DataLoader(
        _TrainBatches(split, dataset, batch, epoch, seed, augment, rank, world),
        batch_size=None,
        sampler=range(start, steps),
        num_workers=workers,
        # Without one, iterating draws from the global random state, and dropout would depend on
        # how often a run was resumed.
        generator=generator(seed, "loader", epoch),
    )


class _TrainBatches(TorchDataset[Batch]):
    """Item i is this rank's part of the epoch's batch i."""

    def __init__(
        self,
        split: Split,
        dataset: Dataset,
        batch: int,
        epoch: int,
        seed: int,
        augment: str,
        rank: int,
        world: int,
    ) -> None:
        self.split, self.mean, self.std = split, dataset.mean, dataset.std
        self.batch, self.seed, self.augment = batch, seed, augment
        self.first_step = epoch * steps_per_epoch(split, batch)
        self.order = torch.randperm(len(split), generator=generator(seed, "data", epoch))
        self.part = slice(rank * batch // world, (rank + 1) * batch // world)

    def __getitem__(self, index: int) -> Batch:
        whole = self.split[self.order[index * self.batch : (index + 1) * self.batch]]
        # Every rank augments the whole batch: each image gets the draw it gets in one process.
        random = generator(self.seed, "augment", self.first_step + index)
        images = AUGMENTATIONS[self.augment](whole.images, random)[self.part]
        return _normalise(images, self.mean, self.std), whole.labels[self.part]


def eval_batches(split: Split, dataset: Dataset, batch: int) -> Iterator[Batch]:
    """All of ``split`` in order, normalised, in batches of which the last may be smaller.

    Raises InputError at once, not at the first batch, for a batch below 1.
    """
    if batch < 1:
        raise InputError(f"batch {batch} is impossible: give at least 1")
    return (
        (
            _normalise(split.images[first : first + batch], dataset.mean, dataset.std),
            split.labels[first : first + batch],
        )
        for first in range(0, len(split), batch)
    )


def _normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 to float32 of mean 0 and deviation 1 a channel."""
    return (images.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
