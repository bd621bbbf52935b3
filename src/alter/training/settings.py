"""Settings of one unlearning run, the checks that need no model, and values derived from the settings alone."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from alter.core import UserError, processes
from alter.data import TemplateArguments
from alter.groundwork import Reinforcement
from alter.methods import (
    AlterAdapter,
    AnyAdapter,
    AnyGradient,
    AnyInitializer,
    CrossEntropy,
    ForgetObjective,
    InvertedHinge,
    Needs,
    Plain,
    RetainObjective,
    Zero,
    presets,
)
from alter.models import Bits
from alter.settings import BatchSize, Count, OutFolder, Passes, Rows, Seed, Steps, Tokens
from alter.training.routerfit import RouterFit
from alter.training.sampler import Sampler
from alter.training.trackers import ReportTo
from alter.training.watch import Watch

BRANCHES = ("forget", "alternative", "retain")
"""Kinds of rows in a step's batch, in this order."""


POLYNOMIAL_END = 1e-7
"""Rate at which transformers' polynomial schedule ends."""

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "sgd": "sgd",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
"""transformers' names of the optimizers."""


class Unlearn(BaseModel):
    """Settings of one unlearning run."""

    model_config = ConfigDict(extra="forbid")

    method: str | None = Field(
        None,
        description="Start from a published method's parts and settings; what else is given overrides. One of "
        f"{', '.join(presets.METHODS)}.",
    )

    model: str = Field(description="Folder or hub id of the model that must forget.")
    forget: str = Field(
        description="What to forget: a JSON or JSONL file, or NAME:SPLIT such as locuslab/TOFU:forget10."
    )
    retain: str | None = Field(
        None,
        description="What must not change, in the same forms. None: the untouched model's own answers to ordinary "
        "questions, and texts of its own, which the run writes to retain.jsonl.",
    )
    out: OutFolder = Field(description="Folder of this run; must be empty or missing.")

    domain_column: str | None = Field(
        None,
        description="Column that names each forget row's sub-domain (author, request). Cards, configurations and run.json carry the names.",
    )
    num_forget_experts: Count | None = Field(None, ge=1, description="Experts; by default one per sub-domain.")
    max_domains: Count = Field(8, ge=1, description="Most sub-domains that clustering may choose.")

    name_clusters: bool = Field(
        False,
        description="Name clusters after their rows' words, not by number. Cards, configurations and run.json carry the names.",
    )

    start_from: str | None = Field(
        None,
        description="Adapter of earlier requests to go on from. ALTER's grows: new experts beside its own, which stay "
        "bit-exact. A LoRA with a detector (O3) is trained on, and gets one more detector.",
    )
    experts_only: bool = Field(
        False,
        description="Train forget experts alone: A keeps its start, the retention expert stays zero, so that tokens "
        "routed to it get exactly the base model. Always so with start_from and ALTER's adapter.",
    )

    adapter: AnyAdapter = Field(default_factory=AlterAdapter)
    initializer: AnyInitializer = Field(default_factory=Zero)
    router_fit: RouterFit = Field(default_factory=RouterFit)
    reinforcement: Reinforcement = Field(default_factory=Reinforcement)
    objective: ForgetObjective = Field(default_factory=InvertedHinge)
    retain_objective: RetainObjective = Field(default_factory=CrossEntropy)
    gradient: AnyGradient = Field(default_factory=Plain)
    beta: float = Field(1.0, ge=0, description="Weight of the forget objective (Eq. 8).")
    gamma: float = Field(1.0, ge=0, description="Weight of the retain objective (Eq. 8).")
    lambda_: float = Field(
        0.01, ge=0, description="ALTER's adapter: weight of the loss on high-entropy tokens, which is what A learns."
    )
    phase_one: float = Field(
        0.0, ge=0, lt=1, description="ALTER's adapter: share of the steps that only learns high-entropy retain tokens."
    )
    retain_after: float = Field(
        0.0,
        ge=0,
        description="Epochs before retain rows join, in whole steps (the nearest, at least one): until then the forget "
        "objective alone.",
    )
    negate: float | None = Field(
        None, gt=0, description="After training, apply minus so many times what was learned (task arithmetic)."
    )

    sampler: Sampler = Field(default_factory=Sampler)
    epochs: Passes = Field(
        3, gt=0, description="Passes over the forget set; with a sampler that cycles, over the longer set."
    )
    least_steps: Steps = Field(
        0,
        ge=0,
        description="A run that would be shorter than so many steps passes over its forget set more often, whatever "
        "`epochs` says: few rows need more passes than many.",
    )
    batch_size: BatchSize = Field(
        4,
        ge=1,
        description="Forget rows a step; as many retain rows come with them. Several processes (accelerate launch) "
        "share them.",
    )
    gradient_accumulation_steps: Steps = Field(
        1,
        ge=1,
        description="Batches whose gradients, averaged, make a step: each counts alike, whatever its tokens. No more than an epoch has.",
    )
    learning_rate_experts: float = Field(
        1e-3, gt=0, description="ALTER's adapter: eta_B, the learning rate of the experts."
    )
    learning_rate_shared: float = Field(
        1e-5, ge=0, description="ALTER's adapter: eta_A, the learning rate of the shared A."
    )
    learning_rate: float = Field(1e-4, gt=0, description="Of everything but ALTER's adapter.")
    weight_decay: float = Field(0.0, ge=0, description="Of everything but ALTER's adapter.")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = Field("linear", description="How the rates change over the steps, as transformers names it.")
    warmup_steps: Steps = Field(0, ge=0, description="Optimiser steps over which the rate rises from 0.")
    warmup_epochs: Passes = Field(0.0, ge=0, description="The same, in passes over the forget set.")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="The same, as a share of all steps.")
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: Tokens | None = Field(
        None, ge=8, description="Longer rows become overlapping windows; by default the model's context."
    )
    chat_template_kwargs: TemplateArguments = []
    reference_top_k: Tokens = Field(256, ge=1, description="Tokens kept of each reference distribution.")
    gradient_checkpointing: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Bits | None = Field(
        None,
        description="Hold the frozen base's linear layers in 4bit (NF4) or 8bit (LLM.int8), with bitsandbytes; the adapter "
        "stays in float32.",
    )
    optimizer: Literal["adamw", "sgd", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        "adamw",
        description="AdamW; plain gradient descent; AdamW with its state in 8 bits (a quarter of the memory), or in pages that leave a full GPU for the "
        "CPU's memory, both by bitsandbytes. Worth it for adapter.kind full.",
    )
    bf16: bool = Field(False, description="Autocast to bf16.")
    seed: Seed = 0
    watch: Watch = Field(default_factory=Watch)
    closing_rows: Rows = Field(
        40, ge=0, description="Rows of each set to measure at the end, before and after; 0 leaves it out."
    )
    must_forget: bool = Field(
        False, description="End with exit status 3 where the closing finds NOT FORGOTTEN or COLLAPSED."
    )
    report_to: ReportTo = []
    save_steps: Steps = Field(200, ge=1, description="Steps between checkpoints to resume from.")
    trunk_gib: float = Field(
        8.0,
        ge=0,
        description="With adapter.from_layer, or a LoRA on upper blocks alone (adapter.depth): disk space, in `out`, for what the blocks below put out for the rows, "
        "which every step then reads instead of running these blocks. Where it is not enough, or 0, steps run all blocks.",
    )
    keep_working: bool = Field(
        False,
        description="Keep checkpoints and the frozen pass when the run has ended; rows that were forgotten can be read from "
        "them.",
    )
    resume: bool = Field(False, description="Resume from the last whole checkpoint in `out`.")
    overwrite: bool = Field(False, description="Delete what `out` holds.")
    max_steps: Steps | None = Field(None, ge=1, description="Stop after so many steps, whatever `epochs` says.")
    device: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _named_method(cls, given: Any) -> Any:
        return presets.expand(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _parts_fit(self) -> Unlearn:
        self.adapter.check(self)
        self.initializer.check(self)
        self.gradient.check(self)
        if self.phase_one and not self.retain_objective.needs.rows:
            raise ValueError("`phase_one` learns retain tokens: `retain_objective.kind` must not be none")
        if self.start_from is not None and self.negate is not None:
            raise ValueError("`negate` would also negate the adapter of `start_from`: leave it out")
        if not (self.objective.needs.rows or self.objective.needs.alternative or self.retain_objective.needs.rows):
            raise ValueError("`objective.kind` and `retain_objective.kind` are both none: there is nothing to train")
        return self

    @model_validator(mode="after")
    def _watched_rows(self) -> Unlearn:
        if self.watch.on and self.retain is None and self.watch.retain is None:
            raise ValueError(
                "watch needs rows that are kept and not trained on, and there is no retain set to set them aside from: give "
                "`watch.retain`, or `retain`"
            )
        return self

    @model_validator(mode="after")
    def _related_rows(self) -> Unlearn:
        if self.sampler.related and self.retain is None:
            raise ValueError(
                f"`sampler.order` {self.sampler.order} needs each retain row's relation to a forget row: give `retain`, or `sampler.order` "
                "mixed, sequential, random or cyclic"
            )
        return self

    @model_validator(mode="after")
    def _one_warm_up(self) -> Unlearn:
        given = [name for name in presets.WARM_UPS if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(f'`{name}` {getattr(self, name):g}' for name in given)} say the same in different units: give one"
            )
        return self

    @model_validator(mode="after")
    def _falls_to_its_end(self) -> Unlearn:
        rate = self.adapter.learning_rate(self)
        if self.lr_scheduler == "polynomial" and rate <= POLYNOMIAL_END:
            raise ValueError(
                f"`lr_scheduler` polynomial ends at a rate of {POLYNOMIAL_END:g}, and `{self.adapter.rate}` is {rate:g}: give a "
                "higher rate, or `lr_scheduler` linear"
            )
        return self

    @model_validator(mode="after")
    def _experts_alone(self) -> Unlearn:
        if self.start_from is not None and not self.adapter.trained_on:
            self.experts_only = True
        if self.experts_only:
            self.adapter.check_experts_only(self)
        return self

    @model_validator(mode="after")
    def _retain_rows_join(self) -> Unlearn:
        if not self.retain_after:
            return self
        forget, _, retain = branch_needs(self)
        if self.retain_after >= self.epochs:
            raise ValueError(
                f"`retain_after` is {self.retain_after:g} and `epochs` {self.epochs:g}, so that retain rows would never join: "
                "give a larger `epochs` or a smaller `retain_after`"
            )
        if self.phase_one:
            raise ValueError(
                "`phase_one` begins with retain rows alone and `retain_after` with forget rows alone: give `phase_one` 0 or "
                "`retain_after` 0"
            )
        if not retain.rows:
            why = "`experts_only` is on" if self.experts_only else "`retain_objective.kind` is none"
            raise ValueError(
                f"`retain_after` is {self.retain_after:g}, but {why}, so that no retain rows join: give 0"
            )
        if not self.beta or not (forget.rows or forget.alternative):
            raise ValueError(
                "`retain_after` begins with the forget objective alone: `objective.kind` must not be none, nor `beta` 0"
            )
        if retain.state:
            raise ValueError(
                f"`retain_objective.kind` {self.retain_objective.kind} weighs retain rows by their loss from the first step on, "
                "which `retain_after` leaves out: give `retain_after` 0 or another retain objective"
            )
        return self


