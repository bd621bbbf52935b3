"""Settings of `alter attack`."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from alter.models import ModelSettings
from alter.plugins import NamesOf
from alter.settings import BatchSize, Count, OutFolder, Rows, Seed, Steps, Temperature, Tokens

OWN = (
    "relearn relearn_lora benign benign_lora relearn_searched quantize_8 quantize_4 prune_20 prune_50 wanda_20 wanda_50 paraphrase "
    "telegram reversed upper_case lower_case joined foreign_frame languages jailbreak dialogue hint few_shot evolve beginning prefill "
    "sample soft_prompt strip probe lens uds cka"
)
"""Names of alter's own attacks, `techniques.ATTACKS`, which loads what computes."""


class Relearning(BaseModel):
    """How the attacker trains: AdamW, constant rate, loss on answers, no dropout, float32."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    rows: Rows = Field(20, ge=1)
    """Forget rows (or, benign, unrelated rows) that the attacker has; never among the rows measured."""
    steps: list[Steps] = Field(default_factory=lambda: [2, 5, 10, 20])
    """Optimizer steps after which the model is measured."""
    batch_size: BatchSize = Field(10, ge=1)
    """Rows a step."""
    learning_rate: float = Field(2e-5, gt=0)
    """Learning rate of all weights; 2e-5 suits models of billions of weights, a small one needs more."""
    lora_learning_rate: float = Field(2e-4, gt=0)
    """Learning rate of the LoRA matrices."""
    lora_rank: Count = Field(8, ge=1)
    """Rank of the attacker's LoRA, on every linear layer; its scale is 2."""
    benign: str = "builtin:world_facts"
    """Unrelated rows or text for the benign attacks."""

    @field_validator("steps")
    @classmethod
    def _rising(cls, steps: list[int]) -> list[int]:
        if not steps or min(steps) < 1:
            raise ValueError("give one or more numbers of steps, each at least 1")
        return sorted(set(steps))


class Attack(ModelSettings):
    """Try to bring the forgotten back: by training, quantising, other wordings, prefilling, sampling, stripping."""

    forget: str
    """Rows that were forgotten: a file of rows or text, or NAME:SPLIT such as builtin:forget10."""
    retrained: str | None = None
    """The model that never saw them, the honest zero: folder, hub id or builtin:NAME. Without it no fraction."""
    original: str | None = None
    """The model before unlearning; by default `model` without its adapter."""
    attacks: Annotated[list[str], NamesOf(OWN, "alter.attacks.techniques", "ATTACKS")] = Field(default_factory=list)
    """Which attacks, by name or comma-separated; by default all that the data and the adapter allow."""
    out: OutFolder = "runs/attack"
    """Folder for results; what it already holds of the same models, data, settings and code is not run again."""
    rows: Rows = Field(64, ge=1)
    """Forget rows that are measured, chosen by the seed."""
    probe_rows: Rows = Field(400, ge=8)
    """Forget rows whose hidden states are compared and probed, at most."""
    probe_tokens: Tokens = Field(16, ge=1)
    """Tokens of each answer that the probe learns from or is tested on, at most."""
    seed: Seed = 0
    """Seed of the choice of rows, training, sampling and the probe's halves."""
    max_new_tokens: Tokens = Field(200, ge=1)
    """Longest reply, in tokens."""
    relearn: Relearning = Field(default_factory=Relearning)
    prefill_tokens: Tokens = Field(5, ge=1)
    """How many tokens of the true answer prefilling gives."""
    samples: Count = Field(8, ge=2)
    """Replies that sampling draws for each question."""
    temperature: Temperature = 0.8
    """Sampling temperature."""
    budget: str | None = None
    """Budget of a searching attack on each model: questions (400; rows shown in training count) or seconds (30s)."""
    soft_tokens: Count = Field(8, ge=1)
    """Vectors of the soft prompt."""
    batch_size: BatchSize = Field(64, ge=1)
    """Prompts in one generation batch."""

    @field_validator("budget", mode="before")
    @classmethod
    def _amount(cls, budget: object) -> object:
        given = str(budget).strip() if isinstance(budget, (int, float, str)) else budget
        if isinstance(given, str) and not re.fullmatch(r"0*[1-9]\d*|(?=.*[1-9])\d+(\.\d+)?s", given):
            raise ValueError(
                f"`budget` is {given!r}; expected a number of questions, such as 400, or of seconds, such as 30s"
            )
        return given
