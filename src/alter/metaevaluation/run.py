"""`alter meta-evaluate`: which metrics tell models that know from models that do not, and go on doing so under attack."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from alter.core import UserError, progress, show, silent, warn
from alter.metaevaluation.measuring import Measuring
from alter.metaevaluation.members import Found, Member, chosen_rows, measure_member, members, stored
from alter.metaevaluation.settings import MetaEvaluate
from alter.metaevaluation.table import Table, as_json, make_table, metrics_drawn, metrics_markdown, metrics_page
from alter.storage import check_free, claim, release, to_json, undone_if_refused, write_atomic
from alter.storage.provenance import provenance


def meta_evaluate(settings: MetaEvaluate) -> Table:
    """Run `alter meta-evaluate`: make and measure every model, then print the table and write it.

    Each model is measured once (`out`/members/KEY.json): after a kill the same command goes on with the next. Files:
    `table.md`, `report.html`, `meta.json` (settings, table, provenance), written again after every model.

    Raises:
        UserError: models, methods or rows that are not there or do not fit; an output folder that is a file or in use by
            another process; or with `run` off too few models to compare. A model that cannot be made does not stop the
            others: it is named under the table.
    """
    out = Path(settings.out).expanduser()
    if out.exists() and not out.is_dir():
        raise UserError(f"`out` is {settings.out!r}, which is a file; give a folder.")
    if not settings.run:
        return _told(settings, out, members(settings, chosen_rows(settings, out)))
    check_free(out)
    with undone_if_refused(out):
        rows = chosen_rows(settings, out)
        laid = members(settings, rows)
    claim(out)
    try:
        _run(settings, Measuring(settings, rows), laid, out)
    finally:
        release(out)
    return _told(settings, out, laid)


def _run(settings: MetaEvaluate, tools: Measuring, laid: Sequence[Member], out: Path) -> None:
    todo = [member for member in laid if stored(out, member) is None]
    show(f"{len(laid)} models, {len(laid) - len(todo)} of them measured before", stderr=True)
    started = time.time()
    for count, member in enumerate(progress(todo, total=len(todo), label="models", lines=False), 1):
        with silent():
            found = measure_member(settings, tools, member, out)
        left = (time.time() - started) / count * (len(todo) - count)
        said = f"{found.seconds:.0f} s" if found.failed is None else f"not made: {found.failed}"
        warn(f"{count}/{len(todo)} {member.pool}: {member.name}: {said}; about {left / 60:.0f} min left")
        _write(settings, _all(out, laid), out)


def _all(out: Path, laid: Sequence[Member]) -> list[Found]:
    return [found for member in laid if (found := stored(out, member)) is not None]


def _write(settings: MetaEvaluate, found: Sequence[Found], out: Path) -> Table | None:
    """Write the files of the table, if there are models enough for one, and return it."""
    table = make_table(settings, found)
    if table is not None:
        write_atomic(out / "table.md", metrics_markdown(settings, table))
        write_atomic(out / "report.html", metrics_page(settings, table))
        told = {"settings": settings.model_dump(mode="json"), **as_json(table), "provenance": provenance()}
        write_atomic(out / "meta.json", to_json(told))
    return table


def _told(settings: MetaEvaluate, out: Path, laid: Sequence[Member]) -> Table:
    """Write and print the table.

    Raises:
        UserError: there are too few models for one.
    """
    table = _write(settings, _all(out, laid), out)
    if table is None:
        raise UserError(
            f"{out} has no model of both pools that was measured with these settings: leave `run=False` out."
        )
    show(metrics_drawn(settings, table), highlight=False)
    show(
        f"\n{out}: report.html, table.md, meta.json, members/",
        markup=False,
        highlight=False,
    )
    return table
