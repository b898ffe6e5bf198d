"""Images in memory: data sets, splits, augmentation and batches.

A data set is one function that returns a ``Source`` and one line in ``DATASETS``.
"""

import difflib
from collections.abc import Callable
from pathlib import Path

from dst.data.augment import AUGMENTATIONS, horizontal_flip, random_crop
from dst.data.batches import Batch, eval_batches, steps_per_epoch, train_loader
from dst.data.cifar import cifar10, cifar100
from dst.data.dataset import Dataset, Source, Split, split_source
from dst.data.shipped import digits, mnist_5k
from growth.errors import InputError

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Batch",
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

# (data_dir, download) -> Source
DATASETS: dict[str, Callable[[Path, bool], Source]] = {
    "mnist-5k": mnist_5k,
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
}


def load(
    name: str,
    *,
    data_dir: str | Path,
    download: bool = False,
    split_seed: int = 0,
    val_size: int | None = None,
) -> Dataset:
    """The data set ``name``, read from ``data_dir`` where no library ships it.

    ``download`` fetches what is missing. ``val_size`` images, stratified by class, are held out of
    the training images (None: the data set's own number; 0: none). The split depends on
    ``split_seed`` and never on the run's seed.

    Raises InputError for an unknown name, missing or damaged files or an impossible val_size, and
    MissingLibraryError where the library that ships or reads the data is not installed.
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name.lower(), DATASETS, n=1)
        hint = f"did you mean {near[0]}? Known are" if near else "give one of"
        raise InputError(f"unknown data set {name!r}: {hint} {', '.join(DATASETS)}")
    return split_source(name, DATASETS[name](Path(data_dir), download), split_seed, val_size)
