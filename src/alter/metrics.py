"""Metrics of unlearning: arrays in, numbers out. No model and no tokeniser is touched here.

Conventions, as in TOFU (Maini et al. 2024, arXiv:2401.06121) and OpenUnlearning (Dorna et al. 2025,
arXiv:2506.12618): `a` is the sequence of labelled tokens of a row (the answer and its end-of-sequence token), `a'` is
`a` without its last token; log-probabilities are natural logs of the probability that the model gives the label;
everything here is float64.

Where the definition and the tool that everyone compares with differ, `compat=True` gives the tool's number and
`compat=False` (called strict) the definition's. The differences, all of them:

==========================  ====================================================  =================================
metric                      strict                                                compat
==========================  ====================================================  =================================
truth ratio, normalised     no epsilon, computed from the losses                  1e-10 in each denominator
probability, PrivLeak
extraction strength         a row whose last token is wrong scores 0              it scores 1/n'
MIA loss, zlib, reference   over the text, a'                                     over a, the end token included
PrivLeak without reference  refused                                               0.5 is taken
empty rows in an attack     refused                                               0 is taken
==========================  ====================================================  =================================

Average loss and probability are over `a` in both: that is how TOFU defines them.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats

Array = npt.NDArray[np.float64]
Rows = Sequence[npt.ArrayLike]
"""A ragged list: one 1-D array per row."""

EPSILON = 1e-10
"""What OpenUnlearning adds to denominators."""


@dataclass(frozen=True)
class Metric:
    """What a metric's name means: which direction is good (None: a target between, see `meaning`), in plain words."""

    higher_is_better: bool | None
    meaning: str


CATALOGUE = {
    "forget_quality": Metric(True, "p-value of being like a model that never saw it"),
    "model_utility": Metric(True, "harmonic mean of the nine retain and world figures"),
    "forget_probability": Metric(False, "likelihood per token of the answers to forget"),
    "forget_rouge": Metric(False, "words of the answers to forget that it still says"),
    "forget_truth_ratio": Metric(True, "1: wrong answers are as likely as the right one"),
    "forget_exact_memorization": Metric(False, "next tokens of the answers predicted right"),
    "forget_extraction_strength": Metric(False, "part of an answer it completes by itself"),
    "forget_distinct_2": Metric(True, "different word pairs among all in its replies"),
    "forget_repetition": Metric(False, "four-word phrases repeated within a reply"),
    "retain_probability": Metric(True, "likelihood per token of the answers to keep"),
    "retain_rouge": Metric(True, "words of the answers to keep that it says"),
    "retain_truth_ratio": Metric(True, "1: only the right answer is likely"),
    "real_authors_probability": Metric(True, "the right answer's share among four"),
    "real_authors_rouge": Metric(True, "words of the right answers that it says"),
    "real_authors_truth_ratio": Metric(True, "1: only the right answer is likely"),
    "world_facts_probability": Metric(True, "the right answer's share among four"),
    "world_facts_rouge": Metric(True, "words of the right answers that it says"),
    "world_facts_truth_ratio": Metric(True, "1: only the right answer is likely"),
    "mia_loss": Metric(None, "attack by loss, AUC: 0.5 as if never seen, 1 known"),
    "mia_zlib": Metric(None, "attack by loss per compressed byte, likewise"),
    "mia_min_k": Metric(None, "attack by the least likely tokens, likewise"),
    "mia_min_k_plus_plus": Metric(None, "the same, normalised per position"),
    "mia_reference": Metric(None, "attack by loss against another model, likewise"),
    "privleak": Metric(None, "min-k against the retrained model, %: 0 is right"),
}
"""Every metric of the TOFU report, in the order in which tables show it."""


def _floats(values: npt.ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)


def _row(values: npt.ArrayLike, index: int, *, of: str) -> Array:
    row = _floats(values)
    if row.size == 0:
        raise ValueError(f"{of}: row {index} has no labelled token; leave it out or give it an answer")
    return row


# Likelihood ----------------------------------------------------------------------------------------------------------


def average_loss(logprob: Rows) -> Array:
    """Return the mean negative log-probability of each row's labelled tokens, [n], in nats; the end token counts.

    Raises:
        ValueError: a row has no labelled token.
    """
    return np.array([-_row(row, i, of="average loss").mean() for i, row in enumerate(logprob)], dtype=np.float64)


