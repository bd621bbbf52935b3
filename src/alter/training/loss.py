"""The loss of a step (ALTER Eq. 8) inside transformers' Trainer, with gradient isolation and learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from alter.adapter.routing import Routing
from alter.core import processes
from alter.core.errors import UserError
from alter.logits.head import Part, measuring
from alter.methods import frozen
from alter.methods.adapters import (
    AlterAdapter,
    Lora,
)
from alter.methods.frozen import Depth, states_of
from alter.methods.initializers import Zero
from alter.methods.objectives import (
    Adaptive,
    Constrained,
    Emitted,
    Hidden,
    Labelled,
    Reference,
    mean_or_zero,
)
from alter.training.folder import seal_checkpoint
from alter.training.settings import BRANCHES, Unlearn, branch_needs


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


class FirstHalves:
    """AdamW's weight decay of the trained half of initialised LoRA factors: w <- (1 - rate * decay) w before each step.

    The other half is the frozen copy of the start, which must stay as it is.

    Args:
        named: the parameters by name.
        r: rank that is trained: the first r rows of each lora_A, the first r columns of each lora_B.
        decay: the weight decay.
    """

    def __init__(self, named: Sequence[tuple[str, torch.nn.Parameter]], r: int, decay: float) -> None:
        self.trained = [p[:r] if ".lora_A." in name else p[:, :r] for name, p in named]
        self.decay = decay

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Shrink the trained halves at the optimizer's rate of now."""
        with torch.no_grad():
            for half in self.trained:
                half.mul_(1 - optimizer.param_groups[0]["lr"] * self.decay)


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


class Dual(TrainerCallback, ExportableState):
    """The weight of PDU's constraint (`Constrained`), by dual ascent; saved with every checkpoint."""

    def __init__(self, weight: float | None = None) -> None:
        self.weight = weight

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {"weight": self.weight}, "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over what the checkpoint of a resumed run has kept."""
        kept = state.stateful_callbacks.get(type(self).__name__)
        if kept:
            self.weight = kept["args"]["weight"]

    def next(self, constraint: Constrained, loss: float, epochs: float) -> float:
        """The retain weight of a batch, given its loss; the next batch's follows from it after the warm-up."""
        weight = constraint.start if self.weight is None else self.weight
        changes = epochs >= constraint.warmup_epochs
        self.weight = max(0.0, weight + constraint.step * (loss - constraint.epsilon)) if changes else weight
        return weight


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
            self.parts, loss, whole = {}, processes.size() * loss, processes.total(loss)
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
                parts["retain"] = parts["retain"] * self.first_epoch.weight(
                    float(processes.total(parts["retain"])), first
                )
            if isinstance(run.retain_objective, Constrained):
                of_step = run.batch_size * run.gradient_accumulation_steps
                epochs = self.state.global_step * of_step / len(self.train_dataset.rows.forget)
                parts["retain"] = parts["retain"] * self.dual.next(
                    run.retain_objective, float(processes.total(parts["retain"])), epochs
                )
            forgetting, keeping = run.beta * parts["forget"], run.gamma * parts["retain"]
            if run.objective.joint and run.retain_objective.needs.labels:
                # two means, each weighted by its share of the tokens of all processes, are the one over both
                *learned, kept = processes.total(nll.new_tensor(counts)).unbind()
                share = kept / (sum(learned) + kept).clamp_min(1.0)
                forgetting, keeping = (1 - share) * forgetting, share * keeping
            loss = forgetting + keeping
            if run.lambda_:
                loss = loss + run.lambda_ * parts["structure"]
            # every process has its share of the means: their sum is the loss, and its gradient the average of what follows
            *terms, whole = processes.total(torch.stack([*parts.values(), loss])).unbind()
            self.parts = dict(zip(parts, terms, strict=True))
            loss = processes.size() * loss
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
        if processes.size() > 1:
            # DDP waits for the gradient of every weight that took part; what is reported is the loss of all processes
            loss = loss + 0.0 * values.nan_to_num(0.0, 0.0, 0.0).sum()
            loss = loss + (whole - loss).detach()
        return (loss, values) if return_outputs else loss

    def whole_weights(self) -> dict[str, Tensor] | None:
        """All weights of a sharded model, gathered into the first process; None if it holds them all anyway."""
        if not processes.sharded(self.model):
            return None
        return self.accelerator.get_state_dict(self.model_wrapped)

    @property
    def first_epoch(self) -> FirstEpoch:
        """The callback that remembers the first epoch."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, FirstEpoch))

    @property
    def dual(self) -> Dual:
        """The callback that keeps the constraint's weight."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, Dual))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        # of several processes each writes a part
        processes.gather(None)
        if processes.first():
            seal_checkpoint(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

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
                halves = not isinstance(self.run.initializer, Zero)
                decay = {"weight_decay": 0.0 if halves else self.run.weight_decay}
                self.optimizer = cls([{"params": [p for _, p in named], **decay}], **options)
                if halves and self.run.weight_decay:
                    assert isinstance(self.run.adapter, Lora)
                    decays = FirstHalves(named, self.run.adapter.r, self.run.weight_decay)
                    self.optimizer.register_step_pre_hook(decays)
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
