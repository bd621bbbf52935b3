"""TOFU's sets: the rows to measure, sampled under a limit, and checked for the columns that their metrics need."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from alter.core import UserError
from alter.data import examples, read_rows, tofu_authors, tofu_rows
from alter.evaluation.figures import Groups

UTILITY_SETS = ("retain", "real_authors", "world_facts")
SETS = ("forget", *UTILITY_SETS)
PARAPHRASED = ("forget", "retain")
SPLITS = ("forget01", "forget05", "forget10")


def _sample(rows: list[dict[str, Any]], limit: int | None, seed: int) -> list[dict[str, Any]]:
    """Return `limit` rows drawn by `seed`, in order, or all of them."""
    if limit is None or limit >= len(rows):
        return rows
    chosen = np.random.default_rng(seed).choice(len(rows), size=limit, replace=False)
    return [rows[i] for i in sorted(chosen)]


def rows_fingerprint(rows: Sequence[dict[str, Any]]) -> str:
    """Hash the rows' questions and answers: what two results must share to be compared item by item.

    A row without TOFU's columns (a holdout's may be a prompt and a completion, or a chat) counts whole.
    """
    keys = ("question", "answer", "paraphrased_answer", "perturbed_answer")
    told = [[row.get(key) for key in keys] if row.get("question") else row for row in rows]
    text = json.dumps(told, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def set_rows(key: str, split: str, data: str, limit: int | None, seed: int) -> list[dict[str, Any]]:
    """Return the rows of one set, checked for the columns that its metrics need."""
    name = f"{split if key == 'forget' else key}_perturbed"
    rows = _sample(tofu_rows(name, data), limit, seed)
    needs = ["question", "answer", "perturbed_answer"] + (["paraphrased_answer"] if key in PARAPHRASED else [])
    for i, row in enumerate(rows):
        missing = [column for column in needs if not row.get(column)]
        if missing:
            raise UserError(
                f"Row {i} of {name} in {data} has no {', '.join(missing)}; it has {', '.join(row)}. "
                "TOFU's metrics need the *_perturbed files, with a paraphrased answer and a list of wrong ones."
            )
    if not rows:
        raise UserError(f"{name} in {data} is empty.")
    counts = {len(row["perturbed_answer"]) for row in rows}
    if len(counts) > 1:
        raise UserError(f"{name} in {data} has rows with {min(counts)} and with {max(counts)} wrong answers.")
    return rows


def set_authors(key: str, rows: Sequence[dict[str, Any]], data: str) -> Groups | None:
    """Return which rows of a set are about one author; None of real authors and world facts, and where nothing tells."""
    if key not in PARAPHRASED:
        return None
    try:
        return Groups.of("author", tofu_authors(rows, data))
    except UserError:
        # rows of one's own in TOFU's form, without `full`
        return Groups.of("author", [row.get("author") for row in rows])


def holdout_rows(
    split: str, data: str, holdout: str | None, limit: int | None, seed: int
) -> tuple[list[dict[str, Any]] | None, list[str]]:
    """Return the rows that no model has seen, or None and a note that says how to give some.

    Raises:
        UserError: rows were named but are not there, or some of them are in one of TOFU's sets.
    """
    name = f"holdout{split.removeprefix('forget')}"
    if holdout is None:
        try:
            rows = tofu_rows(name, data)
        except UserError as error:
            return None, [
                f"No membership attacks (mia_*, privleak): they need rows that the model never saw, TOFU's {name} or "
                f"your own: `holdout` rows.jsonl. {error}"
            ]
    else:
        rows = read_rows(holdout)
    seen = {(row["question"], row["answer"]): key for key in SETS for row in set_rows(key, split, data, None, seed)}
    for example in examples(rows):
        key = seen.get((example.prompt, example.answer))
        if key is not None:
            raise UserError(
                f"Row {example.index} of the holdout {holdout or name!r} is in the {key} set, which a model "
                "may have seen. Membership attacks need rows that it never saw."
            )
    return _sample(rows, limit, seed), []
