"""Figures over many sampled replies, and 95 % intervals over rows."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from alter.core import Array
from alter.metrics.arrays import floats

if TYPE_CHECKING:
    import numpy.typing as npt


Z = 1.959963984540054
"""Normal deviate that leaves 2.5 % on each side."""
FEW_GROUPS = 20
"""Groups, or rows, from which on drawing them with replacement holds the true mean about as often as it should."""
AT_ONCE = 2**22
"""Values that are drawn at a time: all draws of 100,000 rows together take 3 GB."""


def leak_at_k(hits: npt.ArrayLike, n: int, k: int) -> Array:
    """Return per question the chance that at least one of k sampled replies gives the answer, [questions].

    1 - C(n - c, k) / C(n, k), the unbiased estimate from c hits among n samples (Chen et al. 2021, arXiv:2107.03374, for
    pass@k): the share of all sets of k of the n samples that hold a hit.

    Args:
        hits: c of each question, whole numbers from 0 to n, [questions].
        n: samples of each question.
        k: from 1 to n.

    Raises:
        ValueError: k is not within 1 to n, or a count not within 0 to n.
    """
    c = np.asarray(hits)
    if not 1 <= k <= n:
        raise ValueError(f"leak@{k} takes at least {k} samples of each question, and k from 1; there are {n}")
    if c.size and (c.min() < 0 or c.max() > n or (c != c.astype(np.int64)).any()):
        raise ValueError(f"leak@{k}: hits are counts from 0 to {n}")
    # C(n - c, k) / C(n, k) = prod over j < k of (n - c - j) / (n - j), without large numbers
    j = np.arange(k)
    leak: Array = 1 - np.prod(np.maximum(n - c[:, None] - j, 0) / (n - j), axis=1)
    return leak


def share_interval(count: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share of `count` among `n`; [0, 1] for none."""
    if n == 0:
        return 0.0, 1.0
    middle, spread = (
        (count + Z * Z / 2) / (n + Z * Z),
        Z * math.sqrt(count * (n - count) / n + Z * Z / 4) / (n + Z * Z),
    )
    return max(0.0, middle - spread), min(1.0, middle + spread)


