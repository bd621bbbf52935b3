"""A certificate as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from alter.core import cell
from alter.rendering import FittedTable
from alter.requests.certificate.form import FIGURES


def show_certificate(content: Mapping[str, Any], console: Console) -> None:
    """Print a certificate: who asked, what was measured, what attacks recovered."""
    asked = content["asked"]
    facts = FittedTable(title=cell(f"Certificate of {asked.get('request', 'a run')}"), show_header=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    shown = {
        "asked": asked["received"],
        "state": content.get("state"),
        "why": " ".join(content.get("why") or []),
        "data (SHA-256)": asked["data"],
        "base": content["base"]["name"],
        "shipped": ", ".join((content.get("shipped") or {}).get("files", {})),
        "settings (SHA-256)": content["settings"]["sha256"],
        "head of the history": (content.get("history") or {}).get("head"),
        "limits": " ".join(content["limits"]),
    }
    for name, value in shown.items():
        if value:
            facts.add_row(name, cell(value))
    console.print(facts)
    measured = content["measured"]
    rows = FittedTable(title="Measured, 95 % interval")
    if "figures" in measured:
        for column in ("model", "metric", "value", "n"):
            rows.add_column(column, justify="left" if column in ("model", "metric") else "right")
        for each in measured["figures"]:
            rows.add_row(*map(cell, (each["model"], each["metric"], _told(each), each["n"])))
    else:
        for column in ("", "before", "after", "reference"):
            rows.add_column(column, justify="right" if column else "left")
        for name in FIGURES:
            parts = [(measured[when] or {}).get(name) for when in ("before", "after", "reference")]
            if any(parts):
                rows.add_row(cell(name), *(cell(_told(part) if part else "") for part in parts))
    if rows.rows:
        console.print(rows)
    if content["attacks"]:
        attacked = FittedTable(title="Recovered by attacks: 1 all, 0 no more than from the retrained model")
        for column in ("attack", "figure", "recovered", "the attacker needs"):
            attacked.add_column(column)
        for each in content["attacks"]:
            value = {"value": each["recovered"], "interval": each.get("interval")}
            figure = "no evidence" if "no_evidence" in each else _told(value)
            attacked.add_row(*map(cell, (each["attack"], each["metric"], figure, each.get("needs", ""))))
        console.print(attacked)
        for name, why in {
            each["attack"]: each["no_evidence"] for each in content["attacks"] if "no_evidence" in each
        }.items():
            console.print(cell(f"{name} {why}"))


def _told(each: Mapping[str, Any]) -> str:
    value, interval = each["value"], each.get("interval")
    if value is None:
        return "-"
    text = f"{value} of {each['n']}" if isinstance(value, int) else f"{value:.3f}"
    return text + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")
