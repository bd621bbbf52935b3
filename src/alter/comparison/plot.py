"""The plot of a comparison: forgetting against utility."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from alter.comparison.choice import criterion
from alter.comparison.settings import Compare
from alter.comparison.table import TableRow, axis, axis_label, axis_name
from alter.rendering import AFTER, BEFORE, OTHER, figure, name_points


def pareto(path: Path, settings: Compare, rows: Sequence[TableRow]) -> None:
    """Draw forget quality against utility, a plot for each split, as PNG: spread as bars, a line through the best."""
    named: dict[str, list[tuple[bool, tuple[float, float], str, str]]] = {}
    with figure(path, columns=len(settings.forgotten), width=5.6, height=5.2) as plots:
        for axes, split in zip(plots[0], settings.forgotten, strict=True):
            kind = criterion(settings, split)
            key = axis_name(kind)
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
            axes.set(xlabel="model utility (higher is better)", ylabel=f"{axis_label(kind)} (higher is better)")
            axes.set_title(f"{split}: ★ not dominated")
            axes.margins(0.1)
        for axes, split in zip(plots[0], settings.forgotten, strict=True):
            # what is not dominated is named first, where there is most room
            order = sorted(named.get(split, []), key=lambda each: each[0])
            name_points(axes, [each[1] for each in order], [each[2] for each in order], [each[3] for each in order])
