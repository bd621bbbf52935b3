"""Every metric of forgetting on one model, before and after a meta-evaluation's interventions.

Metrics are those of `alter evaluate --benchmark tofu` on the forget set, leak@k, and the readings of `alter attack` (lens,
probe, depth score, CKA, other wordings). What says how much else a model keeps, or how fluent it is, claims nothing about
forgetting and is not tried.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from alter import metrics
from alter.attacks import ATTACKS, Attack, Bench, Item, depth, states, train_steps
from alter.data import Example, encode, encode_all
from alter.evaluation import Leak, TofuResult, gives, leaked, tofu_metrics
from alter.inference import context_length, score
from alter.metaevaluation.settings import MetaEvaluate
from alter.models import ModelSettings

OF_REPLIES = ("forget_distinct_2", "forget_repetition", "forget_unusable")
"""Figures of the forget set that speak of how the replies read, not of what they give away."""
OF_OTHER_KINDS = (
    "retain_", "real_authors_", "world_facts_", "holdout_", "fluency_", "entropy_", "model_utility", "mmlu_", "wmdp_",
    "book_", "verbmem", "knowmem_", "attack_recovered_", "disturbance", "leak", "attacked_leak", "krr", "sarr", "rwku_", "lume_",
    "knowundo_",
)  # fmt: skip
"""What the names of metrics begin with that are not tried: of what is kept, of fluency, of another benchmark, fractions of
figures that are tried themselves, and what only `alter compare` calls so."""


@dataclass(frozen=True)
class MeasuredRows:
    """The rows that are measured, and those of the attacker.

    Attributes:
        folder: TOFU's files with the measured rows alone in the forget set.
        measured, attacker, retain: rows to ask, to relearn, and to keep.
    """

    folder: Path
    measured: list[Example]
    attacker: list[Example]
    retain: list[Example]


def train_on(model: Any, tokenizer: Any, rows: Sequence[tuple[Example, str]], *, rate: float, passes: int,
             batch_size: int, seed: int) -> None:  # fmt: skip
    """Train all weights on rows with the given answers, in place (`alter.attacks.weights.train_steps`).

    Raises:
        UserError: a prompt fills the context, or the loss is not finite.
    """
    told = [replace(row, answer=answer) for row, answer in rows]
    # a row longer than the context is trained on in windows
    encoded = encode_all(tokenizer, told, max_length=context_length(model))[0]
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    for weight in weights:
        weight.requires_grad_(True)
    steps = math.ceil(len(encoded) / batch_size) * passes
    for _ in train_steps(
        model, encoded, weights, rate=rate, steps=steps, batch_size=batch_size, pad_token_id=tokenizer.pad_token_id,
        seed=seed,
    ):  # fmt: skip
        pass
    for weight in weights:
        weight.requires_grad_(False)


class Measuring:
    """Measure models beside the original and the retrained one, which are measured once.

    Args:
        settings: what is measured.
        rows: the rows.
    """

    def __init__(self, settings: MetaEvaluate, rows: MeasuredRows) -> None:
        self.settings, self.rows = settings, rows
        self.leak = Leak(samples=settings.samples, questions=settings.questions, max_new_tokens=settings.reply_tokens)

    def load(self, model: str, adapter: str | None = None) -> tuple[Any, Any]:
        """Load a model in float32, to be measured or changed; asked with the chat template's variables of the runs."""
        return ModelSettings(
            model=model, adapter=adapter, dtype="float32", device=self.settings.device,
            chat_template_kwargs=self.settings.common.get("chat_template_kwargs", []),
        ).load()  # fmt: skip

    @cached_property
    def _original(self) -> tuple[Any, Any]:
        return self.load(self.settings.model)

    @cached_property
    def _reference(self) -> TofuResult:
        model, tokenizer = self.load(self.settings.retrained)
        return self._tofu(model, tokenizer, None, which=("likelihood",))

    @cached_property
    def _retrained_falls(self) -> np.ndarray:
        model, tokenizer = self.load(self.settings.retrained)
        return self._falls(model, self._items(tokenizer))

    @cached_property
    def _states(self) -> dict[str, np.ndarray]:
        loaded = {"original": self._original, "retrained": self.load(self.settings.retrained)}
        return {name: states.pooled(self._bench(*each)) for name, each in loaded.items()}

    @cached_property
    def _kept_by_original(self) -> float:
        return self._probability(*self._original, self.rows.retain)

    def _tofu(self, model: Any, tokenizer: Any, reference: TofuResult | None, which: Sequence[str]) -> TofuResult:
        return tofu_metrics(
            model, tokenizer, self.settings.split, str(self.rows.folder), which=which, sets=("forget",),
            gradnorm=self.settings.gradnorm and reference is not None, reference=reference, progress=False,
        )  # fmt: skip

    def _bench(self, model: Any, tokenizer: Any) -> Bench:
        """Wrap the model as `alter attack` sees it: all measured rows, asked as they are."""
        count = len(self.rows.measured)
        attack = Attack(model="unused", forget="rows", rows=count, probe_rows=max(8, count), seed=self.settings.seed)
        # the readings take the loaded model, never a fresh one
        return Bench(
            attack, "model", attack, self.rows.measured, list(range(count)), [], [], model=model, vocabulary=tokenizer
        )

    def _items(self, tokenizer: Any) -> list[Item]:
        return self._bench(None, tokenizer).items(range(len(self.rows.measured)))

    def _falls(self, model: Any, items: Sequence[Item]) -> np.ndarray:
        original, tokenizer = self._original
        return depth.falls(original, model, items, tokenizer.pad_token_id)

    def _probability(self, model: Any, tokenizer: Any, rows: Sequence[Example]) -> float:
        encoded = [encode(tokenizer, row) for row in rows]
        found = score(model, encoded, pad_token_id=tokenizer.pad_token_id, progress=False)
        return float(metrics.likelihood.probability(metrics.likelihood.average_loss(found.logprob)).mean())

    def keeps(self, model: Any, tokenizer: Any) -> float:
        """Return the probability of the answers to keep over the original's."""
        return self._probability(model, tokenizer, self.rows.retain) / self._kept_by_original

    def leaks(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Return leak@k on the measured rows, by name."""
        found = leaked(model, tokenizer, self.rows.measured, self.leak, seed=self.settings.seed, progress=False)
        return {f"leak@{k}": float(found.at(k).mean()) for k in self.leak.numbers}

    def given_away(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Return leak@k on the measured rows, by name, and the mean `probability` of their true answers."""
        return self.leaks(model, tokenizer) | {"probability": self._probability(model, tokenizer, self.rows.measured)}

    def figures(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Return every metric of forgetting, by NAME or NAME, DETAIL; what has no value for this model is left out.

        Raises:
            UserError: the model gives no probabilities, or has another shape than the original.
        """
        result = self._tofu(model, tokenizer, self._reference, which=("likelihood", "generation"))
        records = result.records("model")
        found = {r.metric: r.value for r in records if r.value is not None and r.metric not in OF_REPLIES}
        forget = result.sets["forget"]
        asked = zip(forget.questions or (), forget.references or (), forget.generations or (), strict=True)
        said = [value for row in asked if (value := gives(*row)) is not None]
        if said:
            found["forget_said"] = sum(said) / len(said)
        found |= self.leaks(model, tokenizer)
        bench = self._bench(model, tokenizer)
        for name in self.settings.readings:
            for record in ATTACKS[name].run(bench):
                at = f"depth {record.extra['depth']}" if "depth" in record.extra else name
                if record.value is not None:
                    found[f"{record.metric}, {at}"] = record.value
        scores = depth.depth_scores(self._retrained_falls, self._falls(model, self._items(tokenizer)))
        if np.isfinite(scores).any():
            found["attack_uds"] = float(np.nanmean(scores))
        for other, pooled in self._states.items():
            pair = {"unlearned": states.pooled(bench), other: pooled}
            (record,) = states.cka(pair)
            found[f"attack_cka, {other}"] = record.value or 0.0
        return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def untried(found: Collection[str]) -> list[str]:
    """Name the catalogue's metrics that measure forgetting and are not `found`: a reading was left out, or has no value for a model."""
    tried = {name.partition(", ")[0] for name in found}
    return [
        name
        for name in metrics.CATALOGUE
        if name not in tried and not name.startswith(OF_OTHER_KINDS) and name not in OF_REPLIES
    ]
