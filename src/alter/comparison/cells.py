"""The cells of `alter compare` at work: one process and one folder (`cells/KEY`) each, several at a time.

A cell that has finished or failed is never run again, one that was killed is. It is first trained and measured on
validation rows; only the chosen ones are measured on test rows too.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alter.comparison.plan import Cell
from alter.core.console import progress, show
from alter.core.errors import UserError
from alter.core.files import to_json, write_atomic
from alter.core.provenance import stamped
from alter.core.records import write_records
from alter.evaluation.tofu.measuring import tofu_metrics
from alter.methods.adapters import adapter_of
from alter.models.loading import load_model
from alter.training.folder import save_adapter
from alter.training.run import unlearn
from alter.training.settings import Unlearn

# One cell, in its own process ----------------------------------------------------------------------------------------


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # unlike ru_maxrss, this does not begin with the size of the process that started this one
        found = [line.split() for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if found:
            return int(found[0][1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def die_with_parent() -> None:
    """End this process when the one that holds the other end of its standard input is gone, however it went."""

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def subject(folder: Path, spec: Mapping[str, Any], place: int) -> tuple[str, str | None]:
    """Model and adapter that a cell's stage has made; the model as it is if the cell runs nothing."""
    run = spec["stages"][place].get("run")
    if run is None:
        return spec["model"], None
    made, kind = folder / f"stage{place}", adapter_of(run["adapter"])
    if kind.result == "model":
        return str(made / "model"), None
    base = str(folder / f"base{place}") if place and kind.merges else spec["model"]
    return base, str(made / "adapter")


def start_from(folder: Path, spec: Mapping[str, Any], place: int) -> dict[str, Any]:
    """Settings that make a stage start from the result of the one before.

    ALTER's adapter grows, a LoRA with a detector (O3) is trained on, any other LoRA is merged.
    """
    if place == 0:
        return {}
    model, adapter = subject(folder, spec, place - 1)
    if adapter is None:
        return {"model": model}

    def merged() -> str:
        network, tokenizer = load_model(model, adapter, device=spec["device"])
        return str(save_adapter(network.merge_and_unload(), folder, name=f"base{place}", tokenizer=tokenizer))

    return adapter_of(spec["stages"][place]["run"]["adapter"]).continued(adapter, merged)


def measure_stage(folder: Path, spec: Mapping[str, Any], place: int, parts: Sequence[str]) -> None:
    """Measure the model that a cell's stage has made on those parts of its split's rows that are not measured yet.

    Raises:
        UserError: the model gives no probabilities.
    """
    stage = spec["stages"][place]
    files = {part: folder / f"{part}-{stage['split']}.json" for part in parts}
    left = [part for part in parts if not files[part].is_file()]
    if not left:
        return
    run = stage.get("run", {})
    model, adapter = subject(folder, spec, place)
    network, tokenizer = load_model(
        model,
        adapter,
        device=spec["device"],
        quantization=run.get("quantization"),
        template=run.get("chat_template_kwargs", ()),
    )
    for part in left:
        rows = str(folder.parent.parent / stage["rows"] / part)
        found = tofu_metrics(network, tokenizer, stage["split"], rows, limit=spec["limit"], progress=False)
        ratios = found.sets["forget"].truth_ratio
        if ratios is None or np.isnan(ratios).any():
            raise UserError("Truth ratios on forget rows are not numbers: the model gives no probabilities.")
        records = [replace(r, extra=r.extra | {"data": part}) for r in found.records(spec["name"])]
        write_records(files[part], stamped(records, seed=run.get("seed")))


def work(folder: Path, parts: Sequence[str]) -> None:
    """Do a cell's job, the `spec.json` of which lies in `folder`: unlearn unless that is done, evaluate, and write.

    `cell.json` says what the runs cost and, with `status` "failed", why a run or a metric refused its values (as it would
    again: a loss that is not finite, say); `PART-SPLIT.json` holds the records of one part. The weights stay until the
    test rows are measured, since only the chosen cells come to that.
    """
    spec = json.loads((folder / "spec.json").read_text())
    on_gpu = spec["device"] in (None, "cuda") and torch.cuda.is_available()
    kept = _read(folder / "cell.json") or {"stages": [], "all_seconds": 0.0}
    result: dict[str, Any] = {**kept, "status": "done", "threads": torch.get_num_threads()}
    started = time.time()
    root = folder.parent.parent
    try:
        for place, stage in enumerate(spec["stages"]):
            run = folder / f"stage{place}"
            # a stage is over when both it and its costs are written
            if "run" not in stage or ((run / "run.json").is_file() and place < len(result["stages"])):
                continue
            given = stage["run"] | start_from(folder, spec, place) | {"out": str(run), "overwrite": True}
            if (root / given["forget"]).is_file():
                given["forget"] = str(root / given["forget"])
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            unlearn(Unlearn.model_validate(given))
            done = json.loads((run / "run.json").read_text())
            costs = {key: done[key] for key in ("steps", "trained_parameters", "router")}
            costs["seconds"] = sum(done["seconds"].values())
            costs["peak_memory"] = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
            result["stages"] = [*result["stages"][:place], costs]
            write_atomic(folder / f"run{place}.json", (run / "run.json").read_bytes())
            write_atomic(folder / "cell.json", to_json(result))
        for place in range(len(spec["stages"])):
            measure_stage(folder, spec, place, parts)
    except ValueError as error:  # a UserError, or figures that the metrics refuse
        # tables go elsewhere, and the folders of this machine mean nothing there
        reason = str(error).replace(str(folder), folder.name).replace(f"{root}{os.sep}", "")
        result |= {"status": "failed", "reason": " ".join(reason.split())}
    result["all_seconds"] += time.time() - started
    write_atomic(folder / "cell.json", to_json(result))
    if not spec.get("keep") and ("test" in parts or result["status"] == "failed"):
        forget_weights(folder)


