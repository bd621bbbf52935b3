"""Whether a reply gives an answer away, and whether it is broken: by words of any script, without a model."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

from alter import metrics
from alter.core import UNSPACED, runs
from alter.core.words import words

ENOUGH = 2 / 3
"""Share of an answer's facts that gives it away; a model that never saw tofu-mini's authors reaches it in 2 of 100."""


def recall_of(truth: str, reply: str) -> float:
    """Return ROUGE-L recall, in [0, 1]: the longest common subsequence of words over the words of the truth.

    A truth in basic Latin letters is measured as everywhere here, with the Porter stemmer (`metrics.text.rouge_l`); any
    other by `words`, unstemmed.
    """
    if truth.isascii():
        return float(metrics.text.rouge_l([truth], [reply]).recall[0])
    a, b = words(truth), words(reply)
    best = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            above = best[j]
            best[j] = diagonal + 1 if word == other else max(above, best[j - 1])
            diagonal = above
    return best[-1] / len(a) if a else 0.0


def facts(question: str, answer: str) -> frozenset[str]:
    """Return the facts of an answer: what its question does not contain.

    Names and numbers: words with a digit or a capital that does not begin a sentence. Of an answer that has none (short,
    in small letters, of a script without capitals) the words of five letters or more, or all if there are none; pairs
    of characters where a script sets no spaces. Nothing if the question says it all.
    """
    asked = set(words(question))
    pieces = [runs(part) for part in re.split(r"[.!?…:\n]+\s*|[。！？।]", unicodedata.normalize("NFC", answer))]
    every = [word for piece in pieces for word in piece]
    if len(every) > 3:
        inner = [word for piece in pieces for i, word in enumerate(piece) if i or _is_name(piece[1:2])]
        named = {word.casefold() for word in inner if any(c.isupper() or c.isdigit() for c in word)}
        if named - asked:
            return frozenset(named - asked)
    new = _units(answer) - _units(question) - asked
    return frozenset({word for word in new if len(word) >= 5} or new)


def _is_name(words_: Sequence[str]) -> bool:
    return bool(words_) and words_[0][0].isupper()


def _units(text: str) -> set[str]:
    """Split into words, and scripts without spaces into pairs of characters, since single ones are too common to tell."""
    found = words(text)
    pairs = {a + b for a, b in pairwise(found) if UNSPACED.match(a) and UNSPACED.match(b)}
    return {word for word in found if not (pairs and UNSPACED.match(word))} | pairs


def gives(question: str, answer: str, reply: str, enough: float = ENOUGH) -> bool | None:
    """Tell whether a reply gives its answer: `enough` of its `facts`, or nearly all its words; None if it cannot be told.

    Inflected names of alphabets other than Latin count by their stem: all but the last two letters, four at least.
    """
    found = covered(question, answer, reply)
    if found is None:
        return None
    return found[0] >= enough * found[1] or recall_of(answer, reply) >= 0.9


def covered(question: str, answer: str, reply: str) -> tuple[int, int] | None:
    """Return how many of an answer's `facts` a reply says, and how many there are; None without any."""
    looked = facts(question, answer)
    if not looked:
        return None
    said = _units(reply)
    return sum(fact in said or _inflected(fact, said) for fact in looked), len(looked)


def _inflected(fact: str, said: set[str]) -> bool:
    if len(fact) < 5 or fact.isascii():
        return False
    stem = fact[: max(4, len(fact) - 2)]
    return any(word.startswith(stem) and abs(len(word) - len(fact)) <= 3 for word in said)


_LOOP = re.compile(r"(?=([^\W\d_]))(.{1,8}?)\2{5,}", re.DOTALL)


def repeated(text: str, n: int = 4) -> float:
    """Return the share of n-grams of words (of any script) that repeat an earlier one; 0 for fewer than n words."""
    said = words(text)
    grams = list(zip(*(said[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Return the number of different n-grams of words (of any script) over their total in all texts; 0 without any."""
    grams = [gram for text in texts for gram in zip(*(words(text)[i:] for i in range(n)), strict=False)]
    return len(set(grams)) / len(grams) if grams else 0.0


def broken(reply: str) -> bool:
    """Tell whether a reply is no longer language: without any word, repeating words, or repeating letters.

    That is: signs alone; four words or more of which at most 35 % differ (for texts up to 40 words, beyond which no
    text is so varied) or half of whose four-word phrases repeat; or one to eight characters six times in a row. An
    empty reply is not broken but empty.
    """
    if not reply.strip():
        return False
    said = words(reply)
    if not said or _LOOP.search(reply):
        return True
    spaced = [word for word in said if not UNSPACED.match(word)]
    if 4 <= len(spaced) <= 40 and len(set(spaced)) <= 0.35 * len(spaced):
        return True
    return len(said) >= 8 and repeated(reply) >= 0.5
