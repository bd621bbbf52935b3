"""transformers' `TrainingArguments` for every Trainer of this package, and the settings that map to them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainingArguments

from alter.core import processes, warn
from alter.models import autocasts


class OneDevice(TrainingArguments):
    """Arguments of a Trainer that stays on the device `on`, however many GPUs there are.

    transformers' own take all GPUs that a single process sees: batches grow with their number, `nn.DataParallel` runs the model
    in threads, and the model is moved to the first GPU whichever was asked for.
    """

    on: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """The one device."""
        return super().device if self.on is None else self.on

    @property
    def n_gpu(self) -> int:
        """1, or 0 without a GPU."""
        return min(1, int(super().n_gpu))


def _heed_settings_alone(bf16: bool) -> None:
    """Take back what `accelerate launch` asks for in the environment, also of one process, where settings say otherwise, with a note."""
    for option, wanted in (("mixed_precision", "bf16" if bf16 else "no"), ("dynamo_backend", "no")):
        name = f"ACCELERATE_{option.upper()}"
        asked = os.environ.get(name, "no")
        if asked.lower() not in ("no", wanted):
            warn(f"The launch's {option} {asked} is not heeded: the settings of the run alone decide its numbers.")
        if name in os.environ:
            os.environ[name] = "no"


def trainer_arguments(checkpoints: Path, device: torch.device, **more: Any) -> TrainingArguments:
    """Return the arguments that every Trainer gets: keep all columns, raise on NaN losses, report to no tracker by default.

    Args:
        checkpoints: folder that checkpoints go to.
        device: that the model trains on; under a launcher each process has its own.
        more: further arguments of `TrainingArguments`.
    """
    _heed_settings_alone(bool(more.get("bf16")))
    arguments = OneDevice(
        output_dir=str(checkpoints),
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        report_to=[],
        use_cpu=device.type == "cpu",
        **more,
    )
    if processes.launched() < 2:
        arguments.on = device
        if device.type == "cuda":
            # accelerate moves batches to the current GPU
            torch.cuda.set_device(device)
    return arguments


class Fitting(Protocol):
    """Settings that `alter finetune` and `alter distill` share."""

    @property
    def batch_size(self) -> int: ...
    @property
    def accumulate(self) -> int: ...
    @property
    def epochs(self) -> float: ...
    @property
    def max_steps(self) -> int | None: ...
    @property
    def schedule(self) -> str: ...
    @property
    def warmup(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def precision(self) -> str: ...
    @property
    def checkpoint_steps(self) -> int: ...
    @property
    def log_steps(self) -> int: ...
    @property
    def seed(self) -> int: ...


def fitting_arguments(settings: Fitting, checkpoints: Path, device: torch.device, **more: Any) -> TrainingArguments:
    """Map fine-tuning settings to `TrainingArguments`; `more` adds the arguments that only one of the two commands uses.

    The Trainer deletes no checkpoint: whoever seals one does (`alter.training.folder.seal_checkpoint`).
    """
    return trainer_arguments(
        checkpoints,
        device,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=autocasts(settings.precision == "bf16", device),
        save_steps=settings.checkpoint_steps,
        logging_steps=settings.log_steps,
        seed=settings.seed,
        **more,
    )
