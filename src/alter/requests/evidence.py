"""Evidence for and against forgetting: what models know of a request's rows and of the rows to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from alter.data import Example, data_hash, load_examples, row_hash
from alter.evaluation import WORDINGS, Measures, answer_rows
from alter.models import check_model_name, load_model
from alter.requests.project import Project

UTILITY_SHARE = 0.97
"""Share of the untouched model's utility that must be left."""

MeasuredEvidence = tuple[Measures, dict[str, Any]]
"""What a model knows of some rows, and the same as figures."""


def known_of(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    answers: int,
    seed: int = 0,
    wordings: Sequence[str] = (),
) -> MeasuredEvidence:
    """Measure what a model knows of rows; see `alter.evaluation.answered.answer_rows`."""
    found = answer_rows(model, tokenizer, examples, answers=answers, seed=seed, label="requests", wordings=wordings)
    return found.measures, found.summary()


def retain_sample(project: Project) -> list[Example]:
    """Return the rows of the retain set on which utility is measured: the same rows every time."""
    rows = load_examples(project.retain)
    chosen = np.random.default_rng(0).permutation(len(rows))[: project.retain_rows]
    return [rows[i] for i in sorted(chosen.tolist())]


def utility(model: Any, tokenizer: Any, project: Project) -> MeasuredEvidence:
    """Measure the model on the retain sample, with the mean of probability and ROUGE-L as `utility`, and the rows' SHA-256 as `data`."""
    rows = retain_sample(project)
    measures, found = known_of(model, tokenizer, rows, answers=project.answers)
    return measures, {**found, "utility": utility_of(found), "data": _content(rows)}


def _content(rows: Sequence[Example]) -> str:
    """Return the SHA-256 of rows: a file may be another one when the evidence is read."""
    return data_hash(list(map(row_hash, rows)))


def utility_of(figures: Mapping[str, Any]) -> float:
    """Return the mean of probability and ROUGE-L among the figures of the rows to keep, of those that are there."""
    return float(np.mean([float(figures[name]) for name in ("probability", "rouge") if figures[name] is not None]))


def untouched(model: Any) -> Any:
    """Inside the block, switch off any adapter."""
    return model.disable_adapter() if model.__class__.__name__.startswith("Peft") else nullcontext()


def check_yardstick(project: Project) -> None:
    """Check, before training, that the holdout or the retrained model that stands for not knowing can be read.

    Raises:
        UserError: the holdout cannot be read, or there is no such retrained model.
    """
    if project.retrained is not None:
        check_model_name(project.retrained)
    if project.holdout is not None:
        load_examples(project.holdout)


def baselines(
    project: Project, model: Any, tokenizer: Any, examples: Mapping[str, Sequence[Example]]
) -> dict[str, MeasuredEvidence]:
    """Measure the reference of each request: the retrained model on its rows, or the base on the holdout."""
    if project.retrained is not None:
        other, own = load_model(project.retrained, template=project.template)
        measured = {
            name: known_of(other, own, asked, answers=project.answers, wordings=WORDINGS)
            for name, asked in examples.items()
        }
        return {name: (found, {"by": "retrained model", **figures}) for name, (found, figures) in measured.items()}
    if project.holdout is not None:
        rows = load_examples(project.holdout)
        with untouched(model):
            found, figures = known_of(model, tokenizer, rows, answers=project.answers)
        return dict.fromkeys(examples, (found, {"by": "holdout", "data": _content(rows), **figures}))
    return {}
