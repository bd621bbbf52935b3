"""What comes of the cells: the choice of each method's setting on validation rows, and the table from test rows."""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alter import metrics
from alter.comparison.cells import finished, measured
from alter.comparison.plan import ORIGINAL, RETRAINED, Cell, Chain, Compare, Plan, Setting, chains
from alter.core.errors import UserError
from alter.core.files import to_csv
from alter.core.provenance import stamped
from alter.core.records import Record, read_records
from alter.reporting.figures import AFTER, BEFORE, OTHER, figure, name_points
from alter.reporting.markup import document, grid, join, tag

Array = npt.NDArray[np.float64]
FIGURES = {
    "forget_quality": "forget quality, log10 p",
    "model_utility": "utility",
    "forget_rouge": "forget ROUGE-L",
    "forget_distinct_2": "distinct-2",
    "forget_repetition": "repetition",
}
"""Columns of the table for each split, by metric."""
COSTS = {
    "seconds": "wall time, s",
    "trained_parameters": "trained parameters",
    "peak_memory": "peak memory, GB",
}

# The choice ----------------------------------------------------------------------------------------------------------


CRITERIA = {
    "retrained": "1 - D, D the Kolmogorov-Smirnov distance of its truth ratios on forget rows to the retrained model's",
    "holdout": "1 - |2 AUC - 1| of min-k against rows that no model saw",
    "rouge": "1 - ROUGE-L recall on forget rows (no retrained model and no holdout: does not see too much forgetting)",
}
"""How far a setting has forgotten, in [0, 1], higher is better, by what a split has to compare with."""


def criterion(settings: Compare, split: str) -> str:
    """Which of `CRITERIA` a split is judged by: the retrained model if there is one, else the holdout, else ROUGE."""
    if getattr(settings.retrained, split) is not None:
        return "retrained"
    return "holdout" if settings.holdout is not None else "rouge"


def figures(records: Sequence[Record], reference: Sequence[Record] | None) -> dict[str, float]:
    """The figures of the table and of the choice from the records of one cell and part.

    Args:
        records: of the cell.
        reference: of the retrained model on the same rows, if there is one; gives `forget_quality` (log10 of the p-value)
            and `distance` (its statistic).

    Raises:
        UserError: the reference was measured on other rows.
    """
    by = {record.metric: record for record in records}
    found = {
        name: math.nan if record.value is None else record.value
        for name, record in by.items()
        if name in FIGURES or name in ("mia_min_k", "forget_probability")
    }
    if reference is not None:
        own, other = (
            next(record for record in rows if record.metric == "forget_truth_ratio") for rows in (records, reference)
        )
        if own.extra["fingerprint"] != other.extra["fingerprint"]:
            raise UserError("The retrained model was evaluated on other rows than a cell: delete its folder in cells.")
        quality = metrics.forget_quality(_array(own.per_item), _array(other.per_item))
        found |= {"forget_quality": quality.log10, "distance": quality.statistic}
    return found


def _array(values: Sequence[float | None] | None) -> Array:
    # JSON writes infinity as null and NaN too, but a cell with NaN has failed
    return np.array([math.inf if value is None or math.isnan(value) else value for value in values or []])


def forgetting(found: Mapping[str, float], kind: str) -> float:
    """How far the model of these figures has forgotten, by one of `CRITERIA`."""
    if kind == "retrained":
        return 1 - found["distance"]
    if kind == "holdout":
        return 1 - abs(2 * found["mia_min_k"] - 1)
    return 1 - found["forget_rouge"]


