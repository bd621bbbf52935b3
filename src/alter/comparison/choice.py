"""Choose each method's setting by forgetting and utility on validation rows, and no others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alter import metrics
from alter.comparison.cells import finished, is_measured
from alter.comparison.checks import ORIGINAL, RETRAINED
from alter.comparison.plan import Cell, Chain, Layout, Setting
from alter.comparison.settings import Compare
from alter.core import Array, UserError
from alter.evaluation import ADDED, added_to, broken, gives
from alter.storage import Record, read_records

FIGURES = {
    "forget_quality": "forget quality, log10 p ↑",
    "model_utility": "utility ↑",
    "forget_rouge": "forget ROUGE-L ↓",
    "forget_said": "answers still given ↓",
    "forget_unusable": "broken or empty ↓",
    "forget_distinct_2": "distinct-2 ↑",
    "forget_repetition": "repetition ↓",
    "forget_probability_reworded": "probability, asked in other words ↓",
}
"""Columns of the table for each split, by metric; arrows point in the better direction. The last, by which knowledge is best told
where it costs no attack, is of rows that have their questions in other words."""
SURVIVAL = {
    "disturbance": "disturbance, nats ↓",
    "leak": "leak before the attack ↓",
    "attacked_leak": "leak after it ↓",
}
"""Columns besides, where an attacker is given rows."""
MEMBERSHIP = ("mia_min_k", "mia_loss")
"""What tells forget rows from rows that no model saw: the first that was measured."""
CRITERIA = {
    "retrained": "1 - D, D the Kolmogorov-Smirnov distance of its {ratios} on forget rows to the retrained model's",
    "holdout": "1 - |2 AUC - 1| of {attack} against rows that no model saw",
    "survival": "1 - leak@k after an attacker has relearned other rows",
    "rouge": "1 - ROUGE-L recall on forget rows (no retrained model and no holdout: does not see too much forgetting)",
}
"""How far a setting has forgotten, in [0, 1], higher is better, by what a split has to compare with."""


def columns(settings: Compare) -> dict[str, str]:
    """Return the columns of the table for each split, by metric."""
    return FIGURES | (SURVIVAL if settings.survival.rows else {}) | added_columns(settings)


def added_columns(settings: Compare) -> dict[str, str]:
    """Return the columns of metrics that plugins added, by figure: their names, an arrow in the better direction."""
    better = {name: metrics.CATALOGUE[name].higher_is_better for name in added_to(settings.benchmark)}
    arrows = {True: " ↑", False: " ↓", None: ""}
    return {figure_of(name): f"{name}{arrows[higher]}" for name, higher in better.items()}


def figure_of(metric: str) -> str:
    """Return what a metric's figure is called here: a plugin's may have the name of a cost, or of what is made of others."""
    return f"plugin:{metric}" if metric in ADDED else metric


def criterion(settings: Compare, split: str) -> str:
    """Return which of `CRITERIA` a split is judged by.
    With a bound of disturbance what survives; else the retrained model if there is one, else the holdout, else ROUGE.
    """
    if settings.survival.bound is not None:
        return "survival"
    if getattr(settings.retrained, split) is not None:
        return "retrained"
    return "holdout" if settings.holdout is not None else "rouge"


def cell_figures(records: Sequence[Record], reference: Sequence[Record] | None) -> dict[str, float]:
    """Compute the figures of the table and of the choice from the records of one cell and part.

    Args:
        records: of the cell.
        reference: of the retrained model on the same rows, if there is one; gives `forget_quality` (log10 of the p-value)
            and `distance` (its statistic).

    Raises:
        UserError: the reference was measured on other rows.
    """
    by = {record.metric: record for record in records}
    found = {
        figure_of(name): math.nan if record.value is None else record.value
        for name, record in by.items()
        if name in FIGURES or name in SURVIVAL or name in ADDED or name in (*MEMBERSHIP, "forget_probability")
    }
    found |= _replies(by.get("forget_rouge"))
    if reference is not None:
        own, other = map(compared, (records, reference))
        if own.extra["fingerprint"] != other.extra["fingerprint"]:
            raise UserError("The retrained model was evaluated on other rows than a cell: delete its folder in cells.")
        quality = metrics.likelihood.forget_quality(_floats(own.per_item), _floats(other.per_item))
        found |= {"forget_quality": quality.log10, "distance": quality.statistic}
    return found


def compared(records: Sequence[Record]) -> Record:
    """Return the record that is held against the retrained model's: truth ratios, or where the rows have no wrong answers the
    probabilities of the true ones."""
    by = {record.metric: record for record in records}
    return by["forget_truth_ratio" if "forget_truth_ratio" in by else "forget_probability"]


def intervals(records: Sequence[Record], found: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Return the 95 % intervals over rows of one cell's figures, where they have one.

    Args:
        records: of the cell.
        found: its `cell_figures`.
    """
    own = {record.metric: record.extra["interval"] for record in records if record.extra.get("interval")}
    told = {
        figure_of(name): (float(low), float(high)) for name, (low, high) in own.items() if figure_of(name) in found
    }
    replies = next((record for record in records if record.metric == "forget_rouge"), None)
    for name, values in zip(("forget_said", "forget_unusable"), _judged(replies), strict=True):
        if f"{name}_of" in found and replies is not None:
            numbers = replies.extra.get("authors", range(len(values)))
            interval = metrics.samples.grouped_interval(values, numbers)
            told |= {} if interval is None else {name: interval}
    return told


