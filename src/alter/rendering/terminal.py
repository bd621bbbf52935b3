"""Result records as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from alter.core import cell
from alter.metrics import CATALOGUE, catalogue
from alter.rendering.fitted import FittedTable
from alter.settings import rounded
from alter.storage import Record

ARROWS = {True: "↑", False: "↓", None: ""}


def number(record: Record) -> str:
    """Format a record's value: three decimals, or an exponent; a dash for none."""
    if record.value is None:
        return "-"
    if record.metric == "privleak":
        return rounded(record.value, ".1f")
    return f"{record.value:.3f}" if record.value == 0 or abs(record.value) >= 0.001 else f"{record.value:.2e}"


def half(record: Record) -> str:
    """Format ± half the width of a record's 95 % interval; empty for a record without one."""
    # an end that is not finite is null in JSON
    if record.value is None or None in (record.extra.get("interval") or [None]):
        return ""
    low, high = record.extra["interval"]
    if record.metric == "privleak":
        return f"±{(high - low) / 2:.1f}"
    return f"±{(high - low) / 2:.3f}" if high - low >= 0.001 else f"±{(high - low) / 2:.0e}"


def between(record: Record) -> str:
    """Format a record's 95 % interval in brackets; empty for a record without one."""
    # an end that is not finite is null in JSON
    if record.value is None or None in (record.extra.get("interval") or [None]):
        return ""
    digits = 1 if record.metric == "privleak" else 3
    low, high = (
        rounded(end, f".{digits}f") if end == 0 or abs(end) >= 0.001 else f"{end:.0e}"
        for end in record.extra["interval"]
    )
    return f"[{low}, {high}]"


def drawn(records: Iterable[Record], items: str = "rows") -> str:
    """Say what the 95 % intervals of records draw: `items`, or all rows of a subject together."""
    columns = sorted({record.extra["interval_over"] for record in records if record.extra.get("interval_over")})
    if not columns:
        return items
    return f"{items}, of which those of one {' or '.join(columns)} are drawn together (not for AUCs and leak@k)"


def in_order(records: Iterable[Record]) -> dict[str, Record]:
    """Return the last record of each metric, in the catalogue's order; metrics outside it come last, as they were met."""
    found = {record.metric: record for record in records}
    known = {metric: found[metric] for metric in CATALOGUE if metric in found}
    return known | {metric: record for metric, record in found.items() if metric not in known}


def table(records_by_model: Mapping[str, Sequence[Record]], title: str | None = None) -> FittedTable:
    """Return a table with one row per metric and one column per model, in the order of the mapping.

    An arrow shows the good direction; metrics without one are explained by their meaning. ± is half the 95 % interval of
    figures that have one, on a line of its own where there are three models or more. A dash stands for a figure that a model
    has no record of. Metrics outside the catalogue come last, in the order of their first record.
    """
    by_model = {model: {record.metric: record for record in rows} for model, rows in records_by_model.items()}
    found = in_order(record for rows in by_model.values() for record in rows.values())
    modes = sorted({record.mode for record in found.values()})
    wide = "\n" if len(by_model) > 2 else " "
    caption = f"{', '.join(modes)} mode; ↑ ↓ = the better direction" if modes else None
    if caption and any(half(record) for record in found.values()):
        caption += (
            f"; ± half the 95 % interval over {drawn(one for rows in by_model.values() for one in rows.values())}"
        )
    shown = FittedTable(title=title and cell(title), caption=caption)
    shown.add_column("metric")
    for model in by_model:
        shown.add_column(cell(model), justify="right", no_wrap=True)
    shown.add_column("what it says", style="dim")
    for metric in found:
        own = [rows.get(metric) for rows in by_model.values()]
        values = ["-" if one is None else f"{number(one)}{wide}{half(one)}".rstrip() for one in own]
        meaning = catalogue.meaning_of(metric)
        shown.add_row(cell(f"{metric} {ARROWS[found[metric].higher_is_better]}".strip()), *values, meaning)
    return shown
