"""Augmentation of a whole batch at once: images (batch, channels, height, width), any dtype."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to ``padding`` pixels both ways; zeros come in from outside."""
    batch, channels, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, batch, 1, 1, 1), generator=generator)
    return padded[
        torch.arange(batch).view(-1, 1, 1, 1),
        torch.arange(channels).view(-1, 1, 1),
        top + torch.arange(height).view(-1, 1),
        left + torch.arange(width),
    ]


def horizontal_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    flip = torch.randint(2, (len(images), 1, 1, 1), generator=generator, dtype=torch.bool)
    return torch.where(flip, images.flip(3), images)


def none(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images as they are."""
    return images


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Up to 2 px both ways; no flip, because mirrored digits are no digits."""
    return random_crop(images, 2, generator)


def crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """The usual one for CIFAR: up to 4 px both ways, then a flip."""
    return horizontal_flip(random_crop(images, 4, generator), generator)


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "none": none,
    "shift": shift,
    "crop-flip": crop_flip,
}