def row_interval(values: npt.ArrayLike) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean over rows: Wilson's if all values are 0 or 1, else `bootstrap_interval`; of fewer
    than `FEW_GROUPS` Student's, cut off at 0 and 1 if all values lie there.

    NaN is left out. None for fewer than two values, or if all are equal and neither 0 nor 1.
    """
    x = floats(values)
    x = x[~np.isnan(x)]
    if x.size and ((x == 0) | (x == 1)).all():
        return share_interval(int(x.sum()), x.size)
    if 1 < x.size < FEW_GROUPS and np.ptp(x) > 0:
        return _student(x, x, np.ones(x.size))
    return bootstrap_interval(x)


def bootstrap_interval(values: npt.ArrayLike, *, seed: int = 0, draws: int = 2000) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of the mean over rows (Efron 1979), by `scipy.stats.bootstrap`.

    NaN is left out. None for fewer than two values, or if all are equal: no draw then differs from another, which does
    not mean that the figure is known exactly (none among n rows may be up to 3 in n).
    """
    from scipy import stats

    x = floats(values)
    x = x[~np.isnan(x)]
    if x.size < 2 or np.ptp(x) == 0:
        return None
    found = stats.bootstrap(
        (x,),
        np.mean,
        n_resamples=draws,
        batch=max(1, AT_ONCE // x.size),
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def grouped_interval(
    values: npt.ArrayLike, groups: Sequence[Hashable], *, seed: int = 0, draws: int = 2000
) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean over rows that are not independent: replies to one prompt, say.

    A percentile bootstrap that draws whole groups; of fewer than `FEW_GROUPS`, of which draws hold too little (of 2 groups half as
    often as they should), Student's by the groups' sums, cut off at 0 and 1 if all values lie there. If all values are 0, or all 1,
    Wilson's of as many rows as there are groups. `row_interval` where each row is a group of its own. NaN is left out. None for
    fewer than two groups, or if no draw differs from another.

    Args:
        values: [n].
        groups: of each row, [n].
    """
    x = floats(values)
    known = ~np.isnan(x)
    places: dict[Hashable, int] = {}
    place = np.array([places.setdefault(group, len(places)) for group, ok in zip(groups, known, strict=True) if ok])
    x, count = x[known], len(places)
    if len(x) == count:
        return row_interval(x)
    if count and ((x == 0).all() or (x == 1).all()):
        return share_interval(count * int(x[0]), count)
    sums, sizes = floats(np.bincount(place, x)), floats(np.bincount(place))
    if 1 < count < FEW_GROUPS and np.ptp(sums / sizes) > 0:
        return _student(x, sums, sizes)
    chosen = np.random.default_rng(seed).integers(count, size=(draws, count))
    means = sums[chosen].sum(axis=1) / sizes[chosen].sum(axis=1)
    if count < 2 or np.ptp(means) == 0:
        return None
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _student(x: Array, sums: Array, sizes: Array) -> tuple[float, float]:
    """Return Student's 95 % interval of the mean of `x` [n] by the sums and sizes of its groups, [groups]."""
    from scipy import stats

    count, mean = len(sums), float(x.mean())
    spread = math.sqrt(count / (count - 1) * float(((sums - mean * sizes) ** 2).sum())) / len(x)
    ends = mean + spread * floats(stats.t.ppf([0.025, 0.975], count - 1))
    low, high = np.clip(ends, 0, 1) if x.min() >= 0 and x.max() <= 1 else ends
    return float(low), float(high)


def auc_interval(value: float, m: int, n: int) -> tuple[float, float]:
    """Return the 95 % score interval of an AUC between m and n rows (Newcombe 2006, Stat. Med. 25:559, method 5).

    All AUCs t for which |value - t| <= z sqrt(V(t)), V(t) = t (1 - t) / (m n) [1 + N ((1 - t) / (2 - t) + t / (1 + t))] and
    N = (m + n) / 2 - 1. Other than a bootstrap's it has a width where the two sides do not overlap at all.

    Raises:
        ValueError: the value is not within 0 and 1, or a side is empty.
    """
    if not 0 <= value <= 1 or m < 1 or n < 1:
        raise ValueError(f"auc_interval: an AUC between 0 and 1 of two sides of rows, got {value} of {m} and {n}")

    def beyond(t: float) -> bool:
        more = ((m + n) / 2 - 1) * ((1 - t) / (2 - t) + t / (1 + t))
        return (value - t) ** 2 > Z * Z * t * (1 - t) / (m * n) * (1 + more)

    def end(outer: float) -> float:
        if not beyond(outer):
            return outer
        inner = value
        for _ in range(60):
            middle = (outer + inner) / 2
            outer, inner = (middle, inner) if beyond(middle) else (outer, middle)
        return inner

    return end(0.0), end(1.0)


def utility_interval(
    sets: Sequence[npt.ArrayLike],
    groups: Sequence[Sequence[Hashable] | None] | None = None,
    *,
    seed: int = 0,
    draws: int = 1000,
) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval of model utility over the rows of its sets.

    Each draw takes as many rows of every set with replacement, the same ones for all figures of that set, and their harmonic
    mean. None if no draw differs from another.

    Args:
        sets: of each set its figures by row, [figures, rows].
        groups: of each set the groups of its rows, [rows], which are drawn whole; None: rows are.

    Raises:
        ValueError: a set has no rows.
    """
    draw = np.random.default_rng(seed)
    means = []
    for rows, own in zip(map(floats, sets), groups or [None] * len(sets), strict=True):
        if rows.ndim != 2 or not rows.shape[1]:
            raise ValueError("utility_interval: each set is a matrix of figures by rows, with one row at least")
        if own is not None:
            # a set as small as its groups: of each their sums and their sizes
            places: dict[Hashable, int] = {}
            place = np.array([places.setdefault(group, len(places)) for group in own])
            sizes = np.bincount(place)
            picked = draw.integers(len(sizes), size=(draws, len(sizes)))
            drawn = sizes[picked].sum(axis=1)
            means.append(np.stack([np.bincount(place, each)[picked].sum(axis=1) / drawn for each in rows]))
            continue
        chosen = draw.integers(rows.shape[1], size=(draws, rows.shape[1]))
        means.append(np.stack([each[chosen].mean(axis=1) for each in rows]))
    parts = np.concatenate(means)
    with np.errstate(divide="ignore"):
        found = len(parts) / (1 / parts).sum(axis=0)
    if np.ptp(found) == 0:
        return None
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
