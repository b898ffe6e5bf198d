"""Exact search: the best connections, most of G never computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from growth.active import ActiveKeys
from growth.blocks import best_blocks
from growth.connections import Block, Connections, check_query
from growth.dense import connections, stream
from growth.errors import InputError
from growth.on_gpu import on_gpu
from growth.pairs import Pairs, as_pairs
from growth.running_top import RunningTop
from growth.scan import SCREENS, scan
from growth.strategy import check_metric
from triton_kernels.costs import longer_than_wide, scan_pays

# Questions to the active keys, as a multiple of what is searched: what passes the threshold.
_CANDIDATES = 4


@dataclass(frozen=True)
class Exact:
    """The ``count`` best pairs, exactly, without ever holding G, and mostly without computing it.

    Neurons are sorted by the norms of their vectors, and the products computed in the order of
    their bounds until no bound beats the running threshold (see ``growth.scan``); blocks are scored
    by whichever of two exact ways is the cheaper (see ``growth.blocks``). Vectors longer than the
    layer is wide, as a convolution's are, have G accumulated instead, a tile of rows at a time.
    Memory: a sorted copy of the vectors, tiles, and O(count). Among equal scores the lowest key
    wins. On CUDA it runs as a Triton kernel, where Triton is installed.

    metric: ``abs-ip`` (|G|), ``ip`` (G), ``l2`` (minus the squared distance of the vectors).
    screen: the precision in which products are looked at first, ``float32``, ``bfloat16`` or
    ``auto``: bfloat16 on CPUs with units for it. What passes is computed anew in float32: the
    result is exact in each case.
    """

    metric: str = "abs-ip"
    screen: str = "auto"
    needs_pairs: ClassVar[bool] = True
    observes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_metric(self.metric)
        if self.screen not in SCREENS:
            raise InputError(f"screen {self.screen!r} is unknown: choose {', '.join(SCREENS)}")

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
        pairs = as_pairs(pairs)
        grid = check_query(pairs, count, active, block, self.metric)
        if longer_than_wide(pairs.n_out, pairs.n_in, pairs.samples):
            found = None
        else:
            found = on_gpu(pairs, grid, count, active, self.metric)
        if found is not None:
            return found
        if block != (1, 1):
            return best_blocks(pairs, grid, count, active)
        if not self._scans(pairs):
            return stream(pairs, grid, count, active, self.metric)._replace(
                report={"search": "exact", "computed": 1.0}
            )
        x, dz = pairs.vectors()
        top = RunningTop(count, x.numpy().dtype)
        taken = ActiveKeys(active.cpu().numpy(), grid.size, _CANDIDATES * count)
        cost = scan(x, dz, top, taken, self.metric, self.screen)
        found = connections(top, grid, pairs, cost.flops)
        return found._replace(report={"search": "exact", "computed": cost.share})

    @staticmethod
    def _scans(pairs: Pairs) -> bool:
        on_cpu = pairs.device.type == "cpu"
        return on_cpu and pairs.has_vectors and scan_pays(pairs.n_out, pairs.n_in, pairs.samples)
