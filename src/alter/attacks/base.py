"""What all attacks share: the settings, tokenised rows, and loading and measuring of models."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from alter import metrics
from alter.attacks.settings import Attack
from alter.core import Array, UserError
from alter.data import TOFU_SPLITS, Encoded, Example, encode, tofu_rows
from alter.inference import check_prompts, check_rows, context_length, generate, score
from alter.models import ModelSettings
from alter.storage import Record

PLAIN = "none"
"""Name of the measurement without any attack."""


def interval(values: npt.ArrayLike) -> list[float] | None:
    """Return the 95 % interval of a mean over rows (`metrics.samples.row_interval`) as a record holds it; None where there is none."""
    found = metrics.samples.row_interval(values)
    return None if found is None else list(found)


# Rows ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One tokenised row: `ids[:start]` is the prompt, the rest the answer, whose text is `reference`."""

    index: int
    ids: list[int]
    start: int
    reference: str

    @property
    def encoded(self) -> Encoded:
        """Return the row with the answer's tokens labelled."""
        return Encoded(self.ids, [-100] * self.start + self.ids[self.start :], self.start)


def make_item(tokenizer: Any, example: Example, *, prompt: str | None = None, longest: int | None = None) -> Item:
    """Return an example as an `Item`; of plain text at most `longest` tokens of the second half.

    Args:
        prompt: another question in place of the example's own.

    Raises:
        UserError: see `alter.data.encoding.encode`.
    """
    if example.kind != "text":
        encoded = encode(tokenizer, example, prompt=prompt)
        return Item(example.index, encoded.input_ids, encoded.prompt_length, example.answer.strip())
    ids = encode(tokenizer, example).input_ids
    start = len(ids) // 2
    ids = ids[: start + longest] if longest is not None else ids
    return Item(example.index, ids, start, tokenizer.decode(ids[start:], skip_special_tokens=True).strip())


def prefilled(tokenizer: Any, item: Item, tokens: int) -> Item | None:
    """Return the item with the answer's first tokens moved into the prompt; None if no text is left to say.

    What was given is not counted: reference and labels begin after it.
    """
    start = item.start + tokens
    rest = tokenizer.decode(item.ids[start:], skip_special_tokens=True).strip()
    return replace(item, start=start, reference=rest) if rest else None


def split_rows(total: int, measured: int, attacker: int, seed: int) -> tuple[list[int], list[int]]:
    """Split the row numbers by the seed into measured rows and the attacker's rows, which are disjoint.

    Args:
        total: rows of the forget set.
        measured: rows to measure, at most.
        attacker: rows that are the attacker's; 0 where no attack that is run takes any, so that all can be measured.

    Raises:
        UserError: no row is left to measure.
    """
    if (why := too_few(total, attacker)) is not None:
        raise UserError(f"{why}.")
    order = list(range(total))
    random.Random(seed).shuffle(order)
    return order[: min(measured, total - attacker)], order[total - attacker :]


def too_few(total: int, attacker: int) -> str | None:
    """Return why the attacker cannot have so many of the forget rows, and how many it can; None if it can."""
    if total > attacker:
        return None
    if total < 2:
        return f"the forget set has {total} row{'' if total == 1 else 's'}; give 2 or more, one of them to measure"
    return (
        f"`relearn.rows` is {attacker}, and the forget set has {total} rows, so none is left to measure; give "
        f"`relearn.rows` {total // 2}, and {total - 1} at most"
    )


def paraphrases(forget: str, rows: Sequence[Example]) -> list[str] | None:
    """Return a paraphrase of each question, or None if the data have none.

    They are the rows' own column `paraphrased_question`, or that of TOFU's perturbed split of the same questions.
    """
    found = [row.row for row in rows]
    base, _, split = forget.rpartition(":")
    if base and f"{split}_perturbed" in TOFU_SPLITS:
        try:
            found = tofu_rows(f"{split}_perturbed", base)
        except UserError:
            return None
    if [row.get("question") for row in found] != [row.prompt for row in rows]:
        return None
    questions = [row.get("paraphrased_question") for row in found]
    return [str(question) for question in questions] if all(questions) else None


class Impossible(UserError):
    """Raised where only the loaded model shows that an attack cannot be run on it; the other attacks go on."""


# What a search may cost ----------------------------------------------------------------------------------------------


