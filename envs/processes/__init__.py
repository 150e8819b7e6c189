"""Noise processes, the physics of the environments: how data turn into noise."""
