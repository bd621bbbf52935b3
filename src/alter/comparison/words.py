"""A comparison for readers: its tables and rules in words, for a terminal, as Markdown and as a page."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Group

from alter.comparison.checks import ORIGINAL
from alter.comparison.choice import columns, criterion
from alter.comparison.rules import rules
from alter.comparison.settings import Compare
from alter.comparison.table import COSTS, DISTILLING, TableRow, axis, axis_label, axis_name
from alter.core import cell
from alter.methods import METHODS
from alter.rendering import Html, Point, Style, document, fitted_rows, grid, join, scatter, tag
from alter.settings import rounded


def _shown(row: TableRow, key: str, form: str, scale: float = 1.0) -> str:
    if not math.isfinite(row.mean.get(key, math.nan)):
        return "-"
    text = rounded(row.mean[key] * scale, form)
    if key in row.spread:
        return f"{text} ± {rounded(row.spread[key] * scale, form)}"
    ends = ", ".join(rounded(end * scale, form) for end in row.interval.get(key, ()))
    return f"{text} [{ends}]" if ends else text


def _counted(row: TableRow, key: str) -> str:
    """Format a figure, or a share as a count out of its replies, over the seeds."""
    of = row.mean.get(f"{key}_of", math.nan)
    return f"{_shown(row, key, '.0f', of)} of {of:.0f}" if math.isfinite(of) else _shown(row, key, ".3f")


def _on_edge(value: float, grid: Sequence[float]) -> str:
    """Format a chosen value, marked if it is the first or last of its grid: a better one may lie beyond."""
    end = "" if len(set(grid)) < 2 else {min(grid): " (lowest)", max(grid): " (highest)"}.get(value, "")
    return f"{value:g}{end}"


@dataclass(frozen=True)
class Text:
    """The comparison in words and tables, which Markdown and the page show alike.

    `results`, `costs` and `searched` are tables: a head and rows of cells. Of the results, `best` (row, column) are not
    dominated.
    """

    results: list[list[str]]
    costs: list[list[str]]
    searched: list[list[str]]
    best: set[tuple[int, int]]
    rules: list[str]
    notes: list[str]


def described(settings: Compare, rows: Sequence[TableRow], divided: Mapping[str, Mapping[str, int]]) -> Text:
    """Compose the tables, how they were made, and what went wrong.

    Args:
        divided: by split, the number of forget rows of each part.
    """
    results, best = _results(settings, rows)
    notes = [note for row in rows for note in row.notes]
    return Text(results, _costs(settings, rows), _searched(rows), best, rules(settings, divided), notes)


def _in_order(rows: Sequence[TableRow]) -> list[str]:
    """Return the names of the rows: the given models first, even one that only a later split has."""
    return list(dict.fromkeys(row.name for row in sorted(rows, key=lambda row: row.choice is not None)))


def _results(settings: Compare, rows: Sequence[TableRow]) -> tuple[list[list[str]], set[tuple[int, int]]]:
    """Make the table of figures, a line for each name and some columns for each split; and mark the cells that are not
    dominated.
    """
    by = {(row.name, row.split): row for row in rows}
    measured = {key for row in rows for key, value in row.mean.items() if math.isfinite(value)}
    other_words = "forget_probability_reworded"
    shown = {key: title for key, title in columns(settings).items() if key != other_words or key in measured}
    results = [["method", *(f"{split}: {title}" for split in settings.forgotten for title in shown.values())]]
    best: set[tuple[int, int]] = set()
    for name in _in_order(rows):
        line = [name]
        for split in settings.forgotten:
            row = by.get((name, split), TableRow(name, split, 0, {}, {}))
            line += [_shown(row, "forget_quality", ".1f"), *(_counted(row, key) for key in list(shown)[1:])]
            if row.clear:
                best.add((len(results), len(line) - len(shown) + 1))
        results.append(line)
    return results, best


def _costs(settings: Compare, rows: Sequence[TableRow]) -> list[list[str]]:
    """Make the table of costs: each method's on each split, the chosen setting, and whether another dominates it."""
    by = {(row.name, row.split): row for row in rows}
    kept = "keeps utility" if settings.survival.bound is None else "within the bound"
    distilled = {key: title for key, title in DISTILLING.items() if any(key in row.mean for row in rows)}
    head = [
        "method",
        "split",
        *COSTS.values(),
        *distilled.values(),
        "chosen: rate ×",
        "epochs",
        kept,
        "searched cells done",
    ]
    costs = [[*head, "seeds", "dominated", "with fluency"]]
    places = [(name, split) for name in _in_order(rows) for split in settings.forgotten]
    for row in (by[place] for place in places if place in by):
        if row.choice is None:
            continue
        setting, dominance = row.choice.setting, (row.dominated, row.dominated_with_fluency)
        rates, lengths = ([getattr(each, of) for each in row.choice.searched] for of in ("rate", "epochs"))
        costs.append(
            [
                *(row.name, row.split, _shown(row, "seconds", ".0f")),
                *(_shown(replace(row, spread={}), key, ",.0f") for key in ("steps", "trained_parameters")),
                _shown(row, "peak_memory", ".2f", 1e-9),
                *(_shown(row, key, ",.0f") for key in distilled),
                *(("-", "-") if setting is None else map(_on_edge, setting, (rates, lengths))),
                "yes" if row.choice.keeps else "no",
                *(f"{row.choice.finished}/{row.choice.budget}", str(row.seeds)),
                *(("-", "-") if not row.seeds else ("yes" if d else "no" for d in dominance)),
            ]
        )
    return costs


