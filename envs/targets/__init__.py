"""Targets: the distributions of real samples, toys and sets of images."""
