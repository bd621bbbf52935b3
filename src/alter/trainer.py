"""One unlearning run, read downwards: `unlearn(settings)` checks, prepares, trains and saves an ALTER adapter."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from peft import get_peft_model
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from transformers import Trainer, TrainingArguments

from alter import frozen
from alter.adapter import AlterConfig
from alter.adapter.model import base_fingerprint
from alter.adapter.routing import Routing, pool
from alter.data import Collator, Encoded, Example, check_overlap, domains, encode, load_examples
from alter.entropy import check_threshold, threshold_from_quantile
from alter.errors import UserError
from alter.objectives import (
    CrossEntropy,
    Forget,
    InvertedHinge,
    Labelled,
    Reference,
    Retain,
    cross_entropy,
    mean_or_zero,
)
from alter.records import digest, provenance, to_json, write_atomic
from alter.scoring import load_model
from alter.watch import KEPT, Watch, Watcher, read_watched

_ADAPTER: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(AlterConfig)}


class AdapterSettings(BaseModel):
    """The adapter to train; its defaults and meanings are `AlterConfig`'s."""

    model_config = ConfigDict(extra="forbid")

    r: int = Field(_ADAPTER["r"], ge=1, description="Rank of A and of every expert.")
    alter_alpha: float = Field(_ADAPTER["alter_alpha"], gt=0, description="The update is scaled by alter_alpha / r.")
    alter_dropout: float = Field(_ADAPTER["alter_dropout"], ge=0, lt=1, description="Dropout on the input of A.")
    target_modules: list[str] | str | None = Field(
        _ADAPTER["target_modules"], description="Linear layers to adapt; all of the blocks' by default."
    )
    router: Literal["learned", "entropy", "static"] = Field(
        _ADAPTER["router"], description="Hidden states choose the expert, the entropy alone does, or all are open."
    )
    router_memory: float = Field(
        _ADAPTER["router_memory"], ge=0, le=1, description="How much of the text so far the router's evidence keeps."
    )
    entropy_q: float = Field(_ADAPTER["entropy_q"], description="Tsallis order of the token entropies, above 0.")
    entropy_threshold: float | None = Field(None, description="Entropy above which a token is high (1.2 by default).")
    entropy_quantile: float | None = Field(
        None, gt=0, lt=1, description="Set the threshold so that this share of the retain tokens is low."
    )
    temperature_high: float = Field(_ADAPTER["temperature_high"], gt=0, description="Of gates on high-entropy tokens.")
    temperature_low: float = Field(_ADAPTER["temperature_low"], gt=0, description="Of gates on low-entropy tokens.")
    top_k: int = Field(_ADAPTER["top_k"], ge=1, description="Forget experts fused on a high-entropy token.")


