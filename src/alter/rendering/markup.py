"""Markup for `alter report`: escaped HTML, tables, marked differences, and charts drawn as SVG.

All text of users, data and models goes through `text`, which escapes it: `tag` takes every string for text unless one of
`text`, `tag` and `join` made it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

from alter.core import Array, bare, spans

TEMPLATE = Path(__file__).parent.parent / "assets" / "report" / "page.html"
SORT = TEMPLATE.with_name("sort.js")
LONG = 20
"""Characters from which on a word in a table may be broken on paper, where nothing scrolls."""

SHEET = 22
"""Columns of figures that a sheet of A4 across holds in the usual letters."""

# Elements ------------------------------------------------------------------------------------------------------------


class Html(str):
    """Markup that is safe to put into the page."""


# what no HTML text may hold: control characters, surrogates without a partner, and marks that turn the text around
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")


def text(value: object) -> Html:
    """Return any value as escaped text; characters that a page cannot hold, or that reorder it, become U+FFFD."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(_FORBIDDEN.sub("\ufffd", str(value)), quote=True))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """Return an element; children and attribute values are escaped unless they are markup already.

    An attribute's `_` is written as `-` and a `_` at its end is dropped (`class_`); None leaves the attribute out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("path", "line", "rect", "circle", "img", "wbr"):
        return Html(f"<{name}{given}/>")
    return Html(f"<{name}{given}>{join(children)}</{name}>")


def join(parts: Iterable[object], between: str = "") -> Html:
    """Return all parts, escaped, one after the other."""
    return Html(str(text(between)).join(text(part) for part in parts))


def folded(title: str, content: Iterable[object]) -> Html:
    """Return collapsible content under a title."""
    return tag("details", tag("summary", title), *content)


def document(title: str, body: object, *, sorting: bool = False) -> str:
    """Return a whole page that fetches nothing and runs no script, but for the one that sorts tables where that is wanted.

    Args:
        title: of the window.
        body: what is inside it.
        sorting: let tables be sorted; the page's policy allows this one script by its hash.
    """
    script = SORT.read_text(encoding="utf-8") if sorting else ""
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=text(title),
        body=text(body),
        policy=f"; script-src 'sha256-{known}'" if sorting else "",
        script=f"<script>{script}</script>\n" if sorting else "",
    )


def grid(
    head: Sequence[object], rows: Sequence[Sequence[object]], *, label: str, numbers: Sequence[int] = (),
    caption: object = None, reference: int | None = None, wide: Sequence[int] = (), sortable: bool = False,
) -> Html:  # fmt: skip
    """Return a table in a box that scrolls by itself.

    Args:
        head: names of the columns.
        rows: cells; the first of each row is its heading.
        label: what the table is, for those who cannot see it.
        numbers: columns that are aligned as numbers.
        caption: below the table.
        reference: the column that is set off as the reference.
        wide: columns that hold sentences.
        sortable: on a page with `sorting`, a click on a column's name sorts by it.
    """

    def of(column: int, cell: object = "") -> str | None:
        names = ["n"] * (column in numbers) + ["reference"] * (column == reference) + ["wide"] * (column in wide)
        words = re.sub(r"<[^>]*>", " ", cell) if isinstance(cell, Html) else str(cell)
        long = ["long"] * any(len(word) >= LONG for word in words.split())
        return " ".join(names + long) or None

    top = tag(
        "tr",
        *(tag("th", c, scope="col", class_=of(i, c)) if c else tag("td", class_=of(i)) for i, c in enumerate(head)),
    )
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row", class_=of(0, row[0])),
            *(tag("td", cell, class_=of(i, cell)) for i, cell in enumerate(row) if i),
        )
        for row in rows
    ]
    kind = " ".join(["sortable"] * sortable + ["vast"] * (len(head) > SHEET)) or None
    whole = tag("table", tag("thead", top), tag("tbody", *body), aria_label=label, class_=kind)
    # the box takes the focus, so that it can be scrolled with the keyboard
    box = tag("div", whole, class_="box", role="region", aria_label=label, tabindex="0")
    return join([box, tag("p", caption, class_="note")]) if caption else box


# Words ---------------------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round values that cover low to high in about `count` steps: 1, 2 or 5 times a power of ten apart."""
    span = (high - low) or abs(high) or 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def common(truth: str, said: str) -> list[bool]:
    """Return for each word of `said` whether it is part of the longest common subsequence with the words of `truth`.

    Case and the punctuation around a word do not count.
    """
    a, b = ([bare(whole[slice(*span)]) for span in spans(whole)] for whole in (truth, said))
    length = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a) - 1, -1, -1):
        row, below = length[i], length[i + 1]
        for j in range(len(b) - 1, -1, -1):
            row[j] = below[j + 1] + 1 if a[i] == b[j] else max(below[j], row[j + 1])
    found, i, j = [False] * len(b), 0, 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            found[j] = True
            i, j = i + 1, j + 1
        elif length[i + 1][j] >= length[i][j + 1]:
            i += 1
        else:
            j += 1
    return found


