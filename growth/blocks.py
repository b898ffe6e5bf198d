"""Searching blocks by the Frobenius norm of the gradient over them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from growth.connections import Connections, Grid
from growth.dense import connections, stream
from growth.gram import left_out
from growth.pairs import Pairs
from growth.running_top import Floats, Keys, RunningTop, select_best
from growth.scan import column_norms
from triton_kernels.costs import gram_pays

# Floats of Gram matrices of block rows that are held at a time.
_TABLE_FLOATS = 4 << 20
# Floats of a workspace, which stays in the cache.
_WORK_FLOATS = 1 << 19
# Of a Gram score's square, relative to the norms of the two Gram matrices: rounding, where no more
# numbers than these are summed at once. Longer sums of equal numbers drift away.
_GRAM_ERROR, _GRAM_SUMMED = 2e-5, 1 << 13


def best_blocks(
    pairs: Pairs, grid: Grid, count: int, active: Tensor, gram: bool | None = None
) -> Connections:
    """The ``count`` inactive blocks of the largest ||G_block||_F, exactly, by the cheaper of two
    ways: G a tile of rows at a time, or Gram matrices.

    The squared norm of a block is <X_J X_J^T, dZ_I dZ_I^T>, X_J (samples, bw) and dZ_I (samples,
    bh) being its neurons' vectors: a product over samples (samples + 1) / 2 numbers a block in
    place of samples x bh x bw. It wins where the batch is short against the block. Because it
    rounds differently, a few more blocks than asked for are taken by it, all that rounding may
    have hidden, and scored by their products; where ties make them too many, G is computed. gram:
    whether to try it; None: where it is expected to be cheaper.
    """
    if gram is None:
        gram = gram_pays(pairs.n_out, pairs.n_in, pairs.samples, grid.block)
    if gram and pairs.device.type == "cpu" and pairs.has_vectors:
        found = _by_gram(pairs, grid, count, active)
        if found is not None:
            return found
    found = stream(pairs, grid, count, active, "abs-ip")
    return found._replace(report={"search": "tiles"})


def _by_gram(pairs: Pairs, grid: Grid, count: int, active: Tensor) -> Connections | None:
    """None where rounding leaves in doubt which blocks are the best."""
    screen = BlockScreen(*pairs.vectors(), grid)
    free = grid.size - active.numel()
    wanted = min(free, count + count // 50 + 32)
    keys, bounds, flops = screen.bounded(wanted, active.numpy())
    scores = screen.rescore(keys)
    best = select_best(keys, scores, count)
    # Every block that was left out has at most the least bound of those that were taken.
    if count and wanted < free and float(scores[best].min()) ** 2 <= float(bounds.min()):
        return None
    top = RunningTop(count, scores.dtype)
    top.offer(keys[best], scores[best])
    flops += screen.flops_of_scores(wanted)
    return connections(top, grid, pairs, flops)._replace(report={"search": "gram"})


class BlockScreen:
    """The blocks of dz^T x, by Frobenius norm: see ``growth.lowrank.Screen``.

    x: (samples, n_in), dz: (samples, n_out), on the CPU.
    """

    def __init__(self, x: Tensor, dz: Tensor, grid: Grid) -> None:
        self.x, self.dz, self.grid, self.n_cols = x, dz, grid, grid.n_cols
        self._cols, self._rows = self._col_blocks(x), self._row_blocks(dz)

    @property
    def sampled_rows(self) -> int:
        """A twentieth, and never very few."""
        return max(16, self.grid.n_rows // 20)

    def row_norms(self) -> Floats:
        return self._of_rows(torch.from_numpy(column_norms(self.dz)))

    def left_out(self, right: Tensor, left: Tensor) -> Floats:
        return self._of_rows(left_out(self.x, self.dz, right, left).double())

    def _of_rows(self, norms: Tensor) -> Floats:
        """Norms (n_out,) -> those of block rows."""
        padded = F.pad(norms, (0, self._padding()))
        return padded.view(self.grid.n_rows, -1).norm(dim=1).numpy()

    def scores(self, rows: NDArray[np.int64]) -> Floats:
        step = max(1, _TABLE_FLOATS // (self.grid.block[0] * self.x.shape[1]))
        parts = torch.from_numpy(rows).split(step)
        pooled = (self.grid.pool(self._rows[:, part].flatten(1).T @ self.x) for part in parts)
        return torch.cat(list(pooled)).numpy()

    def approximate_scores(self, x: Tensor, dz: Tensor, rows: NDArray[np.int64]) -> Floats:
        own = grams(self._row_blocks(dz)[:, torch.from_numpy(rows)])
        return (own @ grams(self._col_blocks(x)).T).clamp_min_(0).sqrt_().numpy()

    def best(self, x: Tensor, dz: Tensor, count: int, active: Keys) -> tuple[Keys, int]:
        cols, rows = self._col_blocks(x), self._row_blocks(dz)
        keys, _, flops = self._largest(cols, rows, count, active, 0.0)
        return keys, flops

    def bounded(self, count: int, active: Keys) -> tuple[Keys, Floats, int]:
        """Keys, ascending, of the ``count`` blocks whose squared norm may be the largest, bounds of
        these squares, and the FLOPs it took."""
        return self._largest(self._cols, self._rows, count, active, _GRAM_ERROR)

    def _largest(
        self, cols: Tensor, rows: Tensor, count: int, active: Keys, error: float
    ) -> tuple[Keys, Floats, int]:
        """By <X_J X_J^T, dZ_I dZ_I^T> + error ||X_J X_J^T|| ||dZ_I dZ_I^T||."""
        of_cols = grams(cols)
        depth, length = len(cols), of_cols.shape[1]
        norms = of_cols.norm(dim=1)
        top = RunningTop(count, of_cols.numpy().dtype)
        step = max(1, _TABLE_FLOATS // max(length, self.n_cols))
        for start in range(0, self.grid.n_rows, step):
            own = grams(rows[:, start : start + step])
            squares = torch.outer(own.norm(dim=1), error * norms)
            for k in range(0, length, _GRAM_SUMMED):
                part = slice(k, k + _GRAM_SUMMED)
                squares.addmm_(own[:, part], of_cols[:, part].T)
            # Gram matrices that leave the range tell nothing.
            squares.clamp_min_(0).nan_to_num_(nan=np.inf, posinf=np.inf)
            flat = squares.numpy().ravel()
            first = start * self.n_cols
            inside = slice(*active.searchsorted([first, first + flat.size]))
            flat[active[inside] - first] = -np.inf
            at = np.flatnonzero(flat >= top.threshold)
            top.offer(at + first, flat[at])
        flops = 2 * depth * depth * (cols[0].numel() + rows[0].numel())
        return *top.result(), flops + 2 * length * self.grid.size

    def rescore(self, keys: Keys) -> Floats:
        found = torch.empty(keys.size, dtype=self.x.dtype)
        key = torch.from_numpy(keys)
        (bh, bw), depth = self.grid.block, len(self.x)
        step = max(1, _WORK_FLOATS // (depth * (bh + bw)))
        for start in range(0, keys.size, step):
            part = key[start : start + step]
            left = self._rows.index_select(1, part // self.n_cols)
            right = self._cols.index_select(1, part % self.n_cols)
            products = torch.bmm(left.permute(1, 2, 0), right.transpose(0, 1))
            found[start : start + step] = torch.linalg.vector_norm(products, dim=(1, 2))
        return found.numpy()

    def flops_of_rows(self, rows: int) -> int:
        return 2 * len(self.x) * rows * self.grid.block[0] * self.x.shape[1]

    def flops_of_scores(self, count: int) -> int:
        return 2 * len(self.x) * count * self.grid.block[0] * self.grid.block[1]

    def _padding(self) -> int:
        return self.grid.n_rows * self.grid.block[0] - self.grid.n_out

    def _row_blocks(self, dz: Tensor) -> Tensor:
        """(depth, n_out) -> (depth, n_rows, bh), the last block padded."""
        if self._padding():
            dz = F.pad(dz, (0, self._padding()))
        return dz.reshape(len(dz), self.grid.n_rows, self.grid.block[0])

    def _col_blocks(self, x: Tensor) -> Tensor:
        """(depth, n_in) -> (depth, n_cols, bw), each tap's last block padded."""
        taps, width = self.grid.taps, self.grid.block[1]
        padding = self.n_cols // taps * width - self.grid.channels
        if padding:
            x = F.pad(x.reshape(len(x), taps, -1), (0, padding))
        return x.reshape(len(x), self.n_cols, width)


def grams(blocks: Tensor) -> Tensor:
    """blocks: (depth, n, b) -> (n, depth (depth + 1) / 2): the upper triangles of their Gram
    matrices, scaled so that inner products are those of the whole matrices."""
    depth, n = blocks.shape[:2]
    upper = torch.triu_indices(depth, depth)
    scale = torch.where(upper[0] == upper[1], 1.0, 2.0).to(blocks.dtype).sqrt_()
    where = upper[0] * depth + upper[1]
    packed = blocks.new_empty(n, where.numel())
    step = max(1, min(n, _WORK_FLOATS // (depth * depth)))
    # Written again and again: memory that is new each time costs more than what fills it.
    squares = blocks.new_empty(step, depth, depth)
    for start in range(0, n, step):
        part = blocks[:, start : start + step].transpose(0, 1)
        own = torch.bmm(part, part.transpose(1, 2), out=squares[: len(part)])
        torch.index_select(own.flatten(1), 1, where, out=packed[start : start + step])
    return packed.mul_(scale)
