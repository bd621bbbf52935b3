"""Settings of one distillation, completed from an unlearning run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from alter.core import UserError
from alter.data import TemplateArguments
from alter.distillation.noise import Noise
from alter.settings import BatchSize, Count, OutFolder, Passes, Rows, Seed, Steps, Tokens
from alter.storage import read_run
from alter.training import ReportTo


class Shares(BaseModel):
    """Shares of the loss; those of kinds without rows fall to the others.

    In forget rows only the answers count, in all other rows every token: weighted by tokens, forgetting would be a small part
    of the loss.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    forget: float = Field(0.5, ge=0)
    """Share of the answers to forget rows, in all wordings."""
    keep: float = Field(0.35, ge=0)
    """Share of the kept rows."""
    general: float = Field(0.15, ge=0)
    """Share of the general text."""

    @model_validator(mode="after")
    def _check(self) -> Shares:
        if not self.forget + self.keep + self.general:
            raise ValueError("all shares are 0: give at least one that is larger")
        return self


class Attacker(BaseModel):
    """A simulated relearning attacker that the forgotten must withstand during training."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    rate: float = Field(0.0, ge=0)
    """Largest step of each weight; what a step takes is drawn between 0 and that. 0: no attacker."""
    steps: Steps = Field(2, ge=1)
    """Steps that the attacker takes, each towards the true answers of rows of its own."""
    rows: Rows = Field(8, ge=1)
    """Forget rows of each of its steps, drawn anew."""


class Distill(BaseModel):
    """Erase, not hide: plain weights learn to say what the unlearned model says.

    Ends with status 3 where the weights are found NOT FORGOTTEN or COLLAPSED.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    run: str | None = None
    """Folder of an unlearning run: its model, adapter, forget and retain rows, where they are not given."""
    model: str | None = None
    """The teacher's model: folder, hub id or builtin:NAME."""
    adapter: str | None = None
    """The teacher's adapter, of any method."""
    student: str | None = None
    """The model whose weights the student begins with; by default the teacher's model without its adapter."""
    forget: str | None = None
    """Rows that the teacher has forgotten: a file, or NAME:SPLIT."""
    retain: str | None = None
    """Rows that must not change, in the same forms."""
    neighbours: list[str] = Field(default_factory=list)
    """Further rows that must not change: what is near to the forgotten."""
    general: list[str] = Field(default_factory=list)
    """Ordinary text or rows. Without any, text is sampled from the teacher; with `names`, which only measure on it, text that
    comes with the package is read."""
    out: OutFolder
    """Folder of this run; must be empty or missing."""

    form: Literal["full", "lora"] = "full"
    """What is made: a whole model (full), or one plain PEFT LoRA on the student that loads without alter (lora)."""
    lora_rank: Count = Field(16, ge=1)
    """Rank of the LoRA, on every linear layer; its scale is 2."""
    noise: Noise = Field(default_factory=Noise)
    """Noise on the weights before training, so that hidden knowledge is destroyed; for form full."""
    shares: Shares = Field(default_factory=Shares)
    """Share of the loss of each kind of rows."""
    attacker: Attacker = Field(default_factory=Attacker)
    """A simulated relearning attacker that the forgotten must withstand during training."""
    names: list[str] = Field(default_factory=list)
    """Names of what is forgotten. With them only the feed-forward layers of the first blocks change, by what they compute at the
    tokens of these names in forget rows; `leeway` keeps what they compute elsewhere."""
    other_names: list[str] = Field(default_factory=list)
    """Names of others in kept rows and neighbours. With `names`, these rows train too, at the tokens of these names: what was
    said there before is to be said still, so that the forgotten is not forgotten of everybody."""
    depth: float = Field(0.45, gt=0, le=1)
    """Share of the blocks, from the first on, that change with `names`."""
    leeway: float | None = Field(None, gt=0)
    """Steps keep out of what kept rows and general text use: how large a direction of a layer's inputs may be there, beside the
    median one, for half of a step to be left in it. Smaller keeps more and forgets slower. Only matrices of blocks then train."""
    keep: Literal["teacher", "student"] = "student"
    """Whose distributions are the targets on kept rows and general text: the student's before any change, or the teacher's,
    which cost a router's two passes over every row and hold its mistakes."""
    forget_repeats: Count | None = Field(None, ge=0)
    """Repetitions of the forget rows, in each of their wordings, per epoch; by default so many that they are about half of
    all rows. 0 leaves them out."""
    rewordings: Count = Field(2, ge=0)
    """Other wordings of each forget question, for which the teacher's words on the question as given count."""
    sampled: Steps = Field(256, ge=1)
    """Without general text: how many texts are sampled from the teacher."""
    sampled_tokens: Tokens = Field(128, ge=8)
    """Length of each of them, in tokens."""

    seed: Seed = 0
    """Seed of noise, sampling and order."""
    max_length: Tokens | None = Field(None, ge=8)
    """Longest sequence in tokens; by default the model's context."""
    epochs: Passes = Field(3.0, gt=0)
    """Passes over all rows."""
    max_steps: Steps | None = Field(None, gt=0)
    """Stop after this many optimizer steps (overrides epochs)."""
    batch_size: BatchSize = Field(16, ge=1)
    """Rows a step."""
    tokens_per_pass: Tokens = Field(1024, ge=1)
    """A step's rows go through the student in passes of at most so many tokens, padding included: bounds memory, not what is learned."""
    accumulate: Count = Field(1, ge=1)
    """Batches whose gradients are averaged into one step."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak rate of AdamW; by default 5e-5, 5e-4 for a LoRA, and 7e-4 with names. A small model needs more."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    warmup: float = Field(0.03, ge=0, lt=1)
    """Share of the steps in which the rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: autocast of the student over float32 weights."""
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Number format of the saved weights; auto: the student's own."""
    gradient_checkpointing: bool = False
    """Recompute activations to save memory."""
    device: str | None = None
    """cpu, cuda, cuda:0, mps; the GPU by default if there is one."""
    chat_template_kwargs: TemplateArguments = []
    checkpoint_steps: Steps = Field(500, ge=1)
    """Write a checkpoint every so many steps."""
    log_steps: Steps = Field(10, ge=1)
    """Report the loss every so many steps."""
    closing_rows: Rows = Field(40, ge=0)
    """Rows of each set that are measured before, after and of the teacher at the end; 0: none."""
    report_to: ReportTo = []
    resume: bool = False
    """Resume from the last checkpoint in out."""
    overwrite: bool = False
    """Delete what is in out and start again."""

    @model_validator(mode="after")
    def _check(self) -> Distill:
        if self.resume and self.overwrite:
            raise ValueError("`resume` continues and `overwrite` starts again; give one of them")
        if self.run is None and (self.model is None or self.forget is None or self.retain is None):
            raise ValueError("give `run` (the folder of an unlearning run), or `model`, `forget` and `retain`")
        if self.form == "lora" and self.noise.alpha:
            raise ValueError("`noise.alpha` damages all weights, which a LoRA leaves as they are: give `form` full")
        if self.leeway is not None and self.noise.alpha:
            raise ValueError(
                "`leeway` keeps weights from what kept text uses, which has to be mended after `noise.alpha`: give one"
            )
        if self.names and self.attacker.rate:
            raise ValueError(
                "`attacker.rate` moves weights by what they compute at all tokens, `names` at few: give one"
            )
        if self.names and self.noise.alpha:
            raise ValueError("`noise.alpha` damages all weights, which `names` leaves as they are: give one")
        if self.names and self.forget_repeats == 0:
            raise ValueError("`names` train on forget rows, which `forget_repeats` 0 leaves out: give one")
        shares = {
            "forget": self.forget_repeats != 0,
            "keep": bool(self.other_names or not self.names),
            "general": not self.names,
        }
        if not any(trains and getattr(self.shares, name) for name, trains in shares.items()):
            there = ", ".join(name for name, trains in shares.items() if trains)
            raise ValueError(f"`shares` are 0 of all rows that train here ({there}): give one of them a share")
        for name in ("names", "other_names"):
            if any(not each.strip() for each in getattr(self, name)):
                raise ValueError(f"`{name}` holds an empty one: leave it out")
        if self.other_names and not self.names:
            raise ValueError("`other_names` are those beside the names of the forgotten: give `names` too")
        return self

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.learning_rate or (7e-4 if self.names else 5e-4 if self.form == "lora" else 5e-5)


