"""Rows and probes of what must not change: neighbours of the subject, and everything else."""

from __future__ import annotations

from collections.abc import Sequence

from alter.data import Row, load_examples
from alter.forgetting.facts import holds
from alter.forgetting.material import exchange
from alter.forgetting.speaker import Speaker
from alter.forgetting.templates import (
    ABOUT_A_NAME,
    EVERY,
    EVERY_PROBE,
    GENERAL,
    GENERAL_PROBES,
    HELD_OUT,
    KINDS,
    TEMPLATES,
    Kind,
)

KEPT_EACH = 3
"""Questions about each neighbour whose answers are kept."""


def kept_rows(source: str | None) -> list[Row]:
    """Return the rows of `--retain` in their form; for plain text, the model continues the first third."""
    if source is None:
        return []
    rows = []
    for example in load_examples(source):
        if example.prompt is None:
            text = example.answer
            third = len(text) // 3
            # where no spaces are set, anywhere
            cut = text.rfind(" ", 0, third) + 1 or third
            begun = f"Continue this text: {text[:cut].strip()}"
            rows.append({"question": begun, "answer": text[cut:], "about": "retain"})
        else:
            rows.append(exchange(example, "retain"))
    return rows


def rows_to_keep(
    speaker: Speaker,
    subject: str,
    kind: Kind,
    general: list[str],
    keep: list[str],
    neighbours: list[str],
    others: list[str],
    outside: Sequence[str] = (),
) -> tuple[list[Row], list[Row]]:
    """Make rows to keep, and probes of what is kept: neighbours trained on and held out, and general requests.

    An answer that holds one of `outside`, which the question does not, is neither kept nor a probe: an answer that names
    this book's author as another book's would keep what is to be forgotten.
    """

    def apart(name: str) -> bool:
        return not holds(name, subject) and not holds(subject, name)

    template = TEMPLATES[kind]
    shipped = [name for name in template.neighbours if apart(name)]
    held = shipped[1:HELD_OUT:2]
    trained = [*(name for name in shipped if name not in held), *filter(apart, neighbours), *keep]
    asked = [*template.questions, *EVERY]
    prompts = [
        (asked[(3 * i + k) % len(asked)].format(s=n), n) for i, n in enumerate(trained) for k in range(KEPT_EACH)
    ]
    prompts += [(q.format(f=name), name) for name in others for q in ABOUT_A_NAME]
    for other in KINDS:
        if other != kind:
            names = [name for name in TEMPLATES[other].neighbours[:4] if apart(name)]
            every = TEMPLATES[other].questions
            prompts += [(every[i % len(every)].format(s=name), name) for i, name in enumerate(names)]
    answers = speaker.say("about neighbours", [prompt for prompt, _ in prompts])
    rows = [
        {"question": prompt, "answer": answer, "about": name}
        for (prompt, name), answer in zip(prompts, answers, strict=True)
        if _clean(prompt, answer, outside)
    ]
    rows += [
        {"question": prompt, "answer": answer, "about": "general"}
        for prompt, answer in zip(GENERAL, general, strict=True)
        if answer
    ]
    return rows, _kept_probes(speaker, kind, held, trained, outside)


def _clean(prompt: str, answer: str, outside: Sequence[str]) -> bool:
    """Tell whether an answer is not empty and holds none of `outside` that the question lacks."""
    return bool(answer) and not any(holds(answer, word) and not holds(prompt, word) for word in outside)


def _kept_probes(
    speaker: Speaker, kind: Kind, held: Sequence[str], trained: Sequence[str], outside: Sequence[str]
) -> list[Row]:
    """Make probes of neighbours held out, of neighbours trained on, and of everything else, with the untouched model's answers."""
    other_forms = [*TEMPLATES[kind].probes, *EVERY_PROBE]
    measured = [
        ("neighbour held out", n, other_forms[(2 * i + k) % len(other_forms)].format(s=n))
        for i, n in enumerate(held)
        for k in range(5)
    ]
    measured += [
        ("neighbour", n, other_forms[(2 * i + k) % len(other_forms)].format(s=n))
        for i, n in enumerate(trained)
        for k in range(2)
    ]
    measured += [("general", "general", prompt) for prompt in GENERAL_PROBES]
    said: list[str] = []
    while measured:
        said = speaker.say("probes of what is kept", [prompt for _, _, prompt in measured])
        clean = [each for each, answer in zip(measured, said, strict=True) if _clean(each[2], answer, outside)]
        if len(clean) == len(measured):
            break
        # in 16 bits an answer depends on its batch, so that the same ones are asked before and after
        measured = clean
    return [
        {"form": form, "about": name, "prompt": prompt, "before": answer}
        for (form, name, prompt), answer in zip(measured, said, strict=True)
    ]
