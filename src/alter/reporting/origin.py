"""The origin of a run's figures: its settings, and the weights, data, code and machine behind each measurement."""

from __future__ import annotations

import json

import yaml

from alter.rendering import Html, folded, grid, tag
from alter.reporting.runs import Reported
from alter.storage import Record


def settings_of(run: Reported) -> list[Html]:
    """Return the section that shows the run's own run.yaml."""
    words = tag("p", "The file run.yaml; ", tag("code", "alter unlearn run.yaml --out NEW"), " repeats the run.")
    box = tag(
        "div", tag("pre", run.written, class_="two"), class_="box", tabindex="0", role="region",
        aria_label="Settings of the run",
    )  # fmt: skip
    return [words, folded("All settings", [box])]


def provenance_section(run: Reported, level: int) -> list[Html]:
    """Return the section on weights, data, code and machines; `level` is that of its headings."""
    shown: list[Html] = []
    own = run.facts.get("provenance")
    if own:
        libraries = ", ".join(f"{name} {version}" for name, version in own["versions"].items())
        facts = [
            ("trained", own["measured"]),
            ("alter", f"{own['alter']}, commit {own['commit'] or 'unknown'}"),
            ("Python", own["python"]),
            ("machine", own["machine"]),
            ("libraries", libraries),
            (f"{run.kind} (digest)", run.digest),
        ]
        shown.append(grid(["run", ""], facts, label="Provenance of the run", wide=[1]))
    seen: dict[str, tuple[Record, int]] = {}
    for record in [*run.records, *run.attacks]:
        if record.provenance:
            keys = ("weights", "adapter", "data", "device", "dtype", "seed", "measured", "commit")
            key = json.dumps([record.model, [record.provenance.get(name) for name in keys]])
            seen[key] = (record, seen[key][1] + 1 if key in seen else 1)
    if seen:
        head = ["model", "figures", "measured", "alter", "weights", "adapter", "data", "device", "seed"]
        rows = []
        for record, count in seen.values():
            made = record.provenance
            version = f"{made.get('alter')}, {made.get('commit') or 'commit unknown'}"
            digests = [tag("span", made.get(name) or "-", class_="digest") for name in ("weights", "adapter", "data")]
            others = ["-" if made.get(name) is None else str(made[name]) for name in ("device", "seed")]
            rows.append([record.model, count, made.get("measured"), version, *digests, *others])
        caption = "Digests of the contents; + after a commit: its code was changed."
        shown.append(grid(head, rows, label="Provenance of the figures", numbers=[1], caption=caption))
        asked = {
            yaml.safe_dump({k: v for k, v in made["settings"].items() if v is not None}, sort_keys=False)
            for made in (record.provenance for record, _ in seen.values())
            if isinstance(made.get("settings"), dict)
        }
        if asked:
            shown.append(tag(f"h{level}", "How it was measured"))
            box = {"class_": "box", "tabindex": "0", "role": "region", "aria_label": "Settings of the measurements"}
            shown.append(tag("div", tag("pre", "\n".join(sorted(asked)), class_="two"), **box))
    return [folded("Weights, data, code and machines", shown)]
