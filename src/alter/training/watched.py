"""The rows that the checks of a watched run measure, read and drawn before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alter.core import UserError
from alter.data import Example, load_examples, row_key
from alter.evaluation import TofuReference, read_reference, rows_fingerprint
from alter.training.watch import Watch

VALIDATION_SHARE = 5
"""At most one in so many retain rows is set aside."""


@dataclass(frozen=True)
class Watched:
    """The rows of a run's checks, read and drawn before a model is loaded; `every` is in steps."""

    forget: list[Example]
    retain: list[Example]
    holdout: list[Example]
    reference: TofuReference | None
    every: int


def _draw(rows: Sequence[Example], count: int, seed: int) -> list[int]:
    """Draw `count` row numbers by the seed, in order, or return all of them."""
    if count >= len(rows):
        return list(range(len(rows)))
    return sorted(np.random.default_rng(seed).choice(len(rows), size=count, replace=False).tolist())


def _apart(name: str, rows: Sequence[Example], other: str, others: Sequence[Example], remedy: str) -> None:
    known = {row_key(example): example.index for example in others}
    shared = [example for example in rows if row_key(example) in known]
    if shared:
        first = shared[0]
        raise UserError(
            f"{len(shared)} rows of {name} are in the {other} set as well, the first being row {first.index} = "
            f"{other} row {known[row_key(first)]} ({(first.prompt or first.answer)[:60]!r}): {remedy}"
        )


def rated(example: Example) -> bool:
    """Tell whether a row has the paraphrased and perturbed answers that a truth ratio needs."""
    return bool(example.row.get("paraphrased_answer")) and bool(example.row.get("perturbed_answer"))


def _load(source: str, domain_column: str | None) -> list[Example]:
    """Load rows, labelled by the column if they have it."""
    rows = load_examples(source)
    if domain_column is None or any(example.row.get(domain_column) is None for example in rows):
        return rows
    return load_examples(source, domain_column=domain_column)


def read_watched(
    watch: Watch,
    forget: Sequence[Example],
    retain: Sequence[Example],
    *,
    domain_column: str | None = None,
    seed: int,
    steps: int,
    steps_per_epoch: float,
) -> tuple[Watched, list[Example]]:
    """Read, check and draw the rows that the checks of a run measure.

    Args:
        watch: settings that are switched on.
        forget, retain: the run's two sets.
        domain_column: names the groups of rows that resemble each other.
        seed: draws the rows.
        steps, steps_per_epoch: length of the run, and of a pass over the forget set, in optimizer steps.

    Returns:
        the rows of the checks, and the retain rows that are left for training: without the ones set aside, which
        neither the training nor the router's fit may see.

    Raises:
        UserError: an interval beyond the end of the run, rows that are in two sets, too few of them for the rule, or
            a retrained model's records that belong to other rows.
    """
    every = watch.every_steps or max(1, round((watch.every_epoch or 1) * steps_per_epoch))
    if every > steps:
        given = f"watch.every_steps is {every}" if watch.every_steps else f"watch.every_epoch is {watch.every_epoch}"
        raise UserError(f"{given}, but the run has {steps} steps: nothing would be watched. Give a smaller interval.")
    looked = list(forget) if watch.forget is None else _rated_rows(watch.forget, forget, domain_column)
    holdout: list[Example] = []
    if watch.holdout is not None:
        holdout = _load(watch.holdout, domain_column)
        remedy = "the holdout set must be unseen. Give other rows as watch.holdout."
        _apart("watch.holdout", holdout, "forget", forget, remedy)
        _apart("watch.holdout", holdout, "retain", retain, remedy)
        holdout = [holdout[i] for i in _draw(holdout, watch.holdout_rows, seed)]
    reference = None if watch.retain_records is None else _reference(watch.retain_records, looked)
    looked = [looked[i] for i in _draw(looked, watch.forget_rows, seed)]
    watch.rule.check_rows(len(looked), len(holdout), all(map(rated, [*looked, *holdout])))
    for name, rows in (("forget", looked), ("holdout", holdout)):
        if watch.replies and any(example.kind == "text" for example in rows):
            raise UserError(f"`watch.replies` needs questions, but the {name} rows are plain text: leave it out.")
    validation, left = _validation(watch, forget, retain, seed)
    return Watched(looked, validation, holdout, reference, every), left


def _rated_rows(source: str, forget: Sequence[Example], domain_column: str | None) -> list[Example]:
    """Return the rows of watch.forget: forget rows with the answers that a truth ratio needs."""
    looked = _load(source, domain_column)
    known = {row_key(example) for example in forget}
    others = [example.index for example in looked if row_key(example) not in known]
    if others:
        raise UserError(
            f"{len(others)} of {len(looked)} rows of `watch.forget` ({source}) are not in the forget set, the "
            f"first being row {others[0]}: give the same questions and answers."
        )
    missing = [example.index for example in looked if not rated(example)]
    if missing:
        raise UserError(
            f"Row {missing[0]} of `watch.forget` ({source}) lacks paraphrased_answer or perturbed_answer "
            f"({len(missing)} rows do): truth ratios need both. Leave `watch.forget` out to do without."
        )
    return looked


def _validation(
    watch: Watch, forget: Sequence[Example], retain: Sequence[Example], seed: int
) -> tuple[list[Example], list[Example]]:
    """Return the retain rows held out from training (given or set aside), and those left to train on."""
    if watch.retain is not None:
        validation = load_examples(watch.retain)
        _apart("watch.retain", validation, "forget", forget, "they cannot be forgotten and kept. Give other rows.")
        _apart("watch.retain", validation, "retain", retain, "they would be trained on. Take them out of one.")
        return [validation[i] for i in _draw(validation, watch.retain_rows, seed)], list(retain)
    aside = set(_draw(retain, min(watch.retain_rows, len(retain) // VALIDATION_SHARE), seed))
    if not aside:
        raise UserError(
            f"The retain set has {len(retain)} rows, too few to set one in {VALIDATION_SHARE} aside for watching: "
            "give other retain rows as `watch.retain`."
        )
    validation = [example for i, example in enumerate(retain) if i in aside]
    return validation, [example for i, example in enumerate(retain) if i not in aside]


def _reference(path: str, rows: Sequence[Example]) -> TofuReference:
    """Return the retrained model's truth ratios; refuse them unless they are of the watched rows."""
    reference = read_reference(path)
    again = "evaluate the retrained model on the rows of watch.forget with `alter evaluate --json`, in strict mode"
    if reference.mode not in (None, "strict"):
        raise UserError(f"`watch.retain_records`: {path} was measured in {reference.mode} mode: {again}.")
    own = rows_fingerprint([example.row for example in rows])
    if len(reference.truth_ratio) != len(rows) or reference.fingerprint not in (None, own):
        what = f" ({reference.split})" if reference.split else ""
        raise UserError(
            f"`watch.retain_records`: {path} holds truth ratios of {len(reference.truth_ratio)} rows{what} that are not "
            f"the {len(rows)} rows of `watch.forget`: {again}."
        )
    return reference
