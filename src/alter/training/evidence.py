"""The rows that the router is fitted on (forget, retain, reworded, ordinary text), and the evidence of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from alter.adapter import pool
from alter.data import FITTED, Encoded, Example, apart_from, encode, reworded, rewording
from alter.data.background import background
from alter.groundwork import frozen

if TYPE_CHECKING:
    from alter.training.batches import RunRows
    from alter.training.settings import Unlearn


AFTER_TEXT = 800
"""Characters of other text before a question, in the fit."""

OWN_WORDS = "own words"
"""Name of retain rows that the model itself has written."""


@dataclass
class FitRows:
    """Rows of one kind for the fit: encoded, as the frozen base sees them, with the expert that each should open (0: none).

    `of` numbers the rows; another wording of a row has its number. `wordings` names each row's wording.
    """

    name: str
    rows: list[Encoded]
    labels: list[int]
    traced: list[frozen.FrozenRow] = field(default_factory=list)
    of: list[int] = field(default_factory=list)
    wordings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.of = self.of or list(range(len(self.rows)))
        self.wordings = self.wordings or [rewording.AS_GIVEN] * len(self.rows)

    def add(self, made: Sequence[tuple[int, str, Encoded]], labels: Sequence[int]) -> None:
        """Append other wordings of rows: number of the row, name of the wording, encoded row."""
        self.rows += [row for *_, row in made]
        self.of += [of for of, *_ in made]
        self.wordings += [wording for _, wording, _ in made]
        self.labels += labels

    @property
    def ordinary(self) -> bool:
        """Whether the rows are ordinary text, for which no expert should open."""
        return not any(self.labels)


def _within(encoded: Sequence[Encoded], limit: int, generator: np.random.Generator) -> list[int]:
    """Draw rows at random until they hold `limit` tokens."""
    chosen, total = [], 0
    for i in generator.permutation(len(encoded)).tolist():
        if total >= limit:
            break
        chosen.append(i)
        total += len(encoded[i].input_ids)
    return chosen


def encode_fitting(tokenizer: Any, examples: Sequence[Example | None], limit: int | None) -> list[Encoded | None]:
    """Encode examples; an example that is None or exceeds `limit` tokens gives None."""
    found: list[Encoded | None] = []
    for example in examples:
        row = None
        if example is not None:
            row = encode(tokenizer, example)
            if limit is not None and len(row.input_ids) > limit:
                row = None if example.kind != "text" else encode(tokenizer, example, max_length=limit)
        found.append(row)
    return found


def text_of(example: Example) -> str:
    """Return prompt and answer as one text, to look for names in."""
    return f"{example.prompt or ''}, {example.answer}"


def fit_rows(
    run: Unlearn, rows: RunRows, tokenizer: Any, limit: int | None, generator: np.random.Generator
) -> list[FitRows]:
    """Assemble the router's fit: forget rows, retain rows, rewordings of both, and ordinary text by kind."""
    fit = run.router_fit
    own = _within(rows.forget, fit.max_tokens // 2, generator)
    # an expert of whose rows none was drawn could not be fitted
    first = {expert: i for i, expert in reversed(list(enumerate(rows.expert)))}
    own += sorted(first[expert] for expert in first.keys() - {rows.expert[i] for i in own})
    left = max(1, fit.max_tokens - sum(len(rows.forget[i].input_ids) for i in own))
    kept = _within(rows.retain, left, generator)
    forget = FitRows("forget", [rows.forget[i] for i in own], [rows.expert[i] for i in own])
    # no one has said of them what share may open an expert: they join the fit alone
    name = OWN_WORDS if run.retain is None else "retain"
    retain = FitRows(name, [rows.retain[i] for i in kept], [0] * len(kept))
    parts = [forget, retain]
    ordinary = apart_from(background(), [text_of(e) for e in rows.examples]) if fit.background else {}
    texts = [e.answer for kind in ("prose", "facts", "code", "languages") for e in ordinary.get(kind, ())] or [""]

    def in_other_words(examples: Sequence[Example], times: int, most: int) -> list[tuple[int, str, Encoded]]:
        asked: list[Example | None] = []
        places: list[tuple[int, str]] = []
        for place, example in enumerate(examples):
            if example.prompt is None:
                continue
            for name in generator.permutation(sorted(FITTED))[:times].tolist():
                other = texts[int(generator.integers(len(texts)))][:AFTER_TEXT]
                asked.append(reworded(example, FITTED[name](example.prompt, place, other)))
                places.append((place, name))
        encoded = encode_fitting(tokenizer, asked, limit)
        made = [(*place, row) for place, row in zip(places, encoded, strict=True) if row is not None]
        return [made[i] for i in _within([row for *_, row in made], most, generator)]

    if fit.rewordings and rows.examples:
        made = in_other_words([rows.examples[i] for i in own], fit.rewordings, fit.max_tokens // 4)
        forget.add(made, [rows.expert[own[of]] for of, *_ in made])
    for kind, examples in ordinary.items():
        encoded = [row for row in encode_fitting(tokenizer, examples, limit) if row is not None]
        part = FitRows(kind, encoded, [0] * len(encoded))
        if fit.rewordings and kind == "questions":
            made = in_other_words(examples, 1, fit.max_tokens // 4)
            part.add(made, [0] * len(made))
        parts.append(part)
    return [part for part in parts if part.rows]


@dataclass
class Evidence:
    """Evidence of one kind: evidence x [T, D], expert y [T], whether low-entropy [T], the row of each [T], and the number of
    its wording [T]."""

    name: str
    x: Tensor
    y: Tensor
    low: Tensor
    row: Tensor
    wording: Tensor

    def part(self, chosen: Tensor) -> Evidence:
        """Return the chosen tokens alone."""
        columns = (column[chosen] for column in (self.x, self.y, self.low, self.row, self.wording))
        return Evidence(self.name, *columns)


def evidence_of(part: FitRows, threshold: float, memory: float, answers: bool = True) -> Evidence:
    """Return the evidence that routes each token of a kind; a row's first token has none and is never routed."""
    x, y, low, of, wording = [], [], [], [], []
    names = sorted(set(part.wordings))
    for place, (encoded, row, label) in enumerate(zip(part.rows, part.traced, part.labels, strict=True)):
        assert row.entropy is not None
        # a question's first words and a chat template's say nothing of the subject: its answer's evidence holds them all
        start = max(1, encoded.prompt_length) if label and answers else 1
        evidence = row.entropy[:, None] if row.features is None else row.features.float()
        x.append(pool(evidence[None, 1:], torch.ones(1, len(evidence) - 1), memory)[0, start - 1 :])
        y.append(torch.full((len(x[-1]),), label))
        low.append(row.entropy[start:] <= threshold)
        of.append(torch.full((len(x[-1]),), part.of[place]))
        wording.append(torch.full((len(x[-1]),), names.index(part.wordings[place])))
    return Evidence(part.name, *map(torch.cat, (x, y, low, of, wording)))


def standard(x: Tensor, at_once: int = 256) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (n - 1) of each column of x [T, D], the latter at least 1e-6.

    `Tensor.std` over rows takes fifteen times as long on a CPU: as long as a sixth of all that is done before the first step.
    """
    mean = x.mean(0)
    squares = torch.zeros_like(mean)
    for part in x.split(at_once):
        squares += (part - mean).square().sum(0)
    return mean, (squares / max(len(x) - 1, 1)).sqrt().clamp_min(1e-6)
