"""One unlearning run, read downwards: `unlearn(settings)` checks, prepares, trains and saves.

A method is a combination of parts: what is trained (`tuning`), where it starts (`initializers`), what it does on forget
and on retain rows (`objectives`). `methods` names the published combinations.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from alter import frozen, methods, world
from alter.adapter import AlterConfig
from alter.adapter.config import PAPER_THRESHOLD
from alter.adapter.model import base_fingerprint
from alter.adapter.routing import Routing, pool
from alter.alternatives import alternatives, persona_views
from alter.data import Collator, Encoded, Example, check_overlap, domains, encode, load_examples
from alter.entropy import check_threshold, threshold_from_quantile
from alter.errors import UserError
from alter.frozen import Depth, states_of
from alter.head import Part, measuring
from alter.inference import FILE as FORM
from alter.inference import Form, Former, fit_detector
from alter.initializers import Factors, Fila, Initializer, Reglu, Zero
from alter.objectives import (
    Adaptive,
    CrossEntropy,
    Emitted,
    Forget,
    Hidden,
    InvertedHinge,
    KeepHidden,
    Labelled,
    Misdirect,
    Needs,
    Reference,
    Retain,
    mean_or_zero,
)
from alter.probes import low_rank, reinforce, starting_factors
from alter.quantized import Bits
from alter.records import digest, provenance, to_json, write_atomic
from alter.scoring import load_model
from alter.tuning import (
    Adapter,
    AlterAdapter,
    AssistantLora,
    BoundedLora,
    FullWeights,
    Lora,
    block_at,
    blocks,
    target_layers,
    target_names,
)
from alter.watch import KEPT, Watch, Watcher, read_watched

BRANCHES = ("forget", "alternative", "retain")
"""Kinds of rows in a step's batch, in this order."""


OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
"""What transformers' Trainer calls them."""