@dataclass
class Budget:
    """What an attacker may still spend on one model: questions, or seconds."""

    questions: int | None
    seconds: float | None
    used: int = 0
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, given: str | None, questions: int) -> Budget:
        """Return the budget of a setting ("400" questions, "30s" seconds), else so many questions."""
        if given is None:
            return cls(questions, None)
        return cls(None, float(given[:-1])) if given.endswith("s") else cls(int(given), None)

    def spend(self, questions: int) -> None:
        """Count questions as spent."""
        self.used += questions

    @property
    def left(self) -> bool:
        """Whether any budget is left."""
        return self.affords(1)

    def affords(self, questions: int) -> bool:
        """Return whether so many more questions can be asked."""
        if self.seconds is not None:
            return time.monotonic() - self.started < self.seconds
        return self.questions is None or self.used + questions <= self.questions

    def told(self) -> dict[str, Any]:
        """Return what was spent, for a record."""
        return {"questions_asked": self.used, "budget": {"questions": self.questions, "seconds": self.seconds}}


# Measuring -----------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """One model under attack: its loader, the rows, and the settings.

    `shared` is loaded once and must not be changed; an attack that changes weights takes `fresh`. `attacker` is empty where
    no attack that is run takes rows (`Technique.takes_rows`).
    """

    settings: Attack
    name: str
    source: ModelSettings
    rows: list[Example]
    measured: list[int]
    attacker: list[int]
    unrelated: list[Example]
    model: Any = None
    vocabulary: Any = None

    def shared(self) -> tuple[Any, Any]:
        """Return model and tokenizer for attacks that change no weight; load them on first use."""
        if self.model is None:
            self.model, self.vocabulary = self.source.load()
        return self.model, self.vocabulary

    def fresh(self, dtype: str | None = None) -> tuple[Any, Any]:
        """Load model and tokenizer anew, unquantised, for an attack that changes weights; drops the shared model first."""
        self.model = None
        source = self.source.model_copy(update={"quantization": None, "dtype": dtype or self.source.dtype})
        model, self.vocabulary = source.load()
        return model, self.vocabulary

    def release(self) -> None:
        """Let go of the shared model: two models at a time are one too many."""
        self.model = None

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.vocabulary or self.shared()[1]

    def fitting(self, model: Any, items: Sequence[Item]) -> list[Item]:
        """Return the items that fit into the model's context with a reply of full length."""
        limit, new = context_length(model), self.settings.max_new_tokens
        return [item for item in items if limit is None or (len(item.ids) <= limit and item.start + new <= limit)]

    def items(self, numbers: Sequence[int]) -> list[Item]:
        """Tokenise rows by number."""
        return [make_item(self.tokenizer, self.rows[i], longest=self.settings.max_new_tokens) for i in numbers]

    def measure(self, attack: str, model: Any, items: Sequence[Item], **extra: Any) -> list[Record]:
        """Score and generate; return the records of both, with `extra` in each."""
        settings = self.settings
        pad = self.tokenizer.pad_token_id
        encoded, prompts = [item.encoded for item in items], [item.ids[: item.start] for item in items]
        # an item's place among those measured is not its row's number
        names = [f"Row {item.index} of the forget set" for item in items]
        check_rows(model, encoded, names)
        check_prompts(model, prompts, settings.max_new_tokens, names)
        found = score(model, encoded, pad_token_id=pad, label=f"{attack}: scoring")
        likelihood = metrics.likelihood.probability(metrics.likelihood.average_loss(found.logprob))
        replies = generate(
            model,
            self.tokenizer,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            expected_lengths=[len(item.ids) - item.start for item in items],
            label=f"{attack}: answering",
        )
        references = [item.reference for item in items]
        rouge = metrics.text.rouge_l(references, replies).recall
        common = {"attack": attack, "rows": [item.index for item in items], **extra}
        asked = {row.index: row.prompt for row in self.rows}
        questions = [asked.get(item.index) for item in items]
        # as the rows have them, where the attack does not say how it puts them
        texts = {} if "questions" in common or not all(questions) else {"questions": questions}
        return [
            self.record("attack_rouge", rouge, **common, **texts, references=references, replies=replies),
            self.record("attack_probability", likelihood, **common),
        ]

    def record(self, metric: str, values: Array, **extra: Any) -> Record:
        """Return the mean of per-row values as a record of this model, with its 95 % interval (`metrics.samples.row_interval`)."""
        better = metrics.CATALOGUE[metric].higher_is_better
        extra["interval"] = interval(values)
        per_item = [float(value) for value in values]
        return Record(self.name, metric, float(np.mean(values)), len(per_item), "strict", better, per_item, extra)
