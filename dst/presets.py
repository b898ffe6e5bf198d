"""Settings that papers used, by name: a few options each, under whatever flags the user gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from growth import InputError

if TYPE_CHECKING:
    from dst.config import Config


class Preset(NamedTuple):
    """summary: half a line for ``--help``. options: of a Config, as ``section.option``; what a
    preset leaves out, such as the model and the data, keeps its default."""

    summary: str
    options: Mapping[str, Any]


# Evci et al. 2020, CIFAR-10: the rate falls by 5 every 30,000 of 97,656 steps.
_RIGL_PAPER: dict[str, Any] = {
    "sparsity.distribution": "erk",
    "update.update_interval": "100",
    "update.update_fraction": 0.3,
    "update.update_decay": "cosine",
    "update.update_end": 0.75,
    "update.drop": "magnitude",
    "data.batch": 128,
    "training.epochs": 250,
    "training.lr": 0.1,
    "training.lr_schedule": "steps",
    "training.lr_milestones": "0.307,0.614,0.922",
    "training.lr_factor": 0.2,
    "training.weight_decay": 5e-4,
}

# Liu et al. 2021, "Do we actually need dense over-parameterization?": long intervals, so that
# weights mature before they are judged, and half of them replaced at first.
_ITOP: dict[str, Any] = {
    "sparsity.distribution": "erk",
    "update.update_fraction": 0.5,
    "update.update_decay": "cosine",
    "update.update_end": 1.0,
    "update.drop": "magnitude",
    "data.batch": 128,
    "training.epochs": 250,
    "training.lr": 0.1,
    "training.lr_schedule": "steps",
    "training.lr_milestones": "0.5,0.75",
    "training.lr_factor": 0.1,
    "training.weight_decay": 5e-4,
}

# Palaj 2023: every convolution and linear layer sparse, a fixed share K of the live connections
# replaced at every update to the end. Its rate and weight decay are not told.
_SIMILARITY_THESIS: dict[str, Any] = {
    "method": "similarity",
    "sparsity.density": 0.2,
    "sparsity.distribution": "uniform",
    "sparsity.skip": "none",
    "update.update_fraction": 0.01,
    "update.update_decay": "constant",
    "update.update_end": 1.0,
    "data.batch": 256,
    "training.epochs": 70,
}

# Nikiforos 2024, chapter 6. The rate's course and the weight decay are not told. Both networks
# start from weights trained on ImageNet: --weights.
_MAM_THESIS: dict[str, Any] = {
    "method": "mam",
    "mam.prune_score": "gradient",
    "mam.prune_scope": "global",
    "training.optimizer": "adam",
    "training.lr_schedule": "constant",
    "training.weight_decay": 0.0,
}

PRESETS: dict[str, Preset] = {
    "set-erk": Preset("SET as in the RigL paper", {**_RIGL_PAPER, "method": "set"}),
    "rigl-erk": Preset("RigL as in its paper", {**_RIGL_PAPER, "method": "rigl"}),
    "itop-set": Preset(
        "SET updated every 1500 steps",
        {**_ITOP, "method": "set", "update.update_interval": "1500"},
    ),
    "itop-rigl": Preset(
        "RigL updated every 4000 steps",
        {**_ITOP, "method": "rigl", "update.update_interval": "4000"},
    ),
    "similarity-step": Preset(
        "Palaj's thesis, updates at every step",
        {**_SIMILARITY_THESIS, "update.update_interval": "1"},
    ),
    "similarity-epoch": Preset(
        "Palaj's thesis, updates after every epoch",
        {**_SIMILARITY_THESIS, "update.update_interval": "1ep"},
    ),
    "mam-alexnet": Preset(
        "Nikiforos' thesis, AlexNet on CIFAR-10",
        {
            **_MAM_THESIS,
            "mam.vanish_epochs": 35.0,
            "mam.keep": 0.002,
            "mam.finetune_epochs": 30,
            "data.batch": 256,
            "data.augment": "mam",
            "training.epochs": 70,
            "training.lr": 1e-4,
        },
    ),
    "mam-vit": Preset(
        "Nikiforos' thesis, ViT-B/16 on ImageNet",
        {
            **_MAM_THESIS,
            "mam.vanish_epochs": 12.0,
            "mam.keep": 0.0007,
            "mam.finetune_epochs": 1,
            "data.batch": 128,
            "data.augment": "mam-imagenet",
            "training.epochs": 50,
            "training.lr": 5e-4,
        },
    ),
}


def apply(name: str, config: Config) -> Config:
    """``config`` with the options of the preset ``name`` in place of its own."""
    if name not in PRESETS:
        raise InputError(f"preset {name!r} is unknown: choose {', '.join(PRESETS)}")
    changed: dict[str, dict[str, Any]] = {}
    for option, value in PRESETS[name].options.items():
        section, _, inner = option.rpartition(".")
        changed.setdefault(section, {})[inner] = value
    own = changed.pop("", {})
    sections = {
        section: dataclasses.replace(getattr(config, section), **values)
        for section, values in changed.items()
    }
    return dataclasses.replace(config, preset=name, **own, **sections)
