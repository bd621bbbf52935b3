"""Result records as a table that a person can read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from alter.core.console import cell
from alter.core.records import Record
from alter.metrics.catalogue import CATALOGUE

ARROWS = {True: "↑", False: "↓", None: ""}


def number(record: Record) -> str:
    """Return a record's value as it is shown: three digits behind the point, or an exponent; a dash for none."""
    if record.value is None:
        return "-"
    if record.metric == "privleak":
        return f"{record.value:.1f}"
    return f"{record.value:.3f}" if record.value == 0 or abs(record.value) >= 0.001 else f"{record.value:.2e}"


def in_order(records: Iterable[Record]) -> dict[str, Record]:
    """Return the last record of each metric, in the catalogue's order; metrics outside it come last, as they were met."""
    found = {record.metric: record for record in records}
    known = {metric: found[metric] for metric in CATALOGUE if metric in found}
    return known | {metric: record for metric, record in found.items() if metric not in known}


def table(records_by_model: Mapping[str, Sequence[Record]], title: str | None = None) -> Table:
    """Return a table with one row per metric and one column per model, in the order of the mapping.

    An arrow shows the good direction; metrics without one are explained by their meaning. A dash stands for a figure
    that a model has no record of. Metrics outside the catalogue come last, in the order of their first record.
    """
    by_model = {model: {record.metric: record for record in rows} for model, rows in records_by_model.items()}
    found = in_order(record for rows in by_model.values() for record in rows.values())
    modes = sorted({record.mode for record in found.values()})
    shown = Table(
        title=title and cell(title), caption=f"{', '.join(modes)} mode; ↑ ↓ = the better direction" if modes else None
    )
    shown.add_column("metric", no_wrap=True)
    for model in by_model:
        shown.add_column(cell(model), justify="right", no_wrap=True)
    shown.add_column("what it says", style="dim")
    for metric in found:
        values = [number(rows[metric]) if metric in rows else "-" for rows in by_model.values()]
        meaning = CATALOGUE[metric].meaning if metric in CATALOGUE else ""
        shown.add_row(cell(f"{metric} {ARROWS[found[metric].higher_is_better]}".strip()), *values, meaning)
    return shown
