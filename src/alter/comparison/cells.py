"""The cells of `alter compare`: skip finished ones, and hand the rest to an executor.

A cell that has finished or failed is never run again, one that was killed is.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alter.comparison.executors import Executor, Full, Task
from alter.comparison.plan import Cell
from alter.core import UserError, progress, show
from alter.storage import take_lock, to_json, write_atomic

LOCK = ".lock"
"""File in the comparison's folder, locked while one works there."""
AGAIN = 60.0
"""Seconds after which an executor that takes no further cell is asked again."""


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None


def is_measured(out: Path, cell: Cell, parts: Sequence[str]) -> bool:
    """Tell whether the records of these parts are there, for every split of the cell."""
    folder = out / "cells" / cell.key
    return all((folder / f"{part}-{split}.json").is_file() for part in parts for split in cell.chain)


def finished(out: Path, cell: Cell, parts: Sequence[str]) -> dict[str, Any] | None:
    """Return the cell's last record if these parts are measured or it has failed, else None."""
    found = _read(out / "cells" / cell.key / "cell.json")
    return found if found is None or found["status"] == "failed" or is_measured(out, cell, parts) else None


@dataclass(frozen=True)
class CellJob:
    """A cell and the parts of its rows to measure; it is trained first unless its weights are there."""

    cell: Cell
    parts: tuple[str, ...]


def _start(out: Path, job: CellJob, executor: Executor, lock: int) -> Task:
    folder = (out / "cells" / job.cell.key).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "spec.json", to_json(job.cell.spec))
    return executor.start(folder, job.parts, lock)


@dataclass
class _Running:
    job: CellJob
    task: Task
    reason: str | None = None
    """Once it has ended, "" or why."""
    until: float = 0.0
    """When a result that is not seen by then is none."""

    def outcome(self, out: Path, lag: float) -> str | None:
        """Return None while it runs or its result may still come into sight; then "", or why it has none."""
        if self.reason is None:
            self.reason = self.task.ended()
            self.until = time.monotonic() + lag
        if self.reason is None:
            return None
        if finished(out, self.job.cell, self.job.parts) is not None:
            return ""
        if time.monotonic() < self.until:
            return None
        return self.reason or "its process ended well, but its folder holds no result"


def run_cells(out: Path, jobs: Sequence[CellJob], executor: Executor, lock: int) -> Iterator[tuple[Cell, str]]:
    """Run those of the jobs that have not finished; yield each with "" or why it did not finish.

    Raises:
        Full: the executor takes no cell at all.
    """
    waiting = deque(job for job in jobs if finished(out, job.cell, job.parts) is None)
    running: list[_Running] = []
    full_until = 0.0
    try:
        while waiting or running:
            while waiting and len(running) < executor.at_once and time.monotonic() >= full_until:
                try:
                    running.append(_Running(waiting[0], _start(out, waiting[0], executor, lock)))
                    waiting.popleft()
                except Full:
                    # a limit of jobs, where some are at work: they make room
                    if not running:
                        raise
                    full_until = time.monotonic() + AGAIN
            left = []
            for each in running:
                reason = each.outcome(out, executor.lag)
                if reason is None:
                    left.append(each)
                else:
                    yield each.job.cell, reason
            if len(left) == len(running):
                time.sleep(executor.pause)
            running = left
    finally:
        for each in running:
            each.task.stop()


def run_shown(out: Path, jobs: Sequence[CellJob], executor: Executor, lock: int, label: str) -> dict[str, str]:
    """Run the jobs with a progress bar and a line for each; return why those that did not finish did not, by key."""
    todo = [job for job in jobs if finished(out, job.cell, job.parts) is None]
    parts = {job.cell.key: job.parts for job in jobs}
    show(
        f"{label}: {len(jobs)} cells, {len(jobs) - len(todo)} of them finished before; {executor.place}",
        markup=False,
        highlight=False,
    )
    lost: dict[str, str] = {}
    started = time.time()
    for count, (cell, reason) in enumerate(
        progress(run_cells(out, todo, executor, lock), total=len(todo), label=label, lines=False), start=1
    ):
        found = finished(out, cell, parts[cell.key]) or {"status": "not finished", "reason": reason}
        said = (
            f"{found['all_seconds']:.0f} s" if found["status"] == "done" else f"{found['status']}: {found['reason']}"
        )
        left = (time.time() - started) / count * (len(todo) - count)
        show(f"{count}/{len(todo)} {cell}: {said}; about {left / 60:.0f} min left", markup=False, highlight=False)
        if reason:
            lost[cell.key] = reason
    return lost


def hold(out: Path, patience: float = 20.0) -> int:
    """Lock the folder for this process and the cells' processes that it starts; return the lock's file descriptor.

    Raises:
        UserError: another comparison, or a cell of one, still works there after `patience` seconds.
    """
    try:
        return take_lock(out / LOCK, patience)
    except BlockingIOError:
        raise UserError(f"Another `alter compare` works in {out}: wait for it, or give another `out`.") from None
