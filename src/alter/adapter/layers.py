"""Layers of a model that get adapters by default, the block of each, and the first of them to run."""

from __future__ import annotations

import re

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from alter.adapter.config import AlterConfig
from alter.adapter.layer import AlterLinear
from alter.core import UserError, nearest

LLAMA_LIKE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

NEOX_LIKE = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]

TARGETS: dict[str, list[str]] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "olmo3"),
            *("cohere", "cohere2", "granite", "stablelm", "smollm3", "helium", "ministral", "seed_oss", "exaone4"),
        ),
        LLAMA_LIKE,
    ),
    **dict.fromkeys(("gpt_neox", "falcon", "bloom"), NEOX_LIKE),
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "starcoder2": ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_bigcode": ["c_attn", "c_proj", "c_fc"],
    "gpt_neo": ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"],
    "gptj": ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "mpt": ["Wqkv", "out_proj", "up_proj", "down_proj"],
}
"""All linear layers of the blocks, by `model_type`."""

WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What FSDP1 and torch's checkpoint wrapper put into module names, but not into the keys of a state dict."""

FIRST_TO_RUN = ("q_proj", "qkv_proj", "c_attn", "query_key_value", "Wqkv")
"""Layers whose input is what enters a block, and which run before all others in it."""


def linear_layers(model: nn.Module) -> list[str]:
    """Return the name endings of a model's linear layers, sorted, without those inside adapters."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and not re.search(r"(^|\.)alter_(A|B|router)\.", name):
            found.add(name.removesuffix(".base_layer").rpartition(".")[2])
    return sorted(found)


def block_of(name: str) -> tuple[str, int] | None:
    """Return a layer's list of blocks, as a prefix of its name, and the block's number; None outside of blocks."""
    match = re.match(r"(.*?\.)?(\d+)\.", WRAPPERS.sub("", name))
    return (match[1] or "", int(match[2])) if match else None


def first_block(model: nn.Module, from_layer: int | float, setting: str = "from_layer") -> tuple[str, int]:
    """Return the longest list of blocks with linear layers, and the number of the block that `from_layer` means.

    Errors call it `setting`.

    Raises:
        UserError: the layers are not in numbered blocks, or there are too few.
    """
    found: dict[str, set[int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer)) and (place := block_of(name)):
            found.setdefault(place[0], set()).add(place[1])
    if not found:
        raise UserError(
            f"`{setting}` is {from_layer!r}, but the layers of {type(model).__name__} are not in numbered blocks: leave it out."
        )
    prefix = max(found, key=lambda name: len(found[name]))
    count = max(found[prefix]) + 1
    first = from_layer if isinstance(from_layer, int) else int(from_layer * count)
    if first >= count:
        raise UserError(
            f"`{setting}` is {from_layer!r}, but the model has {count} blocks, 0 to {count - 1}: give {count - 1} at most."
        )
    return prefix, first


def default_host(names: list[str]) -> str:
    """Choose among adapted layers, in the model's order, the one whose input the router reads by default.

    It is the first one of the block five sixths of the way to the last one (of the third of four blocks, the 25th of 30),
    whose input is the normalised hidden state there; the very first one where layers are not in numbered blocks.
    """
    blocks: dict[str, dict[int, str]] = {}
    for name in names:
        match = re.match(r"(.*?\.)?(\d+)\.", WRAPPERS.sub("", name))
        if match:
            blocks.setdefault(match[1] or "", {}).setdefault(int(match[2]), name)
    if not blocks:
        return names[0]
    block = max(blocks.values(), key=len)
    order = sorted(block)
    return block[order[max(5 * (len(order) - 1) // 6, 2 * len(order) // 3)]]


def first_to_run(names: list[str]) -> str:
    """Choose among adapted layers, in the model's order, the one of the first block that runs first.

    Modules need not be listed in the order in which they run: known names come first, and a pass checks the choice.
    """
    own = [name for name in names if block_of(name) == block_of(names[0])]
    return next((name for name in own if name.rpartition(".")[2] in FIRST_TO_RUN), own[0])


def adapted_layers(model: nn.Module, adapter: str) -> dict[str, AlterLinear]:
    """Return a model's layers that have this ALTER adapter, by their names in the model as it was."""
    return {
        WRAPPERS.sub("", name): module
        for name, module in model.named_modules()
        if isinstance(module, AlterLinear) and adapter in module.alter_A
    }


def router_layer(names: list[str], config: AlterConfig) -> str:
    """Return the name of the adapted layer that holds the router, among `names` in the order of the model.

    Raises:
        UserError: `router_layer` is not one of them, or lies behind the first experts of a pass that routes itself.
    """
    if not config.routed:
        host = names[0]
    elif config.router_layer is None:
        host = first_to_run(names) if config.one_pass else default_host(names)
    else:
        wanted = config.router_layer
        host = wanted if wanted in names else next((n for n in names if n.endswith(f".{wanted}")), "")
        if not host:
            raise UserError(
                f"`router_layer` {wanted!r} is not among the {len(names)} adapted layers.{nearest(wanted, names)} "
                f"Give one of them, for example {default_host(names)!r}, or leave `router_layer` out."
            )
    if config.one_pass and block_of(host) != block_of(names[0]):
        raise UserError(
            f"`router_layer` is {config.router_layer!r}, but `from_layer` {config.from_layer!r} puts the first experts in "
            f"{names[0]!r}, and the router must read what no expert has changed: leave `router_layer` out."
        )
    return host
