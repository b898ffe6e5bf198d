"""CIFAR-10 and CIFAR-100, read from the official Python archive's folder by torchvision.

torchvision compares each file with its published md5 before it unpickles it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dst.data.dataset import Source, Split
from growth.errors import InputError

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

VAL_SIZE = 5000


def cifar10(data_dir: Path, download: bool) -> Source:
    """50,000 training and 10,000 test images of 32 px in ten classes."""
    train, test = (_read("CIFAR10", data_dir, part, download) for part in (True, False))
    mean_std = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    return Source(train, test, VAL_SIZE, classes=10, augment="crop-flip", mean_std=mean_std)


def cifar100(data_dir: Path, download: bool) -> Source:
    """50,000 training and 10,000 test images of 32 px in a hundred classes."""
    train, test = (_read("CIFAR100", data_dir, part, download) for part in (True, False))
    mean_std = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    return Source(train, test, VAL_SIZE, classes=100, augment="crop-flip", mean_std=mean_std)


def _read(class_name: str, data_dir: Path, train: bool, download: bool) -> Split:
    """The official training or test split. Raises InputError where it cannot be read."""
    import torchvision  # slow to import, and no other data set needs it

    cifar: type[CIFAR10] = getattr(torchvision.datasets, class_name)
    folder = data_dir / cifar.base_folder
    try:
        data = cifar(data_dir, train=train, download=download)
    except (RuntimeError, OSError) as error:  # torchvision's word for missing and damaged files
        if download:
            raise InputError(
                f"{class_name} could not be downloaded to the folder {folder} ({error}): put the "
                "official archive's folder there"
            ) from error
        state = "has missing or damaged files" if folder.is_dir() else "does not exist"
        raise InputError(
            f"the {class_name} folder {folder} {state}: put the official archive's folder there "
            "or pass --download"
        ) from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(data.targets))
