"""Every attack by name: what the attacker needs, the function that runs it, and when it cannot be run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alter.attacks import depth, pruning, searching, states, talking, weights, wording
from alter.attacks.base import Attack, Bench, paraphrases
from alter.core.plugins import Registry
from alter.core.records import Record
from alter.data.examples import Example

MEASURES = {"attack_rouge": "ROUGE", "attack_probability": "prob.", "attack_probe": "read", "attack_lens": "lens"}

BY_DEPTH = ("attack_probe", "attack_lens")
"""Measures of which there is one per depth, and whose plain figure is that of the same reading of the other model."""


def _always(settings: Attack, rows: Sequence[Example]) -> str | None:
    return None


def _no_question(settings: Attack, rows: Sequence[Example]) -> str | None:
    return "the rows are text without questions" if any(row.prompt is None for row in rows) else None


def _no_talk(settings: Attack, rows: Sequence[Example]) -> str | None:
    if any(row.kind == "completion" for row in rows):
        return "the rows are completions, not questions"
    return _no_question(settings, rows)


def _few_rows(settings: Attack, rows: Sequence[Example]) -> str | None:
    if settings.relearn.rows < weights.SEARCHED:
        return f"it needs --relearn.rows {weights.SEARCHED} or more: a part of them tells which rate is best"
    return None


def _no_paraphrase(settings: Attack, rows: Sequence[Example]) -> str | None:
    if paraphrases(settings.forget, rows) is not None:
        return None
    return "the rows have no column 'paraphrased_question' (TOFU's perturbed splits have it)"


def _no_adapter(settings: Attack, rows: Sequence[Example]) -> str | None:
    if settings.adapter is None:
        return "there is no adapter to take off"
    return "the adapter is merged into the weights" if settings.merged else None


def _not_all_three(settings: Attack, rows: Sequence[Example]) -> str | None:
    if settings.retrained is None or (settings.original is None and settings.adapter is None):
        return "it needs --retrained, and --original where there is no adapter"
    return None


@dataclass(frozen=True)
class Technique:
    """An attack: what the attacker needs, how it is run, settings it depends on besides `COMMON`, why it cannot be run."""

    needs: str
    run: Callable[[Bench], list[Record]]
    settings: tuple[str, ...] = ()
    missing: Callable[[Attack, Sequence[Example]], str | None] = _always


CHAT = "a chat with the model"

ATTACKS: Registry[Technique] = Registry(
    "attack",
    {
        "relearn": Technique(
            "weights, gradients, forget rows", lambda b: weights.relearn(b, lora=False, benign=False), ("relearn",)
        ),
        "relearn_lora": Technique(
            "weights, gradients, forget rows", lambda b: weights.relearn(b, lora=True, benign=False), ("relearn",)
        ),
        "benign": Technique("weights, gradients", lambda b: weights.relearn(b, lora=False, benign=True), ("relearn",)),
        "benign_lora": Technique(
            "weights, gradients", lambda b: weights.relearn(b, lora=True, benign=True), ("relearn",)
        ),
        "relearn_searched": Technique(
            "weights, gradients, forget rows", weights.relearn_searched, ("relearn", "budget"), _few_rows
        ),
        "quantize_8": Technique("weights", lambda b: weights.quantized(b, bits=8)),
        "quantize_4": Technique("weights", lambda b: weights.quantized(b, bits=4)),
        "prune_20": Technique("weights", lambda b: pruning.pruned(b, percent=20, wanda=False)),
        "prune_50": Technique("weights", lambda b: pruning.pruned(b, percent=50, wanda=False)),
        "wanda_20": Technique("weights", lambda b: pruning.pruned(b, percent=20, wanda=True), ("relearn",)),
        "wanda_50": Technique("weights", lambda b: pruning.pruned(b, percent=50, wanda=True), ("relearn",)),
        "paraphrase": Technique(CHAT, lambda b: wording.ask_reworded(b, name="paraphrase"), missing=_no_paraphrase),
        "telegram": Technique(CHAT, lambda b: wording.ask_reworded(b, name="telegram"), missing=_no_question),
        "reversed": Technique(CHAT, lambda b: wording.ask_reworded(b, name="reversed"), missing=_no_question),
        "upper_case": Technique(CHAT, lambda b: wording.ask_reworded(b, name="upper_case"), missing=_no_question),
        "foreign_frame": Technique(
            CHAT, lambda b: wording.ask_reworded(b, name="foreign_frame"), missing=_no_question
        ),
        "languages": Technique(CHAT, talking.languages, missing=_no_question),
        "jailbreak": Technique(CHAT, talking.jailbreak, missing=_no_question),
        "dialogue": Technique(CHAT, talking.dialogue, missing=_no_talk),
        "hint": Technique("a chat with the model; the answer's initials", talking.hint, missing=_no_question),
        "few_shot": Technique("a chat with the model; forget rows", talking.few_shot, missing=_no_talk),
        "evolve": Technique(
            "a chat with the model; likelihoods of forget rows", searching.evolve, ("budget",), _no_question
        ),
        "beginning": Technique("to begin the reply", talking.beginning, missing=_no_question),
        "prefill": Technique("to begin the reply; the answer's first tokens", wording.prefill, ("prefill_tokens",)),
        "sample": Technique("many replies; to know the best", wording.sampled_replies, ("samples", "temperature")),
        "soft_prompt": Technique(
            "weights, gradients, forget rows; no weight is changed",
            searching.soft_prompt,
            ("budget", "soft_tokens", "relearn"),
            _no_question,
        ),
        "strip": Technique("the base weights", weights.stripped, missing=_no_adapter),
        "probe": Technique("hidden states; half the forget rows", states.probe, ("probe_rows", "probe_tokens")),
        "lens": Technique("hidden states", depth.lens),
        "uds": Technique("hidden states; the original (a diagnosis)", lambda bench: [], missing=_not_all_three),
        "cka": Technique("hidden states (no evidence)", lambda bench: [], ("probe_rows",)),
    },
)
"""Every attack by name, in the order of the table. `uds` and `cka` compare the models once all are there."""

COMPARING = ("uds", "cka")

UNRELATED = {"benign", "benign_lora", "wanda_20", "wanda_50"}
"""Attacks that need rows of something else."""

TRAINING = ("relearn", "relearn_lora", "relearn_searched", "benign", "benign_lora")

SEARCHING = ("soft_prompt", "relearn_searched")
"""Attacks that train within a budget."""

PLACES = ("step", "depth", "variant")
"""What tells several measurements of one attack apart; of them the attacker takes the best."""