class RouterFit(BaseModel):
    """How the router learns which expert serves which token: one logistic regression per expert on hidden states."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(1000, ge=1)
    retain_weight: float = Field(
        30.0,
        gt=0,
        description="How much worse it is to open an expert for a retain token than to miss a forget token.",
    )
    learning_rate: float = Field(0.03, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    max_tokens: int = Field(150_000, ge=1, description="Tokens kept for the fit; drawn at random from all.")


class Reinforcement(BaseModel):
    """More training on the forget set, for objectives that aim away from its result; with LoRA of rank 16, alpha 32."""

    model_config = ConfigDict(extra="forbid")

    epochs: int = Field(1, ge=1, description="Passes over the forget set.")
    learning_rate: float = Field(1e-4, gt=0)


class Unlearn(BaseModel):
    """Settings of one unlearning run."""

    model_config = ConfigDict(extra="forbid")

    method: str | None = Field(
        None,
        description="Start from a published method's parts and settings; what else is given overrides. One of "
        f"{', '.join(methods.METHODS)}.",
    )

    model: str = Field(description="Folder or hub id of the model that must forget.")
    forget: str = Field(
        description="What to forget: a JSON or JSONL file, or NAME:SPLIT such as locuslab/TOFU:forget10."
    )
    retain: str = Field(description="What must not change, in the same forms.")
    out: str = Field(description="Folder of this run; must be empty or missing.")

    domain_column: str | None = Field(
        None, description="Column that names each forget row's sub-domain (author, request)."
    )
    num_forget_experts: int | None = Field(None, ge=1, description="Experts; by default one per sub-domain.")
    max_domains: int = Field(8, ge=1, description="Most sub-domains that clustering may choose.")

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

    adapter: Adapter = Field(default_factory=AlterAdapter)
    initializer: Initializer = Field(default_factory=Zero)
    router_fit: RouterFit = Field(default_factory=RouterFit)
    reinforcement: Reinforcement = Field(default_factory=Reinforcement)
    objective: Forget = Field(default_factory=InvertedHinge)
    retain_objective: Retain = Field(default_factory=CrossEntropy)
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

    epochs: float = Field(3, gt=0, description="Passes over the forget set.")
    batch_size: int = Field(
        4,
        ge=1,
        description="Forget rows a step; as many retain rows come with them. Several processes (accelerate launch) "
        "share them.",
    )
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate_experts: float = Field(1e-3, gt=0, description="ALTER's adapter: eta_B.")
    learning_rate_shared: float = Field(1e-5, ge=0, description="ALTER's adapter: eta_A.")
    learning_rate: float = Field(1e-4, gt=0, description="Of everything but ALTER's adapter.")
    weight_decay: float = Field(0.0, ge=0, description="Of everything but ALTER's adapter.")
    lr_scheduler: str = "linear"
    warmup_steps: int = Field(0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: int | None = Field(None, ge=8, description="Longer rows are cut; by default the model's context.")
    reference_top_k: int = Field(256, ge=1, description="Tokens kept of each reference distribution.")
    gradient_checkpointing: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Bits | None = Field(
        None,
        description="Hold the frozen base's linear layers in 4bit (NF4) or 8bit (LLM.int8), with bitsandbytes; the adapter "
        "stays in float32.",
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        "adamw",
        description="AdamW; with its state in 8 bits (a quarter of the memory), or in pages that leave a full GPU for the "
        "CPU's memory, both by bitsandbytes. Worth it for adapter.kind full.",
    )
    bf16: bool = Field(False, description="Autocast to bf16.")
    seed: int = 0
    watch: Watch = Field(default_factory=Watch)
    save_steps: int = Field(200, ge=1, description="Steps between checkpoints to resume from.")
    resume: bool = Field(False, description="Go on from the last whole checkpoint in `out`.")
    overwrite: bool = Field(False, description="Delete what `out` holds.")
    max_steps: int | None = Field(None, ge=1, description="Stop after so many steps, whatever `epochs` says.")
    device: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _named_method(cls, given: Any) -> Any:
        return methods.expand(given) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _parts_fit(self) -> Unlearn:
        adapter = self.adapter
        if isinstance(adapter, AlterAdapter):
            if adapter.entropy_threshold is not None and adapter.entropy_quantile is not None:
                raise ValueError("give either adapter.entropy_threshold or adapter.entropy_quantile, not both")
            if self.start_from is None and adapter.entropy_quantile is None:
                threshold = PAPER_THRESHOLD if adapter.entropy_threshold is None else adapter.entropy_threshold
                check_threshold(adapter.entropy_q, threshold, None)
            if self.phase_one and not adapter.retention_expert:
                raise ValueError(
                    "phase_one trains the retention expert and A through it, which adapter.retention_expert false leaves "
                    "out: give --phase-one 0, or leave it on"
                )
        elif self.objective.model_dump().get("only_low"):
            raise ValueError(
                f"objective.only_low needs the token entropies of adapter.kind alter, not {adapter.kind}: give "
                "--objective.no-only-low"
            )
        if not isinstance(self.initializer, Zero):
            if not isinstance(adapter, Lora):
                raise ValueError(
                    f"initializer.kind {self.initializer.kind} is for adapter.kind lora, not {adapter.kind}"
                )
            if adapter.dropout or self.weight_decay:
                raise ValueError(
                    f"initializer.kind {self.initializer.kind} starts from factors that a frozen copy cancels: "
                    "adapter.dropout and weight_decay must be 0"
                )
        if self.watch.on and (isinstance(adapter, (FullWeights, AssistantLora)) or self.negate is not None):
            raise ValueError(
                "watch looks at an adapter on the model while it trains: not with adapter.kind full or "
                "assistant, and not with negate"
            )
        if isinstance(adapter, AssistantLora):
            frozen_needs = [
                part.kind
                for part in (self.objective, self.retain_objective)
                if part.needs.views or part.needs.base_logp or part.needs.hidden
            ]
            if frozen_needs or self.negate is not None:
                raise ValueError(
                    f"adapter.kind assistant trains another model than the base, so it goes with neither negate nor "
                    f"objectives that compare with the base{' such as ' + frozen_needs[0] if frozen_needs else ''}: take "
                    "objective.kind learn and retain_objective.kind uniform"
                )
        if isinstance(adapter, Lora) and adapter.detector and self.watch.on:
            raise ValueError("watch looks at an adapter that is always on: not with adapter.detector")
        if self.quantization is not None and isinstance(adapter, FullWeights):
            raise ValueError(
                f"quantization {self.quantization} freezes the weights, which adapter.kind full trains: take adapter.kind "
                "lora, or leave quantization out"
            )
        if self.quantization is not None and isinstance(self.initializer, Fila):
            raise ValueError(
                f"initializer.kind fila takes gradients of the weights themselves, which quantization {self.quantization} "
                "rounds: take initializer.kind vila, reglu or zero, or leave quantization out"
            )
        if self.negate is not None and isinstance(adapter, BoundedLora):
            raise ValueError("negate cannot undo a bounded update: phi(-n x) is not -n phi(x); take adapter.kind lora")
        if self.phase_one and not self.retain_objective.needs.rows:
            raise ValueError("phase_one learns retain tokens: retain_objective.kind must not be none")
        if self.phase_one and not isinstance(adapter, AlterAdapter):
            raise ValueError(
                f"phase_one needs the token entropies of adapter.kind alter, not {adapter.kind}: leave it out, or give "
                "--phase-one 0"
            )
        if self.start_from is not None and not isinstance(self.initializer, Zero):
            raise ValueError(
                f"initializer.kind {self.initializer.kind} would replace the factors that start_from brings: leave it out"
            )
        if self.start_from is not None and self.negate is not None:
            raise ValueError("negate would turn round what start_from brings as well: leave it out")
        if not (self.objective.needs.rows or self.objective.needs.alternative or self.retain_objective.needs.rows):
            raise ValueError("objective.kind and retain_objective.kind are both none: there is nothing to train")
        return self

    @model_validator(mode="after")
    def _experts_alone(self) -> Unlearn:
        trained_on = isinstance(self.adapter, Lora) and self.adapter.detector
        if self.start_from is not None and not trained_on:
            self.experts_only = True
        if not self.experts_only:
            return self
        if not isinstance(self.adapter, AlterAdapter):
            raise ValueError(
                "experts_only is for adapter.kind alter, start_from for that and for adapter.kind lora with adapter.detector, "
                f"not for {self.adapter.kind}{' without' if isinstance(self.adapter, Lora) and not trained_on else ''}"
            )
        if self.phase_one:
            raise ValueError("phase_one trains A and the retention expert, which experts_only (or start_from) freezes")
        if self.adapter.router == "static":
            raise ValueError("experts_only needs a router that keeps the experts apart; adapter.router is 'static'")
        needs = self.objective.needs
        if self.start_from is not None and (needs.alternative == "diversion" or set(needs.views) - {"base"}):
            raise ValueError(
                f"objective.kind {self.objective.kind} looks at the bare base, which start_from has adapted"
            )
        return self

    @model_validator(mode="after")
    def _retain_rows_join(self) -> Unlearn:
        if not self.retain_after:
            return self
        forget, _, retain = branch_needs(self)
        if self.retain_after >= self.epochs:
            raise ValueError(
                f"retain_after is {self.retain_after:g} and epochs {self.epochs:g}, so that retain rows would never join: "
                "give a larger epochs or a smaller retain_after"
            )
        if self.phase_one:
            raise ValueError(
                "phase_one begins with retain rows alone and retain_after with forget rows alone: give --phase-one 0 or "
                "--retain-after 0"
            )
        if not retain.rows:
            why = "experts_only is on" if self.experts_only else "retain_objective.kind is none"
            raise ValueError(f"retain_after is {self.retain_after:g}, but {why}, so that no retain rows join: give 0")
        if not self.beta or not (forget.rows or forget.alternative):
            raise ValueError(
                "retain_after begins with the forget objective alone: objective.kind must not be none, nor beta 0"
            )
        if isinstance(self.retain_objective, Adaptive):
            raise ValueError(
                "retain_objective.kind adaptive compares with the retain loss of the first epoch, which retain_after "
                "leaves out: give --retain-after 0 or another retain objective"
            )
        return self


@dataclass(frozen=True)
class Rows:
    """The data of a run, encoded: forget rows with the expert of each (1 is the first), and retain rows.

    `alternative` holds the forget rows once more in the form that the objective asks for, if it does.
    """

    forget: list[Encoded]
    retain: list[Encoded]
    expert: list[int]
    alternative: list[Encoded] = field(default_factory=list)

    def of(self, branch: str) -> list[Encoded]:
        """The rows of one of `BRANCHES`."""
        return {"forget": self.forget, "alternative": self.alternative, "retain": self.retain}[branch]


def prepare_folder(run: Unlearn) -> Path:
    """Return the run's folder, made if it is missing.

    Raises:
        UserError: it holds something, and neither `resume` nor `overwrite` is set; or both are.
    """
    out = Path(run.out)
    if run.resume and run.overwrite:
        raise UserError("resume and overwrite contradict each other: give one of them.")
    if out.exists() and not out.is_dir():
        raise UserError(f"out is {run.out!r}, which is a file; give a folder.")
    if out.is_dir() and any(out.iterdir()):
        if run.overwrite:
            if run.start_from is not None and Path(run.start_from).resolve().is_relative_to(out.resolve()):
                raise UserError(
                    f"overwrite would delete {run.start_from}, which start_from goes on from: give another out."
                )
            shutil.rmtree(out)
        elif not run.resume:
            raise UserError(
                f"The output folder {run.out} is not empty: add --resume to go on from its last checkpoint, "
                "--overwrite to delete it, or give another --out."
            )
    elif run.resume:
        raise UserError(f"Nothing to resume: {run.out} is empty or missing. Leave --resume out to start.")
    out.mkdir(parents=True, exist_ok=True)
    return out


def read_data(run: Unlearn) -> tuple[list[Example], list[Example], list[int], list[str]]:
    """Read and check the data before any model is loaded: both sets, their overlap, and the sub-domains."""
    forget = load_examples(run.forget, domain_column=run.domain_column)
    retain = load_examples(run.retain)
    check_overlap(forget, retain)
    if run.num_forget_experts == 1:
        return forget, retain, [0] * len(forget), ["all"]
    if run.domain_column is None and run.num_forget_experts is not None:
        index, names = domains(forget, n=run.num_forget_experts, seed=run.seed)
    else:
        index, names = domains(forget, seed=run.seed, max_domains=run.max_domains)
    if run.num_forget_experts is not None and run.num_forget_experts < len(names):
        raise UserError(
            f"num_forget_experts is {run.num_forget_experts}, but column {run.domain_column!r} names {len(names)} "
            f"sub-domains. Give at least {len(names)}, or leave domain_column out to cluster into fewer."
        )
    return forget, retain, index, names


def steps_of(run: Unlearn, count: int) -> tuple[int, int]:
    """Optimiser steps of a run with so many forget rows, and how many of them come before retain rows join.

    Raises:
        UserError: retain rows would join after the last step.
    """
    rows = run.batch_size * run.gradient_accumulation_steps
    steps = run.max_steps or math.ceil(run.epochs * count / rows)
    if not run.retain_after:
        return steps, 0
    # whole steps: no batch, and no gradient summed over batches, is of both phases
    alone = max(1, math.floor(run.retain_after * count / rows + 0.5))
    if alone >= steps:
        raise UserError(
            f"retain_after is {run.retain_after:g}, which is {alone} of the run's {steps} steps of {rows} forget rows: no "
            "step is left for retain rows to join. Give more epochs (or max_steps), or a smaller batch_size."
        )
    return steps, alone


Order = list[tuple[int, int | None]]
"""Forget row and retain row of every pair, in the order of training; None: no retain row."""


def schedule(
    forget_lengths: Sequence[int],
    retain_lengths: Sequence[int],
    *,
    epochs: float,
    batch: int,
    seed: int,
    alone: int = 0,
) -> Order:
    """Which forget row meets which retain row, in the order of training; a function of its arguments alone.

    Every epoch takes each forget row once. Retain rows are taken without replacement until all have been seen. Rows of
    similar length are brought together within groups of eight batches, which saves padding; of a small forget set within
    halves, so that batches differ from epoch to epoch. The first `alone` forget rows go without a retain row.
    """
    generator = np.random.default_rng(seed)
    total = math.ceil(epochs * len(forget_lengths))
    pairs: list[tuple[int, int]] = []
    pool: list[int] = []
    group_size = batch * min(8, math.ceil(len(forget_lengths) / (2 * batch)))
    while len(pairs) < total:
        begun = len(pairs)
        order = generator.permutation(len(forget_lengths))[: total - len(pairs)]
        while len(pool) < len(order):
            pool.extend(generator.permutation(len(retain_lengths)).tolist())
        drawn, pool = pool[: len(order)], pool[len(order) :]
        batches = []
        for start in range(0, len(order), group_size):
            f = sorted(order[start : start + group_size].tolist(), key=lambda i: forget_lengths[i])
            r = sorted(drawn[start : start + group_size], key=lambda i: retain_lengths[i])
            group = list(zip(f, r, strict=True))
            batches += [group[i : i + batch] for i in range(0, len(group), batch)]
        # a short batch stays last, so that every other step has the full size
        whole = [b for b in batches if len(b) == batch]
        rest = [b for b in batches if len(b) < batch]
        for i in generator.permutation(len(whole)):
            pairs += whole[i]
        pairs += [pair for b in rest for pair in b]
        # a retain row that is left out is still to be seen
        pool = [r for _, r in pairs[begun:alone]] + pool
    return [(f, None if i < alone else r) for i, (f, r) in enumerate(pairs)]


def add_adapter(
    model: Any,
    run: Unlearn,
    names: list[str],
    start: Mapping[str, Factors] | None = None,
    former: Former | None = None,
) -> Any:
    """Put the run's adapter on a loaded model, or choose the weights to train.

    ALTER's adapter of `start_from`, which the model has then, gets room for `names`.

    Args:
        model: the base model.
        run: the settings.
        names: names of the sub-domains.
        start: where LoRA's factors start, with an initialiser that gives some.
        former: the LoRA of earlier requests that is trained on.

    Raises:
        UserError: the adapter to grow is not ALTER's, has other settings than asked for, or serves a name already.
    """
    adapter = run.adapter
    if run.start_from is not None and former is None:
        config = model.peft_config["default"]
        if not isinstance(config, AlterConfig) or not config.routed:
            raise UserError(f"start_from is {run.start_from!r}, which is no ALTER adapter with a router to grow.")
        for name in sorted(adapter.model_fields_set - {"kind", "isolation", "entropy_quantile"}):
            wanted, has = getattr(adapter, name), getattr(config, name)
            if isinstance(has, set) and isinstance(wanted, (list, tuple)):
                wanted, has = sorted(wanted), sorted(has)
            if wanted is not None and wanted != has:
                raise UserError(f"adapter.{name} is {wanted!r}, but {run.start_from} has {has!r}: leave it out.")
        own = config.domains or [f"expert {d + 1}" for d in range(config.num_forget_experts)]
        taken = [name for name in names if name in own]
        if taken:
            raise UserError(f"{run.start_from} has an expert for {taken[0]!r} already: nothing to add for it.")
        model.base_model.resize_experts("default", len(own) + len(names), own + names)
        config.inference_mode = False
        return model
    if isinstance(adapter, AlterAdapter):
        return adapter.attach(model, names, run.num_forget_experts or len(names))
    if isinstance(adapter, Lora):
        return adapter.attach(model, start, run.model, former)
    return adapter.attach(model)


def fit_router(model: Any, run: Unlearn, rows: Rows, pad_token_id: int) -> dict[str, float]:
    """Set the entropy threshold and train the router, both on the frozen base, before the adapter trains.

    The router reads hidden states of the frozen base, which no training step changes, so it is fitted once instead of
    next to the task losses: for every new expert one logistic regression, its own forget rows against all other rows;
    the retention expert's logit is 0. So a row of the router depends on no other expert's, and an expert that comes
    later leaves it as it is. This is a reading of the paper, like the supervision itself.

    The literal gate (router="entropy", Eq. 7) has no bias, and its W_g stays as drawn, N(0, 1): no value of one scalar
    tells one row from another, and at the low temperature the softmax passes no gradient. That too is a reading. As
    entropies are positive, the expert with the largest weight takes all low-entropy tokens.

    Returns:
        what was found: the threshold, the share of tokens routed as their row says, per kind of row.
    """
    assert isinstance(run.adapter, AlterAdapter)
    generator = np.random.default_rng(run.seed)
    config = model.peft_config["default"]
    parts: list[list[int]] = []
    left = run.router_fit.max_tokens
    # forget rows take half at most; retain rows, of which there are more, take what is left
    for encoded, limit in ((rows.forget, left // 2), (rows.retain, left)):
        chosen, total = [], 0
        for i in generator.permutation(len(encoded)).tolist():
            if total >= min(limit, left):
                break
            chosen.append(i)
            total += len(encoded[i].input_ids)
        left -= total
        parts.append(chosen)
    chosen_rows = [rows.forget[i] for i in parts[0]] + [rows.retain[i] for i in parts[1]]
    traced = frozen.trace_rows(
        model, chosen_rows, pad_token_id=pad_token_id, label="router", features=config.router == "learned"
    )
    found: dict[str, float] = {}
    if run.start_from is None and run.adapter.entropy_quantile is not None:
        retain_entropy = torch.cat([row.entropy for row in traced[len(parts[0]) :] if row.entropy is not None])
        config.entropy_threshold = threshold_from_quantile(retain_entropy, run.adapter.entropy_quantile)
        check_threshold(config.entropy_q, config.entropy_threshold, config.vocab_size)
    found["entropy_threshold"] = float(config.threshold)
    if config.router == "static":
        return found
    inputs, targets = [], []
    for place, row in enumerate(traced):
        assert row.entropy is not None
        evidence = row.entropy[:, None] if row.features is None else row.features.float()
        label = rows.expert[parts[0][place]] if place < len(parts[0]) else 0
        # the first token of a row has no evidence and is never routed
        evidence = pool(evidence[None, 1:], torch.ones(1, len(evidence) - 1), config.router_memory)[0]
        inputs.append(evidence)
        targets.append(torch.full((len(evidence),), label))
    x, y = torch.cat(inputs), torch.cat(targets)
    new = sorted(set(rows.expert))
    _, host = model.base_model.router_host
    router = host.alter_router["default"].requires_grad_(False)
    if config.router == "entropy":
        # an adapter that grows keeps the rows that it has
        first = 0 if run.start_from is None else min(new)
        drawn = torch.from_numpy(generator.standard_normal((len(router.weight) - first, 1)))
        router.weight[first:], router.bias[first:] = drawn.to(router.weight), 0.0
    else:
        weight, bias = _regress(x, y, new, run.router_fit, generator)
        # the fit is done on the CPU, wherever the model is
        router.weight[new], router.bias[new] = weight.to(router.weight), bias.to(router.bias)
        if run.start_from is None:
            router.weight[0], router.bias[0] = 0.0, 0.0
    if run.start_from is None:
        # spare experts are never chosen
        router.bias[max(new) + 1 :] = -1e4
    fitted = torch.nn.functional.linear(x, router.weight.to(x), router.bias.to(x))
    right = fitted.argmax(-1) == y
    found["router_accuracy_forget"] = float(right[y > 0].float().mean())
    found["router_accuracy_retain"] = float(right[y == 0].float().mean())
    return found


def _regress(
    x: Tensor, y: Tensor, new: Sequence[int], fit: RouterFit, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """One logistic regression for each of the `new` experts: tokens x [T, D] of its own rows (y [T] names it) or not.

    Returns:
        weights [len(new), D] and biases [len(new)].
    """
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / std
    is_own = y[:, None] == torch.tensor(new)
    head = torch.nn.Linear(x.shape[1], len(new))
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=fit.learning_rate, weight_decay=fit.weight_decay)
    of_forget, of_retain = (y > 0).nonzero()[:, 0], (y == 0).nonzero()[:, 0]
    for step in range(fit.steps):
        for group in optimizer.param_groups:
            group["lr"] = fit.learning_rate * (1 - step / fit.steps)
        drawn = [part[torch.from_numpy(generator.integers(len(part), size=1024))] for part in (of_forget, of_retain)]
        batch = torch.cat(drawn)
        own, logits = is_own[batch], head(x[batch])
        hit = torch.nn.functional.softplus(-logits)[own].mean()
        miss = torch.nn.functional.softplus(logits)[~own].mean()
        loss = hit + fit.retain_weight * miss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = (head.weight / std).detach()
    return weight, (head.bias - weight @ mean).detach()


Traced = dict[str, dict[int, frozen.Row]]


class PairCollator:
    """Lay the rows of a step into one batch, forget rows first, with their routes and what the frozen base knows.

    An item holds a dict per branch that takes part: `encoded`, `row` (of the frozen base) and `expert`.
    """

    def __init__(self, pad_token_id: int) -> None:
        # few different shapes: the allocator can then give a step the memory of the last one
        self.collate = Collator(pad_token_id, multiple_of=16)

    def __call__(self, pairs: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
        present = [name for name in BRANCHES if name in pairs[0]]
        items = [pair[name] for name in present for pair in pairs]
        batch: dict[str, Any] = self.collate(
            [{"input_ids": item["encoded"].input_ids, "labels": item["encoded"].labels} for item in items]
        )
        shape = batch["input_ids"].shape
        if items[0]["row"].gates is not None:
            batch["gates"] = torch.zeros(*shape, items[0]["row"].gates.shape[-1])
            # padding counts as high: it is never labelled and must not look like knowledge
            batch["entropy"] = torch.full(shape, torch.inf)
            for place, item in enumerate(items):
                length = len(item["row"].entropy)
                batch["gates"][place, :length] = item["row"].gates
                batch["entropy"][place, :length] = item["row"].entropy
        batch["expert"] = torch.tensor([item["expert"] for item in items])
        # a row that only fills up the batch belongs to no branch
        batch["branch"] = torch.tensor(
            [-1 if pair[name].get("fills") else BRANCHES.index(name) for name in present for pair in pairs]
        )
        for name in present:
            rows = [pair[name]["row"] for pair in pairs]
            if rows[0].reference is not None:
                batch[f"{name}_ids"] = torch.cat([row.reference.ids for row in rows]).long()
                batch[f"{name}_logp"] = torch.cat([row.reference.logp for row in rows]).float()
            if rows[0].base_logp is not None:
                batch[f"{name}_base_logp"] = torch.cat([row.base_logp for row in rows]).float()
            if rows[0].hidden is not None:
                batch[f"{name}_hidden"] = torch.cat([row.hidden for row in rows])
        return batch


class Pairs(torch.utils.data.Dataset):
    """The schedule as a dataset: item i is the i-th pair of a forget and a retain row, in the branches that are traced.

    A pair without a retain row has no such branch. The last items fill up a multiple of `whole`: pairs that go through the model and count for nothing.
    """

    def __init__(self, order: Order, rows: Rows, traced: Traced, whole: int = 1) -> None:
        self.order, self.rows, self.traced, self.whole = order, rows, traced, whole

    def __len__(self) -> int:
        return -(-len(self.order) // self.whole) * self.whole

    def __getitem__(self, i: int) -> dict[str, dict[str, Any]]:
        if i >= len(self.order):
            return {name: self._filling(item) for name, item in self[len(self.order) - 1].items()}
        f, r = self.order[i]
        chosen = {
            "forget": (f, self.rows.expert[f]),
            "alternative": (f, self.rows.expert[f]),
            "retain": (r, 0),
        }
        return {
            name: {"encoded": self.rows.of(name)[row], "row": self.traced[name][row], "expert": expert}
            for name, (row, expert) in chosen.items()
            if name in self.traced and row is not None
        }

    @staticmethod
    def _filling(item: dict[str, Any]) -> dict[str, Any]:
        """The same row without anything that is learned from."""
        row = item["row"]
        reference = row.reference and Reference(row.reference.ids[:0], row.reference.logp[:0])
        cut = {name: getattr(row, name)[:0] for name in ("base_logp", "hidden") if getattr(row, name) is not None}
        encoded = dataclasses.replace(item["encoded"], labels=[-100] * len(item["encoded"].labels))
        return {**item, "encoded": encoded, "row": dataclasses.replace(row, reference=reference, **cut), "fills": True}


@dataclass(frozen=True)
class Penalty:
    """weight * sum over terms of |C M|_F^2 for constant matrices C and parameters M, which a function views."""

    weight: float
    terms: list[tuple[Tensor, torch.nn.Parameter, bool]]
    r: int

    def __call__(self) -> Tensor:
        """The penalty now; M is lora_B's first r columns, or lora_A's first r rows transposed."""
        parts = [
            (constant @ (parameter[: self.r].t() if transposed else parameter[:, : self.r])).square().sum()
            for constant, parameter, transposed in self.terms
        ]
        return self.weight * torch.stack(parts).sum()


class FirstEpoch(TrainerCallback, ExportableState):
    """Mean of the retain loss in the first epoch, which `Adaptive` compares with; saved with every checkpoint."""

    def __init__(self, total: float = 0.0, count: int = 0) -> None:
        self.total, self.count = total, count

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"total": self.total, "count": self.count}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over what the checkpoint of a resumed run has kept."""
        kept = state.stateful_callbacks.get(type(self).__name__)
        if kept:
            self.total, self.count = kept["args"]["total"], kept["args"]["count"]

    def weight(self, loss: float, first: bool) -> float:
        """The retain weight of a step, given its loss and whether the first epoch still runs."""
        if first:
            self.total += loss
            self.count += 1
            return Adaptive.multiplier(0.0)
        return Adaptive.multiplier(loss - self.total / max(self.count, 1))


