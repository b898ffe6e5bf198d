"""Multiply-and-max/min (MAM): z[b, i] = max_j w[i, j] x[b, j] + min_j w[i, j] x[b, j].

Of equal products the lowest j wins; -0 equals 0. A NaN among the products makes the value NaN, and
the first of them is both winners. An all-negative row has its true maximum. The gradient goes to
the two winners alone; to one that is both, twice.

Products of half precision are exact, and compared so; those of float32 are rounded to float32. The
(batch, n_out, n_in) products never exist together. What serves a tensor: Triton on a GPU, numba on
the CPU, and PyTorch where these are missing and for float64 on a GPU.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from triton_kernels import mam_reference
from triton_kernels.layout import Layout
from triton_kernels.linear import cast_for_autocast
from triton_kernels.mam_reference import Winners

ABSENT = ("zero", "none")


def mam(x: Tensor, weight: Tensor, *, packed: bool = False, deterministic: bool = True) -> Tensor:
    """x: (..., n_in), weight: (n_out, n_in) -> (..., n_out), differentiable in both.

    Under autocast both operands are cast to its dtype. Kept for the backward pass: the operands and
    two int32 tensors of the size of the output.

    For a GPU, on which these are faster; on a CPU they change nothing. packed: compare products of
    half precision after rounding them to it, two at a time. deterministic=False: sum gradients in
    any order, by atomic additions.
    """
    x, weight, _ = cast_for_autocast(x, weight, None)
    _check(x, weight)
    packed = packed and x.dtype in (torch.float16, torch.bfloat16)
    values, _, _ = _mam(x.reshape(-1, weight.shape[1]), weight, packed, deterministic)
    return values.view(*x.shape[:-1], len(weight))


def winners(x: Tensor, weight: Tensor) -> Winners:
    """x: (batch, n_in), weight: (n_out, n_in) -> values and the two winning columns of each, all
    (batch, n_out). Without a gradient."""
    _check(x, weight, batched=True)
    with torch.no_grad():
        return Winners(*_implementation(x).winners(x, weight))


def input_gradient(dy: Tensor, weight: Tensor, arg_max: Tensor, arg_min: Tensor) -> Tensor:
    """dy, arg_max, arg_min: (batch, n_out), weight: (n_out, n_in) -> (batch, n_in):
    dx[b, a] += dy[b, i] w[i, a] for both winners a of (b, i)."""
    _check_winners(dy, len(weight), weight.shape[1], arg_max, arg_min)
    with torch.no_grad():
        return _implementation(dy).input_gradient(dy, weight, arg_max, arg_min)  # type: ignore[no-any-return]


def weight_gradient(
    dy: Tensor, x: Tensor, arg_max: Tensor, arg_min: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """dy, arg_max, arg_min: (batch, n_out), x: (batch, n_in) -> (n_out, n_in):
    dw[i, a] += dy[b, i] x[b, a] for both winners a of (b, i). Into ``out``, in place, where there
    is one, on top of what it holds."""
    _check_winners(dy, dy.shape[-1], x.shape[-1], arg_max, arg_min)
    if len(x) != len(dy):
        raise ValueError(f"x has {len(x)} samples, but dy has {len(dy)}")
    if out is not None:
        _check_out("out", out, (dy.shape[1], x.shape[1]), x.dtype)
    with torch.no_grad():
        return _implementation(dy).weight_gradient(dy, x, arg_max, arg_min, out=out)  # type: ignore[no-any-return]


def count_selections(x: Tensor, weight: Tensor, counts: Tensor) -> None:
    """counts: int32 (n_out, n_in), in place: += 1 for each of the two winners of every sample."""
    _check(x, weight, batched=True)
    _check_out("counts", counts, tuple(weight.shape), torch.int32)
    with torch.no_grad():
        _implementation(x).count_selections(x, weight, counts)


def sparse_mam(x: Tensor, values: Tensor, layout: Layout, *, absent: str = "zero") -> Tensor:
    """:func:`mam` of a weight given by its alive entries: x: (..., n_in) -> (..., n_out).

    values: (capacity, 1, 1); layout: of single weights.
    absent: ``zero``: a weight that is not there is a weight of zero and competes at the first such
    column of its row, whatever x is there: for finite x, exactly ``mam`` of the dense weight.
    ``none``: it does not compete; a row without weights gives 0.
    """
    x, values, _ = cast_for_autocast(x, values, None)
    _check_sparse(x, values, layout, absent)
    flat = x.reshape(-1, layout.n_in)
    y, _, _ = _sparse_mam(flat, values, *layout[:6], layout.n_out, absent == "zero")
    return y.view(*x.shape[:-1], layout.n_out)


def sparse_winners(x: Tensor, values: Tensor, layout: Layout, *, absent: str = "zero") -> Winners:
    """x: (batch, n_in) -> values and winners, (batch, n_out); winners are positions k in the
    layout's row order (``cols[k]``, ``slots[k]``), -1 where an absent weight won or the row has
    none. Without a gradient."""
    _check_sparse(x, values, layout, absent, batched=True)
    with torch.no_grad():
        return Winners(*_implementation(x).sparse_winners(x, values, layout, absent=absent))


def count_sparse_selections(
    x: Tensor, values: Tensor, layout: Layout, counts: Tensor, *, absent: str = "zero"
) -> None:
    """counts: int32 (capacity,), by slot, in place: += 1 for each of the two winners of every
    sample and output that is alive."""
    _check_sparse(x, values, layout, absent, batched=True)
    _check_out("counts", counts, (len(values),), torch.int32)
    with torch.no_grad():
        _implementation(x).count_sparse_selections(x, values, layout, counts, absent=absent)


@torch.library.custom_op("sparsegrow::mam", mutates_args=())
def _mam(
    x: Tensor, weight: Tensor, packed: bool, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _implementation(x)
    values, arg_max, arg_min = kernels.winners(x, weight, **_on_gpu(kernels, packed=packed))
    return values, arg_max, arg_min


@_mam.register_fake
def _(
    x: Tensor, weight: Tensor, packed: bool, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _like_winners(x, weight.shape[0])


@torch.library.custom_op("sparsegrow::mam_backward", mutates_args=())
def _mam_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    arg_max: Tensor,
    arg_min: Tensor,
    deterministic: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, dweight); one that is not needed is empty."""
    dx, dweight, kernels = x.new_empty(0), weight.new_empty(0), _implementation(x)
    how = _on_gpu(kernels, deterministic=deterministic)
    if need_x:
        dx = kernels.input_gradient(dy, weight, arg_max, arg_min, **how)
    if need_weight:
        dweight = kernels.weight_gradient(dy, x, arg_max, arg_min, **how)
    return dx, dweight


