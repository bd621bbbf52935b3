"""Frozen bases in 4 or 8 bits by bitsandbytes (extra `bnb`): loading them, and dequantising their weights."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch

from alter.core import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

Bits = Literal["4bit", "8bit"]
"""4bit: NF4 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314). 8bit: LLM.int8 (arXiv:2208.07339)."""


def loading(bits: Bits, dtype: str, place: torch.device) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantise linear layers while loading; head and embeddings stay.

    Args:
        bits: see `Bits`.
        dtype: of everything that is not quantised, and of the 4-bit layers' products; "auto" is bfloat16.
        place: where the model goes.

    Raises:
        UserError: bitsandbytes is not installed, or knows no such device.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"`quantization` {bits} needs bitsandbytes, which is not installed: pip install 'alter-unlearning[bnb]', or leave "
            "it out."
        )
    if place.type == "mps":
        raise UserError(
            f"`quantization` {bits} runs on cuda and cpu, not on mps: give another `device`, or leave it out."
        )
    from transformers import BitsAndBytesConfig

    wide = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    if bits == "4bit":
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=wide
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    return {"dtype": wide, "quantization_config": config, "device_map": {"": place}}


def keep_gradients(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit layers on a CPU at the first pass without gradients.

    What it packs has no backward: adapters below such a layer would get no gradient from it, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  a name that only bitsandbytes' layers have


def plain_weight(layer: Any) -> Tensor:
    """Return a linear layer's weight [out, in], dequantised if need be; float32, on the CPU.

    Raises:
        UserError: it is quantised by something else than bitsandbytes.
    """
    weight = layer.weight
    kind = type(weight).__name__
    if kind == "Int8Params":
        # where the scales are before the first pass, and after it
        scale = layer.state.SCB if weight.SCB is None else weight.SCB
        plain: Tensor = weight.data.float() * scale[:, None] / 127
        return plain.cpu()
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        plain = dequantize_4bit(weight.data, weight.quant_state).float()
        return plain.cpu()
    if not weight.is_floating_point():
        raise UserError(
            f"The weights are quantised as {kind}, which is read for bitsandbytes only: load them unquantised."
        )
    plain = weight.detach().float()
    return plain.cpu()
