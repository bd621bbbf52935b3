"""The loss of a step (ALTER Eq. 8) inside transformers' Trainer, with gradient isolation and learning rates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from alter.adapter import Routing
from alter.core import UserError, processes
from alter.logits import Depth, Part, measuring, states_of
from alter.methods import Codes, Emitted, GradientRule, Hidden, Labelled, Objective, Penalty, mean_or_zero
from alter.models import autocasts
from alter.storage import write_atomic
from alter.training.arguments import trainer_arguments
from alter.training.batches import Batch, Places
from alter.training.folder import GRADIENT, seal_checkpoint
from alter.training.settings import BRANCHES, OPTIMIZERS, Unlearn, batches_of_step, branch_needs, steps_of, warmup_of
from alter.training.trunk import Trunk

ALTERNATIVE_BRANCH, RETAIN_BRANCH = BRANCHES.index("alternative"), BRANCHES.index("retain")


class OwnState(TrainerCallback, ExportableState):
    """State that a retain objective keeps between steps (`Needs.state`), saved with every checkpoint."""

    def __init__(self, **kept: float) -> None:
        self.kept = kept

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"args": dict(self.kept), "attributes": {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the state from the checkpoint of a resumed run."""
        found = state.stateful_callbacks.get(type(self).__name__)
        if found:
            self.kept = dict(found["args"])

    def weigh(self, objective: Objective, loss: float, epochs: float) -> float:
        """Return the factor that the objective gives a batch with this loss (`Objective.weigh`)."""
        return objective.weigh(loss, epochs, self.kept)


class Split:
    """The gradients of the forget term and of all other terms, summed over a step's batches, and the rule that joins them.

    Args:
        rule: what becomes of them.
        known: what it has measured.
    """

    def __init__(self, rule: GradientRule, known: Mapping[str, Tensor]) -> None:
        self.rule, self.known = rule, known
        self.terms: tuple[Tensor, Tensor] | None = None
        self.state: dict[str, Tensor] = {}
        self._sums: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def add(self, named: Sequence[tuple[str, torch.nn.Parameter]], batches: int) -> None:
        """Add both gradients of the last batch, one of the step's `batches`."""
        assert self.terms is not None
        weights = [weight for _, weight in named]
        for sums, term, keep in zip(self._sums, self.terms, (True, False), strict=True):
            taken: Sequence[Tensor | None] = [None] * len(weights)
            if term.requires_grad:
                taken = torch.autograd.grad(term / batches, weights, retain_graph=keep, allow_unused=True)
            for (name, weight), grad in zip(named, taken, strict=True):
                here = torch.zeros_like(weight) if grad is None else grad
                sums[name] = sums[name] + here if name in sums else here
        self.terms = None

    def apply(self, named: Sequence[tuple[str, torch.nn.Parameter]], before: Path) -> None:
        """Give each parameter its gradient; a resumed run first restores the rule's state from the file `before`."""
        if not self.state and before.is_file():
            device = named[0][1].device
            self.state = {name: value.to(device) for name, value in load_file(str(before)).items()}
        forget, rest = ({name: processes.total(value) for name, value in sums.items()} for sums in self._sums)
        for sums in self._sums:
            sums.clear()
        edited = self.rule.edited(forget, rest, self.known, self.state)
        for name, weight in named:
            weight.grad = edited[name].to(weight.dtype)