class UnlearnTrainer(Trainer):
    """transformers' Trainer with the run's loss (ALTER Eq. 8), gradient isolation and learning rates.

    Args:
        run: the settings.
        threshold: entropy above which a token is high.
        num_experts: experts of ALTER's adapter, the retention expert included.
        depth: where the objectives read hidden states, if they do.
        penalty: of the parameters, added to the loss.
        alone: steps before retain rows join.
    """

    def __init__(
        self,
        run: Unlearn,
        threshold: float,
        num_experts: int,
        depth: Depth | None = None,
        penalty: Penalty | None = None,
        alone: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.run, self.threshold, self.num_experts = run, threshold, num_experts
        self.depth, self.penalty, self.alone = depth, penalty, alone
        # RMU reads nothing behind its block; trained weights there must still take part, for DDP waits for them
        labels = any(needs.rows and needs.labels for needs in branch_needs(run))
        behind = [weight for block in (depth.behind if depth else ()) for weight in block.parameters()]
        self.only_states = not labels and not any(weight.requires_grad for weight in behind)
        # our loss is a mean per step, so the trainer itself divides by the accumulation steps
        self.model_accepts_loss_kwargs = False
        self.parts: dict[str, Tensor] = {}

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """One forward for all rows of the step together; see `Unlearn` for the weights of the terms."""
        run = self.run
        labels, branch = inputs["labels"], inputs["branch"]
        options: dict[str, Any] = {}
        high = torch.zeros_like(labels, dtype=torch.bool)
        if "gates" in inputs:
            assert isinstance(run.adapter, AlterAdapter)
            high = inputs["entropy"] > self.threshold
            # row b may move only its own expert, and A only through high-entropy tokens (strict gradient isolation)
            allowed = torch.nn.functional.one_hot(inputs["expert"], self.num_experts).bool()
            allowed = allowed[:, None, :].expand(-1, labels.shape[1], -1)
            isolated = (allowed, high) if run.adapter.isolation else (None, None)
            options["alter_routing"] = Routing(inputs["gates"].float(), *isolated)
        wanted = torch.tensor([needs.labels for needs in branch_needs(run)], device=labels.device)
        positions = frozen.labelled(labels) & wanted[branch][:, None]
        truth = labels[:, 1:][positions[:, :-1]]
        # the token's own entropy: that of the step that generated it
        token_high = high[:, 1:][positions[:, :-1]]
        of_branch = branch[:, None].expand_as(positions)[positions]
        counts = torch.bincount(of_branch, minlength=len(BRANCHES)).tolist()
        starts = [sum(counts[:i]) for i in range(len(BRANCHES))]
        phase_one = self.state.global_step < run.phase_one * self.state.max_steps

        def measure(name: str) -> Callable[[Tensor, slice], Tensor]:
            """What a branch needs of its tokens' logits: the negative log-likelihood, and its objective's own number."""
            objective = {"forget": run.objective, "retain": run.retain_objective}.get(name)
            reference = None
            if f"{name}_ids" in inputs:
                reference = Reference(inputs[f"{name}_ids"], inputs[f"{name}_logp"])
            runner_up = objective is not None and objective.needs.runner_up
            labels_of = truth[starts[BRANCHES.index(name)] :]

            def of(logits: Tensor, at: slice) -> Tensor:
                emitted = Emitted(logits, labels_of[at], reference and reference.at(at), runner_up)
                value = emitted.nll if objective is None else objective.per_token(emitted)
                # without a weight the structure term is only reported
                return torch.stack([emitted.nll if run.lambda_ or phase_one else emitted.nll.detach(), value], 1)

            return of

        # rows come branch after branch
        made = [Part(count, measure(name)) for count, name in zip(counts, BRANCHES, strict=True)]
        reading = states_of(self.depth, self.only_states)
        with measuring(self.accelerator.unwrap_model(model), positions, made), reading as hidden:
            values = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **options).logits
        nll = values[:, 0]
        number = torch.arange(len(branch), device=labels.device)

        def part(name: str) -> Labelled:
            members = branch == BRANCHES.index(name)
            row = number - number[members].min() if members.any() else number
            mask = of_branch == BRANCHES.index(name)
            states = None
            if hidden:
                real = inputs["attention_mask"].bool() & members[:, None]
                of_token = row[:, None].expand_as(real)[real]
                states = Hidden(hidden[0][real], of_token, inputs.get(f"{name}_hidden"))
            return Labelled(
                values[mask, 1],
                token_high[mask],
                row[:, None].expand_as(positions)[positions][mask],
                int(members.sum()),
                inputs.get(f"{name}_base_logp"),
                part("alternative") if name == "forget" else None,
                states,
            )

        forget, retain = part("forget"), part("retain")
        if phase_one:
            loss = run.gamma * mean_or_zero(nll[(of_branch == BRANCHES.index("retain")) & token_high])
            loss = loss + 0.0 * values.sum()
            self.parts, loss, whole = {}, world.size() * loss, world.total(loss)
        else:
            # labels that an alternative makes up are no structure
            structure = mean_or_zero(nll[token_high & (of_branch != BRANCHES.index("alternative"))])
            joined = branch_needs(run)[-1].rows and self.state.global_step >= self.alone
            parts = {
                "forget": run.objective(forget),
                "retain": run.retain_objective(retain) if joined else 0.0 * values.sum(),
                "structure": structure,
            }
            if isinstance(run.retain_objective, Adaptive):
                once = len(self.train_dataset.rows.forget) / (run.batch_size * run.gradient_accumulation_steps)
                first = self.state.global_step < math.ceil(once)
                parts["retain"] = parts["retain"] * self.first_epoch.weight(float(world.total(parts["retain"])), first)
            forgetting, keeping = run.beta * parts["forget"], run.gamma * parts["retain"]
            if run.objective.joint and run.retain_objective.needs.labels:
                # two means, each weighted by its share of the tokens of all processes, are the one over both
                *learned, kept = world.total(nll.new_tensor(counts)).unbind()
                share = kept / (sum(learned) + kept).clamp_min(1.0)
                forgetting, keeping = (1 - share) * forgetting, share * keeping
            loss = forgetting + keeping
            if run.lambda_:
                loss = loss + run.lambda_ * parts["structure"]
            # every process has its share of the means: their sum is the loss, and its gradient the average of what follows
            *terms, whole = world.total(torch.stack([*parts.values(), loss])).unbind()
            self.parts = dict(zip(parts, terms, strict=True))
            loss = world.size() * loss
            if self.penalty is not None:
                # a function of the weights alone, the same everywhere
                penalty = self.penalty()
                self.parts["penalty"] = penalty.detach()
                loss, whole = loss + penalty, whole + penalty.detach()
        if not torch.isfinite(whole):
            rate = "learning_rate_experts" if isinstance(run.adapter, AlterAdapter) else "learning_rate"
            raise UserError(
                f"The loss is {whole.item()} at step {self.state.global_step + 1}: training stops, and the last good "
                f"checkpoint stays in {self.args.output_dir}. Lower {rate} or max_grad_norm."
            )
        if world.size() > 1:
            # DDP waits for the gradient of every weight that took part; what is reported is the loss of all processes
            loss = loss + 0.0 * values.nan_to_num(0.0, 0.0, 0.0).sum()
            loss = loss + (whole - loss).detach()
        return (loss, values) if return_outputs else loss

    def whole_weights(self) -> dict[str, Tensor] | None:
        """All weights of a sharded model, gathered into the first process; None if it holds them all anyway."""
        if not world.sharded(self.model):
            return None
        return self.accelerator.get_state_dict(self.model_wrapped)

    @property
    def first_epoch(self) -> FirstEpoch:
        """The callback that remembers the first epoch."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, FirstEpoch))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the terms of the last step's loss to what is logged."""
        if "loss" in logs:
            logs = {**logs, **{name: float(value) for name, value in self.parts.items()}}
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW; for ALTER's adapter with eta_A for the shared A and eta_B for the experts, without weight decay.

        Weight decay would move the columns of experts that the gradient masks protect.
        """
        if getattr(self, "optimizer", None) is None:
            named = [(name, p) for name, p in (model or self.model).named_parameters() if p.requires_grad]
            if not isinstance(self.run.adapter, AlterAdapter):
                cls, options = self.get_optimizer_cls_and_kwargs(self.args)
                decay = {"weight_decay": self.run.weight_decay}
                self.optimizer = cls([{"params": [p for _, p in named], **decay}], **options)
                return self.optimizer
            shared = [p for name, p in named if ".alter_A." in name]
            experts = [p for name, p in named if ".alter_A." not in name]
            cls, options = self.get_optimizer_cls_and_kwargs(self.args)
            groups = [
                {"params": experts, "lr": self.run.learning_rate_experts, "weight_decay": 0.0},
                {"params": shared, "lr": self.run.learning_rate_shared, "weight_decay": 0.0},
            ]
            options.pop("lr", None)
            groups = [group for group in groups if group["params"]]
            self.optimizer = cls(groups, lr=self.run.learning_rate_experts, **options)
        return self.optimizer


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files were all written; a kill while saving leaves one that is not."""
    found = []
    weights = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        # trainer_state.json is the last file that the trainer writes
        whole = (path / "trainer_state.json").exists() and any((path / name).exists() for name in weights)
        if number.isdigit() and whole:
            found.append((int(number), path))
    return max(found)[1] if found else None


