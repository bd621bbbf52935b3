"""The table of a comparison: each method's figures on test rows, over its seeds, and which methods are not dominated."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from alter.attacks import KNOWN_LOSS, LEARNED, loss_ends
from alter.comparison.cells import finished
from alter.comparison.checks import ORIGINAL, RETRAINED
from alter.comparison.choice import Choice, cell_figures, criterion, forgetting, intervals, records_of
from alter.comparison.plan import Cell, Chain, Layout, Setting, chains
from alter.comparison.settings import Compare
from alter.evaluation import SLACK, UNKNOWN
from alter.storage import Record

COSTS = {
    "seconds": "wall time, s",
    "steps": "steps",
    "trained_parameters": "trained parameters",
    "peak_memory": "peak memory, GB",
}
DISTILLING = {"distill_seconds": "of it distilling, s", "distill_steps": "steps distilling"}
"""Costs of distilled rows, which are in those above too."""


@dataclass(frozen=True)
class TableRow:
    """One method on one split: means over its seeds on test rows and, from two seeds on, standard deviations (n - 1).

    `interval`: of one seed, the 95 % intervals over test rows of those figures that have one.
    `clear`: no other method would dominate it, were each of its figures worse by its spread. `cells`: keys of its cells.
    """

    name: str
    split: str
    seeds: int
    mean: dict[str, float]
    spread: dict[str, float]
    choice: Choice | None = None
    dominated: bool = False
    dominated_with_fluency: bool = False
    clear: bool = False
    cells: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    interval: dict[str, tuple[float, float]] = field(default_factory=dict)


def dominated(points: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Tell which points are dominated: another is at least as good in everything and better in something.

    Args:
        points: [n, k], higher is better in every column; a row with a NaN neither dominates nor is dominated.

    Returns:
        [n] booleans. Equal points do not dominate each other.
    """
    values = np.asarray(points, dtype=np.float64)
    as_good = (values[:, None] >= values[None, :]).all(-1)
    better = (values[:, None] > values[None, :]).any(-1)
    return np.asarray((as_good & better).any(0), dtype=np.bool_)


