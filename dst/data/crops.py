"""Which part of an image is shown, and at what size."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Of torchvision's RandomResizedCrop, which is Inception's (Szegedy et al. 2015): share of the area,
# and width over height, both of the box that is cut out.
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
TRIES = 10


def resize(images: Tensor, size: int) -> Tensor:
    """(batch, channels, height, width) uint8 to (batch, channels, size, size), bilinear and
    antialiased; images that have that size already are given back."""
    if images.shape[2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def box_draws(count: int, generator: torch.Generator) -> Tensor:
    """What :func:`random_box` decides by, for ``count`` images: (count, 10, 4), uniform in 0..1.

    An image takes its own row whatever its size, so that its neighbours need not be there.
    """
    return torch.rand(count, TRIES, 4, dtype=torch.float64, generator=generator)


def random_box(height: int, width: int, draws: Tensor) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random part of an image, by ``draws``: (10, 4).

    The first box of ten that fits is taken; else the largest one in the middle.
    """
    for area, ratio, down, right in draws.tolist():
        pixels = height * width * (AREA[0] + area * (AREA[1] - AREA[0]))
        aspect = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio
        wide, high = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < wide <= width and 0 < high <= height:
            top, left = int(down * (height - high + 1)), int(right * (width - wide + 1))
            return top, left, high, wide
    high = min(height, round(width / RATIO[0]))
    wide = min(width, round(height * RATIO[1]))
    return (height - high) // 2, (width - wide) // 2, high, wide


def random_resized_crops(images: Tensor, size: int, draws: Tensor) -> Tensor:
    """A random part of each of ``images`` (batch, channels, height, width), at one size:
    (batch, channels, size, size). draws: of :func:`box_draws`."""
    height, width = images.shape[2:]
    cut = []
    for image, own in zip(images, draws, strict=True):
        top, left, high, wide = random_box(height, width, own)
        cut.append(resize(image[None, :, top : top + high, left : left + wide], size))
    return torch.cat(cut)
