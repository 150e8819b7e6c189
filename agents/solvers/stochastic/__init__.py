"""Solvers of stochastic differential equations: fresh noise in each step."""
