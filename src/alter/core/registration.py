"""Register ALTER with PEFT, which has no API for outside methods: an enum member made by hand, and an import hook.

PEFT registers only methods whose names are members of `PeftType`, so the member is made by hand (`add_member`). And an adapter
of ALTER loads through PEFT alone, by `PeftModel.from_pretrained`, only once the method is registered: `import alter` is to be
enough for that, without importing PEFT (and with it torch) where nobody else does (`after`).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def add_member(kind: type[Enum], name: str) -> None:
    """Add `name` to a string enum, with itself as its value; nothing changes if it is a member."""
    if name in kind.__members__:
        return
    made: Any = kind
    member = str.__new__(made, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = made
    member._sort_order_ = len(made._member_names_)
    # before it enters the member map: the enum refuses to reassign a member
    type.__setattr__(made, name, member)
    made._member_map_[name] = member
    made._member_names_.append(name)
    made._value2member_map_[name] = member


def register(name: str, config: type, model: type, prefix: str) -> None:
    """Register a method with PEFT.

    Args:
        name: of its member of `PeftType`.
        config: class of its configuration.
        model: class of its tuner.
        prefix: what the names of its parameters begin with.

    Raises:
        ImportError: this PEFT has a method of that name.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType, register_peft_method

    add_member(PeftType, name)
    taken = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(name))
    if taken is not None:
        raise ImportError(
            f"This PEFT already has a method called {name} ({taken.__module__}); it and the package `alter` cannot be used "
            "together. Use PEFT's own, or an older PEFT."
        )
    register_peft_method(name=name.lower(), config_cls=config, model_cls=model, prefix=prefix)


class _After:
    """Import hook (finder and loader by protocol): imports one module right after another is first imported.

    It does not inherit from `importlib.abc`, which loads thirty modules, `random` among them.
    """

    loader: Any

    def __init__(self, awaited: str, wanted: str) -> None:
        self.awaited, self.wanted = awaited, wanted

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.awaited:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(self.awaited)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self  # type: ignore[assignment]  # a loader by protocol
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module(self.wanted)


def after(awaited: str, wanted: str) -> None:
    """Import the module `wanted` right after `awaited` is imported; now if it already is."""
    if awaited in sys.modules:
        importlib.import_module(wanted)
    else:
        sys.meta_path.insert(0, _After(awaited, wanted))
