"""The folder of a run: what may be overwritten, checkpoints to resume from, tensors and adapters kept in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from alter.core import processes
from alter.core.errors import UserError
from alter.core.files import to_json, write_atomic
from alter.models.guards import FILE as FORM
from alter.models.guards import Form
from alter.training.settings import Unlearn


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


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files were all written; a kill while saving leaves one that is not."""
    found = []
    weights = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        # trainer_state.json is the last file that the trainer writes
        whole = (path / "trainer_state.json").exists() and any((path / name).exists() for name in weights)
        if number.isascii() and number.isdecimal() and whole:
            found.append((int(number), path))
    return max(found)[1] if found else None


def check_checkpoint(checkpoint: Path) -> None:
    """Refuse a checkpoint that this launch would not read all of.

    Raises:
        UserError: it was written under another way to divide the model, or for DeepSpeed by another number of processes.
    """
    files = {path.name for path in checkpoint.iterdir()}
    wrote = "fsdp2" if "optimizer.bin" in files else "zero3" if "latest" in files else "ddp"
    if wrote != processes.launch():
        names = {"ddp": "without sharding", "fsdp2": "under FSDP2", "zero3": "under DeepSpeed ZeRO-3"}
        raise UserError(
            f"{checkpoint} was written {names[wrote]}, this run is started {names[processes.launch()]}: resume as it was "
            f"started (recipes/accelerate/{wrote}.yaml), or start again with --overwrite."
        )
    count = max(1, sum(name.startswith("rng_state_") for name in files))
    if wrote == "zero3" and count != processes.size():
        raise UserError(
            f"{checkpoint} was written by {count} processes, and DeepSpeed ZeRO-3 reads it with as many only: resume "
            f"with --num_processes {count}."
        )


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

    return processes.in_turn(read_or_make)


def check_finite(weights: Mapping[str, Tensor], rate: str) -> None:
    """Refuse to save weights that are not numbers; the loss of the step that broke them was still finite.

    Args:
        weights: by name, those that were trained.
        rate: the setting that holds the learning rate.

    Raises:
        UserError: one holds NaN or an infinite value.
    """
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise UserError(
                f"After the last step {name} holds NaN or infinite values: nothing is saved. Lower {rate} or "
                "max_grad_norm, and start again with --overwrite."
            )


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

    With `form` (settings and tensors that `alter.models.guards.load` needs) the adapter itself goes into a folder `lora`
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
