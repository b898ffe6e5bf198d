"""Any classifier of timm, by its name there.

Wightman, "PyTorch Image Models", https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

from growth.errors import InputError, MissingLibraryError


def timm_model(
    suffix: str, *, in_channels: int, image_size: int, classes: int, dropout: float
) -> nn.Module:
    """``timm:NAME``, with fresh weights; ``dropout`` is timm's ``drop_rate``, in most models that
    of the classifier's input.

    Raises InputError for an unknown name and for a model that does not take such images, and
    MissingLibraryError without timm.
    """
    try:
        import timm
    except ImportError:
        raise MissingLibraryError("timm", "timm", f"model 'timm:{suffix}'") from None
    known = timm.list_models()
    if suffix not in known:
        near = difflib.get_close_matches(suffix, known, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise InputError(f"timm has no model {suffix!r}: {hint}")
    options: dict[str, Any] = {"in_chans": in_channels, "num_classes": classes}
    own = timm.get_pretrained_cfg(suffix)
    if own is not None and own.fixed_input_size:
        options["img_size"] = image_size
    image = torch.zeros(1, in_channels, image_size, image_size)
    try:
        model: nn.Module = timm.create_model(suffix, drop_rate=dropout, **options)
        with torch.no_grad():
            logits = model.eval()(image)
    # Each model checks in a way of its own what it takes, or fails without a check.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"timm's {suffix} does not take images of {in_channels} channels and {image_size} px "
            f"({reason}): use another --image-size or another model"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, classes):
        raise InputError(f"timm's {suffix} gives no logits of {classes} classes: use another model")
    return model.train()
