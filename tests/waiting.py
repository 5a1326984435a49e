"""Waiting for what other processes do."""

import time
from collections.abc import Callable


def until(true: Callable[[], object], seconds: float = 40) -> object:
    """What `true` gives once it is no longer false."""
    end = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return value
