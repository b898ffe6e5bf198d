"""The vectors of a convolution, never unfolded whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from growth.errors import InputError
from growth.pairs import JoinedPairs, Pairs, Recording, row_offsets, sampled_products

# Floats that a piece of a recording takes: 32 MB, 64 in float64.
CHUNK_FLOATS = 8 << 20
# And one whose vectors are read again and again, one pair after the other: what caches hold.
_CACHED_FLOATS = 1 << 20

Pair = tuple[int, int]


class _Piece(NamedTuple):
    """Some examples of a recording, or some rows of the positions of one, in single or double
    precision. padding: what is left to pad, height and width."""

    x: Tensor
    dz: Tensor
    padding: Pair


class ConvPairs(Recording):
    """One recording of a convolution.

    x: (batch, C, H, W), already padded where the padding is not the same on both sides;
    dz: (batch, n_out, H', W'). The vectors run over batch and positions. Every sum is taken over
    pieces of ``CHUNK_FLOATS``, at least one row of one example's positions.
    """

    def __init__(
        self,
        x: Tensor,
        dz: Tensor,
        kernel_size: Pair,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
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
        for x, dz, padding in self._pieces(self._unfolded_floats):
            columns = F.unfold(x, self.kernel_size, self.dilation, padding, self.stride)
            columns = columns.view(x.shape[0], x.shape[1], self.taps, -1)
            columns = columns.permute(0, 3, 2, 1).reshape(-1, self.n_in)
            dz = dz.flatten(2).transpose(1, 2).reshape(-1, self.n_out)
            yield columns, dz if self.scale == 1.0 else dz * self.scale

    def gram(self) -> Tensor:
        """Over pieces that stay in the cache, a tap at a time copied to where it belongs."""
        both = self.n_in + self.n_out
        total = torch.zeros(both, both, dtype=torch.float64, device=self.device)
        length = self.dz.shape[3] * both
        for x, dz, padding in self._pieces(length, limit=_CACHED_FLOATS):
            image = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).transpose(0, 1)
            size = dz.shape[2:]
            rows = x.new_empty(both, len(dz) * size[0] * size[1])
            of_taps = rows[: self.n_in].view(self.taps, len(image), len(dz), *size)
            for tap in range(self.taps):
                of_taps[tap] = self._window(image, tap, size)
            rows[self.n_in :] = dz.transpose(0, 1).flatten(1)
            total += rows @ rows.T
        total[self.n_in :] *= self.scale
        total[:, self.n_in :] *= self.scale
        return total

    def products(self, start: int, stop: int) -> Tensor:
        """Through the convolution library's weight gradient, which does not unfold what it is good
        at, and otherwise gets pieces that it may."""
        total: Tensor | None = None
        for x, dz, padding in self._pieces(self._library_floats, slice(start, stop)):
            tile = self._weight_gradient(x, dz, padding)
            total = tile if total is None else total.add_(tile)
        assert total is not None
        return self._scaled(total).permute(0, 2, 3, 1).reshape(stop - start, self.n_in)

    def _single_products(self, row: Tensor, col: Tensor) -> Tensor:
        """A tap at a time: its inputs are one window of the image, copied and not unfolded."""
        channels = self.x.shape[1]
        tap, channel = col // channels, col % channels
        of_taps = [(tap == i).nonzero().squeeze(1) for i in range(self.taps)]
        asked = [(i, at, row_offsets(row[at], self.n_out)) for i, at in enumerate(of_taps)]
        found = torch.zeros(row.numel(), dtype=self._dtype(), device=self.device)
        for x, dz, padding in self._pieces(self._library_floats, limit=_CACHED_FLOATS):
            of_outputs = dz.transpose(0, 1).flatten(1)
            image = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).transpose(0, 1)
            for i, at, offsets in asked:
                if at.numel():
                    window = self._window(image, i, dz.shape[2:]).flatten(1)
                    found[at] += sampled_products(of_outputs.T, window.T, offsets, channel[at])
        return self._scaled(found)

    def _window(self, image: Tensor, tap: int, size: torch.Size) -> Tensor:
        """What a tap sees of a padded image (..., H, W), for ``size`` positions."""
        steps = []
        for where, d, s, n in zip(
            divmod(tap, self.kernel_size[1]), self.dilation, self.stride, size, strict=True
        ):
            steps.append(slice(where * d, where * d + (n - 1) * s + 1, s))
        return image[..., steps[0], steps[1]]

    def squared_norms(self) -> tuple[Tensor, Tensor]:
        """The norms of x are the weight gradient of x squared under a gradient of ones."""
        of_x = torch.zeros((), device=self.device)
        of_dz = torch.zeros((), device=self.device)
        for x, dz, padding in self._pieces(self._library_floats):
            ones = x.new_ones((dz.shape[0], 1, *dz.shape[2:]))
            of_x = of_x + self._weight_gradient(x.square(), ones, padding)
            of_dz = of_dz + (dz * self.scale).square_().sum((0, 2, 3))
        return of_x.permute(0, 2, 3, 1).flatten(), of_dz

    def times(self, matrix: Tensor) -> Tensor:
        """The columns of the matrix are the filters of a convolution of x."""
        matrix = matrix.to(self._dtype())
        filters = matrix.T.reshape(-1, *self.kernel_size, self.x.shape[1]).permute(0, 3, 1, 2)
        filters = filters.contiguous()
        total = matrix.new_zeros(self.n_out, matrix.shape[1])
        for x, dz, padding in self._pieces(self._library_floats):
            y = F.conv2d(x, filters, None, self.stride, padding, self.dilation)
            total += dz.transpose(0, 1).flatten(1) @ y.transpose(0, 1).flatten(1).T
        return self._scaled(total)

    def transposed_times(self, matrix: Tensor) -> Tensor:
        """A weight gradient again, of as few outputs as the matrix has columns."""
        matrix = matrix.to(self._dtype())
        filters = matrix.T[:, :, None, None].contiguous()
        size = (matrix.shape[1], self.x.shape[1], *self.kernel_size)
        total = matrix.new_zeros(size)
        for x, dz, padding in self._pieces(self._library_floats):
            total += self._weight_gradient(x, F.conv2d(dz, filters), padding)
        return self._scaled(total).permute(2, 3, 1, 0).reshape(self.n_in, -1)

    def narrowed(self, rows: Tensor, channels: Tensor) -> Pairs:
        return self._like(self.x[:, channels], self.dz[:, rows])

    def pooled(self) -> Pairs:
        """Over 2 x 2 positions: a quarter of the samples.

        The average of the unfolded input over neighbouring positions is the unfolded average of the
        input over pixels a stride apart, at every second position. Where a map's height or width is
        odd, its last row or column is averaged along itself alone and joined; nothing is dropped,
        and each part is weighted by the positions it stands for. A map less than two positions
        wide or high is left as it is.
        """
        height, width = self.dz.shape[2:]
        if min(height, width) < 2:
            return self
        rows = [(slice(0, height // 2 * 2), 2), (slice(height // 2 * 2, height), 1)]
        cols = [(slice(0, width // 2 * 2), 2), (slice(width // 2 * 2, width), 1)]
        parts = [
            self._averaged((rows_in, cols_in), (down, across))
            for rows_in, down in rows[: 1 + height % 2]
            for cols_in, across in cols[: 1 + width % 2]
        ]
        return parts[0] if len(parts) == 1 else JoinedPairs(parts)

    def _averaged(self, inside: tuple[slice, slice], cell: Pair) -> ConvPairs:
        """Averages over cells of the positions ``inside``, which they cover exactly."""
        dtype = self._dtype()
        x = F.pad(self.x, (self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
        dz = self.dz[:, :, inside[0], inside[1]].to(dtype)
        for dim, (where, s, d, k) in enumerate(
            zip(inside, self.stride, self.dilation, self.kernel_size, strict=True), start=2
        ):
            seen = (where.stop - where.start - 1) * s + d * (k - 1) + 1
            x = x.narrow(dim, where.start * s, seen)
        x = x.to(dtype)
        for dim, (n, s) in enumerate(zip(cell, self.stride, strict=True), start=2):
            if n == 2:
                size = x.shape[dim] - s
                x = x.narrow(dim, 0, size).add(x.narrow(dim, s, size)).mul_(0.5)
        stride = (self.stride[0] * cell[0], self.stride[1] * cell[1])
        scale = self.scale * cell[0] * cell[1]
        dz = F.avg_pool2d(dz, cell)
        return ConvPairs(x, dz, self.kernel_size, stride, (0, 0), self.dilation, scale)

    def _like(self, x: Tensor, dz: Tensor) -> ConvPairs:
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation)
        return ConvPairs(x, dz, *geometry, self.scale)

    def _scaled(self, products: Tensor) -> Tensor:
        return products if self.scale == 1.0 else products.mul_(self.scale)

    def _weight_gradient(self, x: Tensor, dz: Tensor, padding: Pair) -> Tensor:
        """(outputs of dz, C, kh, kw)."""
        size = (dz.shape[1], x.shape[1], *self.kernel_size)
        return conv2d_weight(x, size, dz.contiguous(), self.stride, padding, self.dilation)

    @property
    def _unfolded_floats(self) -> int:
        """Of one row of an example's positions."""
        return self.dz.shape[3] * self.n_in

    @property
    def _library_floats(self) -> int:
        """What a row of an example's positions takes of extra memory in the convolution library: as
        much as it unfolds, or copies into the precision and the layout that it works in."""
        fast = self._dtype() == torch.float32 and torch.backends.mkldnn.is_available()
        if self.device.type == "cpu" and not fast:
            return self._unfolded_floats
        of_x = self.x.shape[1] * self.x.shape[2] * self.x.shape[3]
        return -(-of_x // self.dz.shape[2]) + self.n_out * self.dz.shape[3]

    def _pieces(
        self, floats: int, rows: slice = slice(None), limit: int | None = None
    ) -> Iterator[_Piece]:
        """As many examples at a time as fit in ``CHUNK_FLOATS``, or in a lower limit, or rows of
        the positions of one where not even a whole one does. floats: what one row of positions
        takes. rows: outputs."""
        height = self.dz.shape[2]
        fit = max(1, min(CHUNK_FLOATS, limit or CHUNK_FLOATS) // floats)
        batch = self.x.shape[0]
        pieces = -(-batch // max(1, fit // height))
        examples = -(-batch // pieces)
        for start in range(0, batch, examples):
            x = self.x[start : start + examples].to(self._dtype())
            dz = self.dz[start : start + examples, rows].to(self._dtype())
            if fit >= height:
                yield _Piece(x, dz, self.padding)
                continue
            for top in range(0, height, fit):
                yield self._strip(x, dz[:, :, top : top + fit], top)

    def _strip(self, x: Tensor, dz: Tensor, top: int) -> _Piece:
        """The positions of the rows from ``top`` on, and the rows of x that they see."""
        reach = self.dilation[0] * (self.kernel_size[0] - 1) + 1
        first = top * self.stride[0] - self.padding[0]
        stop = first + (dz.shape[2] - 1) * self.stride[0] + reach
        height = x.shape[2]
        inside = x[:, :, min(max(first, 0), height) : min(max(stop, 0), height)]
        above = min(max(-first, 0), stop - first)
        below = stop - first - inside.shape[2] - above
        return _Piece(F.pad(inside, (0, 0, above, below)), dz, (0, self.padding[1]))
