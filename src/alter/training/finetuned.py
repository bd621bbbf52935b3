"""The output folder of `alter finetune`: checkpoints while it trains, then model, recipe, numbers and card in one rename."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alter.core import UserError, show
from alter.data import check_unread
from alter.storage import check_deletable, check_free, claim, read_object, to_json, write_atomic

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from alter.training.finetune import Finetune

CHECKPOINTS = "checkpoints"
"""Folder inside the output folder that an interrupted run resumes from; gone once the model is there."""

RECIPE_FILE = "finetune.yaml"
"""The recipe as run, written beside the model."""

NUMBERS = "finetune.json"
"""What was measured during the run, written beside the model."""

TOFU_NOTICE = (
    "Trained on TOFU (Maini, Feng, Schwarzschild, Lipton and Kolter 2024, *TOFU: A Task of Fictitious Unlearning for "
    "LLMs*, arXiv:2401.06121, `locuslab/TOFU`), MIT licence, Copyright (c) 2024 Pratyush Maini and co-authors, "
    "locuslab. Its authors and their books are fictitious."
)


def _comparable(settings: Finetune) -> dict[str, Any]:
    """Return the settings that training depends on; the others may change when a run is resumed."""
    free = {"resume", "overwrite", "log_steps", "checkpoint_steps", "report_to", "title", "temperature", "dtype"}
    return settings.model_dump(mode="json", exclude=free)


def resumed_from(settings: Finetune) -> Path | None:
    """Check the output folder and return the checkpoint to resume from, if any.

    Raises:
        UserError: it holds something and neither `resume` nor `overwrite` fits.
    """
    out = Path(settings.out)
    if out.is_file():
        raise UserError(f"{settings.out!r} is a file; give a folder to write the model to.")
    checkpoints = out / CHECKPOINTS
    check_free(checkpoints)
    present = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    # `checkpoints` alone is a name that others use too
    ours = RECIPE_FILE in present or (checkpoints / "settings.json").is_file()
    if settings.resume:
        if not checkpoints.is_dir():
            state = "holds a finished run" if RECIPE_FILE in present else "holds no checkpoints"
            raise UserError(f"Nothing to resume: {settings.out!r} {state}; leave resume out.")
        before = read_object(checkpoints / "settings.json", "the settings of the run")
        changed = [name for name, value in _comparable(settings).items() if before.get(name) != value]
        if changed:
            raise UserError(
                f"The run in {settings.out!r} was started with other settings ({', '.join(changed)}); "
                "give the same ones to resume, or `overwrite` to start again."
            )
        from alter.training.folder import last_whole_checkpoint

        return last_whole_checkpoint(checkpoints)
    if present and not settings.overwrite:
        advice = (
            "resume to continue it, overwrite to start again" if CHECKPOINTS in present else "overwrite to replace it"
        )
        if not ours:
            advice = "give another folder"
        raise UserError(f"{settings.out!r} is not empty ({', '.join(present[:5])}): {advice}.")
    check_deletable(out, (RECIPE_FILE, CHECKPOINTS) if ours else (RECIPE_FILE,))
    reads: list[tuple[str, str | None]] = [("model", settings.model)]
    for name in ("data", "corpora", "tokenizer_texts"):
        reads += [(name, source) for source in getattr(settings, name)]
    check_unread(out, reads)
    return None


def check_contents(settings: Finetune, contents: dict[str, Any]) -> None:
    """Refuse to resume with other contents behind the same names: it would end at weights that no run has.

    Args:
        settings: of the run that is resumed.
        contents: what `start_folder` wrote down then, by what it is of.

    Raises:
        UserError: names what differs.
    """
    before = read_object(Path(settings.out) / CHECKPOINTS / "settings.json", "the settings of the run")
    changed = [name for name, value in contents.items() if before.get(name) != value]
    if changed:
        raise UserError(
            f"The run in {settings.out!r} was started with other {' and '.join(changed)} behind the same names; give what was "
            "given then to resume, or `overwrite` to start again."
        )


def start_folder(settings: Finetune, contents: dict[str, Any]) -> None:
    """Make the output folder with nothing but the settings in `checkpoints/`; a finished model there stays."""
    checkpoints = Path(settings.out) / CHECKPOINTS
    if checkpoints.is_dir():
        shutil.rmtree(checkpoints)
    write_atomic(checkpoints / "settings.json", to_json(_comparable(settings) | contents))
    claim(checkpoints)


def _check_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Refuse to write weights that the last step has broken, or that are too large for `dtype`; the checkpoint stays."""
    import torch

    from alter.training.saving import check_finite

    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    check_finite(trained, "learning_rate")
    most = torch.finfo(dtype).max
    for name, weight in trained.items():
        if (largest := float(weight.detach().abs().max())) > most:
            raise UserError(
                f"{name} holds {largest:.3g}, and `dtype` {str(dtype).removeprefix('torch.')} ends at {most:.3g}: nothing is "
                "saved. `resume` with `dtype` bfloat16."
            )


