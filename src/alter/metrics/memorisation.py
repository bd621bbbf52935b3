"""How much of a text a model completes by itself."""

from __future__ import annotations

import numpy as np

from alter.core import Array
from alter.metrics.arrays import RowArrays, floats


def exact_memorization(correct: RowArrays) -> Array:
    """Return the share of tokens of a' that the model predicts right, given the true tokens before them, [n].

    (Tirumala et al. 2022.) A row without text (only an end token) gives NaN; take the mean with `numpy.nanmean`.

    Args:
        correct: per row, whether argmax equals the label, over a (the end token last; it is not counted).
    """
    rows = [floats(row)[:-1] for row in correct]
    return np.array([row.mean() if row.size else np.nan for row in rows], dtype=np.float64)


def extraction_strength(correct: RowArrays, *, compat: bool = False) -> Array:
    """Return 1 - k/n' per row, [n]: k is the shortest prefix of a' after which all of a' is predicted right.

    (Carlini et al. 2021.) A row without text gives 0.

    Args:
        correct: per row, whether argmax equals the label, over a (the end token last; it is not counted).
        compat: k never exceeds n' - 1, so a row whose last token is wrong scores 1/n' instead of 0.
    """
    strengths = []
    for row in correct:
        right = np.asarray(row, dtype=bool)[:-1]
        n = right.size
        wrong = np.flatnonzero(~right)
        k = int(wrong[-1]) + 1 if wrong.size else 0
        if compat:
            k = min(k, n - 1)
        strengths.append(1 - k / n if n else 0.0)
    return np.array(strengths, dtype=np.float64)
