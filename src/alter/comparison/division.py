"""The rows of a comparison: validation rows, on which settings are chosen, test rows, for the table, and rows to keep."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alter.comparison.own import FORGET, HOLDOUT, RETAIN
from alter.comparison.settings import OWN, Compare
from alter.core import UserError, memory
from alter.data import check_overlap, load_examples, read_rows, tofu_authors, tofu_rows
from alter.evaluation import SETS
from alter.storage import write_atomic

PARTS = ("validation", "test")
MOST_KEPT = 200
"""Most rows to keep of one's own that a part measures."""
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
        raise UserError(
            f"All {len(rows)} rows belong together (one author, one row): none would be left for the table."
        )
    random.Random(seed).shuffle(names)
    chosen = set(names[: min(max(1, round(share * len(names))), len(names) - 1)])
    parts: tuple[list[int], list[int]] = ([], [])
    for i, name in enumerate(group):
        parts[name not in chosen].append(i)
    return parts


def evaluation_rows(settings: Compare, split: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Divide the rows of the evaluation sets: by part, then by the name of their file, TOFU's or the set's of `_own_rows`.

    TOFU's rows are grouped by author, which is their place in `full` // 20 (found by question and answer); a row that is not in
    `full` (real authors, world facts, holdout) is a group of its own answer.
    """
    if split == OWN:
        return _own_rows(settings)
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
        authors = tofu_authors(rows, settings.data)
        group = [row["answer"] if author is None else author for row, author in zip(rows, authors, strict=True)]
        for part, numbers in zip(PARTS, divide(rows, group, settings.validation, settings.division_seed), strict=True):
            # intervals draw whole authors, whom nobody would find in a part
            out[part][name] = [rows[i] | ({} if authors[i] is None else {"author": authors[i]}) for i in numbers]
    return out


def _own_rows(settings: Compare) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Divide rows of one's own: those to forget, those to keep (as many, but 20 at least and `MOST_KEPT` at most, drawn by the seed of
    the division), and the holdout.

    Rows with the same value of `common.domain_column` stay together, where it is given and they have it, as do the turns of a chat.

    Raises:
        UserError: a source cannot be read, rows are to be forgotten and to be kept or are in the holdout too, or all rows of a
            set belong together.
    """
    given = {FORGET: settings.forget, RETAIN: settings.retain, HOLDOUT: settings.holdout}
    sets = {of: load_examples(source) for of, source in given.items() if source is not None}
    check_overlap(sets[FORGET], sets[RETAIN])
    for of in (FORGET, RETAIN):
        # what was trained on is no holdout
        check_overlap(sets.get(HOLDOUT, []), sets[of])
    column = settings.common.get("domain_column")
    out: dict[str, dict[str, list[dict[str, Any]]]] = {part: {} for part in PARTS}
    for of, rows in sets.items():
        group = [row.row.get(column, row.index) if column else row.index for row in rows]
        divided = divide([row.row for row in rows], group, settings.validation, settings.division_seed)
        for part, numbers in zip(PARTS, divided, strict=True):
            kept = numbers
            if of == RETAIN:
                most = min(MOST_KEPT, max(20, len(out[part][FORGET])))
                kept = sorted(random.Random(settings.division_seed).sample(numbers, min(most, len(numbers))))
            out[part][of] = [rows[i].row for i in kept]
    return out


def with_files(settings: Compare, out: Path) -> Compare:
    """Return settings in which rows in memory are files in `out`/rows, called by their contents: cells run in other processes, and
    the same rows are the same cells again."""
    files: dict[str, str] = {}
    for name in (FORGET, RETAIN, HOLDOUT):
        source = getattr(settings, name)
        if source is not None and source.startswith(memory.PREFIX):
            file = out / "rows" / f"{source.removeprefix(memory.PREFIX)}.jsonl"
            write_atomic(file, json_lines(read_rows(source)), private=True)
            files[name] = str(file)
    return settings.model_copy(update=files)


def json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as JSON lines; what is no JSON, a date, as its text."""
    return "".join(json.dumps(row, default=str) + "\n" for row in rows)


def forget_set(split: str) -> str:
    """Return the name of the file of a part's rows to forget, without its ending."""
    return FORGET if split == OWN else f"{split}_perturbed"


def forget_source(settings: Compare, split: str) -> str:
    """Return the source of the rows to forget."""
    return str(settings.forget) if split == OWN else f"{settings.data}:{split}"


def forget_rows(settings: Compare, split: str) -> list[dict[str, Any]]:
    """Return the rows to forget, all of them: what a run trains on."""
    if split == OWN:
        return [row.row for row in load_examples(str(settings.forget))]
    return tofu_rows(split, settings.data)


def retain_source(settings: Compare, split: str) -> str:
    """Return the source of the rows to keep while `split` is forgotten."""
    return settings.retain or f"{settings.data}:{RETAIN_SPLITS[split]}"
