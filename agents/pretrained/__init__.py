"""Checkpoints and pipelines of other libraries: in, and out."""
