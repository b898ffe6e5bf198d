"""Schedules: golden values of the papers' formulas."""

import math

import pytest

from dst import InputError, LearningRate, UpdateSchedule


def test_rigl_of_the_paper() -> None:
    """alpha 0.3, every 100 steps, to 75 % of 1000 steps: alpha / 2 (1 + cos(pi t / T_end))."""
    schedule = UpdateSchedule(100, 750, 0.3)
    assert [t for t in range(1001) if schedule.due(t)] == [100, 200, 300, 400, 500, 600, 700]
    assert schedule.fraction_at(0) == 0.3
    assert schedule.fraction_at(375) == pytest.approx(0.15)
    assert schedule.fraction_at(250) == pytest.approx(0.225)  # cos(pi / 3) = 1/2
    assert schedule.fraction_at(500) == pytest.approx(0.075)
    assert schedule.fraction_at(750) == pytest.approx(0.0, abs=1e-12)


def test_decays() -> None:
    linear = UpdateSchedule(1, 10, 0.4, "linear")
    assert [linear.fraction_at(t) for t in (0, 5, 10)] == pytest.approx([0.4, 0.2, 0.0])
    constant = UpdateSchedule(1, 10, 0.4, "constant")
    assert [constant.fraction_at(t) for t in (0, 5, 10)] == [0.4, 0.4, 0.4]


def test_due_from_the_first_interval_and_before_the_end() -> None:
    assert [t for t in range(-4, 15) if UpdateSchedule(4, 12, 0.1).due(t)] == [4, 8]
    assert [t for t in range(-4, 15) if UpdateSchedule(4, 13, 0.1).due(t)] == [4, 8, 12]
    assert [t for t in range(6) if UpdateSchedule(1, 4, 0.1).due(t)] == [1, 2, 3]
    assert not any(UpdateSchedule(4, 0, 0.1).due(t) for t in range(20))


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        (1, [4, 8]),
        (2, [3, 4, 7, 8]),
        (4, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_recording_covers_the_update_and_the_steps_before(
    average: int, expected: list[int]
) -> None:
    """Nothing is recorded after the last update at 8, though the end is 10."""
    schedule = UpdateSchedule(4, 10, 0.1, average=average)
    assert [t for t in range(1, 20) if schedule.recording(t)] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 10, 0.1), "interval 0 must be at least 1"),
        ((1, 10, 0.0), r"fraction 0.0 must lie in \(0, 1\]"),
        ((1, 10, 1.5), "fraction 1.5"),
        ((1, 10, float("nan")), "fraction nan"),
        ((1, 10, 0.1, "exponential"), "choose cosine, linear, constant"),
        ((4, 10, 0.1, "cosine", 0), "average over 0 steps"),
        ((4, 10, 0.1, "cosine", 5), "choose 1 to 4"),
    ],
)
def test_wrong_schedules_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        UpdateSchedule(*arguments)


def test_cosine_learning_rate() -> None:
    rate = LearningRate(100)
    assert rate.at(0) == 1.0
    assert rate.at(50) == pytest.approx(0.5)
    assert rate.at(99) == pytest.approx(0.5 * (1 + math.cos(0.99 * math.pi)))
    assert rate.at(100) == pytest.approx(0.0, abs=1e-12)


def test_warm_up_rises_linearly_and_hands_over_at_the_full_rate() -> None:
    rate = LearningRate(104, warmup=4)
    assert [rate.at(t) for t in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rate.at(54) == pytest.approx(0.5)


def test_step_learning_rate() -> None:
    """x 0.1 at a half and three quarters of the run."""
    rate = LearningRate(8, "steps")
    assert [rate.at(t) for t in range(8)] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    paper = LearningRate(97_656, "steps", milestones=(30 / 97.656, 60 / 97.656), factor=0.2)
    values = [paper.at(t) for t in (29_999, 30_001, 60_001)]
    assert values == pytest.approx([1, 0.2, 0.04])


def test_constant_learning_rate() -> None:
    assert {LearningRate(10, "constant").at(t) for t in range(10)} == {1.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "poly"}, "choose cosine, steps, constant"),
        ({"warmup": -1}, "warm-up of -1 steps"),
        ({"warmup": 10}, "must end inside 10 steps"),
    ],
)
def test_wrong_learning_rates_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LearningRate(10, **arguments)
