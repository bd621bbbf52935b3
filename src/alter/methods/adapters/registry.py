"""The registry of adapters, open to plugins (`alter.plugins`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from alter.core import UserError, nearest
from alter.methods.adapters.assistant import AssistantLora
from alter.methods.adapters.base import Adapter
from alter.methods.adapters.configured import AsymLora, BoundedLora
from alter.methods.adapters.expert import OneExpert
from alter.methods.adapters.full import FullWeights
from alter.methods.adapters.lora import Lora
from alter.methods.adapters.peft import PeftAdapter
from alter.methods.adapters.routed import AlterAdapter
from alter.plugins import OneOf, Registry, kinds

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
