"""One cell of `alter compare`, in its own process and folder (`cells/KEY`).

It is first trained and measured on validation rows; only the chosen ones are measured on test rows too. A process that
was killed is started again, here or on another machine, and resumes from its folder.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alter.comparison.division import forget_set
from alter.comparison.own import FORGET, RETAIN, own_records
from alter.comparison.settings import OWN, Survival
from alter.comparison.survival import survival
from alter.core import UserError, forked, passing
from alter.data import load_examples
from alter.distillation import Distill, distill
from alter.evaluation import RowsEvaluation, TofuEvaluation, tofu_metrics, with_added
from alter.methods import adapter_of
from alter.models import load_model
from alter.storage import Record, stamped, take_lock, to_json, write_atomic, write_records
from alter.training import Unlearn, save_adapter, unlearn

PATIENCE = 60.0
"""Seconds that a cell waits for another process to leave its folder: one that lost its parent takes some to end."""


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # unlike ru_maxrss, this does not begin with the size of the process that started this one
        found = [line.split() for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if found:
            return int(found[0][1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def die_with_parent() -> None:
    """End this process once the other end of its standard input closes, that is, when its parent has ended."""

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def model_at(folder: Path, spec: Mapping[str, Any], place: int) -> tuple[str, str | None]:
    """Return model and adapter that a finished stage unlearned; the given model if the cell runs nothing."""
    run = spec["stages"][place].get("run")
    if run is None:
        return spec["model"], None
    made, kind = folder / f"stage{place}", adapter_of(run["adapter"])
    if kind.result == "model":
        return str(made / "model"), None
    base = str(folder / f"base{place}") if place and kind.merges else spec["model"]
    return base, str(made / "adapter")


def measured_at(folder: Path, spec: Mapping[str, Any], place: int) -> tuple[str, str | None]:
    """Return model and adapter of a finished stage that are measured: the distilled ones, where the row is distilled."""
    given = spec["stages"][place].get("distill")
    if given is None:
        return model_at(folder, spec, place)
    made = folder / f"plain{place}"
    return (str(made / "model"), None) if given["form"] == "full" else (spec["model"], str(made / "adapter"))


def start_from(folder: Path, spec: Mapping[str, Any], place: int) -> dict[str, Any]:
    """Return the settings that start a stage from the result of the one before.

    ALTER's adapter grows, a LoRA with a detector (O3) is trained on, any other LoRA is merged.
    """
    if place == 0:
        return {}
    model, adapter = model_at(folder, spec, place - 1)
    if adapter is None:
        return {"model": model}

    def merged() -> str:
        network, tokenizer = load_model(model, adapter, device=spec["device"])
        return str(save_adapter(network.merge_and_unload(), folder, name=f"base{place}", tokenizer=tokenizer))

    return adapter_of(spec["stages"][place]["run"]["adapter"]).continued(adapter, merged)


def measure_stage(folder: Path, spec: Mapping[str, Any], place: int, parts: Sequence[str]) -> None:
    """Measure a stage's model on those parts of its split's rows that are not measured yet.

    Raises:
        UserError: the model gives no probabilities.
    """
    stage = spec["stages"][place]
    files = {part: folder / f"{part}-{stage['split']}.json" for part in parts}
    left = [part for part in parts if not files[part].is_file()]
    if not left:
        return
    run = stage.get("run", {})
    model, adapter = measured_at(folder, spec, place)
    network, tokenizer = load_model(
        model,
        adapter,
        device=spec["device"],
        quantization=run.get("quantization"),
        template=_template(spec, run),
    )
    for part in left:
        rows = folder.parent.parent / stage["rows"] / part
        records = _figures(spec, stage["split"], network, tokenizer, rows)
        if "survival" in spec:
            records += _survival(spec, stage, (model, adapter, run), rows)
        records = [replace(r, extra=r.extra | {"data": part}) for r in records]
        write_records(files[part], stamped(records, seed=run.get("seed")))


def _figures(spec: Mapping[str, Any], split: str, network: Any, tokenizer: Any, rows: Path) -> list[Record]:
    """Measure a model in memory on one part's rows.

    Raises:
        UserError: the model gives no probabilities.
    """
    told = {"model": spec["model"], "name": spec["name"], "limit": spec["limit"]}
    if split == OWN:
        records = own_records(spec["name"], network, tokenizer, rows, spec["limit"], spec.get("domain_column"))
        own = {of: str(rows / f"{of}.json") for of in (FORGET, RETAIN)}
        return with_added(RowsEvaluation(**told, **own), network, tokenizer, records)
    found = tofu_metrics(network, tokenizer, split, str(rows), limit=spec["limit"], progress=False)
    ratios = found.sets["forget"].truth_ratio
    if ratios is None or np.isnan(ratios).any():
        raise UserError("Truth ratios on forget rows are not numbers: the model gives no probabilities.")
    asked = TofuEvaluation(**told, split=split, data=str(rows))
    return with_added(asked, network, tokenizer, found.records(spec["name"]))


def _template(spec: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """Return the chat template's variables: a run's own, or of a given model those that all runs have."""
    found: list[str] = run.get("chat_template_kwargs", spec.get("template", []))
    return found


def _survival(
    spec: Mapping[str, Any],
    stage: Mapping[str, Any],
    made: tuple[str, str | None, Mapping[str, Any]],
    rows: Path,
) -> list[Record]:
    """Measure disturbance and leak of a cell's model on one part's forget rows."""
    model, adapter, run = made

    def load(name: str, on: str | None) -> Any:
        return load_model(name, on, "float32", device=spec["device"], template=_template(spec, run))

    forget = load_examples(str(rows / f"{forget_set(stage['split'])}.json"))
    return survival(
        spec["name"], lambda: load(model, adapter), lambda: load(spec["original"], None), forget,
        Survival.model_validate(spec["survival"]), run.get("seed", 0),
        spec.get("domain_column") if stage["split"] == OWN else "author",
    )  # fmt: skip


def _on_gpu(spec: Mapping[str, Any]) -> bool:
    return spec["device"] in (None, "cuda") and torch.cuda.is_available()


def _peak_memory(spec: Mapping[str, Any]) -> int:
    """Return the largest memory so far: of the GPU since a stage began, where the cell runs on one, else of this process."""
    return torch.cuda.max_memory_allocated() if _on_gpu(spec) else peak_memory()


def _unlearned(folder: Path, spec: Mapping[str, Any], place: int) -> dict[str, Any]:
    """Run a stage's unlearning; return what it cost."""
    run, root = folder / f"stage{place}", folder.parent.parent
    # what a kill left, while it was written or deleted
    shutil.rmtree(run, ignore_errors=True)
    given = spec["stages"][place]["run"] | start_from(folder, spec, place) | {"out": str(run)}
    if (root / given["forget"]).is_file():
        given["forget"] = str(root / given["forget"])
    if _on_gpu(spec):
        torch.cuda.reset_peak_memory_stats()
    unlearn(Unlearn.model_validate(given))
    done = json.loads((run / "run.json").read_text())
    costs = {key: done[key] for key in ("steps", "trained_parameters", "router")}
    costs["seconds"] = sum(done["seconds"].values())
    costs["peak_memory"] = _peak_memory(spec)
    write_atomic(folder / f"run{place}.json", (run / "run.json").read_bytes())
    return costs


