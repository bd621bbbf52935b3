"""The output of `alter attack`: tables, notes and the relearning curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich import box

from alter.attacks.base import PLAIN
from alter.attacks.fractions import NO_RETRAINED, _select
from alter.attacks.techniques import ATTACKS, BY_DEPTH, MEASURES, PLACES, SEARCHING
from alter.core import console, warn
from alter.rendering import AFTER, BEFORE, LINE, FittedTable, figure
from alter.settings import rounded
from alter.storage import Record

KNOWN_LOSS = 0.1
"""Rows with a loss below this at the attacker's first step, in nats, are known already."""
LEARNED = 0.7
"""Share of the first losses below which the last must lie, for an attacker to have learned its own rows."""


def _figure(value: float | None, interval: Sequence[float] | None = None, between: str = "\n") -> str:
    """Format a figure and ± half its 95 % interval, by default on a line of its own: the tables have many columns."""
    if value is None:
        return "-"
    return rounded(value, ".3f") + (f"{between}±{(interval[1] - interval[0]) / 2:.3f}" if interval else "")


def show_recovered(records: Sequence[Record], names: Sequence[str]) -> None:
    """Print what each attack recovered, and the hidden states by depth; report on stderr what was refused or poorly trained."""
    table = FittedTable(
        title="What can be brought back",
        caption="after, original, retrained: under the attack; recovered: 1 all, 0 no more than from the retrained model; "
        "± half the 95 % interval over rows; @ step, depth or variant",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("attack", no_wrap=True)
    for column in ("figure", "before", "after", "original", "retrained", "recovered"):
        table.add_column(column, justify="left" if column == "figure" else "right", no_wrap=True)
    refusals: dict[str, list[str]] = {}
    for name in names:
        own = [r for r in records if r.extra.get("attack") == name and r.metric.startswith("attack_recovered_")]
        for place, record in enumerate(own):
            extra = record.extra
            share = "-"
            if record.value is not None:
                ends = extra.get("interval")
                share = rounded(record.value, ".2f") + (f"\n±{(ends[1] - ends[0]) / 2:.2f}" if ends else "")
            label = MEASURES[record.metric.replace("recovered_", "")]
            step = "".join(f"\n@{extra[key]}" for key in PLACES if key in extra)
            figures = (
                _figure(extra[key], extra["intervals"][key])
                for key in ("before", "after", "original_attacked", "retrained")
            )
            table.add_row("" if place else name, f"{label}{step}", *figures, share, end_section=place == len(own) - 1)
            if "refused" in extra:
                refusals.setdefault(extra["refused"], []).append(f"{name} ({label})")
    console.show(table)
    needs: dict[str, list[str]] = {}
    for name in names:
        needs.setdefault(ATTACKS[name].needs, []).append(name)
    console.show("What the attacker needs", style="italic")
    for need, where in needs.items():
        console.show(f" {', '.join(where)}: {need}", style="dim", highlight=False)
    depths = _depths(records)
    if depths is not None:
        console.show(depths)
    for record in records:
        if record.metric == "attack_uds":
            uds = _figure(record.value, record.extra.get("interval"), " ")
            console.show(
                f"UDS {uds} on {record.n} rows ({record.extra['left_out']} left out): 1, at every block as "
                "little is left as in the retrained model; 0, all of it."
            )
    for why, where in refusals.items():
        if why != NO_RETRAINED:
            warn(f"No recovered fraction for {', '.join(where)}: {why}")
    for note in untrained(records):
        warn(note)


def loss_ends(losses: Sequence[float]) -> tuple[float, float]:
    """Return the means of the first and of the last fifth of an attacker's losses."""
    width = max(1, len(losses) // 5)
    return float(np.mean(losses[:width])), float(np.mean(losses[-width:]))


def untrained(records: Sequence[Record]) -> list[str]:
    """Name the training attacks that did not learn their own rows: what they fail to recover is no evidence.

    The original is left out: it knows the rows, and what it has to learn of them says nothing of the model that is attacked.
    """
    losses: dict[tuple[str, str], list[float]] = {}
    for record in records:
        if "losses" in record.extra and record.model != "original":
            losses[record.extra["attack"], record.model] = record.extra["losses"]
    notes = []
    for (name, model), values in losses.items():
        first, last = loss_ends(values)
        if values[0] < KNOWN_LOSS:
            why = (
                "no evidence; give text that it does not know with `relearn.benign`."
                if name.startswith("benign")
                else "it knows the attacker's rows already, as neither an unlearned nor a retrained model should: no evidence."
            )
            notes.append(f"{name} had nothing to learn ({model}: loss {values[0]:.2f} at the start): {why}")
        elif last > LEARNED * first:
            rate = "`relearn.lora_learning_rate`" if name.endswith("lora") else "`relearn.learning_rate`"
            remedy = "`budget`" if name in SEARCHING else f"{rate} or `relearn.steps`"
            notes.append(
                f"{name} hardly learned its own rows ({model}: loss {first:.2f} to {last:.2f}), so what it did not recover "
                f"is no evidence: raise {remedy}."
            )
    return notes


def _depths(records: Sequence[Record]) -> FittedTable | None:
    """Return the table of hidden states: a row for each depth, 0 the embeddings, d what the d-th block gives."""
    columns: dict[str, dict[int, tuple[float | None, Sequence[float] | None]]] = {}
    for record in records:
        if record.metric in BY_DEPTH:
            columns.setdefault(f"{MEASURES[record.metric]}\n{record.model}", {})[record.extra["depth"]] = (
                record.value,
                record.extra.get("interval"),
            )
    for record in records:
        if record.metric == "attack_uds":
            for name, values in record.extra["falls"].items():
                ends = record.extra["fall_intervals"][name]
                columns[f"fall\n{name}"] = dict(enumerate(zip(values, ends, strict=True), 1))
        if record.metric == "attack_cka":
            columns["CKA\n" + record.extra["pair"].replace(" ", "\n")] = {
                depth: (value, None) for depth, value in enumerate(record.extra["depths"])
            }
    if not columns:
        return None
    table = FittedTable(
        title="Hidden states by depth",
        caption="read: next tokens of answers that a probe reads right; lens: probability of the answer that the model's own "
        "head reads; fall: of the original's log-probability with these states in it (UDS); CKA: alike (1) or not, no "
        "evidence of forgetting, and no mean over rows; ± half the 95 % interval over rows",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("depth", justify="right")
    for name in columns:
        table.add_column(name, justify="right")
    for at in sorted({at for column in columns.values() for at in column}):
        table.add_row(str(at), *(_figure(*column.get(at, (None, None))) for column in columns.values()))
    return table


def draw_curves(records: Sequence[Record], path: Path) -> None:
    """Write the relearning curves: a column for each attack, ROUGE-L recall above and probability below."""
    names = list(dict.fromkeys(r.extra["attack"] for r in records if "step" in r.extra and "part" in r.extra))
    shown = [metric for metric in MEASURES if metric not in BY_DEPTH]
    with figure(path, rows=len(shown), columns=len(names), width=3.4, height=2.6) as axes:
        for row, metric in enumerate(shown):
            for column, name in enumerate(names):
                plot = axes[row][column]
                for model, color in (("unlearned", AFTER), ("retrained", BEFORE)):
                    for part, style in (("other", "-"), ("relearned", ":")):
                        points = {
                            r.extra.get("step", 0): r.value
                            for r in records
                            if (r.model, r.metric, r.extra.get("part")) == (model, metric, part)
                            and r.extra["attack"] in (PLAIN, name)
                        }
                        if len(points) > 1:
                            label = f"{model}, {part} rows"
                            plot.plot(list(points), list(points.values()), style, color=color, label=label, marker=".")
                original = _select(records, "original", PLAIN, metric)
                if original and original[0].value is not None:
                    plot.axhline(original[0].value, color=LINE, lw=1, ls="--", label="original")
                plot.set_ylim(0, 1.02)
                if row == 0:
                    plot.set_title(name)
                else:
                    plot.set_xlabel("steps")
                if column == 0:
                    plot.set_ylabel(MEASURES[metric])
        axes[0][0].legend(fontsize=7)
