"""What all attacks share: the settings, rows as tokens, and how a model is loaded and measured."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, field_validator

from alter import metrics
from alter.core.errors import UserError
from alter.core.records import Record
from alter.data.encoding import Encoded, encode
from alter.data.examples import Example
from alter.data.sources import TOFU_SPLITS, tofu_rows
from alter.models.generation import generate
from alter.models.loading import Subject
from alter.models.scoring import score

Array = npt.NDArray[np.float64]
PLAIN = "none"
"""Name of the measurement without any attack: before."""


class Relearning(BaseModel):
    """How the attacker trains: AdamW, constant rate, loss on answers, no dropout, float32."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    rows: int = Field(20, ge=1)
    """Forget rows (or, benign, unrelated rows) that the attacker has; never among the rows measured."""
    steps: list[int] = Field(default_factory=lambda: [2, 5, 10, 20])
    """Optimizer steps after which the model is measured."""
    batch_size: int = Field(10, ge=1)
    """Rows a step."""
    learning_rate: float = Field(2e-5, gt=0)
    """Of all weights; 2e-5 suits models of billions of weights, a small one needs more."""
    lora_learning_rate: float = Field(2e-4, gt=0)
    """Of the LoRA matrices."""
    lora_rank: int = Field(8, ge=1)
    """Of the attacker's LoRA, on every linear layer; its scale is 2."""
    benign: str = "builtin:world_facts"
    """Unrelated rows or text for the benign attacks."""

    @field_validator("steps")
    @classmethod
    def _rising(cls, steps: list[int]) -> list[int]:
        if not steps or min(steps) < 1:
            raise ValueError("give one or more numbers of steps, each at least 1")
        return sorted(set(steps))


class Attack(Subject):
    """Try to bring the forgotten back: by training, quantising, other wordings, prefilling, sampling, stripping."""

    forget: str
    """Rows that were forgotten: a file of rows or text, or NAME:SPLIT such as builtin:forget10."""
    retrained: str | None = None
    """The model that never saw them, the honest zero: folder, hub id or builtin:NAME. Without it no fraction."""
    original: str | None = None
    """The model before unlearning; by default --model without its adapter."""
    attacks: list[str] = Field(default_factory=list)
    """Which attacks, by name or comma-separated; by default all that the data and the adapter allow."""
    out: str = "runs/attack"
    """Folder for results; what it already holds of the same models, data, settings and code is not run again."""
    rows: int = Field(64, ge=1)
    """Forget rows that are measured, chosen by the seed."""
    probe_rows: int = Field(400, ge=8)
    """Forget rows whose hidden states are compared and probed, at most."""
    probe_tokens: int = Field(16, ge=1)
    """Tokens of each answer that the probe learns from or is tested on, at most."""
    seed: int = 0
    """Of the choice of rows, training, sampling and the probe's halves."""
    max_new_tokens: int = Field(200, ge=1)
    """Longest reply, in tokens."""
    relearn: Relearning = Field(default_factory=Relearning)
    prefill_tokens: int = Field(5, ge=1)
    """How many tokens of the true answer prefilling gives."""
    samples: int = Field(8, ge=2)
    """Replies that sampling draws for each question."""
    temperature: float = Field(0.8, gt=0)
    """Of the sampling."""
    batch_size: int = Field(64, ge=1)
    """Prompts in one generation batch."""


# Rows ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One row as tokens: `ids[:start]` is the prompt, the rest the answer, whose text is `reference`."""

    index: int
    ids: list[int]
    start: int
    reference: str

    @property
    def encoded(self) -> Encoded:
        """The row with the answer's tokens labelled."""
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
    """Return the numbers of the rows that are measured and of those that the attacker has: disjoint, by the seed.

    Raises:
        UserError: no row is left to measure.
    """
    if total <= attacker:
        raise UserError(
            f"The forget set has {total} rows and --relearn.rows takes {attacker} of them for the attacker: none is left "
            "to measure. Take fewer."
        )
    order = list(range(total))
    random.Random(seed).shuffle(order)
    return order[: min(measured, total - attacker)], order[total - attacker :]


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


# Measuring -----------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """One model under attack: how it is loaded, the rows, and the settings.

    `shared` is loaded once and must stay as it is; what an attack spoils it takes from `fresh`.
    """

    settings: Attack
    name: str
    subject: Subject
    rows: list[Example]
    measured: list[int]
    attacker: list[int]
    unrelated: list[Example]
    model: Any = None
    vocabulary: Any = None

    def shared(self) -> tuple[Any, Any]:
        """Model and tokenizer for attacks that change no weight; loaded if it is not there."""
        if self.model is None:
            self.model, self.vocabulary = self.subject.load()
        return self.model, self.vocabulary

    def fresh(self, dtype: str | None = None) -> tuple[Any, Any]:
        """Model and tokenizer loaded anew, to be spoiled, not quantised; the shared model leaves the memory meanwhile."""
        self.model = None
        subject = self.subject.model_copy(update={"quantization": None, "dtype": dtype or self.subject.dtype})
        model, self.vocabulary = subject.load()
        return model, self.vocabulary

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.vocabulary or self.shared()[1]

    def items(self, numbers: Sequence[int]) -> list[Item]:
        """Rows by number, as items."""
        return [make_item(self.tokenizer, self.rows[i], longest=self.settings.max_new_tokens) for i in numbers]

    def measure(self, attack: str, model: Any, items: Sequence[Item], **extra: Any) -> list[Record]:
        """Score and generate, and return the two records of it; `extra` goes into both."""
        settings = self.settings
        pad = self.tokenizer.pad_token_id
        found = score(model, [item.encoded for item in items], pad_token_id=pad, label=f"{attack}: scoring")
        likelihood = metrics.probability(metrics.average_loss(found.logprob))
        replies = generate(
            model,
            self.tokenizer,
            [item.ids[: item.start] for item in items],
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            expected_lengths=[len(item.ids) - item.start for item in items],
            label=f"{attack}: answering",
        )
        references = [item.reference for item in items]
        rouge = metrics.rouge_l(references, replies).recall
        common = {"attack": attack, "rows": [item.index for item in items], **extra}
        return [
            self.record("attack_rouge", rouge, **common, references=references, replies=replies),
            self.record("attack_probability", likelihood, **common),
        ]

    def record(self, metric: str, values: Array, **extra: Any) -> Record:
        """Return the mean of per-row values as a record of this model."""
        better = metrics.CATALOGUE[metric].higher_is_better
        per_item = [float(value) for value in values]
        return Record(self.name, metric, float(np.mean(values)), len(per_item), "strict", better, per_item, extra)
