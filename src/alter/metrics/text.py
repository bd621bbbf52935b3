"""Generated text against its reference: shared words and phrases, and their variety."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from alter.core import Array, words
from alter.metrics.arrays import floats

if TYPE_CHECKING:
    import numpy.typing as npt
    from rouge_score.rouge_scorer import RougeScorer


@dataclass(frozen=True)
class Rouge:
    """ROUGE-L per row, three arrays [n] in [0, 1]."""

    precision: Array
    recall: Array
    f1: Array


@dataclass(frozen=True)
class _Tokenizer:
    """A tokenizer for `rouge_score`."""

    stem: bool

    def tokenize(self, text: str) -> list[str]:
        return words.rouge_words(text, stem=self.stem)


@functools.cache
def _scorer(stem: bool) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Tokenizer(stem))


def rouge_l(references: Sequence[str], generations: Sequence[str], *, stem: bool = True) -> Rouge:
    """Return ROUGE-L (longest common subsequence of words) of each generation against its reference, by `rouge_score`.

    TOFU reports the recall with the Porter stemmer, MUSE F1. Words are those of `rouge_score` in English, and of any other
    script too (`alter.core.words.rouge_words`).

    Raises:
        ValueError: the two lists differ in length.
    """
    pairs = list(zip(references, generations, strict=True))
    scores = [_scorer(stem).score(reference, generation)["rougeL"] for reference, generation in pairs]
    columns = (
        np.array([getattr(s, part) for s in scores], dtype=np.float64) for part in ("precision", "recall", "fmeasure")
    )
    return Rouge(*columns)


def bleu(references: Sequence[str], generations: Sequence[str]) -> Array:
    """Return BLEU of each generation against its reference, as a corpus of one, [n], in points from 0 to 100.

    By sacrebleu with its defaults (13a tokens, up to four-word phrases, exponential smoothing), as FLAT (Wang et al.
    2025, arXiv:2410.11143) and with it ALTER's Harry Potter table. Either text empty, or fewer than four tokens, gives
    0. The mean of these is not `corpus_bleu`. In scripts without spaces each character is a token.

    Raises:
        ValueError: the two lists differ in length.
    """
    import sacrebleu

    pairs = zip(references, generations, strict=True)
    scores = [sacrebleu.corpus_bleu([words.spaced(said)], [[words.spaced(true)]]).score for true, said in pairs]
    return np.array(scores, dtype=np.float64)


def corpus_bleu(references: Sequence[str], generations: Sequence[str]) -> float:
    """Return BLEU of all generations as one corpus, by sacrebleu, in points from 0 to 100.

    Raises:
        ValueError: the two lists differ in length, or are empty.
    """
    import sacrebleu

    if len(references) != len(generations) or not references:
        raise ValueError(f"corpus BLEU: {len(references)} references but {len(generations)} generations, or none")
    said, true = ([words.spaced(text) for text in texts] for texts in (generations, references))
    return float(sacrebleu.corpus_bleu(said, [true]).score)


def asg(values: npt.ArrayLike, reference: npt.ArrayLike, *, signed: bool = False) -> float:
    """Return the average similarity gap of a model's text scores, [k], to the retrained model's, [k]; 0 is like it.

    The mean of the absolute gaps (Liu et al. 2024, ECO). `signed` takes the absolute value of the mean gap instead:
    that is what reproduces nine of the eleven rows of ALTER's Harry Potter table (BLEU and ROUGE-L in points), and it
    flatters a model that is above in one score and below in the other.

    Raises:
        ValueError: the two differ in length or are empty.
    """
    own, other = floats(values), floats(reference)
    if own.shape != other.shape or own.size == 0:
        raise ValueError(f"ASG: {own.size} scores but {other.size} of the retrained model, or none")
    gaps = own - other
    return float(abs(gaps.mean()) if signed else np.abs(gaps).mean())


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    found = words.pieces(text)
    return list(zip(*(found[i:] for i in range(n)), strict=False))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Return the number of different n-grams of words over their total, in all texts together (Li et al. 2016).

    Words are split at white space, in lower case (`alter.core.words.pieces`). 0 if no text has n words: a model that says nothing is not diverse.
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
