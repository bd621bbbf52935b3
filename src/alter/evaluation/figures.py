"""Build benchmark records: the good direction comes from the catalogue, and rows become plain numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

from alter import metrics
from alter.storage import Record


def metric_record(
    model: str,
    metric: str,
    value: SupportsFloat | None,
    n: int,
    items: Iterable[Any] | None = None,
    *,
    mode: str = "strict",
    extra: Mapping[str, Any] | None = None,
) -> Record:
    """Return the record of a metric from the catalogue.

    Args:
        model: what the records call the model.
        metric: name in `alter.metrics.CATALOGUE`.
        value: None where there is none.
        n: items that it is of.
        items: the value of each of them.
        mode: "strict" or "compat".
        extra: what belongs to this number alone. A figure that is the mean of its items, as the catalogue says, gets
            their 95 % `interval` (`metrics.samples.row_interval`), if `extra` has none.
    """
    number = None if value is None else float(value)
    per_item = None if items is None else [float(x) for x in items]
    own = dict(extra or {})
    known = metrics.CATALOGUE[metric]
    if "interval" not in own and number is not None and per_item is not None and known.averages:
        own["interval"] = metrics.samples.row_interval(per_item)
    if own.get("interval") is not None:
        own["interval"] = list(own["interval"])
    return Record(model, metric, number, n, mode, known.higher_is_better, per_item, own)


@dataclass
class Figures:
    """Records of one model while they are made; `base` is in the `extra` of each."""

    model: str
    base: Mapping[str, Any]
    mode: str = "strict"
    records: list[Record] = field(default_factory=list)

    def add(
        self, metric: str, value: SupportsFloat | None, n: int, items: Iterable[Any] | None = None, **extra: Any
    ) -> None:
        """Add the record of a metric; see `metric_record`."""
        self.records.append(
            metric_record(self.model, metric, value, n, items, mode=self.mode, extra={**self.base, **extra})
        )
