"""Probes of a subject: prompt forms that are not trained on, and whether an answer holds what is wanted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alter.data import Example, Row, said
from alter.forgetting.facts import Fact, expected, fact_words, holds, place_of, swap, swap_turns
from alter.forgetting.speaker import Speaker
from alter.forgetting.templates import (
    CHOICE,
    CLOZE,
    CLOZE_ABOUT,
    COMPLETIONS,
    EVERY_PROBE,
    REVERSED,
    TEMPLATES,
    Kind,
)

TWINS = 3
"""Invented subjects that are asked each probe: one that gets the fact as well shows nothing of the subject."""


def probes_of(
    speaker: Speaker,
    subject: str,
    kind: Kind,
    facts: Sequence[Fact],
    belongs: Sequence[tuple[str, Any]],
    questions: Sequence[str],
    own: Sequence[tuple[str, str]],
    zero: Sequence[str],
    aimed: Sequence[str] = (),
) -> list[Row]:
    """Return the probes that the untouched model answers with a fact, in forms that are not trained on.

    A probe whose fact also stands in the answer about one of `TWINS` invented subjects tells nothing, and is left out;
    whether the answer about one more holds it, stands in its `zero`, and that answer in `invented`. A choice is asked in three orders (a `group`), all of
    which must be answered. `aimed` are questions about this very subject (`own_questions`).
    """
    template = TEMPLATES[kind]
    forms = [("other question", q) for q in [*template.probes, *EVERY_PROBE, *questions]]
    forms += [("its own question", q) for q in aimed]
    forms += [("completion", frame.format(stem=stem)) for stem in template.stems for frame in COMPLETIONS]
    forms += [("cloze", CLOZE.format(stem=stem)) for stem in template.stems]
    asked: list[Row] = [{"form": form, "prompt": q.format(s=subject), "pattern": q} for form, q in forms]
    asked += [
        {"form": "reversed", "prompt": q.format(f=name), "wanted": [subject], "about": name}
        for name, _ in belongs
        for q in REVERSED
    ]
    asked += _blanks(subject, own, facts)
    asked += _choices(subject, facts, zero, speaker.seed)
    answers = speaker.say("probes", [row["prompt"] for row in asked])
    probes = []
    for row, answer in zip(asked, answers, strict=True):
        wanted = row.get("wanted") or expected(answer, facts)
        probe = {**row, "wanted": wanted, "before": answer}
        if answered(answer, probe):
            probes.append(probe)
    nobody = [name for name in template.invented if name.lower() != subject.lower()][: TWINS + 1]
    twins = [swap(probe["prompt"], {subject: name}) for probe in probes for name in nobody]
    told = speaker.say("probes of invented subjects", twins) if probes else []
    kept = []
    for i, probe in enumerate(probes):
        *choosing, last = (answered(a, probe) for a in told[i * len(nobody) : (i + 1) * len(nobody)])
        if not holds(probe["prompt"], subject):
            kept.append(probe)
        elif not any(choosing):
            # by this name nothing was chosen: how often it gets the fact is what knowing nothing gets
            kept.append({**probe, "zero": last, "invented": told[(i + 1) * len(nobody) - 1]})
    orders = Counter(probe.get("group") for probe in kept)
    return [probe for probe in kept if "group" not in probe or orders[probe["group"]] == 3]


def _choices(subject: str, facts: Sequence[Fact], zero: Sequence[str], seed: int) -> list[Row]:
    """Make multiple-choice probes: each fact beside two names from answers about invented subjects, in three orders."""
    elsewhere = sorted({w for answer in zero for w in fact_words(answer) if w[0].isupper() and len(w) > 4})
    if len(elsewhere) < 2:
        return []
    generator = np.random.default_rng(seed)
    found: list[Row] = []
    for fact in facts[:8]:
        wrong = [elsewhere[i] for i in generator.choice(len(elsewhere), size=2, replace=False).tolist()]
        options = [fact.word, *wrong]
        order = [options[i] for i in generator.permutation(3).tolist()]
        # who guesses by place is right in one order of three
        for turn in range(3):
            one, two, three = order[turn:] + order[:turn]
            prompt = CHOICE.format(s=subject, options=f"{one}, {two} or {three}")
            found.append(
                {
                    "form": "multiple choice",
                    "prompt": prompt,
                    "wanted": [fact.word],
                    "wrong": wrong,
                    "group": fact.word,
                }
            )
    return found


def _blanks(subject: str, own: Sequence[tuple[str, str]], facts: Sequence[Fact], each: int = 4) -> list[Row]:
    """Make cloze probes of the model's own sentences, up to the fact; sentences in which another fact comes first are left out.

    What does not name the subject is said to be about it: nothing else in it is of the subject alone, and an invented one could
    not be asked instead.
    """
    rows = []
    for fact in facts:
        found = []
        for _, answer in own:
            at = place_of(answer, fact.word)
            if at < 0:
                continue
            before = re.split(r"(?<=[.!?:])\s+(?=[A-Z])", answer[:at])[-1].strip()
            clean = not any(holds(before, other.word) for other in facts if other is not fact)
            # a long row of initials gives the name away
            if clean and 3 <= len(before.split()) <= 25 and not re.search(r"[A-Z]\.$", before):
                frame = CLOZE if holds(before, subject) else CLOZE_ABOUT
                found.append(frame.format(s=subject, stem=before))
        rows += [{"form": "cloze", "prompt": p, "wanted": [fact.word]} for p in list(dict.fromkeys(found))[:each]]
    return rows


def question_of(probe: Row) -> str | Example:
    """Return what a probe asks: its question, the turns of a chat up to it (`messages`), or a text that goes on (`plain`)."""
    if probe.get("messages"):
        return Example(probe["prompt"], "", "messages", messages=tuple(probe["messages"]))
    return Example(probe["prompt"], "", "completion") if probe.get("plain") else str(probe["prompt"])


def swap_probe(probe: Row, names: Mapping[str, str]) -> Row:
    """Replace names in what a probe asks."""
    turns = {"messages": swap_turns(probe["messages"], names)} if probe.get("messages") else {}
    return {**probe, "prompt": swap(probe["prompt"], names), **turns}


def text_of(probe: Row) -> str:
    """Return all that stands before the answer of a probe, as one text."""
    return "\n".join(said(turn) for turn in probe["messages"]) if probe.get("messages") else str(probe["prompt"])


def answered(answer: str, probe: Row) -> bool:
    """Tell whether an answer holds one of the expected words and, with several choices, none of the wrong ones."""
    return any(holds(answer, word) for word in probe["wanted"]) and not any(
        holds(answer, word) for word in probe.get("wrong", ())
    )
