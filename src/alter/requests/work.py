"""What is done with erasure requests: run them, check that they hold, take one back, hand the result out.

A project's folder holds one adapter per version (`adapters/0003/`) and a link `adapter` to the one in force. What a run
trained is loaded, found finite and measured first; only requests that were not found NOT FORGOTTEN or COLLAPSED take
effect. A version is written whole, with a manifest of which expert serves which request, before the link moves to it in
one step: that is when a run takes effect. Whatever is killed before has not happened, whatever is killed after is finished
by the next command. Rows, checkpoints and untaken adapters of a run are removed on every path; after a kill by the next
command. Folders and files are for their owner alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from alter.core.errors import UserError
from alter.core.files import digest, folder_digest, read_object, to_json, write_atomic
from alter.core.provenance import provenance
from alter.data.examples import Example, check_overlap, data_hash, load_examples, row_hash
from alter.data.subjects import rows_about
from alter.distillation.run import Distill, distill
from alter.evaluation import rows as own_rows
from alter.evaluation.leakage import Leak, leaked
from alter.evaluation.verdict import SLACK, Measures, Verdict, judge
from alter.exporting import loras
from alter.methods.presets import with_default
from alter.models.loading import load_model
from alter.requests.project import Project
from alter.requests.store import IN_FORCE, Request, Store, now
from alter.training.folder import OtherInputs
from alter.training.run import unlearn
from alter.training.settings import Unlearn

UTILITY_SHARE = 0.97
"""Share of the untouched model's utility that must be left."""

CUT = {"model", "forget", "retain", "out", "start_from", "experts_only", "domain_column", "num_forget_experts"} | {
    "max_domains",
    "resume",
    "overwrite",
}
"""Settings of a run that the request decides, not the recipe."""

DECIDED = {"run", "model", "adapter", "student", "forget", "retain", "out", "form", "resume", "overwrite"}
"""Settings of `alter distill` that the requests decide."""


# Data -----------------------------------------------------------------------------------------------------------------


def rows_of(request: Request) -> list[Example]:
    """The rows of a request, from where they lie or from the database.

    Raises:
        UserError: they cannot be read, or are not those that were received.
    """
    if request.text is not None:
        from alter.data.examples import examples

        found = examples([json.loads(line) for line in request.text.split("\n")])
    else:
        found = load_examples(request.data)
    hashes = [row_hash(example) for example in found]
    if data_hash(hashes) != request.data_hash:
        changed = len(set(hashes) ^ set(request.row_hashes))
        raise UserError(
            f"The data of {request.name} at {request.data} is not what was received on {request.received[:10]}: "
            f"{len(found)} rows now, {request.rows} then, {changed} of them different. Restore the file, or withdraw "
            "the request and add it again."
        )
    return found


def check_subject(subject: str, retain: Sequence[Example]) -> None:
    """Refuse a subject of whom the retain set speaks: what is kept there could not be forgotten.

    Raises:
        UserError: names the rows.
    """
    named = [example.index for example in rows_about(subject, retain)]
    if named:
        raise UserError(
            f"{subject!r} is in the retain set ({len(named)} rows, first {', '.join(map(str, named[:5]))}), which would "
            "keep what is to be forgotten. Take these rows out of it and make a new project, or add the request with "
            "--allow-in-retain if they are about another one of that name."
        )


def check_unseen(holdout: Sequence[Example], retain: Sequence[Example]) -> None:
    """Refuse a holdout that shares rows with the retain set.

    Raises:
        UserError: says how many.
    """
    shared = {row_hash(example) for example in holdout} & {row_hash(example) for example in retain}
    if shared:
        raise UserError(f"{len(shared)} rows of the holdout are in the retain set: it must be unseen.")


# Evidence -------------------------------------------------------------------------------------------------------------


def measure(
    model: Any, tokenizer: Any, examples: Sequence[Example], *, answers: int, seed: int = 0
) -> tuple[Measures, dict[str, Any]]:
    """What a model knows of some rows, and the same as figures; see `alter.evaluation.rows.measure`."""
    found = own_rows.measure(model, tokenizer, examples, answers=answers, seed=seed, label="requests")
    return found.measures, found.summary()


