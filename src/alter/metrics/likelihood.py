"""How likely answers are: loss, probability, truth ratios, and TOFU's two summary figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from alter.core import Array
from alter.metrics.arrays import EPSILON, RowArrays, floats, labelled_row

if TYPE_CHECKING:
    import numpy.typing as npt


def average_loss(logprob: RowArrays) -> Array:
    """Return the mean negative log-probability of each row's labelled tokens, [n], in nats; the end token counts.

    Raises:
        ValueError: a row has no labelled token.
    """
    return np.array(
        [-labelled_row(row, i, of="average loss").mean() for i, row in enumerate(logprob)], dtype=np.float64
    )


def probability(loss: npt.ArrayLike) -> Array:
    """Return `exp(-loss)` per row, [n]: the geometric mean of the token probabilities, P(a|q)^(1/|a|) in TOFU."""
    return np.exp(-floats(loss))


def normalised_probability(loss: npt.ArrayLike, wrong_loss: npt.ArrayLike, *, compat: bool = False) -> Array:
    """Return the right answer's share of the probability of all candidate answers, [n] (TOFU, section 2.2.1).

    Args:
        loss: average loss of the right answer, [n].
        wrong_loss: average losses of the wrong answers, [n, k].
        compat: add 1e-10 to the denominator. Strict computes the share from the losses, which cannot underflow.
    """
    right, wrong = floats(loss), floats(wrong_loss)
    if compat:
        p = np.exp(-right)
        share: Array = p / (p + np.exp(-wrong).sum(axis=1) + EPSILON)
    else:
        share = 1 / (1 + np.exp(np.clip(right[:, None] - wrong, None, 700)).sum(axis=1))
    return share


def truth_ratio(loss: npt.ArrayLike, wrong_loss: npt.ArrayLike, *, compat: bool = False) -> Array:
    """Return TR = P(wrong) / P(right) per row, [n], with P(wrong) the geometric mean over the wrong answers.

    The right answer is the paraphrased one for the forget and retain sets and the plain one for real authors and world
    facts. (TOFU, equation 1; the geometric mean is what its published aggregation and OpenUnlearning use.)

    Args:
        loss: average loss of the right answer, [n].
        wrong_loss: average losses of the wrong answers, [n, k].
        compat: add 1e-10 to the denominator. Strict is `exp(loss - mean wrong loss)`, kept finite.
    """
    right, wrong = floats(loss), floats(wrong_loss).mean(axis=1)
    if compat:
        ratio: Array = np.exp(-wrong) / (np.exp(-right) + EPSILON)
    else:
        ratio = np.exp(np.clip(right - wrong, -700, 700))
    return ratio


def closeness_to_one(ratio: npt.ArrayLike, *, compat: bool = False) -> Array:
    """Return `min(TR, 1/TR)` per row, [n]: the forget set's truth ratio, 1 if right and wrong are equally likely."""
    tr = floats(ratio)
    return np.minimum(tr, 1 / (tr + EPSILON if compat else tr))


def truthfulness(ratio: npt.ArrayLike) -> Array:
    """Return `max(0, 1 - TR)` per row, [n]: the utility sets' truth ratio, 1 if only the right answer is likely."""
    return np.maximum(0, 1 - floats(ratio))


@dataclass(frozen=True)
class ForgetQuality:
    """Result of the Kolmogorov-Smirnov test: `pvalue`, its base-10 logarithm, and the `statistic` in [0, 1]."""

    pvalue: float
    log10: float
    statistic: float


def forget_quality(ratio: npt.ArrayLike, reference: npt.ArrayLike) -> ForgetQuality:
    """Return the two-sample KS test between the raw truth ratios of a model, [n], and of the retrained one, [m].

    The p-value is TOFU's forget quality. It is coarse for few rows: with forget01's 40, one row moves the statistic by
    0.025. Read the statistic with it: the p-value of one and the same gap falls as n grows.

    Raises:
        ValueError: either side is empty or holds NaN.
    """
    from scipy import stats

    tr, ref = floats(ratio), floats(reference)
    for name, values in (("the model", tr), ("the reference", ref)):
        if values.size == 0 or np.isnan(values).any():
            raise ValueError(f"forget quality: the truth ratios of {name} are empty or hold NaN")
    test = stats.ks_2samp(tr, ref)
    pvalue = float(test.pvalue)
    return ForgetQuality(pvalue, float(np.log10(pvalue)) if pvalue > 0 else -np.inf, float(test.statistic))


def model_utility(parts: npt.ArrayLike) -> float:
    """Return the harmonic mean of the nine utility figures; 0 if any of them is 0.

    The nine are probability, ROUGE-L recall and truth ratio of the retain set, of real authors and of world facts.

    Raises:
        ValueError: there are not nine, or one is negative or NaN.
    """
    from scipy import stats

    nine = floats(parts)
    if nine.shape != (9,) or not (nine >= 0).all():
        raise ValueError(f"model utility is the harmonic mean of nine figures >= 0, got {nine.tolist()}")
    return 0.0 if (nine == 0).any() else float(stats.hmean(nine))


def perplexity(logprob: RowArrays) -> float:
    """Return exp of the mean negative log-probability of all tokens of all rows together; empty rows add nothing.

    Raises:
        ValueError: there is no token in any row.
    """
    tokens = np.concatenate([floats(row) for row in logprob]) if len(logprob) else np.empty(0)
    if tokens.size == 0:
        raise ValueError("perplexity: no row has a token")
    with np.errstate(over="ignore"):
        return float(np.exp(-tokens.mean()))
