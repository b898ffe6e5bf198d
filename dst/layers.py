"""Sparse layers: values, and the topology that says where they stand."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dst.topology import Change, Topology
from growth import Grid, InputError
from growth.connections import Block
from growth.sampling import sample_distinct
from triton_kernels import COMPUTE, costs, gather, scatter, sparse_conv2d, sparse_linear
from triton_kernels.conv_cpu import Geometry

# Share of the alive blocks by which they must have changed for another choice.
_CHANGED = 0.1


class Choice(NamedTuple):
    """What ``auto`` chose, for how many alive blocks, and for a product of how many rows: see
    ``costs.Layer``."""

    way: str
    alive: int
    rows: int
    padded: int


class SparseLayer(nn.Module):
    """A layer whose weight exists only where its topology is alive.

    values: Parameter (capacity, bh, bw); ``values[slot]`` is the block that the topology puts in
    that slot. Free slots and the padding of edge blocks are zero and get no gradient.
    row_groups: the outputs are so many equal groups of rows, each drawn and updated with a budget
    of its own, such as the query, key and value rows of every attention head; 1 for most layers.
    compute: ``dense`` scatters the weight for each product, ``sparse`` never does, ``auto`` picks
    the cheaper by its first input, and again when the density has changed by a tenth. A convolution
    of single weights is scattered in any case.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    topology: Topology
    # What growth.record takes it for.
    records_as: str
    row_groups: int = 1
    compute: str
    chosen: Choice | None = None

    def _build(
        self,
        grid: Grid,
        density: float,
        keys: Tensor | None,
        bias: bool,
        compute: str,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if compute not in COMPUTE:
            raise InputError(f"compute {compute!r} is unknown: choose {', '.join(COMPUTE)}")
        self.compute = compute
        group = group_grid(grid, self.row_groups)
        if keys is None:
            keys = draw_keys(group, self.row_groups, density, generator)
        self.topology = Topology(grid, keys).to(device)
        shape = (self.topology.capacity, *grid.block)
        self.values = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        self.register_parameter(
            "bias",
            nn.Parameter(torch.zeros(grid.n_out, device=device, dtype=dtype)) if bias else None,
        )
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Sparse-aware initialisation: PyTorch's default for a layer whose fan-in is, for every
        output by itself, the number of its alive connections (Evci et al. 2022)."""
        with torch.no_grad():
            self.values.copy_(self.random_blocks(torch.arange(self.values.shape[0]), generator))
            if self.bias is not None:
                bound = self.topology.fan_in().clamp(min=1).rsqrt()
                self.bias.copy_(
                    (2 * torch.rand(bound.shape, generator=generator) - 1).to(bound) * bound
                )

    def random_blocks(self, slots: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(len(slots), bh, bw) fresh weights for blocks in these slots, zero where a slot is free
        and in padding; uniform within 1 / sqrt(alive fan-in of the output)."""
        grid, topology = self.topology.grid, self.topology
        bh, bw = grid.block
        own = topology.slots.long()
        row = torch.full((topology.capacity,), -1, dtype=torch.int64, device=own.device)
        width = torch.zeros_like(row)
        row[own] = topology.rows()
        width[own] = topology._widths()
        slots = slots.to(own.device)
        row, width = row[slots], width[slots]
        bound = F.pad(topology.fan_in().clamp(min=1).rsqrt(), (0, -grid.n_out % bh)).view(-1, bh)
        drawn = 2 * torch.rand(slots.numel(), bh, bw, generator=generator) - 1
        drawn = drawn.to(own.device) * bound[row.clamp(min=0)][:, :, None]
        inside = torch.arange(bw, device=own.device) < width[:, None]
        return (drawn * inside[:, None, :]).to(self.values.dtype)

    @property
    def total(self) -> int:
        """Number of weights if the layer were dense."""
        grid = self.topology.grid
        return grid.n_out * grid.taps * grid.channels

    @property
    def alive(self) -> int:
        """Number of alive weights, exactly: the padding of edge blocks does not count."""
        return int(self.topology.sizes().sum())

    def _rows(self, input: Tensor) -> tuple[int, int]:
        """Rows of the product of this input, and with what a sparse product drops."""
        raise NotImplementedError

    def cost(self, rows: int, padded: int) -> costs.Layer:
        """What a training step of so many rows has to compute."""
        grid, values = self.topology.grid, self.values
        taps, device = grid.taps, values.device.type
        itemsize = values.element_size()
        if torch.is_autocast_enabled(device) and values.dtype != torch.float64:
            itemsize = torch.get_autocast_dtype(device).itemsize
        pointwise = taps == 1 and self.records_as == "conv2d"
        return costs.Layer(
            *(grid.n_out, taps * grid.channels, taps, grid.block, self.topology.alive),
            *(rows, padded, itemsize, device, pointwise),
        )

    def _way(self, input: Tensor) -> str:
        """How this input's products are computed."""
        if self.compute != "auto":
            return self.compute
        alive, chosen = self.topology.alive, self.chosen
        if chosen is None or abs(alive - chosen.alive) > _CHANGED * chosen.alive:
            rows, padded = self._rows(input)
            chosen = Choice(costs.choose(self.cost(rows, padded)), alive, rows, padded)
            # An input that is not trained on, such as a single example, decides for itself alone.
            if self.training and torch.is_grad_enabled():
                self.chosen = chosen
        return chosen.way

    @property
    def density(self) -> float:
        return self.alive / self.total

    def set_weight(self, weight: Tensor) -> None:
        """Take the alive weights from a dense one, of the shape that PyTorch gives it."""
        layout, grid = self.topology.layout, self.topology.grid
        dense = self._to_columns(weight).to(self.values)
        with torch.no_grad():
            self.values.copy_(gather(dense, *layout[:3], self.values.shape[0], grid.block))

    def dense_weight(self) -> Tensor:
        """The weight with its zeros, in PyTorch's shape. For export and tests: it is as large as
        the dense layer's."""
        layout = self.topology.layout
        dense = scatter(self.values, *layout[:3], layout.n_out, layout.taps, layout.channels)
        return self._from_columns(dense).contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes the capacity of what is loaded: methods that move connections between layers
        reallocate the values. Load the optimizer's state afterwards."""
        values = state_dict.get(f"{prefix}values")
        own = self.values
        if values is not None and values.shape[1:] == own.shape[1:] and len(values) != len(own):
            topology = self.topology
            topology.edit(Change(topology.keys(), topology.keys()[:0]))
            topology.resize(len(values))
            own.grad = None
            own.data = own.new_zeros(values.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _to_columns(self, weight: Tensor) -> Tensor:
        """PyTorch's shape -> (n_out, taps, channels)."""
        raise NotImplementedError

    def _from_columns(self, dense: Tensor) -> Tensor:
        """(n_out, taps, channels) -> PyTorch's shape."""
        raise NotImplementedError


def alive_blocks(grid: Grid, density: float) -> int:
    """Number of blocks nearest to a density in (0, 1]; InputError where it is none."""
    if not (math.isfinite(density) and 0 < density <= 1):
        raise InputError(f"density {density} must lie in (0, 1]")
    count = round(density * grid.size)
    if count == 0:
        raise InputError(
            f"density {density:g} of {grid.n_rows} x {grid.n_cols} blocks of {grid.block} rounds "
            "to no block: raise the density, use smaller blocks or keep the layer dense"
        )
    return count


def group_grid(grid: Grid, row_groups: int) -> Grid:
    """The grid of each of ``row_groups`` groups of rows; InputError unless it is whole blocks."""
    if row_groups == 1:
        return grid
    if row_groups < 1 or grid.n_out % (row_groups * grid.block[0]):
        raise InputError(
            f"row_groups {row_groups} must cut {grid.n_out} outputs into equal groups of whole "
            f"blocks of {grid.block[0]}: choose another number or block, or 1"
        )
    return grid._replace(n_rows=grid.n_rows // row_groups, n_out=grid.n_out // row_groups)


def draw_keys(
    group: Grid, row_groups: int, density: float, generator: torch.Generator | None
) -> Tensor:
    """Keys of the alive blocks of a new topology, sorted int64: equally many, uniform at random, in
    each of ``row_groups`` groups of rows. InputError where the density rounds to no block."""
    count = alive_blocks(group, density)
    drawn = [sample_distinct(group.size, count, generator) for _ in range(row_groups)]
    return torch.cat([keys + group.size * at for at, keys in enumerate(drawn)])


class SparseLinear(SparseLayer):
    """``nn.Linear`` with a sparse weight. x: (..., in_features) -> (..., out_features).

    density: share of the blocks alive at first, chosen uniformly with ``generator``; or keys: the
    alive blocks as row * n_cols + col. block: (outputs, inputs) of a block. row_groups: see
    :class:`SparseLayer`; every group must be whole blocks. compute: see there.
    """

    records_as = "linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        density: float = 0.1,
        keys: Tensor | None = None,
        block: Block = (1, 1),
        row_groups: int = 1,
        compute: str = "auto",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.row_groups = row_groups
        grid = Grid.of(out_features, in_features, 1, block)
        self._build(grid, density, keys, bias, compute, generator, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        way = self._way(input)
        return sparse_linear(input, self.values, self.topology.layout, self.bias, compute=way)

    def _rows(self, input: Tensor) -> tuple[int, int]:
        rows = input.numel() // max(1, input.shape[-1])
        return rows, rows

    def _to_columns(self, weight: Tensor) -> Tensor:
        return weight.unsqueeze(1)

    def _from_columns(self, dense: Tensor) -> Tensor:
        return dense.squeeze(1)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, density={self.density:.4g}, compute={self.compute}"
            + (f", row_groups={self.row_groups}" if self.row_groups > 1 else "")
        )


class SparseConv2d(SparseLayer):
    """``nn.Conv2d`` with a sparse weight, zero-padded. x: (batch, C, H, W) -> (batch, out, H', W').

    A block is (outputs, channels at one tap); columns run over (kh, kw, C). Other arguments as in
    :class:`SparseLinear` and ``nn.Conv2d``. Raises InputError for groups and other padding modes.
    """

    records_as = "conv2d"
    padding_mode = "zeros"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        density: float = 0.1,
        keys: Tensor | None = None,
        block: Block = (1, 1),
        compute: str = "auto",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if groups != 1:
            raise InputError(
                f"a sparse convolution of {groups} groups is not supported: keep the layer dense"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.dilation = _pair(dilation)
        # (left, right, top, bottom) zeros that F.conv2d's symmetric padding cannot express.
        self._uneven_padding: tuple[int, int, int, int] | None = None
        self.padding = self._resolve_padding(padding)
        taps = self.kernel_size[0] * self.kernel_size[1]
        grid = Grid.of(out_channels, in_channels * taps, taps, block)
        self._build(grid, density, keys, bias, compute, generator, device, dtype)

    def _resolve_padding(self, padding: int | tuple[int, int] | str) -> tuple[int, int]:
        if not isinstance(padding, str):
            return _pair(padding)
        if padding == "valid":
            return (0, 0)
        if padding != "same" or self.stride != (1, 1):
            raise InputError(
                f"padding {padding!r} with stride {self.stride} must be 'valid', or 'same' with "
                "stride 1, or numbers"
            )
        high, wide = (d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True))
        if high % 2 == 0 and wide % 2 == 0:
            return (high // 2, wide // 2)
        self._uneven_padding = (wide // 2, wide - wide // 2, high // 2, high - high // 2)
        return (0, 0)

    def forward(self, input: Tensor) -> Tensor:
        return sparse_conv2d(
            self.pad(input),
            self.values,
            self.topology.layout,
            self.kernel_size,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            compute=self._way(input),
        )

    def _rows(self, input: Tensor) -> tuple[int, int]:
        batch = input.shape[0] if input.dim() == 4 else 1
        left, right, top, bottom = self._uneven_padding or (0, 0, 0, 0)
        size = input.shape[-2] + top + bottom, input.shape[-1] + left + right
        geometry = Geometry.of(
            (batch, self.in_channels, *size),
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        return batch * geometry.out[0] * geometry.out[1], batch * geometry.positions

    @property
    def pads_unevenly(self) -> bool:
        """Whether the input is padded by ``pad``, for 'same' with an even kernel."""
        return self._uneven_padding is not None

    def pad(self, x: Tensor) -> Tensor:
        """What ``padding`` cannot express."""
        return x if self._uneven_padding is None else F.pad(x, self._uneven_padding)

    def _to_columns(self, weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 3, 1).flatten(1, 2)

    def _from_columns(self, dense: Tensor) -> Tensor:
        dense = dense.view(dense.shape[0], *self.kernel_size, self.in_channels)
        return dense.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, bias={self.bias is not None}, "
            f"density={self.density:.4g}"
        )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The sparse layers of a model by name, in the order of its modules."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}
