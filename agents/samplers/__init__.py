"""Samplers: the table of numbers, the loop that follows it, and the Gaussian policy."""
