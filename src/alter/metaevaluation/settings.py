"""Settings of `alter meta-evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from alter.settings import BatchSize, Count, OutFolder, Passes, Rows, Seed, Tokens

READINGS = ("paraphrase", "telegram", "reversed", "upper_case", "foreign_frame", "prefill", "probe", "lens")
"""Attacks that read a model without changing it, and so can be tried as metrics."""


class Pools(BaseModel):
    """How the models are made that know the rows, and those that do not: from the retrained model, by training."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    seeds: list[Seed] = [0, 1, 2]
    """Seeds of the training; each makes one model of every kind and length."""
    passes: list[Annotated[Count, Field(ge=1)]] = [2, 4, 8]
    """Passes over the rows: from half learned to known by heart."""
    learning_rate: float = Field(1e-3, gt=0)
    """AdamW's learning rate of all weights."""
    batch_size: BatchSize = Field(20, ge=1)
    """Rows a step."""


class Relearn(BaseModel):
    """Training that tests a metric: all weights, AdamW at a constant rate, in float32."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    passes: Count = Field(1, ge=1)
    """Passes over the measured rows, for the robustness to relearning."""
    attack_passes: Count = Field(2, ge=1)
    """Passes over the attacker's rows, for the leak after an attack."""
    learning_rate: float = Field(2e-5, gt=0)
    """Learning rate of all weights; 2e-5 suits models of billions of weights, a small one needs more."""
    batch_size: BatchSize = Field(10, ge=1)
    """Rows a step."""


class MetaEvaluate(BaseModel):
    """Try every metric of forgetting on models of which it is known whether they know."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str
    """The original, which knows the rows: folder, hub id, or builtin:NAME."""
    retrained: str
    """Its twin that never saw them."""
    out: OutFolder
    """Folder for results; the same command resumes where it stopped."""
    split: Literal["forget01", "forget05", "forget10"] = "forget10"
    """What is forgotten."""
    data: str = "builtin"
    """TOFU's rows: the copy that comes with this package, a folder with its files, or a hub id."""
    rows: Rows = Field(100, ge=8)
    """Forget rows that are measured, drawn by the seed; also rows of the holdout and of the retain set, at most."""
    attacker_rows: Rows = Field(100, ge=1)
    """Other forget rows, which the attacker has."""
    holdout: str | None = None
    """Questions and answers that no model saw, for the membership attacks: a file, builtin:SPLIT, or a hub id; by default
    other forget questions with a wrong answer."""
    pools: Pools = Field(default_factory=Pools)
    methods: list[str]
    """Methods of `alter unlearn --method` that make the unlearned models, or names that `settings` explains."""
    seeds: list[Seed] = [0]
    """Seeds of the unlearning runs."""
    rates: list[Annotated[float, Field(gt=0)]] = [1.0, 0.3]
    """Multiples of each method's learning rates; each makes one model."""
    epochs: list[Annotated[Passes, Field(gt=0)]] = [2.0]
    """Passes over the forget set; each makes one model."""
    common: Annotated[dict[str, Any], tyro.conf.Fixed] = Field(default_factory=dict)
    """Settings of `alter unlearn` for every run, above those of its method. In a recipe only."""
    settings: Annotated[dict[str, dict[str, Any]], tyro.conf.Fixed] = Field(default_factory=dict)
    """Settings of `alter unlearn` by method, above all others; `method` says what is built on. Recipe only."""
    relearn: Relearn = Field(default_factory=Relearn)
    readings: list[str] = ["paraphrase", "prefill", "probe", "lens"]
    """Attacks of `alter attack` that are tried as metrics, of those that change no weight."""
    gradnorm: bool = True
    """Also try the membership attack by the gradient's norm: a backward per row."""
    samples: Count = Field(16, ge=2)
    """Replies sampled to each question, for leak@k with k 1, 2, 4 ... and this number."""
    questions: Rows = Field(60, ge=1)
    """Measured rows that are asked for leak@k."""
    reply_tokens: Tokens = Field(64, ge=1)
    """Longest sampled reply, in tokens."""
    utility_floor: float = Field(0.8, ge=0)
    """An unlearned model counts if its answers to keep have this share of the original's probability."""
    seed: Seed = 0
    """Seed of the choice of rows and of the sampling."""
    keep: bool = False
    """Keep the unlearned models' weights in `out`/models."""
    run: bool = True
    """Make and measure models; `run=False` only writes the table of those that are measured."""
    device: Literal["cpu", "cuda", "mps"] | None = None
    """Where models run; on the GPU by default if there is one."""

    @field_validator("readings")
    @classmethod
    def _only_read(cls, readings: list[str]) -> list[str]:
        wrong = [name for name in readings if name not in READINGS]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is none of the attacks that only read a model: {', '.join(READINGS)}")
        return list(dict.fromkeys(readings))

    @model_validator(mode="after")
    def _something(self) -> MetaEvaluate:
        lists: dict[str, Sequence[object]] = {
            "methods": self.methods,
            "seeds": self.seeds,
            "rates": self.rates,
            "epochs": self.epochs,
            "pools.seeds": self.pools.seeds,
            "pools.passes": self.pools.passes,
        }
        for name, values in lists.items():
            if not values:
                raise ValueError(f"{name} is empty, so there is no model to measure: give at least one")
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has a value twice, which would be the same model: give each once")
        return self