def choose(candidates: Mapping[Setting, tuple[float, float]], original: float, floor: float) -> tuple[Setting, bool]:
    """The setting that forgets best among those that keep the utility; see `CRITERIA` for what forgetting is.

    Where no setting keeps it, the one with the largest product of forgetting and utility. The first of equals.

    Args:
        candidates: by setting, forgetting and utility on validation rows, means over the search seeds; at least one.
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


def choices(settings: Compare, made: Plan, out: Path) -> dict[tuple[str, Chain], Choice]:
    """Choose a setting for every row and split; reads the validation records of the cells and nothing else of them.

    A setting counts if all its search seeds are done: one that diverged with a seed is not chosen. A chain of splits is
    judged by where it ends.
    """
    found: dict[tuple[str, Chain], Choice] = {}
    for (name, chain), by in made.grid.items():
        candidates, whole, count = _candidates(settings, made, out, name, chain)
        budget = len(by) * len(settings.seeds[: settings.search_seeds])
        setting, keeps = choose(candidates, whole, settings.utility_floor) if candidates else (None, False)
        scores = (math.nan, math.nan) if setting is None else candidates[setting]
        searched = [Searched(*each, *candidates.get(each, (math.nan, math.nan))) for each in sorted(by)]
        found[name, chain] = Choice(setting, keeps, *scores, count, budget, searched)
    return found


def _candidates(
    settings: Compare, made: Plan, out: Path, name: str, chain: Chain
) -> tuple[dict[Setting, tuple[float, float]], float, int]:
    """Forgetting and utility of the settings that count, the original's utility, and the number of cells that are done."""
    last = chain[-1]
    kind = criterion(settings, last)
    reference = _records(out, made.models.get((RETRAINED, last)), "validation", last)
    original = _records(out, made.models[ORIGINAL, last], "validation", last)
    assert original is not None
    candidates: dict[Setting, tuple[float, float]] = {}
    count = 0
    for setting, cells in made.grid[name, chain].items():
        rows = [_records(out, cells[seed], "validation", last) for seed in settings.seeds[: settings.search_seeds]]
        count += sum(each is not None for each in rows)
        if all(each is not None for each in rows):
            each = [figures(own, reference) for own in rows if own is not None]
            candidates[setting] = (
                statistics.fmean(forgetting(f, kind) for f in each),
                statistics.fmean(f["model_utility"] for f in each),
            )
    return candidates, figures(original, None)["model_utility"], count


def next_rate(
    candidates: Mapping[Setting, tuple[float, float]], tried: Sequence[Setting], original: float, floor: float
) -> Setting | None:
    """The setting to search next: its rate, to three digits, lies towards what the best one (see `choose`) lacks.

    A best one that keeps the utility lacks forgetting, any other utility. Where the neighbour with most of it has more of
    it, or there are two, the next rate is the geometric mean; else it lies beyond the best, which is at the end of the
    rates, by the step before. A neighbour that did not finish was too fast: it counts as forgetting all and keeping
    nothing. If no setting has finished, the next lies below all.

    Args:
        candidates: of `choose`.
        tried: all settings searched so far, with at least two rates for each length.

    Returns:
        None if the rate has been tried: three digits tell no more rates apart.
    """
    (best, epochs), keeps = choose(candidates, original, floor) if candidates else (min(tried), False)
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


def refined(settings: Compare, made: Plan, out: Path) -> list[Cell]:
    """Lay out one more setting for every row and chain, into `made`; return its cells of the search seeds."""
    cells: list[Cell] = []
    for (name, chain), by in made.grid.items():
        candidates, whole, _ = _candidates(settings, made, out, name, chain)
        setting = next_rate(candidates, list(by), whole, settings.utility_floor)
        if setting is not None:
            by[setting] = made.lay(name, chain, setting)
            cells += [by[setting][seed] for seed in settings.seeds[: settings.search_seeds]]
    return cells


def chosen_cells(made: Plan, chosen: Mapping[tuple[str, Chain], Choice]) -> list[Cell]:
    """The cells of the chosen settings, with all seeds: those that the table is made of."""
    settings = {place: choice.setting for place, choice in chosen.items() if choice.setting is not None}
    return [cell for place, setting in settings.items() for cell in made.grid[place][setting].values()]


def _records(out: Path, cell: Cell | None, part: str, split: str) -> list[Record] | None:
    """Records of a cell on one part and split; None if there is no cell, or it has not got to the end of that part.

    A cell that failed later keeps what it had: the choice must not change with what happens on test rows.
    """
    if cell is None or not measured(out, cell, [part]):
        return None
    return read_records(out / "cells" / cell.key / f"{part}-{split}.json")


# The table -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One method on one split: means over its seeds on test rows and, from two seeds on, standard deviations (n - 1)."""

    name: str
    split: str
    seeds: int
    mean: dict[str, float]
    spread: dict[str, float]
    choice: Choice | None = None
    dominated: bool = False
    dominated_with_fluency: bool = False
    notes: list[str] = field(default_factory=list)


