"""Completeness of forgetting, row by row, between a model that knows the rows and models that never saw them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from alter.core import Array
from alter.metrics.arrays import floats

if TYPE_CHECKING:
    import numpy.typing as npt

POINTS = 1000
"""Interpolated models between the two ends."""


def _signal(probability: Array) -> Array:
    """Compute IAM's signal, which rises with the probability in (0, 1]: -log(0.1 - log(1e-5 + p))."""
    signal: Array = -np.log(0.1 - np.log(np.minimum(1e-5 + probability, 1.0)))
    return signal


def unlearning_completeness(
    probability: npt.ArrayLike, original: npt.ArrayLike, shadows: npt.ArrayLike, *, points: int = POINTS
) -> Array:
    """Return the completeness of forgetting of each row, [n]: 1 as a model that never saw it, towards 0 as the original.

    IAM (interpolated approximate measurement, Wang et al. 2025): 1 - sum_a a F_a(s) / sum_a a over a in [0, 1], where s is
    the row's signal under the model, and F_a the Gumbel distribution of the signals of a model between: (1 - a) times
    those of models that never saw the row plus a times that of the original. Its place and width are by moments:
    width = sqrt(6) sd / pi, place = mean - 0.5772 width. With one such model, the standard deviation is that over all rows, and
    the mean the row's own; with several, both are over the models, row by row. Two readings: `probability` is exp(-nll), as
    the 1 - exp(-nll) of the authors' code for language models turns the order round; and the spread over rows, as a moment
    over a single model does not exist.

    Args:
        probability: of the true answers, per token, under the model, [n].
        original: the same under the model before forgetting, [n].
        shadows: the same under one or more models that never saw the rows, [n] or [models, n].
        points: models between.

    Raises:
        ValueError: the shapes do not fit, fewer than two rows with one shadow model, or a width of zero.
    """
    own, known = floats(probability), floats(original)
    out = np.atleast_2d(np.asarray(shadows, dtype=np.float64))
    if own.shape != known.shape or out.shape[1:] != own.shape:
        raise ValueError(f"IAM: {own.shape} rows, {known.shape} of the original and {out.shape} of shadow models")
    alpha = np.linspace(0, 1, points)[:, None, None]
    # [points, models, n]
    between = (1 - alpha) * _signal(out) + alpha * _signal(known)
    mean = between.mean(axis=1)
    spread = between.std(axis=1) if len(out) > 1 else np.broadcast_to(between[:, 0].std(axis=1)[:, None], mean.shape)
    # at alpha = 1 all models agree: there the width is that of the signals over rows
    floor = between.mean(axis=1).std(axis=1)[:, None] * 1e-3
    width = np.sqrt(6) * np.maximum(spread, floor) / np.pi
    if not (width > 0).all():
        raise ValueError("IAM: the signals of the models between have no spread (a single row, or all rows alike)")
    z = (_signal(own) - (mean - np.euler_gamma * width)) / width
    weight = alpha[:, 0]
    found: Array = 1 - (weight * np.exp(-np.exp(-np.clip(z, -700, None)))).sum(axis=0) / weight.sum()
    return found
