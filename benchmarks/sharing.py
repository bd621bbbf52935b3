"""Time of what `alter demo` evaluates, beside the same row by row: tokens that rows share once, replies told by the scores, the base's
pass once.

    python benchmarks/sharing.py --adapter runs/demo/adapter --rows 12

The three models of the demo (retrained, original, unlearned) score and answer `--rows` rows of each of TOFU's sets. Both ways take turns,
in processor time on one thread, and what is reported are medians of ratios within one turn. Checks that every figure is the same to
1e-6 and every reply the same to the letter, and adds to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import results
from alter.evaluation.tofu import measuring, replies
from alter.models import ModelSettings

TOLERANCE = 1e-6


@contextlib.contextmanager
def row_by_row() -> Iterator[None]:
    """Inside the block, nothing that rows share is computed once, and no reply is told by the scores."""
    with (
        mock.patch("alter.inference.scoring._shared_batches", return_value=None),
        mock.patch.object(measuring, "begun_replies", return_value=None),
    ):
        yield


class Parts:
    """Processor time of scoring and of replies."""

    def __init__(self) -> None:
        self.spent = {"scoring": 0.0, "replies": 0.0}

    def timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **given: Any) -> Any:
            started = time.process_time()
            try:
                return work(*args, **given)
            finally:
                self.spent[part] += time.process_time() - started

        return wrapped

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        timed = [
            (measuring, "score", "scoring"),
            (measuring, "score_beside_base", "scoring"),
            (replies, "generate", "replies"),
        ]
        with contextlib.ExitStack() as stack:
            for module, name, part in timed:
                stack.enter_context(mock.patch.object(module, name, self.timed(part, getattr(module, name))))
            yield


def evaluated(retrained: Any, unlearned: Any, rows: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Evaluate as the demo does; return the results by model, and the seconds by part."""
    parts = Parts()
    with parts.taken():
        first = measuring.tofu_metrics(*retrained, limit=rows, progress=False)
        both = measuring.tofu_metrics_beside_base(*unlearned, limit=rows, progress=False, reference=first)
    return dict(zip(("retrained", "original", "unlearned"), (first, *both), strict=True)), parts.spent


def check(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Check that two ways gave the same figures and replies."""
    for name, found in one.items():
        for key, part in found.sets.items():
            assert part.generations == other[name].sets[key].generations, (name, key)
        for record, expected in zip(found.records(name), other[name].records(name), strict=True):
            if isinstance(record.value, float) and record.value == record.value:
                assert abs(record.value - expected.value) <= TOLERANCE * max(1, abs(expected.value)), (name, record)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="of `alter demo`")
    parser.add_argument("--rows", type=int, default=12, help="of each set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=results.FILE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    retrained = ModelSettings(model="builtin:tofu-mini/retrained").load()
    unlearned = ModelSettings(model="builtin:tofu-mini/original", adapter=str(args.adapter)).load()
    turns: dict[str, list[dict[str, float]]] = {"row by row": [], "shared": []}
    for _ in range(args.rounds):
        with row_by_row():
            expected, spent = evaluated(retrained, unlearned, args.rows)
        turns["row by row"].append(spent)
        found, spent = evaluated(retrained, unlearned, args.rows)
        turns["shared"].append(spent)
        check(found, expected)
    rows = []
    for part in ("scoring", "replies", "both"):
        of, to = (
            [sum(spent.values()) if part == "both" else spent[part] for spent in turns[name]]
            for name in ("shared", "row by row")
        )
        for metric, values in (("seconds", results.spread(of)), ("over_row_by_row", results.ratios(of, to))):
            print(f"{part:8} {metric:16} {values['value']:.3f} ({values['low']:.3f} to {values['high']:.3f})")
            rows.append({"variant": part, "metric": metric, **values})
    shared = {
        "benchmark": "sharing",
        "hardware": results.hardware("cpu"),
        "torch": torch.__version__,
        "shape": "tofu-mini",
        "dtype": "float32",
        "settings": f"the demo's three models, {args.rows} rows a set",
    }
    results.add([shared | row for row in rows], args.csv)


if __name__ == "__main__":
    main()
