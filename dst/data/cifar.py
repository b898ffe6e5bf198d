"""CIFAR-10 and CIFAR-100, read from the official Python archive's folder by torchvision.

torchvision compares each file with its published md5 before it unpickles it.
"""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dst.data.dataset import DataOptions, Source, Split
from growth.errors import InputError

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

VAL_SIZE = 5000


def cifar10(options: DataOptions) -> Source:
    """50,000 training and 10,000 test images of 32 px in ten classes."""
    train, test = (_read("CIFAR10", options, part) for part in (True, False))
    mean_std = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    return Source(train, test, VAL_SIZE, classes=10, augment="crop-flip", mean_std=mean_std)


def cifar100(options: DataOptions) -> Source:
    """50,000 training and 10,000 test images of 32 px in a hundred classes."""
    train, test = (_read("CIFAR100", options, part) for part in (True, False))
    mean_std = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    return Source(train, test, VAL_SIZE, classes=100, augment="crop-flip", mean_std=mean_std)


def _read(class_name: str, options: DataOptions, train: bool) -> Split:
    """The official training or test split. Raises InputError where it cannot be read."""
    import torchvision  # slow to import, and no other data set needs it

    cifar: type[CIFAR10] = getattr(torchvision.datasets, class_name)
    folder = options.data_dir / cifar.base_folder
    try:
        data = cifar(options.data_dir, train=train, download=options.download)
    except (RuntimeError, OSError) as error:  # torchvision's word for missing and damaged files
        if options.download:
            state = f"could not be downloaded ({error})"
        else:
            state = "has missing or damaged files" if os.path.isdir(folder) else "does not exist"
        raise InputError(
            f"the {class_name} folder {folder} {state}\n{_how_to_get(cifar, options.data_dir)}"
        ) from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(data.targets))


def _how_to_get(cifar: type["CIFAR10"], data_dir: Path) -> str:
    """What to type, line by line."""
    files = [name for name, _ in cifar.train_list + cifar.test_list] + [cifar.meta["filename"]]
    return f"""\
Either pass --download, or fetch the official archive by hand:
  mkdir -p {shlex.quote(str(data_dir))} && cd {shlex.quote(str(data_dir))}
  curl -LO {cifar.url}
  # without curl: wget {cifar.url}
  echo "{cifar.tgz_md5}  {cifar.filename}" | md5sum -c
  tar -xzf {cifar.filename}
which makes the folder {data_dir / cifar.base_folder} with the files
  {" ".join(files)}
Where it is elsewhere, name its parent: --data-dir=/path/to/the/parent"""
