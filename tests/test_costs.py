"""Which way a linear product is computed."""

from __future__ import annotations

import pytest

from dst import SparseLinear
from triton_kernels import choose_linear, costs


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


# The searches of growth.


def test_a_bitmap_of_active_connections():
    """Few questions are searched, many are looked up, and a bitmap never takes much memory."""
    size = 1 << 24
    assert not costs.active_bitmap_pays(0, size, 10**9)
    assert not costs.active_bitmap_pays(1000, size, 100)
    assert costs.active_bitmap_pays(1000, size, 10**6)
    assert costs.active_bitmap_pays(1000, 8 * costs.LARGEST_BITMAP_BYTES, 10**9)
    assert not costs.active_bitmap_pays(1000, 8 * costs.LARGEST_BITMAP_BYTES + 8, 10**9)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4096, 4096, 128), True),
        ((512, 512, 128), False),  # small
        ((1024, 1024, 256), True),
        ((1024, 1024, 257), False),  # a sorted copy of more than half of G
        ((64, 576, 50_000), False),  # a convolution
        ((65536, 8, 4), False),
    ],
)
def test_sorting_by_norm_pays(shape, expected):
    assert costs.scan_pays(*shape) == expected


def test_low_rank_needs_samples_and_few_candidates():
    assert costs.lowrank_pays(4096, 4096, 128, 16, 10_000)
    assert not costs.lowrank_pays(4096, 4096, 31, 16, 10_000)
    assert not costs.lowrank_pays(4096, 4096, 128, 16, int(0.05 * 4096**2))
    assert not costs.lowrank_pays(512, 512, 128, 16, 1000)


def test_gram_matrices_pay_for_short_batches_and_large_blocks():
    """About where the batch is shorter than twice the block's area, by the measurements."""
    assert costs.gram_pays(8192, 8192, 128, (32, 32))
    assert not costs.gram_pays(8192, 8192, 128, (4, 4))
    assert not costs.gram_pays(8192, 8192, 2048, (32, 32))
    assert not costs.gram_pays(128, 128, 16, (32, 32))


@pytest.mark.parametrize("samples", [128, 512, 600, 1000, 1200])
@pytest.mark.parametrize("n", [1024, 4096, 8192, 16384])
def test_gram_matrices_are_never_as_large_as_the_gradient(n, samples):
    floats = samples * (samples + 1) // 2 * n // 32
    if costs.gram_pays(n, n, samples, (32, 32)):
        assert floats <= max(8 << 20, n * n // 2)


def test_times_grow_with_what_is_computed():
    times = [costs.scan_ns(4096, 4096, 128, share, 10_000) for share in (0, 0.1, 1)]
    assert times[0] < times[1] < times[2]
    assert costs.scan_ns(4096, 4096, 16, 1, 10_000) < times[2]
    assert costs.scan_ns(4096, 4096, 128, 0.1, 20_000) > times[1]
    assert times[2] == pytest.approx(costs.tiles_ns(4096, 4096, 128), rel=0.1)
    ranks = [costs.lowrank_ns(4096, 4096, 128, rank, 1 << 18, 20_000) for rank in (16, 32, 64)]
    assert ranks[0] < ranks[1] < ranks[2]
