"""The interface of every growth strategy."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from growth.connections import Block, Connections
from growth.errors import InputError
from growth.pairs import Pairs

METRICS = ("abs-ip", "ip", "l2")


def check_metric(metric: str) -> None:
    """Raise InputError unless it is one of ``METRICS``."""
    if metric not in METRICS:
        raise InputError(f"metric {metric!r} is unknown: choose {', '.join(METRICS)}")


class Strategy(Protocol):
    """A configured search for new connections.

    needs_pairs: False for a strategy that looks at no vectors, only at their sizes; nothing is
    then recorded for it. observes: True for a strategy that must be shown the vectors of every
    step, through ``observe(pairs, state) -> state``, and not those of the update alone.
    """

    needs_pairs: ClassVar[bool]
    observes: ClassVar[bool]

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
        """Exactly ``count`` inactive connections.

        pairs: the vectors of one layer, or two tensors x: (batch, n_in), dz: (batch, n_out).
        active: sorted int64 keys row * n_cols + col of the connections not to grow, in blocks.
        generator: where random choices are drawn from (CPU). state: what ``observe`` returned
        for this layer at the last step.

        Raises InputError on a query that cannot be answered (see ``check_query``).
        """
        ...


class Observer(Strategy, Protocol):
    """A strategy that ``observes``."""

    def observe(self, pairs: Pairs | tuple[Tensor, Tensor], state: Tensor | None) -> Tensor:
        """What to keep after a step, from its vectors and what was kept before (None at first),
        which may be overwritten."""
        ...

    def observe_flops(self, pairs: Pairs | tuple[Tensor, Tensor]) -> int:
        """Floating-point operations that ``observe`` takes for these vectors."""
        ...
