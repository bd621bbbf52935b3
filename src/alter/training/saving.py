"""What is trained, written: refused if it is not finite, whole or not at all, and alike for equal runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from alter.core import UserError
from alter.models import FORM_FILE, Form
from alter.storage import to_json, write_atomic


def check_finite(weights: Mapping[str, Tensor], rate: str) -> None:
    """Refuse to save weights that are NaN or infinite, which a step with a finite loss can leave.

    Args:
        weights: by name, those that were trained.
        rate: the setting that holds the learning rate.

    Raises:
        UserError: one holds NaN or an infinite value.
    """
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise UserError(
                f"After the last step {name} holds NaN or infinite values: nothing is saved. Lower `{rate}` or "
                "`max_grad_norm`, and start again with `overwrite`."
            )


def _in_order(config: Path) -> None:
    """Sort the names of layers that PEFT keeps as a set, so that equal runs write equal files."""
    said = json.loads(config.read_text(encoding="utf-8"))
    for name in ("target_modules", "exclude_modules"):
        if isinstance(said.get(name), list):
            said[name] = sorted(said[name])
    write_atomic(config, json.dumps(said, indent=2, sort_keys=True))


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

    With `form` (settings and tensors that `alter.models.guards.load_form` needs) the adapter itself goes into a folder `lora`
    within.
    `weights` are those of a model that is sharded, gathered.
    """
    partial, final = out / f".{name}.partial", out / name
    shutil.rmtree(partial, ignore_errors=True)
    given = {} if weights is None else {"state_dict": weights}
    model.save_pretrained(str(partial if form is None else partial / "lora"), **given)
    for config in partial.rglob("adapter_config.json"):
        _in_order(config)
    if form is not None:
        settings, files = form
        write_atomic(partial / FORM_FILE, to_json(settings))
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