def highlighted(truth: str, said: str, asked: str = "") -> Html:
    """Return `said` with what it gives away marked: words of `truth`, in its order, that the question `asked` does not hold.

    The mark is underlined as well as coloured, and says itself to a screen reader.
    """
    found = spans(said)
    known = {bare(asked[slice(*span)]) for span in spans(asked)}
    same = [
        there and bare(said[slice(*span)]) not in known for there, span in zip(common(truth, said), found, strict=True)
    ]
    parts: list[Html] = []
    place, i = 0, 0
    while i < len(found):
        last = i
        while last + 1 < len(found) and same[last + 1] == same[i]:
            last += 1
        start, end = found[i][0], found[last][1]
        parts.append(text(said[place:start]))
        if same[i]:
            unseen = [tag("span", words, class_="unseen") for words in ("[from the truth: ", "]")]
            parts.append(tag("mark", unseen[0], said[start:end], unseen[1]))
        else:
            parts.append(text(said[start:end]))
        place, i = end, last + 1
    return join([*parts, text(said[place:])])


# Charts --------------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 210, 52, 10, 26, 36
LETTER = 6.2
"""About how wide a character of a chart's text is."""


@dataclass(frozen=True)
class _Plane:
    """Maps values of a chart to places in the drawing."""

    low: float
    high: float
    bottom: float
    top: float

    def x(self, value: float) -> str:
        return f"{LEFT + (value - self.low) / (self.high - self.low) * (WIDTH - LEFT - RIGHT):.1f}"

    def y(self, value: float) -> str:
        share = (value - self.bottom) / (self.top - self.bottom)
        return f"{HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM):.1f}"

    def frame(self, across: Mapping[float, str], up: Mapping[float, str], label: str) -> list[Html]:
        """Draw grid lines, their labels, and the name of the horizontal axis."""
        left, right, base = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = []
        for value, name in up.items():
            y = self.y(value)
            parts.append(tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
            parts.append(tag("text", name, x=left - 6, y=y, dy="0.35em", text_anchor="end"))
        for value, name in across.items():
            # the last one would stand half outside
            cut = float(self.x(value)) + LETTER * len(name) / 2 > WIDTH
            x, anchor = (WIDTH, "end") if cut else (self.x(value), "middle")
            parts.append(tag("text", name, x=x, y=base + 15, text_anchor=anchor))
        parts.append(tag("line", x1=left, x2=right, y1=base, y2=base, class_="axis"))
        parts.append(tag("text", label, x=(left + right) / 2, y=HEIGHT - 4, text_anchor="middle"))
        return parts

    def upright(self, value: float, label: str) -> list[Html]:
        """Draw a dashed vertical line at one value of the horizontal axis."""
        x = self.x(value)
        near_end = value > (self.low + self.high) / 2
        name = tag(
            "text", label, x=x, dx=-5 if near_end else 5, y=TOP + 9, text_anchor="end" if near_end else "start",
            class_="name",
        )  # fmt: skip
        return [tag("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, class_="mark"), name]


def _drawing(parts: Iterable[Html], alt: str, caption: object) -> Html:
    drawn = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=alt)
    return tag("figure", drawn, tag("figcaption", caption))


def _key(names: Sequence[str], filled: Sequence[str] = ()) -> list[Html]:
    """Draw the names of the lines above a chart, each with a piece of its line; `filled` ones have a bar instead."""
    parts, x = [], float(LEFT)
    for place, name in enumerate(names):
        if name in filled:
            parts.append(tag("rect", x=x, y=6, width=18, height=9, class_=f"f{place}"))
        else:
            parts.append(tag("line", x1=x, x2=x + 20, y1=11, y2=11, class_=f"s{place}"))
        parts.append(tag("text", name, x=x + 25, y=15, class_="name"))
        x += 40 + LETTER * len(name)
    return parts


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]], *, alt: str, caption: object, across: str,
    up_to: float | None = None, at: tuple[float, str] | None = None,
) -> Html:  # fmt: skip
    """Return a line chart of one to three series, told apart by dashes as well as by colour.

    Args:
        series: points (x, y) by name, x rising; those that are not finite are left out.
        alt: what the chart shows, in words.
        caption: below the chart.
        across: name of the horizontal axis.
        up_to: where the vertical axis ends; by default with the largest value. It begins at 0 or below.
        at: where an upright line stands, and its name.
    """
    known = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    xs = [x for points in known.values() for x, _ in points]
    ys = [y for points in known.values() for _, y in points]
    up = ticks(min(0.0, *ys), max(*ys, 0.0) if up_to is None else up_to)
    whole = all(float(x).is_integer() for x in xs)
    marks = [v for v in ticks(min(xs), max(xs)) if min(xs) <= v <= max(xs) and (v.is_integer() or not whole)]
    plane = _Plane(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, up[0], up[-1])
    parts = plane.frame({value: f"{value:g}" for value in marks}, {value: f"{value:g}" for value in up}, across)
    parts += plane.upright(*at) if at else []
    for place, points in enumerate(known.values()):
        path = " L".join(f"{plane.x(x)} {plane.y(y)}" for x, y in points)
        parts.append(tag("path", d=f"M{path}", class_=f"s{place}"))
        if len(points) <= 25:
            parts += [tag("circle", cx=plane.x(x), cy=plane.y(y), r=2.4, class_=f"d{place}") for x, y in points]
    return _drawing([*parts, *_key(list(known))], alt, caption)


