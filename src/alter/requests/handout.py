"""Shippable forms of the requests in force: a merged model, distilled weights, plain LoRAs, and the card of an export."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alter.core import Finding, UserError
from alter.data import Example
from alter.distillation import Distill, distill
from alter.evaluation import WORDINGS, Verdict
from alter.evaluation.told import told
from alter.evaluation.verdict import judge
from alter.exporting import loras
from alter.models import load_model
from alter.requests.evidence import MeasuredEvidence, known_of, retain_sample
from alter.requests.project import Project
from alter.requests.records import HELD, IN_FORCE
from alter.requests.removal import sweep
from alter.requests.rows import received_rows
from alter.requests.store import Store
from alter.requests.versions import manifest, private
from alter.settings import read_recipe, validated
from alter.storage import to_json, write_atomic

DECIDED = {"run", "model", "adapter", "student", "forget", "retain", "out", "form", "resume", "overwrite"}
"""Settings of `alter distill` that the requests decide."""


def merge(project: Project, out: Path) -> dict[str, Any]:
    """Write a plain model with all experts open for every token, and measure how far it is from the adapter.

    A routed adapter is no fixed change of the weights, so this is an approximation: the caller shows the difference.

    Returns:
        on the retain sample and, by request, on the rows to forget: what the adapter measures and what the merged does.
    """
    from peft import get_peft_model, load_peft_weights, set_peft_model_state_dict

    from alter.adapter import AlterConfig

    model, tokenizer = load_model(project.model, str(project.adapter), template=project.template)
    sample = retain_sample(project)
    found: dict[str, Any] = {"retain": {"adapter": known_of(model, tokenizer, sample, answers=project.answers)[1]}}
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
    found["retain"]["merged"] = known_of(merged, tokenizer, sample, answers=project.answers)[1]
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
    with torch.no_grad():
        found["parameters"] = sum(p.numel() for p in merged.parameters())
    return found


@dataclass(frozen=True)
class Erased:
    """Weights distilled from base and adapter, and what was measured of them.

    Attributes:
        weights: folder of the model.
        known: by request, and on the retain sample as `retain`: what base, adapter and weights know.
        verdicts: by request, against what the base knew; the reference is the adapter.
    """

    weights: Path
    known: Mapping[str, Mapping[str, MeasuredEvidence]]
    verdicts: Mapping[str, Verdict]

    @property
    def figures(self) -> dict[str, Any]:
        """Return the figures of adapter and weights, on the retain sample and by request."""
        return {name: {form: found[form][1] for form in ("adapter", "weights")} for name, found in self.known.items()}


def distill_settings(path: str | None) -> dict[str, Any]:
    """Read settings of `alter distill` from a YAML file; refuse those that the requests decide.

    Raises:
        UserError: it cannot be read, or sets one that they do.
    """
    if path is None:
        return {}
    recipe = read_recipe(path)
    wrong = sorted(name for name in recipe if name in DECIDED)
    if wrong:
        raise UserError(f"{path} sets {', '.join(wrong)}, which the requests decide: take it out.")
    validated(Distill, {**recipe, "model": "m", "forget": "f", "retain": "r", "out": "o"}, path)
    return recipe


def erase(store: Store, project: Project, out: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Run `erased` and copy the weights to the folder `out`; return the figures."""
    with erased(store, project, recipe) as made:
        shutil.copytree(made.weights, out)
        return made.figures


@contextmanager
def erased(store: Store, project: Project, recipe: Mapping[str, Any]) -> Iterator[Erased]:
    """Distil base and adapter into a plain model, and measure it on every request in force.

    Its folder is there inside the block, where it may be moved away.

    Args:
        store, project: where the requests are; the caller holds the lease.
        recipe: settings of `alter distill`, but for `DECIDED`.

    Raises:
        UserError: the rows of a request are gone or changed, or what `alter distill` raises.
        Finding: a request that the weights have not forgotten or at which they collapsed.
    """
    examples = {request.name: received_rows(request) for request in store.requests(*IN_FORCE)}
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
                        "chat_template_kwargs": project.template,
                        **recipe,
                        "model": project.model,
                        "adapter": str(project.adapter.resolve()),
                        "forget": str(forget),
                        "retain": project.retain,
                        "out": str(folder),
                    }
                )
            )
        yield _beside(project, examples, made / "model")
    finally:
        sweep(project)


def to_line(example: Example) -> str:
    """Format a row as a line of JSONL."""
    return json.dumps(example.row, ensure_ascii=False) + "\n"


def _beside(project: Project, examples: Mapping[str, Sequence[Example]], weights: Path) -> Erased:
    """Measure adapter and weights, by request and on the retain sample; refuse weights that did not learn it."""
    measured: dict[str, dict[str, MeasuredEvidence]] = {}
    for form, name, adapter in (
        ("base", project.model, None),
        ("adapter", project.model, str(project.adapter)),
        ("weights", str(weights), None),
    ):
        model, tokenizer = load_model(name, adapter, template=project.template)
        measured[form] = {"retain": known_of(model, tokenizer, retain_sample(project), answers=project.answers)}
        measured[form] |= {
            name: known_of(model, tokenizer, rows, answers=project.answers, wordings=WORDINGS)
            for name, rows in examples.items()
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
        raise Finding(
            f"Nothing was made, since the weights did not learn it: {' '.join(missed)} Give more steps or a higher "
            "`learning_rate` in `recipe`."
        )
    known = {name: {form: measured[form][name] for form in measured} for name in ("retain", *examples)}
    return Erased(weights, known, verdicts)


def write_loras(store: Store, project: Project, out: Path) -> list[str]:
    """Write one plain LoRA for each request in force, in a folder of its name.

    Returns:
        what `alter serve` is to take for each of the adapter's experts (`upstream_loras`): its LoRA, or the base for one that is
        closed, as of a revoked request.

    Raises:
        UserError: no request is in force, or see `alter.exporting.loras.check_plain`.
    """
    found = store.requests(*IN_FORCE)
    if not found:
        raise UserError("No request is in force: there is no expert to write.")
    experts = [request.expert for request in found if request.expert is not None]
    names = [request.name for request in found]
    adapter = project.adapter.resolve()
    loras.write_experts(adapter, out, project.model, names, experts)
    named = dict(zip(experts, names, strict=True))
    return [named.get(n, project.model) for n in range(1, loras.check_plain(adapter)["num_forget_experts"] + 1)]


def export_card(store: Store, project: Project, form: str, measured: Mapping[str, Any] | None) -> str:
    """Return the model card of an export: what was forgotten by hash, the evidence, the settings and the limits."""
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
    for request in store.requests(*HELD):
        before, after = request.before, request.after or {}
        shown = [
            told(after, "said", "-"),
            *(told(part, "probability", "-") for part in (before, after, after.get("reference"))),
            told(after, "utility_share", "-"),
        ]
        facts = [request.name, str(request.rows), f"`{request.data_hash[:16]}`", request.state, *shown]
        lines.append(f"| {' | '.join(facts)} |")
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
                cells = [told(by_form[name], each, "-") for each in ("probability", "exact_memorization", "rouge")]
                lines.append(f"| {part} | {name} | {' | '.join(cells)} |")
    settings = inside.get("run", {}).get("settings", {})
    lines += ["", "## Settings of the last run", "", "```json", to_json(settings).rstrip(), "```", ""]
    return "\n".join(lines)
