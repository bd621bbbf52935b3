"""What the metrics take: ragged lists of rows, and values as float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from alter.core import Array

if TYPE_CHECKING:
    import numpy.typing as npt

RowArrays: TypeAlias = "Sequence[npt.ArrayLike]"
"""A ragged list: one 1-D array per row."""

EPSILON = 1e-10
"""What OpenUnlearning adds to denominators."""


def floats(values: npt.ArrayLike) -> Array:
    """Return values as float64."""
    return np.asarray(values, dtype=np.float64)


def labelled_row(values: npt.ArrayLike, index: int, *, of: str) -> Array:
    """Return a row as float64.

    Raises:
        ValueError: it has no labelled token.
    """
    row = floats(values)
    if row.size == 0:
        raise ValueError(f"{of}: row {index} has no labelled token; leave it out or give it an answer")
    return row
