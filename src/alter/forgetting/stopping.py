"""Stop training as soon as the model no longer tells the subject from an invented one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from alter.core import tell
from alter.data import Example, Row, encode_prompt
from alter.forgetting.facts import holds
from alter.forgetting.measure import LEVEL, STILL, against_zero, still_known
from alter.forgetting.speaker import write_jsonl
from alter.inference import generate

LOOKED = 20
"""Probes of a check."""
TWINS = 3
"""Invented names of a check."""
ANSWER_TOKENS = 48
"""Longest answer to a question of a check."""


class UntilZero(TrainerCallback):
    """Checks every few steps, writes the checks to `path`, and ends the training when the subject is like an invented one.

    That is when a check's p-value reaches `LEVEL` and at most half of `STILL` of the facts are `still_known` (half, since a part
    is asked), after at least `least` steps: with few probes the test finds no difference while answers still hold facts. Of a
    document the p-value does not count, since a model that never saw it tells it from its disguise too. A check takes the first
    `LOOKED` probes with `TWINS` invented names each; the final table counts all. The state of random number generators is restored after a check.

    All this is read behind the untouched model's own words, and an answer that begins otherwise may still come to a fact. So where it
    would end, the `questions` are asked as well, and training goes on unless less than half of `STILL` of the answers name one of
    `names`: of twenty, none.
    """

    def __init__(
        self,
        tokenizer: Any,
        probes: Sequence[Row],
        path: Path,
        every: int,
        least: int = 0,
        *,
        document: bool = False,
        questions: Sequence[str] = (),
        names: Sequence[str] = (),
    ) -> None:
        self.tokenizer, self.path, self.every, self.least = tokenizer, path, every, least
        self.document, self.questions, self.names = document, questions, names
        # forms take turns, so that few probes are not all of one form
        forms: dict[str, list[Row]] = {}
        for probe in probes:
            if probe.get("masks"):
                forms.setdefault(probe["form"], []).append({**probe, "masks": probe["masks"][:TWINS]})
        longest = max(map(len, forms.values()), default=0)
        self.probes = [rows[k] for k in range(longest) for rows in forms.values() if k < len(rows)]
        self.checks: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check at the interval, and stop if the subject is like an invented one."""
        if state.global_step % self.every:
            return
        # the inner model: what wraps it for training must not change the numbers
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        with torch.random.fork_rng(devices=[]):
            zero = against_zero(inner, self.tokenizer, self.probes, [], limit=LOOKED, progress=False)
        if zero is None:
            return
        before = np.array([self.probes[i].get("logprob", math.nan) for i in zero.places])
        known, n = still_known(zero, before)
        check: dict[str, Any] = {"step": state.global_step, "auc": zero.auc, "p": zero.pvalue, "known": known, "n": n}
        alike = self.document or zero.pvalue >= LEVEL
        done = alike and known <= STILL / 2 * n and state.global_step >= self.least
        told = ""
        if done and self.questions:
            check["said"], check["asked"] = self._said(inner), len(self.questions)
            done = check["said"] < STILL / 2 * check["asked"]
            told = f", {check['said']} of {check['asked']} questions answered with one"
        self.checks.append({**check, "done": done})
        write_jsonl(self.path, self.checks)
        tell(
            f"step {state.global_step}/{state.max_steps}: known facts against invented subjects: AUC {zero.auc:.2f}, "
            f"p {zero.pvalue:.2g}, {known} of {n} still known{told}"
            f"{'; like an invented subject, training ends' if done else ''}"
        )
        if done:
            control.should_training_stop = True

    def _said(self, model: Any) -> int:
        """Return how many of the questions are answered with a name that is not in the question."""
        asked = [encode_prompt(self.tokenizer, Example(question, "a", "qa")) for question in self.questions]
        answers = generate(model, self.tokenizer, asked, max_new_tokens=ANSWER_TOKENS, progress=False)
        pairs = zip(self.questions, answers, strict=True)
        return sum(
            any(holds(answer, name) and not holds(question, name) for name in self.names) for question, answer in pairs
        )
