"""`alter entropy`: tables, files and plot of the token entropies that `alter.evaluation.entropies` measures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from alter import metrics
from alter.core import Array, show
from alter.evaluation.entropies import (
    StudiedTokens,
    Study,
    frequent,
    measure_study,
    shares_of_bins,
    sides,
    study_records,
    thresholds,
)
from alter.rendering import FittedTable, table
from alter.rendering import figures as plots
from alter.storage import Record, files, records

if TYPE_CHECKING:
    import numpy.typing as npt


def _text(tokenizer: Any, token: int) -> str:
    """Return a token as text; a part of a character as the vocabulary writes it."""
    text = str(tokenizer.decode([token]))
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text


def _token_table(settings: Study, tokens: StudiedTokens, tokenizer: Any, q: float, threshold: float) -> FittedTable:
    high, low = sides(frequent(tokens.ids, tokens.before[q], threshold, len(tokenizer)), threshold)
    shown = FittedTable(title=f"most frequent tokens before, q={q:g}: mean entropy above and below {threshold:.3g}")
    for side in ("high", "low"):
        shown.add_column(side, no_wrap=True)
        shown.add_column("count", justify="right")
        shown.add_column("mean", justify="right")
    for place in range(min(settings.top, max(len(high), len(low)))):
        cells: list[str] = []
        for side_tokens in (high, low):
            if place < len(side_tokens):
                token = side_tokens[place]
                text = repr(_text(tokenizer, token.token))
                cells += [text, str(token.count), f"{token.mean:.2f}"]
            else:
                cells += ["", "", ""]
        shown.add_row(*cells)
    return shown


def _edges(tokens: StudiedTokens, q: float, bins: int) -> Array:
    largest = max(float(part[q].max()) for part in (tokens.before, tokens.after) if part is not None)
    return np.linspace(0.0, max(largest, 1e-6), bins + 1)


def write_study(
    settings: Study, tokens: StudiedTokens, tokenizer: Any, columns: dict[str, list[Record]], folder: Path
) -> None:
    """Write records, tables, the entropy of each token, and the plot."""
    from safetensors.numpy import save

    cuts = thresholds(settings, tokens)
    by_token, bins = [], []
    entropies: dict[str, npt.NDArray[Any]] = {"token": tokens.ids, "row": tokens.row, "position": tokens.position}
    for q in settings.q:
        edges = _edges(tokens, q, settings.bins)
        shares = [shares_of_bins(part[q], edges) for part in (tokens.before, tokens.after) if part is not None]
        bins += [
            [q, *edges[i : i + 2].tolist(), *(float(share[i]) for share in shares)] for i in range(len(edges) - 1)
        ]
        then = {}
        if tokens.after is not None:
            then = {t.token: t for t in frequent(tokens.ids, tokens.after[q], cuts[q], len(tokenizer))}
            entropies[f"after_q{q:g}"] = tokens.after[q]
        entropies[f"before_q{q:g}"] = tokens.before[q]
        for token in frequent(tokens.ids, tokens.before[q], cuts[q], len(tokenizer)):
            row = [q, token.token, _text(tokenizer, token.token), token.count, token.mean, token.high]
            by_token.append(row + ([then[token.token].mean, then[token.token].high] if then else []))
    adapted = tokens.after is not None
    records.write_records(folder / "records.json", [record for column in columns.values() for record in column])
    header = ["q", "token", "text", "count", "mean_before", "high_before"]
    files.write_atomic(
        folder / "tokens.csv", files.to_csv([header + ["mean_after", "high_after"] * adapted, *by_token])
    )
    files.write_atomic(
        folder / "histogram.csv",
        files.to_csv([["q", "from", "to", "share_before", *["share_after"] * adapted], *bins]),
    )
    files.write_atomic(folder / "entropies.safetensors", save(entropies))
    draw_study(settings, tokens, cuts, folder / "entropy.png")


def draw_study(settings: Study, tokens: StudiedTokens, cuts: dict[float, float], path: Path) -> None:
    """Draw a column of plots per order: the histogram, and below it, with a model after, before against after."""
    with plots.figure(path, rows=1 + (tokens.after is not None), columns=len(settings.q)) as axes:
        for column, q in enumerate(settings.q):
            parts = {"before": tokens.before, "after": tokens.after}
            edges = _edges(tokens, q, settings.bins)
            shares = {name: shares_of_bins(part[q], edges) for name, part in parts.items() if part is not None}
            top = axes[0, column]
            plots.overlay(top, edges, shares, cuts[q])
            kind = "Shannon entropy, nats" if q == 1 else f"Tsallis entropy, q = {q:g}"
            top.set_title(f"{Path(settings.text).name}: {len(tokens.ids):,} tokens")
            top.set_xlabel(f"{kind}, of the step that generated the token")
            if tokens.after is None:
                continue
            stays = metrics.entropies.stability(tokens.before[q], tokens.after[q], cuts[q])
            below = axes[1, column]
            plots.before_and_after(below, tokens.before[q], tokens.after[q], cuts[q])
            below.set_title(f"stay high {stays.high_stay:.1%}, stay low {stays.low_stay:.1%}, kappa {stays.kappa:.2f}")
            below.set_xlabel("before")
            below.set_ylabel("after")


def entropy(settings: Study) -> list[Record]:
    """Run `alter entropy`: measure, print the tables, write the folder.

    Raises:
        UserError: see `measure_study`.
    """
    tokens, tokenizer = measure_study(settings)
    columns = study_records(settings, tokens)
    console = Console()
    versus = "" if settings.after is None else f" → {settings.after}"
    for q, threshold in thresholds(settings, tokens).items():
        title = f"Token entropies (q={q:g}, threshold {threshold:.3g}) of {settings.text}: {settings.model}{versus}"
        shown = {when: columns[f"{when}, q={q:g}"] for when in ("before", "after") if f"{when}, q={q:g}" in columns}
        console.print(table(shown, title))
        console.print(_token_table(settings, tokens, tokenizer, q, threshold))
    if settings.out is not None:
        write_study(settings, tokens, tokenizer, columns, Path(settings.out))
        show(f"records, tables and plot: {settings.out}", stderr=True)
    return [record for column in columns.values() for record in column]
