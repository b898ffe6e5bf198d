"""Growth by a decayed sum of the gradient over steps, kept in low rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from growth.connections import Block, Connections
from growth.errors import InputError
from growth.exact import Exact
from growth.pairs import LinearPairs, Pairs, as_pairs
from growth.strategy import Strategy
from growth.threads import one_thread

# Columns of the sketch beyond the rank, and products with the sum that the sketch takes.
OVERSAMPLING = 8
_PRODUCTS = 4


@dataclass(frozen=True)
class Averaged:
    """What a strategy finds in M instead of G, where M <- decay * M + G at every step.

    M is never formed: what is kept from step to step is its factorisation of a given rank, M ~
    L^T R, in rank * (n_in + n_out) floats, ``state`` (rank, n_in + n_out) with rows [R_k, L_k].
    Every step factorises decay * L^T R + dz^T x anew, by a randomised singular value decomposition
    with one power step (Halko, Martinsson & Tropp 2011) that multiplies by the two terms apart, in
    O((n_in + n_out) * (samples * rank + rank^2)); where samples and rank are few, exactly. The
    wrapped strategy then searches the factors, as it would the vectors of a batch of ``rank``
    examples, which is also faster than to search a larger batch.

        state = None
        for x, y in batches:                      # inside ``with growth.record(model) as records``
            criterion(model(x), y).backward()
            state = strategy.observe(records["fc1"], state)
            records.clear()
        new = strategy(records_of_the_last_step, count, active, state=state)

    strategy: the search, one that looks at inner products and observes nothing itself. rank: of
    what is kept, at most min(n_in, n_out). decay: in [0, 1]; 0 is the gradient of the last step, 1
    a plain sum.
    """

    strategy: Strategy = field(default_factory=Exact)
    rank: int = 32
    decay: float = 0.9
    needs_pairs: ClassVar[bool] = True
    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        name = type(self.strategy).__name__
        if self.strategy.observes or not self.strategy.needs_pairs:
            raise InputError(
                f"{name} does not search the vectors of one step, of which there could be an "
                "average: wrap another strategy, such as Exact"
            )
        if getattr(self.strategy, "metric", "abs-ip") == "l2":
            raise InputError(
                "metric 'l2' compares the vectors themselves, which an average does not keep: use "
                "'abs-ip' or 'ip'"
            )
        if self.rank < 1:
            raise InputError(f"rank {self.rank} of an average must be at least 1")
        if not 0 <= self.decay <= 1:
            raise InputError(f"decay {self.decay} of an average must lie in [0, 1]")

    def observe(self, pairs: Pairs | tuple[Tensor, Tensor], state: Tensor | None) -> Tensor:
        """The factors after this step, (rank, n_in + n_out), from those before it."""
        pairs = as_pairs(pairs)
        if not pairs.is_finite():
            raise InputError(
                "the recorded activations or gradients hold NaN or inf, which would stay in the "
                "average: do not observe this step"
            )
        rank = self._rank(pairs)
        with one_thread():
            if self._stacks(pairs):
                right, left = _stacked(pairs, self._factors(pairs, state))
            else:
                right, left = _sketch(pairs, self._factors(pairs, state), rank + OVERSAMPLING)
            new = _balanced(right, left, rank)
        if state is not None and state.dtype != new.dtype:
            raise InputError(
                f"the average is of {state.dtype}, but the gradient of {new.dtype}: it is another "
                "layer's"
            )
        return new

    def observe_flops(self, pairs: Pairs | tuple[Tensor, Tensor]) -> int:
        """Of the products; what the factorisations take beside them is left out."""
        pairs = as_pairs(pairs)
        rank = self._rank(pairs)
        length = pairs.samples + rank
        width = length if self._stacks(pairs) else _PRODUCTS * (rank + OVERSAMPLING)
        return 2 * length * width * (pairs.n_in + pairs.n_out)

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
        if state is not None:
            right, left = _split(pairs, state)
            pairs = LinearPairs(right, left, taps=pairs.taps)
            if not pairs.is_finite():
                raise InputError("the average holds NaN or inf: begin it anew")
        found = self.strategy(pairs, count, active, block=block, generator=generator)
        # A state of the wrapped strategy would be taken for the factors.
        return found._replace(state=None)

    def _rank(self, pairs: Pairs) -> int:
        return min(self.rank, pairs.n_in, pairs.n_out)

    def _stacks(self, pairs: Pairs) -> bool:
        """Whether the vectors and the factors together are no more than two sketches are wide, so
        that to factorise them as they are is no dearer."""
        rank = self._rank(pairs)
        return pairs.samples + rank <= 2 * (rank + OVERSAMPLING)

    def _factors(self, pairs: Pairs, state: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """(decayed R, L), or None at the first step."""
        if state is None:
            return None
        right, left = _split(pairs, state)
        return right * self.decay, left


def _split(pairs: Pairs, state: Tensor) -> tuple[Tensor, Tensor]:
    if state.dim() != 2 or state.shape[1] != pairs.n_in + pairs.n_out:
        raise InputError(
            f"the average has shape {tuple(state.shape)}, but the layer has n_in + n_out = "
            f"{pairs.n_in} + {pairs.n_out} columns: it is another layer's"
        )
    return state[:, : pairs.n_in], state[:, pairs.n_in :]


Factors = tuple[Tensor, Tensor]


def _stacked(pairs: Pairs, factors: Factors | None) -> Factors:
    """The vectors, and the factors below them: (k, n_in) and (k, n_out)."""
    right, left = pairs.vectors()
    if factors is None:
        return right, left
    return torch.cat([right, factors[0]]), torch.cat([left, factors[1]])


def _sketch(pairs: Pairs, factors: Factors | None, width: int) -> Factors:
    """Factors (width, n_in) and (width, n_out) that span nearly the largest singular vectors."""

    def times(matrix: Tensor) -> Tensor:
        return _plus_low_rank(pairs.times(matrix), factors, matrix)

    def transposed_times(matrix: Tensor) -> Tensor:
        swapped = None if factors is None else (factors[1], factors[0])
        return _plus_low_rank(pairs.transposed_times(matrix), swapped, matrix)

    width = min(width, pairs.n_in, pairs.n_out)
    basis = _orthonormal(times(_test_matrix(pairs, width)))
    basis = _orthonormal(times(_orthonormal(transposed_times(basis))))
    return transposed_times(basis).T, basis.T


def _plus_low_rank(product: Tensor, factors: Factors | None, matrix: Tensor) -> Tensor:
    if factors is None:
        return product
    right, left = factors
    return product + left.T @ (right @ matrix.to(right.dtype))


def _test_matrix(pairs: Pairs, width: int) -> Tensor:
    """Of a seed of its own, so that every step, worker and resumed run has the same."""
    generator = torch.Generator().manual_seed(pairs.n_in)
    return torch.randn(pairs.n_in, width, generator=generator).to(pairs.device)


def _orthonormal(matrix: Tensor) -> Tensor:
    _check_range(matrix)
    return torch.linalg.qr(matrix).Q


def _balanced(right: Tensor, left: Tensor, rank: int) -> Tensor:
    """The best factors of a rank of left^T @ right, of equal norms: (rank, n_in + n_out)."""
    _check_range(right)
    _check_range(left)
    of_left, of_right = torch.linalg.qr(left.T), torch.linalg.qr(right.T)
    core = of_left.R @ of_right.R.T
    _check_range(core)
    u, s, v = torch.linalg.svd(core, full_matrices=False)
    kept = min(rank, s.numel())
    root = s[:kept].sqrt()
    state = torch.zeros(
        rank, right.shape[1] + left.shape[1], dtype=right.dtype, device=right.device
    )
    state[:kept, : right.shape[1]] = (of_right.Q @ (v[:kept].T * root)).T
    state[:kept, right.shape[1] :] = (of_left.Q @ (u[:, :kept] * root)).T
    return state


def _check_range(matrix: Tensor) -> None:
    if not bool(matrix.isfinite().all()):
        raise InputError(
            "the average of the gradients exceeds the range of its precision: lower the learning "
            "rate or the loss scale"
        )
