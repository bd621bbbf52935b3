"""Tables as wide as the terminal at most: where the columns do not fit side by side, each row is a paragraph."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.style import StyleType
from rich.table import Column, Table
from rich.text import Text

from alter.core import cell

BREAKABLE = 18
"""Characters from which on a word (a path, a digest) may be broken rather than the table be stacked."""


class FittedTable(Table):
    """A table of rich that breaks no word and cuts no figure: its columns share the width, or it is stacked.

    Stacked, the first cell of a row stands alone, and below it every other cell that holds something, with the column's name.
    Strings are texts, without markup: a name, a path or a reply may hold brackets.
    """

    def __init__(
        self, *headers: Column | str, title: str | Text | None = None, caption: str | None = None, **given: Any
    ) -> None:
        super().__init__(*headers, **given)
        self.title = cell(title, "table.title") if isinstance(title, str) else title
        self.caption = cell(caption, "table.caption") if caption else None

    def add_column(self, header: RenderableType = "", *args: Any, **given: Any) -> None:
        """Add a column as rich does; what is too long for it goes on below, it is not cut."""
        super().add_column(_text(header), *args, **{"overflow": "fold"} | given)

    def add_row(self, *values: RenderableType | None, **given: Any) -> None:
        """Add a row as rich does."""
        super().add_row(*map(_text, values), **given)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the table, or its rows one below the other."""
        room = options.max_width - self._extra_width
        if self.columns and sum(self._needs(console, options)) > room:
            yield from self._stacked()
        else:
            yield from super().__rich_console__(console, options)

    def _needs(self, console: Console, options: ConsoleOptions) -> list[int]:
        """Return the least width of each column, padding included."""
        needs = []
        for column in self.columns:
            measured = self._measure_column(console, options.update_width(10_000), column)
            padding = self._get_padding_width(column._index)
            least = measured.maximum if column.no_wrap else min(measured.minimum, BREAKABLE + padding)
            needs.append(max(least, 1))
        return needs

    def _calculate_column_widths(self, console: Console, options: ConsoleOptions) -> list[int]:
        """Return the columns' widths: as wide as they like, or the widest narrower, none below what it needs."""
        needs = self._needs(console, options)
        widths = [
            max(self._measure_column(console, options.update_width(10_000), column).maximum, need)
            for column, need in zip(self.columns, needs, strict=True)
        ]
        while sum(widths) > options.max_width:
            able = [place for place, width in enumerate(widths) if width > needs[place]]
            if not able:
                break
            widths[max(able, key=widths.__getitem__)] -= 1
        return widths

    def _stacked(self) -> Iterator[RenderableType]:
        if self.title:
            yield _folded(self.title)
        headers = [_folded(column.header) for column in self.columns]
        for cells in zip(*(list(column.cells) for column in self.columns), strict=True):
            shown = [_folded(value, column.style) for value, column in zip(cells, self.columns, strict=True)]
            if not self.show_header:
                yield Text(": ").join(each for each in shown if each.plain)
                continue
            label = shown[0].plain
            if label:
                shown[0].stylize("bold")
                yield shown[0]
            for header, value in zip(headers[1:], shown[1:], strict=True):
                if value.plain.strip():
                    named = Text.assemble(header, ": ", value) if header.plain else value
                    named.overflow = "fold"
                    yield Padding(named, (0, 0, 0, 2 + len(label) - len(label.lstrip())), expand=False)
        if self.caption:
            yield _folded(self.caption)


def fitted_rows(rows: Sequence[Sequence[str]], best: Container[tuple[int, int]] = ()) -> FittedTable:
    """Return a table of a head and rows of cells, the first column names; the cells of `best` (row, column) are bold."""
    shown = FittedTable()
    for place, header in enumerate(rows[0]):
        shown.add_column(header, justify="right" if place else "left")
    for i, row in enumerate(rows[1:], 1):
        shown.add_row(*(cell(value, "bold" if (i, j) in best else "") for j, value in enumerate(row)))
    return shown


def _text(value: Any) -> Any:
    return cell(value) if isinstance(value, str) else value


def _folded(value: Any, style: StyleType = "") -> Text:
    """Return a cell's text for a paragraph: a second line, which is the first one's interval, stands behind it."""
    # rich fills up a short row with empty strings
    given = cell(value) if isinstance(value, str) else value
    made = Text(" ").join(given.split("\n"))
    made.style = given.style
    made.stylize_before(style)
    made.overflow = "fold"
    return made
