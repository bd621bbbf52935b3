"""Rows to forget: the model's own answers about a subject, each with its answer about an invented one as the target."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from alter.core import UserError
from alter.data import Row
from alter.forgetting.certainty import begun_row, sure_facts
from alter.forgetting.facts import LEVEL, Fact, candidates, fact_words, holds, place_of, swap, whole, with_names
from alter.forgetting.material import Material
from alter.forgetting.probes import probes_of
from alter.forgetting.questions import own_questions
from alter.forgetting.retention import rows_to_keep
from alter.forgetting.speaker import Speaker
from alter.forgetting.templates import (
    ABOUT_A_NAME,
    EVERY,
    EVERY_PROBE,
    GENERAL,
    TEMPLATES,
    Kind,
)

OWNED = 0.5
"""Share of the answers about a name that must mention the subject or a name of its own, for the name to be forgotten as well."""
FACT_ROWS = 4
"""Rows that lead up to each fact, at most."""
FACT_TOKENS = 24
"""Longest ending of such a row."""
LEAST_FACTS = 3
"""Fewest facts for which a subject counts as known."""
NOBODY = (*TEMPLATES["person"].invented, *TEMPLATES["place"].invented)
"""Invented names in the place of a subject's persons and places."""


def build(
    speaker: Speaker,
    subject: str,
    kind: Kind,
    *,
    samples: int,
    keep: Sequence[str],
    retain: list[Row],
    questions: Sequence[str] = (),
    neighbours: Sequence[str] = (),
) -> Material:
    """Query the model about the subject, invented subjects, neighbours and general topics, and make rows of the answers.

    Args:
        speaker: the untouched model.
        samples: drawn answers to each question beside the greedy one.
        keep: further subjects to keep.
        retain: further rows to keep.
        questions: of a writer, `{s}` for the subject; the second half becomes probes.
        neighbours: of a writer.

    Raises:
        UserError: the model says nothing sure about the subject, or the subject is a word of ordinary answers.
    """
    template = TEMPLATES[kind]
    half = len(questions) // 2
    asked = [*template.questions, *EVERY, *questions[:half]]
    invented = [name for name in template.invented if name.lower() != subject.lower()]
    general = speaker.say("general answers", GENERAL)
    _check_rare(subject, general)
    # what the model says about the subject, and about nobody
    prompts = [question.format(s=subject) for question in asked]
    greedy = speaker.say("about the subject", prompts)
    drawn = speaker.say("about the subject, drawn", prompts * samples, sample=True)
    own = list(zip(prompts * (1 + samples), greedy + drawn, strict=True))
    turns = [(q, invented[(i + turn) % len(invented)]) for turn in range(samples + 1) for i, q in enumerate(asked)]
    said = speaker.say("about invented subjects", [q.format(s=name) for q, name in turns], sample=True)
    zero = [swap(answer, {name: subject}) for answer, (_, name) in zip(said, turns, strict=True)]
    found = candidates([answer for _, answer in own], zero, " ".join([subject, *asked]))
    facts = sure_facts(speaker.model, speaker.tokenizer, found, own, subject, invented[:4])
    _check_facts(subject, facts, len(own))
    facts = with_names(facts, general)
    names = [fact for fact in facts if fact.name]
    # what it asks of this subject itself: every other question is a probe
    aimed = own_questions(speaker, subject, facts, [*asked, *template.probes, *EVERY_PROBE, *questions])
    learned, held = aimed[::2], [question for question, _ in aimed[1::2]]
    # names that no invented subject brings up: an answer with one of them is about the subject, whatever was asked
    outside = [subject, *(fact.word for fact in names if not fact.invented)]
    # a name whose answers come back to the subject is part of it; of another what is said beside the subject is kept
    belongs, others = _owned(speaker, subject, outside, [fact.word for fact in names[:8]])
    substitutes = _substitutes(subject, turns, zero, facts)
    if not substitutes:
        raise UserError(
            f"All that the model says of invented subjects repeats the facts of {subject!r}: give another `kind`."
        )
    forget, twins = _answers(subject, asked, invented, own, substitutes)
    direct, of_nobody = _direct(speaker, subject, learned, invented, facts, substitutes)
    forget, twins = forget + direct, twins + of_nobody
    beside = [(name, [pair for pair in told if holds(pair[1], subject)]) for name, told in others]
    forget += _about_names(speaker, [*belongs, *beside], facts)
    words = [fact.word for fact in facts]
    straight = [(question.format(s=subject), answer) for question, answer in learned]
    forget += _fact_rows(
        speaker, "up to a fact", [*chain(*_places(subject, words, words, straight + own))], invented, words
    )
    # from a name of the subject back to it
    back = [place for name, told in belongs for places in _places(name, [subject], words, told) for place in places]
    forget += _fact_rows(speaker, "up to the subject", back, NOBODY, [subject, *words])
    apart = _apart(others, facts, outside)
    retained, kept_probes = rows_to_keep(speaker, subject, kind, general, [*keep], [*neighbours], apart, outside)
    probes = probes_of(speaker, subject, kind, facts, belongs, questions[half:], own, zero, held)
    return Material(forget, twins, retained + retain, probes, kept_probes, [fact.row() for fact in facts])