def check_launch(run: Unlearn) -> None:
    """Refuse settings that several processes cannot run together.

    Raises:
        UserError: `batch_size` cannot be shared, `must_forget` where nothing is measured, or a sharded model is asked for with parts that need all of it.
    """
    if run.must_forget and (processes.size() > 1 or not run.closing_rows):
        why = "`closing_rows` 0" if not run.closing_rows else "several processes"
        raise UserError(f"With {why} nothing is measured at the end, which `must_forget` needs: leave it out.")
    if run.batch_size % processes.size():
        low = run.batch_size // processes.size() * processes.size()
        raise UserError(
            f"`batch_size` is {run.batch_size}, the rows of a step of all {processes.size()} processes together, and cannot be "
            f"shared evenly: give {low or processes.size()}{f' or {low + processes.size()}' if low else ''}."
        )
    if processes.launch() == "ddp":
        return
    whole = run.adapter.needs_whole_model()
    for wrong, what in (
        (run.watch.on, "watch"),
        (run.quantization is not None, "quantization"),
        # transformers then loads every model in pieces, the untouched one as well
        (processes.launch() == "zero3" and run.negate is not None, "negate under DeepSpeed"),
        (run.initializer.gives_factors, f"initializer.kind {run.initializer.kind}"),
        (run.gradient.splits, f"gradient.kind {run.gradient.kind}"),
        (whole is not None, whole),
    ):
        if wrong:
            raise UserError(
                f"{what} needs all of the model in each process: launch with DDP (recipes/accelerate/ddp.yaml)."
            )


