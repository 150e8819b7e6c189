"""Denoisers: a network, what it predicts, and the process that it was trained on."""
