"""The search kernel against a dense search in float64."""

from __future__ import annotations

import pytest
import torch
from largest_tensor import LargestTensor
from torch import Tensor

from triton_kernels.outer_topk import Found, choose_config, outer_topk, search
from triton_kernels.outer_topk_reference import outer_scores
from triton_kernels.outer_topk_reference import outer_topk as reference
from triton_kernels.require import interpreting

# The interpreter's bfloat16 is not to be trusted.
DTYPES = [torch.float32, torch.float16] + ([] if interpreting() else [torch.bfloat16])
SHAPES = [
    (1, 1, 1),
    (1, 5, 7),
    (3, 64, 64),
    (8, 65, 63),
    (40, 1, 130),
    (33, 130, 1),
    (17, 200, 150),
]
BLOCKS = [(16, 16), (32, 16), (64, 32), (16, 128), (128, 128)]
# The least that the kernel accepts: the scores of one tile.
ONE_TILE = 1


def integers(*shape: int, seed: int = 0, largest: int = 3) -> Tensor:
    """Whole numbers, of which every sum is exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def keys_of(total: int, share: float, seed: int = 0) -> Tensor:
    """A random share of all keys, sorted."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[: int(share * total)].sort().values


def none(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=device)


def check(
    x: Tensor,
    dz: Tensor,
    count: int,
    active: Tensor,
    block: tuple[int, int] = (1, 1),
    metric: str = "abs-ip",
    room: int | None = None,
) -> Found:
    """The same keys as the reference, and the same scores up to the rounding of a square root."""
    found = search(x, dz, count, active, block=block, metric=metric, room=room)
    keys, scores = reference(x, dz, count, active, block=block, metric=metric)
    assert found.keys.dtype == torch.int64 and found.scores.dtype == torch.float32
    assert torch.equal(found.keys, keys)
    torch.testing.assert_close(found.scores.double(), scores, rtol=1e-6, atol=0)
    return found


def check_near(x: Tensor, dz: Tensor, count: int, active: Tensor, **options: object) -> Found:
    """As :func:`check` where products are rounded: pairs at the threshold may be swapped."""
    found = search(x, dz, count, active, **options)
    scores = outer_scores(x, dz, options.get("block", (1, 1)), options.get("metric", "abs-ip"))
    scores = scores.flatten()
    torch.testing.assert_close(found.scores.double(), scores[found.keys], rtol=1e-4, atol=1e-5)
    assert found.keys.numel() == count and bool((found.keys[1:] > found.keys[:-1]).all())
    left_out = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    left_out[found.keys] = False
    left_out[active] = False
    assert not torch.isin(found.keys, active).any()
    if left_out.any():
        assert scores[left_out].max() <= scores[found.keys].min() + 1e-5
    return found