def retain_sample(project: Project) -> list[Example]:
    """The rows of the retain set that utility is measured on: always the same ones."""
    rows = load_examples(project.retain)
    chosen = np.random.default_rng(0).permutation(len(rows))[: project.retain_rows]
    return [rows[i] for i in sorted(chosen.tolist())]


def utility(model: Any, tokenizer: Any, project: Project) -> tuple[Measures, dict[str, Any]]:
    """Behaviour on the retain sample, with the mean of probability and ROUGE-L as `utility`."""
    measures, found = measure(model, tokenizer, retain_sample(project), answers=project.answers)
    parts = [float(value) for value in (found["probability"], found["rouge"]) if value is not None]
    return measures, {**found, "utility": float(np.mean(parts))}


def _unaltered(model: Any) -> Any:
    """The untouched base inside the block, whatever adapter is on it."""
    return model.disable_adapter() if model.__class__.__name__.startswith("Peft") else nullcontext()


def baselines(
    project: Project, model: Any, tokenizer: Any, examples: Mapping[str, Sequence[Example]]
) -> dict[str, tuple[Measures, dict[str, Any]]]:
    """What not knowing looks like for each request: the retrained model on its rows, or the base on the holdout."""
    if project.retrained is not None:
        other, own = load_model(project.retrained, template=project.template)
        measured = {name: measure(other, own, rows, answers=project.answers) for name, rows in examples.items()}
        return {name: (found, {"by": "retrained model", **figures}) for name, (found, figures) in measured.items()}
    if project.holdout is not None:
        with _unaltered(model):
            found, figures = measure(model, tokenizer, load_examples(project.holdout), answers=project.answers)
        return dict.fromkeys(examples, (found, {"by": "holdout", **figures}))
    return {}


# Versions of the adapter ----------------------------------------------------------------------------------------------


def manifest(project: Project) -> dict[str, Any]:
    """Which expert serves which request in the adapter in force; version 0 where there is none yet."""
    if not project.adapter.exists():
        return {"version": 0, "experts": {}, "cleared": []}
    return read_object(project.adapter / "requests.json", "which expert serves which request")


