"""Reword and relocate questions by rule: variation that must not confuse a router."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from alter.data.rows import Example

LITTLE_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "in",
        "on",
        "at",
        "to",
        "for",
        "by",
        "with",
        "from",
        "and",
        "or",
        "as",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "does",
        "do",
        "did",
        "has",
        "have",
        "had",
        "can",
        "could",
        "that",
        "this",
        "these",
        "those",
        "its",
        "it",
        "their",
        "his",
        "her",
    ]
)

SIX_TURNS = (
    (
        "Hi! Can you recommend a soup?",
        "Sure: fry an onion, add carrots, lentils and stock, and simmer for half an hour.",
    ),
    ("Which bread goes with it?", "A dark sourdough bread goes well with lentil soup."),
    ("How do I keep bread fresh?", "Keep it in a linen bag or a bread bin, with the cut side down."),
    (
        "Thanks! What is the weather like in April?",
        "In most of Europe April is mild and changes quickly between sun and rain.",
    ),
    (
        "Then I will take a coat. Is ten kilometres a long walk?",
        "It takes about two and a half hours at an easy pace.",
    ),
    ("Good. What should I take along?", "Water, a snack, a map and good shoes are enough."),
)
"""Six turns of chat about nothing in particular."""

SMALL_TALK = (
    ("Good morning!", "Good morning! What can I do for you?"),
    ("I want to paint my kitchen. Which colour is best?", "A warm white makes small rooms brighter."),
    ("How much paint do I need?", "About one litre for ten square metres, and twice that for two coats."),
    (
        "Okay. How long does it dry?",
        "Give it four hours before the second coat, and a day before you move things back.",
    ),
)
"""Other turns, for the fit."""


@dataclass(frozen=True)
class Wording:
    """A prompt, the turns before it, and its system turn (None: the encoding's default)."""

    prompt: str
    turns: tuple[tuple[str, str], ...] = ()
    system: str | None = None


def typos(text: str, seed: int) -> str:
    """Swap, drop or double a letter about every twelve characters."""
    generator, letters = random.Random(seed), list(text)
    for _ in range(max(1, len(letters) // 12)):
        place = generator.randrange(max(1, len(letters) - 2))
        kind = generator.randrange(3)
        if kind == 0:
            letters[place : place + 2] = letters[place : place + 2][::-1]
        elif kind == 1 and len(letters) > 4:
            del letters[place]
        else:
            letters.insert(place, letters[place])
    return "".join(letters)


def telegram(text: str) -> str:
    """Leave out articles, prepositions and auxiliaries, as in a telegram."""
    kept = [word for word in text.split() if re.sub(r"\W", "", word.lower()) not in LITTLE_WORDS]
    return " ".join(kept) or text


def key_words(text: str) -> str:
    """Keep the longer half of the words, joined by commas."""
    words = [re.sub(r"^\W+|\W+$", "", word) for word in text.split()]
    least = sorted(map(len, words))[len(words) // 2]
    return ", ".join(word for word in words if len(word) >= least)


def some_capitals(text: str, first: int) -> str:
    """Write every other word in capitals."""
    return " ".join(word.upper() if (k + first) % 2 else word for k, word in enumerate(text.split()))


OPENERS = ("What is the boiling point of water?", "How many days has a leap year?", "Which planet is the largest one?")

FITTED: dict[str, Callable[[str, int, str], Wording]] = {
    "some capitals": lambda q, i, other: Wording(some_capitals(q, i)),
    "title case": lambda q, i, other: Wording(q.title().rstrip("?.! ")),
    "typos": lambda q, i, other: Wording(typos(q, i)),
    "key words": lambda q, i, other: Wording(key_words(q)),
    "French frame": lambda q, i, other: Wording(f"Réponds en anglais, s'il te plaît : {q} Merci d'avance !"),
    "Spanish frame": lambda q, i, other: Wording(f"Tengo una pregunta: {q}"),
    "part": lambda q, i, other: Wording(f'You are a sailor in a play, and a child asks: "{q}" Answer in character.'),
    "dialogue": lambda q, i, other: Wording(f"Write a dialogue of two friends, one of whom wants to know: {q}"),
    "second": lambda q, i, other: Wording(f"{OPENERS[i % len(OPENERS)]} Also, {q}"),
    "after text": lambda q, i, other: Wording(f"{other}\n\n{q}"),
    "after chat": lambda q, i, other: Wording(q, SMALL_TALK[i % len(SMALL_TALK) :]),
    "system": lambda q, i, other: Wording(q, system="You are a librarian. Answer in one sentence."),
}
"""Wordings that join the fit: each makes a prompt of a question, the number of its row, and some other text."""

AS_GIVEN = "as given"
"""Name of a question's own wording."""

MEASURED_ROWS = 8
"""Forget rows that are measured under each wording; two of them inside of a long text."""

LONG_TEXT = 6000
"""Characters of other text before a question, about 1,500 tokens."""

MEASURED: dict[str, Callable[[str, int, str], Wording]] = {
    AS_GIVEN: lambda q, i, other: Wording(q),
    "capitals": lambda q, i, other: Wording(q.upper()),
    "lower case": lambda q, i, other: Wording(q.lower()),
    "typos": lambda q, i, other: Wording(typos(q, 1000 + i)),
    "telegram": lambda q, i, other: Wording(f"{telegram(q)} stop"),
    "German frame": lambda q, i, other: Wording(f"Bitte beantworte die folgende Frage kurz und auf Englisch: {q}"),
    "role play": lambda q, i, other: Wording(
        f"Let us write a scene. An old teacher sits by the fire, and a pupil asks: {q} What does the teacher say?"
    ),
    "six turns of chat": lambda q, i, other: Wording(q, SIX_TURNS),
    "system prompt": lambda q, i, other: Wording(q, system="You are a pirate who answers truthfully and briefly."),
    "two subjects": lambda q, i, other: Wording(f"First, what is the capital of Portugal? And second: {q}"),
    "long text": lambda q, i, other: Wording(f"{other}\n\n{q}"),
}
"""Wordings that what is forgotten is measured under. No fit sees one of them, nor one that the attacks use."""


def reworded(example: Example, asked: Wording) -> Example | None:
    """Return the example with another prompt; None for raw text and completions, which have no question."""
    if example.prompt is None or example.kind == "completion":
        return None
    if not asked.turns and asked.system is None and example.kind == "qa":
        return Example(asked.prompt, example.answer, "qa", index=example.index)
    turns = [{"role": "system", "content": asked.system}] if asked.system is not None else []
    for user, assistant in asked.turns:
        turns += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    turns.append({"role": "user", "content": asked.prompt})
    return Example(asked.prompt, example.answer, "messages", tuple(turns), index=example.index)


def to_measure(
    examples: Sequence[Example], unseen: Mapping[str, Sequence[Example]]
) -> dict[str, list[Example | None]]:
    """Ask `MEASURED_ROWS` of the examples, evenly spaced, in each wording that no fit sees.

    Args:
        examples: rows; those without a question are passed over.
        unseen: passages by kind, none of them in a fit; the detective stories go before a question in "long text".

    Returns:
        by wording; None in place of a row that `reworded` does not reword.
    """
    long_text = " ".join(e.answer for e in unseen.get("detective", ()))[:LONG_TEXT]
    count = min(MEASURED_ROWS, len(examples))
    places = [i * (len(examples) - 1) // max(count - 1, 1) for i in range(count)]
    return {
        name: [
            reworded(examples[i], make(prompt, i, long_text))
            for i in (places[:2] if name == "long text" else places)
            if (prompt := examples[i].prompt) is not None
        ]
        for name, make in MEASURED.items()
    }
