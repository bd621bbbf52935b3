"""The final output of `alter forget`: probes before and after, what must not change, examples, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from alter.core import LOG, worded
from alter.evaluation import Word
from alter.forgetting.measure import ANSWERS, KeptRate, Outcome, Rate
from alter.forgetting.verdict import judge_subject
from alter.rendering import FittedTable

WORDS: Mapping[Word, str] = {"not forgotten": "not forgotten yet", "unproven": "not proven to be forgotten"}
"""How the verdict's words stand in a sentence, where they do not stand as they are."""


def print_line(console: Console, text: str) -> None:
    """Print a line without markup, which names settings as an error does; as a library, log it."""
    if console.quiet:
        LOG.info(text)
        return
    console.print(worded(text), markup=False, highlight=False, soft_wrap=True)


def print_outcome(
    console: Console,
    name: str,
    outcome: Outcome,
    names: Sequence[str],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    examples: int,
    perplexity: Mapping[str, float],
    document: bool = False,
    ended: bool = False,
) -> dict[str, Any]:
    """Print the tables, the examples and the verdict; returns the figures. `ended`: a check ended the training."""
    rates, kept_rates = outcome.rates(), outcome.kept_rates()
    console.print(_answered(name, rates, document))
    console.print(_kept(kept_rates))
    if names:
        was, now = outcome.naming(names)
        print_line(console, f"Answers to the probes that name any of {', '.join(names)}: {was} before, {now} now.")
    if examples:
        console.print(_examples(outcome, examples))
    distinct = outcome.distinct()
    found = judge_subject(outcome, before, after, document=document)
    if after and document:
        print_line(
            console,
            f"{after['known']} of {after['known_of']} names and numbers that it knew keep more than half of their probability. Against the same text with other "
            f"ones, AUC {before['auc']:.2f} before and {after['auc']:.2f} now, which is no verdict: a model that never saw a text tells it from "
            "its disguise too.",
        )
    elif after:
        print_line(
            console,
            f"Against {after['invented']} invented subjects, {after['n']} probes: the known facts are more probable for {name} with "
            f"AUC {before['auc']:.2f} before (p {before['p']:.2g}) and {after['auc']:.2f} now (p {after['p']:.2g}; 0.5 is chance).",
        )
    fix = " Give more `epochs`, and `overwrite` or another `out`."
    if ended:
        fix = (
            " Training ended as the known facts were forgotten, and more passes would not change this: add rows with what it still says to "
            "forget.jsonl, and train on them with `alter unlearn`."
        )
    more = fix if found.word == "not forgotten" else ""
    print_line(console, f"{name} is {WORDS.get(found.word, found.word)}: {' '.join(found.why)}{more}")
    print_line(
        console,
        f"Answers to the probes: distinct-2 {_told(distinct, 2)}; perplexity, as the untouched model reads them, "
        f"{_told(perplexity, 1)}. The untouched model's answers about an invented subject are those of one that does not know.",
    )
    return {
        "probes": {
            form: {"before": rate.n, "after": rate.after, "invented": rate.zero, "invented_n": rate.asked}
            for form, rate in rates.items()
        },
        "naming": dict(zip(("before", "after"), outcome.naming(names), strict=True)) if names else None,
        "kept": {form: asdict(rate) for form, rate in kept_rates.items()},
        "zero": {"before": before, "after": after},
        "forgotten": found.word == "forgotten",
        "verdict": {"word": found.word, "why": list(found.why)},
        "distinct_2": distinct,
        "perplexity": dict(perplexity),
    }


def _told(figures: Mapping[str, float], digits: int) -> str:
    """Format the figures of `ANSWERS`; those about invented subjects only where there are any."""
    before, after, invented = (f"{figures[key]:.{digits}f}" for key in ANSWERS)
    told = f"{before} before, {after} now"
    return told if math.isnan(figures["invented"]) else f"{told}, {invented} about an invented subject"


def _answered(name: str, rates: Mapping[str, Rate], document: bool) -> FittedTable:
    """Format how many probes of each form are answered with a fact."""
    table = FittedTable(
        title=f"Probes about {name}: answered with a fact{'' if document else ' (forms that were not trained on)'}"
    )
    for column in ("form", "before", "after", "an invented subject"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for form, rate in rates.items():
        shares = [f"{k} ({k / n:.0%})" if n else "-" for k, n in ((rate.after, rate.n), (rate.zero, rate.asked))]
        table.add_row(form, str(rate.n), *shares, style="bold" if form == "all probes" else None)
    return table


def _kept(rates: Mapping[str, KeptRate]) -> FittedTable:
    """Format how similar the answers about other subjects are to those before."""
    table = FittedTable(title="What must not change")
    for column in ("", "n", "first name still said", "same answer", "ROUGE-L with the answer before"):
        table.add_column(column, justify="right" if column else "left")
    for form, same in rates.items():
        said = f"{same.said} of {same.named}"
        table.add_row(form, str(same.n), said, f"{same.same} ({same.same / same.n:.0%})", f"{same.rouge:.2f}")
    return table


def _examples(outcome: Outcome, count: int) -> FittedTable:
    """Print some probes with both answers: of the subject, of neighbours, and general ones."""
    table = FittedTable(title="Examples", show_lines=True)
    for column in ("prompt", "before", "after"):
        table.add_column(column, ratio=1, overflow="fold")
    for rows in (
        outcome.probes,
        [p for p in outcome.kept if p["form"] != "general"],
        [p for p in outcome.kept if p["form"] == "general"],
    ):
        for row in rows[:: max(1, len(rows) // count)][:count]:
            table.add_row(row["prompt"], row["before"], row["after"])
    return table