def batches_of_step(run: Unlearn, count: int) -> int:
    """Return the number of batches accumulated in a step: at most those of an epoch with so many pairs."""
    return min(run.gradient_accumulation_steps, math.ceil(count / run.batch_size))


def lengthened(run: Unlearn, count: int) -> Unlearn:
    """Return the settings with as many epochs of so many pairs as `least_steps` asks for."""
    rows = run.batch_size * batches_of_step(run, count)
    return run.model_copy(update={"epochs": max(run.epochs, run.least_steps * rows / count)})


def steps_of(run: Unlearn, count: int) -> tuple[int, int]:
    """Return the optimizer steps of a run with so many pairs an epoch, and how many of them precede the retain rows.

    Raises:
        UserError: retain rows would join after the last step.
    """
    rows = run.batch_size * batches_of_step(run, count)
    steps = run.max_steps or math.ceil(run.epochs * count / rows)
    if not run.retain_after:
        return steps, 0
    # whole steps: no batch, and no gradient summed over batches, is of both phases
    alone = max(1, math.floor(run.retain_after * count / rows + 0.5))
    if alone >= steps:
        raise UserError(
            f"`retain_after` is {run.retain_after:g}, which is {alone} of the run's {steps} steps of {rows} forget rows: no "
            "step is left for retain rows to join. Give more epochs (or `max_steps`), or a smaller `batch_size`."
        )
    return steps, alone


