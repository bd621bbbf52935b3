"""Many samples of a reply, and what chance does to a mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from alter.metrics.arrays import Array, floats

if TYPE_CHECKING:
    import numpy.typing as npt


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
    return 1 - np.prod(np.maximum(n - c[:, None] - j, 0) / (n - j), axis=1)


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
        (x,), np.mean, n_resamples=draws, method="percentile", random_state=np.random.default_rng(seed)
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
