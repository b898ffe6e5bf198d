"""Multilayer perceptrons on flattened images."""

import re
from functools import partial
from itertools import pairwise

from torch import nn

from growth.errors import InputError


def mlp(
    suffix: str, *, in_channels: int, image_size: int, classes: int, dropout: float
) -> nn.Sequential:
    """``mlp-W1-W2-...``: hidden layers of W1, W2, ... neurons; dropout after each hidden ReLU.

    (batch, in_channels, image_size, image_size) -> logits (batch, classes).
    """
    if re.fullmatch(r"[1-9]\d{0,5}(-[1-9]\d{0,5})*", suffix, re.ASCII) is None:
        raise InputError(
            f"model 'mlp-{suffix}' is not of the form mlp-W1-W2-... with hidden widths from 1 to "
            "999999: write for example mlp-300-100"
        )
    widths = [in_channels * image_size**2, *(int(width) for width in suffix.split("-"))]
    layers: list[nn.Module] = [nn.Flatten()]
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def _published(
    widths: str, suffix: str, *, in_channels: int, image_size: int, classes: int, dropout: float
) -> nn.Sequential:
    """The perceptron of a paper, whose name says no widths."""
    return mlp(
        widths, in_channels=in_channels, image_size=image_size, classes=classes, dropout=dropout
    )


# Hartenstein et al., "Weight Pruning for Deep Neural Networks on GPUs", table 2, on MNIST.
mlp_group = partial(_published, "128-128-256-256-512-512")
# Hu et al., "Techniques to Accelerate the Neural Networks", on EMNIST: "three dense layers" of
# widths that the paper leaves open. These are LeNet-300-100's, which Frankle & Carbin, "The Lottery
# Ticket Hypothesis", ICLR 2019, arXiv:1803.03635, found their tickets in.
mlp_ticket = partial(_published, "300-100")