def _replies(record: Record | None) -> dict[str, float]:
    """Return the shares of replies about forget rows that give their answer and that are broken or empty, and their number."""
    said, bad = _judged(record)
    known = [value for value in said if not math.isnan(value)]
    found = {"forget_unusable": statistics.fmean(bad), "forget_unusable_of": float(len(bad))} if bad else {}
    return found | ({"forget_said": statistics.fmean(known), "forget_said_of": float(len(known))} if known else {})


def _judged(record: Record | None) -> tuple[list[float], list[float]]:
    """Return of each reply about forget rows whether it gives its answer, NaN where nothing tells, and whether it is of no use."""
    if record is None or not record.extra.get("generations"):
        return [], []
    replies = [str(reply) for reply in record.extra["generations"]]
    asked = record.extra.get("questions") or [""] * len(replies)
    told = [gives(*row) for row in zip(asked, record.extra["references"], replies, strict=True)]
    said = [math.nan if value is None else float(value) for value in told]
    return said, [float(broken(reply) or not reply.strip()) for reply in replies]


def _floats(values: Sequence[float | None] | None) -> Array:
    # JSON writes infinity as null and NaN too, but a cell with NaN has failed
    return np.array([math.inf if value is None or math.isnan(value) else value for value in values or []])


def forgetting(found: Mapping[str, float], kind: str) -> float:
    """Return how far a model has forgotten, from its figures, by one of `CRITERIA`."""
    if kind == "retrained":
        return 1 - found["distance"]
    if kind == "survival":
        return 1 - found["attacked_leak"]
    if kind == "holdout":
        return 1 - abs(2 * next(found[name] for name in MEMBERSHIP if name in found) - 1)
    return 1 - found["forget_rouge"]


def kept_ability(seeds: Sequence[Mapping[str, float]], kind: str) -> float:
    """Return what a setting has kept, from the figures of its seeds: mean utility, or exp(-mean disturbance) by what survives."""
    if kind == "survival":
        # not the mean of exp(-disturbance): one seed far beyond the bound would hide behind the others
        return math.exp(-statistics.fmean(f["disturbance"] for f in seeds))
    return statistics.fmean(f["model_utility"] for f in seeds)


def floor(settings: Compare) -> float:
    """Return the share of the original's ability that a setting must keep: of utility, or of the disturbance bound."""
    return settings.utility_floor if settings.survival.bound is None else math.exp(-settings.survival.bound)


def best_setting(
    candidates: Mapping[Setting, tuple[float, float]], original: float, floor: float
) -> tuple[Setting, bool]:
    """Return the setting that forgets most among those that keep the utility; see `CRITERIA` for what forgetting is.

    Where no setting keeps it, the one with the largest product of forgetting and utility. The first of equals.

    Args:
        candidates: by setting, forgetting and utility (see `kept_ability`) on validation rows, means over the search seeds; at least one.
        original: utility of the original model on the same rows.
        floor: share of it that must be kept.

    Returns:
        the setting, and whether it keeps the utility.
    """

    def best(values: Mapping[Setting, float]) -> Setting:
        # a figure that is not a number must lose against any that is
        return max(values, key=lambda s: values[s] if math.isfinite(values[s]) else -math.inf)

    keeping = {s: score for s, (score, utility) in candidates.items() if utility >= floor * original}
    if keeping:
        return best(keeping), True
    return best({s: score * utility for s, (score, utility) in candidates.items()}), False


@dataclass(frozen=True)
class Searched:
    """A setting that was searched, with its figures on validation rows; NaN if a seed of it did not finish."""

    rate: float
    epochs: float
    forgetting: float
    utility: float


@dataclass(frozen=True)
class Choice:
    """The setting chosen for one row and split on validation rows, and why; None if no setting has finished."""

    setting: Setting | None
    keeps: bool
    forgetting: float
    utility: float
    finished: int
    budget: int
    searched: list[Searched]


