"""The end of a run: figures before and after, the least forgotten rows, and the verdict, stored and printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from alter.core import show
from alter.evaluation import others
from alter.evaluation.told import told
from alter.evaluation.verdict import SLACK, Verdict
from alter.metrics import CATALOGUE
from alter.rendering import FittedTable
from alter.storage import Record

if TYPE_CHECKING:
    from alter.evaluation.answered import Answered

WORST = 3
"""Rows that are shown of those that were forgotten least."""


def closing_facts(
    found: Verdict,
    before: Mapping[str, Answered],
    after: Mapping[str, Answered],
    reference: Answered | None,
    texts: bool,
    people: frozenset[tuple[str, ...]] = frozenset(),
) -> dict[str, Any]:
    """Return what `closing_table` shows, as JSON values: verdict, figures, and the least forgotten rows.

    With `people`, the names that rows are about, replies that name somebody else are counted (`others`).
    """

    def summary(part: Answered) -> dict[str, Any]:
        told = others.count_others(part.questions, part.truths, part.replies, people) if people else None
        return {**part.summary(), "others": told}

    forget = after["forget"]
    order = sorted(
        range(len(forget.replies)),
        key=lambda i: (forget.measures.said[i] is not True, -forget.measures.recall[i], -forget.probability[i], i),
    )
    rows = [
        {
            "row": forget.examples[i].index,
            "recall": float(forget.measures.recall[i]),
            "probability": float(forget.probability[i]),
            "said": forget.measures.said[i],
            **(
                {"question": forget.questions[i], "truth": forget.truths[i], "reply": forget.replies[i]}
                if texts
                else {}
            ),
        }
        for i in order[:WORST]
    ]
    return {
        "verdict": found.to_dict(),
        "before": {name: summary(part) for name, part in before.items()},
        "after": {name: summary(part) for name, part in after.items()},
        "reference": None if reference is None else summary(reference),
        "worst": rows,
    }


def others_named(closed: Mapping[str, Any]) -> str | None:
    """Return a sentence if replies name somebody else where they did not before (see `closing_facts`), or None."""
    was, now = (closed.get(when, {}).get("forget", {}) for when in ("before", "after"))
    if not now.get("others") or now["others"] <= was["others"] + SLACK * now["n_answers"]:
        return None
    return (
        f"{now['others']} of {now['n_answers']} replies name somebody else of whom the rows speak, {was['others']} before: "
        "new statements about others, which may be false."
    )


def closing_of(records: Sequence[Record]) -> dict[str, Any] | None:
    """Return what `RowsEvaluation` kept of the verdict in its records, or None where nothing was compared."""
    return next((record.extra["closing"] for record in records if "closing" in record.extra), None)


FIGURES = {
    "probability": "probability of the true answers",
    "worded": "... asked in other words",
    "rouge": "ROUGE-L recall of the replies",
    "said": "replies that give the answer",
    "repetition": "repetition within a reply",
    "broken": "broken replies",
    "empty": "empty replies",
    "others": "replies that name somebody else",
}
STYLES = {"forgotten": "bold green", "not forgotten": "bold red", "collapsed": "bold red", "unproven": "bold yellow"}


def closing_table(closed: Mapping[str, Any], commands: Sequence[str] = ()) -> Group:
    """Return the end of a run for a terminal of 80 columns: figures before and after, worst rows, verdict, what is next."""
    table = FittedTable(title="Before and after")
    reference = closed["reference"]
    for column in ("", "before", "after", *(["reference"] if reference else [])):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    for part, title in (("forget", "to forget"), ("retain", "to keep"), ("holdout", "never seen")):
        was, now = closed["before"].get(part), closed["after"].get(part)
        if was is None:
            continue
        table.add_row(Text(f"{title} ({was['n']} rows, {was['n_answers']} answered)", style="bold"))
        for name, meaning in FIGURES.items():
            if name == "worded" and was.get(name) is None:
                continue
            other = [told(reference if part == "forget" else None, name, "-")] if reference else []
            table.add_row(f"  {meaning}", told(was, name, "-"), told(now, name, "-"), *other)
    parts: list[Any] = [table]
    if closed.get("leak"):
        parts.append(leak_table(closed["leak"]))
    if closed.get("judged"):
        parts.append(judged_table(closed["judged"]))
    if closed["worst"]:
        parts.append(Text("\nForgotten least:"))
    for row in closed["worst"]:
        head = f"row {row['row']}: recall {row['recall']:.2f}, probability {row['probability']:.3f}"
        parts.append(Text(f"  {head}{', gives the answer' if row['said'] else ''}", style="dim"))
        for name in ("question", "truth", "reply"):
            if name in row:
                parts.append(Text(f"    {name}: {' '.join(str(row[name]).split())[:200] or '(empty)'}"))
    found = closed["verdict"]
    parts.append(Text(f"\n{found['word'].upper()}.", style=STYLES[found["word"]]))
    parts += [Text(sentence) for sentence in found["why"]]
    named = others_named(closed)
    if named is not None:
        refusal = (
            "alter unlearn ... --objective.kind refuse --experts-only --least-steps 120 --learning-rate-experts 0.01"
        )
        parts.append(Text(f"{named} A refusal as the target avoids them: {refusal}", style="yellow"))
    if commands:
        parts.append(Text("\nNext:"))
        parts += [Text(f"  {command}", overflow="fold") for command in commands]
    return Group(*parts)


def leak_table(leaks: Mapping[str, Any]) -> FittedTable:
    """Return leak@k with its 95 % intervals, a row for each k and a column for each model."""
    names = [name for name in ("before", "after", "retrained") if name in leaks]
    settings, asked = leaks[names[0]]["settings"], leaks[names[0]]["questions"]
    table = FittedTable(title=f"leak@k: one of k samples gives the answer (by {settings['hit']['kind']})")
    table.add_column("k", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for k in leaks[names[0]]["at"]:
        cells = []
        for name in names:
            found = leaks[name]["at"][k]
            low_high = found["interval"]
            cells.append(f"{found['value']:.3f}" + ("" if low_high is None else " [{:.2f}, {:.2f}]".format(*low_high)))
        table.add_row(k, *cells)
    unknown = leaks[names[0]]["unknown"]
    table.caption = f"{asked} questions, {settings['samples']} samples of each; in brackets the 95 % interval" + (
        f"; {unknown} more have no facts to look for" if unknown else ""
    )
    return table


def judged_table(judged: Sequence[Mapping[str, Any]]) -> FittedTable:
    """Return the rates of replies and IAM with their 95 % intervals, a row for each figure of each model."""
    table = FittedTable(title="Answers judged by facts", caption="in brackets the 95 % interval")
    for column in ("figure", "model", "value", "rows", "what it says"):
        table.add_column(column, justify="right" if column in ("value", "rows") else "left", overflow="fold")
    for each in judged:
        interval = "" if each["interval"] is None else " [{:.2f}, {:.2f}]".format(*each["interval"])
        meaning = CATALOGUE[each["metric"]].meaning
        table.add_row(each["metric"].upper(), each["model"], f"{each['value']:.3f}{interval}", str(each["n"]), meaning)
    return table


def show_closing(closed: Mapping[str, Any], commands: Sequence[str] = ()) -> None:
    """Print `closing_table`."""
    show(closing_table(closed, commands), highlight=False)