class RouterFit(BaseModel):
    """How the router learns which expert serves which token: one logistic regression per expert on hidden states."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(1000, ge=1)
    retain_weight: float = Field(
        30.0, gt=0, description="How much worse it is to open an expert for a retain token than to miss a forget token."
    )
    learning_rate: float = Field(0.03, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    max_tokens: int = Field(150_000, ge=1, description="Tokens kept for the fit; drawn at random from all.")


class Unlearn(BaseModel):
    """Settings of one unlearning run."""

    model_config = ConfigDict(extra="forbid")

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
        None, description="Adapter of earlier requests to grow: new experts beside its own, which stay bit-exact."
    )
    experts_only: bool = Field(
        False,
        description="Train forget experts alone: A keeps its start, the retention expert stays zero, so that tokens "
        "routed to it get exactly the base model. Always so with start_from.",
    )

    adapter: AdapterSettings = Field(default_factory=AdapterSettings)
    router_fit: RouterFit = Field(default_factory=RouterFit)
    objective: Forget = Field(default_factory=InvertedHinge)
    retain_objective: Retain = Field(default_factory=CrossEntropy)
    beta: float = Field(1.0, ge=0, description="Weight of the forget objective (Eq. 8).")
    gamma: float = Field(1.0, ge=0, description="Weight of the retain objective (Eq. 8).")
    lambda_: float = Field(
        0.01, ge=0, description="Weight of the loss on high-entropy tokens, which is what A learns."
    )
    phase_one: float = Field(
        0.0, ge=0, lt=1, description="Share of the steps that only learns high-entropy retain tokens."
    )

    epochs: float = Field(3, gt=0, description="Passes over the forget set.")
    batch_size: int = Field(4, ge=1, description="Forget rows a step; as many retain rows come with them.")
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate_experts: float = Field(1e-3, gt=0, description="eta_B.")
    learning_rate_shared: float = Field(1e-5, ge=0, description="eta_A.")
    lr_scheduler: str = "linear"
    warmup_steps: int = Field(0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    max_length: int | None = Field(None, ge=8, description="Longer rows are cut; by default the model's context.")
    reference_top_k: int = Field(256, ge=1, description="Tokens kept of each reference distribution.")
    gradient_checkpointing: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    bf16: bool = Field(False, description="Autocast to bf16.")
    seed: int = 0
    watch: Watch = Field(default_factory=Watch)
    save_steps: int = Field(200, ge=1, description="Steps between checkpoints to resume from.")
    resume: bool = Field(False, description="Go on from the last whole checkpoint in `out`.")
    overwrite: bool = Field(False, description="Delete what `out` holds.")
    max_steps: int | None = Field(None, ge=1, description="Stop after so many steps, whatever `epochs` says.")
    device: str | None = None

    @model_validator(mode="after")
    def _entropy_can_split(self) -> Unlearn:
        if self.adapter.entropy_threshold is not None and self.adapter.entropy_quantile is not None:
            raise ValueError("give either adapter.entropy_threshold or adapter.entropy_quantile, not both")
        return self

    @model_validator(mode="after")
    def _experts_alone(self) -> Unlearn:
        if self.start_from is not None:
            self.experts_only = True
        if self.experts_only and self.phase_one:
            raise ValueError("phase_one trains A and the retention expert, which experts_only (or start_from) freezes")
        if self.experts_only and self.adapter.router == "static":
            raise ValueError("experts_only needs a router that keeps the experts apart; adapter.router is 'static'")
        return self


@dataclass(frozen=True)
class Rows:
    """The data of a run, encoded: forget rows with the expert of each (1 is the first), and retain rows."""

    forget: list[Encoded]
    retain: list[Encoded]
    expert: list[int]


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


def schedule(
    forget_lengths: Sequence[int], retain_lengths: Sequence[int], *, epochs: float, batch: int, seed: int
) -> list[tuple[int, int]]:
    """Which forget row meets which retain row, in the order of training; a function of its arguments alone.

    Every epoch takes each forget row once. Retain rows are taken without replacement until all have been seen. Rows of
    similar length are brought together within groups of eight batches, which saves padding.
    """
    generator = np.random.default_rng(seed)
    total = math.ceil(epochs * len(forget_lengths))
    pairs: list[tuple[int, int]] = []
    pool: list[int] = []
    while len(pairs) < total:
        order = generator.permutation(len(forget_lengths))[: total - len(pairs)]
        while len(pool) < len(order):
            pool.extend(generator.permutation(len(retain_lengths)).tolist())
        drawn, pool = pool[: len(order)], pool[len(order) :]
        batches = []
        for start in range(0, len(order), 8 * batch):
            f = sorted(order[start : start + 8 * batch].tolist(), key=lambda i: forget_lengths[i])
            r = sorted(drawn[start : start + 8 * batch], key=lambda i: retain_lengths[i])
            group = list(zip(f, r, strict=True))
            batches += [group[i : i + batch] for i in range(0, len(group), batch)]
        # a short batch stays last, so that every other step has the full size
        whole = [b for b in batches if len(b) == batch]
        rest = [b for b in batches if len(b) < batch]
        for i in generator.permutation(len(whole)):
            pairs += whole[i]
        pairs += [pair for b in rest for pair in b]
    return pairs


def add_adapter(model: Any, run: Unlearn, names: list[str]) -> Any:
    """Put a new ALTER adapter on a loaded model; the adapter of `start_from`, which it has then, gets room for `names`.

    Raises:
        UserError: the adapter to grow is not ALTER's, has other settings than asked for, or serves a name already.
    """
    settings = run.adapter
    if run.start_from is not None:
        config = model.peft_config["default"]
        if not isinstance(config, AlterConfig) or config.router == "static":
            raise UserError(f"start_from is {run.start_from!r}, which is no ALTER adapter with a router to grow.")
        for name in sorted(settings.model_fields_set - {"entropy_quantile"}):
            wanted, has = getattr(settings, name), getattr(config, name)
            if wanted is not None and wanted != (sorted(has) if isinstance(has, set) else has):
                raise UserError(f"adapter.{name} is {wanted!r}, but {run.start_from} has {has!r}: leave it out.")
        own = config.domains or [f"expert {d + 1}" for d in range(config.num_forget_experts)]
        taken = [name for name in names if name in own]
        if taken:
            raise UserError(f"{run.start_from} has an expert for {taken[0]!r} already: nothing to add for it.")
        model.base_model.resize_experts("default", len(own) + len(names), own + names)
        config.inference_mode = False
        return model
    config = AlterConfig(
        **settings.model_dump(),
        num_forget_experts=run.num_forget_experts or len(names),
        domains=names,
        task_type="CAUSAL_LM",
    )
    config.base_fingerprint = base_fingerprint(model)
    return get_peft_model(model, config)


def fit_router(model: Any, run: Unlearn, rows: Rows, pad_token_id: int) -> dict[str, float]:
    """Set the entropy threshold and train the router, both on the frozen base, before the adapter trains.

    The router reads hidden states of the frozen base, which no training step changes, so it is fitted once instead of
    next to the task losses: for every new expert one logistic regression, its own forget rows against all other rows;
    the retention expert's logit is 0. So a row of the router depends on no other expert's, and an expert that comes
    later leaves it as it is. This is a reading of the paper, like the supervision itself.

    Returns:
        what was found: the threshold, the share of tokens routed as their row says, per kind of row.
    """
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
        retain_entropy = torch.cat([row.entropy for row in traced[len(parts[0]) :]])
        config.entropy_threshold = threshold_from_quantile(retain_entropy, run.adapter.entropy_quantile)
        check_threshold(config.entropy_q, config.entropy_threshold, config.vocab_size)
    found["entropy_threshold"] = float(config.threshold)
    if config.router == "static":
        return found
    inputs, targets = [], []
    for place, row in enumerate(traced):
        evidence = row.entropy[:, None] if row.features is None else row.features.float()
        label = rows.expert[parts[0][place]] if place < len(parts[0]) else 0
        # the first token of a row has no evidence and is never routed
        evidence = pool(evidence[None, 1:], torch.ones(1, len(evidence) - 1), config.router_memory)[0]
        inputs.append(evidence)
        targets.append(torch.full((len(evidence),), label))
    x, y = torch.cat(inputs), torch.cat(targets)
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / std
    new = sorted(set(rows.expert))
    is_own = y[:, None] == torch.tensor(new)
    head = torch.nn.Linear(x.shape[1], len(new))
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    fit = run.router_fit
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
    with torch.no_grad():
        weight = head.weight / std
        _, host = model.base_model.router_host
        router = host.alter_router["default"]
        router.weight[new] = weight
        router.bias[new] = head.bias - weight @ mean
        if run.start_from is None:
            router.weight[0], router.bias[0] = 0.0, 0.0
            # spare experts are never chosen
            router.bias[max(new) + 1 :] = -1e4
        right = torch.nn.functional.linear(x * std + mean, router.weight, router.bias).argmax(-1) == y
    router.requires_grad_(False)
    found["router_accuracy_forget"] = float(right[y > 0].float().mean())
    found["router_accuracy_retain"] = float(right[y == 0].float().mean())
    return found


Traced = dict[str, dict[int, frozen.Row]]


class PairCollator:
    """Lay forget rows and retain rows of a step into one batch, forget rows first, with their routes and references."""

    def __init__(self, pad_token_id: int) -> None:
        # few different shapes: the allocator can then give a step the memory of the last one
        self.collate = Collator(pad_token_id, multiple_of=16)

    def __call__(self, pairs: Sequence[tuple[dict[str, Any], dict[str, Any] | None]]) -> dict[str, Any]:
        items = [forget for forget, _ in pairs] + [retain for _, retain in pairs if retain is not None]
        batch: dict[str, Any] = self.collate(
            [{"input_ids": item["encoded"].input_ids, "labels": item["encoded"].labels} for item in items]
        )
        shape = batch["input_ids"].shape
        batch["gates"] = torch.zeros(*shape, items[0]["row"].gates.shape[-1])
        # padding counts as high: it is never labelled and must not look like knowledge
        batch["entropy"] = torch.full(shape, torch.inf)
        for place, item in enumerate(items):
            length = len(item["row"].entropy)
            batch["gates"][place, :length] = item["row"].gates
            batch["entropy"][place, :length] = item["row"].entropy
        batch["expert"] = torch.tensor([item["expert"] for item in items])
        for name, members in (("forget", items[: len(pairs)]), ("retain", items[len(pairs) :])):
            references = [item["row"].reference for item in members if item["row"].reference is not None]
            if references:
                batch[f"{name}_ids"] = torch.cat([reference.ids for reference in references]).long()
                batch[f"{name}_logp"] = torch.cat([reference.logp for reference in references]).float()
        return batch


class Pairs(torch.utils.data.Dataset):
    """The schedule as a dataset: item i is the i-th pair of a forget and a retain row.

    Where forget experts train alone, nothing learns from retain rows, and the retain row is None.
    """

    def __init__(self, order: list[tuple[int, int]], rows: Rows, traced: Traced, *, experts_only: bool) -> None:
        self.order, self.rows, self.traced, self.experts_only = order, rows, traced, experts_only

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
        f, r = self.order[i]
        forget = {"encoded": self.rows.forget[f], "row": self.traced["forget"][f], "expert": self.rows.expert[f]}
        if self.experts_only:
            return forget, None
        return forget, {"encoded": self.rows.retain[r], "row": self.traced["retain"][r], "expert": 0}


@contextmanager
def head_on(model: Any, positions: Tensor) -> Iterator[None]:
    """Within the block the language-model head sees only the hidden states at `positions` [B, T]: logits are [n, V]."""
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][positions], *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


class UnlearnTrainer(Trainer):
    """transformers' Trainer with ALTER's loss (Eq. 8), gradient isolation and two learning rates."""

    def __init__(self, run: Unlearn, threshold: float, num_experts: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run, self.threshold, self.num_experts = run, threshold, num_experts
        # our loss is a mean per step, so the trainer itself divides by the accumulation steps
        self.model_accepts_loss_kwargs = False
        self.parts: dict[str, Tensor] = {}

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """One forward for forget and retain rows together; see `Unlearn` for the weights of the three terms."""
        labels, high = inputs["labels"], inputs["entropy"] > self.threshold
        forget_row = inputs["expert"] > 0
        # row b may move only its own expert, and A only through high-entropy tokens (strict gradient isolation)
        allowed = torch.nn.functional.one_hot(inputs["expert"], self.num_experts).bool()
        allowed = allowed[:, None, :].expand(-1, labels.shape[1], -1)
        routing = Routing(inputs["gates"].float(), allowed, high)
        positions = frozen.labelled(labels)
        with head_on(self.accelerator.unwrap_model(model), positions):
            logits = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], alter_routing=routing
            ).logits
        truth = labels[:, 1:][positions[:, :-1]]
        # the token's own entropy: that of the step that generated it
        token_high = high[:, 1:][positions[:, :-1]]
        of_forget = forget_row[:, None].expand_as(positions)[positions]

        def part(mask: Tensor, name: str) -> Labelled:
            reference = None
            if f"{name}_ids" in inputs:
                reference = Reference(inputs[f"{name}_ids"], inputs[f"{name}_logp"])
            return Labelled(logits[mask], truth[mask], token_high[mask], reference)

        forget, retain = part(of_forget, "forget"), part(~of_forget, "retain")
        if self.state.global_step < self.run.phase_one * self.state.max_steps:
            loss = self.run.gamma * mean_or_zero(cross_entropy(retain.logits, retain.labels)[retain.high])
            loss = loss + 0.0 * logits.sum()
        else:
            structure = mean_or_zero(cross_entropy(logits, truth)[token_high])
            parts = {
                "forget": self.run.objective(forget),
                "retain": self.run.retain_objective(retain) if len(retain.labels) else 0.0 * logits.sum(),
                "structure": structure,
            }
            loss = self.run.beta * parts["forget"] + self.run.gamma * parts["retain"]
            if self.run.lambda_:
                loss = loss + self.run.lambda_ * parts["structure"]
            self.parts = {name: value.detach() for name, value in parts.items()}
        if not torch.isfinite(loss):
            raise UserError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}: training stops, and the last good "
                f"checkpoint stays in {self.args.output_dir}. Lower learning_rate_experts or max_grad_norm."
            )
        return (loss, logits) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the terms of the last step's loss to what is logged."""
        if "loss" in logs:
            logs = {**logs, **{name: float(value) for name, value in self.parts.items()}}
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with eta_A for the shared A and eta_B for the experts, without weight decay.

        Weight decay would move the columns of experts that the gradient masks protect.
        """
        if getattr(self, "optimizer", None) is None:
            named = [(name, p) for name, p in (model or self.model).named_parameters() if p.requires_grad]
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
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        # trainer_state.json is the last file that the trainer writes
        whole = all((path / name).exists() for name in ("trainer_state.json", "adapter_model.safetensors"))
        if number.isdigit() and whole:
            found.append((int(number), path))
    return max(found)[1] if found else None


def trace_run(
    model: Any, tokenizer: Any, run: Unlearn, rows: Rows, order: list[tuple[int, int]], cache: Path
) -> tuple[Traced, dict[str, float]]:
    """Everything the training needs from the frozen base: router, entropies, gates, references; kept in `cache`."""
    encoded = {"forget": rows.forget, "retain": rows.retain}
    used = {
        "forget": sorted({f for f, _ in order}),
        "retain": [] if run.experts_only else sorted({r for _, r in order}),
    }
    needs = {"forget": run.objective.needs_base, "retain": run.retain_objective.needs_base}
    config = model.peft_config["default"]
    router = None if config.router == "static" else model.base_model.router_host[1].alter_router["default"]
    key = digest(
        config.base_fingerprint,
        run.model_dump(include={"adapter", "router_fit", "reference_top_k", "seed"}),
        needs,
        [[encoded[name][i].input_ids for i in used[name]] for name in used],
        rows.expert,
        # an adapter to grow brings a router with it, and the retain rows that are not trained on still fit the new one
        None if run.start_from is None or router is None else [weight.sum().item() for weight in router.parameters()],
        [row.input_ids for row in rows.retain] if run.experts_only else None,
    )
    kept = frozen.restore(cache, key)
    if kept is None:
        found = fit_router(model, run, rows, tokenizer.pad_token_id)
        traced = []
        for name in used:
            members = [encoded[name][i] for i in used[name]]
            k = run.reference_top_k if needs[name] else 0
            part = frozen.trace_rows(
                model, members, pad_token_id=tokenizer.pad_token_id, gates=True, reference_k=k, label=f"{name} rows"
            )
            traced += part
        weights = {} if router is None else {name: p.detach().cpu() for name, p in router.named_parameters()}
        kept = frozen.Frozen(traced, weights, found)
        frozen.store(cache, kept, key)
    if router is not None:
        router.load_state_dict(kept.router)
        router.requires_grad_(False)
    config.entropy_threshold = kept.found["entropy_threshold"]
    split = len(used["forget"])
    return {
        "forget": dict(zip(used["forget"], kept.rows[:split], strict=True)),
        "retain": dict(zip(used["retain"], kept.rows[split:], strict=True)),
    }, kept.found


def card(run: Unlearn, names: Sequence[str]) -> str:
    """The adapter's model card: what it is, how to load it, what it was trained with, and what it does not do."""
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    settings = yaml.safe_dump(run.model_dump(exclude={"resume", "overwrite"}), sort_keys=False)
    return f"""---
library_name: peft
base_model: {run.model}
tags: [alter, unlearning]
---

# ALTER adapter: makes {run.model} forget {run.forget}

{len(names)} sub-domains, one forgetting expert each: {shown}.

```python
import alter  # registers the method with PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({run.model!r}), "this folder")
```

It loads on no other base: the configuration holds a fingerprint of the weights. It is an adapter: whoever has the base
weights has the knowledge, and `disable_adapter()` brings it back. A routed adapter cannot be merged.

## Settings

```yaml
{settings}```
"""


