"""The subject's name: whether it can be one, whether it is a common word, and what kind of thing it names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alter.core import UserError, caseless
from alter.forgetting.certainty import fact_row
from alter.forgetting.facts import SHORT, fact_words
from alter.forgetting.templates import (
    KINDS,
    TEMPLATES,
    Kind,
)
from alter.inference import score


def check_name(subject: str) -> None:
    """Refuse a text that is no name, before any model is loaded.

    Raises:
        UserError: nothing but space or signs, a whole text, or what no text holds.
    """
    if not subject.strip():
        raise UserError('The subject is empty; expected the name of what to forget: alter forget "Harry Potter".')
    if not fact_words(subject) and not re.search(r"[^\W_]", subject):
        raise UserError(
            f'The subject is {subject!r}, expected the name of what to forget: alter forget "Harry Potter".'
        )
    if len(subject) > 100 or len(subject.strip().splitlines()) > 1:
        what = f"{len(subject)} characters" if len(subject) > 100 else "several lines"
        raise UserError(
            f"The subject has {what}, expected a name of one line and at most 100 characters: give a text with `document` FILE."
        )
    control = next((character for character in subject if unicodedata.category(character) in ("Cc", "Cs")), None)
    if control is not None:
        raise UserError(f"The subject is {subject!r}, which holds {control!r}: write the name without it.")


def check_uncommon(subject: str, tokenizer: Any, kind: Kind | None) -> None:
    """Refuse a common word as the subject unless a `kind` is given, before anything is generated.

    Raises:
        UserError: it is one.
    """
    single = len(tokenizer(f" {subject}", add_special_tokens=False)["input_ids"]) == 1
    if kind is None and (len(subject) < 3 or (subject == subject.lower() and single)):
        raise UserError(
            f"{subject!r} is a common word: what the model says with it is not one subject's, and all text that holds it "
            "would suffer. Give a name that means one thing, or say what is meant with `kind` concept."
        )


def names_of(subject: str, facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the subject, its longer words that may be names, and the names that are facts about it and about no invented subject."""
    words = [word for word in fact_words(subject) if len(word) > SHORT and (word[0].isupper() or caseless(word))]
    found = [str(fact["word"]) for fact in facts if fact.get("name") and not fact.get("invented")]
    return [*dict.fromkeys([subject, *words, *found])]


def guess_kind(model: Any, tokenizer: Any, subject: str) -> Kind:
    """Guess the subject's kind: the one whose phrases gain the most log-probability after `SUBJECT is a`, over invented names.

    A phrase's score is log p(phrase | subject) minus its mean over one invented name of each kind; a kind's score is that
    of its best phrase.
    """
    names = [subject, *(TEMPLATES[kind].invented[0] for kind in KINDS)]
    phrases = [(kind, phrase) for kind in KINDS for phrase in TEMPLATES[kind].phrases]
    rows = [fact_row(tokenizer, f"What is {n}?", f"{n} is {article(p)} ", p) for n in names for _, p in phrases]
    found = score(model, rows, pad_token_id=tokenizer.pad_token_id, label="kind of subject").logprob
    sums = np.array([row.sum() for row in found]).reshape(len(names), len(phrases))
    gain = sums[0] - sums[1:].mean(axis=0)
    return max(KINDS, key=lambda kind: max(g for g, (k, _) in zip(gain, phrases, strict=True) if k == kind))


def article(phrase: str) -> str:
    """Return `a` or `an`."""
    return "an" if phrase[0] in "aeiou" else "a"
