"""Solver agents: they learn the sampler, its times or its weights, and leave the network alone."""
