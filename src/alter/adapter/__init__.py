"""ALTER as a PEFT method: importing this package registers it, and therefore loads PEFT.

`config`, `layer` and `model` are the method in PEFT's own shape; `layers` says where it goes. Which experts a token takes is
computed once for the whole network: `tracing` and `frozen` read the base, `routing` and `routes` decide, `state` and `hooks` bring it
to the layers, `plan` and `masked` compute them, `decoding` and `generation` go on from token to token. `base` knows an adapter's base again,
`saved` its file.
"""

from __future__ import annotations

from alter.adapter.base import base_fingerprint, same_base
from alter.adapter.config import AlterConfig
from alter.adapter.generation import DecodeState
from alter.adapter.layer import AlterLinear
from alter.adapter.layers import TARGETS, adapted_layers, block_of, first_block, linear_layers
from alter.adapter.model import AlterModel, alter_of
from alter.adapter.routing import Routing, Trace, pool
from alter.adapter.saved import check_keys, expert_columns
from alter.core import register

__all__ = [
    "TARGETS",
    "AlterConfig",
    "AlterLinear",
    "AlterModel",
    "DecodeState",
    "Routing",
    "Trace",
    "adapted_layers",
    "alter_of",
    "base_fingerprint",
    "block_of",
    "check_keys",
    "expert_columns",
    "first_block",
    "linear_layers",
    "pool",
    "same_base",
]

register("ALTER", AlterConfig, AlterModel, prefix="alter_")