def undominated(points: npt.ArrayLike, spreads: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Tell which points no other dominates, not even if the point itself were worse by its spread.

    Args:
        points: [n, k], as in `dominated`.
        spreads: [n, k], standard deviations over seeds.
    """
    values, lower = np.asarray(points, dtype=np.float64), np.asarray(spreads, dtype=np.float64)
    found = np.ones(len(values), dtype=np.bool_)
    for place in range(len(values)):
        moved = values.copy()
        moved[place] -= lower[place]
        found[place] = not dominated(moved)[place]
    return found


def axis_name(kind: str) -> str:
    """Return the figure on the plot's forgetting axis, by the criterion of its split."""
    return "forget_quality" if kind == "retrained" else "forgetting"


def axis_label(kind: str) -> str:
    """Return the label of the forgetting axis."""
    if kind == "retrained":
        return "forget quality, log10 p"
    if kind == "survival":
        return "forgetting that survives: 1 - leak after the attack"
    return "forgetting: 1 - " + ("|2 AUC - 1|" if kind == "holdout" else "forget ROUGE-L")


def axis(row: TableRow, kind: str) -> float:
    """Return a row's place on the plot's forgetting axis: log10 of forget quality, or the criterion of its split."""
    return row.mean.get(axis_name(kind), math.nan)


def table_rows(
    settings: Compare, made: Layout, chosen: Mapping[tuple[str, Chain], Choice], out: Path
) -> list[TableRow]:
    """Return the rows of the table: the given models, then the methods, split by split; from test rows alone."""
    rows: list[TableRow] = []
    for chain, split in ((each, split) for each in chains(settings) for split in each):
        kind = criterion(settings, split)
        reference = records_of(out, made.models.get((RETRAINED, split)), "test", split)
        for (name, where), cell in made.models.items():
            if where == split:
                rows.append(_row(name, split, [cell], reference, kind, out, None))
        rows[-1].notes.extend(_doubts(rows, split))
        methods = []
        for name in settings.methods:
            choice, by = chosen[name, chain], made.grid[name, chain]
            cells = [] if choice.setting is None else list(by[choice.setting].values())
            row = _row(name, split, cells, reference, kind, out, choice)
            if split == chain[-1]:
                row.notes.extend(_notes(settings, out, by, choice))
            row.notes.extend(_idle_attackers(cells, out, split))
            methods.append(row)
        pairs = [[axis(row, kind), row.mean.get("model_utility", math.nan)] for row in methods]
        fluent = [
            [row.mean.get("forget_distinct_2", math.nan), -row.mean.get("forget_repetition", math.nan)]
            for row in methods
        ]
        # a method whose seeds spread farther than its lead has none
        spreads = [[row.spread.get(key, 0.0) for key in (axis_name(kind), "model_utility")] for row in methods]
        clear = undominated(pairs, spreads)
        worse = dominated(pairs)
        worst = dominated([pair + rest for pair, rest in zip(pairs, fluent, strict=True)])
        for place, row in enumerate(methods):
            rows.append(
                replace(
                    row,
                    dominated=bool(worse[place]),
                    dominated_with_fluency=bool(worst[place]),
                    clear=bool(clear[place]) and bool(np.isfinite(pairs[place]).all()),
                )
            )
    return rows


def _notes(settings: Compare, out: Path, by: Mapping[Setting, Mapping[int, Cell]], choice: Choice) -> list[str]:
    """Return what went wrong in cells that were run: a line for each that has a folder but lacks its results."""
    notes = []
    for setting, seeds in by.items():
        for seed, cell in seeds.items():
            wanted = ["validation"] if seed in settings.seeds[: settings.search_seeds] else []
            wanted += ["test"] if setting == choice.setting else []
            if not wanted or not (out / "cells" / cell.key).is_dir():
                continue
            found = finished(out, cell, wanted)
            if found is None:
                notes.append(f"{cell}: not finished; the same command runs it again (see cells/{cell.key}/log.txt)")
            elif found["status"] == "failed":
                notes.append(f"{cell}: {found['reason']}")
    return notes


def _doubts(rows: Sequence[TableRow], split: str) -> list[str]:
    """Say so where the retrained model knows the answers nearly as well as the original: forgetting is measured by it."""
    by = {row.name: row.mean.get("forget_probability", math.nan) for row in rows if row.split == split}
    before, honest = by.get(ORIGINAL, math.nan), by.get(RETRAINED, math.nan)
    if not (before > UNKNOWN and honest >= before - SLACK):
        return []
    return [
        f"{RETRAINED} {split} is no reference: it gives the true answers a probability of {honest:.3f}, the original {before:.3f}, "
        "so what comes near to it has forgotten nothing"
    ]


def _idle_attackers(cells: Sequence[Cell], out: Path, split: str) -> list[str]:
    """Name the cells whose attacker did not learn its own rows: that nothing came back there is no evidence."""
    notes = []
    for cell in cells:
        for record in records_of(out, cell, "test", split) or []:
            losses = record.extra.get("losses") if record.metric == "attacked_leak" else None
            if losses and losses[0] >= KNOWN_LOSS:
                first, last = loss_ends(losses)
                if last > LEARNED * first:
                    notes.append(
                        f"{cell}: the attacker hardly learned its own rows (loss {first:.2f} to {last:.2f}), so what did not "
                        "come back is no evidence; raise `survival.learning_rate` or `survival.passes`"
                    )
    return notes


def _row(
    name: str,
    split: str,
    cells: Sequence[Cell],
    reference: Sequence[Record] | None,
    kind: str,
    out: Path,
    choice: Choice | None,
) -> TableRow:
    each: list[dict[str, float]] = []
    interval: dict[str, tuple[float, float]] = {}
    for cell in cells:
        records = records_of(out, cell, "test", split)
        if records is None:
            continue
        found = cell_figures(records, reference)
        found["forgetting"] = forgetting(found, kind)
        interval = intervals(records, found)
        stages = (finished(out, cell, ["test"]) or {})["stages"]
        costs = stages[cell.chain.index(split)] if cell.setting is not None else {}
        costs |= {f"distill_{key}": value for key, value in costs.get("distill", {}).items()}
        each.append(found | {key: float(costs[key]) for key in (*COSTS, *DISTILLING) if key in costs})
    keys = list(each[0]) if each else []
    mean = {key: sum(found[key] for found in each) / len(each) for key in keys}
    finite = [key for key in keys if len(each) > 1 and all(math.isfinite(found[key]) for found in each)]
    spread = {key: statistics.stdev(found[key] for found in each) for key in finite}
    keyed = tuple(cell.key for cell in cells)
    return TableRow(
        name, split, len(each), mean, spread, choice, cells=keyed, interval=interval if len(each) == 1 else {}
    )
