"""Named random streams: the same everywhere, different by seed, name and step."""

import subprocess
import sys

import pytest
import torch

from dst.seeding import generator
from growth.errors import InputError


def _draw(seed: int, name: str, step: int) -> list[int]:
    return torch.randint(2**62, (4,), generator=generator(seed, name, step)).tolist()


def test_equal_arguments_give_equal_draws() -> None:
    assert _draw(3, "layer1.conv", 100) == _draw(3, "layer1.conv", 100)


def test_another_process_with_another_hash_seed_draws_the_same() -> None:
    script = "from dst.seeding import generator; print(generator(3, 'fc', 7).initial_seed())"
    printed = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONHASHSEED": "17", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(printed.stdout) == generator(3, "fc", 7).initial_seed()


def test_seed_name_and_step_all_matter() -> None:
    names = ("a", "b", "conv1", "conv2", "")
    draws = {tuple(_draw(seed, n, step)) for seed in range(6) for n in names for step in range(6)}
    assert len(draws) == 6 * len(names) * 6


def test_neighbouring_steps_are_unrelated() -> None:
    first = torch.cat([torch.rand(1, generator=generator(0, "x", step)) for step in range(1000)])
    assert abs(first.mean().item() - 0.5) < 0.04  # 4 standard errors of a uniform mean
    assert abs(torch.corrcoef(torch.stack([first[1:], first[:-1]]))[0, 1].item()) < 0.13


def test_large_seeds_and_steps_do_not_run_into_each_other() -> None:
    # Neither number may be cut to 32 bits, nor may the high part of one stand in for another.
    combinations = [(1, 2), (1 + 2**32, 2), (1, 2 + 2**32), (2**80, 2)]
    assert len({tuple(_draw(seed, "x", step)) for seed, step in combinations}) == 4


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    generator(0, "x", 0)
    assert torch.equal(before, torch.get_rng_state())


def test_negative_seed_is_refused() -> None:
    with pytest.raises(InputError, match="seed -1 is negative"):
        generator(-1, "x", 0)