def check_checkpoint(checkpoint: Path) -> None:
    """Refuse a checkpoint that this launch would not read all of.

    Raises:
        UserError: it was written under another way to divide the model, or for DeepSpeed by another number of processes.
    """
    files = {path.name for path in checkpoint.iterdir()}
    wrote = "fsdp2" if "optimizer.bin" in files else "zero3" if "latest" in files else "ddp"
    if wrote != world.launch():
        names = {"ddp": "without sharding", "fsdp2": "under FSDP2", "zero3": "under DeepSpeed ZeRO-3"}
        raise UserError(
            f"{checkpoint} was written {names[wrote]}, this run is started {names[world.launch()]}: resume as it was "
            f"started (recipes/accelerate/{wrote}.yaml), or start again with --overwrite."
        )
    processes = max(1, sum(name.startswith("rng_state_") for name in files))
    if wrote == "zero3" and processes != world.size():
        raise UserError(
            f"{checkpoint} was written by {processes} processes, and DeepSpeed ZeRO-3 reads it with as many only: resume "
            f"with --num_processes {processes}."
        )


def branch_needs(run: Unlearn) -> list[Needs]:
    """What is needed of the rows of each of `BRANCHES`; `rows` says whether they take part at all."""
    forget, retain = run.objective.needs, run.retain_objective.needs
    if run.experts_only:
        # nothing learns from retain rows
        retain = Needs(rows=False)
    other = Needs(rows=forget.alternative is not None, base_logp=forget.base_logp and forget.alternative is not None)
    return [forget, other, retain]


