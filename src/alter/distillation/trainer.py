"""The student's training: batches of similar length, and the divergence from the teacher as loss."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from alter.core import UserError
from alter.data import Collator, LengthBatches
from alter.distillation.attacker import attacked
from alter.distillation.naming import AtNames
from alter.distillation.rows import KINDS, Lesson, LessonRow
from alter.distillation.settings import Distill, Shares
from alter.distillation.teacher import Teacher, part
from alter.logits import measuring
from alter.training import Steps, attention_for_training, fitting_arguments, seal_checkpoint

# widths of batches are multiples of it: fewer shapes, less memory in caches that are kept for each
WIDTHS = 8


def weights_of(shares: Shares, tokens: Sequence[int]) -> list[float]:
    """Return each kind's weight per token, so that kinds have their shares of the loss and the mean weight is 1.

    With N_k tokens of kind k, N in all, and shares s_k of the kinds that have rows: (s_k / sum of s) (N / N_k); 0 where
    there are none.

    Args:
        shares: of the loss.
        tokens: how many tokens of each of `KINDS` count in an epoch.

    Raises:
        UserError: no kind that has rows has a share.
    """
    given = [getattr(shares, name) if count else 0.0 for name, count in zip(KINDS, tokens, strict=True)]
    whole = sum(given)
    if not whole:
        raise UserError(
            f"shares is {shares.model_dump()}, but all tokens are of kinds without a share ({dict(zip(KINDS, tokens, strict=True))}): "
            "give a share to one of these kinds."
        )
    return [share / whole * sum(tokens) / count if count else 0.0 for share, count in zip(given, tokens, strict=True)]


def passes_of(batch: dict[str, Tensor], tokens: int) -> Iterator[dict[str, Tensor]]:
    """Yield a step's rows in passes of at most so many tokens, padding included, or of one longer row; in their order.

    Args:
        batch: tensors [B] or [B, T] padded on the right, with `attention_mask`.
        tokens: the bound.
    """
    # rounded up as the collator rounds
    widths = [-(-int(length) // WIDTHS) * WIDTHS for length in batch["attention_mask"].sum(1)]
    start = 0
    while start < len(widths):
        end = start + 1
        while end < len(widths) and (end + 1 - start) * max(widths[start : end + 1]) <= tokens:
            end += 1
        width = max(widths[start:end])
        yield {
            name: value[start:end, :width] if value.dim() > 1 else value[start:end] for name, value in batch.items()
        }
        start = end


class DistillTrainer(Trainer):
    """transformers' Trainer with length-grouped batches and, as loss, the weighted mean divergence at the counted tokens.

    Args:
        lesson: the rows.
        teachers: of forget rows, and of all others.
        settings: batch size, seed.
        pad_token_id: fills rows up.
        given: of the Trainer.
    """

    def __init__(
        self, lesson: Lesson, teachers: tuple[Teacher, Teacher], settings: Distill, pad_token_id: int, **given: Any
    ) -> None:
        super().__init__(train_dataset=lesson.rows, **given)
        # the loss is a mean of its batch, which the Trainer has to average over accumulated batches
        self.model_accepts_loss_kwargs = False
        self.lesson = lesson
        self.teachers = teachers
        self.settings = settings
        self.collate = Collator(pad_token_id, multiple_of=WIDTHS)
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.at_names: AtNames | None = None
        tokens = [sum(row.counted for row in lesson.rows if row.kind == k) for k in range(len(KINDS))]
        self.weights = torch.tensor(weights_of(settings.shares, tokens))
        self.forgotten = [row for row in lesson.rows if row.kind == 0]

    def get_train_dataloader(self) -> Any:
        """Return batches of rows of similar length, the forget rows first within each."""
        rows = self.lesson.rows
        batches = LengthBatches([len(row.ids) for row in rows], self.settings.batch_size, self.settings.seed, self)
        return torch.utils.data.DataLoader(
            range(len(rows)),  # type: ignore[arg-type]  # a range is a map-style dataset
            batch_sampler=batches,
            collate_fn=self._batch,
            generator=torch.Generator(),
        )

    def _batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        return self._collated([self.lesson.rows[i] for i in sorted(numbers, key=lambda i: self.lesson.rows[i].kind)])

    def _collated(self, rows: Sequence[LessonRow]) -> dict[str, Tensor]:
        """Pad the rows; add `positions` [B, T] of the tokens before the counted ones, and each row's share `of` them."""
        whole = sum(row.counted for row in rows)
        batch = self.collate(
            [
                {
                    "input_ids": row.ids,
                    "labels": row.ids,
                    "counted": row.counted,
                    "kind": row.kind,
                    "source": row.source,
                    "of": whole,
                }
                for row in rows
            ]
        )
        width = batch["input_ids"].shape[1]
        ends = torch.tensor([len(row.ids) - 1 for row in rows])[:, None]
        place = torch.arange(width)[None]
        batch["positions"] = (place < ends) & (place >= ends - batch["counted"][:, None])
        batch["named"] = torch.zeros(len(rows), width, dtype=torch.bool)
        for k, row in enumerate(rows):
            if row.named is not None:
                batch["named"][k, : len(row.named)] = torch.tensor(row.named)
        return batch

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Compute a step's gradient; with an attacker, the forget rows' gradient at the attacked weights."""
        count = int((inputs["kind"] == 0).sum())
        attacker = self.settings.attacker
        if not attacker.rate or not count:
            return self._plain_step(model, inputs, *args, **kwargs)
        draw = random.Random(f"{self.settings.seed}/{self.state.global_step}")
        forget, rest = (
            {name: value[part] for name, value in inputs.items()} for part in (slice(count), slice(count, None))
        )
        with attacked(model, self._attacks(draw), attacker.rate * draw.random(), self.compute_loss_context_manager):
            loss = self._plain_step(model, forget, *args, **kwargs)
        return loss + self._plain_step(model, rest, *args, **kwargs) if len(rest["kind"]) else loss

    def _plain_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the gradient of these rows as transformers does, in passes that fit into `tokens_per_pass`."""
        step = super().training_step
        losses = [step(model, part, *args, **kwargs) for part in passes_of(inputs, self.settings.tokens_per_pass)]
        return torch.stack(losses).sum()

    def _attacks(self, draw: random.Random) -> Iterator[dict[str, Tensor]]:
        """Draw the batches of each of the attacker's steps."""
        attacker = self.settings.attacker
        for _ in range(attacker.steps):
            rows = draw.sample(self.forgotten, min(attacker.rows, len(self.forgotten)))
            yield self._prepare_inputs(self._collated(rows))

    def _taught(self, teacher: Teacher, sources: Sequence[int], counted: Sequence[int], device: Any) -> Tensor:
        """Return the teacher's states for some rows, concatenated."""
        if teacher.kept is not None:
            return torch.cat([teacher.kept[i] for i in sources]).to(device)
        return torch.cat(teacher.states([self.lesson.teacher[i] for i in sources], counted))

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """Return the mean over the batch's counted tokens of KL(teacher || student), each times its kind's weight.

        Of a part of a batch: what it adds to that mean.

        Raises:
            UserError: it is not finite.
        """
        counted, kinds, sources = (inputs[name].tolist() for name in ("counted", "kind", "source"))
        device = inputs["input_ids"].device
        parts = []
        with torch.autocast(device.type, enabled=False):
            for teacher, wanted in zip(self.teachers, (lambda kind: kind == 0, lambda kind: kind != 0), strict=True):
                chosen = [k for k, kind in enumerate(kinds) if wanted(kind)]
                if chosen:
                    states = self._taught(teacher, [sources[k] for k in chosen], [counted[k] for k in chosen], device)
                    parts.append(part(teacher, states))
        if self.at_names is not None:
            self.at_names.on(inputs["named"])
        with measuring(model, inputs["positions"], parts):
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        apart = outputs.logits[:, 0]
        kind = torch.tensor(kinds).repeat_interleave(torch.tensor(counted))
        loss = (apart * self.weights[kind].to(apart)).sum() / inputs["of"][0]
        if not torch.isfinite(loss):
            raise UserError(
                f"The divergence is {loss.item()} at step {self.state.global_step + 1}: training diverged. Lower "
                f"`learning_rate` ({self.settings.rate:g}), or use precision fp32."
            )
        self.seen.append((apart.detach().cpu(), kind))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean divergence of each kind of row since the last report."""
        if "loss" in logs and self.seen:
            apart, kinds = (torch.cat(values) for values in zip(*self.seen, strict=True))
            found = {name: apart[kinds == k] for k, name in enumerate(KINDS)}
            logs = {**logs, **{name: float(values.mean()) for name, values in found.items() if len(values)}}
            self.seen = []
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        seal_checkpoint(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}", alone=True)


def _arguments(settings: Distill, out: Path, device: torch.device) -> TrainingArguments:
    return fitting_arguments(
        settings,
        out / "checkpoints",
        device,
        learning_rate=settings.rate,
        gradient_checkpointing=settings.gradient_checkpointing,
        disable_tqdm=True,
    )


def train_student(
    settings: Distill,
    out: Path,
    model: Any,
    taught: Lesson,
    teachers: tuple[Teacher, Teacher],
    pad_token_id: int,
    callbacks: Sequence[TrainerCallback],
    checkpoint: Path | None,
    at_names: AtNames | None = None,
) -> DistillTrainer:
    """Train the student.

    Args:
        settings: the completed settings.
        out: the run's folder.
        model: what trains.
        taught: the rows.
        teachers: of forget rows, and of all others.
        pad_token_id: fills rows up.
        callbacks: transformers' callbacks.
        checkpoint: to resume from, or None.
        at_names: layers that train by the tokens of names alone, or None.

    Raises:
        UserError: the divergence is not finite.
    """
    bar = Steps()
    trainer = DistillTrainer(
        taught,
        teachers,
        settings,
        pad_token_id,
        model=model,
        args=_arguments(settings, out, next(model.parameters()).device),
        callbacks=[bar, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.at_names = at_names
    try:
        with attention_for_training():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        bar.close()
        if at_names is not None:
            at_names.off()
    return trainer