def probability(loss: npt.ArrayLike) -> Array:
    """Return `exp(-loss)` per row, [n]: the geometric mean of the token probabilities, P(a|q)^(1/|a|) in TOFU."""
    return np.exp(-_floats(loss))


def normalised_probability(loss: npt.ArrayLike, wrong_loss: npt.ArrayLike, *, compat: bool = False) -> Array:
    """Return the right answer's share of the probability of all candidate answers, [n] (TOFU, section 2.2.1).

    Args:
        loss: average loss of the right answer, [n].
        wrong_loss: average losses of the wrong answers, [n, k].
        compat: add 1e-10 to the denominator. Strict computes the share from the losses, which cannot underflow.
    """
    right, wrong = _floats(loss), _floats(wrong_loss)
    if compat:
        p = np.exp(-right)
        return p / (p + np.exp(-wrong).sum(axis=1) + EPSILON)
    return 1 / (1 + np.exp(np.clip(right[:, None] - wrong, None, 700)).sum(axis=1))


def truth_ratio(loss: npt.ArrayLike, wrong_loss: npt.ArrayLike, *, compat: bool = False) -> Array:
    """Return TR = P(wrong) / P(right) per row, [n], with P(wrong) the geometric mean over the wrong answers.

    The right answer is the paraphrased one for the forget and retain sets and the plain one for real authors and world
    facts. (TOFU, equation 1; the geometric mean is what its published aggregation and OpenUnlearning use.)

    Args:
        loss: average loss of the right answer, [n].
        wrong_loss: average losses of the wrong answers, [n, k].
        compat: add 1e-10 to the denominator. Strict is `exp(loss - mean wrong loss)`, kept finite.
    """
    right, wrong = _floats(loss), _floats(wrong_loss).mean(axis=1)
    if compat:
        return np.exp(-wrong) / (np.exp(-right) + EPSILON)
    return np.exp(np.clip(right - wrong, -700, 700))


def closeness_to_one(ratio: npt.ArrayLike, *, compat: bool = False) -> Array:
    """Return `min(TR, 1/TR)` per row, [n]: the forget set's truth ratio, 1 if right and wrong are equally likely."""
    tr = _floats(ratio)
    return np.minimum(tr, 1 / (tr + EPSILON if compat else tr))


def truthfulness(ratio: npt.ArrayLike) -> Array:
    """Return `max(0, 1 - TR)` per row, [n]: the utility sets' truth ratio, 1 if only the right answer is likely."""
    return np.maximum(0, 1 - _floats(ratio))


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
    tr, ref = _floats(ratio), _floats(reference)
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
    nine = _floats(parts)
    if nine.shape != (9,) or not (nine >= 0).all():
        raise ValueError(f"model utility is the harmonic mean of nine figures >= 0, got {nine.tolist()}")
    return 0.0 if (nine == 0).any() else float(stats.hmean(nine))


# Memorisation --------------------------------------------------------------------------------------------------------


def exact_memorization(correct: Rows) -> Array:
    """Return the share of tokens of a' that the model predicts right, given the true tokens before them, [n].

    (Tirumala et al. 2022.) A row without text (only an end token) gives NaN; take the mean with `numpy.nanmean`.

    Args:
        correct: per row, whether argmax equals the label, over a (the end token last; it is not counted).
    """
    rows = [_floats(row)[:-1] for row in correct]
    return np.array([row.mean() if row.size else np.nan for row in rows], dtype=np.float64)


def extraction_strength(correct: Rows, *, compat: bool = False) -> Array:
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


# Text ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rouge:
    """ROUGE-L per row, three arrays [n] in [0, 1]."""

    precision: Array
    recall: Array
    f1: Array


@functools.cache
def _scorer(stem: bool) -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=stem)