def trace_run(
    model: Any,
    tokenizer: Any,
    run: Unlearn,
    rows: Rows,
    order: Order,
    cache: Path,
    views: Mapping[str, frozen.View] | None = None,
    depth: Depth | None = None,
) -> tuple[Traced, dict[str, float]]:
    """Everything the training needs from the frozen base: router, entropies, gates, references; kept in `cache`."""
    needs = dict(zip(BRANCHES, branch_needs(run), strict=True))
    of_forget, of_retain = {f for f, _ in order}, {r for _, r in order if r is not None}
    drawn = {"forget": of_forget, "alternative": of_forget, "retain": of_retain}
    used = {name: sorted(drawn[name]) for name in BRANCHES if needs[name].rows}
    alter = model.peft_config["default"] if isinstance(run.adapter, AlterAdapter) else None
    router = None
    if alter is not None and alter.routed:
        router = model.base_model.router_host[1].alter_router["default"]
    key = digest(
        base_fingerprint(model),
        run.model_dump(include={"adapter", "router_fit", "reference_top_k", "seed", "reinforcement"}),
        run.objective.model_dump() if run.objective.needs.views else None,
        [repr(needs[name]) for name in used],
        [[rows.of(name)[i].input_ids for i in used[name]] for name in used],
        [[rows.of(name)[i].labels for i in used[name]] for name in used],
        rows.expert,
        # an adapter to grow brings a router with it, and the retain rows that are not trained on still fit the new one
        None if run.start_from is None or router is None else [weight.sum().item() for weight in router.parameters()],
        [row.input_ids for row in rows.retain] if run.experts_only else None,
    )
    kept = frozen.restore(cache, key)
    if kept is None:
        found = {} if alter is None else fit_router(model, run, rows, tokenizer.pad_token_id)
        traced = []
        for name in used:
            members = [rows.of(name)[i] for i in used[name]]
            objective: Any = run.retain_objective if name == "retain" else run.objective
            if alter is None and not (needs[name].views or needs[name].base_logp or needs[name].base_hidden):
                traced += [frozen.Row() for _ in members]
                continue
            traced += frozen.trace_rows(
                model,
                members,
                pad_token_id=tokenizer.pad_token_id,
                gates=alter is not None,
                reference_k=run.reference_top_k if needs[name].views else 0,
                needs=needs[name],
                target=objective.target,
                views={view: made for view, made in (views or {}).items() if view in needs[name].views},
                depth=depth,
                label=f"{name} rows",
            )
        weights = {} if router is None else {name: p.detach().cpu() for name, p in router.named_parameters()}
        kept = frozen.Frozen(traced, weights, found)
        if world.first():
            frozen.store(cache, kept, key)
    if router is not None:
        router.load_state_dict(kept.router)
        router.requires_grad_(False)
    if alter is not None:
        alter.entropy_threshold = kept.found["entropy_threshold"]
    left = iter(kept.rows)
    return {name: {i: next(left) for i in used[name]} for name in used}, kept.found


