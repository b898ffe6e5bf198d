"""When the topology is updated, and how much of it; the learning rate over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from growth import InputError

DECAYS = ("cosine", "linear", "constant")
LR_SCHEDULES = ("cosine", "steps", "constant")
BETA_DECAYS = ("linear", "parabolic")


@dataclass(frozen=True)
class UpdateSchedule:
    """Topology updates at steps interval, 2 interval, ... before ``end``; steps count from 1.

    fraction: share of a layer's alive connections replaced at the first update (alpha of RigL,
    zeta of SET, K of the similarity thesis). decay: how it falls until ``end``: ``cosine``
    alpha / 2 (1 + cos(pi t / end)), ``linear`` alpha (1 - t / end), ``constant``.
    average: number of steps, the update's included, whose vectors are searched together.
    average_decay: in [0, 1], what the gradient of one of them is multiplied with for every later
    one; 1: a plain sum.
    """

    interval: int
    end: int
    fraction: float
    decay: str = "cosine"
    average: int = 1
    average_decay: float = 1.0

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise InputError(f"update interval {self.interval} must be at least 1 step")
        if not 0 < self.fraction <= 1:
            raise InputError(f"update fraction {self.fraction} must lie in (0, 1]")
        if self.decay not in DECAYS:
            raise InputError(f"decay {self.decay!r} is unknown: choose {', '.join(DECAYS)}")
        if not 1 <= self.average <= self.interval:
            raise InputError(
                f"cannot average over {self.average} steps between updates "
                f"{self.interval} steps apart: choose 1 to {self.interval}"
            )
        if not 0 <= self.average_decay <= 1:
            raise InputError(f"average decay {self.average_decay} must lie in [0, 1]")

    def due(self, step: int) -> bool:
        return step % self.interval == 0 and 0 < step < self.end

    def recording(self, step: int) -> bool:
        """Whether the vectors of this step are searched by the next update."""
        due = self.next_update(step)
        return self.due(due) and due - step < self.average

    def next_update(self, step: int) -> int:
        """The first multiple of the interval at or after this step; there may be no update."""
        return -(-step // self.interval) * self.interval

    @property
    def last_update(self) -> int:
        """The step of the last update, 0 where there is none."""
        return (self.end - 1) // self.interval * self.interval

    def fraction_at(self, step: int) -> float:
        if self.decay == "cosine":
            return self.fraction / 2 * (1 + math.cos(math.pi * step / self.end))
        if self.decay == "linear":
            return self.fraction * (1 - step / self.end)
        return self.fraction


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of every step of a run of ``steps``, as a factor of the base rate.

    schedule: ``cosine`` to zero, ``steps`` (times ``factor`` at each milestone, a share of the
    run), ``constant``. warmup: first steps, over which the rate rises linearly.
    """

    steps: int
    schedule: str = "cosine"
    warmup: int = 0
    milestones: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1

    def __post_init__(self) -> None:
        if self.schedule not in LR_SCHEDULES:
            raise InputError(
                f"lr schedule {self.schedule!r} is unknown: choose {', '.join(LR_SCHEDULES)}"
            )
        if not 0 <= self.warmup < max(1, self.steps):
            raise InputError(f"a warm-up of {self.warmup} steps must end inside {self.steps} steps")

    def at(self, step: int) -> float:
        """step: from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "cosine":
            share = (step - self.warmup) / max(1, self.steps - self.warmup)
            return 0.5 * (1 + math.cos(math.pi * share))
        if self.schedule == "steps":
            return self.factor ** sum(step >= m * self.steps for m in self.milestones)
        return 1.0


@dataclass(frozen=True)
class BetaSchedule:
    """Vanishing contributions: beta of every step, from 1 at the first to 0 from step ``end`` on.

    decay: ``linear`` 1 - q/Q or ``parabolic`` (q/Q)^2 - 2 q/Q + 1, where Q is ``end``, and q the
    step, rounded down to a multiple of ``interval`` (the steps of an epoch: beta changes after
    every epoch). Nikiforos 2024, appendix A.
    """

    end: int
    decay: str = "linear"
    interval: int = 1

    def __post_init__(self) -> None:
        if self.decay not in BETA_DECAYS:
            raise InputError(
                f"beta decay {self.decay!r} is unknown: choose {', '.join(BETA_DECAYS)}"
            )
        if self.end < 0 or self.interval < 1:
            raise InputError(
                f"beta cannot vanish over {self.end} steps, {self.interval} at a time: give at "
                "least 0 steps, and 1 at a time"
            )

    def at(self, step: int) -> float:
        """step: from 0."""
        if step >= self.end:
            return 0.0
        left = 1 - step // self.interval * self.interval / self.end
        return left if self.decay == "linear" else left**2
