"""What is done with erasure requests: run them, check that they hold, take one back, hand the result out.

A project's folder holds one adapter per version (`adapters/0003/`) and a link `adapter` to the one in force. A version is
written whole, with a manifest of which expert serves which request, before the link moves to it in one step: that is when
a run takes effect. Whatever is killed before has not happened, whatever is killed after is finished by the next command.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save

from alter import metrics
from alter.core.errors import UserError
from alter.core.files import digest, to_json, write_atomic
from alter.core.provenance import provenance
from alter.data.encoding import encode, encode_all, encode_prompt
from alter.data.examples import Example, check_overlap, load_examples
from alter.models.generation import generate
from alter.models.loading import load_model
from alter.models.scoring import score
from alter.requests.store import Request, Store
from alter.training.run import unlearn
from alter.training.settings import Unlearn

ROUGE_SLACK = 0.05
"""How far above its reference a request's ROUGE-L recall may lie and still count as forgotten."""

UTILITY_SHARE = 0.97
"""Share of the untouched model's utility that must be left."""

CUT = {"model", "forget", "retain", "out", "start_from", "experts_only", "domain_column", "num_forget_experts"} | {
    "max_domains",
    "resume",
    "overwrite",
}
"""Settings of a run that the request decides, not the recipe."""


class Project(BaseModel):
    """What all requests of one database share."""

    model_config = ConfigDict(extra="forbid")

    model: str
    retain: str
    folder: str
    holdout: str | None = None
    retrained: str | None = None
    recipe: dict[str, Any] = Field(default_factory=dict)
    retain_rows: int = 200
    answers: int = 20

    @property
    def root(self) -> Path:
        """The folder as a path."""
        return Path(self.folder)

    @property
    def adapter(self) -> Path:
        """The link to the adapter in force."""
        return self.root / "adapter"


# Data -----------------------------------------------------------------------------------------------------------------


def row_hash(example: Example) -> str:
    """SHA-256 of what one row says: its turns, prompt and answer."""
    content = [example.prompt, example.answer, [dict(turn) for turn in example.messages]]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def data_hash(hashes: Sequence[str]) -> str:
    """SHA-256 of a request's rows, from theirs in order."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


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
    needle = re.compile(rf"\b{re.escape(' '.join(subject.casefold().split()))}\b")
    named = [
        example.index
        for example in retain
        if needle.search(" ".join(f"{example.prompt or ''} {example.answer}".casefold().split()))
    ]
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
) -> dict[str, float | int | None]:
    """What a model knows of some rows: one forward per row, and replies to a sample of the questions.

    Args:
        model, tokenizer: as in `alter.models.scoring.score`.
        examples: the rows.
        answers: number of rows that are also answered greedily, drawn by `seed`; 0 measures likelihoods alone.

    Returns:
        `probability` (length-normalised, mean over rows), `exact_memorization` (share of answer tokens that are the
        likeliest), `rouge` (ROUGE-L recall of the replies, None without any), `n` and `n_answers`.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    encoded, _ = encode_all(tokenizer, examples, max_length=limit)
    scores = score(model, encoded, pad_token_id=tokenizer.pad_token_id, label="requests: scoring")
    memorised = metrics.exact_memorization(scores.correct)
    result: dict[str, float | int | None] = {
        "probability": float(metrics.probability(metrics.average_loss(scores.logprob)).mean()),
        "exact_memorization": float(np.nanmean(memorised)) if not np.isnan(memorised).all() else None,
        "rouge": None,
        "n": len(examples),
        "n_answers": 0,
    }
    asked = [example for example in examples if example.prompt]
    if answers and asked:
        chosen = np.random.default_rng(seed).permutation(len(asked))[:answers]
        sample = [asked[i] for i in sorted(chosen.tolist())]
        longest = max(len(encode(tokenizer, example).input_ids) for example in sample)
        replies = generate(
            model,
            tokenizer,
            [encode_prompt(tokenizer, example) for example in sample],
            max_new_tokens=min(200, longest),
            label="requests: answering",
        )
        result["rouge"] = float(metrics.rouge_l([example.answer for example in sample], replies).recall.mean())
        result["n_answers"] = len(sample)
    return result


def retain_sample(project: Project) -> list[Example]:
    """The rows of the retain set that utility is measured on: always the same ones."""
    rows = load_examples(project.retain)
    chosen = np.random.default_rng(0).permutation(len(rows))[: project.retain_rows]
    return [rows[i] for i in sorted(chosen.tolist())]


def utility(model: Any, tokenizer: Any, project: Project) -> dict[str, Any]:
    """Behaviour on the retain sample, with the mean of probability and ROUGE-L as `utility`."""
    found = measure(model, tokenizer, retain_sample(project), answers=2 * project.answers)
    parts = [float(value) for value in (found["probability"], found["rouge"]) if value is not None]
    return {**found, "utility": float(np.mean(parts))}


