"""Processes of a comparison: ours in the environment that our command line sets, the peer in the user's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ctxtrain.engine.tuning import set_thread_waiting


@contextmanager
def our_environment() -> Iterator[None]:
    """Processes that are started inside have what `ctxtrain` sets before libraries are imported."""
    before = dict(os.environ)
    set_thread_waiting()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
