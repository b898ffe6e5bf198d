"""Growth by momentum: the largest entries of a decayed average of the whole gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from growth.connections import Block, Connections
from growth.errors import InputError
from growth.exact import Exact
from growth.pairs import Pairs, StoredGradient, as_pairs


@dataclass(frozen=True)
class Momentum:
    """The ``count`` largest |M|, where M <- decay * M + G at every step.

    This is what "Sparse networks from scratch" (Dettmers & Zettlemoyer 2019) grows by. M is as
    large as the dense weight, and every step costs a dense weight gradient: the only strategy that
    holds a dense matrix, here to be compared with.

        state = None
        for x, y in batches:                      # inside ``with growth.record(model) as records``
            criterion(model(x), y).backward()
            state = strategy.observe(records["fc1"], state)
            records.clear()
        new = strategy(records_of_the_last_step, count, active, state=state)

    decay: in [0, 1); 0 is the gradient of the last step.
    """

    decay: float = 0.9
    needs_pairs: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise InputError(f"momentum decay {self.decay} must lie in [0, 1)")

    def observe(self, pairs: Pairs | tuple[Tensor, Tensor], state: Tensor | None) -> Tensor:
        """M after this step, (n_out, n_in). ``state`` is M before it, None at first, and is
        overwritten."""
        pairs = as_pairs(pairs)
        if not pairs.is_finite():
            raise InputError(
                "the recorded activations or gradients hold NaN or inf, which would stay in the "
                "momentum: do not observe this step"
            )
        gradient = pairs.products(0, pairs.n_out)
        if state is None:
            return gradient
        if state.shape != gradient.shape or state.dtype != gradient.dtype:
            raise InputError(
                f"the momentum is {tuple(state.shape)} of {state.dtype}, but the gradient "
                f"{tuple(gradient.shape)} of {gradient.dtype}: it is another layer's"
            )
        return state.mul_(self.decay).add_(gradient)

    def observe_flops(self, pairs: Pairs | tuple[Tensor, Tensor]) -> int:
        """A dense weight gradient."""
        pairs = as_pairs(pairs)
        return 2 * pairs.samples * pairs.n_in * pairs.n_out

    def __call__(
        self,
        pairs: Pairs | tuple[Tensor, Tensor],
        count: int,
        active: Tensor,
        *,
        block: Block = (1, 1),
        generator: torch.Generator | None = None,
        state: Any = None,
    ) -> Connections:
        """Without a state, the gradient of ``pairs`` alone is searched."""
        pairs = as_pairs(pairs)
        if state is None:
            return Exact()(pairs, count, active, block=block)
        held = StoredGradient(state, pairs.taps)
        if (held.n_out, held.n_in) != (pairs.n_out, pairs.n_in):
            raise InputError(
                f"the momentum has shape {tuple(state.shape)}, but the layer has "
                f"{(pairs.n_out, pairs.n_in)}: it is another layer's"
            )
        if not held.is_finite():
            raise InputError("the momentum holds NaN or inf: begin it anew")
        return Exact()(held, count, active, block=block)
