"""Which way a linear product is computed."""

from __future__ import annotations

import pytest

from dst import SparseLinear
from triton_kernels import choose_linear


@pytest.mark.parametrize(
    ("density", "block", "dense_bytes", "device", "expected"),
    [
        (0.05, (1, 1), 1 << 20, "cpu", "sparse"),
        (0.3, (1, 1), 1 << 20, "cpu", "dense"),
        (0.09, (16, 16), 1 << 20, "cpu", "dense"),
        (0.09, (16, 1), 1 << 20, "cpu", "sparse"),
        (0.12, (64, 32), 1 << 20, "cpu", "sparse"),
        (0.05, (1, 1), 1 << 20, "cuda", "dense"),
        (0.001, (1, 1), 1 << 20, "cuda", "sparse"),
    ],
)
def test_choice(density, block, dense_bytes, device, expected):
    assert choose_linear(density, block, dense_bytes, device) == expected


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_weight_of_16_gb_is_never_scattered(kind):
    assert choose_linear(0.9, (1, 1), 65536 * 65536 * 4, kind) == "sparse"


def test_a_layer_decides_once():
    layer = SparseLinear(64, 64, density=0.05)
    assert layer.compute == "sparse"
    assert SparseLinear(64, 64, density=0.5).compute == "dense"
    assert SparseLinear(64, 64, density=0.5, compute="sparse").compute == "sparse"
