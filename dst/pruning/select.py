"""The best weights, exactly as many as wanted, without all scores ever standing side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dst.pruning.score import Score
from dst.pruning.weights import Weights
from growth import InputError


def kept_keys(
    scores: Sequence[Score], groups: Sequence[tuple[int, int]]
) -> Iterator[tuple[Weights, Tensor]]:
    """Every layer with the keys of the weights to keep, sorted int64.

    groups: consecutive runs of layers that compete with each other, as (how many layers, how many
    weights they keep together, at least one each). Every layer keeps its best weight. Of equal
    scores the earlier layer has precedence, then the lower key. The scores are read four times.

    Raises InputError for scores that are not finite.
    """
    rest = [_Ranking(score) for score in scores]
    for layers, count in groups:
        rankings, rest = rest[:layers], rest[layers:]
        threshold, ties = _cut(rankings, count)
        for one in rankings:
            keys, ties = _keys_above(one, threshold, ties, count)
            yield one.weights, keys


def _keys_above(one: _Ranking, threshold: float, ties: int, count: int) -> tuple[Tensor, int]:
    """Keys of the scores above the threshold and of the first that equal it, ``count`` at most, and
    how many equal ones are still wanted."""
    # Written into one piece: small pieces between large tiles would keep the memory in shreds.
    keys = torch.empty(min(count, one.weights.size), dtype=torch.int64, device=one.weights.device)
    filled = 0
    for rows, tile in one.tiles():
        better = tile > threshold
        if ties:
            equal = (tile == threshold).nonzero().squeeze(1)[:ties]
            better[equal] = True
            ties -= equal.numel()
        found = one.weights.keys(rows)[better]
        keys[filled : filled + found.numel()] = found
        filled += found.numel()
    return keys[:filled], ties


class _Ranking:
    """The scores of a layer, where its best weight has an infinite one."""

    def __init__(self, score: Score) -> None:
        self.weights, self._score = score.weights, score
        best, self._best = -1.0, 0
        for rows in self.weights.tiles():
            tile = score.read(rows)
            if not bool(tile.isfinite().all()):
                raise InputError(
                    f"the scores of layer {self.weights.name!r} hold NaN or infinity: see that "
                    "the loss and the activations are finite on the pruning set"
                )
            if tile.numel() and float(tile.max()) > best:
                best = float(tile.max())
                self._best = self.weights.span(rows).start + int(tile.argmax())

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in self.weights.tiles():
            tile, span = self._score.read(rows), self.weights.span(rows)
            if span.start <= self._best < span.stop:
                tile[self._best - span.start] = torch.inf
            yield rows, tile


class _Cut(NamedTuple):
    """Scores above the threshold are kept, and so many of those that equal it."""

    threshold: float
    ties: int


_HALF = 1 << 16


def _cut(rankings: Sequence[_Ranking], count: int) -> _Cut:
    """Of all together. The bits of float32 that are at least 0 are in the order of the numbers:
    histograms of the upper half of the bits, then of the lower one where the upper half is the
    threshold's."""
    upper, count = _digit((bits >> 16 for bits in _bits(rankings)), count)
    near = (bits[bits >> 16 == upper] for bits in _bits(rankings))
    lower, count = _digit((bits & (_HALF - 1) for bits in near), count)
    exact = torch.tensor(upper * _HALF + lower, dtype=torch.int32).view(torch.float32)
    return _Cut(float(exact), count)


def _bits(rankings: Sequence[_Ranking]) -> Iterator[Tensor]:
    for one in rankings:
        for _, tile in one.tiles():
            yield tile.view(torch.int32)


def _digit(digits: Iterable[Tensor], count: int) -> tuple[int, int]:
    """The digit of the ``count``-th largest, and what is left of the count at this digit."""
    histogram = torch.zeros(_HALF, dtype=torch.int64)
    for own in digits:
        histogram += torch.bincount(own, minlength=_HALF).cpu()
    above = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, count))
    digit = _HALF - 1 - place
    return digit, count - int(above[place] - histogram[digit])