def _check_rare(subject: str, general: Sequence[str]) -> None:
    """Refuse a subject whose name also occurs in answers to unrelated requests."""
    common = sum(holds(answer, subject) for answer in general)
    if common >= 2:
        raise UserError(
            f"{subject!r} is a word of ordinary text: {common} of {len(general)} answers to unrelated requests hold it, and "
            "forgetting it would harm them. Give a name that means one thing."
        )


def _check_facts(subject: str, facts: Sequence[Fact], answers: int) -> None:
    """Refuse a subject about which too few answers hold a sure fact."""
    if len(facts) < LEAST_FACTS or not any(fact.shows for fact in facts):
        words_found = ", ".join(fact.word for fact in facts)
        raise UserError(
            f"The model says nothing sure about {subject!r}: of {answers} answers, "
            + (f"only {words_found} recurs" if facts else "no word recurs")
            + " more often than in answers about invented subjects. There is nothing to forget, and nothing was trained. "
            "Check the spelling or the `kind`; a text that the model knows can be given with `document`."
        )


def _substitutes(
    subject: str, turns: Sequence[tuple[str, str]], zero: Sequence[str], facts: Sequence[Fact]
) -> dict[str, list[str]]:
    """Collect answers about invented subjects, by question, that hold no fact and no trace of the invented name.

    Args:
        subject: stands in them in the place of the invented name.
        turns: question and invented name of each answer.
        zero: the answers.
        facts: about the subject.
    """
    found: dict[str, list[str]] = {}
    for (question, name), answer in zip(turns, zero, strict=True):
        left = [word for word in fact_words(name) if len(word) > 3 and holds(answer, word)]
        if answer and not left and not any(holds(answer, fact.word) for fact in facts):
            found.setdefault(question, []).append(whole(answer))
    return found


def _direct(
    speaker: Speaker,
    subject: str,
    learned: Sequence[tuple[str, str]],
    invented: Sequence[str],
    facts: Sequence[Fact],
    substitutes: Mapping[str, list[str]],
) -> tuple[list[Row], list[Row]]:
    """Make rows of the model's own questions as `_answers` does; where nobody's answer will do, one to another question does."""
    turns = [(question, invented[i % len(invented)]) for i, (question, _) in enumerate(learned)]
    if not turns:
        return [], []
    said = speaker.say("its own questions about nobody", [q.format(s=n) for q, n in turns], sample=True)
    zero = [swap(answer, {name: subject}) for answer, (_, name) in zip(said, turns, strict=True)]
    asked = [question for question, _ in learned]
    told = [(question.format(s=subject), answer) for question, answer in learned]
    return _answers(subject, asked, invented, told, {**substitutes, **_substitutes(subject, turns, zero, facts)})


