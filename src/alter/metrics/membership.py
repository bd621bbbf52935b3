"""Membership inference: a score per row, higher for a row that looks less like training data, and what it tells apart."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from alter.core import Array
from alter.metrics.arrays import EPSILON, RowArrays, floats, labelled_row
from alter.metrics.likelihood import average_loss

if TYPE_CHECKING:
    import numpy.typing as npt


def _lowest_mean(values: Array, k: float) -> float:
    count = max(1, int(k * values.size))
    return float(-np.sort(values)[:count].mean())


def _text(row: npt.ArrayLike, index: int, *, of: str, compat: bool) -> Array:
    """Return a row over a', without the end token; strict refuses an empty one."""
    text = floats(row)[:-1]
    return text if compat else labelled_row(text, index, of=of)


def mia_loss(logprob: RowArrays, *, compat: bool = False) -> Array:
    """Return the average loss per row, [n] (Yeom et al. 2018), over a'; `compat`: over a, with the end token."""
    rows = logprob if compat else [_text(row, i, of="mia_loss", compat=False) for i, row in enumerate(logprob)]
    return average_loss(rows)


def mia_zlib(logprob: RowArrays, texts: Sequence[str], *, compat: bool = False) -> Array:
    """Return `mia_loss` over the bytes of the zlib-compressed text, [n] (Carlini et al. 2021).

    Args:
        logprob: per row over a.
        texts: the labelled text of each row, special tokens left out.
        compat: as in `mia_loss`.

    Raises:
        ValueError: the two lists differ in length.
    """
    lengths = [len(zlib.compress(text.encode())) for text in texts]
    if len(lengths) != len(logprob):
        raise ValueError(f"mia_zlib: {len(logprob)} rows of log-probabilities but {len(lengths)} texts")
    return mia_loss(logprob, compat=compat) / floats(lengths)


def mia_min_k(logprob: RowArrays, *, k: float = 0.4, compat: bool = False) -> Array:
    """Return minus the mean of the `max(1, int(k n'))` lowest log-probabilities of a', [n] (Shi et al. 2024)."""
    rows = [_text(row, i, of="mia_min_k", compat=compat) for i, row in enumerate(logprob)]
    return np.array([_lowest_mean(row, k) if row.size else 0.0 for row in rows], dtype=np.float64)


def min_k(logprob: RowArrays, *, k: float = 0.4) -> Array:
    """Return minus the mean of the `max(1, int(k n))` lowest log-probabilities of each row, all n of its tokens, [rows].

    Min-K% as MUSE takes it (Shi et al. 2024): of raw text, which has no end token to leave out (see `mia_min_k`).

    Raises:
        ValueError: a row has no token.
    """
    return np.array(
        [_lowest_mean(labelled_row(row, i, of="min_k"), k) for i, row in enumerate(logprob)], dtype=np.float64
    )


def mia_min_k_plus_plus(
    logprob: RowArrays, mean: RowArrays, variance: RowArrays, *, k: float = 0.4, compat: bool = False
) -> Array:
    """Return minus the mean of the lowest z-scores of a', [n] (Zhang et al. 2025, Min-K%++).

    z = (log p(label) - mean) / sqrt(max(variance, 1e-6)), with mean and variance of log p under p at that position.

    Args:
        logprob, mean, variance: per row over a, in nats (nats squared for the variance).
        k: share of the tokens of a' that count.
        compat: rows without text give 0; strict refuses them.
    """
    zs = []
    for i, (row, mu, var) in enumerate(zip(logprob, mean, variance, strict=True)):
        z = (floats(row) - floats(mu)) / np.sqrt(np.maximum(floats(var), 1e-6))
        zs.append(_text(z, i, of="mia_min_k_plus_plus", compat=compat))
    return np.array([_lowest_mean(z, k) if z.size else 0.0 for z in zs], dtype=np.float64)


def mia_reference(loss: npt.ArrayLike, reference: npt.ArrayLike) -> Array:
    """Return the loss of the model minus that of a reference model, [n] (Carlini et al. 2021); each from `mia_loss`.

    Raises:
        ValueError: the two differ in length.
    """
    own, other = floats(loss), floats(reference)
    if own.shape != other.shape:
        raise ValueError(f"mia_reference: {own.size} rows but {other.size} of the reference model")
    return own - other


def mia_gradnorm(norms: RowArrays) -> Array:
    """Return the mean over the parameter tensors of the norm of the loss's gradient by each, [n] (Wang et al. 2024).

    Not the norm of the whole gradient: OpenUnlearning defines it so, and a small tensor counts as much as a large one.
    Strict and compat are the same: the loss is over a' in both.

    Args:
        norms: per row one norm for each parameter tensor, as `alter.inference.gradient_norms` returns them.

    Raises:
        ValueError: a row has no norms.
    """
    return np.array([labelled_row(row, i, of="mia_gradnorm").mean() for i, row in enumerate(norms)], dtype=np.float64)


def auc(forget: npt.ArrayLike, holdout: npt.ArrayLike) -> float:
    """Return the share of pairs in which the holdout row scores above the forget row, ties counted half.

    With the scores of the attacks above: 1 says that forgotten rows look like training data and unseen ones do not,
    0.5 that they cannot be told apart, 0 that forgotten rows look less familiar than unseen ones.

    Raises:
        ValueError: either side is empty or holds NaN.
    """
    from scipy import stats

    x, y = floats(forget), floats(holdout)
    if x.size == 0 or y.size == 0 or np.isnan(x).any() or np.isnan(y).any():
        raise ValueError("auc: the scores of the forget or of the holdout rows are empty or hold NaN")
    ranks = stats.rankdata(np.concatenate([x, y]))
    wins = ranks[x.size :].sum() - y.size * (y.size + 1) / 2
    return float(wins / (x.size * y.size))


def relative_difference(value: float, reference: float, *, compat: bool = False) -> float:
    """Return (value - reference) / reference in percent; `compat` adds 1e-10 to the denominator.

    Raises:
        ValueError: strict and the reference is 0.
    """
    if reference == 0 and not compat:
        raise ValueError("relative difference to a reference of 0 is not defined")
    return (value - reference) / (reference + (EPSILON if compat else 0)) * 100


def privleak(value: float, reference: float | None, *, compat: bool = False) -> float:
    """Return the relative difference of 1 - AUC in percent (MUSE, arXiv:2407.06460): 0 is like the retrained model.

    Negative: the forgotten rows are still recognised as training data; positive: they are over-forgotten.

    Args:
        value: AUC of `mia_min_k` of the model.
        reference: the same of the retrained model. `compat` takes 0.5 for None.

    Raises:
        ValueError: strict without a reference, or with a reference of 1.
    """
    if reference is None:
        if not compat:
            raise ValueError("privleak needs the retrained model's AUC")
        reference = 0.5
    return relative_difference(1 - value, 1 - reference, compat=compat)
