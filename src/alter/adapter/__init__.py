"""ALTER as a PEFT method: importing this module registers it."""

from __future__ import annotations

from typing import Any

from peft.utils import PeftType, register_peft_method


def _add_peft_type(name: str) -> None:
    """Make `name` a member of `PeftType`; PEFT registers only methods that are, and offers no way to add one."""
    if name in PeftType.__members__:
        return
    kind: Any = PeftType
    member = str.__new__(kind, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = kind
    member._sort_order_ = len(kind._member_names_)
    # before it enters the member map: the enum refuses to reassign a member
    type.__setattr__(kind, name, member)
    kind._member_map_[name] = member
    kind._member_names_.append(name)
    kind._value2member_map_[name] = member


_add_peft_type("ALTER")

from alter.adapter.config import AlterConfig  # noqa: E402
from alter.adapter.layer import AlterLinear  # noqa: E402
from alter.adapter.model import AlterModel, base_fingerprint  # noqa: E402
from alter.adapter.routing import Routing, Trace, expert_gates  # noqa: E402

__all__ = ["AlterConfig", "AlterLinear", "AlterModel", "Routing", "Trace", "base_fingerprint", "expert_gates"]


def _register() -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    taken = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType.ALTER)
    if taken is not None:
        raise ImportError(
            f"This PEFT already has a method called ALTER ({taken.__module__}); it and the package `alter` cannot be used "
            "together. Use PEFT's own, or an older PEFT."
        )
    register_peft_method(name="alter", config_cls=AlterConfig, model_cls=AlterModel, prefix="alter_")


_register()
