"""Machine-readable results of a comparison: CSV of the table and of the search, and records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alter.comparison.checks import RETRAINED
from alter.comparison.choice import Choice, cell_figures, chosen_cells, compared, records_of
from alter.comparison.plan import Chain, Layout
from alter.comparison.settings import OWN
from alter.comparison.table import TableRow
from alter.storage import Record, stamped, to_csv


def table_csv(rows: Sequence[TableRow]) -> str:
    """Return the rows as CSV, one line for each method and split, all figures with mean and spread."""
    keys = list(dict.fromkeys(key for row in rows for key in row.mean))
    pairs = [f"{key}{end}" for key in keys for end in ("", "_spread")]
    own = ["rate", "epochs", "keeps_utility", "validation_forgetting", "validation_utility", "cells_done", "cells"]
    lines: list[list[Any]] = [["method", "split", "seeds", *own, "dominated", "dominated_with_fluency", *pairs]]
    for row in rows:
        choice = row.choice
        said: list[Any] = [""] * len(own)
        if choice is not None:
            said = [
                *(choice.setting or ("", "")),
                choice.keeps,
                choice.forgetting,
                choice.utility,
                choice.finished,
                choice.budget,
            ]
        values = [each.get(key, "") for key in keys for each in (row.mean, row.spread)]
        marks = [row.dominated, row.dominated_with_fluency] if choice is not None and row.seeds else ["", ""]
        lines.append([row.name, row.split, row.seeds, *said, *marks, *values])
    return to_csv(lines)


def search_csv(chosen: Mapping[tuple[str, Chain], Choice]) -> str:
    """Return every setting of every search as CSV: forgetting and utility on validation rows, and whether it was chosen."""
    lines: list[list[Any]] = [["method", "splits", "rate", "epochs", "forgetting", "utility", "chosen"]]
    for (name, chain), choice in chosen.items():
        for each in choice.searched:
            figures = ["" if math.isnan(value) else value for value in (each.forgetting, each.utility)]
            lines.append(
                [name, " ".join(chain), each.rate, each.epochs, *figures, (each.rate, each.epochs) == choice.setting]
            )
    return to_csv(lines)


def all_records(made: Layout, chosen: Mapping[tuple[str, Chain], Choice], out: Path) -> list[Record]:
    """Return the records of the chosen settings and of the given models on test rows, without per-row values.

    `extra` says split, seed, rate and epochs, and names the cell's folder, where the single values are.
    """
    cells = [*made.models.values(), *chosen_cells(made, chosen)]
    records: list[Record] = []
    for cell, split in ((each, split) for each in cells for split in each.chain):
        own = records_of(out, cell, "test", split)
        if own is None:
            continue
        setting = cell.setting or (None, None)
        extra = {
            "benchmark": OWN if split == OWN else "tofu",
            "split": split,
            "data": "test",
            "seed": cell.seed,
            "rate": setting[0],
        }
        extra |= {"epochs": setting[1], "cell": cell.key}
        records += [replace(record, model=cell.name, per_item=None, extra=extra) for record in own]
        reference = records_of(out, made.models.get((RETRAINED, split)), "test", split)
        if reference is not None:
            found = cell_figures(own, reference)
            n = compared(own).n
            quality = {"log10": found["forget_quality"], "statistic": found["distance"]}
            p = 10.0 ** found["forget_quality"]
            made_here = Record(cell.name, "forget_quality", p, n, higher_is_better=True, extra=extra | quality)
            records += stamped([made_here])
    return records
