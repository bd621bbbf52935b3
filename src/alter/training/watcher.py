"""The callback that watches a model while it forgets: checks at chosen steps, keeping the best adapter, early stopping.

One scoring pass over small seeded subsets makes a check. Everything a rule decides follows from the checks made so
far, which the trainer's state keeps with every checkpoint: so a run that was killed goes on with the same decisions.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from alter import metrics
from alter.core import Array, UserError, processes, show, tell
from alter.data import Encoded, encode, encode_prompt, share_template_arguments
from alter.evaluation import leaked
from alter.inference import Scores, generate, score
from alter.models import load_model
from alter.storage import digest
from alter.training.rules import Decision, told_apart
from alter.training.trunk import WatchedStates
from alter.training.watch import Watch
from alter.training.watched import Watched, rated

KEPT_FOLDER = "kept"
"""Folder of a run that holds the adapter of the best step so far."""

SHOWN_METRICS = {
    "retain_probability": "retain",
    "forget_probability": "forget",
    "holdout_probability": "holdout",
    "forget_exact_memorization": "forget EM",
    "holdout_exact_memorization": "holdout EM",
    "forget_rouge": "forget ROUGE",
    "holdout_rouge": "holdout ROUGE",
    "forget_quality": "quality",
}
"""Metrics that a check shows if it has them: the plain name is the probability, EM exact memorisation."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore the state of every random number generator after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class Watcher(TrainerCallback):
    """Check a run, keep the adapter of the best step in `folder`, and stop the training.

    The checks are entries of the trainer's log history under the key "watch"; nothing else is remembered.
    """

    def __init__(
        self, watch: Watch, watched: Watched, tokenizer: Any, *, max_length: int | None, folder: Path, device: Any
    ) -> None:
        """Encode the rows, and score the calibrating model if there is one.

        Raises:
            UserError: a row whose answer is cut off, or a calibrating model with another tokenizer.
        """
        self.watch, self.watched, self.tokenizer, self.folder = watch, watched, tokenizer, folder
        self.sets = {"forget": watched.forget, "retain": watched.retain, "holdout": watched.holdout}
        self.encoded: list[Encoded] = []
        self.where: dict[str, slice] = {}
        for name, rows in self.sets.items():
            self._add(name, [encode(tokenizer, row, max_length=max_length) for row in rows])
        for name in ("forget", "holdout"):
            rows = self.sets[name]
            if rows and all(map(rated, rows)):
                answers = [[row.row["paraphrased_answer"], *row.row["perturbed_answer"]] for row in rows]
                if len({len(texts) for texts in answers}) > 1:
                    raise UserError(f"The {name} rows to watch have different numbers of perturbed answers.")
                texts = [(row, text) for row, own in zip(rows, answers, strict=True) for text in own]
                self._add(f"{name}_rated", [encode(tokenizer, r, answer=t, max_length=max_length) for r, t in texts])
        short = [i for i, row in enumerate(self.encoded) if sum(label != -100 for label in row.labels[1:]) < 2]
        if short:
            name = next(name for name, where in self.where.items() if where.start <= short[0] < where.stop)
            raise UserError(
                f"A {name.split('_')[0]} row to watch has less than two labelled tokens, too few to score: "
                "its answer is empty or cut off; take it out or raise `max_length`."
            )
        self.prompts = {
            name: [encode_prompt(tokenizer, row) for row in self.sets[name][: watch.replies]]
            for name in ("forget", "holdout")
        }
        self.key = digest(watch.model_dump(), [row.input_ids for row in self.encoded])
        self.base = self._calibration(max_length, device) if watch.calibrate else {}
        labels = tuple([str(row.domain) for row in self.sets[name]] for name in ("forget", "holdout"))
        self.groups = (labels[0], labels[1]) if all(len(set(names)) > 1 for names in labels) else None
        self.judge = watch.leak.hit.judge(torch.device(device)) if watch.leak.samples else None
        self.below: WatchedStates | None = None
        """What the blocks below the adapter put out for the rows, if that is kept."""
        self.checks: list[dict[str, float]] = []
        self.seconds = 0.0

    def _add(self, name: str, rows: list[Encoded]) -> None:
        self.where[name] = slice(len(self.encoded), len(self.encoded) + len(rows))
        self.encoded += rows

    def _calibration(self, max_length: int | None, device: Any) -> dict[str, dict[str, Array]]:
        assert self.watch.calibrate is not None
        model, tokenizer = load_model(self.watch.calibrate, device=str(device))
        share_template_arguments(tokenizer, self.tokenizer)
        rows = {name: self.encoded[self.where[name]] for name in ("forget", "holdout")}
        for name, encoded in rows.items():
            if [encode(tokenizer, row, max_length=max_length) for row in self.sets[name]] != encoded:
                raise UserError(
                    f"`watch.calibrate` {self.watch.calibrate} writes the {name} rows in other tokens than the model "
                    "that must forget: give a model of the same tokenizer and chat template."
                )
        scores = {
            name: score(model, encoded, pad_token_id=tokenizer.pad_token_id, label=f"calibration, {name} rows").logprob
            for name, encoded in rows.items()
        }
        return {
            name: {"loss": metrics.membership.mia_loss(part), "min_k": metrics.membership.mia_min_k(part)}
            for name, part in scores.items()
        }

    def check(self, model: Any) -> dict[str, float]:
        """Return the numbers of one check, from one scoring pass; the model's modes and all generators are as before.

        Args:
            model: a transformers model with the adapter's layers in it.
        """
        with undisturbed():
            scores = self._scores(model)
            replies = {
                name: generate(model, self.tokenizer, prompts, max_new_tokens=self.watch.reply_tokens, progress=False)
                for name, prompts in self.prompts.items()
                if prompts
            }
            found = None
            if self.judge is not None:
                found = leaked(
                    model, self.tokenizer, self.watched.forget, self.watch.leak, judge=self.judge, progress=False
                )
        out, known = self._likelihoods(scores)
        if found is not None and found.rows:
            out |= {f"leak@{k}": float(found.at(k).mean()) for k in self.watch.leak.numbers}
        if self.watched.reference is not None:
            quality = metrics.likelihood.forget_quality(
                known["forget"]["truth_ratio"], self.watched.reference.truth_ratio
            )
            out["forget_quality"], out["forget_quality_statistic"] = quality.pvalue, quality.statistic
        if "holdout" in known:
            for name in known["forget"].keys() & known["holdout"].keys():
                out[f"auc_{name}"], out[f"p_{name}"] = told_apart(
                    known["forget"][name], known["holdout"][name], self.groups
                )
        for name, texts in replies.items():
            truths = [row.answer.strip() for row in self.sets[name][: len(texts)]]
            out[f"{name}_rouge"] = float(metrics.text.rouge_l(truths, texts).recall.mean())
        return dict(sorted(out.items()))

    def _scores(self, model: Any) -> Scores:
        """Score all rows, from the cached output of the blocks below the adapter where there is one."""
        below = self.below
        scores = score(
            model,
            self.encoded,
            pad_token_id=self.tokenizer.pad_token_id,
            progress=False,
            around=None if below is None else below.around,
        )
        if below is not None:
            below.end()
        return scores

    def _likelihoods(self, scores: Scores) -> tuple[dict[str, float], dict[str, dict[str, Array]]]:
        """Return the mean figures of each set, and each row's scores by set and name, larger for rows less known."""
        out: dict[str, float] = {}
        known: dict[str, dict[str, Array]] = {}
        for name, rows in self.sets.items():
            if not rows:
                continue
            own = scores[self.where[name]]
            loss = metrics.likelihood.average_loss(own.logprob)
            right = metrics.memorisation.exact_memorization(own.correct)
            out[f"{name}_loss"] = float(loss.mean())
            out[f"{name}_probability"] = float(metrics.likelihood.probability(loss).mean())
            out[f"{name}_exact_memorization"] = float(right.mean())
            base = self.base.get(name, {})
            known[name] = {
                "loss": metrics.membership.mia_loss(own.logprob) - base.get("loss", 0.0),
                "min_k": metrics.membership.mia_min_k(own.logprob) - base.get("min_k", 0.0),
                "exact_memorization": 1 - right,
            }
            if f"{name}_rated" in self.where:
                rated = metrics.likelihood.average_loss(scores[self.where[f"{name}_rated"]].logprob).reshape(
                    len(rows), -1
                )
                known[name]["truth_ratio"] = metrics.likelihood.truth_ratio(rated[:, 0], rated[:, 1:])
                closeness = metrics.likelihood.closeness_to_one(known[name]["truth_ratio"])
                out[f"{name}_truth_ratio"] = float(closeness.mean())
        return out, known

    # The trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Restore the checks from the checkpoint, or make the first one, of the untouched model."""
        found = [entry["watch"] for entry in state.log_history if "watch" in entry]
        if any(check["key"] != self.key for check in found) or (state.global_step and not found):
            raise UserError(
                "The run was started with other settings of watch or other rows to look at, so its checks cannot be "
                "continued: resume with the recipe in its run.yaml, or start again with `overwrite`."
            )
        self.checks = [{name: value for name, value in check.items() if name != "key"} for check in found]
        if not self.checks:
            self._check(state, model)
            reason = self.watch.rule.refuse(self.checks[0])
            if reason is not None:
                raise UserError(reason)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check if it is time, keep the adapter if it is the best so far, and stop if the rule says so."""
        due = state.global_step % self.watched.every == 0 or state.global_step == state.max_steps
        if due and not self.stopped and self.checks[-1]["step"] < state.global_step:
            self._check(state, model)
            if self.choice.step == state.global_step:
                self._keep(model, state.global_step)
            self._say(state.max_steps)
        if self.stopped:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Delete the adapters of other steps once a checkpoint records the best one."""
        if len(self.checks) > 1 and processes.first():
            for path in self.folder.glob("step-*"):
                if path.name != f"step-{self.choice.step}":
                    shutil.rmtree(path)

    @property
    def choice(self) -> Decision:
        """Return the rule's decision on the checks so far; there must be one after step 0."""
        return self.watch.rule.judge(self.checks)

    @property
    def stopped(self) -> bool:
        """Whether the rule has ended the training."""
        return self.watch.stop and len(self.checks) > 1 and self.choice.stop

    def _check(self, state: Any, model: Any) -> None:
        started = time.time()
        # the inner model: what wraps it for training (autocast) must not change the numbers
        numbers = self.check(model.get_base_model())
        check = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4), **numbers}
        state.log_history.append({"step": state.global_step, "watch": {**check, "key": self.key}})
        self.checks.append(check)
        self.seconds += time.time() - started

    def _keep(self, model: Any, step: int) -> None:
        if not processes.first():
            return
        partial, final = self.folder / ".partial", self.folder / f"step-{step}"
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(str(partial))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)

    def _say(self, steps: int) -> None:

        check, choice = self.checks[-1], self.choice
        words = [f"{label} {check[name]:.3g}" for name, label in self._columns().items()]
        end = "; the rule is satisfied, training ends" if self.stopped else ""
        tell(f"step {int(check['step'])}/{steps}: {', '.join(words)}; best so far step {choice.step}{end}")

    def _columns(self) -> dict[str, str]:
        """Return the metrics to show, by name, with their column titles."""
        score = getattr(self.watch.rule, "score", "loss")
        shown = {f"auc_{score}": f"AUC {score}", f"p_{score}": "p"}
        shown |= {f"leak@{k}": f"leak@{k}" for k in self.watch.leak.numbers[-1:]}
        return {name: label for name, label in (SHOWN_METRICS | shown).items() if name in self.checks[0]}

    # After training

    def restore_best(self, model: Any) -> dict[str, Any]:
        """Load the weights of the step to keep into the model, print the checks, and return them with the choice.

        Raises:
            UserError: the adapter of that step is gone.
        """
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        # what the first process keeps must be there
        processes.gather(None)
        choice = self.choice
        path = self.folder / f"step-{choice.step}" / "adapter_model.safetensors"
        if not path.is_file():
            raise UserError(f"The adapter of the best step is gone: no {path}. Start again with `overwrite`.")
        set_peft_model_state_dict(model, load_file(str(path)))
        self._show(choice)
        return {
            "kept": asdict(choice),
            "stopped_early": self.stopped,
            "seconds": round(self.seconds, 2),
            "rows": {name: len(rows) for name, rows in self.sets.items() if rows},
            "groups": self.groups and [len(set(names)) for names in self.groups],
            "checks": self.checks,
        }

    def _show(self, choice: Decision) -> None:
        from alter.rendering import FittedTable

        shown = FittedTable(title=f"Watched: step {choice.step} is kept, {choice.why}")
        columns = self._columns()
        for label in ("step", *columns.values()):
            shown.add_column(label, justify="right", overflow="fold")
        for check in self.checks:
            values = (f"{check[name]:.2g}" if check[name] < 0.001 else f"{check[name]:.3f}" for name in columns)
            shown.add_row(str(int(check["step"])), *values, style="bold" if check["step"] == choice.step else None)
        show(shown, stderr=True)