def choices(settings: Compare, made: Layout, out: Path) -> dict[tuple[str, Chain], Choice]:
    """Choose a setting for every row and split; reads the validation records of the cells and nothing else of them.

    A setting counts if all its search seeds are done: one that diverged with a seed is not chosen. A chain of splits is
    judged by where it ends.
    """
    found: dict[tuple[str, Chain], Choice] = {}
    for (name, chain), by in made.grid.items():
        candidates, whole, count = _candidates(settings, made, out, name, chain)
        budget = len(by) * len(settings.seeds[: settings.search_seeds])
        setting, keeps = best_setting(candidates, whole, floor(settings)) if candidates else (None, False)
        scores = (math.nan, math.nan) if setting is None else candidates[setting]
        searched = [Searched(*each, *candidates.get(each, (math.nan, math.nan))) for each in sorted(by)]
        found[name, chain] = Choice(setting, keeps, *scores, count, budget, searched)
    return found


def _candidates(
    settings: Compare, made: Layout, out: Path, name: str, chain: Chain
) -> tuple[dict[Setting, tuple[float, float]], float, int]:
    """Return forgetting and kept ability of the complete settings, what the original keeps, and the number of finished cells."""
    last = chain[-1]
    kind = criterion(settings, last)
    reference = records_of(out, made.models.get((RETRAINED, last)), "validation", last)
    original = records_of(out, made.models[ORIGINAL, last], "validation", last)
    assert original is not None
    candidates: dict[Setting, tuple[float, float]] = {}
    count = 0
    for setting, cells in made.grid[name, chain].items():
        rows = [records_of(out, cells[seed], "validation", last) for seed in settings.seeds[: settings.search_seeds]]
        count += sum(each is not None for each in rows)
        if all(each is not None for each in rows):
            each = [cell_figures(own, reference) for own in rows if own is not None]
            candidates[setting] = (
                statistics.fmean(forgetting(f, kind) for f in each),
                kept_ability(each, kind),
            )
    return candidates, kept_ability([cell_figures(original, None)], kind), count


def next_rate(
    candidates: Mapping[Setting, tuple[float, float]], tried: Sequence[Setting], original: float, floor: float
) -> Setting | None:
    """Return the setting to search next: its rate, to three digits, lies towards what the best one (see `best_setting`) lacks.

    If the best setting keeps the utility, it lacks forgetting; otherwise it lacks utility. Of its neighbouring rates, take the
    one with more of what is lacking. The next rate is the geometric mean of the two if that neighbour has more of it than the
    best, or if there are neighbours on both sides; else the best is at the end of the rates, and the next lies beyond it, by
    the same factor as the last step. A neighbour that failed was too fast: it counts as forgetting all and keeping
    nothing. If no setting has finished, the next rate lies below all.

    Args:
        candidates: of `best_setting`.
        tried: all settings searched so far, with at least two rates for each length.

    Returns:
        None if that rate, rounded to three digits, has been tried.
    """
    (best, epochs), keeps = best_setting(candidates, original, floor) if candidates else (min(tried), False)
    rates = sorted(rate for rate, length in tried if length == epochs)
    lacks = 0 if keeps else 1

    def amount(rate: float) -> float:
        found = candidates.get((rate, epochs))
        return (math.inf if keeps else -math.inf) if found is None else found[lacks]

    at = rates.index(best)
    beside = [rates[i] for i in (at - 1, at + 1) if 0 <= i < len(rates)]
    # of equals the faster one, which is the one to forget more
    other = max(beside, key=lambda rate: (amount(rate), rate))
    within = len(beside) == 2 or amount(other) > amount(best)
    rate = float(f"{math.sqrt(best * other) if within else best * best / other:.3g}")
    return None if rate in rates else (rate, epochs)


def refined(settings: Compare, made: Layout, out: Path) -> list[Cell]:
    """Plan one more setting for every row and chain into `made`; return its cells of the search seeds.

    Where a cell was killed the search does not go on: what that one would say of its rate is not known.
    """
    cells: list[Cell] = []
    seeds = settings.seeds[: settings.search_seeds]
    for (name, chain), by in made.grid.items():
        if any(finished(out, own[seed], ["validation"]) is None for own in by.values() for seed in seeds):
            continue
        candidates, whole, _ = _candidates(settings, made, out, name, chain)
        setting = next_rate(candidates, list(by), whole, floor(settings))
        if setting is not None:
            by[setting] = made.lay(name, chain, setting)
            cells += [by[setting][seed] for seed in seeds]
    return cells


def chosen_cells(made: Layout, chosen: Mapping[tuple[str, Chain], Choice]) -> list[Cell]:
    """Return the cells of the chosen settings, with all seeds, from which the table is made."""
    settings = {place: choice.setting for place, choice in chosen.items() if choice.setting is not None}
    return [cell for place, setting in settings.items() for cell in made.grid[place][setting].values()]


def records_of(out: Path, cell: Cell | None, part: str, split: str) -> list[Record] | None:
    """Return a cell's records on one part and split; None without a cell, or before that part is measured.

    A cell that failed later keeps what it had: the choice must not change with what happens on test rows.
    """
    if cell is None or not is_measured(out, cell, [part]):
        return None
    return read_records(out / "cells" / cell.key / f"{part}-{split}.json")
