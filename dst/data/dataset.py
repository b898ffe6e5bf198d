"""What a data set is once it is in memory, and how it is cut into splits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dst.seeding import generator
from growth.errors import InputError


@dataclass(frozen=True, eq=False)
class Split:
    """images: (n, channels, height, width) uint8; labels: (n,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> "Split":
        """The images and labels at ``indices``: (m,) int64."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class Dataset:
    """mean and std: (channels,) float32, of the training images scaled to 0..1.

    ``augment`` names the augmentation that is usual for this data (a key of AUGMENTATIONS).
    """

    name: str
    classes: int
    train: Split
    val: Split
    test: Split
    mean: Tensor
    std: Tensor
    augment: str

    @property
    def in_channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def image_size(self) -> int:
        """Height and width, in pixels."""
        return self.train.images.shape[2]


@dataclass(frozen=True, eq=False)
class Source:
    """What a loader reads, before it is split.

    ``train`` holds the validation images too. ``test`` is the official test split, or how many
    images of ``train`` to hold out where there is none. ``val_size`` is the default. ``mean_std``
    are the constants that the literature uses; None computes them from the training split.
    """

    train: Split
    test: Split | int
    val_size: int
    classes: int
    augment: str
    mean_std: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def split_source(name: str, source: Source, split_seed: int, val_size: int | None) -> Dataset:
    """Cut ``source`` into train, val and test, stratified by class.

    The test images do not depend on ``val_size``. Raises InputError for an impossible val_size.
    """
    rest, test = source.train, source.test
    if isinstance(test, int):
        rest, test = _hold_out(rest, test, generator(split_seed, "split.test", 0))
    size = source.val_size if val_size is None else val_size
    if not 0 <= size < len(rest):
        raise InputError(
            f"val_size {size} is impossible for {name}, which has {len(rest)} images to train on: "
            f"give 0 to {len(rest) - 1}"
        )
    train, val = _hold_out(rest, size, generator(split_seed, "split.val", 0))
    if source.mean_std is None:
        mean, std = _mean_std(train.images)
    else:
        mean, std = (torch.tensor(values) for values in source.mean_std)
    return Dataset(name, source.classes, train, val, test, mean, std, source.augment)


def _hold_out(split: Split, size: int, random: torch.Generator) -> tuple[Split, Split]:
    """(the rest, ``size`` images whose class shares are as near to the whole's as can be)."""
    counts = torch.bincount(split.labels)
    # Largest remainder: each class gets its share rounded down, those that lost most one more.
    # Whole numbers only, so that equal classes tie exactly; the stable sort then takes the first.
    quota = counts * size // len(split)
    remainder = counts * size % len(split)
    missing = size - int(quota.sum())
    quota[remainder.argsort(descending=True, stable=True)[:missing]] += 1
    held_out = torch.zeros(len(split), dtype=torch.bool)
    for label, wanted in enumerate(quota.tolist()):
        members = (split.labels == label).nonzero().squeeze(1)
        held_out[members[torch.randperm(len(members), generator=random)[:wanted]]] = True
    return split[~held_out], split[held_out]


def _mean_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel, (channels,) float32 each, of the pixels scaled to 0..1."""
    pixels = images.transpose(0, 1).flatten(1).double() / 255
    return pixels.mean(1).float(), pixels.std(1, correction=0).float()
