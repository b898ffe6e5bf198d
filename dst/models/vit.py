"""Vision transformers, built by torchvision.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv:2010.11929.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from growth.errors import InputError

if TYPE_CHECKING:
    from torchvision.models import VisionTransformer


def vit_b_16(
    suffix: str, *, in_channels: int, image_size: int, classes: int, dropout: float
) -> VisionTransformer:
    """``vit-b-16``: ViT-Base over patches of 16 px; 12 blocks of width 768 with 12 heads."""
    if image_size % 16:
        raise InputError(
            f"vit-b-16 cuts images into patches of 16 px, which {image_size} px are no multiple "
            "of: use --image-size, for example --image-size=224, or vit-small"
        )
    return _vision_transformer(16, 12, 12, 768, in_channels, image_size, classes, dropout)


def vit_small(
    suffix: str, *, in_channels: int, image_size: int, classes: int, dropout: float
) -> VisionTransformer:
    """``vit-small``: for small images, over patches of 4 px; 6 blocks of width 192 with 3 heads,
    half the depth of DeiT-Tiny (Touvron et al. 2021, arXiv:2012.12877)."""
    if image_size % 4:
        raise InputError(
            f"vit-small cuts images into patches of 4 px, which {image_size} px are no multiple "
            "of: use --image-size, for example --image-size=32"
        )
    return _vision_transformer(4, 6, 3, 192, in_channels, image_size, classes, dropout)


def vit_narrow(
    suffix: str, *, in_channels: int, image_size: int, classes: int, dropout: float
) -> VisionTransformer:
    """``vit-narrow``: vit-small with 4 blocks of width 64 with 2 heads, which trains on a CPU."""
    if image_size % 4:
        raise InputError(
            f"vit-narrow cuts images into patches of 4 px, which {image_size} px are no multiple "
            "of: use --image-size, for example --image-size=32"
        )
    return _vision_transformer(4, 4, 2, 64, in_channels, image_size, classes, dropout)


def _vision_transformer(
    patch: int,
    depth: int,
    heads: int,
    width: int,
    in_channels: int,
    image_size: int,
    classes: int,
    dropout: float,
) -> VisionTransformer:
    """dropout: after the positions are added, and in every block after attention and after both
    layers of the MLP, as in the paper; none on attention weights."""
    import torchvision  # slow to import, and most models do not need it

    model: VisionTransformer = torchvision.models.VisionTransformer(
        image_size=image_size,
        patch_size=patch,
        num_layers=depth,
        num_heads=heads,
        hidden_dim=width,
        mlp_dim=4 * width,
        num_classes=classes,
        dropout=dropout,
    )
    if in_channels != 3:
        # Initialised as torchvision does it.
        stem = nn.Conv2d(in_channels, width, kernel_size=patch, stride=patch)
        nn.init.trunc_normal_(stem.weight, std=math.sqrt(1 / (in_channels * patch**2)))
        nn.init.zeros_(stem.get_parameter("bias"))
        model.conv_proj = stem
    return model
