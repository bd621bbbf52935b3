"""Draw benchmarks/results.csv as benchmarks/results.png: training, growth, decoding, head and loss, and evaluation.

python benchmarks/plot.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results
from alter.rendering.figures import AFTER, BEFORE, LINE, figure

COLORS = (AFTER, "#0f766e", "#1d4ed8", "#a16207", "#7e22ce", "#be185d", "#4d7c0f", "#0891b2", "#111827", BEFORE)
FAMILIES = {
    "training": ("step", "growth"),
    "decoding": ("decode",),
    "head and loss": ("loss",),
    "evaluation": ("evaluation",),
}
"""Groups of panels that share their colours, and the benchmarks that they show."""

VARIANTS = ("lora", "lora_same_loss", "asym_lora", "alter", "alter_experts", "npo_full", "npo_full_mixed")
OBJECTIVES = ("cross_entropy", "inverted_hinge", "keep_base")
PARTS = ("likelihood", "replies", "total")
Series = dict[str, dict[str, tuple[float, float, float]]]


def label(row: dict[str, str]) -> str:
    """The run that a line belongs to: shape, dtype, hardware."""
    parts = [row["shape"], row["dtype"], row["hardware"]]
    parts += [word for word in ("checkpointing", "trained head", "gradnorm") if word in row["settings"]]
    return ", ".join(parts)


def series(rows: Sequence[dict[str, str]], metric: str) -> Series:
    """By run and variant: value and quartiles of a metric."""
    found: Series = {}
    for row in rows:
        if row["metric"] == metric and row["value"]:
            value = float(row["value"])
            low, high = (float(row[side]) if row[side] else value for side in ("low", "high"))
            found.setdefault(label(row), {})[row["variant"]] = value, low, high
    return found


def by_experts(found: Series) -> Series:
    """The variants alter-N alone, named N."""
    return {
        run: {name.removeprefix("alter-"): value for name, value in values.items() if name.startswith("alter-")}
        for run, values in found.items()
    }


def by_part(rows: Sequence[dict[str, str]]) -> Series:
    """The ratios of alter's evaluation, under the names of its parts."""
    found: Series = {}
    for part in PARTS:
        for run, values in series(rows, f"{part}_over_straightforward").items():
            found.setdefault(run, {})[part] = values["alter"]
    return found


def palette(rows: Sequence[dict[str, str]]) -> dict[str, dict[str, str]]:
    """By family: the colour of each of its runs, the same in all of its panels."""
    found = {}
    for family, benchmarks in FAMILIES.items():
        runs = dict.fromkeys(label(row) for row in rows if row["benchmark"] in benchmarks)
        found[family] = {run: COLORS[place % len(COLORS)] for place, run in enumerate(runs)}
    return found


def bars(
    axes: Any, found: Series, colors: dict[str, str], order: Sequence[str], title: str, target: float | None
) -> None:
    """One horizontal bar per variant and run, with the quartiles and the value after them, and a line at the target."""
    width = 0.8 / max(len(found), 1)
    present = [name for name in order if any(name in run for run in found.values())]
    top = target or 0.0
    for place, (run, values) in enumerate(found.items()):
        for number, name in enumerate(present):
            if name in values:
                value, low, high = values[name]
                at = len(present) - 1 - number + (len(found) - 1) * width / 2 - place * width
                errors = [[max(value - low, 0.0)], [max(high - value, 0.0)]]
                axes.barh(at, value, width, xerr=errors, color=colors[run], error_kw={"lw": 0.8})
                axes.annotate(
                    f"{value:.3g}", (max(value, high), at), (4, 0), textcoords="offset points", va="center",
                    fontsize=7, zorder=5, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
                )  # fmt: skip
                top = max(top, value, high)
    if target is not None:
        axes.axvline(target, color=LINE, lw=1.0, ls="--")
    axes.set_yticks(range(len(present)), present[::-1])
    axes.set(title=title, xlim=(0, 1.15 * top or 1.0), ylim=(-0.5, max(len(present), 1) - 0.5))


