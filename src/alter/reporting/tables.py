"""Tables of records: one run's figures by model, and several runs side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from alter.metrics import catalogue
from alter.rendering import ARROWS, Html, between, drawn, duration, grid, in_order, join, number, tag
from alter.reporting.runs import ROLES, Reported
from alter.reporting.verdict import headline
from alter.storage import Record


def sizes(rows: Sequence[Record | None]) -> str:
    """Return what figures are of: one number, or where it is not the same for all of them each one's, a dash for none."""
    found = [None if record is None else record.n for record in rows]
    alike = len(set(found) - {None}) < 2
    return " / ".join(
        "-" if n is None else str(n) for n in ([n for n in found if n is not None][:1] if alike else found)
    )


def with_interval(record: Record) -> object:
    """Format a record's value with its 95 % interval, where it has one."""
    ends = between(record)
    return join([number(record), tag("span", f" {ends}", class_="soft small")]) if ends else number(record)


def record_tables(columns: Mapping[str, Sequence[Record]], *, label: str, reference: str | None = None) -> list[Html]:
    """Make a table of records for each mode: a row for each metric, a column for each model, the reference set off."""
    found = []
    modes = sorted({r.mode for rows in columns.values() for r in rows}, reverse=True)
    for mode in modes:
        own = {name: {r.metric: r for r in rows if r.mode == mode} for name, rows in columns.items()}
        own = {name: rows for name, rows in own.items() if rows}
        order = in_order(r for rows in own.values() for r in rows.values())
        names = [f"{name} (reference)" if name == reference else name for name in own]
        rows = []
        for metric, record in order.items():
            cells = [rows.get(metric) for rows in own.values()]
            meaning = catalogue.meaning_of(metric)
            shown = ["-" if cell is None else with_interval(cell) for cell in cells]
            # a narrow screen breaks a long name between its words
            name = f"{metric}\u00a0{ARROWS[record.higher_is_better]}".strip()
            rows.append([join(name.split("_"), join(["_", tag("wbr")])), *shown, sizes(cells), meaning])
        place = list(own).index(reference) + 1 if reference in own else None
        caption = f"{mode} mode. ↑ ↓ point in the better direction; n: items that a figure is of, by column where they differ; -: not "
        over = drawn((r for rows in own.values() for r in rows.values()), "items")
        caption += (
            f"measured. In brackets the 95 % interval over {over}; a p-value and what is no mean over items have none."
        )
        found.append(
            grid(
                ["metric", *names, "n", "what it says"], rows, label=f"{label}, {mode} mode", caption=caption,
                numbers=range(1, len(own) + 2), reference=place, wide=[len(own) + 2],
            )
        )  # fmt: skip
    return found


def by_model(run: Reported) -> dict[str, list[Record]]:
    """Group records by model: unlearned, which a narrow screen shows first, original, retrained, then those of other names."""
    names = list(dict.fromkeys(r.model for r in run.records))
    order = [role for role in ("unlearned", "original", "retrained") if role in names] + [
        name for name in names if name not in ROLES
    ]
    return {name: [r for r in run.records if r.model == name] for name in order}


def figures(run: Reported) -> list[Html]:
    """Return the section with all figures of a run, a table for each mode."""
    notes = [tag("p", note, class_="small soft") for note in run.notes]
    said = "The retrained model never saw the data: it is what perfect forgetting would look like." * bool(
        any(r.model == "retrained" for r in run.records)
    )
    intro = [tag("p", said)] if said else []
    return [*intro, *record_tables(by_model(run), label="Figures", reference="retrained"), *notes]


def side_by_side(runs: Sequence[Reported]) -> list[Html]:
    """Compare several runs: the unlearned models, beside the original and the retrained ones."""
    columns: dict[str, list[Record]] = {}

    def shared(role: str) -> None:
        own = {run.name: [r for r in run.records if r.model == role] for run in runs}
        own = {name: rows for name, rows in own.items() if rows}
        values = {json.dumps(sorted([r.metric, r.mode, str(r.value), r.n] for r in rows)) for rows in own.values()}
        if len(values) == 1:
            columns[role] = next(iter(own.values()))
        else:
            columns.update({f"{role} of {name}": rows for name, rows in own.items()})

    shared("original")
    for run in runs:
        columns[run.name] = [r for r in run.records if r.model == "unlearned"]
    shared("retrained")
    facts = [
        [
            run.name,
            run.settings["model"],
            run.settings["forget"],
            headline(run),
            run.facts["steps"],
            duration(sum(float(value) for value in run.facts["seconds"].values())),
        ]
        for run in runs
    ]
    head = ["run", "model", "to forget", "did it forget?", "steps", "took"]
    shown = [grid(head, facts, label="The runs", numbers=[4], wide=[3])]
    return shown + record_tables(columns, label="Figures of all runs", reference="retrained")