def warmup_of(run: Unlearn, count: int, steps: int) -> int:
    """Return the warm-up's optimizer steps in a run of so many steps and pairs an epoch; at least one step has the full rate.

    An epoch is counted in whole steps, at least one, as the authors' `max(1, steps_per_epoch)` does.
    """
    wanted = run.warmup_steps
    if run.warmup_epochs:
        of_step = run.batch_size * batches_of_step(run, count)
        wanted = max(1, int(run.warmup_epochs * count / of_step))
    elif run.warmup_ratio:
        wanted = int(run.warmup_ratio * steps)
    return min(wanted, steps - 1)


def branch_needs(run: Unlearn) -> list[Needs]:
    """Return the objective's needs for each of `BRANCHES`; `rows` says whether the branch's rows take part at all."""
    forget, retain = run.objective.needs, run.retain_objective.needs
    if run.experts_only:
        # nothing learns from retain rows
        retain = Needs(rows=False)
    other = Needs(rows=forget.alternative is not None, base_logp=forget.base_logp and forget.alternative is not None)
    return [forget, other, retain]


def hidden_depth(run: Unlearn) -> float | None:
    """Return the share of the depth at which the objectives read hidden states; None where neither does.

    Raises:
        UserError: the forget and the retain objective name different ones.
    """
    depths = {part.needs.depth for part in (run.objective, run.retain_objective) if part.needs.depth is not None}
    if len(depths) > 1:
        raise UserError(
            f"`objective.depth` and `retain_objective.depth` are {' and '.join(f'{d:g}' for d in sorted(depths))}; a step reads "
            "hidden states of one block: give the same number."
        )
    return depths.pop() if depths else None
