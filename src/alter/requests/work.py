"""Run erasure requests and revoke them.

A project's folder holds one adapter per version (`adapters/0003/`) and a link `adapter` to the one in force. What a run
trained is loaded, found finite and measured first; only requests that were not found NOT FORGOTTEN or COLLAPSED take
effect, in the step that moves the link (`alter.requests.versions`). A run killed before that has no effect; one killed
after is finished by the next command. Rows, checkpoints and untaken adapters of a run are removed on every
path; after a kill by the next command. An interrupted run (Ctrl-C) leaves what the next one goes on from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alter.core import UserError, warn
from alter.data import Example, check_overlap, load_examples
from alter.methods import with_default
from alter.requests.bases import remove_unreached
from alter.requests.checking import noted_adapter, refuse_changed
from alter.requests.concluding import conclude
from alter.requests.evidence import check_yardstick
from alter.requests.project import Project
from alter.requests.records import IN_FORCE, Request
from alter.requests.removal import sweep
from alter.requests.rows import received_rows
from alter.requests.store import Store
from alter.requests.versions import adapter_digest, clear_expert, manifest, private, put_in_force
from alter.storage import digest, folder_digest, write_atomic
from alter.storage.provenance import provenance
from alter.training import OtherInputs, Unlearn, unlearn

CUT = {"model", "forget", "retain", "out", "start_from", "experts_only", "domain_column", "num_forget_experts"} | {
    "max_domains",
    "resume",
    "overwrite",
}
"""Settings of a run that the request decides, not the recipe."""


def recover(store: Store, project: Project, *, resume: bool = False) -> list[Request]:
    """Finish what a killed process left: effects that the link shows become true in the database, the rest is rolled back.

    What was trained but not measured is measured now, if it is still as it was trained. Everything else of a run that was cut off
    is removed; with `resume` the folders that a new run of the same requests would go on from stay.

    Returns:
        the requests that were measured now, in the state that the verdict gives.

    Raises:
        UserError: the adapter that was in force is gone; nothing is touched.
    """
    remove_unreached(store, project)
    if not project.adapter.exists() and noted_adapter(store) is not None:
        # without it everything would count as never reached, and be swept away
        refuse_changed(store, project)
    inside = manifest(project)
    experts = {name: int(expert) for expert, name in inside["experts"].items()}
    groups: dict[str, list[Request]] = {}
    concluded: list[Request] = []
    for request in store.requests("running", "trained"):
        key = ((request.run or {}).get("key") or "") if request.state == "trained" else ""
        if request.name in experts and experts[request.name] not in inside["cleared"]:
            concluded += conclude(
                store, project, [request], project.adapter.resolve(), inside["run"], what="recovered"
            )
        elif key and _as_trained(store, project.root / "runs" / key, request):
            groups.setdefault(key, []).append(request)
        else:
            if key:
                # nothing could go on from it
                shutil.rmtree(project.root / "runs" / key, ignore_errors=True)
            store.move([request.id], "received", what="interrupted")
    for key, members in groups.items():
        trained = members[0].run or {}
        candidate = project.root / "runs" / key / "adapter"
        concluded += conclude(store, project, members, candidate, trained, what="recovered")
    for request in store.requests(*IN_FORCE):
        if request.expert in inside["cleared"]:
            store.move([request.id], "revoked", what="recovered", details={"adapter": adapter_digest(project)})
    if not resume:
        sweep(project)
    return concluded


def _as_trained(store: Store, run: Path, request: Request) -> bool:
    """Tell whether a run's adapter is there as it was trained."""
    noted = [entry.details["adapter"] for entry in store.history(request.id) if entry.what == "trained"]
    return (run / "adapter").is_dir() and folder_digest(run / "adapter") in noted[-1:]