def put_in_force(project: Project, source: Path, entry: Mapping[str, Any]) -> Path:
    """Write a new version from an adapter folder and move the link to it, in one step.

    Args:
        project: whose adapter.
        source: folder of the adapter.
        entry: the manifest of the new version.
    """
    versions = project.root / "adapters"
    versions.mkdir(mode=0o700, parents=True, exist_ok=True)
    final = versions / f"{entry['version']:04d}"
    partial = versions / f".{final.name}.partial"
    for left_over in (partial, final):
        # a version that the link never reached was not in force
        shutil.rmtree(left_over, ignore_errors=True)
    shutil.copytree(source, partial, symlinks=False)
    partial.chmod(0o700)
    write_atomic(partial / "requests.json", to_json(dict(entry)))
    for path in partial.iterdir():
        if path.is_file():
            path.chmod(0o600)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    os.replace(partial, final)
    link = project.root / ".adapter.link"
    link.unlink(missing_ok=True)
    link.symlink_to(Path("adapters") / final.name)
    os.replace(link, project.adapter)
    folder = os.open(project.root, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return final


CLOSED = -1e4
"""Bias of a router's row that opens for no token; the row's weights are zero."""


def clear_expert(adapter: Path, expert: int) -> bytes:
    """The adapter's weights without one forget expert, as the content of a safetensors file.

    Its columns of every B become zero, and its row of the router such that no token opens it: an emptied expert that
    still took tokens would answer as the base does where another request's expert should. The file alone is enough: what
    was removed must not depend on a model that loads.

    Raises:
        UserError: the adapter has no such expert.
    """
    config = read_object(adapter / "adapter_config.json", "the settings of an adapter")
    experts = config["num_forget_experts"]
    if not 1 <= expert <= experts:
        raise UserError(f"{adapter} has forget experts 1 to {experts}; there is no expert {expert}.")
    tensors = load_file(str(adapter / "adapter_model.safetensors"))
    for name, value in tensors.items():
        if ".alter_B." in name:
            r = value.shape[1] // (experts + 1)
            value[:, expert * r : (expert + 1) * r] = 0.0
        elif ".alter_router." in name and config["router"] != "dense":
            value[expert] = CLOSED if name.endswith("bias") else 0.0
    return save(tensors, metadata={"format": "pt"})


# The work -------------------------------------------------------------------------------------------------------------


@contextmanager
def private() -> Iterator[None]:
    """Whatever is written inside the block is for its owner alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def sweep(project: Project, keep: str | None = None) -> list[str]:
    """Remove rows, checkpoints and untaken adapters that runs left behind; returns what was removed.

    Args:
        keep: key of a run whose folder is to stay.
    """
    removed = []
    left = [*(project.root / "runs").glob("*"), *project.root.glob(".*")]
    left += (project.root / "adapters").glob(".*")
    # a version that the link never reached was not in force
    version = manifest(project)["version"]
    left += [p for p in (project.root / "adapters").glob("[0-9]*") if int(p.name) > version]
    for path in dict.fromkeys(left):
        if path.name == keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        removed.append(str(path))
    return removed


def recover(store: Store, project: Project, *, resume: bool = False) -> None:
    """Finish what a killed process left: effects that the link shows become true in the database, the rest is undone.

    What was trained but not measured is measured now. Everything else of a run that was cut off is removed; with
    `resume` the folders that a new run of the same requests would go on from stay.
    """
    inside = manifest(project)
    experts = {name: int(expert) for expert, name in inside["experts"].items()}
    groups: dict[str, list[Request]] = {}
    for request in store.requests("running", "trained"):
        key = ((request.run or {}).get("key") or "") if request.state == "trained" else ""
        if request.name in experts and experts[request.name] not in inside["cleared"]:
            _conclude(store, project, [request], project.adapter.resolve(), inside["run"], what="recovered")
        elif key and (project.root / "runs" / key / "adapter").is_dir():
            groups.setdefault(key, []).append(request)
        else:
            store.move([request.id], "received", what="interrupted")
    for key, members in groups.items():
        trained = members[0].run or {}
        _conclude(store, project, members, project.root / "runs" / key / "adapter", trained, what="recovered")
    for request in store.requests(*IN_FORCE):
        if request.expert in inside["cleared"]:
            store.move([request.id], "revoked", what="recovered", details={"adapter": adapter_digest(project)})
    if not resume:
        sweep(project)


def adapter_digest(project: Project) -> str | None:
    """Digest of the adapter in force, its manifest included; None where there is none."""
    return folder_digest(project.adapter.resolve()) if project.adapter.exists() else None


def run(store: Store, project: Project, requests: Sequence[Request]) -> list[Request]:
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
    examples = {request.name: rows_of(request) for request in requests}
    retain = load_examples(project.retain)
    for rows in examples.values():
        check_overlap(rows, retain)
    inside = manifest(project)
    numbers = [request.id for request in requests]
    key = digest(numbers, [request.data_hash for request in requests], inside["version"], project.recipe)
    out = project.root / "runs" / key
    sweep(project, keep=key)
    store.move(numbers, "running", details={"run": key, "after_version": inside["version"]})
    forget = project.root / "runs" / f"{key}.jsonl"
    try:
        with private():
            lines = [
                json.dumps({**example.row, "alter_request": name}, ensure_ascii=False)
                for name, members in examples.items()
                for example in members
            ]
            write_atomic(forget, "\n".join(lines) + "\n")
            settings = Unlearn.model_validate(
                {
                    **with_default(project.recipe),
                    "model": project.model,
                    "forget": str(forget),
                    "retain": project.retain,
                    "domain_column": "alter_request",
                    "experts_only": True,
                    "start_from": str(project.adapter) if inside["version"] else None,
                    "out": str(out),
                    "resume": out.is_dir() and any(out.iterdir()),
                }
            )
            try:
                unlearn(settings)
            except OtherInputs:
                # what a run that was cut off left is of another model or retain set by now
                shutil.rmtree(out)
                unlearn(settings.model_copy(update={"resume": False}))
        record = json.loads((out / "run.json").read_text())
        trained = {
            "key": key,
            "seconds": record["seconds"],
            "router": record["router"],
            "trained_parameters": record["trained_parameters"],
            "settings": {name: value for name, value in record["settings"].items() if name not in CUT},
            "served": dict(zip(map(str, record["experts"]), record["domains"], strict=True)),
            "provenance": provenance(),
        }
        details = {"run": key, "adapter": folder_digest(out / "adapter")}
        # recorded before anything depends on it, so that a kill while measuring costs no training
        found = store.move(numbers, "trained", details=details, values={n: {"run": trained} for n in numbers})
        return _conclude(store, project, found, out / "adapter", trained, what=None)
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
        sweep(project)


def _failed(store: Store, project: Project, numbers: Sequence[int], reason: str) -> None:
    """Say that requests failed, but for those that the adapter in force holds: `recover` finishes these."""
    inside = manifest(project)
    held = {name for expert, name in inside["experts"].items() if int(expert) not in inside["cleared"]}
    requests = [store.get(number) for number in numbers]
    still = [r.id for r in requests if r.state in ("running", "trained") and r.name not in held]
    store.move(still, "failed", details={"error": reason})


def _conclude(
    store: Store,
    project: Project,
    requests: Sequence[Request],
    candidate: Path,
    trained: Mapping[str, Any],
    *,
    what: str | None,
) -> list[Request]:
    """Load and measure what a run made, put in force what was forgotten, and write the evidence down.

    Experts of requests that were not forgotten, or whose model collapsed, are emptied before the link moves; if none is
    left, nothing is put in force. Requests whose data are gone meanwhile are unproven: evidence missing.

    Args:
        candidate: folder of the adapter, of the run or in force already.
        trained: the run's record; `served` says which expert is whose.

    Raises:
        UserError: the adapter does not load, or its weights are not finite; nothing is put in force.
    """
    started = time.time()
    inside = manifest(project)
    in_force = project.adapter.exists() and candidate == project.adapter.resolve()
    model, tokenizer = load_model(project.model, str(candidate), template=project.template)
    examples: dict[str, Sequence[Example]] = {}
    missing: dict[str, str] = {}
    for request in requests:
        try:
            examples[request.name] = rows_of(request)
        except UserError as error:
            missing[request.name] = str(error)
    with _unaltered(model):
        before = {name: measure(model, tokenizer, rows, answers=project.answers) for name, rows in examples.items()}
        base, base_utility = utility(model, tokenizer, project)
    references = baselines(project, model, tokenizer, examples) if examples else {}
    served = {name: int(expert) for expert, name in {**trained["served"], **inside["experts"]}.items()}
    served |= {name: int(expert) for expert, name in trained["served"].items()}
    verdicts: dict[str, Verdict] = {
        name: Verdict("unproven", (f"Evidence missing: {reason}",)) for name, reason in missing.items()
    }
    own: dict[str, tuple[Measures, dict[str, Any]]] = {}
    missed: list[str] = []
    work = project.root / ".revoked"
    while True:
        stayed, kept = utility(model, tokenizer, project)
        for name in [name for name in examples if name not in missed]:
            own[name] = measure(model, tokenizer, examples[name], answers=project.answers)
            reference = references.get(name)
            verdicts[name] = judge(
                before[name][0],
                own[name][0],
                reference=None if reference is None else reference[0],
                by="model that never saw it" if reference is None else str(reference[1]["by"]),
                kept=(base, stayed),
            )
        found = [request.name for request in requests if verdicts[request.name].word not in IN_FORCE]
        if found == missed:
            break
        emptied, missed = missed, found
        with private():
            if not emptied:
                shutil.rmtree(work, ignore_errors=True)
                shutil.copytree(candidate, work)
            for name in missed:
                if name not in emptied:
                    write_atomic(work / "adapter_model.safetensors", clear_expert(work, served[name]))
        if len(missed) == len(requests):
            break
        # the others are judged by what will be in force, without the experts of those that were missed
        model, tokenizer = load_model(project.model, str(work), template=project.template)
    earlier: dict[str, Any] = {}
    for other in store.requests(*IN_FORCE):
        # likelihoods alone: every request is checked every time, and a run's time stays flat
        try:
            earlier[other.name] = measure(model, tokenizer, rows_of(other), answers=0)[1]
        except UserError as error:
            earlier[other.name] = {"not_checked": str(error)}
    share = kept["utility"] / base_utility["utility"] if base_utility["utility"] else 0.0
    version = inside["version"]
    if len(missed) < len(requests) or in_force:
        entry = {
            "version": version + 1,
            "experts": {**inside["experts"], **trained["served"]},
            "cleared": sorted({*inside["cleared"], *(served[name] for name in missed)}),
            "head": store.head(),
            "run": dict(trained),
        }
        if missed or not in_force:
            with private():
                put_in_force(project, work if missed else candidate, entry)
            version = entry["version"]
    shutil.rmtree(work, ignore_errors=True)
    values: dict[int, dict[str, Any]] = {}
    for request in requests:
        name = request.name
        reference = references.get(name)
        values[request.id] = {
            "expert": None if name in missed else served[name],
            "before": {**before[name][1], "utility": base_utility} if name in before else None,
            "after": {
                **(own[name][1] if name in own else {}),
                "reference": None if reference is None else reference[1],
                "verdict": verdicts[name].to_dict(),
                "utility": kept,
                "utility_share": share,
                "earlier": earlier,
                "measured": now(),
            },
            "run": {**trained, "version": version, "evidence_seconds": round(time.time() - started, 2)},
        }
    done = []
    for request in requests:
        verdict = verdicts[request.name]
        details = {
            "version": version,
            "verdict": verdict.word,
            "why": " ".join(verdict.why),
            "utility_share": share,
            "adapter": adapter_digest(project),
        }
        done += store.move([request.id], verdict.word, what=what, details=details, values=values)
    return done


def revoke(store: Store, project: Project, request: Request, who: str | None = None) -> Request:
    """Take one request back: its expert becomes zero and opens for no token, so the model answers as the base does.

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


def verify(
    store: Store, project: Project, *, behaviour: bool = True, heads: Sequence[str] = (), leak: Leak | None = None
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Check the history, the adapter in force and, with `behaviour`, that nothing of its requests has come back.

    It compares with what was measured when a request took effect, and says no more than that: whether it was forgotten
    then is in the request's own evidence.

    Args:
        heads: heads of the history that were written down elsewhere.
        leak: with a number of samples, also ask each request's questions so many times, of the adapter and of the
            untouched model: a request of which the adapter's samples hold the answer as often has come back.

    Returns:
        what was measured, by request and for `utility`; what is wrong, in sentences, nothing if all is well; and what
        could not be checked, such as requests whose data have been deleted since.
    """
    versions = sorted((project.root / "adapters").glob("[0-9]*/requests.json"))
    wrong = store.check_chain([*heads, *(str(read_object(path, "a manifest").get("head")) for path in versions)])
    inside = manifest(project)
    noted = [
        entry.details["adapter"]
        for entry in store.history()
        # an adapter that was trained is not in force yet
        if entry.details.get("adapter") is not None and entry.details.get("to") != "trained"
    ]
    if adapter_digest(project) != (noted[-1] if noted else None):
        wrong.append("The adapter in force is not the one that the history names: its weights or files were changed.")
    held = store.requests(*IN_FORCE)
    for request in held:
        if inside["experts"].get(str(request.expert)) != request.name or request.expert in inside["cleared"]:
            wrong.append(
                f"{request.name} is {request.state}, but the adapter in force does not hold it (expert {request.expert})."
            )
    for request in store.requests("revoked"):
        if request.expert is not None and request.expert not in inside["cleared"]:
            wrong.append(f"{request.name} is revoked, but the adapter in force still holds it.")
    found: dict[str, Any] = {}
    unchecked: list[str] = []
    if not behaviour or not inside["version"]:
        return found, wrong, unchecked
    model, tokenizer = load_model(project.model, str(project.adapter), template=project.template)
    for request in held:
        try:
            rows = rows_of(request)
        except UserError as error:
            unchecked.append(f"Evidence missing: {request.name} was not measured. {error}")
            continue
        then = request.after or {}
        if then.get("probability") is None:
            unchecked.append(f"{request.name} has no earlier figures to compare with: evidence missing.")
            continue
        measures, now_ = measure(model, tokenizer, rows, answers=project.answers)
        found[request.name] = now_
        since = str(then.get("measured", ""))[:10]
        # never against a reference, which may know the rows: only against what was measured then
        for name, what in (("rouge", "ROUGE-L"), ("probability", "probability")):
            if now_[name] is not None and then[name] is not None and not now_[name] <= then[name] + SLACK:
                wrong.append(
                    f"{request.name} has come back: {what} {now_[name]:.3f}, it was {then[name]:.3f} on {since}."
                )
        if measures.given > then["said"] + SLACK * max(measures.asked, 1):
            wrong.append(
                f"{request.name} has come back: {measures.given} of {measures.asked} replies give the answer, "
                f"{then['said']} did on {since}."
            )
        if leak is not None and leak.samples:
            now_["leak"] = leaked(model, tokenizer, rows, leak, label=request.name).summary()
            with _unaltered(model):
                base_leak = leaked(model, tokenizer, rows, leak, label=f"{request.name}, untouched").summary()
            now_["leak_untouched"] = base_leak
            if not now_["leak"]["at"]:
                unchecked.append(f"{request.name}: no answer has facts to look for in samples.")
                continue
            k = str(leak.numbers[-1])
            share, other = (each["at"][k]["value"] for each in (now_["leak"], base_leak))
            if other > SLACK and share > other - SLACK:
                wrong.append(
                    f"{request.name} leaks: one of {k} samples gives the answer with chance {share:.3f}, "
                    f"{other:.3f} by the untouched model."
                )
    _, kept = utility(model, tokenizer, project)
    with _unaltered(model):
        _, base = utility(model, tokenizer, project)
    share = kept["utility"] / base["utility"] if base["utility"] else 0.0
    found["utility"] = {**kept, "share": share}
    if not share >= UTILITY_SHARE:
        wrong.append(f"Utility is {share:.3f} of the untouched model's, below {UTILITY_SHARE}.")
    return found, wrong, unchecked


def purge(store: Store, project: Project, request: Request, who: str | None = None) -> tuple[list[str], list[str]]:
    """Remove what is kept of a request's subject and rows: from the database, and from the project's folder.

    Returns:
        what was removed, and what cannot be reached from here, in sentences.

    Raises:
        UserError: the request has yet to be run, and needs its rows.
    """
    if request.state not in (*IN_FORCE, "revoked", "withdrawn"):
        raise UserError(
            f"{request.name} is {request.state}: its rows are needed to run it. Withdraw it first (`alter request revoke "
            f"{request.name}`), or run it."
        )
    removed = [f"{path} (left by a run)" for path in sweep(project)]
    current = f"{manifest(project)['version']:04d}"
    for folder in sorted((project.root / "adapters").glob("[0-9]*")):
        if folder.name != current:
            shutil.rmtree(folder)
            removed.append(f"{folder} (an adapter that is in force no more)")
    location = request.data
    removed += [f"{name} of {request.name} in the database" for name in store.forget(request.id, who)]
    left = [f"The base model {project.model} still knows what it knew: the adapter only keeps it from saying so."]
    if location and Path(location).exists():
        left.append(f"The rows themselves at {location}: delete them if they must go.")
    elif location:
        left.append(f"Wherever {location} is kept or copied.")
    if request.expert is not None and request.state in IN_FORCE:
        left.append(
            f"The adapter's router still knows which texts are the request's (expert {request.expert}), also in exports."
        )
    left += [
        f"The export at {entry.details['out']} ({entry.at[:10]})."
        for entry in store.history()
        if entry.what == "exported"
    ]
    left.append("The history, which cannot be rewritten: dates, who did what, a salted hash, the hash of the data.")
    left.append(
        "Results in alter's cache (ALTER_CACHE, ~/.cache/alter), reports, backups, and copies of the database."
    )
    if not store.url.startswith("sqlite"):
        left.append("Old row versions in the database server, until it is vacuumed, and its log.")
    return removed, left


def merge(project: Project, out: Path) -> dict[str, Any]:
    """Write a plain model in which all experts are open for every token, and measure how far it is from the adapter.

    A routed adapter is no fixed change of the weights, so this is an approximation: the caller shows the difference.

    Returns:
        on the retain sample and, by request, on the rows to forget: what the adapter measures and what the merged does.
    """
    from peft import get_peft_model, load_peft_weights, set_peft_model_state_dict

    from alter.adapter import AlterConfig

    model, tokenizer = load_model(project.model, str(project.adapter), template=project.template)
    sample = retain_sample(project)
    found: dict[str, Any] = {"retain": {"adapter": measure(model, tokenizer, sample, answers=project.answers)[1]}}
    base, _ = load_model(project.model, template=project.template)
    config = AlterConfig.from_pretrained(str(project.adapter))
    config.router = "static"
    opened = get_peft_model(base, config)
    # a static gate has no router: its tensors are left out on purpose
    weights = load_peft_weights(str(project.adapter), device="cpu")
    set_peft_model_state_dict(
        opened, {n: w for n, w in weights.items() if not re.search(r"\.alter_(router|probe)\.", n)}
    )
    merged = opened.merge_and_unload()
    found["retain"]["merged"] = measure(merged, tokenizer, sample, answers=project.answers)[1]
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
    with torch.no_grad():
        found["parameters"] = sum(p.numel() for p in merged.parameters())
    return found


def erase(store: Store, project: Project, out: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Write a plain model that learned to say what base and adapter say, and measure it on every request in force.

    Args:
        out: folder for the model.
        recipe: settings of `alter distill`, but for `DECIDED`.

    Returns:
        on the retain sample and, by request, on the rows to forget: what the adapter measures and what the weights do.

    Raises:
        UserError: the rows of a request are gone or changed, what `alter distill` raises, or a request that the weights have
            not forgotten or at which they collapsed.
    """
    examples = {request.name: rows_of(request) for request in store.requests(*IN_FORCE)}
    if not examples:
        raise UserError("No request is in force: there is nothing that weights could forget.")
    folder = project.root / "runs" / "weights"
    forget = project.root / "runs" / "weights.jsonl"
    sweep(project)
    try:
        with private():
            write_atomic(forget, "".join(to_line(row) for rows in examples.values() for row in rows))
            made = distill(
                Distill.model_validate(
                    {
                        "closing_rows": 0,
                        **recipe,
                        "model": project.model,
                        "adapter": str(project.adapter.resolve()),
                        "forget": str(forget),
                        "retain": project.retain,
                        "out": str(folder),
                    }
                )
            )
        found = _beside(project, examples, made / "model")
        shutil.copytree(made / "model", out)
    finally:
        sweep(project)
    return found


def to_line(example: Example) -> str:
    """A row as a line of JSONL."""
    return json.dumps(example.row, ensure_ascii=False) + "\n"


def _beside(project: Project, examples: Mapping[str, Sequence[Example]], weights: Path) -> dict[str, Any]:
    """What the adapter and the weights say, by request and on the retain sample; refuses weights that did not learn it."""
    measured: dict[str, dict[str, tuple[Measures, dict[str, Any]]]] = {}
    for form, names in (
        ("base", (project.model, None)),
        ("adapter", (project.model, str(project.adapter))),
        ("weights", (str(weights), None)),
    ):
        model, tokenizer = load_model(*names)
        measured[form] = {"retain": measure(model, tokenizer, retain_sample(project), answers=project.answers)}
        measured[form] |= {
            name: measure(model, tokenizer, rows, answers=project.answers) for name, rows in examples.items()
        }
    kept = (measured["base"]["retain"][0], measured["weights"]["retain"][0])
    verdicts = {
        name: judge(
            measured["base"][name][0],
            measured["weights"][name][0],
            reference=measured["adapter"][name][0],
            by="adapter",
            kept=kept,
        )
        for name in examples
    }
    missed = [
        f"{name} {found.word.upper()}: {' '.join(found.why)}"
        for name, found in verdicts.items()
        if found.word not in IN_FORCE
    ]
    if missed:
        raise UserError(
            f"Nothing was exported, since the weights did not learn it: {' '.join(missed)} Give more steps or a higher "
            "learning_rate in --recipe."
        )
    return {name: {form: measured[form][name][1] for form in ("adapter", "weights")} for name in ("retain", *examples)}


def write_loras(store: Store, project: Project, out: Path) -> None:
    """Write one plain LoRA for each request in force, in a folder of its name.

    Raises:
        UserError: no request is in force, or see `alter.exporting.loras.check_plain`.
    """
    found = store.requests(*IN_FORCE)
    if not found:
        raise UserError("No request is in force: there is no expert to write.")
    experts = [request.expert for request in found if request.expert is not None]
    loras.write(project.adapter.resolve(), out, project.model, [request.name for request in found], experts)


def card(store: Store, project: Project, form: str, measured: Mapping[str, Any] | None) -> str:
    """The model card of an export: what was forgotten by hash, the evidence, the settings and the limits."""
    inside = manifest(project)
    lines = [
        "---",
        f"library_name: {'peft' if form in ('adapter', 'loras') else 'transformers'}",
        f"base_model: {project.model}",
        "tags: [alter, unlearning]",
        "---",
        "",
        f"# Erasure requests about {project.model}, version {inside['version']}",
        "",
        "| request | rows | data (SHA-256) | verdict | still said | probability before | after | reference | utility kept |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for request in store.requests(*IN_FORCE):
        before, after = request.before or {}, request.after or {}
        reference = after.get("reference") or {}
        figures = [part.get("probability") for part in (before, after, reference)] + [after.get("utility_share")]
        shown = " | ".join("-" if number is None else f"{number:.3f}" for number in figures)
        said = f"{after['said']} of {after['n_said']}" if after.get("n_said") else "-"
        lines.append(
            f"| {request.name} | {request.rows} | `{request.data_hash[:16]}` | {request.state} | {said} | {shown} |"
        )
    lines += ["", f"Head of the history: `{store.head()}`.", "", "## Limits", ""]
    if form == "loras":
        lines.append(
            "One plain LoRA for each request, which acts on every token: whoever has the base weights can leave it off, and no "
            "router chooses between them."
        )
    elif form == "adapter":
        lines.append(
            "This is an adapter: whoever has the base weights has the knowledge, and `disable_adapter()` brings it back. "
            "`alter request export --form weights` makes a plain model, which is handed out without its base."
        )
    else:
        assert measured is not None
        what = {
            "merged": "All experts are open for every token here: an approximation of the routed adapter.",
            "weights": "Plain weights that learned to say what base and adapter say: nothing can be taken off or revoked.",
        }[form]
        lines += [what, "", "| rows | | probability | exact memorisation | ROUGE-L |", "|---|---|---|---|---|"]
        for part, by_form in measured.items():
            for name in ("adapter", form) if isinstance(by_form, dict) else ():
                cells = [by_form[name][each] for each in ("probability", "exact_memorization", "rouge")]
                lines.append(
                    f"| {part} | {name} | " + " | ".join("-" if c is None else f"{c:.3f}" for c in cells) + " |"
                )
    settings = inside.get("run", {}).get("settings", {})
    lines += ["", "## Settings of the last run", "", "```json", to_json(settings).rstrip(), "```", ""]
    return "\n".join(lines)
