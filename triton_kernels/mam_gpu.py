"""Multiply-and-max/min on a GPU: the functions of :mod:`triton_kernels.mam_reference` as kernels.

x, weight, values and dy are float32, float16 or bfloat16, all in the same, on one GPU. Products are
formed and compared in float32, exactly for half precision, and the winners are those of the
reference. Nothing waits for the host.

Gradients are the same bits every time, and closer than float32 (see
:mod:`triton_kernels.mam_scatter`). ``deterministic=False`` adds float32 in any order: one pass
instead of two, and a sixth of the memory.

Every function raises ValueError on arguments of the wrong kind, ImportError without triton.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels.layout import Layout
from triton_kernels.mam_reference import Winners
from triton_kernels.mam_scatter import Args, scatter
from triton_kernels.require import interpreting, require_triton

# What is searched or summed at the same time: 8 M cells, of at most 24 bytes.
CELLS = 1 << 23
# Programs of the search: enough for the largest GPU where samples and outputs are few.
PROGRAMS = 1024
# A tile's number has 16 bits.
MOST_TILES = 1 << 16
PURPOSE = "multiply-and-max/min on a GPU"


class Launch(NamedTuple):
    """How the search is compiled: samples and outputs of a program; inputs of a tile, and of a turn
    of the inner loop; warps."""

    samples: int
    outputs: int
    depth: int
    unroll: int
    num_warps: int


def choose_launch(n_in: int) -> Launch:
    """16 products a thread and input. Twice as many would spill; and with another shape, Triton
    carries every input through shared memory, or loads each operand of each product.

    A deeper tile is asked less often who won, and has more to be searched again.
    """
    return Launch(16, 128, 32 if n_in < 2048 else 64, 4, 4)


# Outputs and warps of a program of the second pass, whose rows are a tile of inputs.
SECOND_PASS = (64, 4)
# Samples, entries at once and warps of a program of the sparse search.
SPARSE = (128, 8, 4)


@torch.no_grad()
def winners(x: Tensor, weight: Tensor, *, packed: bool = False) -> Winners:
    """x: (batch, n_in), weight: (n_out, n_in), any strides.

    packed: round products to the dtype of x, half precision, and compare these, two at a time where
    the GPU can: fewer instructions, but an approximation, that of a product's last bits. Winners
    are those of the rounded products, of which many more are equal: the first one wins. In float16,
    products above 65504 are infinite.
    """
    _check(x, weight, packed)
    index = torch.empty(len(x), len(weight), dtype=torch.int32, device=x.device)
    found = Winners(x.new_empty(index.shape), index, torch.empty_like(index))
    _search(x, weight, packed, found, None)
    return found


@torch.no_grad()
def count_selections(x: Tensor, weight: Tensor, counts: Tensor, *, packed: bool = False) -> None:
    """counts: int32 (n_out, n_in), += 1 for the two winners of every sample and output.

    Memory: that of a search, for at most ``CELLS`` winners at a time.
    """
    _check(x, weight, packed)
    _check_counts(counts, weight.shape, x.device)
    _search(x, weight, packed, None, counts)


@torch.no_grad()
def input_gradient(
    dy: Tensor, weight: Tensor, arg_max: Tensor, arg_min: Tensor, *, deterministic: bool = True
) -> Tensor:
    """dy: (batch, n_out) -> (batch, n_in): to the inputs of the winning products alone."""
    require_triton(PURPOSE)
    _check_gradient(dy, weight, arg_max, arg_min, len(weight))
    args = Args(arg_max, arg_min)
    return _input_gradient(dy, weight.contiguous(), args, weight.shape[1], deterministic)


@torch.no_grad()
def weight_gradient(
    dy: Tensor,
    x: Tensor,
    arg_max: Tensor,
    arg_min: Tensor,
    *,
    out: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    """dy: (batch, n_out), x: (batch, n_in) -> (n_out, n_in): to the winning weights alone. Added to
    ``out``, in place, where there is one."""
    require_triton(PURPOSE)
    _check_gradient(dy, x, arg_max, arg_min, dy.shape[-1])
    (batch, n_out), n_in = dy.shape, x.shape[1]
    grad = x.new_zeros(n_out, n_in) if out is None else out
    if grad.shape != (n_out, n_in):
        raise ValueError(f"out {tuple(grad.shape)} must be {(n_out, n_in)}, like the weight")
    if 0 in (batch, n_out):
        return grad
    dy, x, step = dy.contiguous(), x.contiguous(), max(1, CELLS // n_in)
    for start in range(0, n_out, step):
        rows = slice(start, start + step)
        args = Args(arg_max[:, rows], arg_min[:, rows])
        how = {"to_weight": True, "deterministic": deterministic}
        grad[rows] += scatter(dy[:, rows], x, args, n_in, **how)
    return grad


@torch.no_grad()
def sparse_winners(x: Tensor, values: Tensor, layout: Layout, *, absent: str = "zero") -> Winners:
    """values: (capacity, 1, 1) of single weights. absent: ``zero``: an absent weight is a weight of
    zero, whatever its input; ``none``: it does not compete, and a row without weights gives 0.

    args: positions in the layout's row order, -1 where an absent weight won. Free slots are never
    read.
    """
    return _sparse_search(x, values, layout, absent, None)


@torch.no_grad()
def count_sparse_selections(
    x: Tensor, values: Tensor, layout: Layout, counts: Tensor, *, absent: str = "zero"
) -> None:
    """counts: int32 (capacity,), by slot: += 1 for the two winners of every sample and output."""
    _check_counts(counts, values.shape[:1], x.device)
    _sparse_search(x, values, layout, absent, counts)


@torch.no_grad()
def sparse_input_gradient(
    dy: Tensor,
    values: Tensor,
    layout: Layout,
    arg_max: Tensor,
    arg_min: Tensor,
    *,
    deterministic: bool = True,
) -> Tensor:
    """dy: (batch, n_out), args: positions, or -1 -> (batch, n_in)."""
    require_triton(PURPOSE)
    _check_gradient(dy, values, arg_max, arg_min, layout.n_out)
    args = Args(arg_max, arg_min, layout)
    return _input_gradient(dy, values.contiguous(), args, layout.n_in, deterministic)


@torch.no_grad()
def sparse_weight_gradient(
    dy: Tensor,
    x: Tensor,
    layout: Layout,
    arg_max: Tensor,
    arg_min: Tensor,
    capacity: int,
    *,
    deterministic: bool = True,
) -> Tensor:
    """dy: (batch, n_out), x: (batch, n_in) -> (capacity, 1, 1), free slots zero."""
    require_triton(PURPOSE)
    _check_gradient(dy, x, arg_max, arg_min, layout.n_out)
    grad = x.new_zeros(capacity, 1, 1)
    if layout.cols.numel() == 0 or len(dy) == 0:
        return grad
    args = Args(arg_max, arg_min, layout)
    how = {"to_weight": True, "deterministic": deterministic}
    sums = scatter(dy.contiguous(), x.contiguous(), args, layout.n_in, **how)
    grad.view(-1)[layout.slots.long()] = sums.to(grad.dtype)
    return grad


def _search(
    x: Tensor, weight: Tensor, packed: bool, found: Winners | None, counts: Tensor | None
) -> None:
    """Both passes, for as many samples at a time as ``CELLS`` allows; into ``found``, or
    ``counts``."""
    (batch, n_in), n_out = x.shape, len(weight)
    if 0 in (batch, n_out):
        return
    from triton_kernels.mam_kernel import search_kernel, winners_kernel

    launch = choose_launch(n_in)
    tiles = -(-n_in // launch.depth)
    dtype = x.dtype if packed else torch.float32
    x, weight = x.contiguous(), weight.contiguous()
    w = _feature_major(weight, launch.outputs, launch.depth, dtype)
    chunk = min(batch, max(1, CELLS // n_out))
    grid = (-(-chunk // launch.samples), -(-n_out // launch.outputs))
    share = max(1, tiles * grid[0] * grid[1] // PROGRAMS)
    shares = -(-tiles // share)
    high = torch.empty(shares, chunk, n_out, dtype=torch.float32, device=x.device)
    low, where = torch.empty_like(high), torch.empty_like(high, dtype=torch.int32)
    for start in range(0, batch, chunk):
        some = x[start : start + chunk]
        features = _feature_major(some, launch.samples, launch.depth, dtype)
        # Where nothing is counted, or nothing else is written, any pointer will do.
        written = [where] * 3 if found is None else [t[start : start + chunk] for t in found]
        with torch.cuda.device_of(x):
            search_kernel[(*grid, shares)](
                features,
                w,
                high,
                low,
                where,
                len(some),
                n_out,
                len(w),
                share * launch.depth,
                features.stride(0),
                w.stride(0),
                SAMPLES=launch.samples,
                OUTPUTS=launch.outputs,
                DEPTH=launch.depth,
                UNROLL=launch.unroll,
                num_warps=launch.num_warps,
                num_stages=1,
                enable_fp_fusion=True,
            )
            winners_kernel[(len(some), -(-n_out // SECOND_PASS[0]))](
                some,
                weight,
                high,
                low,
                where,
                *written,
                where if counts is None else counts,
                len(some),
                n_out,
                n_in,
                shares,
                OUTPUTS=SECOND_PASS[0],
                DEPTH=launch.depth,
                PACKED=packed,
                COUNT=counts is not None,
                num_warps=SECOND_PASS[1],
                enable_fp_fusion=True,
            )


def _sparse_search(
    x: Tensor, values: Tensor, layout: Layout, absent: str, counts: Tensor | None
) -> Winners:
    require_triton(PURPOSE)
    _check_dtypes(x, values)
    if absent not in ("zero", "none"):
        raise ValueError(f"absent {absent!r} is not known: weights compete as 'zero', or 'none' do")
    if x.dim() != 2 or x.shape[1] != layout.n_in:
        raise ValueError(f"x {tuple(x.shape)} must be (batch, {layout.n_in})")
    _check_devices(x, values)
    from triton_kernels.mam_sparse_kernel import sparse_winners_kernel

    tile, step, num_warps = SPARSE
    features = _feature_major(x, 16, 1, x.dtype)
    padded = features.shape[1]
    shape = (0 if counts is not None else layout.n_out, padded)
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    arg_max = torch.empty(shape, dtype=torch.int32, device=x.device)
    arg_min = torch.empty_like(arg_max)
    if len(x) > 0 and layout.n_out > 0:
        with torch.cuda.device_of(x):
            sparse_winners_kernel[(layout.n_out * -(-padded // tile),)](
                features,
                values.contiguous(),
                layout.row_offsets,
                layout.cols,
                layout.slots,
                y,
                arg_max,
                arg_min,
                arg_max if counts is None else counts,
                len(x),
                padded,
                layout.n_out,
                layout.n_in,
                TILE=tile,
                STEP=step,
                ABSENT=absent == "zero",
                COUNT=counts is not None,
                num_warps=num_warps,
                enable_fp_fusion=True,
            )
    return Winners(*(t[:, : len(x)].T.contiguous() for t in (y, arg_max, arg_min)))


def _input_gradient(
    dy: Tensor, other: Tensor, args: Args, n_in: int, deterministic: bool
) -> Tensor:
    """other: a weight, or the values of one."""
    batch, n_out = dy.shape
    dx = dy.new_zeros(batch, n_in)
    if 0 in (batch, n_out) or (args.layout is not None and args.layout.cols.numel() == 0):
        return dx
    dy, step = dy.contiguous(), max(1, CELLS // n_in)
    for start in range(0, batch, step):
        some = slice(start, start + step)
        own = Args(args.high[some], args.low[some], args.layout)
        how = {"to_weight": False, "deterministic": deterministic}
        dx[some] = scatter(dy[some], other, own, n_in, **how)
    return dx


def _feature_major(x: Tensor, samples: int, features: int, dtype: torch.dtype) -> Tensor:
    """(batch, n) -> (n, batch), contiguous, both padded to multiples: with zeros, which nobody
    reads, and with the last feature, which, behind itself, wins nothing."""
    batch, n = x.shape
    copy = torch.zeros(
        -(-n // features) * features, -(-batch // samples) * samples, dtype=dtype, device=x.device
    )
    copy[:n, :batch] = x.T
    copy[n:] = copy[n - 1]
    return copy


def _check(x: Tensor, weight: Tensor, packed: bool) -> None:
    require_triton(PURPOSE)
    _check_dtypes(x, weight)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or x.shape[1] == 0:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must be (batch, n_in) and "
            "(n_out, n_in), over the same inputs, at least one"
        )
    most = MOST_TILES * choose_launch(x.shape[1]).depth
    if x.shape[1] > most:
        raise ValueError(
            f"{x.shape[1]} inputs are too many for multiply-and-max/min: at most {most} are not"
        )
    if packed and x.dtype == torch.float32:
        raise ValueError(
            "packed products are of half precision, not torch.float32: leave packed out"
        )
    _check_devices(x, weight)


def _check_gradient(
    dy: Tensor, other: Tensor, arg_max: Tensor, arg_min: Tensor, n_out: int
) -> None:
    _check_dtypes(dy, other)
    if dy.dim() != 2 or dy.shape[1] != n_out:
        raise ValueError(f"dy {tuple(dy.shape)} must be (batch, {n_out})")
    for arg in (arg_max, arg_min):
        if arg.shape != dy.shape or arg.dtype != torch.int32:
            raise ValueError(
                f"winners must be int32 {tuple(dy.shape)}, like dy, not {arg.dtype} "
                f"{tuple(arg.shape)}"
            )
    _check_devices(dy, other)


def _check_counts(counts: Tensor, shape: torch.Size, device: torch.device) -> None:
    if counts.shape != shape or counts.dtype != torch.int32 or not counts.is_contiguous():
        raise ValueError(
            f"counts must be int32 {tuple(shape)}, contiguous, not {counts.dtype} "
            f"{tuple(counts.shape)}"
        )
    if counts.device != device:
        raise ValueError(f"counts on {counts.device} must be where x is, on {device}")


def _check_dtypes(x: Tensor, other: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or x.dtype != other.dtype:
        raise ValueError(
            "activations and weights must both be float32, float16 or bfloat16, not "
            f"{x.dtype} and {other.dtype}"
        )


def _check_devices(x: Tensor, other: Tensor) -> None:
    if x.device != other.device or not (x.is_cuda or interpreting()):
        raise ValueError(
            f"tensors on {x.device} and {other.device} cannot be given to a GPU kernel: move them "
            "to one GPU"
        )
