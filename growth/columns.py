"""The order of a convolution's columns.

Inside this project the columns of a convolution's weight matrix run over (kh, kw, C), so that a
block of columns is a run of channels at one tap. PyTorch flattens a weight (and unfolds an input)
in the order (C, kh, kw). These two functions are the only place that converts.
"""

from __future__ import annotations

from torch import Tensor


def to_unfold_order(col: Tensor, channels: int, taps: int) -> Tensor:
    """Column numbers in (kh, kw, C) order -> the same columns in ``F.unfold``'s (C, kh, kw).

    col: int tensor of any shape, values in [0, taps * channels); taps = kh * kw.
    """
    return col % channels * taps + col // channels


def from_unfold_order(col: Tensor, channels: int, taps: int) -> Tensor:
    """Column numbers in ``F.unfold``'s (C, kh, kw) order -> the same columns in (kh, kw, C)."""
    return col % taps * channels + col // taps
