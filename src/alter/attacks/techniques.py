"""The registry of attacks: what each needs of the attacker, the function that runs it, and when it cannot be run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alter.attacks import depth, pruning, searching, states, talking, weights, wording
from alter.attacks.base import Bench, paraphrases, too_few
from alter.attacks.settings import Attack
from alter.data import Example
from alter.plugins import Registry
from alter.storage import Record

MEASURES = {"attack_rouge": "ROUGE", "attack_probability": "prob.", "attack_probe": "read", "attack_lens": "lens"}

BY_DEPTH = ("attack_probe", "attack_lens")
"""Measures of which there is one per depth, and whose plain figure is that of the same reading of the other model."""


def _always(settings: Attack, rows: Sequence[Example]) -> str | None:
    return None


def _no_question(settings: Attack, rows: Sequence[Example]) -> str | None:
    return "the rows are text without questions" if any(row.prompt is None for row in rows) else None


def _no_wording(name: str) -> Callable[[Attack, Sequence[Example]], str | None]:
    """Return the check of an attack by another wording of the question, which must be another."""

    def missing(settings: Attack, rows: Sequence[Example]) -> str | None:
        if (why := _no_question(settings, rows)) is not None:
            return why
        same = all(wording.WORDINGS[name](row.prompt or "") == row.prompt for row in rows)
        return "it leaves every question of these rows as it is" if same else None

    return missing


def _no_talk(settings: Attack, rows: Sequence[Example]) -> str | None:
    if any(row.kind == "completion" for row in rows):
        return "the rows are completions, not questions"
    return _no_question(settings, rows)


def _no_search(settings: Attack, rows: Sequence[Example]) -> str | None:
    least = weights.SEARCHED
    if len(rows) <= least:
        return f"the forget set has {len(rows)} rows; it needs {least + 1} or more, {least} of them the attacker's"
    if settings.relearn.rows < least:
        return f"`relearn.rows` is {settings.relearn.rows}; it needs {least} or more: a part of them tells which rate is best"
    return None


def _few_states(settings: Attack, rows: Sequence[Example]) -> str | None:
    if len(rows) < states.LEAST_ROWS:
        return f"the forget set has {len(rows)} rows, and it needs {states.LEAST_ROWS} or more"
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
        return "it needs `retrained`, and `original` where there is no adapter"
    return None


@dataclass(frozen=True)
class Technique:
    """An attack: its needs, its function, the settings it depends on besides `COMMON`, and why it cannot be run."""

    needs: str
    run: Callable[[Bench], list[Record]]
    settings: tuple[str, ...] = ()
    missing: Callable[[Attack, Sequence[Example]], str | None] = _always
    takes_rows: bool = False

    def impossible(self, settings: Attack, rows: Sequence[Example]) -> str | None:
        """Return why it cannot be run on these rows with these settings; None if it can."""
        why = self.missing(settings, rows)
        return too_few(len(rows), settings.relearn.rows) if why is None and self.takes_rows else why


NEEDS_CHAT = "a chat with the model"

ATTACKS: Registry[Technique] = Registry(
    "attack",
    {
        "relearn": Technique(
            "weights, gradients, forget rows",
            lambda b: weights.relearn(b, lora=False, benign=False),
            ("relearn",),
            takes_rows=True,
        ),
        "relearn_lora": Technique(
            "weights, gradients, forget rows",
            lambda b: weights.relearn(b, lora=True, benign=False),
            ("relearn",),
            takes_rows=True,
        ),
        "benign": Technique("weights, gradients", lambda b: weights.relearn(b, lora=False, benign=True), ("relearn",)),
        "benign_lora": Technique(
            "weights, gradients", lambda b: weights.relearn(b, lora=True, benign=True), ("relearn",)
        ),
        "relearn_searched": Technique(
            "weights, gradients, forget rows",
            weights.relearn_searched,
            ("relearn", "budget"),
            _no_search,
            takes_rows=True,
        ),
        "quantize_8": Technique("weights", lambda b: weights.quantized(b, bits=8)),
        "quantize_4": Technique("weights", lambda b: weights.quantized(b, bits=4)),
        "prune_20": Technique("weights", lambda b: pruning.pruned(b, percent=20, wanda=False)),
        "prune_50": Technique("weights", lambda b: pruning.pruned(b, percent=50, wanda=False)),
        "wanda_20": Technique("weights", lambda b: pruning.pruned(b, percent=20, wanda=True), ("relearn",)),
        "wanda_50": Technique("weights", lambda b: pruning.pruned(b, percent=50, wanda=True), ("relearn",)),
        "paraphrase": Technique(
            NEEDS_CHAT, lambda b: wording.ask_reworded(b, name="paraphrase"), missing=_no_paraphrase
        ),
        "telegram": Technique(
            NEEDS_CHAT, lambda b: wording.ask_reworded(b, name="telegram"), missing=_no_wording("telegram")
        ),
        "reversed": Technique(
            NEEDS_CHAT, lambda b: wording.ask_reworded(b, name="reversed"), missing=_no_wording("reversed")
        ),
        "upper_case": Technique(
            NEEDS_CHAT, lambda b: wording.ask_reworded(b, name="upper_case"), missing=_no_wording("upper_case")
        ),
        "lower_case": Technique(
            NEEDS_CHAT, lambda b: wording.ask_reworded(b, name="lower_case"), missing=_no_wording("lower_case")
        ),
        "joined": Technique(
            NEEDS_CHAT, lambda b: wording.ask_reworded(b, name="joined"), missing=_no_wording("joined")
        ),
        "foreign_frame": Technique(
            NEEDS_CHAT, lambda b: wording.ask_reworded(b, name="foreign_frame"), missing=_no_wording("foreign_frame")
        ),
        "languages": Technique(NEEDS_CHAT, talking.languages, missing=_no_question),
        "jailbreak": Technique(NEEDS_CHAT, talking.jailbreak, missing=_no_question),
        "dialogue": Technique(NEEDS_CHAT, talking.dialogue, missing=_no_talk),
        "hint": Technique("a chat with the model; the answer's initials", talking.hint, missing=_no_question),
        "few_shot": Technique(
            "a chat with the model; forget rows", talking.few_shot, missing=_no_talk, takes_rows=True
        ),
        "evolve": Technique(
            "a chat with the model; likelihoods of forget rows",
            searching.evolve,
            ("budget",),
            _no_question,
            takes_rows=True,
        ),
        "beginning": Technique("to begin the reply", talking.beginning, missing=_no_question),
        "prefill": Technique("to begin the reply; the answer's first tokens", wording.prefill, ("prefill_tokens",)),
        "sample": Technique("many replies; to know the best", wording.sampled_replies, ("samples", "temperature")),
        "soft_prompt": Technique(
            "weights, gradients, forget rows; no weight is changed",
            searching.soft_prompt,
            ("budget", "soft_tokens", "relearn"),
            _no_question,
            takes_rows=True,
        ),
        "strip": Technique("the base weights", weights.stripped, missing=_no_adapter),
        "probe": Technique(
            "hidden states; half the forget rows", states.probe, ("probe_rows", "probe_tokens"), _few_states
        ),
        "lens": Technique("hidden states", depth.lens),
        "uds": Technique("hidden states; the original (a diagnosis)", lambda bench: [], missing=_not_all_three),
        "cka": Technique("hidden states (no evidence)", lambda bench: [], ("probe_rows",), _few_states),
    },
)
"""Every attack by name, in the order of the table. `uds` and `cka` compare the models once all are there."""

COMPARING = ("uds", "cka")

UNRELATED = {"benign", "benign_lora", "wanda_20", "wanda_50"}
"""Attacks that need rows of something else."""

TRAINING_ATTACKS = ("relearn", "relearn_lora", "relearn_searched", "benign", "benign_lora")

SEARCHING = ("soft_prompt", "relearn_searched")
"""Attacks that train within a budget."""

PLACES = ("step", "depth", "variant")
"""What tells several measurements of one attack apart; of them the attacker takes the best."""