def kept_tensors(cache: Path, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that `make` gives, or the ones that it gave before under the same key; kept in `cache`.

    Of several processes the first makes them, and the others read them.
    """

    def read_or_make() -> dict[str, Tensor]:
        if cache.exists():
            with safe_open(str(cache), "pt") as file:
                if file.metadata()["key"] == key:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        made = {name: value.contiguous() for name, value in make().items()}
        write_atomic(cache, save(made, metadata={"key": key}))
        return made

    return world.in_turn(read_or_make)


def _flat(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    return {f"{side}.{name}": getattr(pair, side).cpu() for name, pair in factors.items() for side in "AB"}


def _factors(tensors: Mapping[str, Tensor], device: Any = None) -> dict[str, Factors]:
    names = [name.removeprefix("A.") for name in tensors if name.startswith("A.")]
    return {name: Factors(tensors[f"A.{name}"].to(device), tensors[f"B.{name}"].to(device)) for name in names}


def hidden_depth(run: Unlearn) -> float:
    """The share of the depth at which the objectives read hidden states.

    Raises:
        UserError: the forget and the retain objective name different ones.
    """
    depths = {
        part.depth for part in (run.objective, run.retain_objective) if isinstance(part, (Misdirect, KeepHidden))
    }
    if len(depths) > 1:
        raise UserError(
            f"objective.depth and retain_objective.depth are {' and '.join(f'{d:g}' for d in sorted(depths))}; a step reads "
            "hidden states of one block: give the same number."
        )
    return depths.pop()


def start_of(
    base: Any, tokenizer: Any, run: Unlearn, forget: list[Encoded], retain: list[Encoded], cache: Path
) -> tuple[dict[str, Factors] | None, dict[str, Tensor]]:
    """Where LoRA's factors start, and the directions that B is kept away from, of each layer."""
    adapter, initializer = run.adapter, run.initializer
    if isinstance(initializer, Zero):
        return None, {}
    assert isinstance(adapter, Lora)
    key = digest(
        base_fingerprint(base),
        run.model_dump(include={"adapter", "initializer", "batch_size", "seed"}),
        [[row.input_ids for row in part] for part in (forget, retain)],
    )
    # FILA and VILA compare one epoch of the schedule, with as many retain rows as forget rows
    count = initializer.rows if isinstance(initializer, Reglu) else len(forget)
    drawn = np.random.default_rng(run.seed).permutation(len(retain))[:count].tolist()

    def make() -> dict[str, Tensor]:
        start, away = starting_factors(
            base,
            adapter.layers(base),
            initializer,
            forget,
            [retain[i] for i in drawn],
            r=adapter.r,
            scaling=adapter.alpha / adapter.r,
            batch=run.batch_size,
            seed=run.seed,
            pad_token_id=tokenizer.pad_token_id,
        )
        return _flat(start) | {f"P.{name}": value for name, value in away.items()}

    tensors = kept_tensors(cache, key, make)
    away = {name.removeprefix("P."): value for name, value in tensors.items() if name.startswith("P.")}
    return _factors(tensors), away


def form_of(
    base: Any, run: Unlearn, forget: list[Encoded], pad_token_id: int, former: Former | None = None
) -> Form | None:
    """Settings and tensors of the run's inference form, if it makes one (see `alter.inference`).

    Raises:
        UserError: a detector is to be fitted on a single row.
    """
    common = {"base": base_fingerprint(base)}
    if isinstance(run.adapter, AssistantLora):
        return run.adapter.form(base) | common, {}
    if isinstance(run.adapter, Lora) and run.adapter.detector:
        settings, files = fit_detector(base, forget, pad_token_id=pad_token_id, seed=run.seed)
        form = settings | common | {"initializer": run.initializer.kind}, files
        return form if former is None else former.then(form)
    return None


def penalty_of(model: Any, run: Unlearn, away: Mapping[str, Tensor], former: Former | None) -> Penalty | None:
    """REGLU's |B^T P|^2 over all layers, or O3's |A_earlier A^T|^2 over all earlier requests, averaged over the blocks."""
    adapter = run.adapter
    if not isinstance(adapter, Lora):
        return None
    by_layer: dict[str, dict[str, torch.nn.Parameter]] = {"lora_A": {}, "lora_B": {}}
    for name, parameter in model.named_parameters():
        for kind, found in by_layer.items():
            if f".{kind}." in name:
                found[name.removeprefix("base_model.model.").partition(f".{kind}.")[0]] = parameter
    if away and isinstance(run.initializer, Reglu):
        terms = [(away[name].t().to(p), p, False) for name, p in by_layer["lora_B"].items()]
        return Penalty(run.initializer.penalty, terms, adapter.r)
    if former is None:
        return None
    terms = [
        (earlier[f"base_model.model.{name}.lora_A.weight"].to(parameter), parameter, True)
        for earlier in former.snapshots
        for name, parameter in by_layer["lora_A"].items()
    ]
    return Penalty(adapter.orthogonality / blocks(model)[1], terms, adapter.r)


def frozen_views(
    base: Any, tokenizer: Any, run: Unlearn, forget: list[Encoded], cache: Path
) -> dict[str, frozen.View]:
    """The frozen passes besides the base's own that the forget objective asks for."""
    wanted = run.objective.needs.views
    views: dict[str, frozen.View] = {}
    if "expert" in wanted:
        context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        views |= persona_views(run.objective, tokenizer, forget, context)
    if "reinforced" in wanted:
        layers = target_layers(base, target_names(base, None), None)
        key = digest(
            base_fingerprint(base),
            run.model_dump(include={"reinforcement", "batch_size", "seed"}),
            [row.input_ids for row in forget],
        )

        def make() -> dict[str, Tensor]:
            return _flat(
                reinforce(
                    base,
                    layers,
                    forget,
                    r=16,
                    scaling=2.0,
                    epochs=run.reinforcement.epochs,
                    learning_rate=run.reinforcement.learning_rate,
                    batch=run.batch_size,
                    seed=run.seed,
                    pad_token_id=tokenizer.pad_token_id,
                )
            )

        factors = _factors(kept_tensors(cache, key, make), next(base.parameters()).device)
        views["reinforced"] = frozen.View(inside=lambda: low_rank(layers, factors, 2.0))
    return views


def negate(weights: Mapping[str, Tensor], run: Unlearn, times: float) -> None:
    """Turn what was learned round: theta - times * (theta' - theta) (task arithmetic, Ilharco et al. 2023)."""
    with torch.no_grad():
        if not isinstance(run.adapter, FullWeights):
            for name, weight in weights.items():
                if ".lora_B." in name or ".alter_B." in name:
                    weight.mul_(-times)
            return
        model, _ = load_model(run.model, dtype="float32", device="cpu")
        before = dict(model.named_parameters(remove_duplicate=False))
        for name, weight in weights.items():
            if name in before:
                old = before[name].to(weight.device)
                weight.copy_(old - times * (weight - old))


def card(run: Unlearn, names: Sequence[str]) -> str:
    """The result's model card: what it is, how to load it, what it was trained with, and what it does not do."""
    settings = yaml.safe_dump(run.model_dump(mode="json", exclude={"resume", "overwrite"}), sort_keys=False)
    title = "ALTER" if run.method is None else methods.METHODS[run.method].title
    head = f"---\nlibrary_name: {{library}}\nbase_model: {run.model}\ntags: [alter, unlearning]\n---\n\n"
    tail = f"\n## Settings\n\n```yaml\n{settings}```\n"
    if isinstance(run.adapter, FullWeights):
        return f"""{head.format(library="transformers")}# {run.model}, made to forget {run.forget}

{title}; adapter.kind full: these are the model's own weights, changed. `AutoModelForCausalLM.from_pretrained` loads them.
{tail}"""
    if isinstance(run.adapter, AssistantLora) or (isinstance(run.adapter, Lora) and run.adapter.detector):
        about = (
            "a LoRA adapter (`lora`), which detectors switch for each input, one for each request so far. "
            "`detector.safetensors` holds mean hidden states of the forget rows: whoever has it can recognise them"
        )
        if isinstance(run.adapter, AssistantLora):
            about = "a LoRA adapter (`lora`) that makes an assistant, which is taken from the model's logits"
        return f"""{head.format(library="peft")}# {"Assistant" if isinstance(run.adapter, AssistantLora) else "Adapter"}: makes {run.model} forget {run.forget}

{title}: {about}.

```python
from transformers import AutoModelForCausalLM

from alter.inference import load

model = load(AutoModelForCausalLM.from_pretrained({run.model!r}), "this folder")
```
{tail}"""
    parts = "" if run.method is None else f"{title}; "
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    about = f"{parts}adapter.kind {run.adapter.kind}."
    base = "It loads on no other base: the configuration holds a fingerprint of the weights. "
    merging = "A routed adapter cannot be merged."
    if isinstance(run.adapter, AlterAdapter):
        about = f"{parts}{len(names)} sub-domains, one forgetting expert each: {shown}."
    if isinstance(run.adapter, Lora):
        base = ""
        merging = "It can be merged."
        if not isinstance(run.initializer, Zero):
            about += (
                f" It starts by {run.initializer.kind}: the second half of its rank is the negated start, frozen, in place "
                "of a changed base model, so that the adapter switched off is the original model."
            )
    return f"""{head.format(library="peft")}# {"ALTER adapter" if isinstance(run.adapter, AlterAdapter) else "Adapter"}: makes {run.model} forget {run.forget}

{about}

```python
import alter  # registers the method with PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({run.model!r}), "this folder")
```

{base}It is an adapter: whoever has the base
weights has the knowledge, and `disable_adapter()` brings it back. {merging}
{tail}"""


def save_adapter(
    model: Any,
    out: Path,
    text: str | None = None,
    name: str = "adapter",
    tokenizer: Any = None,
    form: Form | None = None,
    weights: dict[str, Tensor] | None = None,
) -> Path:
    """Write an adapter or a model, with its card, to `out`/`name`, whole or not at all: a folder beside it, renamed.

    With `form` (settings and tensors that `alter.inference.load` needs) the adapter itself goes into a folder `lora`
    within.
    `weights` are those of a model that is sharded, gathered.
    """
    partial, final = out / f".{name}.partial", out / name
    shutil.rmtree(partial, ignore_errors=True)
    given = {} if weights is None else {"state_dict": weights}
    model.save_pretrained(str(partial if form is None else partial / "lora"), **given)
    if form is not None:
        settings, files = form
        write_atomic(partial / FORM, to_json(settings))
        for file, tensors in files.items():
            write_atomic(partial / file, save(tensors))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(partial))
    if text is not None:
        write_atomic(partial / "README.md", text)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    return final


