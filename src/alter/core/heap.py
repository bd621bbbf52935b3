"""Memory that is free goes back to the machine."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """Collect what is no longer reachable, and hand freed memory back: glibc keeps it after a training, as gigabytes."""
    # a trainer and its model hold each other
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
