"""`alter compare`: methods x seeds x forget splits x a grid of learning rates and lengths, with equal budget for each.

A cell is one unlearning run and its evaluation, in a process of its own and a folder of its own (`cells/KEY`, KEY a
digest of everything that determines the result). A cell that has finished or failed is never run again, one that was
killed is. The setting of each method is chosen on validation rows, the numbers of the table come from test rows:
`divide` and `choose` state the rules. The cells themselves know neither: they measure both parts.
"""

from __future__ import annotations

import ast
import csv
import fcntl
import importlib.util
import io
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import tyro
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alter import metrics
from alter.benchmarks.tofu import SETS, tofu_metrics
from alter.data import read_rows, tofu_rows
from alter.errors import UserError, nearest
from alter.methods import METHODS, merged
from alter.records import Record, digest, progress, provenance, read_records, to_json, write_atomic, write_records
from alter.scoring import load_model, shipped_model
from alter.trainer import Unlearn, unlearn

Array = npt.NDArray[np.float64]
CELL = 1
"""Version of `work`: raise it when what a cell does changes, so that no older cell stands for a new one."""
PARTS = ("validation", "test")
ORIGINAL, RETRAINED = "original", "retrained"
RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
RATES = ("learning_rate", "learning_rate_experts", "learning_rate_shared")
UNKEYED = {"out", "resume", "overwrite", "save_steps", "method"}
"""Settings of a run that change no number, or stand in it by what they stand for."""
FIGURES = {
    "forget_quality": "forget quality, log10 p",
    "model_utility": "utility",
    "forget_rouge": "forget ROUGE-L",
    "forget_distinct_2": "distinct-2",
    "forget_repetition": "repetition",
}
"""Columns of the table for each split, by metric."""
COSTS = {
    "seconds": "wall time, s",
    "trained_parameters": "trained parameters",
    "peak_memory": "peak memory, GB",
}


class Retrained(BaseModel):
    """Models retrained without the forget set, one for each split; without one a split has no forget quality."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    forget01: str | None = None
    """Model trained on retain99."""
    forget05: str | None = None
    """Model trained on retain95."""
    forget10: str | None = None
    """Model trained on retain90."""


class Compare(BaseModel):
    """Run methods on TOFU with equal search budget, choose each one's setting on validation rows, report on others."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str
    """Model that must forget: local folder, hub id, or builtin:NAME."""
    methods: list[str]
    """Rows of the table: methods of `alter unlearn --method`, or names that `settings` explains."""
    out: str
    """Folder of the comparison; the same command goes on where it stopped."""
    splits: list[Literal["forget01", "forget05", "forget10"]] = ["forget10"]
    """What to forget."""
    seeds: list[int] = [0, 1, 2]
    """Of the runs."""
    search_seeds: int | None = Field(None, ge=1)
    """Search the grid with so many of the seeds, and run the others with the chosen setting only; all by default."""
    rates: list[float] = [0.3, 1.0, 3.0]
    """Grid: multiples of each method's own learning rates."""
    epochs: list[float] = [5.0]
    """Grid: passes over the forget set, the same for every method."""
    common: Annotated[dict[str, Any], tyro.conf.Fixed] = Field(default_factory=dict)
    """Settings of `alter unlearn` for every run, above those of its method. In a recipe only."""
    settings: Annotated[dict[str, dict[str, Any]], tyro.conf.Fixed] = Field(default_factory=dict)
    """Settings of `alter unlearn` by row of the table, above all others; `method` says what is built on. Recipe only."""
    retrained: Retrained = Field(default_factory=Retrained)
    data: str = "builtin"
    """TOFU's rows: the copy that comes with this package, a folder with its files, or a hub id."""
    holdout: str | None = None
    """Questions and answers that no model saw, for the choice where a split has no retrained model."""
    validation: float = Field(0.3, gt=0, lt=1)
    """Share of the authors whose rows serve for the choice; all others' rows serve for the table."""
    division_seed: int = 0
    """Draws those authors."""
    utility_floor: float = Field(0.95, ge=0)
    """The choice is among settings that keep this share of the original model's utility."""
    limit: int | None = Field(None, ge=1)
    """Evaluate only so many rows of each set and part, for a quick look."""
    workers: int | None = Field(None, ge=1)
    """Cells at a time; by default one a GPU, else one for two cores."""
    keep: bool = False
    """Keep each cell's weights after its evaluation."""
    device: Literal["cpu", "cuda", "mps"] | None = None
    """Where the cells run; on all visible GPUs by default if there are any, else on the CPU."""


Setting = tuple[float, float]
"""A point of the grid: multiple of the learning rates, epochs."""


@dataclass(frozen=True)
class Cell:
    """One run and its evaluation, or (without `run`) the evaluation of a model as it is.

    `key` is the digest of everything that determines the result; `spec` what the cell's process is told.
    """

    name: str
    split: str
    seed: int | None
    setting: Setting | None
    spec: dict[str, Any]
    key: str

    def __str__(self) -> str:
        if self.setting is None:
            return f"{self.name} {self.split}"
        return f"{self.name} {self.split} seed {self.seed}, rate {self.setting[0]:g}, {self.setting[1]:g} epochs"


# What to run ---------------------------------------------------------------------------------------------------------


