"""Check that erasure requests hold: the history, the adapter in force, and that nothing forgotten has come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alter.core import UserError
from alter.data import Example
from alter.evaluation import SLACK, Leak, Measures, leaked
from alter.models import load_model
from alter.requests.bases import base_changed
from alter.requests.evidence import UTILITY_SHARE, known_of, untouched, utility
from alter.requests.project import Project
from alter.requests.records import HELD, IN_FORCE, Request
from alter.requests.rows import NOT_THERE, rows_if_there
from alter.requests.store import Store
from alter.requests.versions import adapter_digest, manifest
from alter.storage import read_object


@dataclass
class Findings:
    """Results of a check.

    Attributes:
        measured: figures by request and for `utility`.
        wrong: what is wrong, in sentences; nothing if all is well.
        unchecked: what could not be checked, such as requests whose data have been deleted since.
    """

    measured: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def as_noted(self) -> dict[str, Any]:
        """Return the details of the entry `verified` of the history."""
        return {"wrong": self.wrong, "unchecked": self.unchecked, "measured": self.measured}


def noted_adapter(store: Store) -> str | None:
    """Return the digest of the adapter in force as the history has it; None before anything was put in force."""
    noted = None
    for entry in store.history():
        if entry.what == "distilled":
            # on the new base there is none yet
            noted = None
        # an adapter that was trained is not in force yet
        elif entry.details.get("adapter") is not None and entry.details.get("to") != "trained":
            noted = entry.details["adapter"]
    return noted


def refuse_changed(store: Store, project: Project) -> None:
    """Refuse to build on an adapter or base that differs from the history: the next version's digest would hide the change.

    Raises:
        UserError: weights or files of the adapter or the base in force were changed, or are gone.
    """
    changed = base_changed(store, project)
    if changed is not None:
        raise UserError(f"{changed} Nothing was done. Put them back from a copy.")
    noted = noted_adapter(store)
    if noted is not None and not project.home.is_dir():
        raise UserError(
            f"The folder of the adapters, {project.home}, is gone. Nothing was done. If it was moved, move it back, or leave a link to it "
            "there (`ln -s`)."
        )
    if adapter_digest(project) != noted:
        raise UserError(
            f"The adapter in force, {project.adapter}, is not the one that the history names: its weights or files were changed "
            "or removed. Nothing was done. Put it back from a copy, or make a new project with `alter request init` and add "
            "the requests again; `alter request verify` says more."
        )


def check_requests(
    store: Store, project: Project, *, behaviour: bool = True, heads: Sequence[str] = (), leak: Leak | None = None
) -> Findings:
    """Check the history, the adapter in force and, with `behaviour`, that nothing of its requests has come back.

    It compares with what was measured when a request took effect; whether the request was forgotten then is in its own
    evidence.

    Args:
        heads: heads of the history that were written down elsewhere.
        leak: with a number of samples, also ask each request's questions so many times, of the adapter and of the
            untouched model: a request of which the adapter's samples hold the answer as often has come back.
    """
    found = Findings(wrong=_check_records(store, project, heads))
    if behaviour and (project.base or manifest(project)["version"]):
        _check_behaviour(store, project, leak, found)
    return found


def _check_records(store: Store, project: Project, heads: Sequence[str]) -> list[str]:
    """Report faults of the history, and where the adapter in force differs from it."""
    roots = map(project.base_folder, range(project.base + 1))
    versions = [path for root in roots for path in sorted((root / "adapters").glob("[0-9]*/requests.json"))]
    wrong = store.check_chain([*heads, *(str(read_object(path, "a manifest").get("head")) for path in versions)])
    changed = base_changed(store, project)
    wrong += [] if changed is None else [changed]
    inside = manifest(project)
    if adapter_digest(project) != noted_adapter(store):
        wrong.append("The adapter in force is not the one that the history names: its weights or files were changed.")
    for request in store.requests(*IN_FORCE):
        if inside["experts"].get(str(request.expert)) != request.name or request.expert in inside["cleared"]:
            wrong.append(
                f"{request.name} is {request.state}, but the adapter in force does not hold it (expert {request.expert})."
            )
    for request in store.requests("revoked"):
        # of an earlier base nothing is in force any more
        here = (request.run or {}).get("base", 0) == project.base
        if here and request.expert is not None and request.expert not in inside["cleared"]:
            wrong.append(f"{request.name} is revoked, but the adapter in force still holds it.")
    return wrong


def _check_behaviour(store: Store, project: Project, leak: Leak | None, found: Findings) -> None:
    """Measure the requests in force and the utility again; add the figures to `found`."""
    adapter = str(project.adapter) if project.adapter.exists() else None
    model, tokenizer = load_model(project.model, adapter, template=project.template)
    for request in store.requests(*HELD):
        rows = rows_if_there(request)
        if rows is None:
            found.unchecked.append(f"Evidence missing: {request.name} was not measured. {NOT_THERE}")
            continue
        then = request.after or {}
        if then.get("probability") is None:
            found.unchecked.append(f"{request.name} has no earlier figures to compare with: evidence missing.")
            continue
        measures, now = known_of(model, tokenizer, rows, answers=project.answers)
        found.measured[request.name] = now
        found.wrong += come_back(request, measures, now)
        if leak is not None and leak.samples and request.state == "distilled":
            found.unchecked.append(f"{request.name} was not sampled: its base has no untouched model to stand beside.")
        elif leak is not None and leak.samples:
            _check_leak(request, model, tokenizer, rows, leak, found)
    _, kept = utility(model, tokenizer, project)
    with untouched(model):
        _, base = utility(model, tokenizer, project)
    share = project.kept * kept["utility"] / base["utility"] if base["utility"] else 0.0
    found.measured["utility"] = {**kept, "share": share}
    if not share >= UTILITY_SHARE:
        found.wrong.append(f"Utility is {share:.3f} of the untouched model's, below {UTILITY_SHARE}.")


def come_back(request: Request, measures: Measures, now: dict[str, Any]) -> list[str]:
    """Return the figures in which a request exceeds, by more than `SLACK`, what was measured when it took effect."""
    then = request.after or {}
    since = str(then.get("measured", ""))[:10]
    wrong = risen(request, now)
    if measures.given > then["said"] + SLACK * max(measures.asked, 1):
        wrong.append(
            f"{request.name} has come back: {measures.given} of {measures.asked} replies give the answer, "
            f"{then['said']} did on {since}."
        )
    return wrong


def risen(request: Request, now: Mapping[str, Any]) -> list[str]:
    """Return in which of the figures a request exceeds, by more than `SLACK`, what was measured when it took effect."""
    then = request.after or {}
    since = str(then.get("measured", ""))[:10]
    wrong = []
    # never against a reference, which may know the rows: only against what was measured then
    for name, what in (("rouge", "ROUGE-L"), ("probability", "probability")):
        was, is_ = then.get(name), now.get(name)
        if was is not None and is_ is not None and not is_ <= was + SLACK:
            wrong.append(f"{request.name} has come back: {what} {is_:.3f}, it was {was:.3f} on {since}.")
    return wrong


def _check_leak(
    request: Request, model: Any, tokenizer: Any, rows: Sequence[Example], leak: Leak, found: Findings
) -> None:
    """Sample replies with and without the adapter; add the leak to the request's figures in `found`."""
    now = found.measured[request.name]
    now["leak"] = leaked(model, tokenizer, rows, leak, label=request.name).summary()
    with untouched(model):
        now["leak_untouched"] = leaked(model, tokenizer, rows, leak, label=f"{request.name}, untouched").summary()
    if not now["leak"]["at"]:
        found.unchecked.append(f"{request.name}: no answer has facts to look for in samples.")
        return
    k = str(leak.numbers[-1])
    share, other = (now[name]["at"][k]["value"] for name in ("leak", "leak_untouched"))
    if other > SLACK and share > other - SLACK:
        found.wrong.append(
            f"{request.name} leaks: one of {k} samples gives the answer with chance {share:.3f}, "
            f"{other:.3f} by the untouched model."
        )
