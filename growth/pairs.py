"""The vectors that growth searches: for one layer, activations x and output gradients dz.

The gradient of weight (j, i) is the inner product of column j of dz with column i of x, taken over
the batch (and, in a convolution, over positions): G = dz^T x. Nothing here ever holds a whole G.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from growth.errors import InputError

# Floats of an unfolded chunk of a convolution's input: 32 MB.
CHUNK_FLOATS = 8 << 20


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

    def products_at(self, row: Tensor, col: Tensor) -> Tensor:
        """Single entries of G, signed: (count,).

        row, col: int64 (count,), sorted by row and, within one, by column. Memory O(count) beside a
        chunk. Time grows with count x samples, and single entries are gathered much more slowly
        than a product computes all: above some 3 % of G, take ``products``.
        """
        offsets = _row_offsets(row, self.n_out)
        total: Tensor | None = None
        for x, dz in self.chunks():
            part = _sampled_products(dz, x, offsets, col)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def squared_norms(self) -> tuple[Tensor, Tensor]:
        """Squared Euclidean norms of the vectors: ((n_in,) of x, (n_out,) of dz)."""
        of_x = of_dz = torch.zeros((), device=self.device)
        for x, dz in self.chunks():
            of_x = of_x + x.square().sum(0)
            of_dz = of_dz + dz.square().sum(0)
        return of_x, of_dz


def _row_offsets(row: Tensor, n_rows: int) -> Tensor:
    """Where each row's entries begin, and the end: int64 (n_rows + 1,)."""
    counts = torch.bincount(row, minlength=n_rows)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _sampled_products(dz: Tensor, x: Tensor, offsets: Tensor, col: Tensor) -> Tensor:
    """Entries of dz^T x at the rows that ``offsets`` delimits and the columns ``col``."""
    shape = (dz.shape[1], x.shape[1])
    zeros = torch.zeros(col.numel(), dtype=x.dtype, device=x.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        # The entries are our own and sorted: checking them would cost as much as the products.
        where = torch.sparse_csr_tensor(offsets, col, zeros, shape, check_invariants=False)
        return torch.sparse.sampled_addmm(where, dz.T.contiguous(), x, beta=0.0).values()


class _Recording(Pairs):
    """One recorded pair of tensors; ``scale`` multiplies dz when it is read."""

    x: Tensor
    dz: Tensor
    scale: float

    @property
    def device(self) -> torch.device:
        return self.x.device

    def is_finite(self) -> bool:
        return bool(self.x.isfinite().all() & self.dz.isfinite().all())

    def _dtype(self) -> torch.dtype:
        return torch.float64 if torch.float64 in (self.x.dtype, self.dz.dtype) else torch.float32


class LinearPairs(_Recording):
    """One recording of a linear layer.

    x: (..., n_in); dz: (..., n_out), the same leading shape. scale: what dz is multiplied with when
    it is read, so that a loss scaled for fp16 is unscaled in float32.
    """

    def __init__(self, x: Tensor, dz: Tensor, scale: float = 1.0) -> None:
        if x.dim() < 2 or dz.dim() < 2 or x.shape[:-1] != dz.shape[:-1]:
            raise InputError(
                f"x {tuple(x.shape)} and dz {tuple(dz.shape)} must be (batch, n_in) and "
                "(batch, n_out) over the same batch"
            )
        if not (x.is_floating_point() and dz.is_floating_point()):
            raise InputError(f"x and dz must be floating point, not {x.dtype} and {dz.dtype}")
        self.x, self.dz = x.detach().flatten(0, -2), dz.detach().flatten(0, -2)
        self.scale = scale
        self.n_in, self.n_out, self.samples = x.shape[-1], dz.shape[-1], self.x.shape[0]
        if 0 in (self.n_in, self.n_out, self.samples):
            raise InputError(f"x {tuple(x.shape)} and dz {tuple(dz.shape)} must not be empty")

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        dtype = self._dtype()
        dz = self.dz.to(dtype)
        yield self.x.to(dtype), dz if self.scale == 1.0 else dz * self.scale


class ConvPairs(_Recording):
    """One recording of a convolution.

    x: (batch, C, H, W), already padded where the padding is not the same on both sides;
    dz: (batch, n_out, H', W'). The vectors run over batch and positions.
    """

    def __init__(
        self,
        x: Tensor,
        dz: Tensor,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        scale: float = 1.0,
    ) -> None:
        if x.dim() != 4 or dz.dim() != 4 or x.shape[0] != dz.shape[0]:
            raise InputError(
                f"x {tuple(x.shape)} and dz {tuple(dz.shape)} must be (batch, C, H, W) and "
                "(batch, n_out, H', W') over the same batch"
            )
        expected = tuple(
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip(
                x.shape[2:], padding, dilation, kernel_size, stride, strict=True
            )
        )
        if tuple(dz.shape[2:]) != expected:
            raise InputError(
                f"dz has {tuple(dz.shape[2:])} positions, but kernel {kernel_size}, stride "
                f"{stride}, padding {padding} and dilation {dilation} make {expected}"
            )
        self.x, self.dz, self.scale = x.detach(), dz.detach(), scale
        self.kernel_size, self.stride = kernel_size, stride
        self.padding, self.dilation = padding, dilation
        self.taps = kernel_size[0] * kernel_size[1]
        self.n_in, self.n_out = x.shape[1] * self.taps, dz.shape[1]
        self.samples = dz.shape[0] * dz.shape[2] * dz.shape[3]

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Unfolds as many examples at a time as fit in ``CHUNK_FLOATS``, at least one."""
        dtype = self._dtype()
        positions = self.dz.shape[2] * self.dz.shape[3]
        step = max(1, CHUNK_FLOATS // (positions * self.n_in))
        for start in range(0, self.x.shape[0], step):
            x = self.x[start : start + step].to(dtype)
            dz = self.dz[start : start + step].to(dtype)
            columns = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
            columns = columns.view(x.shape[0], x.shape[1], self.taps, positions)
            columns = columns.permute(0, 3, 2, 1).reshape(-1, self.n_in)
            dz = dz.flatten(2).transpose(1, 2).reshape(-1, self.n_out)
            yield columns, dz if self.scale == 1.0 else dz * self.scale

    def products(self, start: int, stop: int) -> Tensor:
        """Through the convolution library's weight gradient, which never unfolds."""
        dtype = self._dtype()
        size = (stop - start, self.x.shape[1], *self.kernel_size)
        tile = conv2d_weight(
            self.x.to(dtype),
            size,
            self.dz[:, start:stop].to(dtype).contiguous(),
            self.stride,
            self.padding,
            self.dilation,
        )
        return (tile.permute(0, 2, 3, 1) * self.scale).reshape(stop - start, self.n_in)

    def squared_norms(self) -> tuple[Tensor, Tensor]:
        """The norms of x are the weight gradient of x squared under a gradient of ones."""
        dtype = self._dtype()
        ones = self.x.new_ones((self.dz.shape[0], 1, *self.dz.shape[2:]), dtype=dtype)
        size = (1, self.x.shape[1], *self.kernel_size)
        of_x = conv2d_weight(
            self.x.to(dtype).square(), size, ones, self.stride, self.padding, self.dilation
        )
        of_dz = (self.dz.to(dtype) * self.scale).square().sum((0, 2, 3))
        return of_x.permute(0, 2, 3, 1).flatten(), of_dz


class JoinedPairs(Pairs):
    """Several recordings of one layer, as if they had been one batch: micro-batches, several
    steps, or several calls in one forward pass."""

    def __init__(self, parts: Sequence[Pairs]) -> None:
        if not parts:
            raise InputError("no recordings to join")
        first = parts[0]
        shapes = {(part.n_in, part.n_out, part.taps) for part in parts}
        if len(shapes) > 1:
            raise InputError(f"recordings of different layers cannot be joined: {sorted(shapes)}")
        self.parts = tuple(parts)
        self.n_in, self.n_out, self.taps = first.n_in, first.n_out, first.taps
        self.samples = sum(part.samples for part in parts)

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def is_finite(self) -> bool:
        return all(part.is_finite() for part in self.parts)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in self.parts:
            yield from part.chunks()

    def products(self, start: int, stop: int) -> Tensor:
        total = self.parts[0].products(start, stop)
        for part in self.parts[1:]:
            total = total + part.products(start, stop)
        return total

    def products_at(self, row: Tensor, col: Tensor) -> Tensor:
        total = self.parts[0].products_at(row, col)
        for part in self.parts[1:]:
            total = total + part.products_at(row, col)
        return total

    def squared_norms(self) -> tuple[Tensor, Tensor]:
        of_x, of_dz = zip(*(part.squared_norms() for part in self.parts), strict=True)
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

    def is_finite(self) -> bool:
        return bool(self.gradient.isfinite().all())

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
