"""Adapters, that is, what a run trains: ALTER's adapter, LoRA and its variants, an assistant, or the model's own weights.

`Adapter` says what a kind is asked by a run; each final class is the settings of one kind (`kind` names it in a recipe)
and its answers. `ADAPTERS` holds them by name and is open to plugins (`alter.plugins`). Everything but `FullWeights` is
a PEFT adapter; an assistant, and LoRA with a detector, act through `alter.models.guards`, all others load with
`PeftModel.from_pretrained`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from alter.core import UserError, nearest
from alter.methods.adapters.assistant import AssistantLora
from alter.methods.adapters.base import Adapter, Beginning, Penalty, Settings
from alter.methods.adapters.cards import Card
from alter.methods.adapters.configured import AsymLora, BoundedLora
from alter.methods.adapters.expert import OneExpert
from alter.methods.adapters.full import FullWeights
from alter.methods.adapters.lora import FirstHalves, Lora
from alter.methods.adapters.peft import PeftAdapter
from alter.methods.adapters.routed import AlterAdapter
from alter.plugins import OneOf, Registry, kinds

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

ADAPTERS: Registry[type[Adapter]] = Registry(
    "adapter", kinds(AlterAdapter, Lora, AsymLora, BoundedLora, AssistantLora, PeftAdapter, FullWeights, OneExpert)
)
"""Kinds of adapters by name."""
AnyAdapter = Annotated[Adapter, OneOf(ADAPTERS)]


def adapter_of(settings: Mapping[str, Any]) -> Adapter:
    """Return the adapter whose settings these are, with its `kind`.

    Raises:
        UserError: no adapter has that name.
    """
    kind = settings["kind"]
    if kind not in ADAPTERS:
        raise UserError(
            f"`adapter.kind` is {kind!r}; expected one of {', '.join(ADAPTERS)}.{nearest(str(kind), ADAPTERS)}"
        )
    return ADAPTERS[kind].model_validate(settings)
