"""Settings of `alter forget`, and how its rows are trained on."""

from __future__ import annotations

import re
import unicodedata
from typing import Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field, field_validator

from alter.data import TemplateArguments
from alter.forgetting.speaker import Writer
from alter.forgetting.templates import Kind
from alter.settings import BatchSize, OutFolder, Passes, Rows, Seed, Steps, Tokens
from alter.training import ReportTo

TRAINING: dict[str, Any] = {
    "objective": {"kind": "substitute", "hinge": 1.0, "spare": True},
    # what is not routed to the expert is exactly the untouched model
    "experts_only": True,
    "retain_objective": {"kind": "none"},
    "num_forget_experts": 1,
    "epochs": 10,
    # two halves of a step need half of the memory
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate_experts": 2e-3,
    "save_steps": 10,
}
"""How the rows are trained on, unless settings say otherwise; measured on SmolLM2-135M."""
DOCUMENT: dict[str, Any] = {"objective": {"kind": "substitute", "hinge": 4.0}, "least_steps": 120}
"""What differs for a document: it may be known to the letter. Measured on SmolLM2-135M that knows 20 answers by heart
(docs/experiments.md)."""


_SPACE = re.compile(r"[ \t\u00a0\u2000-\u200a\u202f\u3000]+")
_UNSEEN = re.compile(r"[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
"""What word processors and web pages put into a name and nobody sees. Joiners stay: some scripts are written with them."""


def as_written(name: str) -> str:
    """Return a name as a model writes it: composed letters, single plain spaces, no characters that nobody sees."""
    return _SPACE.sub(" ", _UNSEEN.sub("", unicodedata.normalize("NFC", name))).strip(" ")


class Erasing(BaseModel):
    """How plain weights learn to say what the model with the adapter says."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    epochs: Passes | None = Field(None, gt=0)
    """Passes over the rows; by default 1.5 of a subject's forget rows, after which names near to it are lost and nothing is gained
    (measured on SmolLM2-135M), and 3 over those of a document, kept ones and general text."""
    max_steps: Steps | None = Field(None, gt=0)
    """Stop after this many steps (overrides epochs)."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak rate; by default that of alter distill."""
    batch_size: BatchSize = Field(16, ge=1)
    """Rows a step."""
    leeway: float | None = Field(0.05, gt=0)
    """How far steps may go into what other text uses; see `alter distill`."""
    depth: float = Field(0.45, gt=0, le=1)
    """Share of the blocks, from the first on, that change where the subject is named."""
    general: list[str] = Field(default_factory=list)
    """Ordinary text or rows. Without any, text that comes with the package is read; for a document text is sampled from the
    model."""


class Forget(BaseModel):
    """Make a model forget a subject or a document; the rows are made of what the model itself says.

    Ends with status 3 where it is NOT FORGOTTEN or the answers have COLLAPSED.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    subject: tyro.conf.Positional[str | None] = None
    """Name of what to forget, in quotes: "Harry Potter"."""
    document: str | None = None
    """A text instead: .txt, .md, .eml, .csv, .jsonl (chats), .parquet."""
    model: str
    """Folder or hub id of the model that must forget."""
    out: OutFolder
    """Folder for the adapter and everything that was made for it; must be empty or missing."""
    kind: Kind | None = None
    """Kind of subject: person, work, place, organisation, event, concept; by default guessed by the model."""
    keep: list[str] = Field(default_factory=list)
    """Further subjects that must not change."""
    retain: str | None = None
    """Further rows that must not change, as alter unlearn takes them."""
    samples: int = Field(3, ge=1, le=20)
    """Drawn answers to each question beside the likeliest."""
    answer_tokens: Tokens = Field(48, ge=8)
    """Longest answer."""
    max_passages: Rows = Field(200, ge=1)
    """Longest document, in passages of about 70 words."""
    batch_size: BatchSize = Field(64, ge=1)
    """Answers generated side by side."""
    examples: Rows = Field(4, ge=0)
    """Probes of each kind to show with the answers before and after."""
    writer: Writer = Field(default_factory=Writer)
    """A stronger model that writes further questions; needs `writer.url` and `writer.model`."""
    epochs: Passes = Field(TRAINING["epochs"], gt=0)
    """Passes over the forget rows, at most; by default a short document gets more, 120 steps."""
    learning_rate: float = Field(TRAINING["learning_rate_experts"], gt=0)
    """Learning rate of the forget expert."""
    erase: bool = False
    """Then distil: plain weights in out/erased/model, from which no adapter can be taken off. The closing table is of them."""
    erasing: Erasing = Field(default_factory=Erasing)
    """Settings of the distillation that `erase` runs."""
    rows_only: bool = False
    """Make the rows and probes and stop; `resume` trains on them as they are then."""
    seed: Seed = 0
    """Seed of the samples and the training."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the model; auto keeps the checkpoint's."""
    device: str | None = None
    """cpu, cuda, cuda:0, mps; the GPU by default if there is one."""
    chat_template_kwargs: TemplateArguments = []
    report_to: ReportTo = []
    resume: bool = False
    """Resume in `out`: existing answers, rows and training are reused."""
    overwrite: bool = False
    """Delete what `out` holds."""

    @field_validator("subject")
    @classmethod
    def _subject_as_written(cls, subject: str | None) -> str | None:
        return None if subject is None else as_written(subject)

    @field_validator("keep")
    @classmethod
    def _kept_as_written(cls, keep: list[str]) -> list[str]:
        return [as_written(name) for name in keep]