def tiles(found: Found, samples: int, dtype: torch.dtype = torch.float32) -> float:
    """How many tiles of single weights were multiplied."""
    return found.flops / (2 * samples * choose_config((1, 1), dtype).tile ** 2)


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n_in", "n_out"), SHAPES)
def test_single_weights(
    batch: int, n_in: int, n_out: int, dtype: torch.dtype, share: float, device: torch.device
) -> None:
    x = integers(batch, n_in, seed=1).to(device, dtype)
    dz = integers(batch, n_out, seed=2).to(device, dtype)
    active = keys_of(n_in * n_out, share).to(device)
    left = n_in * n_out - active.numel()
    for count in {0, 1, left // 7, left}:
        check(x, dz, count, active)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks(block: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Edge blocks are cut off, in both directions, and heavy blocks are spread."""
    x, dz = integers(5, 290, seed=1, largest=1), integers(5, 270, seed=2, largest=1)
    x[:, 32:64] *= 3
    dz[:, 130:180] *= 2
    x, dz = x.to(device, dtype), dz.to(device, dtype)
    total = -(-290 // block[1]) * -(-270 // block[0])
    active = keys_of(total, 0.3).to(device)
    for count in {total // 4, total - active.numel()}:
        check(x, dz, count, active, block, room=ONE_TILE)


@pytest.mark.parametrize("seed", range(25))
def test_random_cases(seed: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    batch, n_in, n_out = draw(1, 40), draw(1, 180), draw(1, 180)
    block = [(1, 1), (1, 1), (1, 1), (16, 16), (32, 64)][draw(0, 4)]
    metric = ["abs-ip", "ip"][draw(0, 1)] if block == (1, 1) else "abs-ip"
    dtype = DTYPES[draw(0, len(DTYPES) - 1)]
    # A dead neuron here and there, and norms that differ.
    x = integers(batch, n_in, seed=seed) * integers(1, n_in, seed=seed + 1)
    dz = integers(batch, n_out, seed=seed + 2) * integers(1, n_out, seed=seed + 3)
    total = -(-n_in // block[1]) * -(-n_out // block[0])
    active = keys_of(total, draw(0, 9) / 10, seed)
    count = draw(0, total - active.numel())
    x, dz = x.to(device, dtype), dz.to(device, dtype)
    room = [None, ONE_TILE, 10_000][draw(0, 2)]
    check(x, dz, count, active.to(device), block, metric, room)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
def test_floats(block: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 300, generator=generator) * torch.rand(300, generator=generator)
    dz = torch.randn(50, 140, generator=generator).to(device, dtype)
    x = x.to(device, dtype)
    total = -(-300 // block[1]) * -(-140 // block[0])
    check_near(x, dz, total // 20, keys_of(total, 0.3).to(device), block=block, room=ONE_TILE)


def test_full_precision(device: torch.device) -> None:
    """tf32 or half precision would lose the low bits of these products."""
    x, dz = integers(1, 70, largest=2000), integers(1, 70, seed=1, largest=2000)
    check(x.to(device), dz.to(device), 500, none(device))


def test_all_negative(device: torch.device) -> None:
    x = integers(9, 100).abs().add(1).to(device)
    dz = -integers(9, 90, seed=1).abs().add(1).to(device)
    found = check(x, dz, 100, keys_of(9000, 0.1).to(device), metric="ip", room=ONE_TILE)
    assert bool((found.scores < 0).all())


@pytest.mark.parametrize("room", [None, ONE_TILE])
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_everything_is_a_tie(value: float, room: int | None, device: torch.device) -> None:
    x, dz = torch.full((3, 200), value), torch.full((3, 190), 1.0)
    found = check(x.to(device), dz.to(device), 777, none(device), room=room)
    # What a lower key has won is not appended again.
    assert found.launches <= 6


def test_ties_in_descending_order(device: torch.device) -> None:
    """All scores are equal, and the heaviest vectors, which come first, have the highest keys."""
    x = torch.stack([torch.ones(200), torch.arange(200.0), torch.zeros(200)])
    dz = torch.stack([torch.ones(150), torch.zeros(150), torch.arange(150.0)])
    found = check(x.to(device), dz.to(device), 500, none(device), room=ONE_TILE)
    assert found.keys.tolist() == list(range(500))


def test_ties_at_the_threshold(device: torch.device) -> None:
    x, dz = integers(2, 160, largest=1).to(device), integers(2, 170, seed=1, largest=1).to(device)
    for count in (50, 3000, 12_000, 20_000):
        check(x, dz, count, keys_of(160 * 170, 0.2).to(device), room=ONE_TILE)


def test_light_tiles_are_skipped(device: torch.device) -> None:
    """Two heavy columns on each side, far apart in the input, leave one tile of 30 to visit."""
    x, dz = integers(4, 384).add(0.5), integers(4, 320, seed=1).add(0.5)
    x[:, [3, 300]] *= 1000
    dz[:, [5, 250]] *= 1000
    found = check(x.to(device), dz.to(device), 4, none(device), room=ONE_TILE)
    assert tiles(found, 4) == 1


def test_active_pairs_do_not_fill_the_buffer(device: torch.device) -> None:
    """All of the best rows are active, many times what the buffer holds."""
    x, dz = integers(6, 256).add(0.5), integers(6, 320, seed=1).add(0.5)
    dz[:, 64:] *= 100
    active = torch.arange(64 * 256, 320 * 256)
    check(x.to(device), dz.to(device), 40, active.to(device), room=ONE_TILE)


def test_overflow_is_done_again(device: torch.device) -> None:
    """The heaviest vectors are orthogonal: the first tile says that scores are low, and the tiles
    that follow append more than there is room for."""
    x, dz = torch.zeros(3, 256), torch.zeros(3, 256)
    x[0, :64] = 8
    dz[1, :64] = 8
    x[2] = torch.arange(1.0, 257.0).remainder(5).add(1)
    dz[2] = torch.arange(1.0, 257.0).remainder(4).add(1)
    x[2, :64] = dz[2, :64] = 0.125
    x, dz = x.to(device), dz.to(device)
    assert tiles(check(x, dz, 30, none(device)), 3) == 16
    assert tiles(check(x, dz, 30, none(device), room=ONE_TILE), 3) > 16


def test_the_room_changes_nothing(device: torch.device) -> None:
    """One pair has one score, whichever launch computes it and however the programs race."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(37, 250, generator=generator).to(device)
    dz = torch.randn(37, 200, generator=generator).to(device)
    active = keys_of(50_000, 0.2).to(device)
    once = search(x, dz, 5000, active)
    for room in [ONE_TILE, ONE_TILE, 10_000, 30_000]:
        again = search(x, dz, 5000, active, room=room)
        assert torch.equal(again.keys, once.keys) and torch.equal(again.scores, once.scores)


def test_any_strides_and_gradients(device: torch.device) -> None:
    x = integers(70, 12).to(device).T.requires_grad_()
    dz = integers(24, 90, seed=1).to(device)[::2]
    check(x, dz, 200, none(device))
    check(x[:1].expand(12, 70), dz.half(), 200, none(device))


def test_large_and_small_values(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 100, generator=generator).to(device)
    dz = torch.randn(6, 140, generator=generator).to(device)
    found = search(x, dz, 100, none(device))
    for scale in (2.0**60, 2.0**-50):
        scaled = search(x * scale, dz * scale, 100, none(device), room=ONE_TILE)
        assert torch.equal(scaled.keys, found.keys)
        assert torch.equal(scaled.scores, found.scores * scale**2)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize(("block", "value"), [((1, 1), 1e20), ((16, 16), 1e10)])
def test_infinite_scores_are_ties(
    block: tuple[int, int], value: float, device: torch.device
) -> None:
    """In float32 all scores overflow, or all squares; the heaviest vectors have the last keys."""
    x = (torch.arange(1.0, 301.0)[None] * value).to(device)
    total = (300 // block[0] + (block[0] > 1)) ** 2
    found = search(x, x, total // 3, none(device), block=block, room=ONE_TILE)
    assert found.keys.tolist() == list(range(total // 3))
    assert bool(found.scores.isinf().all())


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_scores_of_minus_infinity(device: torch.device) -> None:
    x = torch.full((2, 10), 1e30, device=device)
    with pytest.raises(ValueError, match="only 0 of 5 connections have a finite score"):
        outer_topk(x, -x, 5, none(device), metric="ip")


def test_no_tensor_is_as_large_as_the_gradient(device: torch.device) -> None:
    x, dz = integers(4, 900).to(device), integers(4, 800, seed=1).to(device)
    with LargestTensor() as seen:
        search(x, dz, 100, none(device), room=ONE_TILE)
    assert seen.largest < 900 * 800 / 8


def test_what_is_refused(device: torch.device) -> None:
    x, dz = integers(4, 10).to(device), integers(4, 8).to(device)
    free = none(device)
    with pytest.raises(ValueError, match="over the same batch"):
        outer_topk(x[:3], dz, 1, free)
    with pytest.raises(ValueError, match="none of them 0"):
        outer_topk(x[:0], dz[:0], 1, free)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        outer_topk(x.double(), dz, 1, free)
    with pytest.raises(ValueError, match="metric 'l2'"):
        outer_topk(x, dz, 1, free, metric="l2")
    with pytest.raises(ValueError, match=r"block \(8, 16\)"):
        outer_topk(x, dz, 1, free, block=(8, 16))
    with pytest.raises(ValueError, match="metric 'ip' has no kernel"):
        outer_topk(x, dz, 1, free, block=(16, 16), metric="ip")
    with pytest.raises(ValueError, match="1-D int64"):
        outer_topk(x, dz, 1, free.int())
    with pytest.raises(ValueError, match="79 of 80 are inactive"):
        outer_topk(x, dz, 80, torch.tensor([3], device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_thousands_of_programs_at_once(dtype: torch.dtype, device: torch.device) -> None:
    """Races: rooms and repetitions change nothing, and the scores are those of a dense product."""
    x = integers(128, 6000).to(device, dtype)
    dz = (integers(128, 5000, seed=1) * integers(1, 5000, seed=2)).to(device, dtype)
    active = torch.arange(0, 30_000_000, 7, device=device)
    once = check(x, dz, 200_000, active)
    for room in [None, None, 300_000, 500_000]:
        again = search(x, dz, 200_000, active, room=room)
        assert torch.equal(again.keys, once.keys) and torch.equal(again.scores, once.scores)
