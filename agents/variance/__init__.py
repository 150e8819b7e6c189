"""Variance learning: how much noise each step of a sampler wants."""
