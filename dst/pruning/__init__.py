"""Pruning after training: one shot, to exactly so many weights, by a score."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dst.pruning.budget import budget
from dst.pruning.gradient import Gradient
from dst.pruning.layers import chosen_weights
from dst.pruning.magnitude import Magnitude
from dst.pruning.random import Random
from dst.pruning.score import Score
from dst.pruning.select import kept_keys
from dst.pruning.selection import MagnitudeSelection, Selection
from dst.pruning.twin import pruned
from dst.pruning.walk import Batches, Loss, walk
from dst.swap import swap
from growth import InputError

# One line a score: it then is a choice of `prune`, and takes part in the tests of them all.
SCORES: dict[str, type[Score]] = {
    "random": Random,
    "magnitude": Magnitude,
    "gradient": Gradient,
    "selection": Selection,
    "magnitude-selection": MagnitudeSelection,
}

SCOPES = ("global", "local")

__all__ = ["SCOPES", "SCORES", "Score", "check", "measure", "prune", "pruned_layers"]


def prune(
    model: nn.Module,
    *,
    keep: float | int,
    score: str = "gradient",
    scope: str = "global",
    layers: Sequence[str] | None = None,
    batches: Batches | Callable[[], Batches] | None = None,
    loss: Loss = F.cross_entropy,
    absent: str = "zero",
    seed: int = 0,
) -> nn.Module:
    """Replace layers of ``model``, in place, by sparse ones of single weights, those with the best
    scores; biases, and everything else, stay the same objects. Returns the model (a new module only
    where the model itself is such a layer). Build the optimizer afterwards.

    keep: a share in (0, 1) of all weights of these layers, absent ones counted, so that it is the
    density afterwards: exactly round(keep * total) stay. Or, as a whole number, how many stay.
    score: ``random``; ``magnitude``, |w|; ``gradient``, the mean over the samples of |dL/dw w|, L
    being the loss of one sample; ``selection``, the share of the samples for which the weight was
    the arg-max or arg-min (of an ordinary layer: would be, if it were a MAM layer);
    ``magnitude-selection``, |w| times that. scope: ``global``, one ranking of all layers, or
    ``local``, one a layer, each of which keeps the same share.
    layers: names, patterns such as ``classifier.*``, and the words ``first`` and ``last``: linear
    and MAM layers, dense or sparse, of which only the alive weights compete; for ``random`` and
    ``magnitude`` convolutions as well. By default the MAM layers, or where there are none the
    hidden linear layers.
    batches: the pruning set for the last three scores, as (inputs, labels), or a function that
    returns it; it is walked once. loss: called as loss(outputs, labels, reduction="sum"), so that
    the gradients of a sample do not depend on the size of its batch. seed: of ``random``.

    absent: of MAM layers that become sparse, see :class:`dst.SparseMAMLinear`.

    Every layer keeps at least its best weight, under ``global`` in place of the worst that would be
    kept otherwise. Scores are compared in float32; of equal ones, such as the 0 of all weights that
    no sample selected, the earlier layer has precedence, then the lower row, then the lower column.
    The model is in eval mode while it is scored. Memory, beyond that of a backward pass without
    gradients of weights: four bytes for every weight of these layers.

    Raises InputError for a share or a number that is not there to keep, and for what
    ``chosen_weights`` and ``walk`` refuse.
    """
    scores = measure(model, score=score, layers=layers, batches=batches, loss=loss, seed=seed)
    return swap(model, pruned_layers(scores, keep=keep, scope=scope, absent=absent))


def measure(
    model: nn.Module,
    *,
    score: str = "gradient",
    layers: Sequence[str] | None = None,
    batches: Batches | Callable[[], Batches] | None = None,
    loss: Loss = F.cross_entropy,
    seed: int = 0,
) -> list[Score]:
    """The first half of :func:`prune`: what the weights of each layer are worth."""
    kind = SCORES[_known("score", score, SCORES)]
    weights = chosen_weights(model, layers, kind)
    if kind.needs != "nothing" and batches is None:
        raise InputError(f"score {score!r} looks at samples: give batches of a pruning set")
    scores = {own.name: kind(own, seed) for own in weights}
    if kind.needs != "nothing" and batches is not None:
        walk(model, scores, batches() if callable(batches) else batches, loss)
    return list(scores.values())


def pruned_layers(
    scores: Sequence[Score],
    *,
    keep: float | int,
    scope: str = "global",
    absent: str = "zero",
    compute: str = "auto",
    agree: Callable[[Tensor], Tensor] | None = None,
) -> dict[nn.Module, nn.Module]:
    """The other half: what takes the place of each layer that was measured; it can be done again
    with another ``keep``, as long as the weights stay the same.

    compute: of the sparse layers. agree: given the keys that a layer keeps, returns those that all
    workers of a run keep.
    """
    _known("scope", scope, SCOPES)
    counts = budget([score.weights for score in scores], keep, scope)
    replaced: dict[nn.Module, nn.Module] = {}
    for own, keys in kept_keys(scores, counts):
        chosen = keys if agree is None else agree(keys)
        replaced[own.layer] = pruned(own, chosen, absent, compute)
    return replaced


def check(
    model: nn.Module, *, layers: Sequence[str] | None, score: str, keep: float | int, scope: str
) -> None:
    """Raise InputError where :func:`prune` would, as far as can be told without measuring."""
    weights = chosen_weights(model, layers, SCORES[_known("score", score, SCORES)])
    budget(weights, keep, _known("scope", scope, SCOPES))


def _known(what: str, name: str, choices: Collection[str]) -> str:
    if name in choices:
        return name
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]}? Choose" if near else "choose"
    raise InputError(f"{what} {name!r} is unknown: {hint} {', '.join(choices)}")
