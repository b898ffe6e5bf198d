"""The networks: ``build("wrn-16-8", ...)``.

A model is one builder in one file and one line in ``MODELS``. The builder parses what stands behind
its name (``16-8``), so that this file knows no network.
"""

import difflib
import re
from typing import NamedTuple, Protocol

from torch import nn

from dst.models.alexnet import alexnet, alexnet_narrow, alexnet_small
from dst.models.from_timm import timm_model
from dst.models.mlp import mlp, mlp_group, mlp_ticket
from dst.models.resnet import resnet18, resnet18_small, resnet50, resnet50_small
from dst.models.vit import vit_b_16, vit_narrow, vit_small
from dst.models.wide_resnet import wide_resnet
from growth.errors import InputError


class Builder(Protocol):
    """Makes the network for images of (in_channels, image_size, image_size)."""

    def __call__(
        self, suffix: str, *, in_channels: int, image_size: int, classes: int, dropout: float
    ) -> nn.Module: ...


class Model(NamedTuple):
    """How users write the name, and what builds it. A form equal to the key has no suffix; in
    others, one character parts it from the key."""

    form: str
    builder: Builder


MODELS: dict[str, Model] = {
    "wrn": Model("wrn-DEPTH-WIDTH", wide_resnet),
    "alexnet": Model("alexnet", alexnet),
    "alexnet-small": Model("alexnet-small", alexnet_small),
    "alexnet-narrow": Model("alexnet-narrow", alexnet_narrow),
    "resnet18": Model("resnet18", resnet18),
    "resnet50": Model("resnet50", resnet50),
    "resnet18-small": Model("resnet18-small", resnet18_small),
    "resnet50-small": Model("resnet50-small", resnet50_small),
    "vit-b-16": Model("vit-b-16", vit_b_16),
    "vit-small": Model("vit-small", vit_small),
    "vit-narrow": Model("vit-narrow", vit_narrow),
    "mlp-group": Model("mlp-group", mlp_group),
    "mlp-ticket": Model("mlp-ticket", mlp_ticket),
    "mlp": Model("mlp-W1-W2-...", mlp),
    "timm": Model("timm:NAME", timm_model),
}


def describe() -> str:
    """The known forms in one line, for ``--help`` and for errors."""
    return ", ".join(model.form for model in MODELS.values())


def build(
    name: str, *, in_channels: int, image_size: int, classes: int, dropout: float = 0.0
) -> nn.Module:
    """The freshly initialised network ``name``, from (batch, in_channels, image_size, image_size)
    to logits (batch, classes).

    ``dropout`` is the probability of dropping an activation, in [0, 1); each model's file says
    where it stands. Initial weights come from PyTorch's global random state.

    Raises InputError for an unknown or malformed name and for numbers out of range.
    """
    sizes = {"in_channels": in_channels, "image_size": image_size, "classes": classes}
    for what, value in sizes.items():
        if value < 1:
            raise InputError(f"{what} {value} is impossible: give a whole number of at least 1")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout {dropout} is not a probability in [0, 1): give for example 0.3")
    key = check_name(name)
    return MODELS[key].builder(
        name[len(key) + 1 :],
        in_channels=in_channels,
        image_size=image_size,
        classes=classes,
        dropout=dropout,
    )


def check_name(name: str) -> str:
    """The key of MODELS that ``name`` begins with; InputError where there is none. What stands
    behind the key is the builder's to judge."""
    if name in MODELS:
        return name
    for key, model in MODELS.items():
        if model.form != key and name.startswith(model.form[: len(key) + 1]):
            return key
    # "wnr-16-8" is near to "wrn" by its head only, "alexnet-smal" to "alexnet-small" as a whole.
    near = [
        match
        for wanted in (name.lower(), re.split("[-:]", name.lower())[0])
        for match in difflib.get_close_matches(wanted, MODELS, n=1)
    ]
    hint = f"did you mean {MODELS[near[0]].form}? Known are" if near else "give one of"
    raise InputError(f"unknown model {name!r}: {hint} {describe()}")