def _distilled(folder: Path, spec: Mapping[str, Any], place: int, costs: Mapping[str, Any]) -> dict[str, Any]:
    """Distil what a stage unlearned into plain weights; return the stage's costs, now of both, under `distill` its own.

    A distillation that was broken off begins anew, as an unlearning does: its time is then that of the whole.
    """
    out = folder / f"plain{place}"
    shutil.rmtree(out, ignore_errors=True)
    model, adapter = model_at(folder, spec, place)
    given = spec["stages"][place]["distill"] | {"model": model, "adapter": adapter, "out": str(out)}
    distill(Distill.model_validate(given))
    done = json.loads((out / "run.json").read_text())
    own = {"steps": done["steps"], "seconds": sum(done["seconds"].values())}
    own["trained_parameters"] = done["trained_parameters"]
    write_atomic(folder / f"distill{place}.json", (out / "run.json").read_bytes())
    return {
        **costs,
        **{key: costs[key] + own[key] for key in ("steps", "seconds")},
        "trained_parameters": max(costs["trained_parameters"], own["trained_parameters"]),
        "peak_memory": max(costs["peak_memory"], _peak_memory(spec)),
        "distill": own,
    }


def work(folder: Path, parts: Sequence[str]) -> None:
    """Run the cell specified by `spec.json` in `folder`: unlearn and distil unless that is done, evaluate, and write.

    `cell.json` says what the runs cost and, with `status` "failed", why a run or a metric refused its values (as it would
    again: a loss that is not finite, say; what the system refused, a full disk, is no result, and the cell is run again); `PART-SPLIT.json` holds the records of one part. The weights stay until the
    test rows are measured, which happens for chosen cells alone.
    """
    spec = json.loads((folder / "spec.json").read_text())
    before = folder / "cell.json"
    kept = json.loads(before.read_text()) if before.is_file() else {"stages": [], "all_seconds": 0.0}
    result: dict[str, Any] = {**kept, "status": "done", "threads": torch.get_num_threads()}
    started = time.time()
    root = folder.parent.parent
    try:
        for place, stage in enumerate(spec["stages"]):
            if "run" not in stage:
                continue
            # a stage has ended when its result and its costs are written
            if not (folder / f"stage{place}" / "run.json").is_file() or place >= len(result["stages"]):
                result["stages"] = [*result["stages"][:place], _unlearned(folder, spec, place)]
                write_atomic(folder / "cell.json", to_json(result))
            costs = result["stages"][place]
            if "distill" in stage and not ((folder / f"plain{place}" / "run.json").is_file() and "distill" in costs):
                result["stages"][place] = _distilled(folder, spec, place, costs)
                write_atomic(folder / "cell.json", to_json(result))
        for place in range(len(spec["stages"])):
            measure_stage(folder, spec, place, parts)
    except ValueError as error:  # a UserError, or figures that the metrics refuse
        if passing(error):
            raise
        # tables are handed on, and paths of this machine mean nothing elsewhere
        reason = str(error).replace(str(folder), folder.name).replace(f"{root}{os.sep}", "")
        result |= {"status": "failed", "reason": " ".join(reason.split())}
    result["all_seconds"] += time.time() - started
    write_atomic(folder / "cell.json", to_json(result))
    if not spec.get("keep") and ("test" in parts or result["status"] == "failed"):
        forget_weights(folder)


