"""Measure the distilled model beside the student before and the teacher: a table and records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from alter.core import cell, show
from alter.data import Example, data_hash, row_hash
from alter.distillation.settings import Distill
from alter.evaluation import FIGURES, WORDINGS, Answered, answer_rows, closing_facts
from alter.evaluation.verdict import judge
from alter.models import ModelSettings, load_model
from alter.rendering import FittedTable
from alter.storage import Record, cache_folder, stamped, write_records


def measure_distilled(
    settings: Distill, out: Path, found: dict[str, list[Example]], teacher: tuple[Any, Any]
) -> dict[str, Any]:
    """Load the result as anyone would, measure it beside the student before and the teacher; print, write `records.json`.

    The records hold figures alone, no text.

    Args:
        settings: the completed settings; `closing_rows` of each set are scored and answered.
        out: the run's folder.
        found: rows `forget` and `keep`.
        teacher: model and tokenizer.

    Returns:
        what `alter.evaluation.closing.closing_facts` gives, with the teacher's figures under `teacher`.

    Raises:
        UserError: the result does not load or its weights are not finite.
    """
    assert settings.student is not None
    full = settings.form == "full"
    common: dict[str, Any] = {"device": settings.device, "template": settings.chat_template_kwargs}
    after = load_model(str(out / "model"), **common) if full else None
    before = load_model(settings.student, **common)
    sets = {
        "forget": _drawn(found["forget"], settings.closing_rows, settings.seed),
        "retain": _drawn(found["keep"], settings.closing_rows, settings.seed),
    }
    measured: dict[str, dict[str, Answered]] = {}

    def look(name: str, pair: tuple[Any, Any]) -> None:
        measured[name] = {
            part: answer_rows(
                *pair,
                rows,
                seed=settings.seed,
                max_new_tokens=100,
                label=f"{name}, {part}",
                wordings=WORDINGS if part == "forget" else (),
            )
            for part, rows in sets.items()
        }

    look("before", before)
    look("teacher", teacher)
    if after is None:
        after = load_model(settings.student, str(out / "adapter"), **common)
    look("after", after)
    kept = (measured["before"]["retain"].measures, measured["after"]["retain"].measures)
    verdict = judge(measured["before"]["forget"].measures, measured["after"]["forget"].measures, kept=kept)
    facts = closing_facts(verdict, measured["before"], measured["after"], None, False)
    facts["rows"] = data_hash(list(map(row_hash, found["forget"])))
    facts["teacher"] = {name: answered.summary() for name, answered in measured["teacher"].items()}
    made = {"model": str(out / "model")} if full else {"model": settings.student, "adapter": str(out / "adapter")}
    identity = ModelSettings.model_validate(made).identity(cache_folder())
    records = stamped(_records(measured, sets, facts), seed=settings.seed, **identity)
    write_records(out / "records.json", records)
    show(_table(facts), highlight=False)
    show(
        f"\n{facts['verdict']['word'].upper()}.\n" + "\n".join(facts["verdict"]["why"]), highlight=False, markup=False
    )
    return facts


def _records(
    measured: dict[str, dict[str, Answered]], sets: dict[str, list[Example]], facts: dict[str, Any]
) -> list[Record]:
    """Record probability and ROUGE-L of each model on each set; one of the records holds the closing's facts."""
    return [
        Record(
            {"before": "original", "after": "distilled"}.get(model, model),
            f"{part}_{name}",
            None if value is None else float(value),
            int(answered.measures.probability.size),
            extra={"closing": facts} if (model, part, name) == ("after", "forget", "probability") else {},
        )
        for model, parts in measured.items()
        for part, answered in parts.items()
        for name, value in answered.summary().items()
        if name in ("probability", "rouge")
    ]


def _drawn(rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    return [rows[i] for i in sorted(order.tolist())]


def _table(facts: dict[str, Any]) -> FittedTable:
    table = FittedTable(title="Before, the teacher, and the distilled")
    for column in ("", "before", "teacher", "distilled"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for name_of, title in (("forget", "to forget"), ("retain", "to keep")):
        three = [facts[model].get(name_of) for model in ("before", "teacher", "after")]
        table.add_row(cell(f"{title} ({three[0]['n']} rows, {three[0]['n_answers']} answered)", "bold"))
        for name, meaning in FIGURES.items():
            figures = [figure.get(name) for figure in three]
            if name == "worded" and figures[0] is None:
                continue
            shown = [
                "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
                for value in figures
            ]
            table.add_row(f"  {meaning}", *shown)
    return table
