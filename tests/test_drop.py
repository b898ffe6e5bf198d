"""Drop criteria on small cases worked out by hand."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dst.drop import CRITERIA, magnitude, signed_magnitude


def _values(*weights: float) -> Tensor:
    return torch.tensor(weights).view(-1, 1, 1)


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (1, [3]), (2, [1, 3]), (3, [1, 3, 4]), (5, [0, 1, 2, 3, 4])]
)
def test_magnitude_by_hand(count: int, expected: list[int]) -> None:
    assert magnitude(_values(3.0, -0.2, -5.0, 0.1, 0.4), count).tolist() == expected


def test_magnitude_of_blocks_is_the_frobenius_norm() -> None:
    blocks = torch.tensor([[[3.0, 4.0]], [[0.0, 4.9]], [[-4.0, 3.1]], [[1.0, -1.0]]])
    # Norms 5, 4.9, 5.06 and 1.41; sums 7, 4.9, -0.9 and 0.
    assert magnitude(blocks, 1).tolist() == [3]
    assert magnitude(blocks, 3).tolist() == [0, 1, 3]


def test_magnitude_ties_go_to_the_lowest_key() -> None:
    assert magnitude(_values(1.0, -1.0, 1.0, -1.0), 2).tolist() == [0, 1]
    assert magnitude(_values(2.0, 0.0, -0.0, 0.0), 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, []),
        # Of 4 positive and 2 negative ones: 2 of 3 are positive.
        (3, [0, 1, 5]),
        (6, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_signed_magnitude_by_hand(count: int, expected: list[int]) -> None:
    assert signed_magnitude(_values(0.1, 0.2, 0.3, 0.4, -8.0, -7.0), count).tolist() == expected


def test_signed_magnitude_differs_from_magnitude() -> None:
    weights = _values(0.1, 0.2, -7.0, -8.0)
    assert magnitude(weights, 2).tolist() == [0, 1]
    assert signed_magnitude(weights, 2).tolist() == [0, 2]


def test_signed_magnitude_drops_zeros_first() -> None:
    weights = _values(0.0, 0.5, -0.5, -0.0, 0.6, -0.6)
    assert signed_magnitude(weights, 1).tolist() == [0]
    assert signed_magnitude(weights, 2).tolist() == [0, 3]
    assert signed_magnitude(weights, 4).tolist() == [0, 1, 2, 3]


def test_signed_magnitude_of_one_sign_alone() -> None:
    assert signed_magnitude(_values(3.0, 1.0, 2.0), 2).tolist() == [1, 2]
    assert signed_magnitude(_values(-3.0, -1.0, -2.0), 2).tolist() == [1, 2]


def test_signed_magnitude_of_blocks_goes_by_their_sum() -> None:
    # Sums 1, -1, and 0 without being zero, which counts as positive; norms 5, 5, 1.4.
    blocks = torch.tensor([[[-3.0, 4.0]], [[3.0, -4.0]], [[1.0, -1.0]]])
    assert signed_magnitude(blocks, 1).tolist() == [2]
    assert signed_magnitude(blocks, 2).tolist() == [1, 2]


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("count", [0, 1, 59, 60, 61, 199, 200])
def test_asked_for_60_of_200_drops_60(criterion: str, count: int) -> None:
    """Other implementations drop 61, 115 and 170 (see the reference notes)."""
    generator = torch.Generator().manual_seed(count)
    for weights in (
        torch.randn(200, 1, 1, generator=generator),
        torch.randn(200, 1, 1, generator=generator).relu(),  # half are zeros
        torch.randn(200, 1, 1, generator=generator).abs(),
        torch.zeros(200, 1, 1),
        torch.ones(200, 1, 1),
        torch.randint(-1, 2, (200, 1, 1), generator=generator).float(),
        torch.randn(200, 2, 3, generator=generator),
    ):
        dropped = CRITERIA[criterion](weights, count).tolist()
        assert len(dropped) == count
        assert dropped == sorted(set(dropped))


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.floats(0, 1))
def test_nothing_kept_is_closer_to_zero(criterion: str, whole: list[int], share: float) -> None:
    """Among all weights, or among those of its own sign."""
    count = int(share * len(whole))
    dropped = CRITERIA[criterion](_values(*map(float, whole)), count).tolist()
    assert len(dropped) == count
    kept = [i for i in range(len(whole)) if i not in dropped]
    for i in dropped:
        for j in kept:
            if criterion == "magnitude" or (whole[i] > 0) == (whole[j] > 0):
                if criterion == "signed-magnitude" and whole[i] == 0:
                    continue
                assert (abs(whole[i]), i) < (abs(whole[j]), j)
    if criterion == "signed-magnitude":
        positive, negative = sum(w > 0 for w in whole), sum(w < 0 for w in whole)
        left = max(0, count - whole.count(0))
        of_positive = sum(whole[i] > 0 for i in dropped)
        assert abs(of_positive - left * positive / max(1, positive + negative)) <= 0.5


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(criterion: str, dtype: torch.dtype) -> None:
    weights = _values(3.0, -0.25, -5.0, 0.125, 0.5)
    expected = CRITERIA[criterion](weights, 2).tolist()
    assert CRITERIA[criterion](weights.to(dtype), 2).tolist() == expected


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_nothing_alive(criterion: str) -> None:
    for shape in ((0, 1, 1), (0, 2, 2)):
        assert CRITERIA[criterion](torch.zeros(shape), 0).tolist() == []


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_values_are_left_as_they_are(criterion: str) -> None:
    weights: Any = torch.randn(20, 2, 2)
    before = weights.clone()
    CRITERIA[criterion](weights, 7)
    assert torch.equal(weights, before)