def _unaltered(model: Any) -> Any:
    """The untouched base inside the block, whatever adapter is on it."""
    return model.disable_adapter() if model.__class__.__name__.startswith("Peft") else nullcontext()


def baselines(
    project: Project, model: Any, tokenizer: Any, examples: Mapping[str, Sequence[Example]]
) -> dict[str, Any]:
    """The honest zero of each request: the retrained model's ROUGE-L on its rows, or the base's on the holdout."""
    if project.retrained is not None:
        other, own = load_model(project.retrained)
        return {
            name: {"by": "retrained", **measure(other, own, rows, answers=project.answers)}
            for name, rows in examples.items()
        }
    if project.holdout is not None:
        with _unaltered(model):
            found = measure(model, tokenizer, load_examples(project.holdout), answers=2 * project.answers)
        return {name: {"by": "holdout", **found} for name in examples}
    return {}


def verdict(after: Mapping[str, Any]) -> bool | None:
    """Whether a request counts as forgotten; None where there is no reference to say so."""
    reference = after.get("reference")
    if not reference or reference.get("rouge") is None or after.get("rouge") is None:
        return None
    return bool(after["rouge"] <= reference["rouge"] + ROUGE_SLACK)


# Versions of the adapter ----------------------------------------------------------------------------------------------


def manifest(project: Project) -> dict[str, Any]:
    """Which expert serves which request in the adapter in force; version 0 where there is none yet."""
    if not project.adapter.exists():
        return {"version": 0, "experts": {}, "cleared": []}
    return json.loads((project.adapter / "requests.json").read_text())


def put_in_force(project: Project, source: Path, entry: Mapping[str, Any]) -> Path:
    """Write a new version from an adapter folder and move the link to it, in one step.

    Args:
        project: whose adapter.
        source: folder of the adapter.
        entry: the manifest of the new version.
    """
    versions = project.root / "adapters"
    versions.mkdir(parents=True, exist_ok=True)
    final = versions / f"{entry['version']:04d}"
    partial = versions / f".{final.name}.partial"
    for left_over in (partial, final):
        # a version that the link never reached was not in force
        shutil.rmtree(left_over, ignore_errors=True)
    shutil.copytree(source, partial, symlinks=False)
    write_atomic(partial / "requests.json", to_json(dict(entry)))
    for path in partial.iterdir():
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


