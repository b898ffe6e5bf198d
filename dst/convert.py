"""Swapping layers: dense -> sparse -> dense, everything else kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import skip_init

from dst.distributions import DISTRIBUTIONS
from dst.layers import SparseConv2d, SparseLayer, SparseLinear, alive_blocks, sparse_layers
from dst.seeding import generator
from growth import Grid, InputError
from growth.connections import Block
from growth.sampling import sample_distinct

INITS = ("sparse-aware", "keep")

_log = logging.getLogger(__name__)


class LayerDensity(NamedTuple):
    """One row of :func:`density_table`: weights alive and in all; block is None where it
    is dense."""

    name: str
    shape: tuple[int, ...]
    block: Block | None
    alive: int
    total: int


def sparsify(
    model: nn.Module,
    *,
    density: float,
    distribution: str = "uniform",
    block: int | Block = 1,
    skip: Sequence[str] | None = None,
    init: str = "sparse-aware",
    compute: str = "auto",
    seed: int = 0,
) -> nn.Module:
    """Replace every ``nn.Linear`` and ``nn.Conv2d`` of ``model``, in place, by a sparse layer.

    Returns the model (a new module only where the model itself is such a layer). Build the
    optimizer afterwards. The topology is random, drawn from (seed, layer name).

    density: share of the weights alive, in (0, 1). distribution: ``uniform``, ``er`` or ``erk``.
    block: size of a block, or (outputs, inputs); in a convolution, (outputs, channels at one tap).
    skip: layers to keep dense: names, patterns such as ``layer1.*``, and the words ``first`` and
    ``last``; by default the first layer under ``uniform``, as in RigL, and none otherwise.
    init: ``sparse-aware`` scales every output's weights by sqrt(fan-in / alive fan-in), so that
    activations keep their variance; ``keep`` leaves the weights as they are, for a trained model.
    compute: see :class:`SparseLinear`.

    A layer smaller than one block stays dense and is named in a warning of the ``dst`` logger, as
    in ``density_table(model)``; so does, silently, one to which ``er`` or ``erk`` gives density 1.
    Subclasses of the two layers, such as those inside ``nn.MultiheadAttention``, are left alone.

    Raises InputError for a density outside (0, 1) or that rounds to no block of some layer, a block
    larger than every layer, a convolution with groups, a weight that two layers share, a pattern
    that matches nothing, and a model without such layers.
    """
    if not (math.isfinite(density) and 0 < density < 1):
        raise InputError(
            f"density {density} must lie strictly between 0 and 1 (a dense network is "
            "method 'dense')"
        )
    if distribution not in DISTRIBUTIONS:
        raise InputError(
            f"distribution {distribution!r} is unknown: choose {', '.join(DISTRIBUTIONS)}"
        )
    if init not in INITS:
        raise InputError(f"init {init!r} is unknown: choose {', '.join(INITS)}")
    block = (block, block) if isinstance(block, int) else (int(block[0]), int(block[1]))
    if min(block) < 1:
        raise InputError(f"block {block} must be positive")

    layers = _dense_layers(model)
    if not layers:
        raise InputError(f"{type(model).__name__} has no nn.Linear or nn.Conv2d to make sparse")
    if skip is None:
        skip = ("first",) if distribution == "uniform" and len(layers) > 1 else ()
    kept = _skipped(list(layers), (skip,) if isinstance(skip, str) else skip)
    candidates = {name: layer for name, layer in layers.items() if name not in kept}
    if not candidates:
        raise InputError(f"skip {skip!r} leaves no layer that could be sparse")
    _check_convertible(model, candidates)
    grids = {name: _grid(layer, block) for name, layer in candidates.items()}
    small = [
        name for name, grid in grids.items() if grid.n_out < block[0] or grid.channels < block[1]
    ]
    if len(small) == len(candidates):
        raise InputError(
            f"block {block} is larger than every layer that may be sparse ({', '.join(candidates)})"
        )
    if small:
        _log.warning("smaller than one block of %s, kept dense: %s", block, ", ".join(small))
    shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    sparse = {
        name: shape for name, shape in shapes.items() if name in candidates and name not in small
    }
    dense = {name: shape for name, shape in shapes.items() if name not in sparse}
    densities = DISTRIBUTIONS[distribution](sparse, dense, density)

    replacements: dict[nn.Module, nn.Module] = {}
    for name, share in densities.items():
        if share == 1.0:
            continue
        layer, grid = layers[name], grids[name]
        try:
            count = alive_blocks(grid, share)
        except InputError as error:
            raise InputError(f"layer {name!r}: {error}") from None
        random = generator(seed, name, 0)
        keys = sample_distinct(grid.size, count, random)
        replacements[layer] = _sparse_twin(layer, keys, block, compute, init)
    return _swap(model, replacements)


def densify(model: nn.Module) -> nn.Module:
    """Replace every sparse layer of ``model``, in place, by ``nn.Linear`` or ``nn.Conv2d`` with
    zeros where nothing is alive. Returns the model; see :func:`sparsify`."""
    replacements: dict[nn.Module, nn.Module] = {
        layer: _dense_twin(layer) for layer in sparse_layers(model).values()
    }
    return _swap(model, replacements)


def density_table(model: nn.Module) -> list[LayerDensity]:
    """Every linear layer and convolution with its exact number of alive weights."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            grid = module.topology.grid
            shape: tuple[int, ...] = (grid.n_out, grid.channels)
            if isinstance(module, SparseConv2d):
                shape += module.kernel_size
            rows.append(LayerDensity(name, shape, grid.block, module.alive, module.total))
        elif isinstance(module, nn.Linear | nn.Conv2d):
            size = module.weight.numel()
            rows.append(LayerDensity(name, tuple(module.weight.shape), None, size, size))
    return rows


