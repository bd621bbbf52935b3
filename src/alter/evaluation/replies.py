"""Helpers of question benchmarks: rows with required columns, open prompts, and replies cut at a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from alter import metrics
from alter.core import Array, UserError, nearest
from alter.data import Encoded, Row
from alter.evaluation.base import Evaluation
from alter.inference import context_length, score


def cut_reply(reply: str, stops: Iterable[str]) -> str:
    """Return the text before the first stop string; a reply that begins with one is empty."""
    for stop in stops:
        reply = reply.split(stop)[0]
    return reply


class CutReplies:
    """A tokenizer that cuts decoded replies at stop strings, before `generate` strips them and hides a leading one."""

    def __init__(self, tokenizer: Any, stops: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: Any, **settings: Any) -> str:
        """Decode, and cut."""
        return cut_reply(self._tokenizer.decode(ids, **settings), self._stops)


def open_ids(tokenizer: Any, text: str) -> list[int]:
    """Return a prompt's tokens without the end token that some tokenizers append."""
    ids = list(tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def sampled(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    """Return `limit` rows drawn by `seed`, in order, or all of them."""
    if limit is None or limit >= len(rows):
        return rows
    chosen = np.random.default_rng(seed).choice(len(rows), size=limit, replace=False)
    return [rows[i] for i in sorted(chosen)]


def required(rows: Sequence[Row], columns: Sequence[str], name: str, data: str) -> list[Row]:
    """Return rows with the columns that are needed and only those.

    Raises:
        UserError: a row lacks one, or has no text in it; names the columns that it has.
    """
    for i, row in enumerate(rows):
        for column in columns:
            value = row.get(column)
            if not isinstance(value, str) or not value.strip():
                what = (
                    "no" if value is None else "an empty" if isinstance(value, str) else f"a {type(value).__name__} as"
                )
                raise UserError(
                    f"Row {i} of {name} in {data} has {what} {column!r}; it has {', '.join(map(str, row))}."
                    f"{nearest(column, [str(key) for key in row if key not in columns])} Expected "
                    f"{' and '.join(columns)}, each a text."
                )
    return [{column: row[column] for column in columns} for row in rows]


def by_group(groups: Sequence[str], values: Any) -> dict[str, float]:
    """Return the mean of values by group, in the groups' order."""
    return {
        group: float(np.mean([v for g, v in zip(groups, values, strict=True) if g == group]))
        for group in sorted(set(groups))
    }


def text_losses(
    settings: Evaluation, model: Any, tokenizer: Any, texts: Sequence[str], label: str
) -> tuple[Array, int]:
    """Return the mean loss per token of each text, [n], cut to the model's context, and how many were cut."""
    limit = context_length(model)
    ids = [list(tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]) for text in texts]
    cut = 0 if limit is None else sum(len(each) > limit for each in ids)
    encoded = [Encoded(each[:limit], [-100, *each[1:limit]], 1) for each in ids]
    found = score(
        model, encoded, pad_token_id=tokenizer.pad_token_id, batch_tokens=settings.batch_tokens, label=label
    ).logprob
    return metrics.likelihood.average_loss(found), cut
