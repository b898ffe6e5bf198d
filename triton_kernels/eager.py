"""The gradient of a custom op without its way through the dispatcher, which takes up to a
millisecond a step: as long as the product of a very sparse layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import Parameter


def eager(
    forward: Callable[..., Tensor],
    setup: Callable[[FunctionCtx, tuple[Any, ...], Tensor], None],
    backward: Callable[[FunctionCtx, Tensor], tuple[Tensor | None, ...]],
) -> Callable[..., Tensor]:
    """``forward``, differentiated by what a custom op would be differentiated by. Only for tensors
    that are ``plain``."""

    class Eager(torch.autograd.Function):
        # With a ``setup_context`` every call would first look at this function's signature.
        @staticmethod
        def forward(ctx: FunctionCtx, *inputs: Any) -> Tensor:
            y = forward(*inputs)
            setup(ctx, inputs, y)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
            return backward(ctx, dy)

    return Eager.apply  # type: ignore[no-any-return]


def plain(*tensors: Tensor) -> bool:
    """Whether these are tensors that simply hold numbers, and nobody traces."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return all(type(t) in (Tensor, Parameter) and not t.is_meta for t in tensors)
