"""Schedules: the times that a sampler visits, and how they are spaced."""