def finish(
    settings: Finetune, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, numbers: dict[str, Any]
) -> Path:
    """Write model, tokenizer, recipe, numbers and card beside the output folder, then put them in its place."""
    import torch
    import yaml

    _check_weights(model, getattr(torch, settings.dtype))
    out = Path(settings.out)
    fresh = out.with_name(f".{out.name}.new")
    old = out.with_name(f".{out.name}.old")
    for path in (fresh, old):
        if path.exists():
            shutil.rmtree(path)
    model.config.use_cache = True
    if settings.lora_rank is not None:
        from alter.training.lora import save_delta

        save_delta(model, fresh, str(settings.model), getattr(torch, settings.dtype))
    else:
        model.generation_config.bos_token_id = tokenizer.bos_token_id
        model.generation_config.eos_token_id = model.generation_config.eos_token_id or tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.to(getattr(torch, settings.dtype)).save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    recipe = settings.model_dump(mode="json", exclude_defaults=True, exclude={"resume", "overwrite"})
    write_atomic(fresh / RECIPE_FILE, yaml.safe_dump(recipe, sort_keys=False))
    write_atomic(fresh / NUMBERS, to_json(numbers))
    write_atomic(fresh / "README.md", _card(settings, numbers))
    if (out / "tensorboard").is_dir():
        os.replace(out / "tensorboard", fresh / "tensorboard")
    if out.exists():
        os.replace(out, old)
    os.replace(fresh, out)
    if old.exists():
        shutil.rmtree(old)
    show(f"model: {out}", stderr=True, highlight=False)
    return out


def _card(settings: Finetune, numbers: dict[str, Any]) -> str:
    """Return the model card: command, seed, data and what was measured."""
    title = settings.title or Path(settings.out).name
    origin = (
        f"from `{settings.model}`" if settings.model else f"from random weights ({numbers['parameters']:,} parameters)"
    )
    sources = [f"`{source}`" for source in [*settings.data, *settings.corpora]]
    delta = settings.lora_rank is not None
    lines = [
        "---",
        f"library_name: {'peft' if delta else 'transformers'}",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {title}",
        "",
        f"{'A LoRA, f' if delta else 'F'}itted {origin} by `alter finetune {RECIPE_FILE}`, the recipe in this folder.",
        "",
        "| | |",
        "|---|---|",
        f"| data | {', '.join(sources)} |",
        f"| sequences | {numbers['sequences']:,} |",
        f"| optimizer steps, epochs | {numbers['steps']:,}, {numbers['epochs']:g} |",
        f"| training loss, mean of the last {numbers['loss_steps']} steps | {numbers['loss']:.4f} |",
        f"| seed | {settings.seed} |",
        f"| wall time{' since it was resumed' * numbers['resumed']} | {numbers['seconds']:.0f} s on {numbers['made_by']['machine']}, {numbers['device']} |",
        f"| weights | {settings.dtype}, safetensors |",
        "",
    ]
    if any(source.lower().startswith(("builtin:", "locuslab/tofu")) for source in settings.data):
        lines += [TOFU_NOTICE, ""]
    return "\n".join(lines)
