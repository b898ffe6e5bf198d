"""Approximate search: a low-rank screen, exact rescoring, and a check of what it missed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from growth.active import ActiveKeys
from growth.blocks import BlockScreen
from growth.connections import Block, Connections, Grid, check_query
from growth.errors import InputError
from growth.exact import Exact
from growth.gram import gram_factors, left_out
from growth.pairs import Pairs, as_pairs
from growth.recall import RecallSample
from growth.running_top import Floats, Keys, RunningTop, select_best
from growth.scan import column_norms, scan
from triton_kernels.costs import lowrank_pays

# Ranks that are tried, as multiples of the first.
STEPS = (1, 1.5, 2, 3, 4)
# With fewer of the best in the sample nothing can be said of a recall.
_LEAST_EVIDENCE = 100
# Entries of G that are computed as a sample, within these numbers of rows.
_SAMPLED_PAIRS, _LEAST_ROWS, _MOST_ROWS = 1 << 20, 32, 96
# Questions to the active keys, as a multiple of what is searched.
_QUESTIONS = 4


@dataclass(frozen=True)
class LowRank:
    """The ``count`` best pairs by |G|, nearly all of them, at a fraction of the work.

    G is approximated by its largest singular values, found without forming it; the norm-ordered
    scan in ``rank`` dimensions yields twice ``count`` candidates, and their exact products decide.
    Some rows, drawn by what they may hold and by what the factors miss of them, are computed whole:
    before the scan, to choose the smallest rank that will do, from ``rank`` to four times it; and
    after it, to estimate the recall that was reached, the share of the exact best that was found.
    Where that is below the promise, less two standard errors, the next rank is tried, and then the
    exact search. On vectors without structure, where no rank will do, this is seen before anything
    is scanned; where the sample holds too few of the best to tell, the search is exact as well. So
    the promise holds on any input, to the precision of a sample.

    Blocks are screened by the Frobenius norms that the factors give them (``growth.blocks``).
    ``report`` says ``rank`` (0: exact search), the ``promise``, and the ``recall`` as estimated.

    rank: the first that is tried. recall: the promise, in [0, 1]; 1 is the exact search, and with 0
    nothing is promised, sampled or checked: the first rank is taken as it is. candidates: how many
    are rescored, as a multiple of ``count``.
    """

    rank: int = 16
    recall: float = 0.95
    candidates: float = 2.0
    needs_pairs: ClassVar[bool] = True
    observes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank {self.rank} must be at least 1")
        if not 0 <= self.recall <= 1:
            raise InputError(f"recall {self.recall} must be a share in [0, 1]")
        if not 1 <= self.candidates < np.inf:
            raise InputError(f"candidates {self.candidates} must be at least 1 per connection")

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
        grid = check_query(pairs, count, active, block)
        wanted = int(self.candidates * count)
        found, spent = None, 0
        if wanted < grid.size - active.numel() and self._pays(pairs, grid, wanted):
            x, dz = pairs.vectors()
            found, spent = self._screened(_screen(x, dz, grid), count, wanted, active, generator)
        if found is None:
            found = Exact()(pairs, count, active, block=block)
            report = {"search": "exact", "rank": 0, "promise": self.recall, "recall": 1.0}
            found = found._replace(report=report)
        return found._replace(flops=found.flops + spent)

    def _pays(self, pairs: Pairs, grid: Grid, wanted: int) -> bool:
        shape = pairs.n_out, pairs.n_in, pairs.samples
        rescored = wanted * grid.block[0] * grid.block[1]
        able = pairs.device.type == "cpu" and pairs.has_vectors and self.recall < 1
        return able and lowrank_pays(*shape, self.rank, rescored)

    def _screened(
        self,
        screen: Screen,
        count: int,
        wanted: int,
        active: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Connections | None, int]:
        """What was found, None where no rank keeps the promise, and the FLOPs until then."""
        taken, depth = active.numpy(), len(screen.x)
        ranks = sorted({int(self.rank * k) for k in STEPS if 2 * self.rank * k <= depth})
        if not self.recall:
            ranks = ranks[:1]
        right, left = gram_factors(screen.x, screen.dz, ranks[-1])
        flops = 2 * depth * (depth + ranks[-1]) * (screen.x.shape[1] + screen.dz.shape[1])
        sample = None
        if self.recall:
            # What the first rank leaves out, and not what the last does: each of them is tried.
            missed = screen.left_out(right[: ranks[0]], left[: ranks[0]])
            sample = RecallSample(
                screen.row_norms(),
                screen.sampled_rows,
                taken,
                count,
                screen.scores,
                generator,
                missed,
            )
            flops += screen.flops_of_rows(sample.rows.size) + 2 * depth**2 * screen.dz.shape[1]
            if sample.evidence < _LEAST_EVIDENCE:
                return None, flops

        def will_do(rank: int) -> bool:
            if sample is None:
                return True
            approximate = screen.approximate_scores(right[:rank], left[:rank], sample.rows)
            return sample.foreseen(approximate, wanted).at_least >= self.recall

        # Where the highest will not do, no other is tried.
        for rank in ranks if will_do(ranks[-1]) else ():
            if rank < ranks[-1] and not will_do(rank):
                continue
            keys, cost = screen.best(right[:rank], left[:rank], wanted, taken)
            scores = screen.rescore(keys)
            flops += cost + screen.flops_of_scores(wanted)
            if not np.isfinite(scores).all():
                break  # products beyond the range of numbers: the exact search says which count
            best = select_best(keys, scores, count)
            keys, scores = keys[best], scores[best]
            report = {"search": "low rank", "rank": rank, "promise": self.recall}
            if sample is not None:
                reached = sample.reached(keys, scores)
                if reached.at_least < self.recall:
                    continue
                report["recall"] = reached.recall
            key, score = torch.from_numpy(keys), torch.from_numpy(scores)
            row, col = key // screen.n_cols, key % screen.n_cols
            return Connections(row, col, score, 0, report), flops
        return None, flops


class Screen(Protocol):
    """What is searched: single entries of dz^T x, or blocks of it.

    x: (samples, n_in), dz: (samples, n_out). n_cols: columns of the grid. sampled_rows: how many
    rows to compute as a sample.
    """

    x: Tensor
    dz: Tensor
    n_cols: int

    @property
    def sampled_rows(self) -> int: ...

    def row_norms(self) -> Floats:
        """Of the vectors of each row of the grid."""
        ...

    def left_out(self, right: Tensor, left: Tensor) -> Floats:
        """Norms of what factors leave out of each row of the grid."""
        ...

    def scores(self, rows: NDArray[np.int64]) -> Floats:
        """(rows, n_cols)."""
        ...

    def approximate_scores(self, x: Tensor, dz: Tensor, rows: NDArray[np.int64]) -> Floats:
        """(rows, n_cols), of factors (rank, n_in) and (rank, n_out) in place of the vectors."""
        ...

    def best(self, x: Tensor, dz: Tensor, count: int, active: Keys) -> tuple[Keys, int]:
        """Keys, ascending, of the best by factors, and the FLOPs it took."""
        ...

    def rescore(self, keys: Keys) -> Floats:
        """Exact scores of single keys, ascending."""
        ...

    def flops_of_rows(self, rows: int) -> int: ...

    def flops_of_scores(self, count: int) -> int: ...


class EntryScreen:
    """Single entries, by magnitude."""

    def __init__(self, x: Tensor, dz: Tensor) -> None:
        self.x, self.dz, self.n_cols = x, dz, x.shape[1]

    @property
    def sampled_rows(self) -> int:
        return max(_LEAST_ROWS, min(_MOST_ROWS, _SAMPLED_PAIRS // self.n_cols))

    def row_norms(self) -> Floats:
        return column_norms(self.dz)

    def left_out(self, right: Tensor, left: Tensor) -> Floats:
        return left_out(self.x, self.dz, right, left).double().numpy()

    def scores(self, rows: NDArray[np.int64]) -> Floats:
        return self.approximate_scores(self.x, self.dz, rows)

    def approximate_scores(self, x: Tensor, dz: Tensor, rows: NDArray[np.int64]) -> Floats:
        return (dz[:, torch.from_numpy(rows)].T @ x).abs_().numpy()

    def best(self, x: Tensor, dz: Tensor, count: int, active: Keys) -> tuple[Keys, int]:
        top = RunningTop(count, x.numpy().dtype)
        size = dz.shape[1] * self.n_cols
        cost = scan(x, dz, top, ActiveKeys(active, size, _QUESTIONS * count))
        return top.result()[0], cost.flops

    def rescore(self, keys: Keys) -> Floats:
        key = torch.from_numpy(keys)
        pairs = as_pairs((self.x, self.dz))
        return pairs.products_at(key // self.n_cols, key % self.n_cols).abs_().numpy()

    def flops_of_rows(self, rows: int) -> int:
        return 2 * len(self.x) * rows * self.n_cols

    def flops_of_scores(self, count: int) -> int:
        return 2 * len(self.x) * count


def _screen(x: Tensor, dz: Tensor, grid: Grid) -> Screen:
    return EntryScreen(x, dz) if grid.block == (1, 1) else BlockScreen(x, dz, grid)
