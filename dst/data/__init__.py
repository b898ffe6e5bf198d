"""Images in memory or in files: data sets, splits, augmentation and batches.

A data set is one function that returns a ``Source`` and one line in ``DATASETS``.
"""

import difflib
from collections.abc import Callable
from pathlib import Path

from dst.data.augment import AUGMENTATIONS, horizontal_flip, random_crop
from dst.data.batches import Batch, eval_batches, steps_per_epoch, train_loader
from dst.data.cifar import cifar10, cifar100
from dst.data.dataset import DataOptions, Dataset, Source, Split, split_source
from dst.data.drawn import strokes
from dst.data.folders import folder, imagenet
from dst.data.mnist import emnist_balanced, emnist_letters, mnist
from dst.data.shipped import digits, mnist_5k
from growth.errors import InputError

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Batch",
    "DataOptions",
    "Dataset",
    "Source",
    "Split",
    "eval_batches",
    "horizontal_flip",
    "load",
    "random_crop",
    "steps_per_epoch",
    "train_loader",
]

DATASETS: dict[str, Callable[[DataOptions], Source]] = {
    "mnist-5k": mnist_5k,
    "digits": digits,
    "strokes": strokes,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "mnist": mnist,
    "emnist-balanced": emnist_balanced,
    "emnist-letters": emnist_letters,
    "imagenet": imagenet,
    "folder": folder,
}


def load(
    name: str,
    *,
    data_dir: str | Path,
    download: bool = False,
    difficulty: float = 1.0,
    split_seed: int = 0,
    val_size: int | None = None,
    image_size: int | None = None,
) -> Dataset:
    """The data set ``name``, read from ``data_dir`` where no library ships it.

    ``download`` fetches what is missing. ``difficulty`` is that of strokes. ``val_size`` images,
    stratified by class, are held out of the training images (None: the data set's own number;
    0: none). The split depends on ``split_seed`` and never on the run's seed. Batches show the
    images at ``image_size`` squared (None: the data set's own).

    Raises InputError for an unknown name, for missing or damaged files and for an impossible
    number, and MissingLibraryError where the library that ships the data is not installed.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name.lower(), DATASETS, n=1)
        hint = f"did you mean {near[0]}? Known are" if near else "give one of"
        raise InputError(f"unknown data set {name!r}: {hint} {', '.join(DATASETS)}")
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size {image_size} is impossible: give at least 1 pixel")
    options = DataOptions(Path(data_dir), download, difficulty)
    return split_source(name, DATASETS[name](options), split_seed, val_size, image_size)
