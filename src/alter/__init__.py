"""ALTER: asymmetric LoRA for token-entropy-guided unlearning (Chen et al., AAAI 2026, arXiv:2603.01792).

`import alter` is all it takes for PEFT to load and make ALTER adapters. The registration itself waits until `peft` is
imported, so that the command line can print its help without loading torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

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


class _RegisterWithPeft(Loader, MetaPathFinder):
    """Imports `alter.adapter`, which registers the method, right after `peft` has been imported by anybody."""

    loader: Loader

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("peft")
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module("alter.adapter")


if "peft" in sys.modules:
    importlib.import_module("alter.adapter")
else:
    sys.meta_path.insert(0, _RegisterWithPeft())
