"""Adapters, that is, what a run trains: ALTER's adapter, LoRA and its variants, an assistant, or the model's own weights.

`Adapter` says what a kind is asked by a run; each final class is the settings of one kind (`kind` names it in a recipe)
and its answers. `ADAPTERS` holds them by name and is open to plugins (`alter.plugins`). Everything but `FullWeights` is
a PEFT adapter; an assistant, and LoRA with a detector, act through `alter.models.guards`, all others load with
`PeftModel.from_pretrained`.
"""

from __future__ import annotations

from alter.methods.adapters.assistant import AssistantLora
from alter.methods.adapters.base import Adapter, Beginning, Penalty, Settings
from alter.methods.adapters.cards import Card
from alter.methods.adapters.configured import AsymLora, BoundedLora
from alter.methods.adapters.expert import OneExpert
from alter.methods.adapters.full import FullWeights
from alter.methods.adapters.lora import FirstHalves, Lora
from alter.methods.adapters.peft import PeftAdapter
from alter.methods.adapters.registry import ADAPTERS, AnyAdapter, adapter_of
from alter.methods.adapters.routed import AlterAdapter

__all__ = [
    "ADAPTERS",
    "Adapter",
    "AlterAdapter",
    "AnyAdapter",
    "AssistantLora",
    "AsymLora",
    "Beginning",
    "BoundedLora",
    "Card",
    "FirstHalves",
    "FullWeights",
    "Lora",
    "OneExpert",
    "PeftAdapter",
    "Penalty",
    "Settings",
    "adapter_of",
]
