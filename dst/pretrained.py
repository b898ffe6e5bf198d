"""Weights of another training, from a local file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from growth import InputError

_log = logging.getLogger(__name__)

_POSITIONS = "encoder.pos_embedding"


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state dict into ``model``: a safetensors file (such as a run's checkpoint), or one
    that ``torch.save`` wrote, of which nothing but tensors is read.

    The classifier (the last linear layer) is left as it is, with a warning of the ``dst`` logger,
    where the file's has another number of classes; the positions of torchvision's vision
    transformers are interpolated to the model's image size. Raises InputError for a file that is
    missing, damaged or of another network.
    """
    path = Path(path)
    loaded = _read(path)
    own = model.state_dict()
    if _POSITIONS in own and _POSITIONS in loaded:
        loaded = _with_positions(model, loaded)
    head = _head(model)
    unlike = [n for n, t in own.items() if n in loaded and loaded[n].shape != t.shape]
    missing = [name for name in own if name not in loaded]
    foreign = [name for name in loaded if name not in own]
    wrong = [n for n in [*unlike, *missing] if head is None or not n.startswith(f"{head}.")]
    if wrong or foreign:
        raise InputError(
            f"the weights in {path} are of another network: {_named('missing', wrong, unlike)}"
            f"{', ' if wrong and foreign else ''}{_named('unknown', foreign, [])}; give those of "
            "the same --model"
        )
    if unlike or missing:
        _log.warning("the classifier %s of %s has other classes: trained anew", head, path)
    fitting = {n: t for n, t in loaded.items() if n not in unlike}
    model.load_state_dict(fitting, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
            if any(name.startswith("model/") for name in loaded):
                loaded = {
                    name.removeprefix("model/"): tensor
                    for name, tensor in loaded.items()
                    if name.startswith("model/")
                }
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read the weights {path}: {error.strerror or error}") from None
    except Exception:
        # Whatever a foreign file makes of a parser; PyTorch's own words advise to trust the file.
        raise InputError(
            f"the file {path} holds no weights, or is damaged: give a state dict of tensors alone, "
            "that torch.save or safetensors wrote"
        ) from None
    for inner in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(inner), Mapping):
            loaded = loaded[inner]
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items()
    ):
        raise InputError(f"the file {path} is no state dict: it must map names to tensors alone")
    for name, tensor in loaded.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex():
            raise InputError(f"{name} in {path} is no plain tensor of numbers: give dense weights")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"{name} in {path} holds NaN or infinity: give weights from before")
    # DistributedDataParallel puts this before every name; the share of a MAM layer is no weight.
    names = {name: name.removeprefix("module.") for name in loaded}
    return {own: loaded[name] for name, own in names.items() if own.rpartition(".")[2] != "mix"}


def _with_positions(model: Any, loaded: dict[str, Tensor]) -> dict[str, Tensor]:
    from torchvision.models.vision_transformer import interpolate_embeddings

    try:
        return dict(interpolate_embeddings(model.image_size, model.patch_size, loaded))
    except ValueError as error:
        raise InputError(f"the weights' positions fit no square of patches: {error}") from None


def _head(model: nn.Module) -> str | None:
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None


def _named(what: str, names: list[str], unlike: list[str]) -> str:
    if not names:
        return ""
    shown = [f"{n} (another shape)" if n in unlike else n for n in names[:3]]
    return f"{what} {', '.join(shown)}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