def dominated(points: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which points are dominated: another is at least as good in everything and better in something.

    Args:
        points: [n, k], higher is better in every column; a row with a NaN neither dominates nor is dominated.

    Returns:
        [n] booleans. Equal points do not dominate each other.
    """
    values = np.asarray(points, dtype=np.float64)
    as_good = (values[:, None] >= values[None, :]).all(-1)
    better = (values[:, None] > values[None, :]).any(-1)
    return np.asarray((as_good & better).any(0), dtype=np.bool_)


def axis(row: Row, kind: str) -> float:
    """A row's place on the forgetting axis of the plot: log10 of forget quality, or the criterion of its split."""
    return row.mean.get("forget_quality", math.nan) if kind == "retrained" else row.mean.get("forgetting", math.nan)


def rows_of(settings: Compare, made: Plan, chosen: Mapping[tuple[str, Chain], Choice], out: Path) -> list[Row]:
    """The rows of the table: the models as they are, then the methods, split by split; from test rows alone."""
    rows: list[Row] = []
    for chain, split in ((each, split) for each in chains(settings) for split in each):
        kind = criterion(settings, split)
        reference = _records(out, made.models.get((RETRAINED, split)), "test", split)
        for (name, where), cell in made.models.items():
            if where == split:
                rows.append(_row(name, split, [cell], reference, kind, out, None))
        methods = []
        for name in settings.methods:
            choice, by = chosen[name, chain], made.grid[name, chain]
            cells = [] if choice.setting is None else list(by[choice.setting].values())
            row = _row(name, split, cells, reference, kind, out, choice)
            if split == chain[-1]:
                row.notes.extend(_notes(settings, out, by, choice))
            methods.append(row)
        pairs = [[axis(row, kind), row.mean.get("model_utility", math.nan)] for row in methods]
        fluent = [
            [row.mean.get("forget_distinct_2", math.nan), -row.mean.get("forget_repetition", math.nan)]
            for row in methods
        ]
        worse = dominated(pairs)
        worst = dominated([pair + rest for pair, rest in zip(pairs, fluent, strict=True)])
        for place, row in enumerate(methods):
            rows.append(replace(row, dominated=bool(worse[place]), dominated_with_fluency=bool(worst[place])))
    return rows


def _notes(settings: Compare, out: Path, by: Mapping[Setting, Mapping[int, Cell]], choice: Choice) -> list[str]:
    """What went wrong with cells that were run: a line for each that has a folder but not what is asked of it."""
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


def _row(
    name: str,
    split: str,
    cells: Sequence[Cell],
    reference: Sequence[Record] | None,
    kind: str,
    out: Path,
    choice: Choice | None,
) -> Row:
    each: list[dict[str, float]] = []
    for cell in cells:
        records = _records(out, cell, "test", split)
        if records is None:
            continue
        found = figures(records, reference)
        found["forgetting"] = forgetting(found, kind)
        stages = (finished(out, cell, ["test"]) or {})["stages"]
        costs = stages[cell.chain.index(split)] if cell.setting is not None else {}
        each.append(found | {key: float(costs[key]) for key in COSTS if key in costs})
    keys = list(each[0]) if each else []
    mean = {key: sum(found[key] for found in each) / len(each) for key in keys}
    finite = [key for key in keys if len(each) > 1 and all(math.isfinite(found[key]) for found in each)]
    spread = {key: statistics.stdev(found[key] for found in each) for key in finite}
    return Row(name, split, len(each), mean, spread, choice)


def _shown(row: Row, key: str, form: str, scale: float = 1.0) -> str:
    if not math.isfinite(row.mean.get(key, math.nan)):
        return "-"
    text = format(row.mean[key] * scale, form)
    return f"{text} ± {format(row.spread[key] * scale, form)}" if key in row.spread else text


def _on_edge(value: float, grid: Sequence[float]) -> str:
    """A chosen value, and whether it is the first or last of its grid: a better one may lie beyond."""
    end = "" if len(set(grid)) < 2 else {min(grid): " (lowest)", max(grid): " (highest)"}.get(value, "")
    return f"{value:g}{end}"


@dataclass(frozen=True)
class Text:
    """The comparison in words and tables, which Markdown and the page show alike.

    `results`, `costs` and `searched` are tables: a head and rows of cells. Of the results, `best` (row, column) are not
    dominated.
    """

    results: list[list[str]]
    costs: list[list[str]]
    searched: list[list[str]]
    best: set[tuple[int, int]]
    rules: list[str]
    notes: list[str]


def described(settings: Compare, rows: Sequence[Row], divided: Mapping[str, Mapping[str, int]]) -> Text:
    """The tables, how they were made, and what went wrong.

    Args:
        divided: by split, the number of forget rows of each part.
    """
    by = {(row.name, row.split): row for row in rows}
    results = [["method", *(f"{split}: {title}" for split in settings.splits for title in FIGURES.values())]]
    head = ["method", "split", *COSTS.values(), "chosen: rate ×", "epochs", "keeps utility", "searched cells done"]
    costs = [[*head, "seeds", "dominated", "with fluency"]]
    best: set[tuple[int, int]] = set()
    # the models as they are come first, also one that only a later split has
    for name in dict.fromkeys(row.name for row in sorted(rows, key=lambda row: row.choice is not None)):
        line = [name]
        for split in settings.splits:
            row = by.get((name, split), Row(name, split, 0, {}, {}))
            line += [_shown(row, "forget_quality", ".1f"), *(_shown(row, key, ".3f") for key in list(FIGURES)[1:])]
            if row.choice is None:
                continue
            if row.seeds and not row.dominated:
                best.add((len(results), len(line) - len(FIGURES) + 1))
            setting, dominance = row.choice.setting, (row.dominated, row.dominated_with_fluency)
            rates, lengths = ([getattr(each, of) for each in row.choice.searched] for of in ("rate", "epochs"))
            costs.append(
                [
                    *(name, split, _shown(row, "seconds", ".0f")),
                    _shown(replace(row, spread={}), "trained_parameters", ",.0f"),
                    _shown(row, "peak_memory", ".2f", 1e-9),
                    *(("-", "-") if setting is None else map(_on_edge, setting, (rates, lengths))),
                    "yes" if row.choice.keeps else "no",
                    *(f"{row.choice.finished}/{row.choice.budget}", str(row.seeds)),
                    *(("-", "-") if not row.seeds else ("yes" if d else "no" for d in dominance)),
                ]
            )
        results.append(line)
    least = f", at least {settings.least_steps} steps" if settings.least_steps else ""
    more = (
        f" and {settings.refine} more, one after the other: between the best rate and the neighbour that forgets more, or "
        "beyond the best where it is the last and forgets most"
        if settings.refine
        else ""
    )
    rules = [
        f"Model {settings.model}, seeds {', '.join(map(str, settings.seeds))}; mean ± standard deviation over seeds. "
        "Numbers are of test rows. Bold utility: no other method of this split is at least as good in forgetting and "
        "utility, and better in one of them. Fluency: distinct-2 and repetition besides.",
        f"Search budget, the same for every method and split: {len(settings.rates) * len(settings.epochs)} settings "
        f"(learning rates × {', '.join(f'{r:g}' for r in settings.rates)}; epochs "
        f"{', '.join(f'{e:g}' for e in settings.epochs)}{least}){more}, seeds searched: "
        f"{', '.join(map(str, settings.seeds[: settings.search_seeds]))}.",
        "Chosen on validation rows, by method and split: the setting that forgets best among those that keep "
        f"{settings.utility_floor:.0%} of the original's utility; where none does, the largest forgetting × utility; of equals the first searched.",
        *(
            [
                f"Continual: {', then '.join(settings.splits)}; each run forgets the rows that are new and starts from the "
                "last one's result. The setting is the same for all and chosen by where the chain ends."
            ]
            if settings.continual
            else []
        ),
        *(
            f"{split}: forgetting is {CRITERIA[criterion(settings, split)]}. "
            f"{divided[split]['validation']} forget rows for validation, {divided[split]['test']} for test."
            for split in settings.splits
        ),
        f"Division: authors shuffled by seed {settings.division_seed}, {settings.validation:.0%} of them for validation "
        "(rows of no TOFU author: each answer is its own author).",
        *([f"Only {settings.limit} rows of each set and part were evaluated."] if settings.limit else []),
        "Wall time: the run without loading Python and without evaluation, beside the other workers' cells. Peak memory: "
        "of the run's process (of the GPU, where there is one).",
    ]
    return Text(results, costs, _searched(rows), best, rules, [note for row in rows for note in row.notes])


def _searched(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each method and place where its chain ends: every setting, its forgetting and utility, ★ the chosen one."""
    choices = {id(row.choice): row for row in rows if row.choice is not None}  # a chain's splits share theirs
    lines = []
    for row in choices.values():
        assert row.choice is not None
        several = len({each.epochs for each in row.choice.searched}) > 1
        cells = []
        for each in row.choice.searched:
            length = f", {each.epochs:g} epochs" if several else ""
            star = "★ " if (each.rate, each.epochs) == row.choice.setting else ""
            found = "not finished" if math.isnan(each.forgetting) else f"{each.forgetting:.2f} / {each.utility:.3f}"
            cells.append(f"{star}× {each.rate:g}{length}: {found}")
        lines.append([row.name, row.split, *cells])
    width = max((len(line) for line in lines), default=2)
    return [
        ["method", "split", *(f"setting {i}" for i in range(1, width - 1))],
        *(line + [""] * (width - len(line)) for line in lines),
    ]


def markdown(said: Text) -> str:
    """The comparison as Markdown."""

    def table(rows: Sequence[Sequence[str]]) -> list[str]:
        lines = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        head = ["| " + " | ".join(lines[0]) + " |", "|---" + "|---:" * (len(lines[0]) - 1) + "|"]
        return head + ["| " + " | ".join(line) + " |" for line in lines[1:]]

    results = [
        [f"**{cell}**" if (i, j) in said.best else cell for j, cell in enumerate(line)]
        for i, line in enumerate(said.results)
    ]
    lines = [*table(results), "", *table(said.costs), "", *(f"* {rule}" for rule in said.rules)]
    notes = ["", "Cells without a result:", "", *(f"* {note}" for note in said.notes)] if said.notes else []
    return "\n".join(lines + notes) + "\n"


def page(said: Text, settings: Compare, picture: Path) -> str:
    """The comparison as one HTML page that fetches nothing; the plot is inside it."""
    results = [
        [tag("strong", cell) if (i, j) in said.best else cell for j, cell in enumerate(line)]
        for i, line in enumerate(said.results)
    ]
    plot = base64.b64encode(picture.read_bytes()).decode()
    title = f"Comparison on {settings.model}"
    body = [
        tag("h1", title),
        tag("p", f"{len(settings.methods)} methods, {len(settings.seeds)} seeds, {', '.join(settings.splits)}."),
        tag(
            "img", src=f"data:image/png;base64,{plot}", alt="Forgetting against model utility, a plot for each split."
        ),
        grid(results[0], results[1:], label="Results", numbers=range(1, len(results[0]))),
        tag("h2", "What it cost"),
        grid(said.costs[0], said.costs[1:], label="Costs", numbers=range(2, len(said.costs[0]))),
        tag("h2", "What the search found"),
        grid(
            said.searched[0],
            said.searched[1:],
            label="Search",
            caption="Learning rate × …: forgetting / utility on validation rows, means over the search seeds; ★ the choice.",
        ),
        tag("h2", "How it was made"),
        tag("ul", *(tag("li", rule) for rule in said.rules)),
    ]
    if said.notes:
        body += [tag("h2", "Cells without a result"), tag("ul", *(tag("li", note) for note in said.notes))]
    return document(title, join(body))


def table_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV, one line for each method and split, all figures with mean and spread."""
    keys = list(dict.fromkeys(key for row in rows for key in row.mean))
    pairs = [f"{key}{end}" for key in keys for end in ("", "_spread")]
    own = ["rate", "epochs", "keeps_utility", "validation_forgetting", "validation_utility", "cells_done", "cells"]
    lines: list[list[Any]] = [["method", "split", "seeds", *own, "dominated", "dominated_with_fluency", *pairs]]
    for row in rows:
        choice = row.choice
        said: list[Any] = [""] * len(own)
        if choice is not None:
            said = [
                *(choice.setting or ("", "")),
                choice.keeps,
                choice.forgetting,
                choice.utility,
                choice.finished,
                choice.budget,
            ]
        values = [each.get(key, "") for key in keys for each in (row.mean, row.spread)]
        marks = [row.dominated, row.dominated_with_fluency] if choice is not None and row.seeds else ["", ""]
        lines.append([row.name, row.split, row.seeds, *said, *marks, *values])
    return to_csv(lines)


def search_csv(chosen: Mapping[tuple[str, Chain], Choice]) -> str:
    """Every setting of every search as CSV: forgetting and utility on validation rows, and whether it was chosen."""
    lines: list[list[Any]] = [["method", "splits", "rate", "epochs", "forgetting", "utility", "chosen"]]
    for (name, chain), choice in chosen.items():
        for each in choice.searched:
            figures = ["" if math.isnan(value) else value for value in (each.forgetting, each.utility)]
            lines.append(
                [name, " ".join(chain), each.rate, each.epochs, *figures, (each.rate, each.epochs) == choice.setting]
            )
    return to_csv(lines)


def pareto(path: Path, settings: Compare, rows: Sequence[Row]) -> None:
    """Draw forget quality against utility, a plot for each split, as PNG: spread as bars, a line through the best."""
    named: dict[str, list[tuple[bool, tuple[float, float], str, str]]] = {}
    with figure(path, columns=len(settings.splits), width=5.6, height=5.2) as plots:
        for axes, split in zip(plots[0], settings.splits, strict=True):
            kind = criterion(settings, split)
            key = "forget_quality" if kind == "retrained" else "forgetting"
            best = []
            for row in rows:
                x, y = row.mean.get("model_utility", math.nan), axis(row, kind)
                if row.split != split or not (math.isfinite(x) and math.isfinite(y)):
                    continue
                on = row.choice is not None and not row.dominated
                if on:
                    best.append((x, y))
                color = BEFORE if row.choice is None else AFTER if on else OTHER
                axes.errorbar(
                    *(x, y), xerr=row.spread.get("model_utility"), yerr=row.spread.get(key), color=color,
                    fmt="s" if row.choice is None else "*" if on else "o", ms=9 if on else 5, lw=0.8,
                )  # fmt: skip
                named.setdefault(split, []).append((not on, (x, y), row.name, color))
            axes.plot(*zip(*sorted(best), strict=True) if best else ((), ()), color=AFTER, lw=0.8, ls="--")
            label = (
                "forget quality, log10 p"
                if kind == "retrained"
                else "forgetting: 1 - " + ("|2 AUC - 1|" if kind == "holdout" else "forget ROUGE-L")
            )
            axes.set(xlabel="model utility (higher is better)", ylabel=f"{label} (higher is better)")
            axes.set_title(f"{split}: ★ not dominated")
            axes.margins(0.1)
        for axes, split in zip(plots[0], settings.splits, strict=True):
            # what is not dominated is named first, where there is most room
            order = sorted(named.get(split, []), key=lambda each: each[0])
            name_points(axes, [each[1] for each in order], [each[2] for each in order], [each[3] for each in order])


def all_records(settings: Compare, made: Plan, chosen: Mapping[tuple[str, Chain], Choice], out: Path) -> list[Record]:
    """Records of the chosen settings and of the models as they are on test rows, without the single rows' values.

    `extra` says split, seed, rate and epochs, and names the cell's folder, where the single values are.
    """
    cells = [*made.models.values(), *chosen_cells(made, chosen)]
    records: list[Record] = []
    for cell, split in ((each, split) for each in cells for split in each.chain):
        own = _records(out, cell, "test", split)
        if own is None:
            continue
        setting = cell.setting or (None, None)
        extra = {"benchmark": "tofu", "split": split, "data": "test", "seed": cell.seed, "rate": setting[0]}
        extra |= {"epochs": setting[1], "cell": cell.key}
        records += [replace(record, model=cell.name, per_item=None, extra=extra) for record in own]
        reference = _records(out, made.models.get((RETRAINED, split)), "test", split)
        if reference is not None:
            found = figures(own, reference)
            n = next(record.n for record in own if record.metric == "forget_truth_ratio")
            quality = {"log10": found["forget_quality"], "statistic": found["distance"]}
            p = 10.0 ** found["forget_quality"]
            made_here = Record(cell.name, "forget_quality", p, n, higher_is_better=True, extra=extra | quality)
            records += stamped([made_here])
    return records
