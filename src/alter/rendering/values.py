"""Values as a page shows them."""

from __future__ import annotations

import math
from pathlib import Path

from alter.settings import rounded


def decimal(value: float | None) -> str:
    """Return a number with three decimals, a dash for none."""
    return "-" if value is None else rounded(value, ".3f")


def finite(value: float | None) -> bool:
    """Tell whether a figure can be drawn: what is not finite is null in JSON."""
    return value is not None and math.isfinite(value)


def duration(seconds: float) -> str:
    """Return a span of time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def percent(share: float) -> str:
    """Format a share as a percentage that keeps small ones visible."""
    return f"{100 * share:.0f} %" if share == 0 or abs(share) >= 0.0995 else f"{100 * share:.1f} %"


def called(source: str) -> str:
    """Return what a model or rows are called where others read it: of a path of this machine the last part, else the whole."""
    path = Path(source).expanduser()
    return path.name or source if path.is_absolute() or source.startswith(".") or path.exists() else source
