"""`alter compare`: methods x seeds x forget splits x a grid of learning rates and lengths, with equal budget for each.

`plan` lays out the cells, `cells` runs them, `choice` chooses each method's setting on validation rows, and `table` is
made from test rows: `words`, `plot` and `export` show it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from alter.comparison.cell import forget_weights
from alter.comparison.cells import CellJob, finished, hold, run_shown
from alter.comparison.checks import ORIGINAL, RETRAINED, check_settings
from alter.comparison.choice import Choice, choices, chosen_cells, refined
from alter.comparison.clusters import executor_of
from alter.comparison.division import PARTS, evaluation_rows, forget_set, with_files
from alter.comparison.executors import Executor
from alter.comparison.export import all_records, search_csv, table_csv
from alter.comparison.plan import Chain, Layout, lay_out
from alter.comparison.plot import pareto
from alter.comparison.settings import Compare
from alter.comparison.table import TableRow, table_rows
from alter.comparison.words import Text, described, drawn, html_page, latex, markdown
from alter.core import Unfinished, UserError, show, warn
from alter.storage import to_json, undone_if_refused, write_atomic, write_records
from alter.storage.provenance import provenance

Chosen = Mapping[tuple[str, Chain], Choice]


def command(settings: Compare) -> list[TableRow]:
    """Run `alter compare`; see `compare`.

    Raises:
        Unfinished: the tables are written, and cells that were killed are missing in them.
    """
    rows, lost = _compared(settings)
    if lost:
        raise Unfinished(_said_of(lost))
    return rows


def _said_of(lost: Mapping[str, str]) -> str:
    return f"{len(lost)} cells did not finish; the same command runs them again."


def compare(settings: Compare) -> list[TableRow]:
    """Run a comparison: all cells, the choice, the table; and write them to `settings.out`.

    Files: `table.md`, `table.tex`, `table.csv`, `search.csv`, `report.html`, `pareto.png`, `records.json`, `compare.json` (settings, choices,
    provenance); `cells/KEY` and `rows/` hold what they are made of.

    Raises:
        UserError: see `lay_out`, `hold` and `executor_of`; a retrained model that is the original; or one of them cannot be evaluated, or
            with `run` off has not been. A cell that fails or is killed does not stop the others: it is named under the
            table.
    """
    rows, lost = _compared(settings)
    if lost:
        warn(f"alter: {_said_of(lost)}")
    return rows


def _compared(settings: Compare) -> tuple[list[TableRow], dict[str, str]]:
    """Return the table's rows, and why cells did not finish, by key."""
    out = Path(settings.out).expanduser()
    if out.exists() and not out.is_dir():
        raise UserError(f"`out` is {settings.out!r}, which is a file; give a folder.")
    check_settings(settings)
    executor = executor_of(settings) if settings.run else None
    lock = None
    try:
        with undone_if_refused(out):
            # what only writes tables disturbs nobody, and may look at a comparison that is at work
            lock = None if executor is None else hold(out)
            settings = with_files(settings, out)
            made = lay_out(settings, out)
        chosen, lost = _run_all(settings, made, out, executor, lock)
        rows, said = _write(settings, made, chosen, out)
    finally:
        if executor is not None:
            executor.close()
        if lock is not None:
            os.close(lock)
    show(drawn(said), highlight=False)
    show(
        f"\n{out}: report.html, table.md, table.tex, table.csv, search.csv, pareto.png, records.json, compare.json, cells/",
        markup=False,
        highlight=False,
    )
    return rows, lost


def _run_all(
    settings: Compare, made: Layout, out: Path, executor: Executor | None, lock: int | None
) -> tuple[Chosen, dict[str, str]]:
    """Run the cells (none without an executor): the given models, the search, then the chosen settings on test rows.

    Returns:
        the choices, and why cells did not finish, by key.

    Raises:
        UserError: a retrained model that is the original, or a model as it is that has no figures.
    """
    for (name, split), cell in made.models.items():
        if name == RETRAINED and cell.key == made.models[ORIGINAL, split].key:
            raise UserError(f"`retrained.{split}` is the original model itself: give one that never saw {split}.")

    def run(jobs: Sequence[CellJob], label: str) -> dict[str, str]:
        return {} if executor is None or lock is None else run_shown(out, jobs, executor, lock, label)

    lost = run([CellJob(cell, PARTS) for cell in made.models.values()], "models as they are")
    _check_models(made, out, lost, ran=executor is not None)
    lost |= run([CellJob(cell, ("validation",)) for cell in made.searched(settings)], "search")
    for i in range(settings.refine):
        jobs = [CellJob(cell, ("validation",)) for cell in refined(settings, made, out)]
        lost |= run(jobs, f"search, refined {i + 1} of {settings.refine}")
    chosen = choices(settings, made, out)
    lost |= run([CellJob(cell, ("test",)) for cell in chosen_cells(made, chosen)], "test rows")
    if settings.run and not settings.keep:
        for cell in (c for by in made.grid.values() for seeds in by.values() for c in seeds.values()):
            # one that was killed goes on from what it has trained
            if cell.key not in lost:
                forget_weights(out / "cells" / cell.key)
    return chosen, lost


def _check_models(made: Layout, out: Path, lost: Mapping[str, str], *, ran: bool) -> None:
    """Refuse to continue without the figures of the original and the retrained models, which every choice needs."""
    for cell in made.models.values():
        found = finished(out, cell, PARTS)
        if found is None and not ran:
            raise UserError(f"The table needs {cell}, which is not measured yet: leave `run=False` out.")
        if found is None or found["status"] != "done":
            reason = lost.get(cell.key) or (found or {}).get("reason")
            raise UserError(f"Cannot evaluate the model {cell.spec['model']} on {cell.chain[0]}: {reason}")


def _write(settings: Compare, made: Layout, chosen: Chosen, out: Path) -> tuple[list[TableRow], Text]:
    """Write all files of the comparison; return the rows of the table, and what is said of them."""
    rows = table_rows(settings, made, chosen, out)
    divided: dict[str, dict[str, int]] = {
        split: {part: len(own[forget_set(split)]) for part, own in evaluation_rows(settings, split).items()}
        for split in settings.forgotten
    }
    said = described(settings, rows, divided)
    write_atomic(out / "table.md", markdown(said))
    write_atomic(out / "table.tex", latex(said))
    write_atomic(out / "table.csv", table_csv(rows))
    write_atomic(out / "search.csv", search_csv(chosen))
    pareto(out / "pareto.png", settings, rows)
    write_atomic(out / "report.html", html_page(said, settings, rows))
    write_records(out / "records.json", all_records(made, chosen, out))
    summary = {
        "settings": settings.model_dump(mode="json"),
        "choices": [{"method": name, "splits": chain, **asdict(c)} for (name, chain), c in chosen.items()],
        "provenance": provenance(),
    }
    write_atomic(out / "compare.json", to_json(summary))
    return rows, said
