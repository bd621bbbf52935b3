"""Return freed memory to the operating system."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """Collect garbage and trim the heap: glibc keeps gigabytes of freed memory after a training."""
    # a trainer and its model hold each other
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
