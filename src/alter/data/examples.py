"""Rows brought to one form, and the check that nothing is in both the forget set and the retain set."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alter.core.errors import UserError, nearest
from alter.data.sources import read_rows


@dataclass(frozen=True)
class Example:
    """One thing to learn, keep or forget.

    `prompt` is the user turn of a question or completion row (for `messages` the last user turn, for raw text None);
    `answer` the labelled text: answer, completion, last assistant turn, or the text itself. `messages` holds the turns
    before the labelled one, `row` all original columns (paraphrased and perturbed answers, for instance), `index` the
    row's number in its source.
    """

    prompt: str | None
    answer: str
    kind: str
    messages: tuple[dict[str, str], ...] = ()
    domain: str | None = None
    index: int = 0
    row: dict[str, Any] = field(default_factory=dict, compare=False)


# ---------------------------------------------------------------------------------------------------------------------
# Examples

COLUMNS: dict[str, tuple[str, ...]] = {
    "qa": ("question", "answer"),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
"""Columns that make each kind of example, in the order they are looked for."""


def _row_list(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:10])
    return shown if len(numbers) <= 10 else f"{shown}, ... ({len(numbers)} rows)"


def examples(rows: Sequence[Mapping[str, Any]], *, domain_column: str | None = None) -> list[Example]:
    """Bring rows to `Example`s; row numbers in messages count from 0.

    The columns of the first row decide the kind: `question` and `answer`, `prompt` and `completion`, `messages` (a
    list of role and content, the last one by the assistant), or `text`.

    Args:
        rows: rows as `read_rows` gives them.
        domain_column: column whose value (as a string) labels the sub-domain.

    Raises:
        UserError: no rows, no known columns, a row without an answer, or no such domain column.
    """
    if not rows:
        raise UserError("There are no rows; expected at least one.")
    kind = next((kind for kind, columns in COLUMNS.items() if set(columns) <= set(rows[0])), None)
    if kind is None:
        choices = "; ".join(" and ".join(columns) for columns in COLUMNS.values())
        raise UserError(f"Columns {', '.join(map(repr, rows[0]))} are not a known kind of row; expected {choices}.")
    if domain_column is not None:
        without = [number for number, row in enumerate(rows) if row.get(domain_column) is None]
        if len(without) == len(rows):
            near = nearest(domain_column, rows[0])
            raise UserError(f"No column {domain_column!r}.{near} Columns: {', '.join(map(repr, rows[0]))}.")
        if without:
            raise UserError(f"Rows {_row_list(without)} have no value in the domain column {domain_column!r}.")
    for column in COLUMNS[kind]:
        empty = [n for n, row in enumerate(rows) if not row.get(column) or not str(row[column]).strip()]
        if empty:
            raise UserError(f"Rows {_row_list(empty)} have no {column!r}; give one or take these rows out.")
        wrong = [n for n, row in enumerate(rows) if not isinstance(row[column], list if kind == "messages" else str)]
        if wrong:
            expected = "list of messages" if kind == "messages" else "text"
            raise UserError(f"Rows {_row_list(wrong)} hold no {expected} in {column!r}.")
    result = []
    for number, row in enumerate(rows):
        prompt: str | None
        messages: tuple[dict[str, str], ...] = ()
        if kind == "messages":
            turns = row["messages"]
            if not all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in turns):
                raise UserError(f"Row {number} has a message without role and content.")
            if turns[-1]["role"] != "assistant" or len(turns) < 2 or not str(turns[-1]["content"]).strip():
                raise UserError(f"Row {number} does not end with an assistant's answer to an earlier message.")
            messages = tuple({"role": turn["role"], "content": turn["content"]} for turn in turns[:-1])
            prompt = next((turn["content"] for turn in reversed(messages) if turn["role"] == "user"), None)
            answer = turns[-1]["content"]
        elif kind == "text":
            prompt, answer = None, row["text"]
        else:
            prompt, answer = (row[column] for column in COLUMNS[kind])
        domain = None if domain_column is None else str(row[domain_column])
        result.append(Example(prompt, answer, kind, messages, domain, number, dict(row)))
    return result


def load_examples(source: str, *, split: str | None = None, domain_column: str | None = None) -> list[Example]:
    """Read `source` and bring its rows to examples.

    `source` is what `read_rows` takes: "builtin:forget10", "locuslab/TOFU:forget10", "rows.jsonl", "folder:forget10".
    """
    return examples(read_rows(source, split), domain_column=domain_column)


def _normal(text: str | None) -> str:
    """Case, width of characters and spacing do not make two rows different."""
    return " ".join(unicodedata.normalize("NFKC", text or "").casefold().split())


def row_key(example: Example) -> tuple[str, str]:
    """What makes two rows the same: prompt (or earlier turns) and answer, apart from case, spacing and Unicode width."""
    context = " ".join(turn["content"] for turn in example.messages) if example.messages else example.prompt
    return _normal(context), _normal(example.answer)


def check_overlap(forget: Sequence[Example], retain: Sequence[Example]) -> None:
    """Refuse data in which a row is to be forgotten and kept: the two losses would fight over it.

    Rows are equal if prompt and answer (or the text) are, apart from case, spacing and Unicode width.

    Raises:
        UserError: lists the offending rows.
    """
    kept: dict[tuple[str, str], Example] = {}
    for example in retain:
        kept.setdefault(row_key(example), example)
    shared = [(example, kept[row_key(example)]) for example in forget if row_key(example) in kept]
    if shared:
        listed = "; ".join(
            f"forget row {f.index} = retain row {r.index} ({(f.prompt or f.answer)[:60]!r})" for f, r in shared[:5]
        )
        more = f"; and {len(shared) - 5} more" if len(shared) > 5 else ""
        raise UserError(f"{len(shared)} rows are in both forget and retain: {listed}{more}. Take them out of one.")