@_mam_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    arg_max: Tensor,
    arg_min: Tensor,
    deterministic: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    return _like_gradients(x, weight, need_x, need_weight)


def _setup(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    x, weight, _, ctx.deterministic = inputs  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, *output[1:])


def _backward(
    ctx: torch.autograd.function.FunctionCtx, dy: Tensor, *_: None
) -> tuple[Tensor | None, ...]:
    need_x, need_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
    saved, deterministic = ctx.saved_tensors, ctx.deterministic  # type: ignore[attr-defined]
    dx, dweight = _mam_backward(dy.contiguous(), *saved, deterministic, need_x, need_weight)
    return (dx if need_x else None, dweight if need_weight else None, None, None)


_mam.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("sparsegrow::sparse_mam", mutates_args=())
def _sparse_mam(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    col_offsets: Tensor,
    rows_t: Tensor,
    slots_t: Tensor,
    n_out: int,
    absent_competes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = Layout(row_offsets, cols, slots, col_offsets, rows_t, slots_t, n_out, 1, x.shape[1])
    absent = "zero" if absent_competes else "none"
    y, arg_max, arg_min = _implementation(x).sparse_winners(x, values, layout, absent=absent)
    return y, arg_max, arg_min


@_sparse_mam.register_fake
def _(
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    col_offsets: Tensor,
    rows_t: Tensor,
    slots_t: Tensor,
    n_out: int,
    absent_competes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like_winners(x, n_out)


@torch.library.custom_op("sparsegrow::sparse_mam_backward", mutates_args=())
def _sparse_mam_backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    col_offsets: Tensor,
    rows_t: Tensor,
    slots_t: Tensor,
    arg_max: Tensor,
    arg_min: Tensor,
    need_x: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor]:
    """(dx, dvalues); one that is not needed is empty."""
    layout = Layout(
        row_offsets, cols, slots, col_offsets, rows_t, slots_t, dy.shape[1], 1, x.shape[1]
    )
    dx, dvalues, kernels = x.new_empty(0), values.new_empty(0), _implementation(x)
    if need_x:
        dx = kernels.sparse_input_gradient(dy, values, layout, arg_max, arg_min)
    if need_values:
        dvalues = kernels.sparse_weight_gradient(dy, x, layout, arg_max, arg_min, len(values))
    return dx, dvalues


@_sparse_mam_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    row_offsets: Tensor,
    cols: Tensor,
    slots: Tensor,
    col_offsets: Tensor,
    rows_t: Tensor,
    slots_t: Tensor,
    arg_max: Tensor,
    arg_min: Tensor,
    need_x: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor]:
    return _like_gradients(x, values, need_x, need_values)