Style = Literal["best", "other", "given"]


@dataclass(frozen=True)
class Point:
    """A numbered point of a `scatter`, with its name, and half the length of its error bars; `given` is a square."""

    number: int
    name: str
    x: float
    y: float
    style: Style
    dx: float = 0.0
    dy: float = 0.0


def scatter(points: Sequence[Point], *, across: str, up: str, alt: str, caption: object) -> Html:
    """Return a chart of numbered points, of which the names are in a table.

    Args:
        points: one or more.
        across, up: names of the axes.
        alt, caption: as in `lines`.
    """
    xs = ticks(min(p.x - p.dx for p in points), max(p.x + p.dx for p in points))
    ys = ticks(min(p.y - p.dy for p in points), max(p.y + p.dy for p in points))
    plane = _Plane(xs[0], xs[-1], ys[0], ys[-1])
    parts = plane.frame({value: f"{value:g}" for value in xs}, {value: f"{value:g}" for value in ys}, across)
    # a long name begins at the edge, and is pressed where not even that is enough
    beside = LEFT + LETTER * len(up) <= WIDTH
    pressed = None if LETTER * len(up) <= WIDTH - 8 else WIDTH - 8
    adjust = "spacingAndGlyphs" if pressed else None
    parts.append(
        tag("text", up, x=LEFT if beside else 4, y=14, textLength=pressed, lengthAdjust=adjust, class_="name")
    )
    for point in sorted(points, key=lambda each: each.style == "best"):
        x, y = plane.x(point.x), plane.y(point.y)
        if point.dx:
            ends = {"x1": plane.x(point.x - point.dx), "x2": plane.x(point.x + point.dx)}
            parts.append(tag("line", **ends, y1=y, y2=y, class_="spread"))
        if point.dy:
            ends = {"y1": plane.y(point.y - point.dy), "y2": plane.y(point.y + point.dy)}
            parts.append(tag("line", x1=x, x2=x, **ends, class_="spread"))
        if point.style == "given":
            drawn = tag("rect", x=float(x) - 7, y=float(y) - 7, width=14, height=14, rx=2)
        else:
            drawn = tag("circle", cx=x, cy=y, r=8)
        label = tag("text", point.number, x=x, y=y, dy="0.35em", text_anchor="middle")
        parts.append(
            tag("g", tag("title", f"{point.number} {point.name}"), drawn, label, class_=f"point {point.style}")
        )
    return _drawing(parts, alt, caption)


def histogram(
    edges: Array, heights: Mapping[str, Array], *, threshold: float, alt: str, caption: object, across: str
) -> Html:
    """Return up to two histograms over each other, the first an outline, the second filled; the height is logarithmic.

    Args:
        edges: borders of the bins, [bins + 1].
        heights: by name, the share of each bin, [bins].
        threshold: where an upright line stands.
        alt, caption, across: as in `lines`.
    """
    smallest = min((float(values[values > 0].min()) for values in heights.values() if (values > 0).any()), default=0.1)
    # one bin may hold them all
    floor = min(max(math.floor(math.log10(smallest)), -6), -1)
    plane = _Plane(float(edges[0]), float(edges[-1]), floor, 0)
    up = {float(power): f"{100 * 10.0**power:g} %" for power in range(floor, 1)}
    marks = [value for value in ticks(float(edges[0]), float(edges[-1])) if edges[0] <= value <= edges[-1]]
    parts = plane.frame({value: f"{value:g}" for value in marks}, up, across)
    drawn = []
    for place, values in enumerate(heights.values()):
        levels = [plane.y(max(math.log10(value), floor) if value > 0 else floor) for value in values]
        points = [f"{plane.x(float(edges[0]))} {plane.y(floor)}"]
        for i, level in enumerate(levels):
            points += [f"{plane.x(float(edges[i]))} {level}", f"{plane.x(float(edges[i + 1]))} {level}"]
        points.append(f"{plane.x(float(edges[-1]))} {plane.y(floor)}")
        drawn.append(tag("path", d="M" + " L".join(points), class_="f1" if place else "s0"))
    parts += [*reversed(drawn), *plane.upright(threshold, f"threshold {threshold:.3g}")]
    return _drawing([*parts, *_key(list(heights), list(heights)[1:])], alt, caption)
