"""Token entropies: whether they fall into two kinds, and whether they stay there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from alter.metrics.arrays import floats

if TYPE_CHECKING:
    import numpy.typing as npt


def bimodality_coefficient(values: npt.ArrayLike) -> float:
    """Return Sarle's bimodality coefficient (g^2 + 1) / (k + 3 (n-1)^2 / ((n-2)(n-3))), between 0 and 1.

    g is the skewness and k the excess kurtosis, both corrected for the sample size. A uniform distribution has 5/9, a
    normal one 1/3, two equal points 1. Above 5/9 is usually called bimodal, but a strongly skewed distribution with one
    mode gets there as well: read it with `two_normals`.

    Raises:
        ValueError: fewer than 4 values, or all equal.
    """
    from scipy import stats

    x = floats(values)
    if x.size < 4 or np.ptp(x) == 0:
        raise ValueError("bimodality: needs at least four values that are not all equal")
    n = x.size
    skewness, kurtosis = stats.skew(x, bias=False), stats.kurtosis(x, bias=False)
    return float((skewness**2 + 1) / (kurtosis + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3))))


@dataclass(frozen=True)
class TwoNormals:
    """A mixture of two normal distributions fitted to values, the lower one first.

    Attributes:
        weights, means, deviations: of the two.
        bic_gain: (BIC of one normal - BIC of the two) / n; above 0 the second one improves the fit by more than its parameters cost.
        ashman: Ashman's D = sqrt(2) |m1 - m2| / sqrt(s1^2 + s2^2); above 2 the two are cleanly apart.
        valley: where the mixture's density is lowest between its two modes; None if it has one mode.
        depth: how far it falls there below the lower mode, between 0 (one mode) and 1 (to nothing).
    """

    weights: tuple[float, float]
    means: tuple[float, float]
    deviations: tuple[float, float]
    bic_gain: float
    ashman: float
    valley: float | None
    depth: float


def two_normals(values: npt.ArrayLike, *, seed: int = 0) -> TwoNormals:
    """Fit two normal distributions by expectation maximisation and say whether they describe the values better than one.

    BIC = p ln n - 2 ln L, with p = 2 parameters for one normal and 5 for two. No deviation gets below a hundredth of
    the values' own, so that a pile of equal values is no infinitely good fit. Neither gain nor D proves two modes: a
    skewed distribution is better described by two normals too; `valley` says whether there is a dip between them.

    Args:
        values: [n].
        seed: of the k-means that starts the fit.

    Raises:
        ValueError: fewer than 4 values, or all equal.
    """
    from scipy import stats
    from sklearn.mixture import GaussianMixture

    x = floats(values)
    if x.size < 4 or np.ptp(x) == 0:
        raise ValueError("two normals: needs at least four values that are not all equal")
    floor = 1e-4 * float(x.var())
    column = x[:, None]
    one, two = (
        GaussianMixture(k, reg_covar=floor, random_state=seed, max_iter=1000, tol=1e-5).fit(column) for k in (1, 2)
    )
    order = np.argsort(two.means_[:, 0])
    weights, means = two.weights_[order], two.means_[order, 0]
    deviations = np.sqrt(two.covariances_[order, 0, 0])
    grid = np.linspace(means[0], means[1], 4001)
    density = sum(w * stats.norm.pdf(grid, m, s) for w, m, s in zip(weights, means, deviations, strict=True))
    # two modes of such a mixture lie between its means: a dip inside is lower than what is on either side of it
    lowest = int(np.argmin(density))
    left, right = density[: lowest + 1].max(), density[lowest:].max()
    depth = 1 - float(density[lowest] / min(left, right))
    return TwoNormals(
        (float(weights[0]), float(weights[1])),
        (float(means[0]), float(means[1])),
        (float(deviations[0]), float(deviations[1])),
        float((one.bic(column) - two.bic(column)) / x.size),
        float(np.sqrt(2) * abs(means[1] - means[0]) / np.sqrt((deviations**2).sum())),
        float(grid[lowest]) if depth > 1e-9 else None,
        depth if depth > 1e-9 else 0.0,
    )


@dataclass(frozen=True)
class Stability:
    """Shares of tokens that stay on their side of a threshold; see `stability`. NaN where there is nothing to take a share of."""

    high_stay: float
    low_stay: float
    agreement: float
    kappa: float
    correlation: float
    n_high: int
    n_low: int


def stability(before: npt.ArrayLike, after: npt.ArrayLike, threshold: float) -> Stability:
    """Compare the entropies of the same tokens before and after adaptation, [n] each (ALTER, section on token entropy).

    `high_stay` is the share of tokens above the threshold before that are above it after (in the paper over 87 %),
    `low_stay` that of the others (over 92 %), `agreement` the share of all tokens that keep their side. Most tokens are
    low, so most stay low by chance: Cohen's `kappa` is the agreement beyond what the two shares of high tokens give by
    themselves. `correlation` is Pearson's.

    Raises:
        ValueError: no tokens, or unequal numbers of them.
    """
    x, y = floats(before), floats(after)
    if x.size == 0 or x.shape != y.shape:
        raise ValueError(f"stability: {x.size} entropies before and {y.size} after; expected the same number, above 0")
    high, still = x > threshold, y > threshold
    agreement = float((high == still).mean())
    chance = float(high.mean() * still.mean() + (1 - high.mean()) * (1 - still.mean()))
    varied = np.ptp(x) > 0 and np.ptp(y) > 0
    return Stability(
        float(still[high].mean()) if high.any() else np.nan,
        float((~still[~high]).mean()) if not high.all() else np.nan,
        agreement,
        (agreement - chance) / (1 - chance) if chance < 1 else np.nan,
        float(np.corrcoef(x, y)[0, 1]) if varied else np.nan,
        int(high.sum()),
        int((~high).sum()),
    )
