"""What attacks recover, and how similar two models' hidden states are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from alter.core import Array
from alter.metrics.arrays import floats

if TYPE_CHECKING:
    import numpy.typing as npt

MINIMUM_GAP = 0.05
"""A share of what was forgotten is refused where original and retrained model differ by less: it would be noise."""


def recovered_fraction(attacked: float, attacked_retrained: float, original: float, retrained: float) -> float:
    """Return the share of the forgotten that an attack brings back: (attacked - attacked_retrained) / (original - retrained).

    0: the unlearned model says no more under the attack than a model that never knew, under the same attack; 1: the
    attack closes the whole gap between original and retrained. Below 0: the unlearned model says less than that, above
    1: more than the original. Not clipped.

    Args:
        attacked, attacked_retrained: figure of the unlearned and of the retrained model under the attack.
        original, retrained: figure of the original and of the retrained model without it.

    Raises:
        ValueError: a figure is not finite, or original - retrained is below `MINIMUM_GAP`.
    """
    if not np.isfinite([attacked, attacked_retrained, original, retrained]).all():
        raise ValueError("recovered fraction: a figure is not finite")
    gap = original - retrained
    if gap < MINIMUM_GAP:
        raise ValueError(
            f"the original ({original:.3f}) is above the retrained model ({retrained:.3f}) by less than {MINIMUM_GAP}: "
            "there is no forgotten knowledge to take a share of"
        )
    return (attacked - attacked_retrained) / gap


def recovered_interval(
    attacked: npt.ArrayLike, attacked_retrained: npt.ArrayLike, gap: float, *, seed: int = 0, draws: int = 2000
) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of the recovered fraction over rows (Efron 1979).

    Rows are drawn with replacement, the same ones of both models; the gap stays as it is. None for a single row, or where all
    rows differ alike: no draw then differs from another, which is no certainty (as in `samples.bootstrap_interval`).

    Args:
        attacked, attacked_retrained: per row, [n].
        gap: original - retrained.

    Raises:
        ValueError: no rows, or the two differ in length.
    """
    difference = floats(attacked) - floats(attacked_retrained)
    if difference.ndim != 1 or not difference.size or floats(attacked).shape != floats(attacked_retrained).shape:
        raise ValueError("recovered interval: expected two rows of figures of equal length, at least one each")
    if difference.size < 2 or np.ptp(difference) == 0:
        return None
    rows = np.random.default_rng(seed).integers(0, difference.size, (draws, difference.size))
    low, high = np.percentile(difference[rows].mean(axis=1) / gap, [2.5, 97.5])
    return float(low), float(high)


def linear_cka(x: npt.ArrayLike, y: npt.ArrayLike, *, debiased: bool = True) -> float:
    """Return the centred kernel alignment of two representations of the same rows (Kornblith et al. 2019).

    Plain: ||Y'X||^2 / (||X'X|| ||Y'Y||) of centred columns, Frobenius norms; close to 1 for any two representations if
    there are fewer rows than columns. Debiased: the same ratio of unbiased estimates of HSIC (Song et al. 2012; Nguyen
    et al. 2021), which is about 0 for unrelated ones whatever n, and may be slightly negative.

    Args:
        x, y: [n, p] and [n, q].

    Raises:
        ValueError: n differs or is too small (below 4 debiased, 2 plain), or a representation does not vary.
    """
    a, b = floats(x), floats(y)
    least = 4 if debiased else 2
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < least:
        raise ValueError(f"CKA needs two matrices of the same {least} or more rows, got {a.shape} and {b.shape}")
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    k, l = a @ a.T, b @ b.T
    if debiased:
        n = len(a)
        np.fill_diagonal(k, 0)
        np.fill_diagonal(l, 0)

        def hsic(p: Array, q: Array) -> float:
            cross = float(p.sum(axis=0) @ q.sum(axis=0))
            totals = float(p.sum() * q.sum())
            return (float((p * q).sum()) + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3))
    else:

        def hsic(p: Array, q: Array) -> float:
            return float((p * q).sum())

    scale = hsic(k, k) * hsic(l, l)
    if hsic(k, k) <= 0 or scale <= 0:
        raise ValueError("CKA: a representation is the same for all rows")
    return hsic(k, l) / float(np.sqrt(scale))
