"""What the benchmarks of lm-evaluation-harness share: their settings, and records made of the harness's results."""

from __future__ import annotations

import math
import statistics
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from alter import metrics
from alter.core import Array, UserError
from alter.evaluation.base import Evaluation, say
from alter.evaluation.harness.library import check_installed, quiet_harness
from alter.evaluation.harness.model import harness_model
from alter.inference import evaluating
from alter.storage import Record, digest

FORMAT = (
    "output_type", "description", "doc_to_text", "doc_to_choice", "doc_to_target", "target_delimiter", "fewshot_delimiter",
    "num_fewshot", "generation_kwargs", "filter_list", "metric_list",
)  # fmt: skip
"""Fields of a task's settings that decide its prompts and its numbers."""
FEWSHOT_SEED = 1234
"""The harness's own, for tasks that draw their examples."""


def _asked(samples: Sequence[Mapping[str, Any]]) -> tuple[list[str], Array] | None:
    """Return the choices shared by all questions and their log-probabilities [n, k]; None for other tasks."""
    first = samples[0]["filter"]
    own = [sample for sample in samples if sample["filter"] == first]
    if any(len(arguments) != 2 or not isinstance(arguments[1], str) for s in own for arguments in s["arguments"]):
        return None
    asked = {tuple(continuation for _, continuation in sample["arguments"]) for sample in own}
    if len(asked) != 1 or len(choices := asked.pop()) < 2:
        return None
    logprob = [[float(answer[0][0]) for answer in sample["resps"]] for sample in own]
    return [choice.strip() for choice in choices], np.array(logprob)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float, np.number)) else None


