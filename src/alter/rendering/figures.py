"""Figures: one light style for all, drawn without a display, written whole or not at all."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alter.storage import write_atomic

if TYPE_CHECKING:
    import numpy.typing as npt

BEFORE, AFTER, OTHER, LINE = "#8a8f98", "#c2410c", "#2563eb", "#111827"
"""Colours of the model before, the model after, what it is compared with, and lines across a plot."""

STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.edgecolor": "#9ca3af",
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "savefig.facecolor": "white",
}


@contextlib.contextmanager
def figure(
    path: str | os.PathLike[str], *, rows: int = 1, columns: int = 1, width: float = 4.6, height: float = 3.2
) -> Iterator[npt.NDArray[Any]]:
    """Yield the axes [rows, columns] of a figure, and write it as PNG to `path` when the block ends without an error.

    Uses the Agg canvas and no state of matplotlib's own, so it works without a display and in threads.

    Args:
        path: where the PNG goes; its folder is made.
        rows, columns: of plots.
        width, height: of one plot, in inches (at 150 dots each).
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(width * columns, height * rows), layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn.subplots(rows, columns, squeeze=False)
        image = io.BytesIO()
        # without a date and a version inside, equal figures are equal files
        drawn.savefig(image, format="png", dpi=150, metadata={"Software": None})
    write_atomic(path, image.getvalue())


def overlay(axes: Any, edges: npt.ArrayLike, shares: Mapping[str, npt.ArrayLike], threshold: float) -> None:
    """Draw one or two histograms over each other, with a line at the threshold.

    Args:
        axes: one plot of `figure`.
        edges: borders of the bins, [bins + 1].
        shares: by name, the share of all values in each bin, [bins]; the first is filled, the second an outline.
        threshold: where the line stands, on the axis of the edges.
    """
    import numpy as np

    for place, (name, values) in enumerate(shares.items()):
        color = (BEFORE, AFTER)[place]
        percent = 100 * np.asarray(values)
        axes.stairs(
            percent, edges, label=name, color=color, fill=place == 0, alpha=0.55 if place == 0 else 1.0, lw=1.4
        )
    axes.axvline(threshold, color=LINE, lw=1.0, ls="--", label=f"threshold {threshold:.3g}")
    # a pile of certain tokens at zero would flatten everything else
    axes.set_yscale("log")
    axes.set_ylabel("tokens in the bin, % (log)")
    axes.legend()


def before_and_after(axes: Any, before: npt.ArrayLike, after: npt.ArrayLike, threshold: float) -> None:
    """Draw how often each pair of values occurs, with both thresholds: the quarters are stay and change.

    Args:
        axes: one plot of `figure`.
        before, after: [n], of the same tokens.
        threshold: of both axes.
    """
    axes.hexbin(before, after, gridsize=48, bins="log", mincnt=1, cmap="Oranges", linewidths=0.1)
    axes.axvline(threshold, color=LINE, lw=1.0, ls="--")
    axes.axhline(threshold, color=LINE, lw=1.0, ls="--")
    top = max(axes.get_xlim()[1], axes.get_ylim()[1])
    axes.set(xlim=(0, top), ylim=(0, top))


def name_points(axes: Any, points: Sequence[tuple[float, float]], names: Sequence[str], colors: Sequence[str]) -> None:
    """Write each point's name beside it where it covers no other name and no point, with a thin line if it stands farther off.

    Call it last, when all else of the figure is drawn: places are found in the figure's final layout. Points are served in
    their order; one whose name has no room within reach is left without.

    Args:
        axes: one plot of `figure`.
        points: [n], in data coordinates.
        names, colors: [n].
    """
    import numpy as np

    drawn = axes.get_figure()
    drawn.draw_without_rendering()
    reach = drawn.dpi / 72
    inside = axes.get_window_extent()
    places = np.asarray(axes.transData.transform(np.asarray(points, dtype=float).reshape(-1, 2)))
    marks = np.concatenate([places - 3.5 * reach, places + 3.5 * reach], axis=1)
    taken = np.empty((0, 4))

    def free(box: npt.NDArray[Any], others: npt.NDArray[Any]) -> bool:
        apart = (box[2:] <= others[:, :2]) | (others[:, 2:] <= box[:2])
        return bool(apart.any(1).all())

    for point, place, name, color in zip(points, places, names, colors, strict=True):
        text = axes.annotate(
            name,
            point,
            xytext=(0, 0),
            textcoords="offset points",
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": color, "alpha": 0.6, "shrinkA": 0, "shrinkB": 4},
            fontsize=7,
            color=color,
            parse_math=False,
            ha="center",
            va="center",
        )
        # else the layout would move the places that were measured
        text.set_in_layout(False)
        extent = text.get_window_extent()
        half = np.array([extent.width, extent.height]) / 2
        for far, turn in ((f, t) for f in range(6, 130, 4) for t in np.pi * (0.25 + np.arange(24) / 12)):
            way = np.array([np.cos(turn), np.sin(turn)])
            offset = way * far * reach + np.clip(1.5 * way, -1, 1) * half
            box = np.concatenate([place + offset - half, place + offset + half])
            within = inside.x0 <= box[0] and box[2] <= inside.x1 and inside.y0 <= box[1] and box[3] <= inside.y1
            if within and free(box, np.concatenate([taken, marks])):
                taken = np.concatenate([taken, box[None]])
                text.set_position(offset / reach)
                break
        else:
            text.remove()
