"""MNIST and EMNIST, read from the official files by torchvision."""

import os
from typing import Any

import torch

from dst.data.dataset import DataOptions, Source, Split
from growth.errors import InputError


def mnist(options: DataOptions) -> Source:
    """60,000 training and 10,000 test images of 28 px: the ten digits."""
    from torchvision.datasets import MNIST

    train, test = (_read(MNIST, options, train=part) for part in (True, False))
    mean_std = ((0.1307,), (0.3081,))
    return Source(train, test, val_size=5000, classes=10, augment="shift", mean_std=mean_std)


def emnist_balanced(options: DataOptions) -> Source:
    """112,800 training and 18,800 test images of 28 px: digits and letters, in 47 classes, because
    fifteen letters look alike in upper and lower case (Cohen et al. 2017)."""
    train, test = (_emnist(options, "balanced", part) for part in (True, False))
    return Source(train, test, val_size=4700, classes=47, augment="shift")


def emnist_letters(options: DataOptions) -> Source:
    """124,800 training and 20,800 test images of 28 px: the 26 letters, upper and lower case
    together."""
    train, test = (_emnist(options, "letters", part) for part in (True, False))
    # The files count the letters from 1.
    train, test = (Split(split.images, split.labels - 1) for split in (train, test))
    return Source(train, test, val_size=2600, classes=26, augment="shift")


def _emnist(options: DataOptions, split: str, train: bool) -> Split:
    from torchvision.datasets import EMNIST

    read = _read(EMNIST, options, train=train, split=split)
    # The files hold each image with its rows and columns exchanged.
    assert isinstance(read.images, torch.Tensor)
    return Split(read.images.transpose(2, 3).contiguous(), read.labels)


def _read(kind: Any, options: DataOptions, **which: Any) -> Split:
    """The official training or test split. Raises InputError where it cannot be read."""
    folder = options.data_dir / kind.__name__ / "raw"
    try:
        data = kind(options.data_dir, download=options.download, **which)
        if len(data.data) != len(data.targets):
            raise ValueError(f"{len(data.data)} images and {len(data.targets)} labels")
    # torchvision's words for a file that is missing, and for one that is no idx file or a cut one.
    except (RuntimeError, OSError, ValueError, TypeError, AssertionError, KeyError) as error:
        url = kind.url if kind.__name__ == "EMNIST" else kind.mirrors[0]
        if not options.download and not os.path.isdir(folder):
            raise InputError(
                f"the {kind.__name__} folder {folder} does not exist: pass --download, or put the "
                f"unpacked idx-ubyte files of {url} there, or name the folder that holds "
                f"{kind.__name__}/raw by --data-dir"
            ) from error
        state = "could not be filled" if options.download else "has missing or damaged files"
        raise InputError(
            f"the {kind.__name__} folder {folder} {state} ({' '.join(str(error).split())}): put "
            f"the unpacked idx-ubyte files of {url} there, or remove it and pass --download"
        ) from error
    return Split(data.data.unsqueeze(1), data.targets)
