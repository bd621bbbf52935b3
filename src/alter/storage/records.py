"""Result records: one figure each, with what it was measured on; writing and reading them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from alter.core import UserError, memory
from alter.storage.files import from_json, read_object, read_text, to_json, write_atomic

VERSION = 1
"""Version of the metric definitions; a record of another version is refused when records are read."""


@dataclass(frozen=True)
class Record:
    """One measured number: of which model, which metric, over how many items, in which mode.

    `mode` is "strict" (what the definition says) or "compat" (the numbers of OpenUnlearning, quirks included).
    `per_item` holds the value of every item where the metric has one; `extra` what belongs to this number alone
    (for a p-value its statistic and log10). `higher_is_better` is None where neither direction is better by itself.
    `provenance` says how it came about (see `stamped`): with it, a record taken out of its file still speaks for itself.
    """

    model: str
    metric: str
    value: float | None
    n: int
    mode: str = "strict"
    higher_is_better: bool | None = None
    per_item: list[float] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION
    provenance: dict[str, Any] = field(default_factory=dict)


def write_records(path: str | os.PathLike[str], records: Sequence[Record]) -> None:
    """Write records as a JSON list of objects, atomically, for their owner alone: they may hold what was to be forgotten."""
    write_atomic(path, to_json([asdict(record) for record in records]), private=True)


def _records(rows: Any, source: str) -> list[Record]:
    """Return the records that a JSON list holds; null among the items of a record is NaN, which JSON cannot write."""
    known = {each.name for each in fields(Record)}
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"model", "metric"} <= set(row) for row in rows
    ):
        raise UserError(
            f"{source} does not hold result records; expected the list of objects that `alter evaluate --json` writes."
        )
    for row in rows:
        version = row.get("version")
        if version != VERSION:
            said = "no version" if version is None else f"version {version}"
            raise UserError(f"{source} holds metrics of {said}, this is version {VERSION}: evaluate again.")
        wrong = [*(set(row) - known), *({"value", "n"} - set(row))]
        if wrong:
            raise UserError(
                f"{source}: the record of {row['metric']} has an unknown or no {wrong[0]!r}: evaluate again."
            )
    return [
        Record(**row | {"per_item": [math.nan if x is None else x for x in row["per_item"]]})
        if row.get("per_item") is not None
        else Record(**row)
        for row in rows
    ]


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Read what `write_records` wrote, or return records that are held in memory under this name.

    Raises:
        UserError: the file is missing, not JSON, not a list of records, or of another version of the metrics.
    """
    if (held := memory.held(str(path))) is not None:
        return list(held)
    if not os.path.exists(path):
        raise UserError(f"No result file at {path}.")
    text = read_text(path)
    try:
        rows = from_json(text)
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}); expected records as `alter evaluate --json` writes them."
        ) from None
    return _records(rows, str(path))


def read_run(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a finished run's `run.json`; its `settings` are an object.

    Raises:
        UserError: there is none, it is not JSON, or not what a run writes.
    """
    path = Path(folder) / "run.json"
    expected = "what `alter unlearn` or `alter forget` writes at the end of a run"
    if not path.is_file():
        raise UserError(f"{folder} is no finished run: it has no run.json. Expected {expected}.")
    found = read_object(path, expected)
    if not isinstance(found.get("settings"), dict):
        raise UserError(f"{path} has no settings; expected {expected}.")
    return found
