"""`alter export`: write a model or an adapter in a form that programs without alter can load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from alter.core import memory
from alter.core.console import show, warn
from alter.core.errors import UserError
from alter.core.outputs import Written
from alter.exporting import gguf, loras
from alter.models.gguf import ENDING, gguf_place
from alter.models.loading import ModelSettings
from alter.models.naming import shipped_model

COARSE = ("q4", "q5")
"""Types whose steps are wider than the changes that make weights forget (docs/how-to/ship.md)."""


class Export(ModelSettings):
    """Write a model as a GGUF file for llama.cpp and Ollama, or the experts of an adapter as plain LoRAs."""

    out: Annotated[str, Written(folder=None)]
    """File that ends in .gguf, or a folder for the LoRAs; must not exist."""
    form: Literal["gguf", "loras"] = "gguf"
    """gguf: the whole model as one file. loras: one plain PEFT LoRA for each forget expert of --adapter."""
    type: Literal["f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = "q8_0"
    """Number format of a GGUF file. For K-quants write f16 and run llama.cpp's `llama-quantize FILE OUT Q4_K_M`."""


def export(settings: Export) -> Path:
    """Run `alter export`; return what was written.

    Raises:
        UserError: something is there already, an adapter that stays on the model, or what `gguf.write_gguf` and `loras.write_experts` raise.
    """
    out = Path(settings.out)
    if out.exists():
        raise UserError(f"{out} exists; give another --out.")
    if settings.form == "loras":
        if settings.adapter is None:
            raise UserError("--form loras writes the experts of an adapter: give it with --adapter.")
        made = loras.write_experts(Path(settings.adapter), out, shipped_model(settings.model))
        show(f"{len(made)} LoRAs: {out}", highlight=False, markup=False)
        return out
    if out.suffix != ENDING:
        raise UserError(f"--out is {settings.out!r}: a GGUF file ends in {ENDING}.")
    if settings.adapter is not None and not settings.merged:
        raise UserError(
            "A GGUF file holds plain weights: fold an adapter that can be merged into them with --merged, or make weights of "
            "a routed one with `alter distill`."
        )
    name = shipped_model(settings.model)
    if memory.held(name) is None and gguf_place(name) is None and (Path(name).expanduser() / "config.json").is_file():
        # said before the weights are read
        from transformers import AutoConfig

        gguf.architecture(AutoConfig.from_pretrained(name).get_text_config())
    model, tokenizer = settings.load()
    found = gguf.write_gguf(model, tokenizer, out, settings.type, Path(settings.model).name)
    kinds = ", ".join(f"{count} tensors in {kind}" for kind, count in found["tensors"].items())
    said = "with its chat template" if found["template"] else "without a chat template: the tokenizer has none"
    show(f"{out}: {found['bytes'] / 1e6:.1f} MB, {kinds}, {said}.", highlight=False, markup=False)
    if settings.type.startswith(COARSE):
        warn(
            f"{settings.type} rounds away small changes of the weights, and with them what a model was made to forget. Measure the "
            f"file itself before you hand it out: alter attack --model {out} --original ORIGINAL --forget ROWS, or write q8_0."
        )
    return out


__all__ = ["Export", "export"]
