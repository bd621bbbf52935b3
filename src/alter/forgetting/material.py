"""The rows and probes of an `alter forget` run, as its files hold them."""

from __future__ import annotations

from dataclasses import dataclass

from alter.data import Row


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
