"""Build benchmark records: the good direction comes from the catalogue, and rows become plain numbers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

from alter import metrics
from alter.storage import Record


@dataclass(frozen=True)
class Groups:
    """Which rows are about one subject.

    Attributes:
        column: whose value they share.
        numbers: of each row the number of its group, [n].
    """

    column: str
    numbers: list[int]

    @classmethod
    def of(cls, column: str, values: Sequence[Hashable | None]) -> Groups | None:
        """Number the values of rows, where one that has none is a group of its own.

        None where rows are to be drawn: no two rows share a value, or all rows do, so that nothing can be said beyond that subject.
        """
        places: dict[Hashable, int] = {}
        own = [("row", i) if value is None else str(value) for i, value in enumerate(values)]
        numbers = [places.setdefault(value, len(places)) for value in own]
        return cls(column, numbers) if 1 < len(places) < len(values) else None


def interval_over(values: Sequence[float], groups: Groups | None) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of values, [n], over their groups, or over rows."""
    if groups is None:
        return metrics.samples.row_interval(values)
    return metrics.samples.grouped_interval(values, groups.numbers)


def metric_record(
    model: str,
    metric: str,
    value: SupportsFloat | None,
    n: int,
    items: Iterable[Any] | None = None,
    *,
    mode: str = "strict",
    groups: Groups | None = None,
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
        groups: of the items, where several are about one subject: intervals draw them whole, which the record says.
        extra: what belongs to this number alone. A figure that is the mean of its items, as the catalogue says, gets
            their 95 % `interval` (`metrics.samples.row_interval`, of groups `grouped_interval`), if `extra` has none.
    """
    number = None if value is None else float(value)
    per_item = None if items is None else [float(x) for x in items]
    own = dict(extra or {})
    known = metrics.CATALOGUE[metric]
    if "interval" not in own and number is not None and per_item is not None and known.averages:
        own["interval"] = interval_over(per_item, groups)
    if own.get("interval") is not None:
        own["interval"] = list(own["interval"])
        if groups is not None:
            own["interval_over"] = groups.column
    return Record(model, metric, number, n, mode, known.higher_is_better, per_item, own)


@dataclass
class Figures:
    """Records of one model while they are made; `base` is in the `extra` of each."""

    model: str
    base: Mapping[str, Any]
    mode: str = "strict"
    records: list[Record] = field(default_factory=list)

    def add(
        self,
        metric: str,
        value: SupportsFloat | None,
        n: int,
        items: Iterable[Any] | None = None,
        groups: Any = None,
        **extra: Any,
    ) -> None:
        """Add the record of a metric; see `metric_record`."""
        told = {**self.base, **extra}
        self.records.append(
            metric_record(self.model, metric, value, n, items, mode=self.mode, groups=groups, extra=told)
        )
