"""What a data set is once it is read, and how it is cut into splits."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dst.data.image_files import ImageFiles
from dst.seeding import generator
from growth.errors import InputError


@dataclass(frozen=True)
class DataOptions:
    """What a loader may need to know; each takes what concerns it."""

    data_dir: Path
    """Folder of the data sets that no library ships."""
    download: bool = False
    """Whether to fetch what is missing there."""
    difficulty: float = 1.0
    """Of ``strokes``: 0 is clean shapes."""


@dataclass(frozen=True, eq=False)
class Split:
    """images: (n, channels, height, width) uint8, or n files; labels: (n,) int64."""

    images: Tensor | ImageFiles
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> "Split":
        """The images and labels at ``indices``: (m,) int64."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class Dataset:
    """mean and std: (channels,) float32, of the training images scaled to 0..1.

    ``image_size`` is the height and width, in pixels, at which batches show the images, whatever
    their own. ``augment`` names the augmentation that is usual for this data, one of AUGMENTATIONS.
    """

    name: str
    classes: int
    train: Split
    val: Split
    test: Split
    mean: Tensor
    std: Tensor
    augment: str
    image_size: int

    @property
    def in_channels(self) -> int:
        return len(self.mean)


@dataclass(frozen=True, eq=False)
class Source:
    """What a loader reads, before it is split.

    ``train`` holds the validation images too, unless ``val`` does. ``test`` is the official test
    split, or how many images of ``train`` to hold out where there is none. ``val_size`` is the
    default. ``mean_std`` are the constants that the literature uses; None computes them from the
    training split, and ``image_size`` None is the images' own: both for images in memory only.
    """

    train: Split
    test: Split | int
    val_size: int
    classes: int
    augment: str
    mean_std: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    image_size: int | None = None
    val: Split | None = None


def split_source(
    name: str, source: Source, split_seed: int, val_size: int | None, image_size: int | None
) -> Dataset:
    """Cut ``source`` into train, val and test, stratified by class.

    The test images do not depend on ``val_size``. Raises InputError for an impossible val_size.
    """
    train, val, test = source.train, source.val, source.test
    for split in (train, val, test):
        if isinstance(split, Split) and len(split) and int(split.labels.max()) >= source.classes:
            raise InputError(
                f"{name} has a label {int(split.labels.max())}, but {source.classes} classes: its "
                "files are not those that they should be"
            )
    if isinstance(test, int):
        train, test = _hold_out(train, test, generator(split_seed, "split.test", 0))
    if val is None:
        size = source.val_size if val_size is None else val_size
        if not 0 <= size < len(train):
            raise InputError(
                f"val_size {size} is impossible for {name}, which has {len(train)} images to train "
                f"on: give 0 to {len(train) - 1}"
            )
        train, val = _hold_out(train, size, generator(split_seed, "split.val", 0))
    elif val_size is not None:
        raise InputError(
            f"val_size {val_size} is impossible for {name}, which brings its own validation "
            "images: leave --val-size away"
        )
    mean_std = source.mean_std or _mean_std(train)
    mean, std = (torch.tensor(values) for values in mean_std)
    size = image_size or source.image_size or _own_size(train)
    return Dataset(name, source.classes, train, val, test, mean, std, source.augment, size)


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


def _mean_std(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel, of the pixels of images in memory, scaled to 0..1."""
    assert isinstance(split.images, Tensor)
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    # By how often each of the 256 levels occurs: a float copy would be eight times the images.
    for channel in split.images.transpose(0, 1).flatten(1):
        share = torch.bincount(channel, minlength=256).double() / channel.numel()
        means.append(float((share * levels).sum()))
        deviations.append(float((share * (levels - means[-1]).square()).sum().sqrt()))
    return tuple(means), tuple(deviations)


def _own_size(split: Split) -> int:
    assert isinstance(split.images, Tensor)
    return split.images.shape[2]