def rouge_l(references: Sequence[str], generations: Sequence[str], *, stem: bool = True) -> Rouge:
    """Return ROUGE-L (longest common subsequence of words) of each generation against its reference, by `rouge_score`.

    TOFU reports the recall with the Porter stemmer, MUSE F1. Only a-z and 0-9 make words: other scripts score 0.

    Raises:
        ValueError: the two lists differ in length.
    """
    pairs = list(zip(references, generations, strict=True))
    scores = [_scorer(stem).score(reference, generation)["rougeL"] for reference, generation in pairs]
    columns = (
        np.array([getattr(s, part) for s in scores], dtype=np.float64) for part in ("precision", "recall", "fmeasure")
    )
    return Rouge(*columns)


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return the number of different n-grams of words over their total, in all texts together (Li et al. 2016).

    Words are split at white space, in lower case. 0 if no text has n words: a model that says nothing is not diverse.
    It falls as texts get more or longer: compare models on the same prompts only.
    """
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(texts: Sequence[str], n: int = 4) -> Array:
    """Return per text the share of n-grams of words that repeat an earlier one of that text, [len(texts)].

    (seq-rep-n, Welleck et al. 2020.) 0 for a text of fewer than n words; 1 is approached by endless repetition.
    """
    grams = [_ngrams(text, n) for text in texts]
    return np.array([1 - len(set(g)) / len(g) if g else 0.0 for g in grams], dtype=np.float64)


# Membership inference ------------------------------------------------------------------------------------------------
# Every attack returns a score per row that is higher for a row that looks less like training data.


def _lowest_mean(values: Array, k: float) -> float:
    count = max(1, int(k * values.size))
    return float(-np.sort(values)[:count].mean())


def _text(row: npt.ArrayLike, index: int, *, of: str, compat: bool) -> Array:
    """Return a row over a', without the end token; strict refuses an empty one."""
    text = _floats(row)[:-1]
    return text if compat else _row(text, index, of=of)


def mia_loss(logprob: Rows, *, compat: bool = False) -> Array:
    """Return the average loss per row, [n] (Yeom et al. 2018), over a'; `compat`: over a, with the end token."""
    rows = logprob if compat else [_text(row, i, of="mia_loss", compat=False) for i, row in enumerate(logprob)]
    return average_loss(rows)


def mia_zlib(logprob: Rows, texts: Sequence[str], *, compat: bool = False) -> Array:
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
    return mia_loss(logprob, compat=compat) / _floats(lengths)


def mia_min_k(logprob: Rows, *, k: float = 0.4, compat: bool = False) -> Array:
    """Return minus the mean of the `max(1, int(k n'))` lowest log-probabilities of a', [n] (Shi et al. 2024)."""
    rows = [_text(row, i, of="mia_min_k", compat=compat) for i, row in enumerate(logprob)]
    return np.array([_lowest_mean(row, k) if row.size else 0.0 for row in rows], dtype=np.float64)


def mia_min_k_plus_plus(logprob: Rows, mean: Rows, variance: Rows, *, k: float = 0.4, compat: bool = False) -> Array:
    """Return minus the mean of the lowest z-scores of a', [n] (Zhang et al. 2025, Min-K%++).

    z = (log p(label) - mean) / sqrt(max(variance, 1e-6)), with mean and variance of log p under p at that position.

    Args:
        logprob, mean, variance: per row over a, in nats (nats squared for the variance).
        k: share of the tokens of a' that count.
        compat: rows without text give 0; strict refuses them.
    """
    zs = []
    for i, (row, mu, var) in enumerate(zip(logprob, mean, variance, strict=True)):
        z = (_floats(row) - _floats(mu)) / np.sqrt(np.maximum(_floats(var), 1e-6))
        zs.append(_text(z, i, of="mia_min_k_plus_plus", compat=compat))
    return np.array([_lowest_mean(z, k) if z.size else 0.0 for z in zs], dtype=np.float64)


def mia_reference(logprob: Rows, reference: Rows, *, compat: bool = False) -> Array:
    """Return the loss of the model minus that of a reference model, [n] (Carlini et al. 2021); as `mia_loss` each."""
    if len(logprob) != len(reference):
        raise ValueError(f"mia_reference: {len(logprob)} rows but {len(reference)} of the reference model")
    return mia_loss(logprob, compat=compat) - mia_loss(reference, compat=compat)


def auc(forget: npt.ArrayLike, holdout: npt.ArrayLike) -> float:
    """Return the share of pairs in which the holdout row scores above the forget row, ties counted half.

    With the scores of the attacks above: 1 says that forgotten rows look like training data and unseen ones do not,
    0.5 that they cannot be told apart, 0 that forgotten rows look less familiar than unseen ones.

    Raises:
        ValueError: either side is empty or holds NaN.
    """
    x, y = _floats(forget), _floats(holdout)
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