def completed(settings: Distill) -> Distill:
    """Return the settings with teacher and rows filled in from the run's folder.

    Raises:
        UserError: the folder holds no finished run, or its result is no longer there; or the student would be the teacher
            itself.
    """
    found: dict[str, Any] = {}
    if settings.run is not None:
        folder = Path(settings.run)
        said = read_run(folder)["settings"]
        adapter, model = folder / "adapter", folder / "model"
        if settings.model is None and settings.adapter is None and not adapter.is_dir() and not model.is_dir():
            raise UserError(
                f"{settings.run} holds neither adapter/ nor model/: what was unlearned has been taken away, and without it "
                "nothing there has forgotten anything. Give it with `model` and `adapter`."
            )
        found = {
            "forget": said.get("forget"),
            "retain": said.get("retain") or str(folder / "retain.jsonl"),
            "student": said.get("model"),
        }
        found["model"] = str(model) if model.is_dir() else said.get("model")
        if not settings.chat_template_kwargs:
            settings = settings.model_copy(update={"chat_template_kwargs": said.get("chat_template_kwargs") or []})
        found["adapter"] = str(adapter) if adapter.is_dir() and settings.model is None else None
    given = {name: value for name in found if (value := getattr(settings, name)) is not None}
    whole = settings.model_copy(update=found | given)
    if whole.student is None:
        whole = whole.model_copy(update={"student": whole.model})
    if whole.adapter is None and whole.student == whole.model and not whole.noise.alpha:
        raise UserError(
            f"Teacher and student are both {whole.model}: there is nothing to learn. Give the teacher's `adapter`, another "
            "`student` (the model before unlearning), or `noise.alpha`."
        )
    return whole