def forget_weights(folder: Path) -> None:
    """Delete what a cell's runs have trained; a process killed in between leaves nothing that looks like a result."""
    stages = sorted(folder.glob("stage*"), reverse=True)
    # the last stage first, so that none is over whose predecessor is not
    for path in stages:
        (path / "run.json").unlink(missing_ok=True)
    for path in (*stages, *folder.glob("base*"), *folder.glob(".base*")):
        shutil.rmtree(path, ignore_errors=True)


def cell_process(folder: str, parts: str) -> int:
    """What a cell's process does; its output goes to `log.txt`. Returns 0, or 1 after an error that may not come again."""
    die_with_parent()
    try:
        work(Path(folder), parts.split())
    except Exception:  # any error must reach the log, and the comparison goes on without this cell
        traceback.print_exc()
        return 1
    return 0


# All cells -----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None


def is_measured(out: Path, cell: Cell, parts: Sequence[str]) -> bool:
    """Whether the records of these parts are there, for every split of the cell."""
    folder = out / "cells" / cell.key
    return all((folder / f"{part}-{split}.json").is_file() for part in parts for split in cell.chain)


def finished(out: Path, cell: Cell, parts: Sequence[str]) -> dict[str, Any] | None:
    """What a cell's process wrote last if these parts are measured or it has failed, else None."""
    found = _read(out / "cells" / cell.key / "cell.json")
    return found if found is None or found["status"] == "failed" or is_measured(out, cell, parts) else None


def gpus(device: str | None) -> list[str]:
    """Names of the visible GPUs as CUDA_VISIBLE_DEVICES takes them; none if another device is asked for."""
    if device not in (None, "cuda"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # "-1" is how people hide all of them
    names = [name for name in visible.split(",") if name and not name.startswith("-")] if visible else []
    return names or [str(i) for i in range(torch.cuda.device_count())]


def share_of_threads(workers: int) -> int:
    """Threads for each of so many processes: of OMP_NUM_THREADS if that is set, else of all cores of this process."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    total = int(given) if given.isdigit() and int(given) else len(os.sched_getaffinity(0))
    return max(1, total // workers)


@dataclass(frozen=True)
class Job:
    """A cell and the parts of its rows to measure; it is trained first unless its weights are there."""

    cell: Cell
    parts: tuple[str, ...]


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    job: Job
    slot: int


def command_line(folder: Path, parts: Sequence[str]) -> list[str]:
    """The command line of the process that works on the cell in `folder`."""
    arguments = f"{str(folder)!r}, {' '.join(parts)!r}"
    return [
        sys.executable,
        "-c",
        f"import sys; from alter.comparison.cells import cell_process; sys.exit(cell_process({arguments}))",
    ]


def _start(out: Path, job: Job, slot: int, workers: int, cards: Sequence[str], lock: int) -> _Running:
    cell = job.cell
    folder = out / "cells" / cell.key
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "spec.json", to_json(cell.spec))
    threads = str(share_of_threads(workers))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if cards:
        environment["CUDA_VISIBLE_DEVICES"] = cards[slot % len(cards)]
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            command_line(folder, job.parts),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            # the lock lasts until the last cell's process is gone, so no cell is ever worked on twice at once
            pass_fds=[lock],
        )
    return _Running(process, job, slot)


def _why(out: Path, cell: Cell, code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = (out / "cells" / cell.key / "log.txt").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit status {code}"


def run_cells(
    out: Path, jobs: Sequence[Job], workers: int, cards: Sequence[str], lock: int
) -> Iterator[tuple[Cell, str]]:
    """Run those of the jobs that have not finished, `workers` at a time; yield each with "" or why it did not finish."""
    waiting = deque(job for job in jobs if finished(out, job.cell, job.parts) is None)
    running: list[_Running] = []
    try:
        while waiting or running:
            free = sorted(set(range(workers)) - {each.slot for each in running})
            while free and waiting:
                running.append(_start(out, waiting.popleft(), free.pop(0), workers, cards, lock))
            ended = [each for each in running if each.process.poll() is not None]
            if not ended:
                time.sleep(0.05)
            for each in ended:
                running.remove(each)
                if each.process.stdin is not None:
                    each.process.stdin.close()
                done = finished(out, each.job.cell, each.job.parts) is not None
                yield each.job.cell, "" if done else _why(out, each.job.cell, each.process.returncode)
    finally:
        for each in running:
            each.process.kill()
            each.process.wait()


def run_shown(
    out: Path, jobs: Sequence[Job], workers: int, cards: Sequence[str], lock: int, label: str
) -> dict[str, str]:
    """Run the jobs with a progress bar and a line for each; return why those that did not finish did not, by key."""
    todo = [job for job in jobs if finished(out, job.cell, job.parts) is None]
    parts = {job.cell.key: job.parts for job in jobs}
    show(
        f"{label}: {len(jobs)} cells, {len(jobs) - len(todo)} of them finished before; {workers} at a time",
        markup=False,
        highlight=False,
    )
    lost: dict[str, str] = {}
    started = time.time()
    for count, (cell, reason) in enumerate(
        progress(run_cells(out, todo, workers, cards, lock), total=len(todo), label=label), start=1
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
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    end = time.time() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError:
            if time.time() > end:
                os.close(lock)
                raise UserError(
                    f"Another `alter compare` works in {out}: wait for it, or give another --out."
                ) from None
            time.sleep(0.1)
