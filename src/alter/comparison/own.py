"""Rows of one's own in a comparison, in the place of a split of TOFU: what is measured of a cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import numpy as np

from alter import metrics
from alter.comparison.settings import OWN
from alter.core import UserError
from alter.data import Example, data_hash, load_examples, row_hash
from alter.evaluation import Answered, Figures, Groups, answer_rows
from alter.storage import Record

FORGET, RETAIN, HOLDOUT = "forget", "retain", "holdout"


def own_records(
    name: str, model: Any, tokenizer: Any, rows: Path, limit: int | None, column: str | None = None
) -> list[Record]:
    """Measure a model in memory on one part of the rows to forget and to keep, and of the holdout if there is one.

    Records: probability and ROUGE-L recall of both, repetition and distinct-2 of the replies about what is to be forgotten,
    `model_utility` (the harmonic mean of the two figures of what is kept; TOFU's is of nine), and with a holdout `mia_loss`.

    Args:
        name: what the records call the model.
        rows: folder with a file of JSON lines for each set.
        limit: only so many rows of each set, the first ones.
        column: whose value rows share that are about one subject; intervals of means draw them together.

    Raises:
        UserError: the model gives no probabilities, no row of a set can be answered within its context, or what scoring and
            generating raise.
    """
    names = (FORGET, RETAIN, HOLDOUT)
    sets = {of: load_examples(str(rows / f"{of}.json"))[:limit] for of in names if (rows / f"{of}.json").is_file()}
    found: dict[str, Answered] = {}
    for of, own in sets.items():
        found[of] = answer_rows(model, tokenizer, own, answers=0 if of == HOLDOUT else None, label=f"{name}, {of}")
        if np.isnan(found[of].measures.probability).any():
            raise UserError(f"Probabilities of the {of} rows are not numbers: the model gives none.")
        if of != HOLDOUT and not found[of].replies:
            raise UserError(f"No {of} row can be answered: with its reply each is longer than the model's context.")
    return _records(name, sets, found, column)


def _groups(rows: Sequence[Example], column: str | None) -> Groups | None:
    return None if column is None else Groups.of(column, [row.row.get(column) for row in rows])


def _records(
    name: str, sets: Mapping[str, list[Example]], found: Mapping[str, Answered], column: str | None
) -> list[Record]:
    figures = Figures(name, {"benchmark": OWN})
    for of in (FORGET, RETAIN):
        own, each = found[of].measures, found[of]
        same = {"fingerprint": data_hash(list(map(row_hash, sets[of])))[:12]}
        scored, replied = (_groups(rows, column) for rows in (each.rows, each.examples))
        figures.add(f"{of}_probability", own.probability.mean(), len(own.probability), own.probability, scored, **same)
        texts: dict[str, Any] = {"questions": each.questions, "references": each.truths, "generations": each.replies}
        if replied is not None:
            texts["authors"] = replied.numbers
        figures.add(f"{of}_rouge", own.recall.mean(), len(own.recall), own.recall, replied, **same, **texts)
        if of == FORGET:
            repetition = own.repetition
            figures.add("forget_repetition", repetition.mean(), len(repetition), repetition, replied, **same)
            figures.add("forget_distinct_2", own.distinct, len(own.recall), **same)
    kept = np.stack([found[RETAIN].probability, found[RETAIN].measures.recall])
    parts = dict(zip((f"{RETAIN}_probability", f"{RETAIN}_rouge"), kept.mean(axis=1).tolist(), strict=True))
    groups = _groups(found[RETAIN].examples, column)
    interval = metrics.samples.utility_interval([kept], None if groups is None else [groups.numbers])
    utility = harmonic_mean(parts.values())
    figures.add("model_utility", utility, kept.shape[1], groups=groups, parts=parts, interval=interval)
    if HOLDOUT in found:
        # in the order of their average losses
        scores = {of: -found[of].measures.probability for of in (FORGET, HOLDOUT)}
        auc, sizes = metrics.membership.auc(*scores.values()), [len(each) for each in scores.values()]
        told = {of: each.tolist() for of, each in scores.items()}
        interval = metrics.samples.auc_interval(auc, *sizes)
        figures.add("mia_loss", auc, sum(sizes), scores=told, interval=interval)
    return figures.records
