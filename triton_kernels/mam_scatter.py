"""Sums of gradients at the winners on a GPU, for :mod:`triton_kernels.mam_gpu`.

They go to few weights, and each of these gets few terms, which are added atomically. By default
that gives the same bits every time: a first pass finds the largest term of every sum, a second one
adds whole numbers of 64 bits, which give the same in any order. A term is cut to a multiple of 2^-b
of the largest one, where b = 62 - log2(terms that a sum could have): 49 for 4096 samples, while
float32 has 24 bits.

The alternatives do more: a program that owns a row and walks the batch would wait for memory at
every sample; comparing each winner with each column, in fixed order and without atomics, is the
work of the search again; and sorting passes over the winners many times.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triton_kernels.layout import Layout

# Outputs and warps of a program.
TILE, WARPS = 512, 4


class Args(NamedTuple):
    """high, low: int32 (batch, n_out), the two winners: columns; or, of a layout's single weights,
    positions in its row order, -1 for nobody."""

    high: Tensor
    low: Tensor
    layout: Layout | None = None


def scatter(
    dy: Tensor, other: Tensor, args: Args, n_in: int, *, to_weight: bool, deterministic: bool
) -> Tensor:
    """Sums of dy * other at the winners: float64, or, if they depend on the order, float32.

    dy: (batch, n_out), contiguous along the outputs. to_weight: other is x, (batch, n_in), and the
    sums are (n_out, n_in), or (alive,), in the layout's row order. Otherwise other is the weight,
    (n_out, n_in), or the values of one, and the sums are (batch, n_in).
    """
    from triton_kernels.mam_kernel import scatter_kernel

    (batch, n_out), layout = dy.shape, args.layout
    shape: tuple[int, ...] = (n_out if to_weight else batch, n_in)
    if to_weight and layout is not None:
        shape = tuple(layout.cols.shape)
    # The sum of so many stays below 2^62.
    bits = 62 - (2 * (batch if to_weight else n_out) - 1).bit_length()
    high, low = args.high, args.low
    if high.stride() != low.stride() or high.stride(1) != 1:
        high, low = high.contiguous(), low.contiguous()

    rest = torch.zeros(shape, dtype=torch.float32, device=dy.device)

    def launch(sums: Tensor, largest: Tensor, pass_: int) -> None:
        with torch.cuda.device_of(dy):
            scatter_kernel[(batch, -(-n_out // TILE))](
                dy,
                other,
                high,
                low,
                # Where there is no layout, any pointer will do.
                high if layout is None else layout.cols,
                high if layout is None else layout.slots,
                largest,
                sums,
                rest,
                n_out,
                n_in,
                dy.stride(0),
                high.stride(0),
                bits,
                TO_WEIGHT=to_weight,
                SPARSE=layout is not None,
                LARGEST=pass_ == 1,
                WHOLE=pass_ == 2,
                TILE=TILE,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )

    if not deterministic:
        launch(rest, rest, 0)
        return rest
    largest = torch.zeros_like(rest, dtype=torch.int32)
    whole = torch.zeros_like(rest, dtype=torch.int64)
    launch(whole, largest, 1)
    launch(whole, largest, 2)
    # 2^(exponent + 1 - bits), by its place in a float64.
    exponent = largest.bitwise_right_shift_(23).add_(1023 - 126 - bits).long()
    return exponent.bitwise_left_shift_(52).view(torch.float64).mul_(whole).add_(rest)
