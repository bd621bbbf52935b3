"""What attacks brought back: in one sentence for the summary, and as the section with table and plots."""

from __future__ import annotations

from alter.core.records import Record
from alter.report.runs import Reported
from alter.reporting.markup import Html, decimal, grid, lines, percent, tag

RECOVERED = 0.05
"""Share of what was removed from which an attack counts, if its 95 % interval lies above zero."""
MEASURES = {"rouge": "ROUGE-L", "probability": "probability", "probe": "accuracy of the probe"}


def figure_of(record: Record) -> str:
    """Name the figure that an attack's record holds, as the page shows it."""
    kind = record.metric.removeprefix("attack_recovered_")
    return MEASURES.get(kind, kind)


def recovered(run: Reported) -> list[Record]:
    """Return the records that say which share of what was removed an attack recovers."""
    return [r for r in run.attacks if r.metric.startswith("attack_recovered_")]


def brought_back(run: Reported) -> str:
    """Say in a sentence which attacks were tried and what they bring back."""
    if not run.attacks:
        return "Nobody tried: no attack was run."
    found = recovered(run)
    tried = list(dict.fromkeys(str(r.extra.get("attack")) for r in found))
    listed = f"Tried: {', '.join(tried)}."
    if all(r.value is None for r in found):
        return f"{listed} How much they bring back cannot be said; the attacks' section says why."
    strongest: dict[str, Record] = {}
    for record in found:
        name = str(record.extra.get("attack"))
        if record.value is None or record.value < RECOVERED or (record.extra.get("interval") or [1.0])[0] <= 0:
            continue
        if name not in strongest or record.value > (strongest[name].value or 0.0):
            strongest[name] = record
    if not strongest:
        return f"{listed} None brought back {percent(RECOVERED)} or more of what was removed, beyond chance."
    parts = [
        f"{name} {percent(min(record.value or 0.0, 1.0))} ({figure_of(record)}; it needs {record.extra.get('needs')})"
        for name, record in strongest.items()
    ]
    return (
        f"{listed} Of what was removed, these bring back: {'; '.join(parts)}. Others bring back nothing beyond chance."
    )


def attacks(run: Reported) -> list[Html]:
    """Return the section: what each attack recovers, its curves, and why a share could not be given."""
    from alter.attacks.run import untrained

    rows = []
    refused: dict[str, list[str]] = {}
    for record in recovered(run):
        extra, share = record.extra, "-"
        if record.value is not None:
            share = f"{record.value:.2f}"
            share += " [{:.2f}, {:.2f}]".format(*extra["interval"]) if extra.get("interval") else ""
        step = "".join(f", {key} {extra[key]}" for key in ("step", "depth") if extra.get(key) is not None)
        values = [decimal(extra.get(key)) for key in ("original", "before", "after", "retrained")]
        rows.append([extra.get("attack"), extra.get("needs"), f"{figure_of(record)}{step}", *values, share])
        if "refused" in extra:
            refused.setdefault(extra["refused"], []).append(f"{extra.get('attack')} ({figure_of(record)})")
    caption = (
        "recovered: 1 is all that unlearning removed, 0 no more than the same attack gets out of the retrained model; "
        "in brackets the 95 % interval. Of several steps or depths, the one that is best for the attacker."
    )
    head = ["attack", "the attacker needs", "figure", "original", "before", "after", "retrained", "recovered"]
    shown = [grid(head, rows, label="Attacks", numbers=(3, 4, 5, 6, 7), wide=[1], caption=caption, reference=6)]
    plots = []
    for record in recovered(run):
        points = [point for point in record.extra.get("curve", []) if "step" in point]
        if len(points) < 2:
            continue
        series = {
            name: [(p["step"], p[key]) for p in points if p.get(key) is not None]
            for name, key in (("unlearned", "after"), ("retrained", "retrained"), ("original", "original"))
        }
        known = {name: values for name, values in series.items() if values}
        name = f"{record.extra['attack']}: {figure_of(record)}"
        ends = ", ".join(f"{model} {values[-1][1]:.2f}" for model, values in known.items())
        plots.append(
            lines(
                known, across="steps of the attack", up_to=1.0, caption=f"{name} on rows the attacker did not have",
                alt=f"Line chart of {name} over the steps of the attack. At its end: {ends}.",
            )
        )  # fmt: skip
    shown += [tag("div", *plots, class_="plots")] if plots else []
    notes = [f"No recovered fraction for {', '.join(where)}: {why}" for why, where in refused.items()]
    return [*shown, *(tag("p", note, class_="small") for note in [*notes, *untrained(run.attacks)])]
