"""The timestep of an observation, as a space that knows which times an environment visits.

A policy for other people's algorithms sees no more of an environment than its spaces. From this
one it can tell that it was made for other times, before it trains on them.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np

from .processes import NoiseProcess
from .schedules import Schedule


class TimestepSpace(gym.spaces.Box):
    """The times of a process, `[0, t_max]` in float32, and those that the schedule visits.

    To Gymnasium and its clients it is a `Box` like any other, except that two of them are equal
    only if they belong to one process: Stable-Baselines3 compares spaces before it goes on with a
    model in another environment. The times may differ, since an episode may have a schedule of its
    own.

    Args:
        schedule: the environment's.
        shape: () for one number, (1,) for tools that take vectors only.

    Attributes:
        times: the K + 1 times of the schedule, in sampling order.
        process: its noise process.
    """

    def __init__(self, schedule: Schedule, shape: tuple[int, ...] = ()) -> None:
        super().__init__(0.0, schedule.process.t_max, shape, np.float32)
        self.times: tuple[float, ...] = tuple(schedule.times.tolist())
        self.process: NoiseProcess = schedule.process

    def __eq__(self, other: object) -> bool:
        """Tell whether times of this space mean the same as those of another one."""
        if isinstance(other, TimestepSpace) and other.process != self.process:
            return False
        return super().__eq__(other)

    def __repr__(self) -> str:
        """Name the process, which messages about unequal spaces print."""
        return f"TimestepSpace({self.process!r}, {self.shape})"