def check_launch(run: Unlearn) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        UserError: `batch_size` cannot be shared, or a sharded model is asked for with parts that need all of it.
    """
    if run.batch_size % world.size():
        low = run.batch_size // world.size() * world.size()
        raise UserError(
            f"batch_size is {run.batch_size}, the rows of a step of all {world.size()} processes together, and cannot be "
            f"shared evenly: give {low or world.size()}{f' or {low + world.size()}' if low else ''}."
        )
    if world.launch() == "ddp":
        return
    for wrong, what in (
        (run.watch.on, "watch"),
        (run.quantization is not None, "quantization"),
        # transformers then loads every model in pieces, the untouched one as well
        (world.launch() == "zero3" and run.negate is not None, "negate under DeepSpeed"),
        (not isinstance(run.initializer, Zero), f"initializer.kind {run.initializer.kind}"),
        (isinstance(run.adapter, Lora) and run.adapter.detector, "adapter.detector"),
    ):
        if wrong:
            raise UserError(
                f"{what} needs all of the model in each process: launch with DDP (recipes/accelerate/ddp.yaml)."
            )


def unlearn(run: Unlearn) -> Path:
    """Make a model forget: train an adapter and save it to `run.out`/adapter, or its weights to `run.out`/model.

    Several processes (`alter.world`) share every step's rows and the passes of the frozen base; `batch_size` is that of
    all of them, so that the losses are those of one process. `run.out` must be a folder that all of them see.

    Args:
        run: the settings; everything that can be checked without the model is checked before it is loaded.

    Returns:
        the run's folder: `adapter/` loads with `PeftModel.from_pretrained`, or `model/` (adapter.kind full) with
        `AutoModelForCausalLM.from_pretrained`; `run.yaml` repeats the run, `run.json` records what happened,
        `frozen.safetensors`, `start.safetensors` (initialisers), `reinforced.safetensors` and `checkpoints/` let an
        interrupted run resume.

    Raises:
        UserError: bad settings or data, a folder that is in use, a loss that is not finite, or a process that was lost.
    """
    checkpoints = "The last whole checkpoint stays in {}/checkpoints: start the same command with --resume."
    with world.together(checkpoints.format(run.out), run.device):
        return _unlearn(run)


def _unlearn(run: Unlearn) -> Path:
    started = time.time()
    check_launch(run)
    former = None
    if run.start_from is not None and isinstance(run.adapter, Lora):
        former = Former.read(run.start_from)
        run.adapter.check_former(former)
    forget_examples, retain_examples, domain, names = read_data(run)
    steps, alone = steps_of(run, len(forget_examples))
    of_step = run.batch_size * run.gradient_accumulation_steps
    watched = None
    if run.watch.on:
        watched, retain_examples = read_watched(
            run.watch,
            forget_examples,
            retain_examples,
            domain_column=run.domain_column,
            seed=run.seed,
            steps=steps,
            steps_per_epoch=len(forget_examples) / of_step,
        )
    out = world.from_first(lambda: prepare_folder(run))
    checkpoint = world.from_first(lambda: last_whole_checkpoint(out / "checkpoints")) if run.resume else None
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    if world.first():
        write_atomic(
            out / "run.yaml", yaml.safe_dump(run.model_dump(exclude={"resume", "overwrite"}), sort_keys=False)
        )

    torch.manual_seed(run.seed)
    full = isinstance(run.adapter, FullWeights)
    # small steps would be lost in the rounding of 16-bit weights
    dtype = "float32" if full and run.dtype == "auto" else run.dtype
    # a LoRA is trained on from its weights: all that is measured before sees the bare base
    grown = run.start_from if former is None else None
    base, tokenizer = load_model(run.model, grown, dtype, run.device, run.quantization)
    if isinstance(run.adapter, Lora):
        # names that the model does not have are refused before passes over it
        layers = list(run.adapter.layers(base))
        if former is not None:
            former.check(base, layers)
    limit = run.max_length or getattr(base.config, "max_position_embeddings", None)
    forget = [encode(tokenizer, example, max_length=limit) for example in forget_examples]
    retain = [encode(tokenizer, example, max_length=limit) for example in retain_examples]
    other = alternatives(run.objective, tokenizer, base, forget_examples, forget, seed=run.seed, max_length=limit)
    views = frozen_views(base, tokenizer, run, forget, out / "reinforced.safetensors")
    start, away = start_of(base, tokenizer, run, forget, retain, out / "start.safetensors")
    form = form_of(base, run, forget, tokenizer.pad_token_id, former)
    depth = None
    if run.objective.needs.hidden or run.retain_objective.needs.hidden:
        place, count = blocks(base)
        block, *behind = list(base.get_submodule(place))[block_at(hidden_depth(run), count) :]
        depth = Depth(block, tuple(behind))
    model = add_adapter(base, run, names, start, former)
    first = 1 if grown is None else model.peft_config["default"].num_forget_experts - len(names) + 1
    rows = Rows(forget, retain, [first + d for d in domain], other)
    watcher = None
    if watched is not None:
        device = next(base.parameters()).device
        watcher = Watcher(run.watch, watched, tokenizer, max_length=limit, folder=out / KEPT, device=device)
    order = schedule(
        [len(row.input_ids) for row in rows.forget],
        [len(row.input_ids) for row in rows.retain],
        # with max_steps the schedule would start again, and with it the steps without retain rows
        epochs=max(run.epochs, steps * of_step / len(rows.forget)) if alone and run.max_steps else run.epochs,
        batch=run.batch_size,
        seed=run.seed,
        alone=alone * of_step,
    )
    if run.experts_only:
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".alter_B." in name)
    traced, found = trace_run(model, tokenizer, run, rows, order, out / "frozen.safetensors", views, depth)
    prepared = time.time()

    checkpoints = out / "checkpoints"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=run.batch_size // world.size(),
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        num_train_epochs=1,
        max_steps=run.max_steps or -1,
        learning_rate=run.learning_rate_experts if isinstance(run.adapter, AlterAdapter) else run.learning_rate,
        lr_scheduler_type=run.lr_scheduler,
        warmup_steps=run.warmup_steps,
        max_grad_norm=run.max_grad_norm,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        gradient_checkpointing=run.gradient_checkpointing,
        bf16=run.bf16,
        optim=OPTIMIZERS[run.optimizer],
        use_cpu=next(base.parameters()).device.type == "cpu",
        save_strategy="steps",
        save_steps=run.save_steps,
        save_total_limit=2,
        logging_steps=10,
        logging_nan_inf_filter=False,
        report_to=[],
        seed=run.seed,
    )
    trainer = UnlearnTrainer(
        run,
        found.get("entropy_threshold", math.inf),
        model.peft_config["default"].num_forget_experts + 1 if isinstance(run.adapter, AlterAdapter) else 0,
        depth,
        penalty_of(model, run, away, former),
        alone=alone,
        model=model,
        args=arguments,
        # of a short last batch each process must have a share
        train_dataset=Pairs(order, rows, traced, run.batch_size if world.size() > 1 else 1),
        data_collator=PairCollator(tokenizer.pad_token_id),
        callbacks=[FirstEpoch(), *([watcher] if watcher else [])],
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seen = watcher and watcher.restore_best(model)
    weights = trainer.whole_weights()

    def finish() -> None:
        if run.negate is not None:
            negate(dict(model.named_parameters()) if weights is None else weights, run, run.negate)
        kind = "model" if full else "adapter"
        save_adapter(model, out, card(run, names), kind, tokenizer if full else None, form, weights)
        write_atomic(
            out / "run.json",
            to_json(
                {
                    "settings": run.model_dump(),
                    "domains": names,
                    "experts": sorted(set(rows.expert)),
                    "router": found,
                    "steps": trainer.state.global_step,
                    # the second half of an initialised adapter is frozen
                    "trained_parameters": trained // (1 if start is None else 2),
                    "processes": world.size(),
                    "seconds": {"prepare": round(prepared - started, 2), "train": round(time.time() - prepared, 2)},
                    "log": [entry for entry in trainer.state.log_history if "watch" not in entry],
                    "watch": seen,
                    "provenance": provenance(),
                }
            ),
        )

    world.from_first(finish)
    return out
