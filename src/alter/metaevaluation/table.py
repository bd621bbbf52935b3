"""The table of a meta-evaluation: a line for each metric, the most trustworthy first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group

from alter import metrics
from alter.core import cell
from alter.metaevaluation.formulas import (
    direction,
    faithfulness,
    faithfulness_interval,
    harmonic,
    quantisation_robustness,
    rank_correlation,
    relearning_robustness,
    toward_knowledge,
)
from alter.metaevaluation.measuring import untried
from alter.metaevaluation.members import Found
from alter.metaevaluation.settings import MetaEvaluate
from alter.rendering import called, document, fitted_rows, grid, join, tag
from alter.settings import rounded


@dataclass(frozen=True)
class Line:
    """One metric; a figure whose models are missing is None.

    Attributes:
        knows, without: means of the two pools, as the metric is printed.
        faithfulness, interval: AUC of telling the pools apart, and its 95 % interval over models.
        relearning, quantisation, robustness: R, Q and their harmonic mean.
        overall: harmonic mean of faithfulness and robustness.
        correlation: Spearman's, with the probability of the true answers after the attack.
    """

    metric: str
    knows: float
    without: float
    faithfulness: float
    interval: tuple[float, float]
    relearning: float | None
    quantisation: float | None
    robustness: float | None
    overall: float | None
    correlation: float | None


@dataclass(frozen=True)
class Table:
    """All lines, and the models they are made of.

    Attributes:
        lines: the best overall first.
        pools: how many models of each pool count.
        lost: unlearned models that keep too little to count, and models that could not be made, with the reason.
        leak: what the attack gives, by name (`probability`, leak@k): the retrained model's, and the least and the largest of the
            unlearned.
        untried: metrics that speak of forgetting and have no line: left out, or without a value for some model of a pool.
    """

    lines: list[Line]
    pools: dict[str, int]
    lost: list[str]
    leak: dict[str, tuple[float, float, float]]
    untried: list[str]


def make_table(settings: MetaEvaluate, found: Sequence[Found]) -> Table | None:
    """Return the table of what is measured so far; None before each pool has a model."""
    done = [each for each in found if each.failed is None]
    pools = {pool: [each for each in done if each.pool == pool] for pool in ("knows", "without", "unlearned")}
    if not pools["knows"] or not pools["without"]:
        return None
    lost = [f"{each.name}: {each.failed}" for each in found if each.failed is not None]
    counted = []
    for each in pools["unlearned"]:
        if (each.keeps or 0.0) >= settings.utility_floor:
            counted.append(each)
        else:
            lost.append(f"{each.name}: keeps {each.keeps:.2f} of the answers' probability")
    retrained = next((each for each in done if each.pool == "given" and each.name == "retrained"), None)
    names = dict.fromkeys(name for each in [*pools["knows"], *pools["without"]] for name in each.figures["before"])
    lines = [
        line
        for name in names
        if (line := _line(name, pools["knows"], pools["without"], counted, retrained)) is not None
    ]
    lines.sort(key=lambda line: (-(line.overall if line.overall is not None else -1), -line.faithfulness))
    zero = {} if retrained is None or not counted else retrained.leaked
    attacked = {
        key: [each.leaked[key] for each in counted]
        for key in ("probability", f"leak@{settings.samples}")
        if key in zero
    }
    return Table(
        lines,
        {"knows": len(pools["knows"]), "without": len(pools["without"]), "unlearned": len(counted)},
        lost,
        {key: (zero[key], min(values), max(values)) for key, values in attacked.items()},
        untried({line.metric for line in lines}),
    )


def _line(
    name: str, knows: Sequence[Found], without: Sequence[Found], unlearned: Sequence[Found], retrained: Found | None,
) -> Line | None:  # fmt: skip
    """Return a metric's line; None if a model of a pool has no value of it."""

    def of(models: Sequence[Found], state: str = "before") -> list[float]:
        return [toward_knowledge(name, each.figures[state].get(name, math.nan)) for each in models]

    pools = of(knows), of(without)
    if not all(map(math.isfinite, [*pools[0], *pools[1]])):
        return None
    knowing, ignorant = (statistics.fmean(each.figures["before"][name] for each in pool) for pool in (knows, without))
    auc = faithfulness(*pools)
    r = q = robust = overall = correlation = None
    whole = [each for each in unlearned if all(name in each.figures[state] for state in each.figures)]
    if whole:
        before = of(whole)
        q = quantisation_robustness(before, of(whole, "quantised"))
        if retrained is not None and all(name in retrained.figures[state] for state in ("before", "relearned")):
            zero = [of([retrained], state)[0] for state in ("before", "relearned")]
            r = relearning_robustness(before, of(whole, "relearned"), *zero)
            robust = harmonic(r, q)
            overall = harmonic(auc, robust)
        if len(whole) > 2:
            correlation = rank_correlation(before, [each.leaked["probability"] for each in whole])
    return Line(name, knowing, ignorant, auc, faithfulness_interval(*pools), r, q, robust, overall, correlation)


# In words ------------------------------------------------------------------------------------------------------------

HEAD = (
    "metric", "pool that knows", "without", "faithfulness", "R", "Q", "robustness", "overall", "rank correlation with the leak",
)  # fmt: skip


