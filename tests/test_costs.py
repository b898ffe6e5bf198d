"""Which way a product is computed, and how a search is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dst import SparseConv2d, SparseLinear
from dst.computing import how_computed
from triton_kernels import costs


def _layer(density: float, **changes: Any) -> costs.Layer:
    """2048 x 2048 in blocks of 32, 256 rows, on the CPU."""
    layer = costs.Layer(2048, 2048, 1, (32, 32), 0, 256, 256, 4, "cpu")._replace(**changes)
    return layer._replace(alive=round(density * layer.size))


@pytest.mark.parametrize(
    ("density", "changes", "expected"),
    [
        (0.1, {}, "sparse"),
        (0.9, {"block": (16, 16)}, "dense"),
        (0.05, {"block": (128, 128)}, "sparse"),
        (0.02, {"block": (1, 1)}, "sparse"),
        (0.9, {"block": (1, 1), "rows": 4096, "padded": 4096}, "dense"),
        (0.02, {"block": (1, 1), "taps": 9, "n_in": 9 * 256}, "dense"),  # there is no such product
        (0.05, {"taps": 9, "n_in": 9 * 256}, "sparse"),
        (0.1, {"n_out": 32, "n_in": 32}, "dense"),  # too little to save
        (0.05, {"device": "cuda"}, "sparse"),
        (0.2, {"device": "cuda"}, "dense"),
        (0.05, {"device": "cuda", "block": (1, 1)}, "dense"),
        (0.001, {"device": "cuda", "block": (1, 1)}, "sparse"),
    ],
)
def test_choice(density: float, changes: dict[str, Any], expected: str) -> None:
    assert costs.choose(_layer(density, **changes)) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_weight_of_16_gb_is_never_scattered(device: str) -> None:
    layer = _layer(0.9, n_out=65536, n_in=65536, block=(1, 1), device=device)
    assert costs.choose(layer) == "sparse"


@pytest.mark.parametrize("block", [(1, 1), (16, 16), (32, 64), (128, 128)])
def test_break_even_is_where_the_choice_changes(block: tuple[int, int]) -> None:
    layer = _layer(0.1, block=block)
    density = costs.break_even(layer)
    assert 0 < density <= 1
    alive = round(density * layer.size)
    assert costs.choose(layer._replace(alive=alive)) == "sparse"
    assert density == 1 or costs.choose(layer._replace(alive=alive + 1)) == "dense"


def test_a_layer_decides_by_its_first_training_input_and_when_its_density_changes() -> None:
    layer = SparseLinear(512, 512, block=(32, 32), density=0.05)
    assert layer.compute == "auto" and layer.chosen is None
    with torch.no_grad():
        layer(torch.randn(1, 512))
    layer.eval()(torch.randn(1, 512))
    assert layer.chosen is None
    layer.train()(torch.randn(256, 512))
    first = layer.chosen
    assert first is not None and first[1:] == (layer.topology.alive, 256, 256)
    assert first.way == costs.choose(layer.cost(256, 256))
    layer(torch.randn(1, 512))
    assert layer.chosen is first
    dense = SparseLinear(512, 512, block=(32, 32), density=0.9)
    dense.chosen = first  # as if it had been decided when few blocks were alive
    dense(torch.randn(256, 512))
    assert dense.chosen.way == "dense" and dense.chosen.alive == dense.topology.alive
    asked = SparseLinear(512, 512, block=(32, 32), density=0.9, compute="sparse")
    asked(torch.randn(256, 512))
    assert asked.chosen is None


def test_a_convolution_counts_what_its_sparse_product_drops() -> None:
    layer = SparseConv2d(64, 64, 3, stride=2, padding=1, density=0.1, block=(16, 16))
    layer(torch.randn(4, 64, 9, 8))
    # Phases of 6 x 5 positions of a padded image of 11 x 10; 5 x 4 of them are outputs.
    assert layer.chosen is not None and layer.chosen[2:] == (4 * 5 * 4, 4 * 6 * 5)


def test_in_words() -> None:
    layers = {
        "first": SparseLinear(256, 256, density=0.05, block=(32, 32)),
        "second": SparseLinear(256, 256, density=0.05, compute="dense"),
    }
    for layer in layers.values():
        layer(torch.randn(64, 256))
    first, second = how_computed(layers)
    assert first.startswith("first: ") and "(break-even " in first and "64 rows" in first
    assert second == "second: dense products, as asked for"


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
