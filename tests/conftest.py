"""Processes of pytest-xdist share the cores: each has one thread, and what it starts has, too."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, which reads it once
    os.environ.setdefault("OMP_NUM_THREADS", "1")
