"""Residual networks, as in torchvision, and the same networks for small images.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385. As in
torchvision, the 3x3 convolution of a bottleneck has its stride ("v1.5").
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from growth.errors import InputError

if TYPE_CHECKING:
    from torchvision.models import ResNet

SMALLEST_IMAGE = 64  # px: below, the last group of blocks sees a single position


def _resnet(
    depth: int, suffix: str, *, in_channels: int, image_size: int, classes: int, dropout: float
) -> ResNet:
    """``resnet18``, ``resnet50``: torchvision's, for images of 64 px or more; dropout between the
    average over positions and the classifier."""
    if image_size < SMALLEST_IMAGE:
        raise InputError(
            f"resnet{depth} needs images of at least {SMALLEST_IMAGE} px, not of {image_size} px: "
            f"use resnet{depth}-small, or --image-size={SMALLEST_IMAGE}"
        )
    model = _torchvision_resnet(depth, classes, dropout)
    if in_channels != 3:
        model.conv1 = _stem(in_channels, kernel_size=7, stride=2)
    return model


def _small_resnet(
    depth: int, suffix: str, *, in_channels: int, image_size: int, classes: int, dropout: float
) -> ResNet:
    """``resnet18-small``, ``resnet50-small``: a 3x3 stem of stride 1 and no pooling after it, so
    that a 32 px image ends as a map of 4 x 4. Names and shapes of all other weights, and the place
    of dropout, are those of the large one."""
    model = _torchvision_resnet(depth, classes, dropout)
    model.conv1 = _stem(in_channels, kernel_size=3, stride=1)
    model.maxpool = nn.Identity()
    return model


def _torchvision_resnet(depth: int, classes: int, dropout: float) -> ResNet:
    import torchvision  # slow to import, and most models do not need it

    build = {18: torchvision.models.resnet18, 50: torchvision.models.resnet50}[depth]
    model: ResNet = build(weights=None, num_classes=classes)
    model.avgpool = nn.Sequential(model.avgpool, nn.Dropout(dropout))
    return model


def _stem(in_channels: int, *, kernel_size: int, stride: int) -> nn.Conv2d:
    """Initialised as torchvision does all convolutions of a ResNet."""
    stem = nn.Conv2d(in_channels, 64, kernel_size, stride, kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    return stem


resnet18, resnet50 = partial(_resnet, 18), partial(_resnet, 50)
resnet18_small, resnet50_small = partial(_small_resnet, 18), partial(_small_resnet, 50)
