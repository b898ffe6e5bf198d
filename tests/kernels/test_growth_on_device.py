"""Growth's exact search through the kernel, against the dense search beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from growth import Dense, Exact, InputError, JoinedPairs, LinearPairs, Pairs


def _integers(*shape: int, seed: int) -> Tensor:
    """Whole numbers, of which every sum is exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).float()


def _pairs(device: torch.device, dtype: torch.dtype, taps: int = 1) -> Pairs:
    """As long as the kernel is asked for: shorter than a quarter of the width."""
    x, dz = _integers(12, 192, seed=1), _integers(12, 128, seed=2)
    return LinearPairs(x.to(device, dtype), dz.to(device, dtype), 0.5, taps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("metric", ["abs-ip", "ip"])
def test_exact_is_a_kernel(device: torch.device, metric: str, dtype: torch.dtype) -> None:
    pairs = _pairs(device, dtype)
    active = torch.arange(0, 192 * 128, 5)
    found = Exact(metric)(pairs, 300, active)
    wanted = Dense(metric)(pairs, 300, active)
    assert found.report["search"] == "kernel" and found.row.device.type == device.type
    assert all(torch.equal(a, b) for a, b in zip(found[:3], wanted[:3], strict=True))


@pytest.mark.parametrize(("block", "taps"), [((16, 32), 1), ((32, 16), 3), ((16, 64), 3)])
def test_blocks_are_a_kernel(device: torch.device, block: tuple[int, int], taps: int) -> None:
    pairs = _pairs(device, torch.float32, taps)
    found = Exact()(pairs, 9, torch.tensor([1, 3]), block=block)
    wanted = Dense()(pairs, 9, torch.tensor([1, 3]), block=block)
    assert found.report["search"] == "kernel"
    assert torch.equal(found.row, wanted.row) and torch.equal(found.col, wanted.col)
    torch.testing.assert_close(found.score, wanted.score)


@pytest.mark.parametrize(
    ("block", "taps", "dtype", "metric"),
    [
        ((16, 128), 3, torch.float32, "abs-ip"),  # a block would lie across taps
        ((4, 4), 1, torch.float32, "abs-ip"),
        ((1, 1), 1, torch.float64, "abs-ip"),
        ((1, 1), 1, torch.float32, "l2"),
    ],
)
def test_where_there_is_no_kernel(
    device: torch.device, block: tuple[int, int], taps: int, dtype: torch.dtype, metric: str
) -> None:
    pairs = _pairs(device, dtype, taps)
    found = Exact(metric)(pairs, 5, torch.tensor([1, 3]), block=block)
    wanted = Dense(metric)(pairs, 5, torch.tensor([1, 3]), block=block)
    assert found.report["search"] != "kernel"
    assert all(torch.equal(a, b) for a, b in zip(found[:2], wanted[:2], strict=True))


def test_joined_recordings_and_long_vectors(device: torch.device) -> None:
    pairs = _pairs(device, torch.float32)
    none = torch.empty(0, dtype=torch.int64)
    found = Exact()(JoinedPairs([pairs, pairs]), 50, none)
    wanted = Dense()(pairs, 50, none)
    assert found.report["search"] == "kernel"
    assert torch.equal(found.row, wanted.row) and torch.equal(found.score, 2 * wanted.score)
    long = LinearPairs(_integers(90, 20, seed=1).to(device), _integers(90, 30, seed=2).to(device))
    assert Exact()(long, 5, none).report["search"] != "kernel"


def test_products_that_overflow_are_refused_in_one_line(device: torch.device) -> None:
    x, dz = torch.full((2, 64), 1e30).to(device), torch.full((2, 64), -1e30).to(device)
    with pytest.raises(InputError, match="only 0 of 7 connections have a finite score"):
        Exact("ip")((x, dz), 7, torch.empty(0, dtype=torch.int64))
