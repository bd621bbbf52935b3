"""The Trainer of `alter finetune`: length-grouped batches, and a loss that weighs each token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from alter.core import UserError
from alter.data import Collator, LengthBatches
from alter.models import multiplies
from alter.training.arguments import fitting_arguments
from alter.training.folder import seal_checkpoint
from alter.training.weighted import weighted_loss

if TYPE_CHECKING:
    from alter.training.finetune import Finetune
    from alter.training.lora import Step


class FinetuneTrainer(Trainer):
    """Train all weights or, with `step`, a LoRA.

    Args:
        settings: of the run.
        rows: `input_ids`, `labels`, `weights` and `number` of each.
        pad_token_id: fills up the shorter rows of a batch.
        step: computes the loss of a LoRA; None where the whole model runs.
        rest: what transformers' Trainer takes.
    """

    def __init__(
        self, settings: Finetune, rows: list[dict[str, Any]], pad_token_id: int, step: Step | None, **rest: Any
    ) -> None:
        self.settings = settings
        self.rows = rows
        self.pad_token_id = pad_token_id
        self.step = step
        super().__init__(train_dataset=rows, **rest)
        # the loss is a mean per batch, so the Trainer has to average it over accumulated batches
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> Any:
        lengths = [len(row["input_ids"]) for row in self.rows]
        return DataLoader(
            self.rows,  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_sampler=LengthBatches(lengths, self.settings.batch_size, self.settings.seed, self),
            collate_fn=Collator(self.pad_token_id, multiple_of=8),
            generator=torch.Generator(),
        )

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        inputs = dict(inputs)
        labels, weights, numbers = inputs.pop("labels"), inputs.pop("weights"), inputs.pop("number")
        smoothing = self.settings.label_smoothing
        if self.step is not None and not return_outputs:
            outputs, loss = None, self.step.loss(model, inputs, labels, weights, numbers, smoothing)
        else:
            outputs = model(**inputs, use_cache=False)
            loss = weighted_loss(outputs.logits, labels, weights, smoothing)
        if not torch.isfinite(loss):
            raise UserError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}: training diverged. Lower "
                f"`learning_rate` ({self.settings.learning_rate:g}), raise warmup, or use precision fp32."
            )
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        seal_checkpoint(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}", alone=True)


def trainer_of(
    settings: Finetune, model: Any, rows: list[dict[str, Any]], pad_token_id: int, checkpoints: Path
) -> FinetuneTrainer:
    """Build the trainer of a run; it writes to `checkpoints`."""
    step = None
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if settings.lora_rank is not None:
        from alter.training.lora import Step

        model = model.to(device)
        narrow = settings.precision == "bf16" and multiplies(torch.bfloat16, model.device)
        step = Step(model, settings.lora_from, rows, narrow)
    arguments = fitting_arguments(
        settings,
        checkpoints,
        device,
        learning_rate=settings.learning_rate,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        neftune_noise_alpha=settings.neftune or None,
        disable_tqdm=True,
    )
    return FinetuneTrainer(settings, rows, pad_token_id, step, model=model, args=arguments)