def model_density(model: nn.Module) -> float:
    """Share of the weights of all linear layers and convolutions that is alive."""
    table = density_table(model)
    return sum(row.alive for row in table) / max(1, sum(row.total for row in table))


def _dense_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    return {
        name: module
        for name, module in model.named_modules()
        if type(module)
        in (nn.Linear, nn.Conv2d)  # subclasses use their weight in ways of their own
    }


def _skipped(names: list[str], skip: Sequence[str]) -> set[str]:
    kept = set()
    for pattern in skip:
        word = {"first": names[:1], "last": names[-1:]}.get(pattern)
        found = word if word is not None else [n for n in names if fnmatchcase(n, pattern)]
        if not found:
            raise InputError(f"skip pattern {pattern!r} matches none of {', '.join(names)}")
        kept.update(found)
    return kept


def _check_convertible(model: nn.Module, layers: dict[str, nn.Linear | nn.Conv2d]) -> None:
    owners: dict[int, set[str]] = {}
    for module_name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(module_name)
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise InputError(
                f"layer {name!r} is a convolution of {layer.groups} groups, which cannot be "
                "sparse: put its name into skip"
            )
        if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            raise InputError(
                f"layer {name!r} pads with {layer.padding_mode!r}, which a sparse convolution "
                "does not: put its name into skip"
            )
        if id(layer.weight) not in owners:
            raise InputError(
                f"the weight of layer {name!r} is computed from other parameters (weight_norm, "
                "spectral_norm, prune): remove that, or put the layer's name into skip"
            )
        shared = owners[id(layer.weight)] - {name}
        if shared:
            raise InputError(
                f"layer {name!r} shares its weight with {', '.join(sorted(shared))}: put its "
                "name into skip"
            )


def _grid(layer: nn.Linear | nn.Conv2d, block: Block) -> Grid:
    if isinstance(layer, nn.Conv2d):
        taps = layer.kernel_size[0] * layer.kernel_size[1]
        return Grid.of(layer.out_channels, layer.in_channels * taps, taps, block)
    return Grid.of(layer.out_features, layer.in_features, 1, block)


def _sparse_twin(
    layer: nn.Linear | nn.Conv2d, keys: torch.Tensor, block: Block, compute: str, init: str
) -> SparseLayer:
    twin: SparseLayer
    weight, bias = layer.weight, layer.bias is not None
    # The twin's own initial weights are overwritten: they must not move the global random state.
    scratch = torch.Generator()
    if isinstance(layer, nn.Conv2d):
        twin = SparseConv2d(
            layer.in_channels,
            layer.out_channels,
            (layer.kernel_size[0], layer.kernel_size[1]),
            (layer.stride[0], layer.stride[1]),
            layer.padding
            if isinstance(layer.padding, str)
            else (layer.padding[0], layer.padding[1]),
            (layer.dilation[0], layer.dilation[1]),
            bias=bias,
            keys=keys,
            block=block,
            generator=scratch,
            device=weight.device,
            dtype=weight.dtype,
        )
    else:
        twin = SparseLinear(
            layer.in_features,
            layer.out_features,
            bias,
            keys=keys,
            block=block,
            generator=scratch,
            compute=compute,
            device=weight.device,
            dtype=weight.dtype,
        )
    dense = weight.detach()
    if init == "sparse-aware":
        fan_in = dense[0].numel()
        gain = (fan_in / twin.topology.fan_in().clamp(min=1)).sqrt().to(dense)
        dense = dense * gain.view(-1, *[1] * (dense.dim() - 1))
    twin.set_weight(dense)
    twin.values.requires_grad_(weight.requires_grad)
    _carry_over(layer, twin)
    return twin


def _dense_twin(layer: SparseLayer) -> nn.Module:
    twin: nn.Linear | nn.Conv2d
    bias = layer.bias is not None
    kind = {"device": layer.values.device, "dtype": layer.values.dtype}
    if isinstance(layer, SparseConv2d):
        padding: str | tuple[int, int] = "same" if layer.pads_unevenly else layer.padding
        twin = skip_init(
            nn.Conv2d,
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            padding,
            layer.dilation,
            bias=bias,
            **kind,
        )
    else:
        assert isinstance(layer, SparseLinear)
        twin = skip_init(nn.Linear, layer.in_features, layer.out_features, bias, **kind)
    with torch.no_grad():
        twin.weight.copy_(layer.dense_weight())
    twin.weight.requires_grad_(layer.values.requires_grad)
    _carry_over(layer, twin)
    return twin


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    """The bias itself, the mode, and hooks that the user put on the layer."""
    new.bias = old.bias
    new.train(old.training)
    for hooks in (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_is_full_backward_hook",
    ):
        # The dict itself, not a copy: the user's handle removes the hook from it.
        setattr(new, hooks, getattr(old, hooks))


def _swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put every replacement wherever its module stands, shared modules in all their places."""
    if model in replacements:
        return replacements[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])
                if isinstance(parent, nn.TransformerEncoderLayer):
                    # Its fused inference path reads the weight of its layers itself.
                    parent.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(inner, SparseLayer) for inner in module.modules()
        ):
            module.use_nested_tensor = False
    return model