def lines(
    axes: Any,
    found: Series,
    colors: dict[str, str],
    labels: tuple[str, str],
    title: str,
    *,
    bottom: float = 0.0,
    target: float | None = None,
) -> None:
    """One line per run, over the number that names the variant, with the quartiles, and a line at the target."""
    for run, values in found.items():
        x = sorted(values, key=int)
        value, low, high = zip(*(values[name] for name in x), strict=True)
        at = [int(name) for name in x]
        axes.plot(at, value, marker="o", ms=3.5, color=colors[run])
        axes.fill_between(at, low, high, color=colors[run], alpha=0.2, lw=0)
    drawn = [bound for values in found.values() for _, low, high in values.values() for bound in (low, high)]
    drawn += [] if target is None else [target]
    low, high = min([bottom, *drawn]), max([bottom, *drawn])
    if target is not None:
        axes.axhline(target, color=LINE, lw=1.0, ls="--")
    axes.set(xlabel=labels[0], ylabel=labels[1], title=title, ylim=(low, high + 0.1 * (high - low or 1.0)))


def experts_axis(axes: Any) -> None:
    """Numbers of experts, doubling."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")


def legend(axes: Any, colors: dict[str, dict[str, str]]) -> None:
    """The runs of every family, in a panel of their own."""
    from matplotlib.patches import Patch

    axes.set_axis_off()
    entries = []
    for family, runs in colors.items():
        if runs:
            entries += [Patch(alpha=0, label=f"{family}:"), *(Patch(color=c, label=run) for run, c in runs.items())]
    entries.append(Patch(alpha=0, label="Dashed: the target. Thin lines and bands: quartiles."))
    drawn = axes.legend(
        handles=entries, fontsize=6.5, loc="center left", bbox_to_anchor=(-0.25, 0.5), handlelength=1.4
    )
    # its width must not narrow the panels above
    drawn.set_in_layout(False)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--csv", type=Path, default=results.FILE)
    parser.add_argument("--out", type=Path, default=results.FILE.with_suffix(".png"))
    args = parser.parse_args(argv)
    rows = results.read(args.csv)
    if not rows:
        parser.error(f"{args.csv} holds no results: run benchmarks/step.py first")
    colors = palette(rows)
    training, decoding, loss, evaluation = (colors[family] for family in FAMILIES)
    with figure(args.out, rows=3, columns=4, width=4.6, height=3.5) as axes:
        for place, (metric, title, target) in enumerate(
            (
                ("time_over_lora", "step time / plain LoRA (target: alter 1.05)", 1.05),
                ("time_over_npo_full", "step time / full NPO in float32", None),
                ("memory_over_npo_full", "peak memory / full NPO in float32 (target: 0.25)", 0.25),
                ("whole_over_npo_full", "whole run / full NPO in float32 (target: 0.10)", 0.10),
            )
        ):
            bars(axes[0, place], series(rows, metric), training, VARIANTS, title, target)
        lines(
            axes[1, 0], series(rows, "ratio_by_experts"), training,
            ("experts, all but one frozen", "step time / 1 expert"), "growth with past requests",
        )  # fmt: skip
        lines(
            axes[1, 1], series(rows, "request_s_by_rows"), training,
            ("forget rows of the request", "seconds"), "growth with forget rows",
        )  # fmt: skip
        lines(
            axes[1, 2], by_experts(series(rows, "decode_speed_over_lora")), decoding,
            ("forget experts", "tokens a second / LoRA's"), "decoding speed / plain LoRA (target: 0.95)",
            bottom=0.7, target=0.95,
        )  # fmt: skip
        lines(
            axes[1, 3], by_experts(series(rows, "prompt_time_over_lora")), decoding,
            ("forget experts", "prompt time / LoRA's"), "prompt time / plain LoRA (target: 2.1)",
            bottom=1.5, target=2.1,
        )  # fmt: skip
        for panel in (axes[1, 0], axes[1, 2], axes[1, 3]):
            experts_axis(panel)
        for place, (metric, title, target) in enumerate(
            (
                ("memory_over_whole", "loss in chunks / at once: peak memory (target at 128k: 0.2)", 0.2),
                ("time_over_whole", "loss in chunks / at once: time", None),
            )
        ):
            bars(axes[2, place], series(rows, metric), loss, OBJECTIVES, title, target)
        bars(axes[2, 2], by_part(rows), evaluation, PARTS, "evaluation time / straightforward", None)
        legend(axes[2, 3], colors)


if __name__ == "__main__":
    main()