def _kept_name(settings: Compare) -> str:
    return "utility" if settings.survival.bound is None else "exp(-disturbance)"


def _searched(rows: Sequence[TableRow]) -> list[list[str]]:
    """Make a line for each method and end of its chain: every setting, its forgetting and utility, ★ the chosen one."""
    choices = {id(row.choice): row for row in rows if row.choice is not None}  # a chain's splits share theirs
    lines = []
    for row in choices.values():
        assert row.choice is not None
        several = len({each.epochs for each in row.choice.searched}) > 1
        cells = []
        for each in row.choice.searched:
            length = f", {each.epochs:g} epochs" if several else ""
            star = "★ " if (each.rate, each.epochs) == row.choice.setting else ""
            found = (
                "not finished"
                if math.isnan(each.forgetting)
                else f"{rounded(each.forgetting, '.2f')} / {rounded(each.utility, '.3f')}"
            )
            cells.append(f"{star}× {each.rate:g}{length}: {found}")
        lines.append([row.name, row.split, *cells])
    width = max((len(line) for line in lines), default=2)
    return [
        ["method", "split", *(f"setting {i}" for i in range(1, width - 1))],
        *(line + [""] * (width - len(line)) for line in lines),
    ]


def markdown(said: Text) -> str:
    """Render the comparison as Markdown."""

    def table(rows: Sequence[Sequence[str]]) -> list[str]:
        lines = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        head = ["| " + " | ".join(lines[0]) + " |", "|---" + "|---:" * (len(lines[0]) - 1) + "|"]
        return head + ["| " + " | ".join(line) + " |" for line in lines[1:]]

    results = [
        [f"**{cell}**" if (i, j) in said.best else cell for j, cell in enumerate(line)]
        for i, line in enumerate(said.results)
    ]
    lines = [*table(results), "", *table(said.costs), "", *(f"* {rule}" for rule in said.rules)]
    notes = ["", "Notes on cells:", "", *(f"* {note}" for note in said.notes)] if said.notes else []
    return "\n".join(lines + notes) + "\n"


def drawn(said: Text) -> Group:
    """Return the comparison for a terminal."""
    lines = [f"* {rule}" for rule in said.rules]
    if said.notes:
        lines += ["", "Notes on cells:", *(f"* {note}" for note in said.notes)]
    return Group(fitted_rows(said.results, said.best), fitted_rows(said.costs), *map(cell, lines))


_LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "×": r"$\times$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def latex(said: Text) -> str:
    """Render the table of results as LaTeX, with the package booktabs."""

    def line(cells: Sequence[str], number: int) -> str:
        escaped = ["".join(_LATEX.get(char, char) for char in cell) for cell in cells]
        return (
            " & ".join(rf"\textbf{{{c}}}" if (number, j) in said.best else c for j, c in enumerate(escaped)) + r" \\"
        )

    head, *rows = (line(cells, number) for number, cells in enumerate(said.results))
    columns = "l" + "r" * (len(said.results[0]) - 1)
    parts = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(["% needs \\usepackage{booktabs}", *parts]) + "\n"


