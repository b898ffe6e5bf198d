"""The vectors that growth searches: for one layer, activations x and output gradients dz.

The gradient of weight (j, i) is the inner product of column j of dz with column i of x, taken over
the batch (and, in a convolution, over positions): G = dz^T x. Nothing here ever holds a whole G.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from growth.errors import InputError

# Share of G's entries above which computing all of it, and taking the ones that are asked for, is
# faster than computing those alone.
SINGLES_SHARE = 0.04
# Entries of G held at a time to take single ones from: 32 MB.
TILE_FLOATS = 8 << 20


class Pairs(ABC):
    """The vectors of one layer, re-iterable.

    n_in: inputs of the weight matrix, taps * channels in the order (kh, kw, C) for a convolution.
    n_out: outputs. taps: kh * kw, 1 for a linear layer. samples: length of the vectors.
    """

    n_in: int
    n_out: int
    taps: int = 1
    samples: int

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (x: (m, n_in), dz: (m, n_out)), the m of all chunks adding up to ``samples``;
        float32, or float64 where that was recorded."""

    @abstractmethod
    def is_finite(self) -> bool:
        """Whether every value is finite."""

    def products(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of G = dz^T x, signed: (stop - start, n_in)."""
        total: Tensor | None = None
        for x, dz in self.chunks():
            tile = dz[:, start:stop].T @ x
            total = tile if total is None else total.add_(tile)
        assert total is not None
        return total

    @property
    def has_vectors(self) -> bool:
        """Whether ``chunks`` and what rests on it can be asked for."""
        return True

    def vectors(self) -> tuple[Tensor, Tensor]:
        """All chunks in one: (x: (samples, n_in), dz: (samples, n_out)).

        A linear layer's are there already; a convolution's are unfolded whole, taps times the
        size of its input, which is for the searches that cannot do without.
        """
        x, dz = zip(*self.chunks(), strict=True)
        return (x[0], dz[0]) if len(x) == 1 else (torch.cat(x), torch.cat(dz))

    def gram(self) -> Tensor:
        """Inner products of all vectors with each other, of x and dz alike, in float64:
        (n_in + n_out, n_in + n_out)."""
        total: Tensor | None = None
        for chunk in self.chunks():
            both = torch.cat(chunk, dim=1)
            part = (both.T @ both).double()
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def products_at(self, row: Tensor, col: Tensor) -> Tensor:
        """Single entries of G, signed: (count,).

        row, col: int64 (count,), sorted by row and, within one, by column. Memory O(count) beside a
        chunk. Single entries are gathered much more slowly than a product computes all: more than
        ``SINGLES_SHARE`` of G are taken from ``products``, a tile of rows at a time.
        """
        if row.numel() > SINGLES_SHARE * self.n_out * self.n_in:
            return self._gathered_products(row, col)
        return self._single_products(row, col)

    def _gathered_products(self, row: Tensor, col: Tensor) -> Tensor:
        step = max(1, TILE_FLOATS // self.n_in)
        starts = range(0, self.n_out, step)
        splits = torch.searchsorted(row, torch.tensor([*starts, self.n_out], device=row.device))
        found = []
        for start, first, last in zip(
            starts, splits[:-1].tolist(), splits[1:].tolist(), strict=True
        ):
            if last > first:
                tile = self.products(start, min(start + step, self.n_out))
                found.append(tile[row[first:last] - start, col[first:last]])
        return torch.cat(found)

    def _single_products(self, row: Tensor, col: Tensor) -> Tensor:
        offsets = row_offsets(row, self.n_out)
        total: Tensor | None = None
        for x, dz in self.chunks():
            part = sampled_products(dz, x, offsets, col)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def times(self, matrix: Tensor) -> Tensor:
        """G @ matrix, (n_out, width), for a matrix (n_in, width). Never holds G: time
        O(samples x (n_in + n_out) x width)."""
        total: Tensor | None = None
        for x, dz in self.chunks():
            part = dz.T @ (x @ matrix.to(x.dtype))
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def transposed_times(self, matrix: Tensor) -> Tensor:
        """G^T @ matrix, (n_in, width), for a matrix (n_out, width); see ``times``."""
        total: Tensor | None = None
        for x, dz in self.chunks():
            part = x.T @ (dz @ matrix.to(dz.dtype))
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def narrowed(self, rows: Tensor, channels: Tensor) -> Pairs:
        """The vectors of some outputs and of some input channels, at all taps, alone.

        rows, channels: sorted, unique int64.
        """
        return _NarrowedPairs(self, rows, channels)

    def pooled(self) -> Pairs:
        """Cheaper pairs of nearly the same products, over averages of neighbouring positions; these
        very pairs where there are no positions to average over."""
        return self

    def columns_of(self, channels: Tensor) -> Tensor:
        """Columns of the channels at all taps, ascending where the channels are."""
        first = torch.arange(0, self.n_in, self.n_in // self.taps, device=channels.device)
        return (first[:, None] + channels).flatten()

    def squared_norms(self) -> tuple[Tensor, Tensor]:
        """Squared Euclidean norms of the vectors: ((n_in,) of x, (n_out,) of dz)."""
        of_x = of_dz = torch.zeros((), device=self.device)
        for x, dz in self.chunks():
            of_x = of_x + x.square().sum(0)
            of_dz = of_dz + dz.square().sum(0)
        return of_x, of_dz


def all_finite(values: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor inf, as its ends tell without another tensor."""
    return bool(torch.stack(torch.aminmax(values)).isfinite().all())


def row_offsets(row: Tensor, n_rows: int) -> Tensor:
    """Where each row's entries begin, and the end: int64 (n_rows + 1,)."""
    counts = torch.bincount(row, minlength=n_rows)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def sampled_products(dz: Tensor, x: Tensor, offsets: Tensor, col: Tensor) -> Tensor:
    """Entries of dz^T x at the rows that ``offsets`` delimits and the columns ``col``."""
    shape = (dz.shape[1], x.shape[1])
    zeros = torch.zeros(col.numel(), dtype=x.dtype, device=x.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        # The entries are our own and sorted: checking them would cost as much as the products.
        where = torch.sparse_csr_tensor(offsets, col, zeros, shape, check_invariants=False)
        return torch.sparse.sampled_addmm(where, dz.T.contiguous(), x, beta=0.0).values()


class Recording(Pairs):
    """One recorded pair of tensors; ``scale`` multiplies dz when it is read."""

    x: Tensor
    dz: Tensor
    scale: float

    @property
    def device(self) -> torch.device:
        return self.x.device

    def is_finite(self) -> bool:
        return all_finite(self.x) and all_finite(self.dz)

    def _dtype(self) -> torch.dtype:
        return torch.float64 if torch.float64 in (self.x.dtype, self.dz.dtype) else torch.float32


class LinearPairs(Recording):
    """One recording of a linear layer.

    x: (..., n_in); dz: (..., n_out), the same leading shape. scale: what dz is multiplied with when
    it is read, so that a loss scaled for fp16 is unscaled in float32. taps: of the convolution that
    stands behind factors x and dz of its gradient.
    """

    def __init__(self, x: Tensor, dz: Tensor, scale: float = 1.0, taps: int = 1) -> None:
        if x.dim() < 2 or dz.dim() < 2 or x.shape[:-1] != dz.shape[:-1]:
            raise InputError(
                f"x {tuple(x.shape)} and dz {tuple(dz.shape)} must be (batch, n_in) and "
                "(batch, n_out) over the same batch"
            )
        if not (x.is_floating_point() and dz.is_floating_point()):
            raise InputError(f"x and dz must be floating point, not {x.dtype} and {dz.dtype}")
        self.x, self.dz = x.detach().flatten(0, -2), dz.detach().flatten(0, -2)
        self.scale, self.taps = scale, taps
        self.n_in, self.n_out, self.samples = x.shape[-1], dz.shape[-1], self.x.shape[0]
        if 0 in (self.n_in, self.n_out, self.samples):
            raise InputError(f"x {tuple(x.shape)} and dz {tuple(dz.shape)} must not be empty")

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        dtype = self._dtype()
        dz = self.dz.to(dtype)
        yield self.x.to(dtype), dz if self.scale == 1.0 else dz * self.scale

    def narrowed(self, rows: Tensor, channels: Tensor) -> Pairs:
        columns = self.columns_of(channels)
        return LinearPairs(self.x[:, columns], self.dz[:, rows], self.scale, self.taps)


class _NarrowedPairs(Pairs):
    """Some outputs and input channels of pairs that are known by their chunks alone."""

    def __init__(self, whole: Pairs, rows: Tensor, channels: Tensor) -> None:
        self.whole, self.rows, self.columns = whole, rows, whole.columns_of(channels)
        self.n_in, self.n_out, self.taps = self.columns.numel(), rows.numel(), whole.taps
        self.samples = whole.samples

    @property
    def device(self) -> torch.device:
        return self.whole.device

    def is_finite(self) -> bool:
        return self.whole.is_finite()

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, dz in self.whole.chunks():
            yield x[:, self.columns], dz[:, self.rows]


class JoinedPairs(Pairs):
    """Several recordings of one layer, as if they had been one batch: micro-batches, several
    steps, or several calls in one forward pass.

    decay: in [0, 1], what the gradient of a recording is multiplied with for every later one, so
    that the recordings of the last steps make a decayed sum of their gradients; 1: a plain sum.
    """

    def __init__(self, parts: Sequence[Pairs], decay: float = 1.0) -> None:
        if not parts:
            raise InputError("no recordings to join")
        if not 0 <= decay <= 1:
            raise InputError(f"decay {decay} of joined recordings must lie in [0, 1]")
        first = parts[0]
        shapes = {(part.n_in, part.n_out, part.taps) for part in parts}
        if len(shapes) > 1:
            raise InputError(f"recordings of different layers cannot be joined: {sorted(shapes)}")
        self.parts, self.decay = tuple(parts), decay
        self.n_in, self.n_out, self.taps = first.n_in, first.n_out, first.taps
        self.samples = sum(part.samples for part in parts)

    def _weighted(self) -> Iterator[tuple[Pairs, float]]:
        last = len(self.parts) - 1
        for k, part in enumerate(self.parts):
            yield part, self.decay ** (last - k)

    def _sum(self, of: Callable[[Pairs], Tensor]) -> Tensor:
        """Of what is linear in dz, over the parts."""
        total: Tensor | None = None
        for part, weight in self._weighted():
            term = of(part)
            term = term if weight == 1.0 else term * weight
            total = term if total is None else total + term
        assert total is not None
        return total

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def is_finite(self) -> bool:
        return all(part.is_finite() for part in self.parts)

    @property
    def has_vectors(self) -> bool:
        return all(part.has_vectors for part in self.parts)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part, weight in self._weighted():
            for x, dz in part.chunks():
                yield x, dz if weight == 1.0 else dz * weight

    def products(self, start: int, stop: int) -> Tensor:
        return self._sum(lambda part: part.products(start, stop))

    def products_at(self, row: Tensor, col: Tensor) -> Tensor:
        return self._sum(lambda part: part.products_at(row, col))

    def times(self, matrix: Tensor) -> Tensor:
        return self._sum(lambda part: part.times(matrix))

    def transposed_times(self, matrix: Tensor) -> Tensor:
        return self._sum(lambda part: part.transposed_times(matrix))

    def narrowed(self, rows: Tensor, channels: Tensor) -> Pairs:
        return JoinedPairs([part.narrowed(rows, channels) for part in self.parts], self.decay)

    def pooled(self) -> Pairs:
        parts = [part.pooled() for part in self.parts]
        if all(new is old for new, old in zip(parts, self.parts, strict=True)):
            return self
        return JoinedPairs(parts, self.decay)

    def squared_norms(self) -> tuple[Tensor, Tensor]:
        of_x, of_dz = zip(*(part.squared_norms() for part in self.parts), strict=True)
        if self.decay != 1.0:
            of_dz = tuple(
                norms * weight**2
                for norms, (_, weight) in zip(of_dz, self._weighted(), strict=True)
            )
        return torch.stack(of_x).sum(0), torch.stack(of_dz).sum(0)


class RowPairs(Pairs):
    """The vectors of the outputs [start, stop) alone: one head of an attention layer."""

    def __init__(self, whole: Pairs, start: int, stop: int) -> None:
        if not 0 <= start < stop <= whole.n_out:
            raise InputError(f"rows {start} to {stop} are not rows of {whole.n_out} outputs")
        self.whole, self.start = whole, start
        self.n_in, self.n_out, self.taps = whole.n_in, stop - start, whole.taps
        self.samples = whole.samples

    @property
    def device(self) -> torch.device:
        return self.whole.device

    def is_finite(self) -> bool:
        return self.whole.is_finite()

    @property
    def has_vectors(self) -> bool:
        return self.whole.has_vectors

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, dz in self.whole.chunks():
            yield x, dz[:, self.start : self.start + self.n_out]

    def products(self, start: int, stop: int) -> Tensor:
        return self.whole.products(self.start + start, self.start + stop)

    def products_at(self, row: Tensor, col: Tensor) -> Tensor:
        return self.whole.products_at(self.start + row, col)

    def narrowed(self, rows: Tensor, channels: Tensor) -> Pairs:
        return self.whole.narrowed(self.start + rows, channels)

    def pooled(self) -> Pairs:
        whole = self.whole.pooled()
        return self if whole is self.whole else RowPairs(whole, self.start, self.start + self.n_out)

    def squared_norms(self) -> tuple[Tensor, Tensor]:
        of_x, of_dz = self.whole.squared_norms()
        return of_x, of_dz[self.start : self.start + self.n_out]


class StoredGradient(Pairs):
    """A gradient that somebody already holds, in place of the vectors it came from.

    gradient: (n_out, n_in), columns of a convolution in the order (kh, kw, C).
    """

    samples = 0

    def __init__(self, gradient: Tensor, taps: int = 1) -> None:
        if gradient.dim() != 2 or not gradient.is_floating_point() or gradient.numel() == 0:
            raise InputError(
                f"a gradient of shape {tuple(gradient.shape)} and {gradient.dtype} must be a "
                "floating point matrix (n_out, n_in)"
            )
        self.gradient, self.taps = gradient, taps
        self.n_out, self.n_in = gradient.shape

    @property
    def device(self) -> torch.device:
        return self.gradient.device

    @property
    def has_vectors(self) -> bool:
        return False

    def products_at(self, row: Tensor, col: Tensor) -> Tensor:
        return self.gradient[row, col]

    def narrowed(self, rows: Tensor, channels: Tensor) -> Pairs:
        return StoredGradient(self.gradient[rows][:, self.columns_of(channels)], self.taps)

    def is_finite(self) -> bool:
        return all_finite(self.gradient)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        raise InputError("a stored gradient has no vectors: search it by its products")

    def products(self, start: int, stop: int) -> Tensor:
        # A copy: whoever searches may write into the tile.
        return self.gradient[start:stop].clone()


class NoVectors(Pairs):
    """The sizes of a layer alone, for a strategy that looks at no vectors."""

    samples = 0

    def __init__(self, n_in: int, n_out: int, taps: int, device: torch.device) -> None:
        self.n_in, self.n_out, self.taps = n_in, n_out, taps
        self._device = device

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def has_vectors(self) -> bool:
        return False

    def is_finite(self) -> bool:
        return True

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        raise InputError("this strategy needs recorded vectors, and got only the layer's sizes")


def as_pairs(pairs: Pairs | tuple[Tensor, Tensor]) -> Pairs:
    """``(x, dz)`` with x: (batch, n_in) and dz: (batch, n_out) is the simplest Pairs."""
    return pairs if isinstance(pairs, Pairs) else LinearPairs(*pairs)
