"""Batches that depend on the run's seed, the epoch and the batch's number, and on nothing else.

Hence a run can stop and go on at any batch, with any number of loader processes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from dst.data.augment import AUGMENTATIONS
from dst.data.crops import box_draws, random_resized_crops, resize
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
    pin: bool = False,
) -> Iterator[Batch]:
    """The batches ``start``, ``start`` + 1, ... of ``epoch``, shuffled, augmented, normalised.

    ``batch`` is the global batch; of ``world`` processes each gets its ``rank``-th equal part of
    the very batch that a single process would get. ``workers`` loader processes prepare whole
    batches (0: this process does). ``pin`` puts them into pinned memory, from which a GPU copies
    while the program goes on.

    Raises InputError for a batch, start, augmentation or number of processes that cannot be, and
    while iterating for an image file that cannot be read.
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
    return _load(
        _TrainBatches(split, dataset, batch, epoch, seed, augment, rank, world),
        range(start, steps),
        workers,
        pin,
    )


def _load(
    batches: TorchDataset[Batch | InputError], numbers: range, workers: int, pin: bool
) -> Iterator[Batch]:
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=pin,
        # Without one, iterating draws from the global random state, and dropout would depend on
        # how often a run was resumed. What the loader does with it changes no batch.
        generator=torch.Generator(),
    )
    for item in loader:
        if isinstance(item, InputError):
            raise item
        yield item


class _TrainBatches(TorchDataset[Batch | InputError]):
    """Item i is this rank's part of the epoch's batch i.

    Or what is wrong with its files: an error that a loader process raises would arrive with that
    process' traceback for a message.
    """

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
        self.split, self.batch, self.seed = split, batch, seed
        self.mean, self.std, self.size = dataset.mean, dataset.std, dataset.image_size
        self.augmentation = AUGMENTATIONS[augment]
        self.first_step = epoch * steps_per_epoch(split, batch)
        self.order = torch.randperm(len(split), generator=generator(seed, "data", epoch))
        self.part = slice(rank * batch // world, (rank + 1) * batch // world)

    def __getitem__(self, index: int) -> Batch | InputError:
        chosen = self.order[index * self.batch : (index + 1) * self.batch]
        # Every rank augments the whole batch: each image gets the draw it gets in one process.
        random = generator(self.seed, "augment", self.first_step + index)
        try:
            whole = self._framed(self.split[chosen], random)
        except InputError as error:
            return error
        images = self.augmentation.change(whole, random)[self.part]
        images = resize(images, self.size)
        return _normalise(images, self.mean, self.std), self.split.labels[chosen[self.part]]

    def _framed(self, whole: Split, random: torch.Generator) -> Tensor:
        """The images of the whole batch or, by the augmentation, a random part of each."""
        size = self.size
        draws = box_draws(len(whole), random) if self.augmentation.resized_crop else None
        if isinstance(whole.images, Tensor):
            return (
                whole.images if draws is None else random_resized_crops(whole.images, size, draws)
            )
        # To decode takes long: files of the other ranks stay black, and are cut off again.
        framed = torch.zeros(len(whole), 3, size, size, dtype=torch.uint8)
        files = whole.images[self.part]
        if draws is None:
            framed[self.part] = files.centre_crops(size)
        else:
            framed[self.part] = files.random_crops(size, draws[self.part])
        return framed


def eval_batches(
    split: Split, dataset: Dataset, batch: int, *, workers: int = 0
) -> Iterator[Batch]:
    """All of ``split`` in order, normalised, in batches of which the last may be smaller.

    ``workers`` loader processes decode files; of images in memory, this process makes batches.

    Raises InputError at once, not at the first batch, for a batch below 1; and while iterating for
    an image file that cannot be read.
    """
    if batch < 1:
        raise InputError(f"batch {batch} is impossible: give at least 1")
    if isinstance(split.images, Tensor):
        workers = 0
    batches = _EvalBatches(split, dataset, batch)
    return _load(batches, range(-(-len(split) // batch)), workers, pin=False)


class _EvalBatches(TorchDataset[Batch | InputError]):
    """Item i is the split's batch i, or what is wrong with its files."""

    def __init__(self, split: Split, dataset: Dataset, batch: int) -> None:
        self.split, self.batch = split, batch
        self.mean, self.std, self.size = dataset.mean, dataset.std, dataset.image_size

    def __getitem__(self, index: int) -> Batch | InputError:
        part, size = slice(index * self.batch, (index + 1) * self.batch), self.size
        images = self.split.images[part]
        try:
            pixels = (
                resize(images, size) if isinstance(images, Tensor) else images.centre_crops(size)
            )
        except InputError as error:
            return error
        return _normalise(pixels, self.mean, self.std), self.split.labels[part]


def _normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 to float32 of mean 0 and deviation 1 a channel."""
    return (images.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
