"""Format the figures of rows (`Measures.summary`) for tables, cards and pages: as counts, or with three digits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COUNTS = {
    "said": "n_said",
    "broken": "n_answers",
    "empty": "n_answers",
    "unusable": "n_answers",
    "others": "n_answers",
}
"""Figures that are counts, and what they are counted of."""


def told(figures: Mapping[str, Any] | None, name: str, none: str = "") -> str:
    """Format a figure.

    Args:
        figures: before, after, or of a reference; None where nothing was measured.
        name: of the figure; `unusable` are broken and empty replies together.
        none: what stands for a figure that was not measured.
    """
    figures = figures or {}
    if name in COUNTS:
        count = figures.get(name)
        if name == "unusable" and "broken" in figures:
            count = figures["broken"] + figures["empty"]
        n = figures.get(COUNTS[name])
        return f"{count} of {n}" if n and count is not None else none
    value = figures.get(name)
    return none if value is None else f"{value:.3f}"
