"""`alter judge`: grades of saved replies as records, and the same records for replies just generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

from alter import metrics
from alter.core import UserError, warn
from alter.evaluation.figures import Figures
from alter.evaluation.grading import PROMPT_VERSION
from alter.evaluation.judge import Grades, Judge, judge_replies
from alter.rendering import table
from alter.settings import OutFile
from alter.storage import Record, read_records, stamped, write_records


def judge_records(
    name: str, judge: Judge, result: Grades, prompts: Sequence[str], extra: dict[str, Any]
) -> list[Record]:
    """Return Flu-mean, Flu-var (population variance) of all grades, and the share of verdicts without a grade.

    No grade at all: the figures have no value. `per_item` is the mean grade of each reply; the interval is over prompts, as
    replies to one and the same are alike.
    """
    found = result.grades[np.isfinite(result.grades)]
    rows = [float(row[np.isfinite(row)].mean()) if np.isfinite(row).any() else float("nan") for row in result.grades]
    verdicts = result.unparsed + len(found) - result.empty * judge.repeats
    told = extra | {
        "judge": judge.model,
        "judge_url": judge.base_url,
        "judge_prompt_version": PROMPT_VERSION,
        "repeats": judge.repeats,
        "counts": {str(k): int((found == k).sum()) for k in range(1, 6)},
        "empty": result.empty,
        "unparsed": result.unparsed,
        "refused": result.refused,
        "missing": result.missing,
        "stopped": result.stopped,
        "calls": result.calls,
        "cached": result.cached,
        "tokens_in": result.tokens_in,
        "tokens_out": result.tokens_out,
        "tokens_counted": result.counted,
        "cost": result.cost,
    }

    n = len(found)
    figures = Figures(name, told)
    between = metrics.samples.grouped_interval(rows, prompts)
    figures.add("fluency_judge_mean", found.mean() if n else None, n, rows, interval=between)
    figures.add("fluency_judge_variance", found.var() if n else None, n)
    figures.add("fluency_judge_unparsed", result.unparsed / verdicts if verdicts else None, verdicts)
    return figures.records


class JudgeFile(BaseModel):
    """Grade the replies that an evaluation has saved (`alter evaluate --json`), now or once more."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    file: str
    """Records with generations in them, as `alter evaluate --json` writes them; TOFU's and fluency's have them."""
    metric: str | None = None
    """Metric whose record holds the replies to grade, where the file has several."""
    judge: Judge = Field(default_factory=Judge)
    """Who grades, and what it may cost."""
    json_path: OutFile = None
    """File for the records of the grades."""


def judge_file(settings: JudgeFile) -> list[Record]:
    """Run `alter judge`: grade saved replies, print the table, write the records.

    Raises:
        UserError: no judge, no generations in the file, several metrics with some, or what `judge_replies` raises.
    """
    if not settings.judge.wanted:
        raise UserError("Give the judge: `judge.url` https://... and `judge.model` NAME.")
    settings.judge.check()
    found = {r.metric: r for r in read_records(settings.file) if {"questions", "generations"} <= set(r.extra)}
    chosen = settings.metric or next(iter(found), "")
    if chosen not in found or (settings.metric is None and len(found) > 1):
        raise UserError(
            f"{settings.file} has replies under {', '.join(found) or 'no metric'}; "
            + (
                "say which with `metric`."
                if found
                else "measure with `alter evaluate --benchmark fluency --json FILE`."
            )
        )
    record = found[chosen]
    pairs = list(zip(record.extra["questions"], record.extra["generations"], strict=True))
    result = judge_replies(settings.judge, pairs)
    for note in result.note():
        warn(note)
    told = {"source": settings.file, "source_metric": chosen}
    graded = stamped(
        judge_records(record.model, settings.judge, result, [prompt for prompt, _ in pairs], told),
        settings=settings.model_dump(mode="json"),
    )
    Console().print(table({record.model: graded}, f"Fluency of {settings.file} ({chosen}), by {settings.judge.model}"))
    if settings.json_path is not None:
        write_records(settings.json_path, graded)
    return graded
