"""How a run went: its losses, and the watched figures, by step."""

from __future__ import annotations

from typing import Any

from alter.rendering import Html, finite, lines, tag
from alter.reporting.runs import Reported

TERMS = {
    "loss": "weighted sum of the terms, mean since the entry before",
    "forget": "forget objective of the batch, see Settings",
    "retain": "retain objective of the batch, see Settings",
    "structure": "cross-entropy on high-entropy tokens",
}
WATCHED = {
    "probability": "probability of the answers",
    "exact_memorization": "exact memorisation: next tokens predicted right",
    "rouge": "ROUGE-L recall of the replies",
    "truth_ratio": "truth ratio, 1: wrong answers are as likely as the right one",
}


def logged(run: Reported) -> list[Any]:
    """Return the entries of the log that hold a loss; none if there is one only, which draws no line.

    One that was not finite is null in JSON.
    """
    found = [entry for entry in run.facts.get("log", []) if "loss" in entry]
    return found if len(found) > 1 else []


def training_section(run: Reported, level: int) -> list[Html]:
    """Return the section on training: losses, and what was watched, by step; `level` is that of its headings."""
    plots = []
    for term, meaning in TERMS.items():
        points = [(float(e["step"]), float(e[term])) for e in run.facts["log"] if finite(e.get(term))]
        if len(points) > 1:
            alt = f"Line chart of {term}: {points[0][1]:.3g} at step {points[0][0]:g}, {points[-1][1]:.3g} at the end."
            plots.append(lines({term: points}, alt=alt, caption=meaning, across="step"))
    losses = [finite(entry["loss"]) for entry in logged(run)]
    shown = [tag("div", *plots, class_="plots")]
    if not all(losses):
        broke = f"{losses.count(False)} of the {len(losses)} losses are not finite: training broke down."
        shown.insert(0, tag("p", tag("span", broke, class_="verdict bad")))
    watch = run.facts.get("watch")
    if watch:
        checks, kept = watch["checks"], watch["kept"]
        why = f"Step {kept['step']} was kept: {kept['why']}."
        shown += [tag(f"h{level}", "Watched while it trained"), tag("p", why)]
        drawn = []
        for metric, meaning in WATCHED.items():
            series = {
                name: [
                    (float(c["step"]), float(c[f"{name}_{metric}"]))
                    for c in checks
                    if finite(c.get(f"{name}_{metric}"))
                ]
                for name in ("forget", "retain", "holdout")
            }
            series = {name: points for name, points in series.items() if len(points) > 1}
            if series:
                ends = ", ".join(f"{name} {points[-1][1]:.2f}" for name, points in series.items())
                alt = f"Line chart of the {meaning} by step. At the last check: {ends}."
                at = (float(kept["step"]), "kept")
                drawn.append(lines(series, alt=alt, caption=meaning, across="step", up_to=1.0, at=at))
        quality = [(float(c["step"]), float(c["forget_quality"])) for c in checks if finite(c.get("forget_quality"))]
        if len(quality) > 1:
            alt = f"Line chart of the forget quality by step. At the last check: {quality[-1][1]:.3g}."
            at = (float(kept["step"]), "kept")
            drawn.append(lines({"forget quality": quality}, alt=alt, caption="forget quality", across="step", at=at))
        shown.append(tag("div", *drawn, class_="plots"))
    return shown
