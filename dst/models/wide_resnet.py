"""Wide residual networks for small images.

Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016, arXiv:1605.07146.
"""

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growth.errors import InputError


class Block(nn.Module):
    """Pre-activation basic block: (BN-ReLU-conv3x3) twice, dropout before the second convolution.

    (batch, n_in, h, w) -> (batch, n_out, h / stride, w / stride), rounded up.
    """

    def __init__(self, n_in: int, n_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(n_in)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if n_in != n_out or stride != 1:
            self.shortcut = nn.Conv2d(n_in, n_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        # As in the authors' code, a convolved shortcut starts after the shared BN-ReLU.
        identity = x if self.shortcut is None else self.shortcut(activated)
        out = self.dropout(F.relu(self.bn2(self.conv1(activated))))
        residual: Tensor = self.conv2(out)
        return identity + residual


class WideResNet(nn.Module):
    """WRN-depth-width: stem, three groups of n = (depth - 4) / 6 blocks, BN-ReLU-average-linear.

    images: (batch, in_channels, h, w) -> logits: (batch, classes).
    """

    def __init__(
        self, depth: int, width: int, *, in_channels: int, classes: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.group1 = _group(blocks, 16, 16 * width, 1, dropout)
        self.group2 = _group(blocks, 16 * width, 32 * width, 2, dropout)
        self.group3 = _group(blocks, 32 * width, 64 * width, 2, dropout)
        self.bn = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.group3(self.group2(self.group1(self.stem(images))))
        logits: Tensor = self.fc(torch.mean(F.relu(self.bn(x)), dim=(2, 3)))
        return logits


def _group(blocks: int, n_in: int, n_out: int, stride: int, dropout: float) -> nn.Sequential:
    """``blocks`` blocks, of which the first changes the shape."""
    first = Block(n_in, n_out, stride, dropout)
    return nn.Sequential(first, *(Block(n_out, n_out, 1, dropout) for _ in range(blocks - 1)))


def wide_resnet(
    suffix: str, *, in_channels: int, image_size: int, classes: int, dropout: float
) -> WideResNet:
    """``wrn-DEPTH-WIDTH``, for images of any size; dropout between a block's two convolutions."""
    numbers = re.fullmatch(r"(\d{1,4})-(\d{1,4})", suffix, re.ASCII)
    if numbers is None:
        raise InputError(
            f"model 'wrn-{suffix}' is not of the form wrn-DEPTH-WIDTH with two whole numbers: "
            "write for example wrn-16-8"
        )
    depth, width = int(numbers[1]), int(numbers[2])
    if depth < 10 or depth % 6 != 4:
        raise InputError(
            f"model 'wrn-{suffix}' has depth {depth}, but a WRN's depth is 6n + 4 with n >= 1: "
            "take 10, 16, 22, 28, 34 or 40"
        )
    if width < 1:
        raise InputError(f"model 'wrn-{suffix}' has width {width}: take a factor of at least 1")
    return WideResNet(depth, width, in_channels=in_channels, classes=classes, dropout=dropout)
