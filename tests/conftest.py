"""What every test shares: how many threads a test process may take."""

from __future__ import annotations

import os

# Each worker of pytest-xdist has a core of its own: more threads would wait for each other.
# This stands before any test imports torch, which reads the variable once.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