def _sparse_setup(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:8], *output[1:])


def _sparse_backward(
    ctx: torch.autograd.function.FunctionCtx, dy: Tensor, *_: None
) -> tuple[Tensor | None, ...]:
    need_x, need_values = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    dx, dvalues = _sparse_mam_backward(dy.contiguous(), *saved, need_x, need_values)
    return (dx if need_x else None, dvalues if need_values else None, *[None] * 8)


_sparse_mam.register_autograd(_sparse_backward, setup_context=_sparse_setup)


def _like_winners(x: Tensor, n_out: int) -> tuple[Tensor, Tensor, Tensor]:
    values = x.new_empty(x.shape[0], n_out)
    arg_max, arg_min = (torch.empty_like(values, dtype=torch.int32) for _ in range(2))
    return values, arg_max, arg_min


def _like_gradients(
    x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
    )


def _on_gpu(kernels: ModuleType, **options: bool) -> dict[str, bool]:
    """Options that the Triton kernels alone have."""
    return options if kernels.__name__.endswith("mam_gpu") else {}


def _implementation(x: Tensor) -> ModuleType:
    """The module whose functions serve tensors like x."""
    if x.is_cuda and x.dtype != torch.float64 and _installed("triton"):
        from triton_kernels import mam_gpu

        return mam_gpu
    if x.device.type == "cpu":
        if _installed("numba"):
            from triton_kernels import mam_cpu

            return mam_cpu
        _say_what_is_missing()
    return mam_reference


@cache
def _installed(name: str) -> bool:
    return find_spec(name) is not None


@cache
def _say_what_is_missing() -> None:
    logging.getLogger("triton_kernels").warning(
        "numba is not installed: MAM layers run in plain PyTorch, several times slower, in bounded "
        "memory all the same; pip install 'sparsegrow[cpu]' brings it"
    )


def _check(x: Tensor, weight: Tensor, batched: bool = False) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weight {tuple(weight.shape)} must be (n_out, n_in)")
    _check_input(x, weight, weight.shape[1], batched)


def _check_sparse(
    x: Tensor, values: Tensor, layout: Layout, absent: str, batched: bool = False
) -> None:
    if absent not in ABSENT:
        raise ValueError(f"absent is {absent!r}, but must be one of {', '.join(ABSENT)}")
    if values.dim() != 3 or values.shape[1:] != (1, 1):
        raise ValueError(
            f"values {tuple(values.shape)} must be (capacity, 1, 1): MAM knows single weights, "
            "block 1, alone"
        )
    _check_input(x, values, layout.n_in, batched)


def _check_input(x: Tensor, weight: Tensor, n_in: int, batched: bool) -> None:
    if x.dim() == 0 or (batched and x.dim() != 2):
        shape = f"(batch, {n_in})" if batched else f"(..., {n_in})"
        raise ValueError(f"x {tuple(x.shape)} must be {shape}")
    if x.shape[-1] != n_in:
        raise ValueError(f"x has {x.shape[-1]} features, but the weight has {n_in} inputs")
    if n_in == 0:
        raise ValueError("there is no largest of 0 products: MAM needs at least one input")
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} and the weight {weight.dtype}: both must be of one floating-point "
            "dtype; cast one of them, or use autocast"
        )
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, but the weight on {weight.device}: move one of them")


def _check_winners(dy: Tensor, n_out: int, n_in: int, arg_max: Tensor, arg_min: Tensor) -> None:
    if dy.dim() != 2 or dy.shape[1] != n_out:
        raise ValueError(f"dy {tuple(dy.shape)} must be (batch, {n_out})")
    for name, arg in (("arg_max", arg_max), ("arg_min", arg_min)):
        if arg.shape != dy.shape or arg.dtype != torch.int32:
            raise ValueError(
                f"{name} is {arg.dtype} {tuple(arg.shape)}, but must be int32 {tuple(dy.shape)} as "
                "winners returns it"
            )
        # On a GPU, that would wait for it.
        if arg.device.type == "cpu" and arg.numel() and not 0 <= arg.min() <= arg.max() < n_in:
            raise ValueError(
                f"{name} holds columns from {arg.min()} to {arg.max()}, but must lie in "
                f"[0, {n_in}) as winners returns it"
            )


def _check_out(name: str, out: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(out.shape) != shape or out.dtype != dtype:
        raise ValueError(f"{name} is {out.dtype} {tuple(out.shape)}, but must be {dtype} {shape}")
