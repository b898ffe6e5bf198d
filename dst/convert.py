"""Swapping layers: dense -> sparse -> dense, everything else kept."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn.utils import skip_init

from dst.attention import (
    SparseAttention,
    can_open,
    close_attention,
    dense_projections,
    head_groups,
    open_attention,
)
from dst.distributions import DISTRIBUTIONS, Shape
from dst.layers import (
    SparseConv2d,
    SparseLayer,
    SparseLinear,
    alive_blocks,
    draw_keys,
    group_grid,
    sparse_layers,
)
from dst.mam import MAMLinear, SparseMAMLinear, to_mam
from dst.ramp import DensityRamp
from dst.seeding import generator
from dst.swap import carry_over, matching, swap
from growth import Grid, InputError
from growth.connections import Block

INITS = ("sparse-aware", "keep")

# Every dense attention that may be sparse, with what takes its place.
Opened = Mapping[nn.Module, SparseAttention]

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
    ramp_to: float | None = None,
    seed: int = 0,
) -> nn.Module:
    """Replace every ``nn.Linear`` and ``nn.Conv2d`` of ``model``, in place, by a sparse layer, and
    every ``nn.MultiheadAttention`` by an attention over two: ``in_proj`` and ``out_proj``.

    Returns the model (a new module only where the model itself is such a layer). Build the
    optimizer afterwards. The topology is random, drawn from (seed, layer name).

    density: share of the weights alive, in (0, 1). distribution: ``uniform``, ``er`` or ``erk``.
    block: size of a block, or (outputs, inputs); in a convolution, (outputs, channels at one tap).
    skip: layers to keep dense: names, patterns such as ``layer1.*``, and the words ``first`` and
    ``last``; by default the first layer under ``uniform``, as in RigL, and none otherwise.
    init: ``sparse-aware`` scales every output's weights by sqrt(fan-in / alive fan-in), so that
    activations keep their variance; ``keep`` leaves the weights as they are, for a trained model.
    compute: see :class:`SparseLinear`. ramp_to: another density, which a ramp will lead to (see
    ``density_ramp``): a layer that is dense at only one of the two is a sparse layer from the
    start, and ``density`` may be 1.

    A layer that makes the queries, keys and values of all heads (``in_proj``, and ``qkv`` beside an
    attribute ``num_heads``) is sparse head by head: its 3 * num_heads groups of rows have equally
    many alive blocks, and ``er`` and ``erk`` take each group for a matrix of its own. Where a group
    is not whole blocks, a warning of the ``dst`` logger says that the layer is drawn as a whole.

    A layer smaller than one block stays dense and is named in such a warning, as in
    ``density_table(model)``, and so is a convolution with groups, and an attention with kdim, vdim,
    bias_k, bias_v or add_zero_attn; silently, one to which ``er`` or ``erk`` gives density 1.
    Subclasses of the three, which may use their weights in other ways, are left alone.

    Raises InputError for a density outside (0, 1) or that rounds to no block of some layer, a block
    larger than every layer, a padding mode other than zeros, a weight that two layers share, a
    pattern that matches nothing, and a model without such layers.
    """
    _check_density(density if ramp_to is None else ramp_to, distribution)
    if not (math.isfinite(density) and 0 < density <= 1):
        raise InputError(f"density {density} at the start of a ramp must lie in (0, 1]")
    if init not in INITS:
        raise InputError(f"init {init!r} is unknown: choose {', '.join(INITS)}")
    block = (block, block) if isinstance(block, int) else (int(block[0]), int(block[1]))
    if min(block) < 1:
        raise InputError(f"block {block} must be positive")

    opened = _open_attentions(model)
    layers = _dense_layers(model, opened)
    if not layers:
        raise InputError(f"{type(model).__name__} has no nn.Linear or nn.Conv2d to make sparse")
    if skip is None:
        skip = ("first",) if distribution == "uniform" and len(layers) > 1 else ()
    kept = matching(list(layers), (skip,) if isinstance(skip, str) else skip, "skip pattern")
    # Depthwise convolutions have few weights, and networks many of them.
    grouped = {n for n, la in layers.items() if isinstance(la, nn.Conv2d) and la.groups != 1} - kept
    if grouped:
        names = [name for name in layers if name in grouped]
        _log.warning("convolutions with groups, kept dense: %s", ", ".join(names))
    kept |= grouped
    candidates = {name: layer for name, layer in layers.items() if name not in kept}
    if not candidates:
        left = " but convolutions with groups" if grouped else ""
        raise InputError(f"skip {skip!r} leaves no layer that could be sparse{left}")
    _check_convertible(model, opened, candidates)
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
    groups = _row_groups(model, opened, {name: layers[name] for name in sparse}, block)
    densities = _densities(distribution, sparse, dense, groups, density)
    later = densities
    if ramp_to is not None:
        later = _densities(distribution, sparse, dense, groups, ramp_to)

    replacements: dict[nn.Module, nn.Module] = {}
    for name, share in densities.items():
        if share == later[name] == 1.0:
            continue
        layer, group = layers[name], group_grid(grids[name], groups[name])
        try:
            keys = draw_keys(group, groups[name], share, generator(seed, name, 0))
        except InputError as error:
            where = f"layer {name!r}" + (", in each head" if groups[name] > 1 else "")
            raise InputError(f"{where}: {error}") from None
        replacements[layer] = sparse_twin(layer, keys, block, groups[name], compute, init)
    attentions = {
        closed: attention
        for closed, attention in opened.items()
        if attention.in_proj in replacements or attention.out_proj in replacements
    }
    return swap(swap(model, attentions), replacements)


def density_ramp(
    model: nn.Module, *, to: float, end: int, distribution: str = "uniform", shape: str = "cubic"
) -> DensityRamp:
    """From what is alive in a model's sparse layers now to density ``to`` at step ``end``, for
    ``DropGrow(ramp=...)``.

    The model was made by ``sparsify(..., ramp_to=to)`` with the same distribution. shape: see
    :class:`DensityRamp`. Raises InputError as ``sparsify`` does for a density that cannot be.
    """
    _check_density(to, distribution)
    layers = sparse_layers(model)
    shapes = {row.name: row.shape for row in density_table(model)}
    dense = {name: shape for name, shape in shapes.items() if name not in layers}
    groups = {name: layer.row_groups for name, layer in layers.items()}
    sparse = {name: shapes[name] for name in layers}
    final = {}
    for name, share in _densities(distribution, sparse, dense, groups, to).items():
        group = group_grid(layers[name].topology.grid, groups[name])
        try:
            final[name] = groups[name] * alive_blocks(group, share)
        except InputError as error:
            raise InputError(f"layer {name!r}, at the ramp's end: {error}") from None
    start = {name: layer.topology.alive for name, layer in layers.items()}
    return DensityRamp(start, final, end, shape)


def densify(model: nn.Module) -> nn.Module:
    """Replace every sparse layer of ``model``, in place, by ``nn.Linear``, :class:`MAMLinear` or
    ``nn.Conv2d`` with zeros where nothing is alive, and every :class:`SparseAttention` by
    ``nn.MultiheadAttention``. Returns the model; see :func:`sparsify`.

    Raises InputError for a MAM layer in which absent weights do not compete.
    """
    layers: dict[nn.Module, nn.Module] = {
        layer: _dense_twin(layer) for layer in sparse_layers(model).values()
    }
    model = swap(model, layers)
    closed: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, SparseAttention):
            twin = closed[module] = close_attention(module)
            carry_over(module, twin)
            carry_over(module.out_proj, twin.out_proj)
    return swap(model, closed)


def density_table(model: nn.Module) -> list[LayerDensity]:
    """Every linear layer and convolution with its exact number of alive weights; the projections
    inside a dense ``nn.MultiheadAttention`` count as layers."""
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
        elif isinstance(module, nn.MultiheadAttention):
            for inner, weight in dense_projections(module).items():
                size = weight.numel()
                inner = f"{name}.{inner}".lstrip(".")
                rows.append(LayerDensity(inner, tuple(weight.shape), None, size, size))
    return rows


def model_density(model: nn.Module) -> float:
    """Share of the weights of all linear layers and convolutions that is alive."""
    table = density_table(model)
    return sum(row.alive for row in table) / max(1, sum(row.total for row in table))


def _check_density(density: float, distribution: str) -> None:
    if not (math.isfinite(density) and 0 < density < 1):
        raise InputError(
            f"density {density} must lie strictly between 0 and 1 (a dense network is "
            "method 'dense')"
        )
    if distribution not in DISTRIBUTIONS:
        raise InputError(
            f"distribution {distribution!r} is unknown: choose {', '.join(DISTRIBUTIONS)}"
        )


def _open_attentions(model: nn.Module) -> Opened:
    opened: dict[nn.Module, SparseAttention] = {}
    refused = []
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            if can_open(module):
                opened[module] = open_attention(module)
                carry_over(module, opened[module])
                carry_over(module.out_proj, opened[module].out_proj)
            else:
                refused.append(name)
    if refused:
        _log.warning(
            "attention with kdim, vdim, bias_k, add_zero_attn or weights that are computed, kept "
            "dense: %s",
            ", ".join(refused),
        )
    return opened


def _opened_modules(model: nn.Module, opened: Opened) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` as if every attention were replaced already."""
    inside = {attention.get_submodule("out_proj") for attention in opened}
    for name, module in model.named_modules():
        if module in opened:
            yield from opened[module].named_modules(prefix=name)
        elif module not in inside:
            yield name, module


