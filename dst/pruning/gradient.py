"""Pruning by gradient: the mean over the samples of |dL/dw w|, L being the loss of one sample.

P. Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", 2017;
Nikiforos 2024, equation 3.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dst.mam import MAMLayer
from dst.pruning.score import Call, Score
from dst.pruning.weights import SparseWeights, Weights
from dst.pruning.winning import winners_of
from triton_kernels.forms import linear_form
from triton_kernels.mam import weight_gradient


class _Part(NamedTuple):
    """A term of a gradient, sum_r dz_ri x_rj (beta + (1 - beta) n_rij). x: (rows, n_in) and
    dz: (rows, n_out), float32; winners: who counts in n, None where beta is 1."""

    x: Tensor
    dz: Tensor
    winners: tuple[Tensor, Tensor] | None


class Gradient(Score):
    """What is kept are the sums of |dL/dw| over the samples, one float32 a weight.

    The gradient of one sample is dL/dw_ij = sum_r dz_ri x_rj (beta + (1 - beta) n_rij), over the
    positions r of its input and all uses of the layer, n_rij in {0, 1, 2} being how often (i, j)
    won; beta is 1 for an ordinary layer.
    """

    needs = "gradients"

    def __init__(self, weights: Weights, seed: int) -> None:
        super().__init__(weights, seed)
        self._sums = torch.zeros(weights.size, device=weights.device)

    def add(self, calls: Sequence[Call]) -> None:
        samples, positions, _ = calls[0].x.shape
        if len(calls) == 1 and positions == 1:
            # Each sample is a single term, whose absolute value is that of its factors, as
            # beta + (1 - beta) n is at least 0: the batch is one product.
            part = self._part(calls[0], slice(None), 0)
            self._add([part._replace(x=part.x.abs(), dz=part.dz.abs())])
            return
        for sample in range(samples):
            self._add([self._part(call, sample, slice(None)) for call in calls])

    def _part(self, call: Call, sample: int | slice, position: int | slice) -> _Part:
        assert call.dz is not None
        x, dz = call.x[sample, position], call.dz[sample, position]
        winners = winners_of(self.weights, x.to(call.dtype)) if self._beta < 1 else None
        return _Part(x.float(), dz.float(), winners)

    @property
    def _beta(self) -> float:
        layer = self.weights.layer
        return layer.beta if isinstance(layer, MAMLayer) else 1.0

    def _add(self, parts: Sequence[_Part]) -> None:
        """The absolute value of a sum of parts."""
        weights, beta = self.weights, self._beta
        for rows in weights.tiles():
            span = weights.span(rows)
            total = torch.zeros(span.stop - span.start, device=self._sums.device)
            for part in parts:
                if isinstance(weights, SparseWeights):
                    _add_sparse(total, part, weights, rows, beta)
                else:
                    _add_dense(total.view(-1, weights.n_cols), part, rows, beta)
            self._sums[span] += total.abs_()

    def read(self, rows: slice) -> Tensor:
        sums = self._sums[self.weights.span(rows)] / max(1, self.samples)
        return sums.mul_(self.weights.values(rows).float().abs())


def _add_dense(total: Tensor, part: _Part, rows: slice, beta: float) -> None:
    """total: (rows of the weight, n_in)."""
    dz = part.dz[:, rows]
    if beta > 0:
        total.addmm_(dz.T, part.x, alpha=beta)
    if part.winners is not None:
        arg_max, arg_min = (arg[:, rows].contiguous() for arg in part.winners)
        weight_gradient((1 - beta) * dz, part.x, arg_max, arg_min, out=total)


def _add_sparse(
    total: Tensor, part: _Part, weights: SparseWeights, rows: slice, beta: float
) -> None:
    """total: of the alive weights of these rows."""
    dz, span = part.dz[:, rows].contiguous(), weights.span(rows)
    if span.start == span.stop:
        return
    if beta > 0:
        own = weights.layout_of(rows)
        sample = linear_form(part.x, (1, 1)).weight_gradient
        sums = sample(part.x, dz, own.row_offsets, own.cols, own.slots, len(total))
        total.add_(sums.view(-1), alpha=beta)
    for arg in part.winners or ():
        at = arg[:, rows].long()
        absent = at < 0
        at.masked_fill_(absent, span.start)
        x = part.x.gather(1, weights.layout.cols[at].long())
        terms = ((1 - beta) * dz * x).masked_fill_(absent, 0)
        _add_at(total, at.sub_(span.start), terms)


def _add_at(total: Tensor, at: Tensor, terms: Tensor) -> None:
    """total[at] += terms, in an order that is always the same: of the two functions, the one has
    it on the CPU, the other on a GPU."""
    if total.is_cuda:
        total.index_put_((at.flatten(),), terms.flatten(), accumulate=True)
    else:
        total.index_add_(0, at.flatten(), terms.flatten())