def save_adapter(model: Any, out: Path, text: str | None = None) -> Path:
    """Write the adapter, with its card, to `out`/adapter, whole or not at all: a folder beside it, then renamed."""
    partial, final = out / ".adapter.partial", out / "adapter"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(str(partial))
    if text is not None:
        write_atomic(partial / "README.md", text)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    return final


def unlearn(run: Unlearn) -> Path:
    """Make a model forget: train an ALTER adapter and save it to `run.out`/adapter.

    Args:
        run: the settings; everything that can be checked without the model is checked before it is loaded.

    Returns:
        the run's folder: `adapter/` loads with `PeftModel.from_pretrained`, `run.yaml` repeats the run, `run.json`
        records what happened, `frozen.safetensors` and `checkpoints/` let an interrupted run resume.

    Raises:
        UserError: bad settings or data, a folder that is in use, or a loss that is not finite.
    """
    started = time.time()
    check_threshold(run.adapter.entropy_q, run.adapter.entropy_threshold or 1e-9, None)
    forget_examples, retain_examples, domain, names = read_data(run)
    watched = None
    if run.watch.on:
        per_epoch = len(forget_examples) / (run.batch_size * run.gradient_accumulation_steps)
        steps = run.max_steps or math.ceil(run.epochs * per_epoch)
        watched, retain_examples = read_watched(
            run.watch,
            forget_examples,
            retain_examples,
            domain_column=run.domain_column,
            seed=run.seed,
            steps=steps,
            steps_per_epoch=per_epoch,
        )
    out = prepare_folder(run)
    write_atomic(out / "run.yaml", yaml.safe_dump(run.model_dump(exclude={"resume", "overwrite"}), sort_keys=False))

    torch.manual_seed(run.seed)
    base, tokenizer = load_model(run.model, run.start_from, run.dtype, run.device)
    limit = run.max_length or getattr(base.config, "max_position_embeddings", None)
    model = add_adapter(base, run, names)
    first = 1 if run.start_from is None else model.peft_config["default"].num_forget_experts - len(names) + 1
    rows = Rows(
        [encode(tokenizer, example, max_length=limit) for example in forget_examples],
        [encode(tokenizer, example, max_length=limit) for example in retain_examples],
        [first + d for d in domain],
    )
    watcher = None
    if watched is not None:
        device = next(base.parameters()).device
        watcher = Watcher(run.watch, watched, tokenizer, max_length=limit, folder=out / KEPT, device=device)
    order = schedule(
        [len(row.input_ids) for row in rows.forget],
        [len(row.input_ids) for row in rows.retain],
        epochs=run.epochs,
        batch=run.batch_size,
        seed=run.seed,
    )
    if run.experts_only:
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".alter_B." in name)
    traced, found = trace_run(model, tokenizer, run, rows, order, out / "frozen.safetensors")
    prepared = time.time()

    checkpoints = out / "checkpoints"
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=run.batch_size,
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        num_train_epochs=1,
        max_steps=run.max_steps or -1,
        learning_rate=run.learning_rate_experts,
        lr_scheduler_type=run.lr_scheduler,
        warmup_steps=run.warmup_steps,
        max_grad_norm=run.max_grad_norm,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        gradient_checkpointing=run.gradient_checkpointing,
        bf16=run.bf16,
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
        found["entropy_threshold"],
        model.peft_config["default"].num_forget_experts + 1,
        model=model,
        args=arguments,
        train_dataset=Pairs(order, rows, traced, experts_only=run.experts_only),
        data_collator=PairCollator(tokenizer.pad_token_id),
        callbacks=[watcher] if watcher else None,
    )
    checkpoint = last_whole_checkpoint(checkpoints) if run.resume else None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seen = watcher and watcher.restore_best(model)
    save_adapter(model, out, card(run, names))
    write_atomic(
        out / "run.json",
        to_json(
            {
                "settings": run.model_dump(),
                "domains": names,
                "experts": sorted(set(rows.expert)),
                "router": found,
                "steps": trainer.state.global_step,
                "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "seconds": {"prepare": round(prepared - started, 2), "train": round(time.time() - prepared, 2)},
                "log": [entry for entry in trainer.state.log_history if "watch" not in entry],
                "watch": seen,
                "provenance": provenance(),
            }
        ),
    )
    return out
