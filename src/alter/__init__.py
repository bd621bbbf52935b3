"""ALTER: asymmetric LoRA for token-entropy-guided unlearning (Chen et al., AAAI 2026, arXiv:2603.01792).

`import alter` is all it takes for PEFT to load and make ALTER adapters. The registration itself waits until `peft` is
imported (`alter.core.registration`), so that the command line can print its help without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from alter.core.registration import after

if TYPE_CHECKING:
    from alter.adapter import AlterConfig, AlterModel
    from alter.api import Run, attack, compare, distill, evaluate, load, unlearn
    from alter.core.errors import UserError

__version__ = "0.1.0"

_HOMES = {
    "AlterConfig": "alter.adapter",
    "AlterModel": "alter.adapter",
    "Run": "alter.api",
    "UserError": "alter.core.errors",
    "attack": "alter.api",
    "compare": "alter.api",
    "distill": "alter.api",
    "evaluate": "alter.api",
    "load": "alter.api",
    "unlearn": "alter.api",
}

__all__ = [
    "AlterConfig",
    "AlterModel",
    "Run",
    "UserError",
    "__version__",
    "attack",
    "compare",
    "distill",
    "evaluate",
    "load",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'alter' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


after("peft", "alter.adapter")
