"""The rows of a comparison: validation rows, on which settings are chosen, test rows, for the table, and rows to keep."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from alter.comparison.settings import Compare
from alter.core import UserError
from alter.data import read_rows, tofu_rows
from alter.evaluation import SETS

PARTS = ("validation", "test")
RETAIN_SPLITS = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}


def divide(
    rows: Sequence[Mapping[str, Any]], group: Sequence[Any], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Divide rows into validation and test rows so that no group has rows in both.

    The groups, in the order of their first row, are shuffled by `random.Random(seed)`; the first round(share x number of
    groups) of them, but at least one and not all, are validation.

    Args:
        rows: the rows, [n].
        group: what each belongs to, [n]: its author.

    Returns:
        row numbers of the validation part and of the test part, each in order.

    Raises:
        UserError: there is one group only.
    """
    names = list(dict.fromkeys(group))
    if len(names) < 2:
        raise UserError(f"All {len(rows)} rows belong to one author: none would be left for the table.")
    random.Random(seed).shuffle(names)
    chosen = set(names[: min(max(1, round(share * len(names))), len(names) - 1)])
    parts: tuple[list[int], list[int]] = ([], [])
    for i, name in enumerate(group):
        parts[name not in chosen].append(i)
    return parts


def evaluation_rows(settings: Compare, split: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Divide the rows of TOFU's evaluation sets: by part, then by the name of TOFU's file.

    Rows are grouped by author, which is their place in `full` // 20 (found by question and answer); a row that is not in
    `full` (real authors, world facts, holdout) is a group of its own answer.
    """
    full = {(row["question"], row["answer"]): row.get("author") for row in tofu_rows("full", settings.data)}
    sets = {
        f"{split if key == 'forget' else key}_perturbed": [
            {name: value for name, value in row.items() if name != "author"}
            for row in tofu_rows(f"{split if key == 'forget' else key}_perturbed", settings.data)
        ]
        for key in SETS
    }
    if settings.holdout is not None:
        sets[f"holdout{split.removeprefix('forget')}"] = read_rows(settings.holdout)
    out: dict[str, dict[str, list[dict[str, Any]]]] = {part: {} for part in PARTS}
    for name, rows in sets.items():
        for i, row in enumerate(rows):
            if not row.get("question") or not row.get("answer"):
                raise UserError(f"Row {i} of {name} has no question or no answer; it has {', '.join(row)}.")
        group = [
            full[pair] if full.get(pair) is not None else pair[1]
            for pair in ((row["question"], row["answer"]) for row in rows)
        ]
        for part, numbers in zip(PARTS, divide(rows, group, settings.validation, settings.division_seed), strict=True):
            out[part][name] = [rows[i] for i in numbers]
    return out


def retain_source(settings: Compare, split: str) -> str:
    """Return the source of the rows to keep while `split` is forgotten."""
    return settings.retain or f"{settings.data}:{RETAIN_SPLITS[split]}"
