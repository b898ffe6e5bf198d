"""Augmentation of a whole batch at once: images (batch, channels, height, width), uint8.

Every function draws from the generator that it is given, and gives uint8 images of the same shape.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

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


def random_rotation(images: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """Turn each image about its middle by up to ``degrees`` either way, bilinear; zeros come in
    from outside."""
    height, width = images.shape[2:]
    angle = (2 * torch.rand(len(images), generator=generator) - 1) * math.radians(degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(len(images))
    # Both axes run from -1 to 1, whatever the height and the width.
    rows = [cos, sin * height / width, zero, -sin * width / height, cos, zero]
    grid = F.affine_grid(
        torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False
    )
    return F.grid_sample(images.float(), grid, align_corners=False).round_().to(torch.uint8)


def colour_jitter(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Change brightness, then contrast, then saturation of each image, each by a factor in
    1 - ``strength`` to 1 + ``strength``, as torchvision's ColorJitter does in some order.

    Greyscale images have no saturation, and keep it.
    """
    shape = (3, len(images), 1, 1, 1)
    factors = 1 + strength * (2 * torch.rand(shape, generator=generator) - 1)
    brightness, contrast, saturation = factors
    pixels = (images * brightness).clamp_(0, 255)
    mean = _grey(pixels).mean((1, 2, 3), keepdim=True)
    pixels = mean.lerp(pixels, contrast).clamp_(0, 255)
    if images.shape[1] == 3:
        pixels = _grey(pixels).lerp(pixels, saturation).clamp_(0, 255)
    return pixels.round_().to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Luma (ITU-R BT.601) of red, green and blue; other channels weigh the same: (n, 1, h, w)."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def mam(images: Tensor, generator: torch.Generator) -> Tensor:
    """What Prono et al. train CIFAR-10 with: rotation, random crop, brightness, contrast and
    saturation, horizontal flip.

    They give no strengths. These are usual ones: 15 degrees, 4 px, a factor of 0.8 to 1.2.
    """
    turned = random_rotation(images, 15, generator)
    shifted = random_crop(turned, 4, generator)
    return horizontal_flip(colour_jitter(shifted, 0.2, generator), generator)


def mam_imagenet(images: Tensor, generator: torch.Generator) -> Tensor:
    """What Prono et al. train ImageNet-1k with: horizontal flip, saturation, contrast, brightness.

    They give no strengths; a factor of 0.8 to 1.2 is usual.
    """
    return colour_jitter(horizontal_flip(images, generator), 0.2, generator)


class Augmentation(NamedTuple):
    """What training sees of a batch of images."""

    change: Callable[[Tensor, torch.Generator], Tensor]
    resized_crop: bool = False
    """Whether a random part of each image is shown, at the size of the whole: cut out before
    ``change``, and from a file while it is read."""


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": Augmentation(none),
    "shift": Augmentation(shift),
    "crop-flip": Augmentation(crop_flip),
    "resized-crop-flip": Augmentation(horizontal_flip, resized_crop=True),
    "mam": Augmentation(mam),
    "mam-imagenet": Augmentation(mam_imagenet),
}
