"""Names for objects in memory (rows, models), so that settings, which hold names, can refer to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

PREFIX = "memory:"
"""Prefix of such a name."""

_held: dict[str, Any] = {}


@contextlib.contextmanager
def holding(name: str, thing: Any) -> Iterator[str]:
    """Inside the block, `memory:NAME` means `thing`; yields that name."""
    whole = PREFIX + name
    before = _held.get(whole)
    _held[whole] = thing
    try:
        yield whole
    finally:
        if before is None:
            _held.pop(whole, None)
        else:
            _held[whole] = before


def held(name: str) -> Any | None:
    """Return the object that the name refers to, or None."""
    return _held.get(name)
