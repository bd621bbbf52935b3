"""The rows and probes of an `alter forget` run, as its files hold them."""

from __future__ import annotations

from dataclasses import dataclass

from alter.data import Example, Row


@dataclass(frozen=True)
class Material:
    """All rows of a run, each list a JSONL file.

    Attributes:
        forget: question, answer (the model's own), substitute (of an invented subject, with the names put back); of a document
            its own exchanges in their form, and passages as question and answer, without a substitute.
        invented: the questions and answers of `forget` with invented names: what cannot be known, for the watch.
        retain: question and answer (the model's own) that must not change.
        probes: form, prompt, wanted words, the answer before, masks (invented names), and `zero`: whether the answer about
            an invented subject holds a wanted word.
        kept_probes: the same for neighbours and general requests, without twins.
        facts: words the model knows.
    """

    forget: list[Row]
    invented: list[Row]
    retain: list[Row]
    probes: list[Row]
    kept_probes: list[Row]
    facts: list[Row]


def exchange(example: Example, name: str) -> Row:
    """Return the row of an exchange, which is about `name`; of a chat with all turns before the answer."""
    if example.kind == "completion":
        # text that goes on, without the chat template of a question
        return {"prompt": example.prompt, "completion": example.answer, "about": name}
    if not example.messages:
        return {"question": example.prompt, "answer": example.answer, "about": name}
    # an earlier answer is an exchange of its own
    before = [{**turn, "weight": 0} if turn["role"] == "assistant" else dict(turn) for turn in example.messages]
    return {"messages": [*before, example.reply or {"role": "assistant", "content": example.answer}], "about": name}