def _shown(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None or not math.isfinite(value) else rounded(value, form)


def cells(line: Line) -> list[str]:
    """Return a line's cells, in the order of `HEAD`."""
    low, high = line.interval
    return [
        line.metric,
        _shown(line.knows, ".3g"),
        _shown(line.without, ".3g"),
        f"{line.faithfulness:.3f} ({low:.2f} to {high:.2f})",
        *map(_shown, (line.relearning, line.quantisation, line.robustness, line.overall)),
        _shown(line.correlation, "+.2f"),
    ]


def conclusion(table: Table) -> str:
    """Say in one sentence which metric is the most trustworthy, and where the headline of unlearning papers stands."""
    best = table.lines[0]
    place = {line.metric: rank for rank, line in enumerate(table.lines, 1)}
    said = f"Best overall of {len(table.lines)}: {best.metric}"
    headline = [
        f"{name} is number {place[name]}" for name in ("forget_quality", "forget_truth_ratio") if name in place
    ]
    return f"{said}; {' and '.join(headline)}." if headline else f"{said}."


def rules(settings: MetaEvaluate, table: Table) -> list[str]:
    """Describe how the numbers were made, a sentence or two a line."""
    pools, how = table.pools, settings.relearn
    told = [
        f"{pools['knows']} models that know and {pools['without']} that do not: the retrained model, taught for "
        f"{', '.join(map(str, settings.pools.passes))} passes with {len(settings.pools.seeds)} seeds the answers or their "
        "paraphrases, or rows to keep or wrong answers. Faithfulness: AUC of telling them apart (95 % score interval "
        "over models).",
        f"{pools['unlearned']} unlearned models ({', '.join(settings.methods)}; rates × "
        f"{', '.join(f'{rate:g}' for rate in settings.rates)}), of those that keep {settings.utility_floor:.0%} of the "
        "probability of answers to keep.",
        "All values turned so that more says more knowledge. R: mean of 1 - |d - d0| / (|d| + |d0|), d the metric's change "
        f"when an unlearned model relearns the {settings.rows} measured rows ({how.passes} passes at {how.learning_rate:g}), d0 that of the "
        "retrained model. Q: mean of 1 - |b - a| / (|a| + |b|), a before and b after rounding to 4 bits. Robustness: "
        "harmonic mean of R and Q; overall: of faithfulness and robustness.",
    ]
    if table.leak:
        got = "; ".join(
            f"{key} {low:.3f} to {high:.3f} among the unlearned models, {zero:.3f} for the retrained one"
            for key, (zero, low, high) in table.leak.items()
        )
        told.append(
            "Rank correlation (Spearman) with the mean probability of the true answers after the attacker has trained on "
            f"{settings.attacker_rows} other forget rows ({how.attack_passes} passes). After that: {got}."
        )
    told.append(
        "Not tried: figures of what is kept, of fluency and of other benchmarks, which claim nothing about forgetting"
        + (
            f"; and {', '.join(table.untried)}, which do not have a value for every model of both pools."
            if table.untried
            else "."
        )
    )
    return told


def metrics_markdown(settings: MetaEvaluate, table: Table) -> str:
    """Render the table as Markdown."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" + "|---:" * (len(HEAD) - 1) + "|"]
    lines += [f"| {' | '.join(cells(line))} |" for line in table.lines]
    lines += ["", conclusion(table), "", *(f"* {rule}" for rule in rules(settings, table))]
    if table.lost:
        lines += ["", "Models that do not count:", "", *(f"* {each}" for each in table.lost)]
    return "\n".join(lines) + "\n"


def metrics_drawn(settings: MetaEvaluate, table: Table) -> Group:
    """Return the table for a terminal."""
    lines = ["", conclusion(table), "", *(f"* {rule}" for rule in rules(settings, table))]
    if table.lost:
        lines += ["", "Models that do not count:", *(f"* {each}" for each in table.lost)]
    return Group(fitted_rows([HEAD, *map(cells, table.lines)]), *map(cell, lines))


def metrics_page(settings: MetaEvaluate, table: Table) -> str:
    """Render the table as a page that fetches nothing; a click on a column's name sorts by it."""
    title = f"Metrics tried on {called(settings.model)}"
    rows: list[list[object]] = []
    for line in table.lines:
        meaning = metrics.catalogue.metric_named(line.metric.partition(", ")[0]).meaning
        name = join([line.metric, tag("span", f" {meaning}", class_="soft small")])
        rows.append([name, *cells(line)[1:]])
    body = [
        tag("h1", title),
        tag("p", conclusion(table)),
        grid(list(HEAD), rows, label="Metrics", numbers=range(1, len(HEAD)), sortable=True),
        tag("h2", "How it was made"),
        tag("ul", *(tag("li", rule) for rule in rules(settings, table))),
    ]
    if table.lost:
        body += [tag("h2", "Models that do not count"), tag("ul", *(tag("li", each) for each in table.lost))]
    return document(title, tag("main", *body, class_="broad"), sorting=True)


def as_json(table: Table) -> Mapping[str, object]:
    """Return the table as JSON-able values."""
    return {
        "metrics": [
            {
                "metric": line.metric,
                "direction": direction(line.metric),
                "knows": line.knows,
                "without": line.without,
                "faithfulness": line.faithfulness,
                "faithfulness_interval": line.interval,
                "relearning": line.relearning,
                "quantisation": line.quantisation,
                "robustness": line.robustness,
                "overall": line.overall,
                "rank_correlation": line.correlation,
            }
            for line in table.lines
        ],
        "pools": table.pools,
        "lost": table.lost,
        "leak": table.leak,
        "untried": table.untried,
    }
