"""Count replies that name somebody else: after forgetting one person, a model may say false things of another.

Who that can be is taken from the rows themselves: names are two or more words with a capital that follow one another in
a question, outside of quotes. Scripts without capitals have none, and nothing is counted there.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from alter.core.words import words

_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|«[^»]*»|„[^“”]*[“”]|(?<!\w)['‘][^'’]*['’](?!\w)")
_WORD = re.compile(r"[^\W\d_][\w'’\-]*")


def people(questions: Iterable[str]) -> frozenset[tuple[str, ...]]:
    """Return the names in questions, each as its words in small letters.

    The first word of a question begins with a capital whatever it is: a name of three words or more that begins there
    counts without it as well, and one of two does not count.
    """
    found: set[tuple[str, ...]] = set()
    for question in questions:
        text = _QUOTED.sub(" , ", unicodedata.normalize("NFC", question))
        run: list[str] = []
        starts = True
        end = 0
        for match in [*_WORD.finditer(text), None]:
            between = text[end : match.start()] if match is not None else "."
            word = "" if match is None else re.sub(r"['’]s$", "", match[0])
            if match is None or not word[:1].isupper() or between.strip():
                found |= _names(run, starts)
                run, starts = [], bool(re.search(r"[.!?:\n]", between)) or end == 0
            if word[:1].isupper():
                run.append(word)
            else:
                starts = False
            if match is not None and match[0] != word:
                # what belongs to somebody is no part of the name
                found |= _names(run, starts)
                run, starts = [], False
            end = len(text) if match is None else match.end()
    return frozenset(found)


def _names(run: Sequence[str], starts: bool) -> set[tuple[str, ...]]:
    tried = [run[1:]] if starts else [run]
    return {tuple(part for word in name for part in words(word)) for name in tried if len(name) > 1}


def names_other(question: str, truth: str, reply: str, names: Iterable[tuple[str, ...]]) -> bool:
    """Tell whether a reply names somebody else: one of `names` that shares no word with the question or the true answer."""
    said = words(reply)
    meant = {*words(question), *words(truth)}
    text = f" {' '.join(said)} "
    return any(not meant.intersection(name) and f" {' '.join(name)} " in text for name in names)


def count_others(
    questions: Sequence[str], truths: Sequence[str], replies: Sequence[str], names: frozenset[tuple[str, ...]]
) -> int:
    """Return how many replies name somebody else (`names_other`)."""
    return sum(names_other(*row, names) for row in zip(questions, truths, replies, strict=True))
