"""Print what the routers of finished runs let through and what they catch, as Markdown tables.

alter forget "Harry Potter" --model builtin:smollm2 --out runs/potter
python benchmarks/router.py runs/potter
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def row(name: str, rates: Sequence[Mapping[str, Any] | None]) -> str:
    """One line of a table: a share with its 95 % interval and the number of tokens, for each run."""
    cells = []
    for rate in rates:
        if rate is None or rate["share"] is None:
            cells.append("-")
            continue
        low, high = rate["interval"]
        cells.append(f"{rate['share']:.1%} ({low:.1%} to {high:.1%}, n {rate['tokens']})")
    return f"| {name} | {' | '.join(cells)} |"


def tables(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """False alarms by kind of text, and what is caught by wording, with a column for each run's router record."""
    lines = []
    for title, of in (
        ("false alarms", lambda record: {"all": record["false_alarms"], **record["false_alarms"]["by_kind"]}),
        ("caught", lambda record: record["caught"]),
    ):
        found = [of(record) for record in runs.values()]
        lines += [f"| {title} | {' | '.join(runs)} |", "|---" * (1 + len(runs)) + "|"]
        lines += [
            row(name, [each.get(name) for each in found]) for name in dict.fromkeys(n for each in found for n in each)
        ]
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read `run.json` of each run and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of alter unlearn or alter forget")
    given = parser.parse_args(arguments)
    print(tables({run.name: json.loads((run / "run.json").read_text("utf-8"))["router"] for run in given.runs}))


if __name__ == "__main__":
    main()
