"""The recovered fraction of an attack: what it recovers beyond what it gets out of a model that never knew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from alter import metrics
from alter.attacks.base import PLAIN, interval
from alter.attacks.techniques import ATTACKS, BY_DEPTH, MEASURES, PLACES
from alter.core import Array
from alter.storage import Record

NO_RETRAINED = (
    "they need a model that never saw the forget rows. Make one once with `alter finetune --model BASE --data RETAIN "
    "--out retrained` (BASE: the model before it learned the forget rows; RETAIN: the rows without them), then add "
    "it as `retrained`."
)

NO_ZERO = "the retrained model has no such measurement, since the attack was not possible on it: there is no zero to compare with."

NO_ORIGINAL = "they need the model before unlearning: give it as `original`."


def _on(record: Record, rows: Sequence[int]) -> Array:
    """Select a record's per-row values for the rows of these numbers."""
    assert record.per_item is not None
    value = dict(zip(record.extra["rows"], record.per_item, strict=True))
    return np.array([value[row] for row in rows], dtype=np.float64)


def _select(records: Sequence[Record], model: str, attack_name: str, metric: str) -> list[Record]:
    return [
        r
        for r in records
        if (r.model, r.metric) == (model, metric)
        and r.extra.get("attack") == attack_name
        and r.extra.get("part", "other") == "other"
    ]


def recovered_fractions(records: Sequence[Record], name: str) -> list[Record]:
    """Return the recovered fractions of an attack: one record per figure, whose value is None where it is refused.

    Of several numbers of steps, depths or variants the attacker takes the one at which the fraction is largest, or where there is
    none the figure under the attack;
    `extra` says which, and `curve` holds all; `intervals` holds the 95 % interval over rows of each figure. Everything is on the rows that all models were measured on, but
    `original_attacked`, the original's own figure under the attack: what the attack can bring out of a model that knows.
    """
    found = []
    no_zero = NO_ZERO if any(record.model == "retrained" for record in records) else NO_RETRAINED
    for metric in MEASURES:
        # under stripping a retrained model, which has no adapter, is what it is; a probe has no before but the others' own
        zero_name = PLAIN if name == "strip" else name
        plain_name = name if metric in BY_DEPTH else PLAIN
        candidates = []
        for after in _select(records, "unlearned", name, metric):
            same: dict[str, Any] = {key: after.extra[key] for key in PLACES if key in after.extra}
            zero = next(
                (r for r in _select(records, "retrained", zero_name, metric) if same.items() <= r.extra.items()), None
            )
            plains = {
                model: r
                for model in ("original", "retrained", "unlearned")
                for r in _select(records, model, plain_name, metric)
                if metric not in BY_DEPTH or same.items() <= r.extra.items()
            }
            one = _fraction(after, zero, plains, same)
            if zero is None:
                one.extra["refused"] = no_zero
            reach = next(
                (r for r in _select(records, "original", name, metric) if same.items() <= r.extra.items()), None
            )
            one.extra["original_attacked"] = None if reach is None else reach.value
            one.extra["intervals"]["original_attacked"] = None if reach is None else interval(reach.per_item or [])
            candidates.append(one)
        if not candidates:
            continue
        known = [candidate for candidate in candidates if candidate.value is not None]
        if known:
            best = max(known, key=lambda candidate: candidate.value or 0.0)
        else:
            # of equal ones the last: after the most steps
            best = max(reversed(candidates), key=lambda candidate: candidate.extra["after"])
        extra = {**best.extra, "attack": name, "needs": ATTACKS[name].needs}
        if len(candidates) > 1:
            shown = (*PLACES, "after", "retrained", "original")
            extra["curve"] = [
                {key: c.extra[key] for key in shown if key in c.extra} | {"fraction": c.value} for c in candidates
            ]
        found.append(Record("unlearned", best.metric, best.value, best.n, "strict", False, None, extra))
    return found


def _fraction(after: Record, zero: Record | None, plains: dict[str, Record], same: dict[str, Any]) -> Record:
    """Return the recovered fraction of one measurement as a record, or in `extra.refused` why there is none."""
    rows = after.extra["rows"] if zero is None else [r for r in after.extra["rows"] if r in set(zero.extra["rows"])]
    values = {model: _on(record, rows) for model, record in plains.items()}
    mean = {model: float(value.mean()) for model, value in values.items()}
    attacked, attacked_retrained = _on(after, rows), None if zero is None else _on(zero, rows)
    extra: dict[str, Any] = {
        **same,
        "rows": rows,
        "before": None if after.metric in BY_DEPTH else mean["unlearned"],
        "after": float(attacked.mean()),
        "retrained": None if attacked_retrained is None else float(attacked_retrained.mean()),
        "original": mean.get("original"),
        "retrained_before": mean.get("retrained"),
    }
    told = {"after": attacked, "retrained": attacked_retrained, "original": values.get("original")}
    told |= {"before": values["unlearned"], "retrained_before": values.get("retrained")}
    extra["intervals"] = {key: None if rows_of is None else interval(rows_of) for key, rows_of in told.items()}
    value = None
    if "original" not in mean:
        extra["refused"] = NO_ORIGINAL
    elif attacked_retrained is not None:
        try:
            value = metrics.recovery.recovered_fraction(
                extra["after"], extra["retrained"], mean["original"], mean["retrained"]
            )
            gap = mean["original"] - mean["retrained"]
            ends = metrics.recovery.recovered_interval(attacked, attacked_retrained, gap)
            extra |= {} if ends is None else {"interval": list(ends)}
        except ValueError as error:
            extra["refused"] = str(error)
    metric = after.metric.replace("attack_", "attack_recovered_")
    return Record("unlearned", metric, value, len(rows), extra=extra)
