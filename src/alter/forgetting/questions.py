"""Questions about a subject that the model asks itself: short ones, each kept only if its own answer names a fact."""

from __future__ import annotations

import re
from collections.abc import Sequence

from alter.forgetting.certainty import begun_row
from alter.forgetting.facts import Fact, expected, holds, swap
from alter.forgetting.speaker import Speaker

REQUEST = "Write a short quiz question about {s}."
AIMED = "Write a short quiz question about {s} to which the answer is {f}."
"""What the model is asked for; without a given beginning a small one writes the same question again and again."""
BEGINNINGS = ("What is the name of the", "What is", "Who", "Which", "Where", "In which", "Whose")
"""How the questions begin."""
DRAWN = 8
"""Questions drawn of each beginning, and facts that one of each is drawn for."""
QUESTION_TOKENS = 24
"""Longest of what follows the beginning."""


def own_questions(
    speaker: Speaker, subject: str, facts: Sequence[Fact], asked: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Return questions, with `{s}` for the subject, that the model asks about it and answers with a fact, with the answers.

    Questions that are written for every subject of a kind ask for no fact of this one ("What is the name of the school in
    Harry Potter?"), and what is forgotten in long answers is still given to those who ask for it.

    Args:
        speaker: the untouched model.
        subject: must be named in the question, or an invented one could not be asked instead.
        facts: none of which may stand in the question.
        asked: questions that there are already.
    """
    requests = [REQUEST.format(s=subject)] * DRAWN
    requests += [AIMED.format(s=subject, f=fact.word) for fact in facts[:DRAWN]]
    turns = [(request, start) for start in BEGINNINGS for request in requests]
    begun = [begun_row(speaker.tokenizer, request, f"{start} ") for request, start in turns]
    drawn = speaker.say(
        "its own questions", [request for request, _ in turns], sample=True, begun=begun, tokens=QUESTION_TOKENS
    )
    known = {question.casefold() for question in asked}
    found: dict[str, str] = {}
    for (_, start), rest in zip(turns, drawn, strict=True):
        question = _question(start, rest)
        pattern = swap(question, {subject: "{s}"})
        named = any(holds(pattern, fact.word) for fact in facts)
        if "{s}" in pattern and not named:
            # another question by a word's case alone is the same
            found.setdefault(pattern.casefold(), pattern)
    new = [pattern for key, pattern in found.items() if key not in known]
    answers = (
        speaker.say("answers to its own questions", [pattern.format(s=subject) for pattern in new]) if new else []
    )
    return [(pattern, answer) for pattern, answer in zip(new, answers, strict=True) if expected(answer, facts)]


def _question(start: str, rest: str) -> str:
    """Join a question's beginning and the first line of what follows, up to its question mark; empty without one."""
    text = re.sub(r" (?=['’,?])", "", f"{start} {rest}".replace("{", "").replace("}", ""))
    whole = re.match(r"[^?？؟\n]*[?？؟]", text)
    return " ".join(whole[0].split()) if whole else ""
