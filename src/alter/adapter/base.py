"""Identify the base model of an adapter, by a fingerprint of its shape and of sampled weights in the adapter's configuration."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from alter.adapter.config import AlterConfig
from alter.adapter.layers import WRAPPERS
from alter.core import UserError
from alter.logits import check_threshold

PACKED = {"Params4bit": "4bit", "Int8Params": "8bit"}
"""bitsandbytes' weights, by class, which is not imported for it."""

FINGERPRINT_TENSORS = 16

FINGERPRINT_VALUES = 256

SHAPE_FIELDS = (
    "model_type",
    "hidden_size",
    "n_embd",
    "intermediate_size",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
)


def _base_parameters(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the base model's parameters under their names without any adapter."""
    inside: nn.Module | None = None
    if isinstance(model, BaseTunerLayer):
        inside = model.base_layer
    elif isinstance(model, AuxiliaryTrainingWrapper):
        inside = model.original_module
    if inside is not None:
        yield from _base_parameters(inside, prefix)
        return
    for name, parameter in model._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    for name, child in model._modules.items():
        if child is not None:
            yield from _base_parameters(child, f"{prefix}{name}.")


def base_fingerprint(model: Any) -> str | None:
    """Return a short text that identifies a base model: its sizes, and a fixed sample of the weights of its blocks.

    Adapters on the model make no difference. Values are compared as bfloat16, so that a model loaded in bfloat16 and in
    float32 has one fingerprint. In float16 some values round differently, and quantised values are others altogether: the
    text says so, and `same_base` compares sizes only where the kinds differ. Of bitsandbytes' weights the packed bytes are
    sampled, which are the same for the same bits, number format and kind of device; other quantised weights are not
    sampled. Embeddings are left out, since vocabularies are resized.

    Args:
        model: a PEFT model, the model inside, or the bare base.

    Returns:
        `"<sizes>:<kind>:<weights>"`, or None where there is nothing to compare: modules that are not transformers models,
        and weights that cannot be read (sharded, or not loaded yet).
    """
    while isinstance(getattr(model, "base_model", None), BaseTuner):
        model = model.base_model
    if isinstance(model, BaseTuner):
        model = model.model
    if not isinstance(model, PreTrainedModel):
        return None
    text_config = model.config.get_text_config()
    sizes = {name: getattr(text_config, name, None) for name in SHAPE_FIELDS}
    parameters = sorted(
        ((WRAPPERS.sub("", name), p) for name, p in _base_parameters(model) if p.dim() >= 2), key=lambda item: item[0]
    )
    blocks = [(name, p) for name, p in parameters if re.search(r"\.\d+\.", f".{name}.")] or parameters
    if not blocks:
        return None
    chosen = [blocks[i * len(blocks) // FINGERPRINT_TENSORS] for i in range(FINGERPRINT_TENSORS)]
    tensors = list(dict(chosen).values())
    if any(p.device.type == "meta" or type(p).__name__ == "DTensor" for p in tensors):
        return None
    shape = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:12]
    plain = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    packed = [p for p in tensors if p.dtype not in plain or type(p) is not nn.Parameter]
    bits = {PACKED.get(type(p).__name__) for p in packed}
    if packed and (len(bits) > 1 or None in bits or any(_repacked(p) for p in packed)):
        return f"{shape}:quantised:-"
    samples = []
    if packed:
        for parameter in packed:
            flat = parameter.detach().reshape(-1).view(torch.uint8)
            index = torch.arange(FINGERPRINT_VALUES, device=flat.device) * len(flat) // FINGERPRINT_VALUES
            samples.append(flat[index].cpu())
        weights = hashlib.sha256(torch.cat(samples).numpy().tobytes()).hexdigest()[:16]
        kind = f"{bits.pop()} {str(model.dtype).removeprefix('torch.')} {packed[0].device.type}"
        return f"{shape}:{kind}:{weights}"
    for parameter in tensors:
        flat = parameter.detach().reshape(-1)
        # integer arithmetic: the same places on every platform
        index = torch.arange(FINGERPRINT_VALUES, device=flat.device) * len(flat) // FINGERPRINT_VALUES
        samples.append(flat[index].to(torch.bfloat16).view(torch.int16).cpu())
    weights = hashlib.sha256(torch.cat(samples).numpy().astype("<i2").tobytes()).hexdigest()[:16]
    kind = "float16" if any(p.dtype == torch.float16 for p in tensors) else "bfloat16"
    return f"{shape}:{kind}:{weights}"


def _repacked(parameter: nn.Parameter) -> bool:
    """Tell whether bitsandbytes has reordered a 4-bit weight for a CPU."""
    return getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False)


def bits_of(fingerprint: str) -> str:
    """Describe the base of a fingerprint, such as "a base in 4bit"."""
    kind = [*fingerprint.split(":"), ""][1].split(" ")[0]
    if kind in PACKED.values():
        return f"a base in {kind}"
    return "a quantised base" if kind == "quantised" else "an unquantised base"


def same_base(first: str, second: str) -> bool:
    """Tell whether two fingerprints can be of the same base model (see `base_fingerprint` for what is compared)."""
    one, other = first.split(":"), second.split(":")
    if len(one) != 3 or len(other) != 3:
        return first == second
    return one[0] == other[0] and (one[1] != other[1] or one[2] == other[2])


def check_base(model: nn.Module, config: AlterConfig, adapter_name: str) -> None:
    """Refuse a base that an adapter was not made for, and record the fingerprint and the vocabulary of one that it can be put on.

    Raises:
        UserError: it is another base, or its vocabulary is too small for the threshold ever to be reached.
    """
    measured = base_fingerprint(model)
    if config.base_fingerprint and measured and not same_base(config.base_fingerprint, measured):
        raise UserError(
            f"Adapter {adapter_name!r} was made for another base model: its fingerprint is "
            f"{config.base_fingerprint}, this model's is {measured}. Load it on "
            f"{config.base_model_name_or_path or 'the model it was trained on'}."
        )
    if config.base_fingerprint and measured and bits_of(config.base_fingerprint) != bits_of(measured):
        warnings.warn(
            f"Adapter {adapter_name!r} was trained on {bits_of(config.base_fingerprint)} and is put on "
            f"{bits_of(measured)}: it works, but what was measured on the one need not hold on the other, and only the "
            "sizes of the two were compared, so make sure that they are the same model.",
            stacklevel=3,
        )
    config.resolved(base_fingerprint=measured, router_layer=None)
    model_config: Any = getattr(model, "config", None)
    text_config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    vocab_size = getattr(text_config, "vocab_size", None)
    if isinstance(vocab_size, int) and vocab_size > 1:
        config.vocab_size = vocab_size
        if config.routed and config.entropy_threshold is not None:
            check_threshold(config.entropy_q, config.entropy_threshold, vocab_size)