def forget_weights(folder: Path) -> None:
    """Delete the weights that a cell's runs have trained; a process killed midway leaves nothing that looks like a result."""
    made = [path for kind in ("plain*", "stage*") for path in sorted(folder.glob(kind), reverse=True)]
    # last stage first, so that no stage counts as ended without its predecessor
    for path in made:
        (path / "run.json").unlink(missing_ok=True)
    for path in (*made, *folder.glob("base*"), *folder.glob(".base*")):
        shutil.rmtree(path, ignore_errors=True)


def _end_after(minutes: float) -> None:
    """Let the system end this process after so long, as it can whatever hangs here."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Work in a cell's folder alone: a job of Slurm outlives the comparison that submitted it, a task its machine's connection.

    Raises:
        UserError: another process works there and goes on to.
    """
    try:
        lock = take_lock(folder / ".lock", PATIENCE)
    except BlockingIOError:
        raise UserError("another process works on this cell already, of a comparison that has ended since") from None
    try:
        yield
    finally:
        os.close(lock)


def cell_process(folder: str, parts: str) -> int:
    """Run a cell in a process of its own, whose output goes to `log.txt`; return 0, or 1 after an error that may be transient."""
    die_with_parent()
    try:
        limit = json.loads((Path(folder) / "spec.json").read_text()).get("minutes")
        if limit is not None:
            _end_after(limit)
        with _alone(Path(folder)), forked.allowed():
            work(Path(folder), parts.split())
    except Exception:  # log any error; the comparison continues without this cell
        traceback.print_exc()
        return 1
    return 0
