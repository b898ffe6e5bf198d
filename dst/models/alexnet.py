"""AlexNet, as in torchvision, and the same network for small images.

Krizhevsky, "One weird trick for parallelizing convolutional neural networks", arXiv:1404.5997.
"""

from typing import TYPE_CHECKING

from torch import nn

from growth.errors import InputError

if TYPE_CHECKING:
    from torchvision.models import AlexNet

SMALLEST_IMAGE = 63  # px: below, nothing is left for the last pooling
SMALLEST_SMALL_IMAGE = 8  # px: the digits of scikit-learn


def alexnet(
    suffix: str, *, in_channels: int, image_size: int, classes: int, dropout: float
) -> "AlexNet":
    """``alexnet``: torchvision's, for colour images of 63 px or more; dropout in the classifier."""
    if in_channels != 3 or image_size < SMALLEST_IMAGE:
        raise InputError(
            f"alexnet needs images of 3 channels and at least {SMALLEST_IMAGE} px, not of "
            f"{in_channels} channels and {image_size} px: use alexnet-small"
        )
    return _torchvision_alexnet(classes, dropout)


def alexnet_small(
    suffix: str, *, in_channels: int, image_size: int, classes: int, dropout: float
) -> "AlexNet":
    """``alexnet-small``: AlexNet with a 3x3 stem of stride 2 and only the middle pooling.

    The maps of a 28 px image are 14, 6 and 6 px wide and those of a 32 px image 16, 7 and 7, so
    the classifier starts from 6 x 6 distinct positions, as it does at 224 px. Names and shapes of
    all weights but the stem's are torchvision's.
    """
    if image_size < SMALLEST_SMALL_IMAGE:
        raise InputError(
            f"alexnet-small needs images of at least {SMALLEST_SMALL_IMAGE} px, not of "
            f"{image_size} px: use an mlp or larger images"
        )
    model = _torchvision_alexnet(classes, dropout)
    model.features[0] = nn.Conv2d(in_channels, 64, kernel_size=3, stride=2, padding=1)
    model.features[2] = nn.Identity()
    model.features[12] = nn.Identity()
    return model


def alexnet_narrow(
    suffix: str, *, in_channels: int, image_size: int, classes: int, dropout: float
) -> "AlexNet":
    """``alexnet-narrow``: alexnet-small with a quarter of the channels and of 512 neurons where it
    has 4096: most of its weights are in the fully connected layers, too, and it trains on a CPU."""
    model = alexnet_small(
        suffix, in_channels=in_channels, image_size=image_size, classes=classes, dropout=dropout
    )
    channels = in_channels
    for place, layer in enumerate(model.features):
        if isinstance(layer, nn.Conv2d):
            n_out, kernel = layer.out_channels // 4, layer.kernel_size[0]
            stride, padding = layer.stride[0], int(layer.padding[0])
            model.features[place] = nn.Conv2d(channels, n_out, kernel, stride, padding)
            channels = n_out
    for place, sizes in {1: (channels * 36, 512), 4: (512, 512), 6: (512, classes)}.items():
        model.classifier[place] = nn.Linear(*sizes)
    return model


def _torchvision_alexnet(classes: int, dropout: float) -> "AlexNet":
    import torchvision  # slow to import, and no other model needs it

    model: AlexNet = torchvision.models.alexnet(weights=None, num_classes=classes, dropout=dropout)
    for module in model.modules():
        # An in-place ReLU overwrites the layer's output, which backward hooks do not allow.
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model