def clear_columns(adapter: Path, expert: int) -> bytes:
    """The adapter's weights with one forget expert set to zero, as the content of a safetensors file.

    The file alone is enough: what was removed must not depend on a model that loads.

    Raises:
        UserError: the adapter has no such expert.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    experts = config["num_forget_experts"]
    if not 1 <= expert <= experts:
        raise UserError(f"{adapter} has forget experts 1 to {experts}; there is no expert {expert}.")
    tensors = load_file(str(adapter / "adapter_model.safetensors"))
    for name, value in tensors.items():
        if ".alter_B." in name:
            r = value.shape[1] // (experts + 1)
            value[:, expert * r : (expert + 1) * r] = 0.0
    return save(tensors, metadata={"format": "pt"})


# The work -------------------------------------------------------------------------------------------------------------


def recover(store: Store, project: Project) -> None:
    """Finish what a killed process left: effects that the link shows become true in the database, the rest is undone."""
    inside = manifest(project)
    experts = {name: int(expert) for expert, name in inside["experts"].items()}
    for request in store.requests("running"):
        if request.name in experts:
            _finish(store, project, [request], inside, what="recovered")
        else:
            store.move([request.id], "received", what="interrupted")
    for request in store.requests("done"):
        if request.expert in inside["cleared"]:
            store.move([request.id], "revoked", what="recovered")


def run(store: Store, project: Project, requests: Sequence[Request]) -> list[Request]:
    """Make the model forget: one run that trains one new expert per request, beside those in force.

    Args:
        store, project: where the requests are; the caller holds the lease.
        requests: in state received or failed.

    Returns:
        the requests, done, with their evidence.

    Raises:
        UserError: nothing to do, data that changed, an overlap with the retain set, or what `unlearn` raises; the
            requests are then failed, or as they were if nothing had begun.
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
    store.move(numbers, "running", details={"run": key, "after_version": inside["version"]})
    try:
        forget = project.root / "runs" / f"{key}.jsonl"
        lines = [
            json.dumps({**example.row, "alter_request": name}, ensure_ascii=False)
            for name, members in examples.items()
            for example in members
        ]
        write_atomic(forget, "\n".join(lines) + "\n")
        settings = Unlearn.model_validate(
            {
                **project.recipe,
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
        unlearn(settings)
        record = json.loads((out / "run.json").read_text())
        served = dict(zip(record["experts"], record["domains"], strict=True))
        entry = {
            "version": inside["version"] + 1,
            "experts": {**inside["experts"], **{str(expert): name for expert, name in served.items()}},
            "cleared": inside["cleared"],
            "head": store.head(),
            "run": {
                "key": key,
                "seconds": record["seconds"],
                "router": record["router"],
                "trained_parameters": record["trained_parameters"],
                "settings": {name: value for name, value in record["settings"].items() if name not in CUT},
                "provenance": provenance(),
            },
        }
        put_in_force(project, out / "adapter", entry)
    except UserError as error:
        store.move(numbers, "failed", details={"error": str(error)})
        raise
    done = _finish(store, project, requests, entry, what="done")
    forget.unlink(missing_ok=True)
    # what is left of the run holds traces of the forgotten rows
    shutil.rmtree(out, ignore_errors=True)
    return done


def _finish(
    store: Store, project: Project, requests: Sequence[Request], inside: Mapping[str, Any], *, what: str
) -> list[Request]:
    """Measure what a run did, on the new requests and on all earlier ones, and write it down."""
    started = time.time()
    model, tokenizer = load_model(project.model, str(project.adapter))
    model.eval()
    examples = {request.name: rows_of(request) for request in requests}
    with _unaltered(model):
        before = {name: measure(model, tokenizer, rows, answers=project.answers) for name, rows in examples.items()}
        base_utility = utility(model, tokenizer, project)
    own = {name: measure(model, tokenizer, rows, answers=project.answers) for name, rows in examples.items()}
    kept = utility(model, tokenizer, project)
    references = baselines(project, model, tokenizer, examples)
    earlier: dict[str, Any] = {}
    for other in store.requests("done"):
        # likelihoods alone: every request is checked every time, and a run's time stays flat
        try:
            earlier[other.name] = measure(model, tokenizer, rows_of(other), answers=0)
        except UserError as error:
            earlier[other.name] = {"not_checked": str(error)}
    experts = {name: int(expert) for expert, name in inside["experts"].items()}
    values: dict[int, dict[str, Any]] = {}
    for request in requests:
        after = {**own[request.name], "reference": references.get(request.name)}
        values[request.id] = {
            "expert": experts[request.name],
            "before": {**before[request.name], "utility": base_utility},
            "after": {
                **after,
                "forgotten": verdict(after),
                "utility": kept,
                "utility_share": kept["utility"] / base_utility["utility"],
                "earlier": earlier,
            },
            "run": {
                **inside["run"],
                "version": inside["version"],
                "evidence_seconds": round(time.time() - started, 2),
            },
        }
    details = {"version": inside["version"], "utility_share": kept["utility"] / base_utility["utility"]}
    return store.move([request.id for request in requests], "done", what=what, details=details, values=values)


def revoke(store: Store, project: Project, request: Request, who: str | None = None) -> Request:
    """Take one request back: its expert becomes zero, so the model answers as the base does; other routes stay bit-exact.

    Raises:
        UserError: the request is not done.
    """
    if request.state != "done":
        return store.move([request.id], "revoked", who=who)[0]
    assert request.expert is not None
    inside = manifest(project)
    work = project.root / ".revoked"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(project.adapter.resolve(), work)
    write_atomic(work / "adapter_model.safetensors", clear_columns(work, request.expert))
    entry = {
        **inside,
        "version": inside["version"] + 1,
        "cleared": sorted({*inside["cleared"], request.expert}),
        "head": store.head(),
    }
    put_in_force(project, work, entry)
    shutil.rmtree(work)
    details = {"version": entry["version"], "expert": request.expert}
    return store.move([request.id], "revoked", who=who, details=details)[0]


def verify(store: Store, project: Project, *, behaviour: bool = True) -> tuple[dict[str, Any], list[str], list[str]]:
    """Check the history, the adapter in force and, with `behaviour`, that every request is still forgotten.

    Returns:
        what was measured, by request and for `utility`; what is wrong, in sentences, nothing if all is well; and what
        could not be checked, such as requests whose data have been deleted since.
    """
    heads = [
        json.loads(path.read_text())["head"]
        for path in sorted((project.root / "adapters").glob("[0-9]*/requests.json"))
    ]
    wrong = store.check_chain(heads)
    inside = manifest(project)
    done = store.requests("done")
    for request in done:
        if inside["experts"].get(str(request.expert)) != request.name or request.expert in inside["cleared"]:
            wrong.append(
                f"{request.name} is done, but the adapter in force does not hold it (expert {request.expert})."
            )
    for request in store.requests("revoked"):
        if request.expert is not None and request.expert not in inside["cleared"]:
            wrong.append(f"{request.name} is revoked, but the adapter in force still holds it.")
    found: dict[str, Any] = {}
    unchecked: list[str] = []
    if not behaviour or not inside["version"]:
        return found, wrong, unchecked
    model, tokenizer = load_model(project.model, str(project.adapter))
    for request in done:
        try:
            rows = rows_of(request)
        except UserError as error:
            unchecked.append(f"{request.name} was not measured. {error}")
            continue
        now = measure(model, tokenizer, rows, answers=project.answers)
        assert request.after is not None
        found[request.name] = now
        then = request.after
        bound = max(
            value for value in (then["rouge"], (then["reference"] or {}).get("rouge"), 0.0) if value is not None
        )
        if now["rouge"] is not None and now["rouge"] > bound + ROUGE_SLACK:
            wrong.append(
                f"{request.name} has come back: ROUGE-L {now['rouge']:.3f}, it was {then['rouge']:.3f} when it was done."
            )
        if now["rouge"] is None and now["probability"] > max(2 * then["probability"], 0.05):
            wrong.append(
                f"{request.name} has come back: probability {now['probability']:.3f}, it was {then['probability']:.3f}."
            )
    kept = utility(model, tokenizer, project)
    with _unaltered(model):
        base = utility(model, tokenizer, project)
    found["utility"] = {**kept, "share": kept["utility"] / base["utility"]}
    if kept["utility"] < UTILITY_SHARE * base["utility"]:
        wrong.append(
            f"Utility is {kept['utility'] / base['utility']:.3f} of the untouched model's, below {UTILITY_SHARE}."
        )
    return found, wrong, unchecked


def merge(project: Project, out: Path) -> dict[str, Any]:
    """Write a plain model in which all experts are open for every token, and measure how far it is from the adapter.

    A routed adapter is no fixed change of the weights, so this is an approximation: the caller shows the difference.

    Returns:
        on the retain sample and, by request, on the rows to forget: what the adapter measures and what the merged does.
    """
    from peft import PeftModel

    from alter.adapter import AlterConfig

    model, tokenizer = load_model(project.model, str(project.adapter))
    sample = retain_sample(project)
    found: dict[str, Any] = {"retain": {"adapter": measure(model, tokenizer, sample, answers=project.answers)}}
    base, _ = load_model(project.model)
    config = AlterConfig.from_pretrained(str(project.adapter))
    config.router = "static"
    merged = PeftModel.from_pretrained(base, str(project.adapter), config=config).merge_and_unload()
    found["retain"]["merged"] = measure(merged, tokenizer, sample, answers=project.answers)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.replace(out)
    with torch.no_grad():
        found["parameters"] = sum(p.numel() for p in merged.parameters())
    return found


def card(store: Store, project: Project, form: str, measured: Mapping[str, Any] | None) -> str:
    """The model card of an export: what was forgotten by hash, the evidence, the settings and the limits."""
    inside = manifest(project)
    lines = [
        "---",
        f"library_name: {'peft' if form == 'adapter' else 'transformers'}",
        f"base_model: {project.model}",
        "tags: [alter, unlearning]",
        "---",
        "",
        f"# Erasure requests about {project.model}, version {inside['version']}",
        "",
        "| request | rows | data (SHA-256) | ROUGE-L before | after | reference | utility kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for request in store.requests("done"):
        assert request.before is not None
        assert request.after is not None
        reference = request.after.get("reference") or {}
        numbers = [
            request.before["rouge"],
            request.after["rouge"],
            reference.get("rouge"),
            request.after["utility_share"],
        ]
        shown = " | ".join("-" if number is None else f"{number:.3f}" for number in numbers)
        lines.append(f"| {request.name} | {request.rows} | `{request.data_hash[:16]}` | {shown} |")
    lines += ["", f"Head of the history: `{store.head()}`.", "", "## Limits", ""]
    if form == "adapter":
        lines.append(
            "This is an adapter: whoever has the base weights has the knowledge, and `disable_adapter()` brings it back. "
            "Only a merged model is handed out without its base; `alter request export --form merged` makes one."
        )
    else:
        assert measured is not None
        lines += [
            "All experts are open for every token here: an approximation of the routed adapter. On the retain sample:",
            "",
            "| | probability | exact memorisation | ROUGE-L |",
            "|---|---|---|---|",
        ]
        for name in ("adapter", "merged"):
            row = measured["retain"][name]
            cells = [row["probability"], row["exact_memorization"], row["rouge"]]
            lines.append(f"| {name} | " + " | ".join("-" if c is None else f"{c:.3f}" for c in cells) + " |")
    settings = inside.get("run", {}).get("settings", {})
    lines += ["", "## Settings of the last run", "", "```json", to_json(settings).rstrip(), "```", ""]
    return "\n".join(lines)