def source_digest() -> str:
    """Hash of the code that decides a cell's numbers: training, evaluation and all modules of this package they import."""
    package = Path(__file__).parent
    waiting, seen = ["alter.trainer", "alter.benchmarks.tofu"], set()
    files: list[Path] = []
    while waiting:
        name = waiting.pop()
        if name in seen or not name.startswith("alter."):
            continue
        seen.add(name)
        path = package.joinpath(*name.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not path.is_file():
            continue  # a name out of a module, not a module
        files.append(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                target = importlib.util.resolve_name("." * node.level + node.module, name.rpartition(".")[0])
                waiting += [target, *(f"{target}.{alias.name}" for alias in node.names)]
    return digest([[str(path.relative_to(package)), path.read_text()] for path in sorted(files)])


def model_digest(model: str) -> str:
    """Hash of the files of a model's folder; a hub id stands for itself.

    Raises:
        UserError: no such folder, or nothing that `save_pretrained` wrote is in it.
    """
    name = shipped_model(model)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.count("/") == 1 and not name.startswith((".", "/", "~")):
            return name
        siblings = (
            [str(folder.parent / other.name) for other in folder.parent.iterdir()] if folder.parent.is_dir() else []
        )
        raise UserError(f"No model at {model}: the folder does not exist.{nearest(str(folder), siblings)}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{model} has no config.json; expected the folder of a model, as written by save_pretrained.")
    files = sorted(
        p for p in folder.iterdir() if p.is_file() and p.suffix in (".safetensors", ".json", ".model", ".txt")
    )
    return digest([[path.name, digest(path.read_bytes().hex())] for path in files])


def divide(
    rows: Sequence[Mapping[str, Any]], group: Sequence[Any], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """Divide rows into validation and test rows so that no group has rows in both.

    The groups, in the order of their first row, are shuffled by `random.Random(seed)`; the first round(share x number of
    groups) of them, but at least one and not all, are validation.

    Args:
        rows: the rows, [n].
        group: what each belongs to, [n]: its author.

    Returns:
        row numbers of the validation part and of the test part, each in order.

    Raises:
        UserError: there is one group only.
    """
    names = list(dict.fromkeys(group))
    if len(names) < 2:
        raise UserError(f"All {len(rows)} rows belong to one author: none would be left for the table.")
    random.Random(seed).shuffle(names)
    chosen = set(names[: min(max(1, round(share * len(names))), len(names) - 1)])
    parts: tuple[list[int], list[int]] = ([], [])
    for i, name in enumerate(group):
        parts[name not in chosen].append(i)
    return parts


def evaluation_rows(settings: Compare, split: str) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The rows of TOFU's evaluation sets, divided: by part, then by the name of TOFU's file.

    Rows are grouped by author, which is their place in `full` // 20 (found by question and answer); a row that is not in
    `full` (real authors, world facts, holdout) is a group of its own answer.
    """
    full = {(row["question"], row["answer"]): row.get("author") for row in tofu_rows("full", settings.data)}
    sets = {
        f"{split if key == 'forget' else key}_perturbed": [
            {name: value for name, value in row.items() if name != "author"}
            for row in tofu_rows(f"{split if key == 'forget' else key}_perturbed", settings.data)
        ]
        for key in SETS
    }
    if settings.holdout is not None:
        sets[f"holdout{split.removeprefix('forget')}"] = read_rows(settings.holdout)
    out: dict[str, dict[str, list[dict[str, Any]]]] = {part: {} for part in PARTS}
    for name, rows in sets.items():
        for i, row in enumerate(rows):
            if not row.get("question") or not row.get("answer"):
                raise UserError(f"Row {i} of {name} has no question or no answer; it has {', '.join(row)}.")
        group = [
            full[pair] if full.get(pair) is not None else pair[1]
            for pair in ((row["question"], row["answer"]) for row in rows)
        ]
        for part, numbers in zip(PARTS, divide(rows, group, settings.validation, settings.division_seed), strict=True):
            out[part][name] = [rows[i] for i in numbers]
    return out


def run_of(settings: Compare, name: str, split: str, seed: int, setting: Setting) -> Unlearn:
    """The run of one cell: the method's own settings, `common`, then `settings` of the row, then the grid's.

    Raises:
        UserError: no such method, or settings that do not fit.
    """
    own = settings.settings.get(name, {})
    choices = [*METHODS, *settings.settings]
    if name not in choices:
        raise UserError(
            f"No method {name!r}; expected one of {', '.join(METHODS)}, or a name under `settings` in the recipe."
            f"{nearest(name, choices)}"
        )
    method = own.get("method", name if name in METHODS else None)
    reserved = [
        key for key in (*settings.common, *own) if key in ("model", "forget", "retain", "out", "seed", "epochs")
    ]
    if reserved:
        raise UserError(
            f"{reserved[0]!r} is the comparison's own setting: leave it out of common and settings.{name}."
        )
    base = {} if method is None else METHODS[method].settings if method in METHODS else {"method": method}
    given = merged(merged(base, settings.common), own)
    data = {"forget": f"{settings.data}:{split}", "retain": f"{settings.data}:{RETAIN[split]}"}
    rate, epochs = setting
    given |= {"model": settings.model, **data, "out": "run", "seed": seed, "epochs": epochs, "device": settings.device}
    try:
        run = Unlearn.model_validate(given)
        scaled = {key: getattr(run, key) * rate for key in RATES}
        return Unlearn.model_validate(run.model_dump() | scaled)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"Method {name}: {where}{': ' if where else ''}{first['msg']}.") from None


def check(settings: Compare) -> None:
    """Refuse what cannot be compared, before anything is made.

    Raises:
        UserError: an empty or repeated list, a number that cannot be a rate or a length, or more search seeds than seeds.
    """
    lists = {name: getattr(settings, name) for name in ("methods", "splits", "seeds", "rates", "epochs")}
    for name, values in lists.items():
        if not values:
            raise UserError(f"{name} is empty, so there is nothing to run: give at least one.")
        again = [value for i, value in enumerate(values) if value in values[:i]]
        if again:
            raise UserError(f"{name} has {again[0]!r} twice: two cells would be the same run. Give each value once.")
        if name in ("rates", "epochs") and not all(math.isfinite(value) and value > 0 for value in values):
            raise UserError(f"{name} is {values}; expected numbers above 0.")
    if settings.search_seeds is not None and settings.search_seeds > len(settings.seeds):
        raise UserError(f"search_seeds is {settings.search_seeds}, but there are {len(settings.seeds)} seeds.")
    names = [name for name in settings.methods if name in (ORIGINAL, RETRAINED)]
    if names:
        raise UserError(f"{names[0]!r} is a row of every table already: name the method otherwise.")
    # a name that stands for itself may be left out of a run; any other must be a slip
    spare = [
        name
        for name, own in settings.settings.items()
        if name not in settings.methods and name not in METHODS and "method" not in own
    ]
    if spare:
        raise UserError(
            f"settings has {spare[0]!r}, which is not among the methods.{nearest(spare[0], settings.methods)}"
        )


@dataclass(frozen=True)
class Plan:
    """All cells: those of the models as they are, and for each row and split the grid's, by setting and seed."""

    models: dict[tuple[str, str], Cell]
    grid: dict[tuple[str, str], dict[Setting, dict[int, Cell]]]

    def searched(self, settings: Compare) -> list[Cell]:
        """The cells of the search: every setting with the search seeds, spread so that all methods advance alike."""
        seeds = settings.seeds[: settings.search_seeds]
        points = itertools.product(itertools.product(settings.rates, settings.epochs), seeds)
        return [by[point][seed] for point, seed in points for by in self.grid.values()]


def plan(settings: Compare, out: Path) -> Plan:
    """Lay out every cell, and write the evaluation rows into `out`/rows.

    Raises:
        UserError: see `check`, `run_of` and `model_digest`; data that is missing; or two cells that are the same run.
    """
    check(settings)
    place = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if place == "cuda" and not torch.cuda.is_available():
        raise UserError("Device 'cuda' was asked for, but there is no CUDA here: use --device cpu.")
    facts = {
        "cell": CELL,
        "code": source_digest(),
        "versions": provenance()["versions"],
        "device": torch.cuda.get_device_name() if place == "cuda" else place,
        "limit": settings.limit,
    }
    grid: dict[tuple[str, str], dict[Setting, dict[int, Cell]]] = {}
    models: dict[tuple[str, str], Cell] = {}
    seen: dict[str, Cell] = {}
    folders = {
        name: model_digest(name) for name in (settings.model, *settings.retrained.model_dump().values()) if name
    }
    for split in settings.splits:
        rows = evaluation_rows(settings, split)
        trained = {name: read_rows(f"{settings.data}:{name}") for name in (split, RETAIN[split])}
        content = digest(rows)
        common = facts | {"split": split, "rows": content, "trained": digest(trained)}
        folder = out / "rows" / content
        for part, sets in rows.items():
            for name, own in sets.items():
                write_atomic(folder / part / f"{name}.json", "".join(json.dumps(row) + "\n" for row in own))
        told = {"split": split, "rows": f"rows/{content}", "limit": settings.limit, "device": settings.device}
        for name, model in ((ORIGINAL, settings.model), (RETRAINED, getattr(settings.retrained, split))):
            if model is not None:
                key = digest(common, {"model": folders[model]})
                models[name, split] = Cell(name, split, None, None, {**told, "name": name, "model": model}, key)
        for name in settings.methods:
            by = grid.setdefault((name, split), {})
            for setting in itertools.product(settings.rates, settings.epochs):
                for seed in settings.seeds:
                    run = run_of(settings, name, split, seed, setting)
                    # a preset that the settings contain already must not name the cell
                    decides = run.model_dump(mode="json", exclude=UNKEYED | {"model", "device"})
                    key = digest(common, {"model": folders[settings.model], "run": decides})
                    spec = {**told, "name": name, "model": settings.model, "run": run.model_dump(mode="json")}
                    cell = Cell(name, split, seed, setting, {**spec, "keep": settings.keep}, key)
                    if key in seen:
                        raise UserError(f"Two cells are the same run: {seen[key]}, and {cell}. Leave one of them out.")
                    seen[key] = cell
                    by.setdefault(setting, {})[seed] = cell
    return Plan(models, grid)


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


def work(folder: Path) -> None:
    """Run the cell whose `spec.json` lies in `folder`: unlearn, evaluate both parts, write, delete the weights.

    The last file written is `cell.json`: it makes the cell a finished one, with `status` "done", or "failed" and the
    reason if the run or a metric refused its values (as it would again: a loss that is not finite, say).
    """
    spec = json.loads((folder / "spec.json").read_text())
    result: dict[str, Any] = {"status": "done", "threads": torch.get_num_threads()}
    started = time.time()
    run = folder / "run"
    try:
        adapter, model = None, spec["model"]
        if "run" in spec:
            unlearn(Unlearn.model_validate({**spec["run"], "out": str(run), "overwrite": True}))
            done = json.loads((run / "run.json").read_text())
            result |= {key: done[key] for key in ("steps", "trained_parameters", "router")}
            result["seconds"] = sum(done["seconds"].values())
            result["peak_memory"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
            shutil.copyfile(run / "run.json", folder / "run.json")
            adapter, model = (None, str(run / "model")) if (run / "model").is_dir() else (str(run / "adapter"), model)
        evaluating = time.time()
        network, tokenizer = load_model(model, adapter, device=spec["device"])
        for part in PARTS:
            rows = folder.parent.parent / spec["rows"] / part
            measured = tofu_metrics(network, tokenizer, spec["split"], str(rows), limit=spec["limit"], progress=False)
            ratios = measured.sets["forget"].truth_ratio
            if ratios is None or np.isnan(ratios).any():
                raise UserError("Truth ratios on forget rows are not numbers: the model gives no probabilities.")
            records = [replace(r, extra=r.extra | {"data": part}) for r in measured.records(spec["name"])]
            write_records(folder / f"{part}.json", records)
        result["evaluation_seconds"] = time.time() - evaluating
    except ValueError as error:  # a UserError, or figures that the metrics refuse
        # tables go elsewhere, and the folders of this machine mean nothing there
        result |= {"status": "failed", "reason": str(error).replace(str(run), run.name)}
    if not spec.get("keep"):
        shutil.rmtree(run, ignore_errors=True)
    result["all_seconds"] = time.time() - started
    write_atomic(folder / "cell.json", to_json(result))


def main(folder: str) -> int:
    """What a cell's process does; its output goes to `log.txt`. Returns 0, or 1 after an error that may not come again."""
    die_with_parent()
    try:
        work(Path(folder))
    except Exception:  # any error must reach the log, and the comparison goes on without this cell
        traceback.print_exc()
        return 1
    return 0


# All cells -----------------------------------------------------------------------------------------------------------


def finished(out: Path, cell: Cell) -> dict[str, Any] | None:
    """What a cell's process wrote last, or None if it has not finished."""
    try:
        return dict(json.loads((out / "cells" / cell.key / "cell.json").read_text()))
    except FileNotFoundError:
        return None


def gpus(device: str | None) -> list[str]:
    """Names of the visible GPUs as CUDA_VISIBLE_DEVICES takes them; none if another device is asked for."""
    if device not in (None, "cuda"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name for name in visible.split(",") if name] if visible else []
    return names or [str(i) for i in range(torch.cuda.device_count())]


def share_of_threads(workers: int) -> int:
    """Threads for each of so many processes: of OMP_NUM_THREADS if that is set, else of all cores of this process."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    total = int(given) if given.isdigit() and int(given) else len(os.sched_getaffinity(0))
    return max(1, total // workers)


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    cell: Cell
    slot: int


def command(folder: Path) -> list[str]:
    """The command line of the process that works on the cell in `folder`."""
    return [sys.executable, "-c", f"import sys; from alter.compare import main; sys.exit(main({str(folder)!r}))"]


def _start(out: Path, cell: Cell, slot: int, workers: int, cards: Sequence[str], lock: int) -> _Running:
    folder = out / "cells" / cell.key
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "spec.json", to_json(cell.spec))
    threads = str(share_of_threads(workers))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if cards:
        environment["CUDA_VISIBLE_DEVICES"] = cards[slot % len(cards)]
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            command(folder),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            # the lock lasts until the last cell's process is gone, so no cell is ever worked on twice at once
            pass_fds=[lock],
        )
    return _Running(process, cell, slot)


def _why(out: Path, cell: Cell, code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = (out / "cells" / cell.key / "log.txt").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit status {code}"


def run_cells(
    out: Path, cells: Sequence[Cell], workers: int, cards: Sequence[str], lock: int
) -> Iterator[tuple[Cell, str]]:
    """Run those of the cells that have not finished, `workers` at a time; yield each with "" or why it did not finish."""
    waiting = deque(cell for cell in cells if finished(out, cell) is None)
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
                done = finished(out, each.cell) is not None
                yield each.cell, "" if done else _why(out, each.cell, each.process.returncode)
    finally:
        for each in running:
            each.process.kill()
            each.process.wait()


def shown(
    out: Path, cells: Sequence[Cell], workers: int, cards: Sequence[str], lock: int, label: str
) -> dict[str, str]:
    """Run the cells with a progress bar and a line for each; return why those that did not finish did not, by key."""
    todo = sum(finished(out, cell) is None for cell in cells)
    print(f"{label}: {len(cells)} cells, {len(cells) - todo} of them finished before; {workers} at a time")
    lost: dict[str, str] = {}
    started = time.time()
    for count, (cell, reason) in enumerate(
        progress(run_cells(out, cells, workers, cards, lock), total=todo, label=label), start=1
    ):
        found = finished(out, cell) or {"status": "not finished", "reason": reason}
        said = (
            f"{found['all_seconds']:.0f} s" if found["status"] == "done" else f"{found['status']}: {found['reason']}"
        )
        left = (time.time() - started) / count * (todo - count)
        print(f"{count}/{todo} {cell}: {said}; about {left / 60:.0f} min left", flush=True)
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


# The choice ----------------------------------------------------------------------------------------------------------


CRITERIA = {
    "retrained": "1 - D, D the Kolmogorov-Smirnov distance of its truth ratios on forget rows to the retrained model's",
    "holdout": "1 - |2 AUC - 1| of min-k against rows that no model saw",
    "rouge": "1 - ROUGE-L recall on forget rows (no retrained model and no holdout: does not see too much forgetting)",
}
"""How far a setting has forgotten, in [0, 1], higher is better, by what a split has to compare with."""


def criterion(settings: Compare, split: str) -> str:
    """Which of `CRITERIA` a split is judged by: the retrained model if there is one, else the holdout, else ROUGE."""
    if getattr(settings.retrained, split) is not None:
        return "retrained"
    return "holdout" if settings.holdout is not None else "rouge"


def figures(records: Sequence[Record], reference: Sequence[Record] | None) -> dict[str, float]:
    """The figures of the table and of the choice from the records of one cell and part.

    Args:
        records: of the cell.
        reference: of the retrained model on the same rows, if there is one; gives `forget_quality` (log10 of the p-value)
            and `distance` (its statistic).

    Raises:
        UserError: the reference was measured on other rows.
    """
    by = {record.metric: record for record in records}
    found = {
        name: math.nan if record.value is None else record.value
        for name, record in by.items()
        if name in FIGURES or name in ("mia_min_k", "forget_probability")
    }
    if reference is not None:
        own, other = (
            next(record for record in rows if record.metric == "forget_truth_ratio") for rows in (records, reference)
        )
        if own.extra["fingerprint"] != other.extra["fingerprint"]:
            raise UserError("The retrained model was evaluated on other rows than a cell: delete its folder in cells.")
        quality = metrics.forget_quality(_array(own.per_item), _array(other.per_item))
        found |= {"forget_quality": quality.log10, "distance": quality.statistic}
    return found


def _array(values: Sequence[float | None] | None) -> Array:
    # JSON writes infinity as null and NaN too, but a cell with NaN has failed
    return np.array([math.inf if value is None or math.isnan(value) else value for value in values or []])


def forgetting(found: Mapping[str, float], kind: str) -> float:
    """How far the model of these figures has forgotten, by one of `CRITERIA`."""
    if kind == "retrained":
        return 1 - found["distance"]
    if kind == "holdout":
        return 1 - abs(2 * found["mia_min_k"] - 1)
    return 1 - found["forget_rouge"]


def choose(candidates: Mapping[Setting, tuple[float, float]], original: float, floor: float) -> tuple[Setting, bool]:
    """The setting that forgets best among those that keep the utility; see `CRITERIA` for what forgetting is.

    Where no setting keeps it, the one with the largest product of forgetting and utility. The first of equals.

    Args:
        candidates: by setting, forgetting and utility on validation rows, means over the search seeds; at least one.
        original: utility of the original model on the same rows.
        floor: share of it that must be kept.

    Returns:
        the setting, and whether it keeps the utility.
    """

    def best(values: Mapping[Setting, float]) -> Setting:
        # a figure that is not a number must lose against any that is
        return max(values, key=lambda s: values[s] if math.isfinite(values[s]) else -math.inf)

    keeping = {s: score for s, (score, utility) in candidates.items() if utility >= floor * original}
    if keeping:
        return best(keeping), True
    return best({s: score * utility for s, (score, utility) in candidates.items()}), False


@dataclass(frozen=True)
class Choice:
    """The setting chosen for one row and split on validation rows, and why; None if no setting has finished."""

    setting: Setting | None
    keeps: bool
    forgetting: float
    utility: float
    finished: int
    budget: int


def choices(settings: Compare, made: Plan, out: Path) -> dict[tuple[str, str], Choice]:
    """Choose a setting for every row and split; reads `validation.json` of the cells and nothing else of them.

    A setting counts if all its search seeds are done: one that diverged with a seed is not chosen.
    """
    seeds = settings.seeds[: settings.search_seeds]
    found: dict[tuple[str, str], Choice] = {}
    for (name, split), by in made.grid.items():
        kind = criterion(settings, split)
        reference = _records(out, made.models.get((RETRAINED, split)), "validation")
        original = _records(out, made.models[ORIGINAL, split], "validation")
        assert original is not None
        whole = figures(original, None)["model_utility"]
        candidates: dict[Setting, tuple[float, float]] = {}
        count = 0
        for setting, cells in by.items():
            rows = [_records(out, cells[seed], "validation") for seed in seeds]
            count += sum(each is not None for each in rows)
            if all(each is not None for each in rows):
                each = [figures(own, reference) for own in rows if own is not None]
                candidates[setting] = (
                    statistics.fmean(forgetting(f, kind) for f in each),
                    statistics.fmean(f["model_utility"] for f in each),
                )
        budget = len(by) * len(seeds)
        if candidates:
            setting, keeps = choose(candidates, whole, settings.utility_floor)
            found[name, split] = Choice(setting, keeps, *candidates[setting], count, budget)
        else:
            found[name, split] = Choice(None, False, math.nan, math.nan, count, budget)
    return found


def _records(out: Path, cell: Cell | None, part: str) -> list[Record] | None:
    """Records of a cell on one part of the rows; None if there is no cell, or it has failed or not finished."""
    if cell is None or (finished(out, cell) or {}).get("status") != "done":
        return None
    return read_records(out / "cells" / cell.key / f"{part}.json")


# The table -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One method on one split: means over its seeds on test rows and, from two seeds on, standard deviations (n - 1)."""

    name: str
    split: str
    seeds: int
    mean: dict[str, float]
    spread: dict[str, float]
    choice: Choice | None = None
    dominated: bool = False
    dominated_with_fluency: bool = False
    notes: list[str] = field(default_factory=list)


def dominated(points: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which points are dominated: another is at least as good in everything and better in something.

    Args:
        points: [n, k], higher is better in every column; a row with a NaN neither dominates nor is dominated.

    Returns:
        [n] booleans. Equal points do not dominate each other.
    """
    values = np.asarray(points, dtype=np.float64)
    as_good = (values[:, None] >= values[None, :]).all(-1)
    better = (values[:, None] > values[None, :]).any(-1)
    return np.asarray((as_good & better).any(0), dtype=np.bool_)


def axis(row: Row, kind: str) -> float:
    """A row's place on the forgetting axis of the plot: log10 of forget quality, or the criterion of its split."""
    return row.mean.get("forget_quality", math.nan) if kind == "retrained" else row.mean.get("forgetting", math.nan)


def rows_of(settings: Compare, made: Plan, chosen: Mapping[tuple[str, str], Choice], out: Path) -> list[Row]:
    """The rows of the table: the models as they are, then the methods, split by split; from test rows alone."""
    rows: list[Row] = []
    for split in settings.splits:
        kind = criterion(settings, split)
        reference = _records(out, made.models.get((RETRAINED, split)), "test")
        for (name, where), cell in made.models.items():
            if where == split:
                rows.append(_row(name, split, [cell], reference, kind, out, None))
        methods = []
        for name in settings.methods:
            choice = chosen[name, split]
            cells = [] if choice.setting is None else list(made.grid[name, split][choice.setting].values())
            row = _row(name, split, cells, reference, kind, out, choice)
            row.notes.extend(_notes(out, [c for by in made.grid[name, split].values() for c in by.values()]))
            methods.append(row)
        pairs = [[axis(row, kind), row.mean.get("model_utility", math.nan)] for row in methods]
        fluent = [
            [row.mean.get("forget_distinct_2", math.nan), -row.mean.get("forget_repetition", math.nan)]
            for row in methods
        ]
        worse = dominated(pairs)
        worst = dominated([pair + rest for pair, rest in zip(pairs, fluent, strict=True)])
        for place, row in enumerate(methods):
            rows.append(replace(row, dominated=bool(worse[place]), dominated_with_fluency=bool(worst[place])))
    return rows


def _notes(out: Path, cells: Sequence[Cell]) -> list[str]:
    """What went wrong with cells that were run: a line for each that has a folder but is not done."""
    notes = []
    for cell in cells:
        found = finished(out, cell)
        if found is not None and found["status"] == "failed":
            notes.append(f"{cell}: {found['reason']}")
        elif found is None and (out / "cells" / cell.key).is_dir():
            notes.append(f"{cell}: not finished; the same command runs it again (see cells/{cell.key}/log.txt)")
    return notes


def _row(
    name: str,
    split: str,
    cells: Sequence[Cell],
    reference: Sequence[Record] | None,
    kind: str,
    out: Path,
    choice: Choice | None,
) -> Row:
    each: list[dict[str, float]] = []
    for cell in cells:
        records = _records(out, cell, "test")
        if records is None:
            continue
        found = figures(records, reference)
        found["forgetting"] = forgetting(found, kind)
        costs = finished(out, cell) or {}
        each.append(found | {key: float(costs[key]) for key in COSTS if key in costs})
    keys = list(each[0]) if each else []
    mean = {key: sum(found[key] for found in each) / len(each) for key in keys}
    finite = [key for key in keys if len(each) > 1 and all(math.isfinite(found[key]) for found in each)]
    spread = {key: statistics.stdev(found[key] for found in each) for key in finite}
    return Row(name, split, len(each), mean, spread, choice)


def _shown(row: Row, key: str, form: str, scale: float = 1.0) -> str:
    if not math.isfinite(row.mean.get(key, math.nan)):
        return "-"
    text = format(row.mean[key] * scale, form)
    return f"{text} ± {format(row.spread[key] * scale, form)}" if key in row.spread else text


def _grid(lines: Sequence[Sequence[str]]) -> list[str]:
    head = ["| " + " | ".join(lines[0]) + " |", "|---" + "|---:" * (len(lines[0]) - 1) + "|"]
    return head + ["| " + " | ".join(line) + " |" for line in lines[1:]]


def markdown(settings: Compare, rows: Sequence[Row], divided: Mapping[str, Mapping[str, int]]) -> str:
    """The comparison as Markdown: the table, what it cost, and how it was made.

    Args:
        divided: by split, the number of forget rows of each part.
    """
    by = {(row.name, row.split): row for row in rows}
    names = list(dict.fromkeys(row.name for row in rows))
    head = ["method", *(f"{split}: {title}" for split in settings.splits for title in FIGURES.values())]
    table, cost = (
        [head],
        [
            [
                "method",
                "split",
                *COSTS.values(),
                "chosen: rate ×",
                "epochs",
                "keeps utility",
                "searched cells done",
                "seeds",
                "dominated",
                "with fluency",
            ]
        ],
    )
    for name in names:
        line = [name]
        for split in settings.splits:
            row = by.get((name, split), Row(name, split, 0, {}, {}))
            line += [_shown(row, "forget_quality", ".1f"), *(_shown(row, key, ".3f") for key in list(FIGURES)[1:])]
            if row.choice is not None and row.seeds and not row.dominated:
                line[1 - len(FIGURES)] = f"**{line[1 - len(FIGURES)]}**"
            if row.choice is not None:
                setting, dominance = row.choice.setting, (row.dominated, row.dominated_with_fluency)
                cost.append(
                    [
                        *(
                            name,
                            split,
                            _shown(row, "seconds", ".0f"),
                            _shown(replace(row, spread={}), "trained_parameters", ",.0f"),
                        ),
                        _shown(row, "peak_memory", ".2f", 1e-9),
                        *(("-", "-") if setting is None else (f"{setting[0]:g}", f"{setting[1]:g}")),
                        "yes" if row.choice.keeps else "no",
                        *(f"{row.choice.finished}/{row.choice.budget}", str(row.seeds)),
                        *(("-", "-") if not row.seeds else ("yes" if d else "no" for d in dominance)),
                    ]
                )
        table.append(line)
    rules = [
        f"Model {settings.model}, seeds {', '.join(map(str, settings.seeds))}; mean ± standard deviation over seeds. "
        "Numbers are of test rows. Bold utility: no other method of this split is at least as good in forgetting and utility, and "
        "better in one of them. Fluency: distinct-2 and repetition besides.",
        f"Search budget, the same for every method and split: {len(settings.rates) * len(settings.epochs)} settings "
        f"(learning rates × {', '.join(f'{r:g}' for r in settings.rates)}; epochs "
        f"{', '.join(f'{e:g}' for e in settings.epochs)}) with {len(settings.seeds[: settings.search_seeds])} seeds.",
        "Chosen on validation rows, by method and split: the setting that forgets best among those that keep "
        f"{settings.utility_floor:.0%} of the original's utility; where none does, the largest forgetting × utility.",
        *(
            f"{split}: forgetting is {CRITERIA[criterion(settings, split)]}. "
            f"{divided[split]['validation']} forget rows for validation, {divided[split]['test']} for test."
            for split in settings.splits
        ),
        f"Division: authors shuffled by seed {settings.division_seed}, {settings.validation:.0%} of them for validation "
        "(rows of no TOFU author: each answer is its own author).",
        *(
            [f"Only {settings.limit} rows of each set and part were evaluated: a quick look."]
            if settings.limit
            else []
        ),
        "Wall time: the run without loading Python and without evaluation, beside the other workers' cells. Peak memory: "
        "of the run's process (of the GPU, where there is one).",
    ]
    notes = [f"* {note}" for row in rows for note in row.notes]
    lines = [*_grid(table), "", *_grid(cost), "", *(f"* {rule}" for rule in rules)]
    return "\n".join(lines + (["", "Cells without a result:", "", *notes] if notes else [])) + "\n"


def table_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV, one line for each method and split, all figures with mean and spread."""
    keys = list(dict.fromkeys(key for row in rows for key in row.mean))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    pairs = [f"{key}{end}" for key in keys for end in ("", "_spread")]
    own = ["rate", "epochs", "keeps_utility", "validation_forgetting", "validation_utility", "cells_done", "cells"]
    writer.writerow(["method", "split", "seeds", *own, "dominated", "dominated_with_fluency", *pairs])
    for row in rows:
        choice = row.choice
        said: list[Any] = [""] * len(own)
        if choice is not None:
            said = [
                *(choice.setting or ("", "")),
                choice.keeps,
                choice.forgetting,
                choice.utility,
                choice.finished,
                choice.budget,
            ]
        values = [each.get(key, "") for key in keys for each in (row.mean, row.spread)]
        marks = [row.dominated, row.dominated_with_fluency] if choice is not None and row.seeds else ["", ""]
        writer.writerow([row.name, row.split, row.seeds, *said, *marks, *values])
    return file.getvalue()


def pareto(path: Path, settings: Compare, rows: Sequence[Row]) -> None:
    """Draw forget quality against utility, a plot for each split, as PNG: spread as bars, a line through the best."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5.2 * len(settings.splits), 4.2), layout="constrained")
    FigureCanvasAgg(drawn)
    for place, split in enumerate(settings.splits):
        axes = drawn.add_subplot(1, len(settings.splits), place + 1)
        kind = criterion(settings, split)
        key = "forget_quality" if kind == "retrained" else "forgetting"
        best = []
        for row in rows:
            x, y = row.mean.get("model_utility", math.nan), axis(row, kind)
            if row.split != split or not (math.isfinite(x) and math.isfinite(y)):
                continue
            on = row.choice is not None and not row.dominated
            if on:
                best.append((x, y))
            color = "#6b7280" if row.choice is None else "#c2410c" if on else "#2563eb"
            axes.errorbar(
                *(x, y), xerr=row.spread.get("model_utility"), yerr=row.spread.get(key), color=color,
                fmt="s" if row.choice is None else "*" if on else "o", ms=9 if on else 5, lw=0.8,
            )  # fmt: skip
            axes.annotate(row.name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7, color=color)
        axes.plot(*zip(*sorted(best), strict=True) if best else ((), ()), color="#c2410c", lw=0.8, ls="--")
        axes.set_xlabel("model utility (higher is better)")
        label = (
            "forget quality, log10 p"
            if kind == "retrained"
            else "forgetting: 1 - " + ("|2 AUC - 1|" if kind == "holdout" else "forget ROUGE-L")
        )
        axes.set(ylabel=f"{label} (higher is better)", title=f"{split}: ★ not dominated")
        axes.margins(0.15)
        axes.grid(color="#e5e7eb", lw=0.6)
    image = io.BytesIO()
    # without a version inside, equal figures are equal files
    drawn.savefig(image, format="png", dpi=150, metadata={"Software": None})
    write_atomic(path, image.getvalue())


def all_records(settings: Compare, made: Plan, chosen: Mapping[tuple[str, str], Choice], out: Path) -> list[Record]:
    """Records of the chosen settings and of the models as they are on test rows, without the single rows' values.

    `extra` says split, seed, rate and epochs, and names the cell's folder, where the single values are.
    """
    cells = list(made.models.values())
    for (name, split), choice in chosen.items():
        if choice.setting is not None:
            cells += made.grid[name, split][choice.setting].values()
    records: list[Record] = []
    for cell in cells:
        own = _records(out, cell, "test")
        if own is None:
            continue
        setting = cell.setting or (None, None)
        extra = {"benchmark": "tofu", "split": cell.split, "data": "test", "seed": cell.seed, "rate": setting[0]}
        extra |= {"epochs": setting[1], "cell": cell.key}
        records += [replace(record, model=cell.name, per_item=None, extra=extra) for record in own]
        reference = _records(out, made.models.get((RETRAINED, cell.split)), "test")
        if reference is not None:
            found = figures(own, reference)
            n = next(record.n for record in own if record.metric == "forget_truth_ratio")
            quality = {"log10": found["forget_quality"], "statistic": found["distance"]}
            p = 10.0 ** found["forget_quality"]
            records.append(Record(cell.name, "forget_quality", p, n, higher_is_better=True, extra=extra | quality))
    return records


def compare(settings: Compare) -> list[Row]:
    """Run `alter compare`: all cells, the choice, the table; and write them to `settings.out`.

    Files: `table.md`, `table.csv`, `pareto.png`, `records.json`, `compare.json` (settings, choices, provenance);
    `cells/KEY` and `rows/` hold what they are made of.

    Raises:
        UserError: see `plan` and `hold`; or the original or a retrained model cannot be evaluated. A cell that fails or
            is killed does not stop the others: it is named under the table.
    """
    out = Path(settings.out).expanduser()
    if out.exists() and not out.is_dir():
        raise UserError(f"out is {settings.out!r}, which is a file; give a folder.")
    check(settings)
    lock = hold(out)
    try:
        made = plan(settings, out)
        cards = gpus(settings.device)
        workers = settings.workers or len(cards) or max(1, len(os.sched_getaffinity(0)) // 2)
        models = list(made.models.values())
        lost = shown(out, models, workers, cards, lock, "models as they are")
        for cell in models:
            found = finished(out, cell)
            if found is None or found["status"] != "done":
                reason = lost.get(cell.key) or (found or {}).get("reason")
                raise UserError(f"Cannot evaluate the model {cell.spec['model']} on {cell.split}: {reason}")
        lost = shown(out, made.searched(settings), workers, cards, lock, "search")
        chosen = choices(settings, made, out)
        rest = [
            made.grid[place][choice.setting][seed]
            for place, choice in chosen.items()
            if choice.setting is not None
            for seed in settings.seeds[len(settings.seeds[: settings.search_seeds]) :]
        ]
        if rest:
            lost |= shown(out, rest, workers, cards, lock, "other seeds")
        rows = rows_of(settings, made, chosen, out)
        divided: dict[str, dict[str, int]] = {
            split: {part: len(own[f"{split}_perturbed"]) for part, own in evaluation_rows(settings, split).items()}
            for split in settings.splits
        }
        text = markdown(settings, rows, divided)
        write_atomic(out / "table.md", text)
        write_atomic(out / "table.csv", table_csv(rows))
        pareto(out / "pareto.png", settings, rows)
        write_records(out / "records.json", all_records(settings, made, chosen, out))
        summary = {
            "settings": settings.model_dump(mode="json"),
            "choices": [{"method": name, "split": split, **asdict(c)} for (name, split), c in chosen.items()],
            "provenance": provenance(),
        }
        write_atomic(out / "compare.json", to_json(summary))
    finally:
        os.close(lock)
    print(f"\n{text}\n{out}: table.md, table.csv, pareto.png, records.json, compare.json, cells/")
    if lost:
        print(f"alter: {len(lost)} cells did not finish; the same command runs them again.", file=sys.stderr)
    return rows
