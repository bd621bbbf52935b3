"""Metrics that plugins add to benchmarks: each a function of what a benchmark measured, and of the model if it asks it more."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from alter import metrics
from alter.core import UserError, nearest
from alter.evaluation.base import Evaluation
from alter.evaluation.figures import metric_record
from alter.plugins import BENCHMARKS, Registry
from alter.storage import Record


@dataclass(frozen=True)
class Seen:
    """What a metric is made of.

    Attributes:
        settings: of the evaluation: `split`, `data`, `limit` and what else the benchmark has.
        model: the loaded model.
        tokenizer: its tokenizer.
        records: what the benchmark measured; the `extra` of a figure of replies holds `questions`, `references` and `generations`.
    """

    settings: Evaluation
    model: Any
    tokenizer: Any
    records: Sequence[Record]

    def record(self, metric: str) -> Record:
        """Return the benchmark's record of a metric.

        Raises:
            UserError: it made none.
        """
        names = [record.metric for record in self.records]
        if metric not in names:
            raise UserError(f"The benchmark gave no {metric!r}.{nearest(metric, names)} It gave {', '.join(names)}.")
        return self.records[names.index(metric)]


Measures = Callable[[Seen], "Sequence[float] | Record"]
F = TypeVar("F", bound=Measures)


@dataclass(frozen=True)
class Added:
    """A metric's function, and the benchmarks that it is measured with."""

    function: Measures
    benchmarks: tuple[str, ...]


ADDED: Registry[Added] = Registry("metric", {})
"""Metrics that plugins added, by name."""


def metric(
    name: str, meaning: str, *, benchmarks: Sequence[str], higher_is_better: bool | None = None
) -> Callable[[F], F]:
    """Decorate a function of a `Seen`, so that benchmarks have a metric of this name.

    The function returns a value for each item, NaN for one that has none, and the metric is their mean; or a `Record`, for a
    figure of another kind. What it reads must be in what it is given: a result is kept under the hash of that and of the code.

    Args:
        name: what records and tables call it.
        meaning: what it says, in plain words and short.
        benchmarks: with which it is measured, such as `["tofu", "muse"]`.
        higher_is_better: which direction is good; None: neither by itself.

    Raises:
        UserError: another metric has the name.
    """

    def register(function: F) -> F:
        if name in metrics.CATALOGUE and name not in ADDED.known():
            raise UserError(f"There is already a metric named {name!r}: give yours another name.")
        ADDED.add(name, Added(function, tuple(benchmarks)))
        metrics.CATALOGUE[name] = metrics.catalogue.Metric(higher_is_better, meaning)
        return function

    return register


def check_added() -> None:
    """Refuse a metric for a benchmark that does not exist.

    Raises:
        UserError: names both.
    """
    for name, added in ADDED.items():
        for wanted in added.benchmarks:
            if wanted not in BENCHMARKS:
                raise UserError(
                    f"The metric {name!r} is for the benchmark {wanted!r}; expected one of {', '.join(BENCHMARKS)}.{nearest(wanted, BENCHMARKS)}"
                )


def added_to(benchmark: str | None) -> dict[str, Measures]:
    """Return the metrics that plugins added to a benchmark, by name."""
    return {name: added.function for name, added in ADDED.items() if benchmark in added.benchmarks}


def in_files(settings: Evaluation) -> bool:
    """Tell whether the code of a benchmark and of what is added to it is in files, so that a hash knows it; what a notebook defines
    is not.
    """
    parts = (type(settings), *added_to(_benchmark(settings)).values())
    return all(getattr(sys.modules.get(each.__module__), "__file__", None) is not None for each in parts)


def _benchmark(settings: Evaluation) -> str | None:
    return getattr(settings, "benchmark", None)


def with_added(settings: Evaluation, model: Any, tokenizer: Any, records: Sequence[Record]) -> list[Record]:
    """Return what a benchmark measured, and after it the record of each metric that plugins added to it.

    Raises:
        UserError: see `added_records`.
    """
    return [
        *records,
        *added_records(Seen(settings, model, tokenizer, tuple(records)), added_to(_benchmark(settings))),
    ]


def added_records(seen: Seen, functions: Mapping[str, Measures]) -> list[Record]:
    """Return the record of each added metric.

    Raises:
        UserError: a function gives something else than numbers or a record; or what it raises.
    """
    found = []
    for name, function in functions.items():
        given = function(seen)
        if isinstance(given, Record):
            found.append(replace(given, model=seen.settings.label, metric=name))
            continue
        try:
            values = np.asarray(given, dtype=float)
        except (TypeError, ValueError):
            values = np.empty((0, 0))
        if values.ndim != 1 or not np.isfinite(values).any() or np.isinf(values).any():
            what = f"{type(given).__name__}: {' '.join(repr(given).split())[:60]}"
            raise UserError(f"The metric {name!r} gives a {what}; expected a number for each item, or a Record.")
        mode, told = getattr(seen.settings, "mode", "strict"), {"benchmark": _benchmark(seen.settings)}
        count = int((~np.isnan(values)).sum())
        found.append(
            metric_record(seen.settings.label, name, np.nanmean(values), count, values, mode=mode, extra=told)
        )
    return found
