"""Checks of `alter distill` before training: output folder, disk space, teacher and student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from alter.core import UserError
from alter.distillation.settings import Distill
from alter.storage import check_disk
from alter.training import check_folder


def check_out(settings: Distill) -> Path:
    """Return the output folder after checking it; nothing is created or deleted before the models are loaded.

    Raises:
        UserError: it holds teacher or student, or what `check_folder` raises.
    """
    out = Path(settings.out)
    for name in ("run", "model", "adapter", "student"):
        value = getattr(settings, name)
        if value is not None and Path(value).exists() and Path(value).resolve().is_relative_to(out.resolve()):
            raise UserError(f"`out` is {settings.out!r}, which holds the {name} {value}: give another folder.")
    rows = [("forget", settings.forget), ("retain", settings.retain)]
    rows += [("neighbours", source) for source in settings.neighbours] + [
        ("general", source) for source in settings.general
    ]
    return check_folder(settings, rows)


def check_room(out: Path, student: torch.nn.Module, form: str) -> None:
    """Refuse to start where the disk cannot hold the result and two checkpoints (`alter.storage.files.check_disk`).

    Of full weights a checkpoint holds them and both moments of AdamW in float32; of a LoRA next to nothing.
    """
    weights = sum(weight.numel() for weight in student.parameters())
    # the previous checkpoint exists until the new one is written
    needed = weights * 4 * (1 + 2 * 3) if form == "full" else 0
    check_disk(out, needed, "weights with two checkpoints take", "or give an `out` on another disk")


def check_teacher(teacher: Any) -> None:
    """Refuse a teacher whose adapter is disabled: it would teach what was to be forgotten.

    Raises:
        UserError: it is.
    """
    layers = [module for module in teacher.modules() if isinstance(module, BaseTunerLayer)]
    if layers and all(layer.disable_adapters or not layer.active_adapters for layer in layers):
        raise UserError(
            "The teacher's adapter is detached (disable_adapter): it would teach what was to be forgotten. Switch it on."
        )


def check_pair(teacher: Any, vocabulary: Any, student: Any, own: Any, names: tuple[str | None, str | None]) -> None:
    """Refuse a student that cannot take the teacher's place.

    Args:
        teacher, vocabulary: model, as it is loaded, and tokenizer.
        student, own: the same of the student.
        names: what errors call them.

    Raises:
        UserError: another architecture, other sizes, or another vocabulary.
    """
    inner = teacher.get_base_model() if hasattr(teacher, "get_base_model") else teacher
    theirs, ours = inner.config.get_text_config(), student.config.get_text_config()
    fields = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    for field in fields:
        one, other = getattr(theirs, field, None), getattr(ours, field, None)
        if one != other:
            raise UserError(
                f"The student {names[1]} has {field} {other}, the teacher {names[0]} {one}: give a `student` of the "
                "teacher's architecture, such as the model before unlearning."
            )
    if vocabulary.get_vocab() != own.get_vocab():
        raise UserError(
            f"The student {names[1]} has another vocabulary than the teacher {names[0]}, though of the same size: give a "
            "`student` with the teacher's tokenizer."
        )
