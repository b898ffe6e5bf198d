"""The singular value decomposition of G = dz^T x from the Gram matrices of x and dz."""

from __future__ import annotations

import torch
from torch import Tensor

from growth.threads import one_thread

# Below this share of the largest singular value, that of a Gram matrix of floats is noise.
_NOISE = 1e-4


def gram_factors(x: Tensor, dz: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of dz^T x: (right: (rank, n_in), left: (rank, n_out)),
    where left^T right ~ dz^T x; row k belongs to the k-th largest singular value, and the rows k of
    both have the same norm. What the vectors' precision does not hold is zero.

    x: (samples, n_in), dz: (samples, n_out). O((n_in + n_out) samples (samples + rank)): for few
    samples cheaper than a randomised decomposition, and optimal.
    """
    with one_thread():
        gram_x, scale_x = _gram(x)
        gram_dz, scale_dz = _gram(dz)
        # With gram_x = V w V^T and C = w^1/2 V^T gram_dz V w^1/2 = W s^2 W^T, the singular values
        # are s. Written so, nothing is divided by a small w.
        w, v = torch.linalg.eigh(gram_x)
        root = v * w.clamp_min(0).sqrt()
        squares, basis = torch.linalg.eigh(root.T @ gram_dz @ root)
        s = squares.clamp_min(0).sqrt().flip(0)[:rank]
        to_left = (root @ basis.flip(1)[:, :rank]).T
        safe = s.clamp_min(_NOISE * s[0])
        to_left *= torch.where(s == safe, safe.rsqrt(), 0)[:, None] if s[0] > 0 else 0
        to_right = to_left @ gram_dz / safe.clamp_min(torch.finfo(s.dtype).tiny)[:, None]
        # The Gram matrices were those of scaled vectors: what is left of the scale is a balance.
        balance = scale_x**0.5 / scale_dz**0.5
        right = (to_right / balance).to(x.dtype) @ x
        left = (to_left * balance).to(dz.dtype) @ dz
    return right, left


def left_out(x: Tensor, dz: Tensor, right: Tensor, left: Tensor) -> Tensor:
    """Norms of the rows of dz^T x - left^T right, for factors from ``gram_factors``: (n_out,). Zero
    where squares leave the range of numbers."""
    with one_thread():
        whole = ((x @ x.T @ dz) * dz).sum(0)
        within = (left.square() * right.square().sum(1, keepdim=True)).sum(0)
    return (whole - within).nan_to_num_(0, 0, 0).clamp_min_(0).sqrt_()


def _gram(vectors: Tensor) -> tuple[Tensor, float]:
    """In float64, of the vectors divided by a scale, so that no square leaves the range; 1 where
    they are in it anyway."""
    low, high = (float(end) for end in vectors.aminmax())
    largest = max(-low, high)
    safe = 1e-12 < largest < 1e12 or largest == 0
    scaled, scale = (vectors, 1.0) if safe else (vectors / largest, largest)
    return (scaled @ scaled.T).double(), scale
