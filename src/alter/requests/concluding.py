"""Conclude a run for erasure requests: measure its result, judge, put in force what was forgotten, record the evidence."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alter.data import Example
from alter.evaluation import WORDINGS, Verdict
from alter.evaluation.verdict import judge
from alter.models import load_model
from alter.requests.evidence import MeasuredEvidence, baselines, known_of, untouched, utility
from alter.requests.project import Project
from alter.requests.records import IN_FORCE, Request, now
from alter.requests.rows import NOT_THERE, rows_if_there
from alter.requests.store import Store
from alter.requests.versions import adapter_digest, clear_expert, manifest, private, put_in_force
from alter.storage import write_atomic


@dataclass
class Judged:
    """What was measured and judged of the requests of one run.

    Attributes:
        model, tokenizer: the candidate, in the end without the experts of the requests that were missed.
        missed: names of the requests that were not forgotten, or whose model collapsed.
        verdicts: by name, of all requests.
        before, after, references: what is known of each request's rows by the untouched model, the candidate, and a
            model that never saw them; nothing for requests whose rows are gone.
        base, kept: what the untouched model and the candidate know of the rows to keep.
        share: of the first model's utility that the base in force has.
    """

    model: Any
    tokenizer: Any
    base: MeasuredEvidence
    kept: MeasuredEvidence
    share: float = 1.0
    missed: list[str] = field(default_factory=list)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    before: dict[str, MeasuredEvidence] = field(default_factory=dict)
    after: dict[str, MeasuredEvidence] = field(default_factory=dict)
    references: dict[str, MeasuredEvidence] = field(default_factory=dict)

    @property
    def utility_share(self) -> float:
        """Return the utility as a share of the first model's, over all changes of base."""
        return self.share * self.kept[1]["utility"] / self.base[1]["utility"] if self.base[1]["utility"] else 0.0


def conclude(
    store: Store,
    project: Project,
    requests: Sequence[Request],
    candidate: Path,
    trained: Mapping[str, Any],
    *,
    what: str | None,
) -> list[Request]:
    """Load and measure a run's result, put in force what was forgotten, and write the evidence down.

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
    served = {name: int(expert) for expert, name in {**trained["served"], **inside["experts"]}.items()}
    served |= {name: int(expert) for expert, name in trained["served"].items()}
    work = project.root / ".revoked"
    judged = _judge(project, requests, candidate, served, work)
    earlier = _earlier(store, judged)
    version = inside["version"]
    if judged.missed if in_force else len(judged.missed) < len(requests):
        entry = {
            "version": version + 1,
            "experts": {**inside["experts"], **trained["served"]},
            "cleared": sorted({*inside["cleared"], *(served[name] for name in judged.missed)}),
            "head": store.head(),
            "run": dict(trained),
        }
        with private():
            put_in_force(project, work if judged.missed else candidate, entry)
        version = entry["version"]
    shutil.rmtree(work, ignore_errors=True)
    seconds = round(time.time() - started, 2)
    values = {
        request.id: {
            "expert": None if request.name in judged.missed else served[request.name],
            **_evidence(judged, request.name, earlier),
            "run": {**trained, "version": version, "evidence_seconds": seconds},
        }
        for request in requests
    }
    told = {"version": version, "utility_share": judged.utility_share, "adapter": adapter_digest(project)}
    done = []
    for request in requests:
        verdict = judged.verdicts[request.name]
        details = {**told, "verdict": verdict.word, "why": " ".join(verdict.why)}
        done += store.move([request.id], verdict.word, what=what, details=details, values=values)
    return done


def _judge(
    project: Project, requests: Sequence[Request], candidate: Path, served: Mapping[str, int], work: Path
) -> Judged:
    """Measure and judge all requests of a run.

    Emptying the expert of one that was missed changes what the others are measured with, so that those are measured
    again until no more are missed.

    Args:
        served: each request's expert.
        work: where the adapter without the experts of the missed is written.
    """
    model, tokenizer = load_model(project.model, str(candidate), template=project.template)
    examples: dict[str, Sequence[Example]] = {}
    verdicts: dict[str, Verdict] = {}
    for request in requests:
        rows = rows_if_there(request)
        if rows is None:
            verdicts[request.name] = Verdict("unproven", (f"Evidence missing: {NOT_THERE}",))
        else:
            examples[request.name] = rows
    with untouched(model):
        before = {
            name: known_of(model, tokenizer, rows, answers=project.answers, wordings=WORDINGS)
            for name, rows in examples.items()
        }
        base = utility(model, tokenizer, project)
    references = baselines(project, model, tokenizer, examples) if examples else {}
    kept = utility(model, tokenizer, project)
    judged = Judged(
        model, tokenizer, base, kept, project.kept, verdicts=verdicts, before=before, references=references
    )
    while True:
        for name in [name for name in examples if name not in judged.missed]:
            judged.after[name] = known_of(
                judged.model, judged.tokenizer, examples[name], answers=project.answers, wordings=WORDINGS
            )
            judged.verdicts[name] = _verdict(judged, name)
        found = [request.name for request in requests if judged.verdicts[request.name].word not in IN_FORCE]
        if found == judged.missed:
            return judged
        emptied, judged.missed = judged.missed, found
        with private():
            if not emptied:
                shutil.rmtree(work, ignore_errors=True)
                shutil.copytree(candidate, work)
            for name in found:
                if name not in emptied:
                    write_atomic(work / "adapter_model.safetensors", clear_expert(work, served[name]))
        if len(found) == len(requests):
            return judged
        # the others are judged by what will be in force, without the experts of those that were missed
        judged.model, judged.tokenizer = load_model(project.model, str(work), template=project.template)
        judged.kept = utility(judged.model, judged.tokenizer, project)


def _verdict(judged: Judged, name: str) -> Verdict:
    reference = judged.references.get(name)
    return judge(
        judged.before[name][0],
        judged.after[name][0],
        reference=None if reference is None else reference[0],
        by="model that never saw it" if reference is None else str(reference[1]["by"]),
        kept=(judged.base[0], judged.kept[0]),
    )


def _earlier(store: Store, judged: Judged) -> dict[str, Any]:
    """Measure the new adapter on the requests in force: likelihoods alone, so that a run's time does not grow with replies."""
    found: dict[str, Any] = {}
    for request in store.requests(*IN_FORCE):
        rows = rows_if_there(request)
        found[request.name] = (
            {"not_checked": NOT_THERE}
            if rows is None
            else known_of(judged.model, judged.tokenizer, rows, answers=0)[1]
        )
    return found


def _evidence(judged: Judged, name: str, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the database stores as a request's `before` and `after`."""
    reference = judged.references.get(name)
    before = {**judged.before[name][1], "utility": judged.base[1]} if name in judged.before else None
    return {
        "before": before,
        "after": {
            **(judged.after[name][1] if name in judged.after else {}),
            "reference": None if reference is None else reference[1],
            "verdict": judged.verdicts[name].to_dict(),
            "utility": judged.kept[1],
            "utility_share": judged.utility_share,
            "earlier": dict(earlier),
            "measured": now(),
        },
    }