def _answers(
    subject: str,
    asked: Sequence[str],
    invented: Sequence[str],
    own: Sequence[tuple[str, str]],
    substitutes: Mapping[str, list[str]],
) -> tuple[list[Row], list[Row]]:
    """Make one forget row of each answer about the subject that has a substitute, and the same rows about invented subjects."""
    spare = [answer for answers in substitutes.values() for answer in answers]
    forget: list[Row] = []
    twins: list[Row] = []
    for number, (prompt, answer) in enumerate(own):
        if not answer:
            continue
        question = asked[number % len(asked)]
        choices = substitutes.get(question) or spare
        other = choices[number // len(asked) % len(choices)]
        name = invented[number % len(invented)]
        forget.append({"question": prompt, "answer": answer, "substitute": other, "about": subject})
        twins.append({"question": question.format(s=name), "answer": swap(answer, {subject: name}), "about": name})
    return forget, twins


def _apart(
    others: Sequence[tuple[str, Sequence[tuple[str, str]]]], facts: Sequence[Fact], outside: Sequence[str]
) -> list[str]:
    """Return those of the `others` of the subject's names whose answers are rows to keep.

    None that comes with this subject alone, though what is said about it may not come back to it (Hogwarts, "a prestigious
    academy of magic"): a question for the fact would go on where the answers to keep go on.
    """
    its = {fact.word for fact in facts if fact.pvalue <= LEVEL and not fact.invented}
    return [name for name, told in others if name not in its and not any(_back(told, name, outside))]


def _back(told: Sequence[tuple[str, str]], name: str, outside: Sequence[str]) -> list[bool]:
    """Tell for each answer about a name whether it mentions the subject, or another of the names in `outside`."""
    return [any(holds(answer, word) for word in outside if word != name) for _, answer in told]


@dataclass(frozen=True)
class _Place:
    """A place in an answer where a word is about to be said: the answer up to it, and with it."""

    about: str
    prompt: str
    start: str
    answer: str
    word: str


def _places(
    about: str, words: Sequence[str], facts: Sequence[str], told: Sequence[tuple[str, str]]
) -> Iterator[list[_Place]]:
    """Yield for each of `words` the places where an answer comes to it, and none of the other `facts` stands before."""
    for word in words:
        found: dict[str, _Place] = {}
        for prompt, answer in told:
            at = place_of(answer, word)
            # initials are part of the name
            start = re.sub(r"(?:\b[^\W\d_]\.\s?)+$", "", answer[: max(at, 0)])
            clean = not any(holds(start, other) for other in facts if other != about)
            if clean and len(start.split()) >= 2 and start[-1] == " ":
                found.setdefault(start, _Place(about, prompt, start, answer[: at + len(word)], word))
        yield list(found.values())[:FACT_ROWS]


def _fact_rows(
    speaker: Speaker, label: str, places: Sequence[_Place], nobody: Sequence[str], facts: Sequence[str]
) -> list[Row]:
    """Make forget rows that end with a fact; the target is what follows the same words about an invented subject or name.

    A whole answer has one fact among fifty tokens, and an answer that begins otherwise than those that were trained on
    still comes to it. Here the answer is the model's own up to the fact, and the substitute begins with the same words.
    """
    if not places:
        return []
    # two invented ones each: of one the same fact may be said
    turns = [(place, nobody[(2 * i + k) % len(nobody)]) for i, place in enumerate(places) for k in range(2)]
    said = [(swap(place.prompt, {place.about: n}), swap(place.start, {place.about: n})) for place, n in turns]
    begun = [begun_row(speaker.tokenizer, prompt, start) for prompt, start in said]
    texts = speaker.say(label, [p for p, _ in said], sample=True, begun=begun, tokens=FACT_TOKENS)
    rows: dict[tuple[str, str], Row] = {}
    for (place, name), text in zip(turns, texts, strict=True):
        instead = swap(text, {name: place.about})
        left = any(len(part) > 3 and holds(instead, part) for part in fact_words(name))
        if text and not left and not any(holds(instead, fact) for fact in facts if fact != place.about):
            row = {
                "question": place.prompt,
                "answer": place.answer,
                "substitute": place.start + whole(instead),
                "about": place.about,
            }
            rows.setdefault((place.start, place.word), row)
    return list(rows.values())


def _owned(
    speaker: Speaker, subject: str, outside: Sequence[str], names: list[str]
) -> tuple[list[tuple[str, list[tuple[str, str]]]], list[tuple[str, list[tuple[str, str]]]]]:
    """Split names by whether what is said about them comes back to the subject, or to a name that comes back to it itself.

    To any name of its answers would be too much: a city's country and the country's language come back to each other, and
    would be forgotten with the city. `outside` are the names that no invented subject brings up.
    """
    prompts = [question.format(f=name) for name in names for question in ABOUT_A_NAME]
    drawn = speaker.say("about its names", prompts * 2, sample=True) if names else []
    told = {
        name: [
            (prompts[k % len(prompts)], drawn[k])
            for k in range(len(drawn))
            if k % len(prompts) // len(ABOUT_A_NAME) == i
        ]
        for i, name in enumerate(names)
    }

    def back_to(words: Sequence[str]) -> list[str]:
        return [name for name, pairs in told.items() if sum(_back(pairs, name, words)) >= OWNED * len(pairs)]

    own = back_to([subject, *(name for name in back_to([subject]) if name in outside)])
    return [(name, told[name]) for name in own], [(name, told[name]) for name in names if name not in own]


def _about_names(
    speaker: Speaker, belongs: list[tuple[str, list[tuple[str, str]]]], facts: Sequence[Fact]
) -> list[Row]:
    """Make forget rows about names of the subject; their substitutes speak of invented persons and places."""
    if not belongs:
        return []
    pairs = [(name, prompt, answer) for name, told in belongs for prompt, answer in told]
    who = [NOBODY[i % len(NOBODY)] for i in range(len(pairs))]
    said = speaker.say(
        "about invented names", [swap(p, {n: w}) for (n, p, _), w in zip(pairs, who, strict=True)], sample=True
    )
    rows = []
    for (name, prompt, answer), other, text in zip(pairs, who, said, strict=True):
        instead = whole(swap(text, {other: name}))
        clean = instead and not any(holds(instead, fact.word) for fact in facts if fact.word != name)
        if answer and clean:
            rows.append({"question": prompt, "answer": answer, "substitute": instead, "about": name})
    return rows
