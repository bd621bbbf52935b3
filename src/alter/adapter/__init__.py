"""ALTER as a PEFT method: importing this module registers it."""

from __future__ import annotations

from alter.adapter.base import base_fingerprint
from alter.adapter.config import AlterConfig
from alter.adapter.layer import AlterLinear
from alter.adapter.layers import adapted_layers
from alter.adapter.model import AlterModel, alter_of
from alter.adapter.routing import Routing, Trace, expert_gates
from alter.core.registration import register

__all__ = [
    "AlterConfig",
    "AlterLinear",
    "AlterModel",
    "Routing",
    "Trace",
    "adapted_layers",
    "alter_of",
    "base_fingerprint",
    "expert_gates",
]

register("ALTER", AlterConfig, AlterModel, prefix="alter_")
