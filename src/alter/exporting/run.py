"""`alter export`: write a model or an adapter in a form that programs without alter can load."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from alter.core import UserError, memory, show, warn
from alter.data import Example, encode_all, ensure_pad_token, load_examples
from alter.exporting import gguf, loras
from alter.exporting.rounding import BITS, Rounded, calibration, round_blocks
from alter.models import ENDING, ModelSettings, gguf_place, shipped_model
from alter.settings import Written
from alter.storage import read_run

MAX_TOKENS = 512
"""Longest piece of a row that weights are rounded on."""


class Export(ModelSettings):
    """Write a model as a GGUF file for llama.cpp and Ollama, or the experts of an adapter as plain LoRAs."""

    out: Annotated[str, Written(folder=None)]
    """File that ends in .gguf, or a folder for the LoRAs; must not exist."""
    form: Literal["gguf", "loras"] = "gguf"
    """gguf: the whole model as one file. loras: one plain PEFT LoRA for each forget expert of `adapter`."""
    type: Literal["f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = "q8_0"
    """Number format of a GGUF file. For K-quants write f16 and run llama.cpp's `llama-quantize FILE OUT Q4_K_M`."""
    original: str | None = None
    """For a type of 4 or 5 bits: the model before it forgot. Matrices that differ from it keep 8 bits, since steps that wide take
    the difference back. By default the student of the `alter distill` that made the model, or the model without its `adapter`."""
    calibrate: list[str] = Field(default_factory=list)
    """For a type of 4 or 5 bits: files of rows on which the rounded layers are to compute what they did, each file with the
    same weight: what was forgotten, what was kept, ordinary text."""


def export(settings: Export) -> Path:
    """Run `alter export`; return what was written.

    Raises:
        UserError: something is there already, an adapter that stays on the model, or what `gguf.write_gguf` and `loras.write_experts` raise.
    """
    out = Path(settings.out)
    if out.exists():
        raise UserError(f"{out} exists; give another `out`.")
    if settings.form == "loras":
        if settings.adapter is None:
            raise UserError("`form` loras writes the experts of an adapter: give it with `adapter`.")
        made = loras.write_experts(Path(settings.adapter), out, shipped_model(settings.model))
        show(f"{len(made)} LoRAs: {out}", highlight=False, markup=False)
        return out
    if out.suffix != ENDING:
        raise UserError(f"`out` is {settings.out!r}: a GGUF file ends in {ENDING}.")
    if settings.adapter is not None and not settings.merged:
        raise UserError(
            "A GGUF file holds plain weights: fold an adapter that can be merged into them with `merged`, or make weights of "
            "a routed one with `alter distill`."
        )
    if settings.quantization is not None:
        raise UserError(
            f"`quantization` {settings.quantization} packs the weights as no GGUF file holds them: leave it out, and choose the file's "
            "own number format by `type`."
        )
    name = shipped_model(settings.model)
    if memory.held(name) is None and gguf_place(name) is None and (Path(name).expanduser() / "config.json").is_file():
        # said before the weights are read
        from transformers import AutoConfig

        gguf.architecture(AutoConfig.from_pretrained(name).get_text_config())
    sources = _sources(settings)
    model, tokenizer = settings.load()
    fine = _changed(settings, model)
    found = gguf.write_gguf(
        model,
        tokenizer,
        out,
        settings.type,
        # a folder is often called after whom it is about
        out.stem,
        lambda: _grids(settings, model, tokenizer, sources, fine),
        fine,
    )
    kinds = ", ".join(f"{count} tensors in {kind}" for kind, count in found["tensors"].items())
    said = "with its chat template" if found["template"] else "without a chat template: the tokenizer has none"
    show(f"{out}: {found['bytes'] / 1e6:.1f} MB, {kinds}, {said}.", highlight=False, markup=False)
    if settings.type in BITS:
        what = (
            f"keeps 8 bits where a matrix differs from the model before ({len(fine)} do), and rounds all others"
            if fine
            else "can round away part of a small change of the weights, also where rows say what is to stay"
            if sources
            else "rounds away small changes of the weights (`original` MODEL keeps 8 bits where there are any)"
        )
        warn(
            f"{settings.type} {what}. What a model was made to forget can come back by it: measure the file itself before you hand it "
            f"out: `alter attack --model {shlex.quote(str(out))} --original ORIGINAL --forget ROWS`, or write q8_0."
        )
    return out


def _sources(settings: Export) -> list[list[Example]]:
    """Read the rows to calibrate with.

    Raises:
        UserError: a file cannot be read, or the type is not one of 4 or 5 bits.
    """
    for name in ("calibrate", "original"):
        if getattr(settings, name) and settings.type not in BITS:
            raise UserError(
                f"`{name}` is for the types of 4 and 5 bits ({', '.join(BITS)}); `type` is {settings.type}: leave it out."
            )
    return [load_examples(source) for source in settings.calibrate]


def _changed(settings: Export, model: Any) -> set[str]:
    """Return the matrices that differ from those of the model before, for a type of 4 or 5 bits; none where no such model is known.

    Raises:
        UserError: it cannot be loaded, or is of another architecture.
    """
    if settings.type not in BITS:
        return set()
    made_of = _distilled_from(Path(settings.model)) or (settings.model if settings.adapter else None)
    original = settings.original or made_of
    if original is None:
        return set()
    try:
        before = settings.alike(original).load()[0].state_dict()
    except UserError as error:
        if settings.original is not None:
            raise
        raise UserError(
            f"{error} {settings.model} was distilled from it, and {settings.type} keeps 8 bits where the two differ: give the model "
            "from before as `original`."
        ) from None
    now = model.state_dict()
    if any(name not in before or before[name].shape != value.shape for name, value in now.items()):
        raise UserError(
            f"`original` {original} has other weights than {settings.model}: give the model that it was made of."
        )
    return {
        name for name, value in now.items() if value.dim() > 1 and not torch.equal(value.float(), before[name].float())
    }


def _distilled_from(model: Path) -> str | None:
    """Return the student of the distillation whose folder a model lies in."""
    if not (model.parent / "run.json").is_file():
        return None
    facts = read_run(model.parent)
    return str(facts["settings"]["student"]) if facts.get("kind") == "distilled" else None


def _grids(
    settings: Export, model: Any, tokenizer: Any, sources: list[list[Example]], fine: set[str]
) -> dict[str, Rounded]:
    """Round the model's matrices, but for the `fine` ones, in place on the rows; nothing where there are none."""
    if not sources:
        return {}
    ensure_pad_token(tokenizer)
    encoded = [[row.input_ids for row in encode_all(tokenizer, rows, max_length=MAX_TOKENS)[0]] for rows in sources]
    rows, weights = calibration(encoded)
    show(
        f"Rounding to {settings.type}, calibrated on {len(rows)} rows (sources: {len(sources)}).",
        stderr=True,
        markup=False,
    )
    return round_blocks(model, rows, weights, settings.type, tokenizer.pad_token_id, fine)


__all__ = ["Export", "export"]