class HarnessEvaluation(Evaluation):
    """What the benchmarks that run through lm-evaluation-harness share.

    Of each task or group that was asked for, the records are its metrics under the harness's names (`mmlu_acc`), and,
    where all questions have the same choices: `answer_entropy` (of the predicted letters over log k: 1 evenly spread, 0
    always the same; `extra` has nats), `top_answer` (share of the letter predicted most), `answer_ties` (share of
    questions whose likeliest letters tie, so that the first wins) and `choice_mass` (mean of the summed probability of
    all letters: near 0 the model does not answer in letters). Of the members of a group: metrics and `answer_entropy`,
    whose `extra` holds the rest.

    With `limit`, the questions of each task are drawn by `seed` (the harness's own takes the first ones).
    """

    benchmark: str
    """What to measure on."""

    @abstractmethod
    def specs(self) -> Any:
        """Return the harness's tasks and groups, loaded, as its `TaskManager.load` returns them.

        Raises:
            UserError: no such task, or data that is missing or of another form.
        """

    @abstractmethod
    def shots(self) -> int | None:
        """Return the number of examples before each question; None: as the task says."""

    @cached_property
    def loaded(self) -> Any:
        """The tasks with their data and number of examples.

        Raises:
            UserError: see `specs`; or a task that cannot be run here as asked.
        """
        check_installed()
        with quiet_harness():
            loaded = self.specs()
            for name, task in loaded["tasks"].items():
                self._prepare(name, task)
        return loaded

    def _prepare(self, name: str, task: Any) -> None:
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"Task {name!r} runs code that the model writes, which alter does not do.")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"Task {name!r} shows images or sounds; alter evaluates language models.")
        own, shots = task.get_config("num_fewshot"), self.shots()
        if shots and own == 0:
            raise UserError(f"Task {name!r} is defined without examples: leave `num_fewshot` out.")
        shots = (own or 0) if shots is None else shots
        task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
        if shots:
            pool = task.fewshot_docs()
            if pool is None or len(pool) < shots:
                raise UserError(
                    f"Task {name!r} has {0 if pool is None else len(pool)} examples; `num_fewshot` asks for {shots}."
                )

    def _chosen(self, task: Any) -> list[int]:
        """Return the numbers of the questions to ask, in order."""
        n = len(task.eval_docs)
        if self.limit is None or self.limit >= n:
            return list(range(n))
        return sorted(np.random.default_rng(self.seed).choice(n, size=self.limit, replace=False).tolist())

    def data_digest(self) -> str:
        """Hash the questions, the examples and the prompt format of all tasks, wherever they come from."""
        loaded, parts = self.loaded, []
        for name, task in loaded["tasks"].items():
            config = task.dump_config()
            docs = task.eval_docs
            examples = list(task.fewshot_docs()) if config.get("num_fewshot") else []
            parts.append(
                [name, {key: config.get(key) for key in FORMAT}, [docs[i] for i in self._chosen(task)], examples]
            )
        return digest(task_groups(loaded), parts)

    def measure(self, model: Any, tokenizer: Any) -> list[Record]:
        """Return the records described above; warn where the spread of answers makes the accuracy meaningless.

        Raises:
            UserError: see `harness_model`.
        """
        loaded = self.loaded
        from lm_eval.evaluator import evaluate

        with quiet_harness(), evaluating(model):
            wrapped = harness_model(
                model, tokenizer, batch_tokens=self.batch_tokens, batch_size=self.batch_size, label=self.title()
            )
            results = evaluate(
                lm=wrapped,
                task_dict=loaded,
                samples={name: self._chosen(task) for name, task in loaded["tasks"].items()},
                # only some metrics of other tasks need it; the accuracy's standard error has a closed form
                bootstrap_iters=1000,
            )
        records, notes = self._records(results)
        if self.limit is not None:
            notes.insert(
                0, f"A quick look at {self.limit} questions of each task: not comparable with published figures."
            )
        say(notes)
        return records

    def _records(self, results: Any) -> tuple[list[Record], list[str]]:
        loaded, records, notes = self.loaded, [], []
        inside = {child for children in task_groups(loaded).values() for child in children}
        names = [*loaded.get("groups", {}), *loaded["tasks"]]
        for name in sorted(names, key=lambda name: name in inside):
            group = loaded.get("groups", {}).get(name)
            tasks = [task.task_name for task in group.get_all_tasks()] if group is not None else [name]
            samples = [sample for task in tasks for sample in results["samples"][task]]
            more = {
                "benchmark": self.benchmark,
                "task": name,
                "task_version": results["versions"].get(name),
                "num_fewshot": results["n-shot"].get(name),
                "fingerprint": digest([sample["doc_hash"] for sample in samples])[:12],
            }
            records += self._metric_records(name, results, samples if group is None else None, more)
            asked = _asked(samples)
            if asked is None:
                continue
            choices, logprob = asked
            spread = metrics.choices.multiple_choice(logprob)
            counts = {choice: int(count) for choice, count in zip(choices, spread.counts, strict=True)}
            ties, mass = spread.ties.astype(float), spread.mass
            extra = {
                **more,
                "predicted": counts,
                "nats": spread.entropy,
                "top_share": spread.top_share,
                "ties": float(ties.mean()),
                "mass": float(mass.mean()),
            }
            predicted = [float(i) for i in spread.predicted]
            records.append(self._record(f"{name}_answer_entropy", spread.evenness, predicted, extra))
            if name in inside:
                continue
            top = {**more, "predicted": counts, "answer": choices[int(spread.counts.argmax())]}
            records += [
                self._record(f"{name}_top_answer", spread.top_share, None, top, n=len(logprob)),
                self._record(f"{name}_answer_ties", ties.mean(), ties.tolist(), more),
                self._record(f"{name}_choice_mass", mass.mean(), mass.tolist(), more),
            ]
            if spread.evenness < 0.5:
                notes.append(
                    f"{name}: {100 * spread.top_share:.0f} % of the predicted answers are {top['answer']!r}. The accuracy "
                    "is that of this habit, not of knowledge."
                )
            if spread.mass.mean() < 0.5:
                notes.append(
                    f"{name}: the choices together have a probability of {spread.mass.mean():.2g} on average. The model "
                    "would say something else, and the accuracy compares what is left."
                )
        return records, notes

    def _metric_records(self, name: str, results: Any, samples: Any, more: dict[str, Any]) -> list[Record]:
        """Record every metric that the harness reports of a task or group, with its standard error."""
        found = results["results"][name]
        out = []
        for key, value in found.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or _number(value) is None:
                continue
            items = None
            if samples is not None:
                items = [_number(sample.get(metric)) for sample in samples if sample["filter"] == filtered]
            label = f"{name}_{metric}" if filtered == "none" else f"{name}_{metric}_{filtered}"
            n = results["n-samples"][name]["effective"] if name in results["n-samples"] else found["sample_len"]
            better = results["higher_is_better"].get(name, {}).get(metric)
            whole = None if items is None or None in items else [float(x) for x in items if x is not None]
            stderr = _number(found.get(f"{metric}_stderr,{filtered}"))
            extra = {**more, "stderr": stderr, "interval": _interval(float(value), whole, stderr)}
            out.append(self._record(label, float(value), whole, extra, n=n, better=better))
        return out

    def _record(
        self,
        metric: str,
        value: float,
        items: list[float] | None,
        extra: dict[str, Any],
        *,
        n: int | None = None,
        better: bool | None = None,
    ) -> Record:
        known = metrics.CATALOGUE.get(metric)
        count = n if n is not None else len(items or [])
        return Record(
            self.label,
            metric,
            float(value),
            count,
            higher_is_better=known.higher_is_better if known is not None else better,
            per_item=items,
            extra=dict(extra),
        )


def _interval(value: float, items: list[float] | None, stderr: float | None) -> list[float] | None:
    """Return the 95 % interval of a metric: over its items where it is their mean, else (a group, an F1) from the standard error."""
    if items and abs(statistics.fmean(items) - value) < 1e-6:
        found = metrics.samples.row_interval(items)
        return None if found is None else list(found)
    if stderr is None:
        return None
    # a share cannot leave 0 to 1
    low, high = (0.0, 1.0) if 0 <= value <= 1 else (-math.inf, math.inf)
    return [max(low, value - 1.96 * stderr), min(high, value + 1.96 * stderr)]


def task_groups(loaded: Any) -> dict[str, list[str]]:
    """Return the names of the members of each group, as the harness loaded them."""
    return {name: list(group.child_names) for name, group in loaded.get("groups", {}).items()}