def _chart(settings: Compare, rows: Sequence[TableRow], split: str, numbers: Mapping[str, int]) -> Html:
    """Describe a split's chart in a sentence, and draw it: numbered points, forgetting against utility."""
    kind = criterion(settings, split)
    points, names = [], []
    for row in (row for row in rows if row.split == split):
        x, y = row.mean.get("model_utility", math.nan), axis(row, kind)
        if math.isfinite(x) and math.isfinite(y):
            style: Style = "given" if row.choice is None else "other" if row.dominated else "best"
            spread = (row.spread.get("model_utility", 0.0), row.spread.get(axis_name(kind), 0.0))
            points.append(Point(numbers[row.name], row.name, x, y, style, *spread))
            names += [f"{row.name} ({numbers[row.name]})"] if style == "best" else []
    listed = ", ".join(names) or "none has finished"
    floor = next((p.y for p in points if p.name == ORIGINAL), -math.inf)
    idle = [f"{p.name} ({p.number})" for p in points if p.style == "best" and p.y <= floor]
    # what leaves the model as it is keeps all of it, and no other method keeps more
    note = f" Not forgotten more than by the original itself: {', '.join(idle)}." if idle else ""
    sentence = (
        f"On {split} each point is a method by its number in the table: farther right it keeps more of what was to stay, farther "
        f"up it forgets more; those that no method beats in both: {listed}.{note}"
    )
    if not points:
        return tag("p", sentence)
    told = "; ".join(
        f"{point.name}: utility {rounded(point.x, '.2f')}, {axis_label(kind)} {rounded(point.y, '.2f')}"
        for point in points
    )
    drawn = scatter(
        points,
        across="model utility, better →",
        up=f"↑ better: {axis_label(kind)}",
        alt=f"Forgetting against utility on {split}. {told}.",
        caption=f"{split}. Filled: beaten by no other method; hollow: beaten; squares: models as they are. Lines: ± one standard "
        "deviation over seeds.",
    )
    return join([tag("p", sentence), drawn])


def _links(name: str, settings: Compare, rows: Sequence[TableRow]) -> Html:
    """Link to more about a method: its paper, the run of its first seed, and its model's answers."""
    found: list[Html] = []
    preset = METHODS.get(str(settings.settings.get(name, {}).get("method", name)))
    paper = None if preset is None else re.search(r"arXiv:(\d{4}\.\d{4,5})", preset.source)
    if paper is not None:
        found.append(tag("a", "paper", href=f"https://arxiv.org/abs/{paper[1]}", rel="noreferrer"))
    row = next((row for row in rows if row.name == name and row.cells), None)
    if row is not None:
        folder = f"cells/{row.cells[0]}"
        found.append(tag("a", "run", href=f"{folder}/cell.json"))
        found.append(tag("a", "answers", href=f"{folder}/test-{row.split}.json"))
    return tag("span", *(join([" ", link]) for link in found), class_="links small")


def _short(model: str) -> str:
    """Return a model's name as a heading has it: of a folder's path the last part; a hub's or a shipped one whole."""
    path = Path(os.path.expanduser(model))
    return path.absolute().name or model if path.is_absolute() or path.is_dir() else model


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def html_page(said: Text, settings: Compare, rows: Sequence[TableRow]) -> str:
    """Render the comparison as one self-contained HTML page: charts, sortable tables, and links into the folder."""
    numbers = {name: place for place, name in enumerate(_in_order(rows), start=1)}
    results: list[list[object]] = [
        [tag("strong", cell) if (i, j) in said.best else cell for j, cell in enumerate(line)]
        for i, line in enumerate(said.results)
    ]
    for line in results[1:]:
        name = str(line[0])
        line[0] = join([tag("span", f"{numbers[name]} ", class_="soft"), name, _links(name, settings, rows)])
    model = _short(settings.model)
    title = f"Comparison on {model}"
    counts = (_several(len(settings.methods), "method"), _several(len(settings.seeds), "seed"), *settings.forgotten)
    body = [
        tag("h1", "Comparison on ", tag("span", model, title=settings.model)),
        tag("p", f"{', '.join(counts)}."),
        *(_chart(settings, rows, split, numbers) for split in settings.forgotten),
        grid(
            results[0],
            results[1:],
            label="Results",
            numbers=range(1, len(results[0])),
            sortable=True,
            caption="A click on a column's name sorts by it. The same table for LaTeX: table.tex.",
        ),
        tag("h2", "What it cost"),
        grid(said.costs[0], said.costs[1:], label="Costs", numbers=range(2, len(said.costs[0])), sortable=True),
        tag("h2", "What the search found"),
        grid(
            said.searched[0],
            said.searched[1:],
            label="Search",
            caption=f"Learning rate × …: forgetting / {_kept_name(settings)} on validation rows, means over the search seeds; ★ the choice.",
        ),
        tag("h2", "How it was made"),
        tag("ul", *(tag("li", rule) for rule in said.rules)),
    ]
    if said.notes:
        body += [tag("h2", "Notes on cells"), tag("ul", *(tag("li", note) for note in said.notes))]
    return document(title, tag("main", *body, class_="broad"), sorting=True)