def _dense_layers(model: nn.Module, opened: Opened) -> dict[str, nn.Linear | nn.Conv2d]:
    return {
        name: module
        for name, module in _opened_modules(model, opened)
        # Subclasses use their weight in ways of their own.
        if isinstance(module, nn.Linear | nn.Conv2d) and type(module) in (nn.Linear, nn.Conv2d)
    }


def _row_groups(
    model: nn.Module, opened: Opened, layers: dict[str, nn.Linear | nn.Conv2d], block: Block
) -> dict[str, int]:
    """Of every layer: a group for the queries, keys and values of each attention head, else 1."""
    modules = dict(_opened_modules(model, opened))
    groups, whole = {}, []
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        groups[name] = head_groups(own, modules[parent], layer)
        if groups[name] > 1 and layer.weight.shape[0] % (groups[name] * block[0]):
            groups[name] = 1
            whole.append(name)
    if whole:
        _log.warning(
            "an attention head is not whole blocks of %s, sparse without regard to heads: %s",
            block,
            ", ".join(whole),
        )
    return groups


def _densities(
    distribution: str,
    sparse: Mapping[str, Shape],
    dense: Mapping[str, Shape],
    groups: Mapping[str, int],
    density: float,
) -> dict[str, float]:
    """Of every layer; the groups of rows of a layer are equal matrices, and so get the same."""
    parts = {
        name: [name] if groups[name] == 1 else [f"{name}[{at}]" for at in range(groups[name])]
        for name in sparse
    }
    matrices = {
        part: (shape[0] // groups[name], *shape[1:])
        for name, shape in sparse.items()
        for part in parts[name]
    }
    found = DISTRIBUTIONS[distribution](matrices, dense, density)
    return {name: found[parts[name][0]] for name in sparse}


def _check_convertible(
    model: nn.Module, opened: Opened, layers: dict[str, nn.Linear | nn.Conv2d]
) -> None:
    owners: dict[int, set[str]] = {}
    for module_name, module in _opened_modules(model, opened):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(module_name)
    for name, layer in layers.items():
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


def sparse_twin(
    layer: nn.Linear | nn.Conv2d,
    keys: torch.Tensor,
    block: Block,
    row_groups: int,
    compute: str,
    init: str,
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
            compute=compute,
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
            row_groups=row_groups,
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
    twin.bias = cast("nn.Parameter | None", layer.bias)
    carry_over(layer, twin)
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
    twin.bias = layer.bias
    if isinstance(layer, SparseMAMLinear):
        if layer.absent != "zero":
            raise InputError(
                f"a MAM layer with absent={layer.absent!r} has no dense twin, in which the zeros "
                "would compete: set its absent to 'zero' first"
            )
        twin = cast(MAMLinear, to_mam(twin, beta=layer.beta))
    carry_over(layer, twin)
    return twin
