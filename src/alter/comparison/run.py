"""`alter compare`: methods x seeds x forget splits x a grid of learning rates and lengths, with equal budget for each.

`plan` lays out the cells, `cells` runs them, `table` chooses each method's setting on validation rows and makes the table
from test rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from alter.comparison.cells import Job, finished, forget_weights, gpus, hold, shown
from alter.comparison.plan import ORIGINAL, PARTS, RETRAINED, Compare, check, evaluation_rows
from alter.comparison.plan import plan as lay_out
from alter.comparison.table import (
    Row,
    all_records,
    choices,
    chosen_cells,
    described,
    markdown,
    page,
    pareto,
    refined,
    rows_of,
    search_csv,
    table_csv,
)
from alter.core.console import show, warn
from alter.core.errors import UserError
from alter.core.files import to_json, write_atomic
from alter.core.provenance import provenance
from alter.core.records import write_records


def compare(settings: Compare) -> list[Row]:
    """Run `alter compare`: all cells, the choice, the table; and write them to `settings.out`.

    Files: `table.md`, `table.csv`, `search.csv`, `report.html`, `pareto.png`, `records.json`, `compare.json` (settings, choices,
    provenance); `cells/KEY` and `rows/` hold what they are made of.

    Raises:
        UserError: see `plan` and `hold`; a retrained model that is the original; or one of them cannot be evaluated, or
            with `run` off has not been. A cell that fails or is killed does not stop the others: it is named under the
            table.
    """
    out = Path(settings.out).expanduser()
    if out.exists() and not out.is_dir():
        raise UserError(f"out is {settings.out!r}, which is a file; give a folder.")
    check(settings)
    # what only writes tables disturbs nobody, and may look at a comparison that is at work
    lock = hold(out) if settings.run else None
    try:
        made = lay_out(settings, out)
        for (name, split), cell in made.models.items():
            if name == RETRAINED and cell.key == made.models[ORIGINAL, split].key:
                raise UserError(f"retrained.{split} is the original model itself: give one that never saw {split}.")
        cards = gpus(settings.device)
        workers = settings.workers or len(cards) or max(1, len(os.sched_getaffinity(0)) // 2)

        def run(jobs: Sequence[Job], label: str) -> dict[str, str]:
            return {} if lock is None else shown(out, jobs, workers, cards, lock, label)

        models = list(made.models.values())
        lost = run([Job(cell, PARTS) for cell in models], "models as they are")
        for cell in models:
            found = finished(out, cell, PARTS)
            if found is None and lock is None:
                raise UserError(
                    f"The table needs {cell}, which is not measured yet: run the command without --no-run."
                )
            if found is None or found["status"] != "done":
                reason = lost.get(cell.key) or (found or {}).get("reason")
                raise UserError(f"Cannot evaluate the model {cell.spec['model']} on {cell.chain[0]}: {reason}")
        lost |= run([Job(cell, ("validation",)) for cell in made.searched(settings)], "search")
        for i in range(settings.refine):
            jobs = [Job(cell, ("validation",)) for cell in refined(settings, made, out)]
            lost |= run(jobs, f"search, refined {i + 1} of {settings.refine}")
        chosen = choices(settings, made, out)
        lost |= run([Job(cell, ("test",)) for cell in chosen_cells(made, chosen)], "test rows")
        if settings.run and not settings.keep:
            for cell in (c for by in made.grid.values() for seeds in by.values() for c in seeds.values()):
                # one that was killed goes on from what it has trained
                if cell.key not in lost:
                    forget_weights(out / "cells" / cell.key)
        rows = rows_of(settings, made, chosen, out)
        divided: dict[str, dict[str, int]] = {
            split: {part: len(own[f"{split}_perturbed"]) for part, own in evaluation_rows(settings, split).items()}
            for split in settings.splits
        }
        said = described(settings, rows, divided)
        text = markdown(said)
        write_atomic(out / "table.md", text)
        write_atomic(out / "table.csv", table_csv(rows))
        write_atomic(out / "search.csv", search_csv(chosen))
        pareto(out / "pareto.png", settings, rows)
        write_atomic(out / "report.html", page(said, settings, out / "pareto.png"))
        write_records(out / "records.json", all_records(settings, made, chosen, out))
        summary = {
            "settings": settings.model_dump(mode="json"),
            "choices": [{"method": name, "splits": chain, **asdict(c)} for (name, chain), c in chosen.items()],
            "provenance": provenance(),
        }
        write_atomic(out / "compare.json", to_json(summary))
    finally:
        if lock is not None:
            os.close(lock)
    show(
        f"\n{text}\n{out}: report.html, table.md, table.csv, search.csv, pareto.png, records.json, compare.json, cells/",
        markup=False,
        highlight=False,
    )
    if lost:
        warn(f"alter: {len(lost)} cells did not finish; the same command runs them again.")
    return rows
