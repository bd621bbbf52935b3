"""The figures of a meta-evaluation: how faithful, how robust, and how well a metric predicts a leak.

All values are in the direction of knowledge (`toward_knowledge`): higher says that the model knows more. Faithfulness is
that of OpenUnlearning (Dorna et al. 2025, arXiv:2506.12618, section 4). The two robustness figures are the symmetric ones
of the unlearning depth score's authors (Lee et al. 2026, arXiv:2605.24614), for which a metric that falls under an attack
is as suspect as one that rises; OpenUnlearning's own count rises only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from alter import metrics
from alter.core import Array

SMALL = 1e-6
"""Added to denominators: a metric that does not move at all is robust."""

DIRECTION: dict[str, Callable[[float], float]] = {
    "up": lambda value: value,
    "down": lambda value: 1 - value,
    "signed": lambda value: -value / 100,
}
"""How a figure is turned so that more says more knowledge: as it is; 1 minus it; PrivLeak's percents, 0 as retrained."""


def direction(name: str) -> str:
    """Return which of `DIRECTION` turns a figure so that higher says more knowledge.

    A metric for which higher is better is turned round; one without a better direction (membership attacks) says more
    where it is higher. CKA says more the nearer it is to the original, or the farther from the retrained model.

    Args:
        name: a metric's name, or NAME, DETAIL as `alter.metaevaluation.measuring` calls it.
    """
    metric, _, detail = name.partition(", ")
    if metric == "privleak":
        return "signed"
    if metric == "attack_cka":
        return "down" if detail == "retrained" else "up"
    return "down" if metrics.catalogue.metric_named(metric).higher_is_better else "up"


def toward_knowledge(name: str, value: float) -> float:
    """Return a figure turned so that higher says more knowledge (`direction`)."""
    return DIRECTION[direction(name)](value)


def faithfulness(knows: npt.ArrayLike, without: npt.ArrayLike) -> float:
    """Return the share of pairs of models in which the one that knows scores above the one that does not, ties half.

    Raises:
        ValueError: either pool is empty or holds NaN.
    """
    return metrics.membership.auc(without, knows)


def faithfulness_interval(knows: Sequence[float], without: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of `faithfulness` over models (`metrics.samples.auc_interval`), wide for few models even if separated."""
    return metrics.samples.auc_interval(faithfulness(knows, without), len(without), len(knows))


def relearning_robustness(
    before: Sequence[float], after: Sequence[float], retrained_before: float, retrained_after: float
) -> float:
    """Return R, the mean over models of 1 - |d - d0| / (|d| + |d0|), d and d0 how far the metric moves by relearning.

    d is that of an unlearned model and d0 that of the retrained one, trained alike. 1: the unlearned models learn the rows
    no faster than one that never saw them, as the metric has it, so nothing was there that it had not seen.

    Raises:
        ValueError: no model, or lists of different lengths.
    """
    d0 = retrained_after - retrained_before
    shifts = [b - a for a, b in zip(before, after, strict=True)]
    return _mean([1 - abs(d - d0) / (abs(d) + abs(d0) + SMALL) for d in shifts])


def quantisation_robustness(before: Sequence[float], after: Sequence[float]) -> float:
    """Return Q, the mean over models of 1 - |b - a| / (|a| + |b|), a the metric before and b after 4-bit quantisation.

    Raises:
        ValueError: no model, or lists of different lengths.
    """
    return _mean([1 - abs(b - a) / (abs(a) + abs(b) + SMALL) for a, b in zip(before, after, strict=True)])


def harmonic(first: float, second: float) -> float:
    """Return the harmonic mean of two figures that are not negative: 0 if either is."""
    return 2 * first * second / (first + second) if first + second else 0.0


def rank_correlation(values: Sequence[float], leaks: Sequence[float]) -> float:
    """Return Spearman's correlation of a metric before an attack with the leak after it, over models; NaN for a constant.

    Raises:
        ValueError: lists of different lengths.
    """
    if len(values) != len(leaks):
        raise ValueError(f"rank_correlation: {len(values)} values but {len(leaks)} leaks")
    if len(set(values)) < 2 or len(set(leaks)) < 2:
        return math.nan
    from scipy import stats

    return float(stats.spearmanr(values, leaks).statistic)


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("there is no model to average over")
    found: Array = np.array(values, dtype=np.float64)
    return float(found.mean())
