"""Schedules: the times that a sampler visits, and how they are spaced."""

from .grids import SCHEDULES
from .schedule import Schedule, listed_times, make_schedule, schedule_options
from .spacings import refine_times

__all__ = [
    "SCHEDULES",
    "Schedule",
    "listed_times",
    "make_schedule",
    "refine_times",
    "schedule_options",
]