class UnlearnTrainer(Trainer):
    """transformers' Trainer with the run's loss (ALTER Eq. 8), gradient isolation and learning rates.

    Args:
        run: the settings.
        threshold: entropy above which a token is high.
        num_experts: experts of ALTER's adapter, the retention expert included.
        depth: where the objectives read hidden states, if they do.
        penalty: of the parameters, added to the loss.
        alone: steps before retain rows join.
        trunk: the blocks below the adapter, where batches bring what these put out.
        measured: what the rule for gradients knows of each weight.
        codes: how the objective compares hidden states, if it does so in a sparse code.
    """

    def __init__(
        self,
        run: Unlearn,
        threshold: float,
        num_experts: int,
        depth: Depth | None = None,
        penalty: Penalty | None = None,
        alone: int = 0,
        trunk: Trunk | None = None,
        measured: Mapping[str, Tensor] | None = None,
        codes: Codes | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.run, self.threshold, self.num_experts = run, threshold, num_experts
        self.depth, self.penalty, self.alone, self.trunk = depth, penalty, alone, trunk
        self.codes = codes
        self.split = Split(run.gradient, measured or {})
        self.needs = branch_needs(run)
        # RMU reads nothing after its block, but DDP waits for a gradient of every trained weight
        labels = any(needs.rows and needs.labels for needs in self.needs)
        behind = [weight for block in (depth.behind if depth else ()) for weight in block.parameters()]
        self.only_states = not labels and not any(weight.requires_grad for weight in behind)
        # our loss is a mean per step, so the trainer itself divides by the accumulation steps
        self.model_accepts_loss_kwargs = False
        self.parts: dict[str, Tensor] = {}

    @property
    def in_phase_one(self) -> bool:
        """Whether this step trains on high-entropy retain tokens alone."""
        return bool(self.state.global_step < self.run.phase_one * self.state.max_steps)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Compute the gradient; under a rule for gradients, those of the forget term and of the others separately."""
        if not self.run.gradient.splits:
            plain: Tensor = super().training_step(model, inputs, num_items_in_batch)
            return plain
        model.train()
        # each rank sums its own gradients: DDP would wait for a backward pass that never comes
        with self.accelerator.no_sync(model), self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, self._prepare_inputs(inputs))
        named = [(name, p) for name, p in self.accelerator.unwrap_model(model).named_parameters() if p.requires_grad]
        self.split.add(named, self.current_gradient_accumulation_steps)
        if self.accelerator.sync_gradients:
            before = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / GRADIENT
            self.split.apply(named, before)
        return loss.detach() / int(self.current_gradient_accumulation_steps)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """Run one forward for all rows of the step together; see `Unlearn` for the weights of the terms."""
        batch: Batch = inputs["batch"]
        if batch.entropy is None:
            high = torch.zeros_like(batch.labels, dtype=torch.bool)
        else:
            high = batch.entropy > self.threshold
        places = Places.of(batch, high, [needs.labels for needs in self.needs])
        values, states = self._forward(model, batch, high, places)
        if self.in_phase_one:
            loss, whole = self._structure_alone(values, places)
        else:
            loss, whole = self._objectives(batch, places, values, states)
        if not torch.isfinite(whole):
            raise UserError(
                f"The loss is {whole.item()} at step {self.state.global_step + 1}: training stops, and the last good "
                f"checkpoint stays in {self.args.output_dir}. Lower `{self.run.adapter.rate}` or `max_grad_norm`."
            )
        if processes.size() > 1:
            # DDP waits for the gradient of every weight that took part; the loss reported is that of all ranks
            loss = loss + 0.0 * values.nan_to_num(0.0, 0.0, 0.0).sum()
            loss = loss + (whole - loss).detach()
        return (loss, values) if return_outputs else loss

    def _forward(self, model: Any, batch: Batch, high: Tensor, places: Places) -> tuple[Tensor, Tensor | None]:
        """Return [n, 2] negative log-likelihood and objective's number of each labelled token, and hidden states."""
        options = {} if batch.gates is None else {"alter_routing": self._routing(batch, batch.gates, high)}
        # rows come branch after branch
        made = [
            Part(count, self._measure(name, batch, places))
            for count, name in zip(places.counts, BRANCHES, strict=True)
        ]
        reading = states_of(self.depth, self.only_states)
        below = nullcontext() if self.trunk is None or batch.trunk is None else self.trunk.done(batch.trunk)
        with measuring(self.accelerator.unwrap_model(model), places.positions, made), reading as hidden, below:
            values = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options).logits
        return values, hidden[0] if hidden else None

    def _routing(self, batch: Batch, gates: Tensor, high: Tensor) -> Routing:
        """Let row b move only its own expert, and A only through high-entropy tokens (strict gradient isolation)."""
        if not self.run.adapter.isolates:
            return Routing(gates.float(), None, None)
        allowed = torch.nn.functional.one_hot(batch.expert, self.num_experts).bool()
        return Routing(gates.float(), allowed[:, None, :].expand(-1, batch.labels.shape[1], -1), high)

    def _measure(self, name: str, batch: Batch, places: Places) -> Callable[[Tensor, slice], Tensor]:
        """Return, for one branch, the negative log-likelihood and the objective's own number of each token."""
        run = self.run
        objective = {"forget": run.objective, "retain": run.retain_objective}.get(name)
        reference, truth = batch.known(name).reference, places.truth_of(name)
        runner_up = objective is not None and objective.needs.runner_up
        # without a weight the structure term is only reported
        learned = bool(run.lambda_ or self.in_phase_one)

        def of(logits: Tensor, at: slice) -> Tensor:
            emitted = Emitted(logits, truth[at], reference and reference.at(at), runner_up)
            value = emitted.nll if objective is None else objective.values_of(emitted)
            return torch.stack([emitted.nll if learned else emitted.nll.detach(), value], 1)

        return of

    def _labelled(self, name: str, batch: Batch, places: Places, values: Tensor, states: Tensor | None) -> Labelled:
        """Return a branch's labelled tokens in the form that its objective reads."""
        members = batch.branch == BRANCHES.index(name)
        number = torch.arange(len(members), device=members.device)
        row = number - number[members].min() if members.any() else number
        mask = places.branch == BRANCHES.index(name)
        known, hidden = batch.known(name), None
        if states is not None:
            real = batch.attention_mask.bool() & members[:, None]
            hidden = Hidden(states[real], row[:, None].expand_as(real)[real], known.hidden, known.named, self.codes)
        return Labelled(
            values[mask, 1],
            places.high[mask],
            row[:, None].expand_as(places.positions)[places.positions][mask],
            int(members.sum()),
            known.base_logp,
            self._labelled("alternative", batch, places, values, states) if name == "forget" else None,
            hidden,
            places.asked(batch)[mask] if name == "forget" and self.run.objective.needs.asked else None,
        )

    def _structure_alone(self, values: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """Compute phase one's loss over high-entropy retain tokens."""
        loss = self.run.gamma * mean_or_zero(values[:, 0][(places.branch == RETAIN_BRANCH) & places.high])
        loss = loss + 0.0 * values.sum()
        self.parts = {}
        return processes.size() * loss, processes.total(loss)

    def _objectives(
        self, batch: Batch, places: Places, values: Tensor, states: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Compute Eq. 8 and the penalty."""
        run, parts = self.run, self._terms(batch, places, values, states)
        forgetting, keeping = run.beta * parts["forget"], run.gamma * parts["retain"]
        if run.objective.joint and run.retain_objective.needs.labels:
            # two means weighted by their shares of all ranks' tokens give the mean over both
            *learned, kept = processes.total(values.new_tensor(places.counts)).unbind()
            share = kept / (sum(learned) + kept).clamp_min(1.0)
            forgetting, keeping = (1 - share) * forgetting, share * keeping
        loss = forgetting + keeping
        if run.lambda_:
            loss = loss + run.lambda_ * parts["structure"]
        term = run.adapter.term(batch.attention_mask.bool() & (batch.branch == 0)[:, None])
        if term is not None:
            parts["adapter"] = term
            keeping, loss = keeping + term, loss + term
        apart = run.gradient.splits
        self.split.terms = (forgetting, keeping + run.lambda_ * parts["structure"]) if apart else None
        # every process has its share of the means: their sum is the loss, and its gradient the average of what follows
        *terms, whole = processes.total(torch.stack([*parts.values(), loss])).unbind()
        self.parts = dict(zip(parts, terms, strict=True))
        loss = processes.size() * loss
        if self.penalty is not None:
            # a function of the weights alone, the same everywhere
            penalty = self.penalty()
            self.parts["penalty"] = penalty.detach()
            loss, whole = loss + penalty, whole + penalty.detach()
            if self.split.terms is not None:
                self.split.terms = (forgetting, self.split.terms[1] + penalty / processes.size())
        return loss, whole

    def _terms(self, batch: Batch, places: Places, values: Tensor, states: Tensor | None) -> dict[str, Tensor]:
        """Compute the unweighted terms of Eq. 8: forget, retain and structure."""
        run, step = self.run, self.state.global_step
        forget, retain = (self._labelled(name, batch, places, values, states) for name in ("forget", "retain"))
        # labels that an alternative makes up are no structure
        structure = mean_or_zero(values[:, 0][places.high & (places.branch != ALTERNATIVE_BRANCH)])
        joined = self.needs[-1].rows and step >= self.alone
        parts = {
            "forget": run.objective.loss_of(forget),
            "retain": run.retain_objective.loss_of(retain) if joined else 0.0 * values.sum(),
            "structure": structure,
        }
        if run.retain_objective.needs.state:
            paired = self.train_dataset.rows.epoch
            epochs = step * run.batch_size * batches_of_step(run, paired) / paired
            lost = float(processes.total(parts["retain"]))
            parts["retain"] = parts["retain"] * self.own_state.weigh(run.retain_objective, lost, epochs)
        return parts

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Gather a sharded model's weights into rank 0; None if every rank holds them all."""
        if not processes.sharded(self.model):
            return None
        whole: dict[str, Tensor] = self.accelerator.get_state_dict(self.model_wrapped)
        return whole

    @property
    def own_state(self) -> OwnState:
        """Return the callback that keeps the retain objective's state."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, OwnState))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        if self.split.state and processes.first():
            path = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / GRADIENT
            write_atomic(path, save({name: value.cpu().contiguous() for name, value in self.split.state.items()}))
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
        """Make AdamW with the learning rates and the weight decay that the adapter gives."""
        if getattr(self, "optimizer", None) is None:
            named = [(name, p) for name, p in (model or self.model).named_parameters() if p.requires_grad]
            cls, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = cls(self.run.adapter.parameter_groups(named, self.run), **options)
            self.run.adapter.hook_optimizer(self.optimizer, named, self.run)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer


def training_arguments(run: Unlearn, model: Any, rows: int, checkpoints: Path) -> TrainingArguments:
    """Return the Trainer's arguments; the schedule is the data set, so that one epoch of it is the whole run.

    Args:
        run: the settings.
        model: what is trained.
        rows: pairs of an epoch.
        checkpoints: folder that checkpoints go to.
    """
    device = next(model.parameters()).device
    return trainer_arguments(
        checkpoints,
        device,
        per_device_train_batch_size=run.batch_size // processes.size(),
        gradient_accumulation_steps=batches_of_step(run, rows),
        num_train_epochs=1,
        max_steps=run.max_steps or -1,
        learning_rate=run.adapter.learning_rate(run),
        lr_scheduler_type=run.lr_scheduler,
        warmup_steps=warmup_of(run, rows, steps_of(run, rows)[0]),
        max_grad_norm=run.max_grad_norm,
        train_sampling_strategy="sequential",
        gradient_checkpointing=run.gradient_checkpointing,
        bf16=autocasts(run.bf16, device),
        optim=OPTIMIZERS[run.optimizer],
        save_strategy="steps",
        save_steps=run.save_steps,
        save_total_limit=2,
        logging_steps=10,
        disable_tqdm=True,
        seed=run.seed,
    )
