"""The experts of a routed adapter as plain LoRAs, which PEFT and vLLM load without alter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alter.core import UserError
from alter.storage import read_object, to_json, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for (`max_lora_rank`), 16 by default."""


def expert_weights(
    tensors: dict[str, Tensor], experts: int, expert: int, *, retention: bool = True
) -> dict[str, Tensor]:
    """Return one forget expert with the retention expert as a LoRA's weights: A as it is, and B_r + B_f,d.

    Args:
        tensors: an ALTER adapter's; `alter_A` [r, in], and `alter_B` [out, (N + 1) r], the retention expert's columns first.
        experts: N.
        expert: d, from 1 on.
        retention: whether the retention expert opens; without it B_f,d alone.
    """
    from alter.adapter import expert_columns

    found = {}
    for name, value in tensors.items():
        if ".alter_A." in name:
            found[name.replace(".alter_A.", ".lora_A.")] = value.contiguous()
        elif ".alter_B." in name:
            own = expert_columns(value, expert, experts).float()
            if retention:
                own = own + expert_columns(value, 0, experts).float()
            found[name.replace(".alter_B.", ".lora_B.")] = own.to(value.dtype).contiguous()
    return found


def with_one_scale(tensors: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return an ALTER adapter's tensors with each layer's scale alpha / r in its B: vLLM knows one scale for all layers."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    found = dict(tensors)
    for name, value in tensors.items():
        if ".alter_B." in name:
            layer = name.partition(".alter_B.")[0].removeprefix("base_model.model.")
            r = ranks.get(get_pattern_key(ranks.keys(), layer), config["r"])
            alpha = alphas.get(get_pattern_key(alphas.keys(), layer), config["alter_alpha"])
            found[name] = (value.float() * (alpha / r)).to(value.dtype)
    return found


def check_plain(adapter: Path) -> dict[str, Any]:
    """Return the settings of an ALTER adapter, after checking that its experts can be written as LoRAs.

    Raises:
        UserError: it is no ALTER adapter, or the update of one expert is no product of two matrices.
    """
    config = read_object(adapter / CONFIG, "the settings of an adapter")
    if config.get("peft_type") != "ALTER":
        raise UserError(
            f"{adapter} is an adapter of kind {config.get('peft_type')}, which has no experts; `form` loras is for ALTER's. "
            "A LoRA loads as it is."
        )
    if config.get("router") == "dense":
        raise UserError(
            f"{adapter} has `router` 'dense', which mixes all experts in every layer at every token: none of them stands alone "
            "as a LoRA."
        )
    if config.get("bound"):
        raise UserError(f"{adapter} squashes its update (bound {config['bound']}), so its experts are no LoRAs.")
    if config.get("modules_to_save") or config.get("bias", "none") != "none":
        raise UserError(f"{adapter} also trained modules_to_save or biases, which no LoRA of one expert holds.")
    return config


def write_experts(
    adapter: Path, out: Path, base: str, names: Sequence[str] | None = None, only: Sequence[int] = ()
) -> list[Path]:
    """Write a folder for each forget expert, whole or not at all: `out/NAME/adapter_model.safetensors` and its settings.

    Args:
        adapter: folder of an ALTER adapter.
        out: must not exist.
        base: the model that it was made for, as PEFT is to find it.
        names: what the experts' folders are called; by default expert-1 and so on.
        only: numbers of the experts to write; by default all.

    Returns:
        the folders.

    Raises:
        UserError: see `check_plain`; or `out` exists.
    """
    config = check_plain(adapter)
    patterns = config.get("rank_pattern") or {}
    own_scales = bool(patterns or config.get("alpha_pattern"))
    if out.exists():
        raise UserError(f"{out} exists; give another `out`.")
    experts = config["num_forget_experts"]
    from safetensors.torch import load_file, save

    tensors = load_file(str(adapter / WEIGHTS))
    if own_scales:
        tensors = with_one_scale(tensors, config)
    plain = {
        "peft_type": "LORA",
        "task_type": config["task_type"],
        "base_model_name_or_path": base,
        "r": config["r"],
        "lora_alpha": config["r"] if own_scales else config["alter_alpha"],
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": config["target_modules"],
        "exclude_modules": config.get("exclude_modules"),
        "layers_to_transform": config.get("layers_to_transform"),
        "layers_pattern": config.get("layers_pattern"),
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
        "bias": "none",
        "inference_mode": True,
    }
    if config.get("from_layer") is not None:
        # the blocks below have no experts, and PEFT would look for their weights there too
        held = {
            name.partition(".alter_A.")[0].removeprefix("base_model.model.") for name in tensors if ".alter_A." in name
        }
        plain["target_modules"] = sorted(held)
    chosen = list(only) or list(range(1, experts + 1))
    titles = list(names) if names is not None else [f"expert-{number}" for number in chosen]
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for title, number in zip(titles, chosen, strict=True):
            own = expert_weights(tensors, experts, number, retention=config.get("retention_expert", True))
            weights = save(own, metadata={"format": "pt"})
            write_atomic(partial / title / WEIGHTS, weights)
            write_atomic(partial / title / CONFIG, to_json(plain))
        write_atomic(partial / "README.md", _card(base, titles, max((config["r"], *patterns.values()))))
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return [out / title for title in titles]


def _card(base: str, titles: Sequence[str], rank: int) -> str:
    room = next((size for size in RANKS if size >= rank), rank)
    more = f"\nTheir rank is {rank}: start vLLM with its `max_lora_rank` at {room}.\n" if rank > 16 else ""
    return f"""---
library_name: peft
base_model: {json.dumps(base)}
tags: [alter, unlearning]
---

# Plain LoRAs of the experts of an ALTER adapter

One folder for each forget expert: {", ".join(titles)}. PEFT and vLLM load each; alter is not needed. A LoRA acts on every token of
a text, where the router of the whole adapter would choose the expert token by token: use one for texts about its request alone.
Whoever has the base weights can leave it off.
{more}"""
