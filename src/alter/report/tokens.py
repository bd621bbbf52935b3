"""What the run's frozen pass holds of its tokens: entropies on either side of the threshold, and the experts' shares."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from alter.core import Array
from alter.rendering import Html, grid, histogram, percent, tag
from alter.report.runs import Reported, TokenFigures

EXPERTS = 40
"""Experts with a line of their own."""
BINS = 40


def shares(values: npt.ArrayLike, edges: npt.ArrayLike) -> Array:
    """Return which share of the finite values lies in each bin, [bins]; the last bin holds its upper edge.

    Args:
        values: [n]; those that are not finite do not count.
        edges: rising borders, [bins + 1]; every finite value lies within.
    """
    given = np.asarray(values, dtype=np.float64)
    finite = given[np.isfinite(given)]
    counts, _ = np.histogram(finite, np.asarray(edges, dtype=np.float64))
    return counts / max(len(finite), 1)


def routed(gates: npt.ArrayLike) -> Array:
    """Return each expert's share of the tokens, [N + 1], which sums to 1.

    Args:
        gates: [T, N + 1] weights of the experts, not negative. A token that several experts serve counts for each by
            its part of the token's weight; one that none serves, a row of zeros, counts for none.
    """
    weight = np.asarray(gates, dtype=np.float64)
    total = weight.sum(axis=1, keepdims=True)
    parts = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    shares: Array = parts.sum(axis=0) / max(int((total > 0).sum()), 1)
    return shares


# Sections ------------------------------------------------------------------------------------------------------------


def entropies(run: Reported) -> list[Html]:
    """Return the section on token entropies: a histogram, and the shares on either side of the threshold."""
    tokens = run.tokens
    assert tokens is not None
    threshold = float(run.facts["router"]["entropy_threshold"])
    parts = {name: tokens.entropy[part] for name, part in tokens.parts().items()}
    finite = {name: values[np.isfinite(values)] for name, values in parts.items()}
    top = max(float(values.max()) for values in finite.values() if len(values))
    edges = np.linspace(0.0, max(top, threshold) * 1.0001, BINS + 1)
    low = {name: float((values <= threshold).mean()) for name, values in finite.items()}
    said = ", ".join(f"{percent(share)} of the tokens of the {name}" for name, share in low.items())
    q = run.settings.get("adapter", {}).get("entropy_q")
    drawn = histogram(
        edges, {name: shares(values, edges) for name, values in finite.items()}, threshold=threshold,
        across=f"entropy of the token (Tsallis, q = {q})", caption="Share of the tokens in a bin (logarithmic)",
        alt=f"Histogram of the token entropies. At or below the threshold of {threshold:.3g}: {said}.",
    )  # fmt: skip
    rows = [
        [name, f"{len(parts[name]):,}", percent(low[name]), percent(1 - low[name]), len(parts[name]) - len(values)]
        for name, values in finite.items()
    ]
    table = grid(
        ["tokens of", "tokens", "low", "high", "first tokens"], rows, numbers=(1, 2, 3, 4), label="Token entropies",
        caption="Nothing generated the first token of a row, so it has no entropy and is not in the shares; the "
        "router treats it as high.",
    )  # fmt: skip
    words = (
        "The entropy of a token is how unsure the untouched model was when it came to it. Low ones carry knowledge (a "
        "name, a date) and take one expert; those above the threshold are structure and may take several."
    )
    return [tag("p", words), *_unknown_split(tokens), drawn, table]


def _unknown_split(tokens: TokenFigures) -> list[Html]:
    if not tokens.why:
        return []
    return [tag("p", f"Forget and retain rows are shown together: {tokens.why}.", class_="small")]


def routing(run: Reported) -> list[Html]:
    """Return the section on routing: which share of the tokens each expert serves."""
    tokens = run.tokens
    assert tokens is not None
    found = {name: routed(tokens.gates[part]) for name, part in tokens.parts().items()}
    served = dict(zip(run.facts["experts"], run.parts(), strict=False))
    count = tokens.gates.shape[1]
    first = next(iter(found.values()))
    order = sorted(range(1, count), key=lambda i: (-first[i], i))
    shown = [0, *sorted(order[:EXPERTS])]
    rest = sorted(order[EXPERTS:])
    widest = max(float(max(values[0], values[1:].sum())) for values in found.values()) or 1.0

    def cell(share: float, style: str) -> Html:
        bar = tag("span", class_=f"bar {style}", style=f"width:{100 * share / widest:.1f}%")
        return tag("span", tag("span", bar, class_="track", aria_hidden="true"), percent(share), class_="share")

    def name(expert: int) -> str:
        if expert == 0:
            return "retention expert"
        return f"{expert}: {served[expert]}" if expert in served else f"{expert} (of an earlier run, or spare)"

    rows = [[name(i), *(cell(float(v[i]), "ab"[p]) for p, v in enumerate(found.values()))] for i in shown]
    if rest:
        parts = [cell(float(values[rest].sum()), "ab"[p]) for p, values in enumerate(found.values())]
        rows.append([f"{len(rest)} other experts", *parts])
    rows.append(["all forget experts", *(cell(float(v[1:].sum()), "ab"[p]) for p, v in enumerate(found.values()))])
    words = (
        "Each token takes one or more experts. Ordinary text should take the retention expert, text of the forget set "
        "the forget experts. A token that several experts serve counts for each by its part."
    )
    table = grid(["expert", *found], rows, label="Routing shares", numbers=range(1, len(found) + 1))
    return [tag("p", words), *_unknown_split(tokens), table]