def run_requests(store: Store, project: Project, requests: Sequence[Request]) -> list[Request]:
    """Make the model forget: one run that trains one new expert per request, beside those in force.

    Args:
        store, project: where the requests are; the caller holds the lease.
        requests: in state received, or missed before.

    Returns:
        the requests with their evidence, in the state that the verdict gives.

    Raises:
        UserError: nothing to do, data that changed, an overlap with the retain set, or what `unlearn` raises, a full
            disk included; the requests are then failed, or as they were if nothing had begun.
    """
    if not requests:
        raise UserError("Nothing to run: no request is in state received. `alter request list` shows all.")
    examples = {request.name: received_rows(request) for request in requests}
    retain = load_examples(project.retain)
    check_yardstick(project)
    for rows in examples.values():
        check_overlap(rows, retain)
    inside = manifest(project)
    numbers = [request.id for request in requests]
    key = digest(numbers, [request.data_hash for request in requests], inside["version"], project.recipe)
    out = project.root / "runs" / key
    sweep(project, keep=key)
    store.move(numbers, "running", details={"run": key, "after_version": inside["version"]})
    forget = project.root / "runs" / f"{key}.jsonl"
    goes_on: str | None = None
    try:
        with private():
            _write_rows(forget, examples)
            _train(project, forget, out, inside["version"])
        trained = {**_record_of(out, key), "base": project.base}
        details = {"run": key, "adapter": folder_digest(out / "adapter")}
        # recorded before anything depends on it, so that a kill while measuring costs no training
        found = store.move(numbers, "trained", details=details, values={n: {"run": trained} for n in numbers})
        return conclude(store, project, found, out / "adapter", trained, what=None)
    except KeyboardInterrupt:
        goes_on = key
        names = ", ".join(request.name for request in requests)
        warn(f"Interrupted: `alter request run` goes on with {names}, `alter request revoke` withdraws it.")
        raise
    except OSError as error:
        reason = f"{error.strerror or type(error).__name__}{f': {error.filename}' if error.filename else ''}"
        _failed(store, project, numbers, reason)
        raise UserError(
            f"The run failed: {reason}. `alter request list` shows what is in force; `alter request run --again` tries the "
            "rest."
        ) from error
    except Exception as error:
        _failed(store, project, numbers, str(error) if isinstance(error, UserError) else type(error).__name__)
        raise
    finally:
        # an interrupted run keeps its folder, as after a kill, and writes its rows anew
        sweep(project, keep=goes_on)


def _write_rows(path: Path, examples: Mapping[str, Sequence[Example]]) -> None:
    """Write the forget set of a run: every request's rows, with the request's name as their domain."""
    lines = [
        json.dumps({**example.row, "alter_request": name}, ensure_ascii=False)
        for name, members in examples.items()
        for example in members
    ]
    write_atomic(path, "\n".join(lines) + "\n")


def _train(project: Project, forget: Path, out: Path, version: int) -> None:
    """Train new experts for the requests in `forget` on top of the adapter in force, resuming what lies in `out`."""
    settings = Unlearn.model_validate(
        {
            **with_default(project.recipe),
            "model": project.model,
            "forget": str(forget),
            "retain": project.retain,
            "domain_column": "alter_request",
            "experts_only": True,
            "start_from": str(project.adapter) if version else None,
            "out": str(out),
            "resume": out.is_dir() and any(out.iterdir()),
        }
    )
    try:
        unlearn(settings)
    except OtherInputs:
        # leftovers of an interrupted run are of another model or retain set
        shutil.rmtree(out)
        unlearn(settings.model_copy(update={"resume": False}))


def _record_of(out: Path, key: str) -> dict[str, Any]:
    """Return what the database stores of a finished run."""
    record = json.loads((out / "run.json").read_text())
    return {
        "key": key,
        "seconds": record["seconds"],
        "router": record["router"],
        "trained_parameters": record["trained_parameters"],
        "settings": {name: value for name, value in record["settings"].items() if name not in CUT},
        "served": dict(zip(map(str, record["experts"]), record["domains"], strict=True)),
        "provenance": provenance(),
    }


def _failed(store: Store, project: Project, numbers: Sequence[int], reason: str) -> None:
    """Mark requests as failed, except those that the adapter in force holds: `recover` finishes these."""
    inside = manifest(project)
    held = {name for expert, name in inside["experts"].items() if int(expert) not in inside["cleared"]}
    requests = [store.get(number) for number in numbers]
    still = [r.id for r in requests if r.state in ("running", "trained") and r.name not in held]
    store.move(still, "failed", details={"error": reason})


def revoke_request(store: Store, project: Project, request: Request, who: str | None = None) -> Request:
    """Revoke one request: zero its expert and close it for every token, so that the model answers as the base does.

    Low-entropy tokens that other experts took stay with them, bit for bit; those that this one took go to the next best.

    Raises:
        UserError: the adapter in force does not hold the request.
    """
    if request.state not in IN_FORCE:
        return store.move([request.id], "revoked", who=who)[0]
    assert request.expert is not None
    inside = manifest(project)
    work = project.root / ".revoked"
    entry = {
        **inside,
        "version": inside["version"] + 1,
        "cleared": sorted({*inside["cleared"], request.expert}),
        "head": store.head(),
    }
    with private():
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(project.adapter.resolve(), work)
        write_atomic(work / "adapter_model.safetensors", clear_expert(work, request.expert))
        put_in_force(project, work, entry)
        shutil.rmtree(work)
    details = {"version": entry["version"], "expert": request.expert, "adapter": adapter_digest(project)}
    return store.move([request.id], "revoked", who=who, details=details)[0]
