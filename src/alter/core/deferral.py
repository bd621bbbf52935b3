"""Defer imports of modules that take seconds until an attribute of them is used.

`import torch` takes longer than all else that a command does before it has read its flags. Inside `deferred`, such an
import gives a module that loads itself when an attribute of it is read first: the settings of a command, which hold
methods that compute, come without what they compute with. Only `import NAME` is put off: `from NAME import ...` and the
import of a submodule load it at once. (`importlib.util.LazyLoader` would load at the second `import NAME`, as Python
looks at the module's spec then.)
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HEAVY = ("torch", "numpy")
"""Modules that commands' settings import but do not need."""


KNOWN_UNLOADED = ("__spec__", "__class__", "__name__", "__file__")
"""Attributes that `import` and `inspect` read of every module, and that are known before it has run."""


class _Unloaded(ModuleType):
    """A module that runs when any attribute outside `KNOWN_UNLOADED` is read; afterwards it is an ordinary module."""

    def __getattribute__(self, name: str) -> Any:
        if name in KNOWN_UNLOADED:
            return super().__getattribute__(name)
        _run(self)
        return getattr(self, name)


def _run(module: ModuleType) -> None:
    if module.__class__ is _Unloaded:
        module.__class__ = ModuleType  # type: ignore[assignment]
        assert module.__spec__ is not None
        assert module.__spec__.loader is not None
        module.__spec__.loader.exec_module(module)


class _LaterLoader(Loader):
    """A loader that creates a module at once, and runs it on first use."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        module.__class__ = _Unloaded


class _Deferring(MetaPathFinder):
    """A finder that leaves modules as they are, but has them loaded on first use."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = set(names)
        self.modules: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.names:
            return None
        # the search below must not come here again
        self.names.discard(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LaterLoader(spec.loader)
            self.modules.append(fullname)
        return spec


@contextmanager
def deferred(names: Sequence[str] = HEAVY) -> Iterator[None]:
    """Inside the block, defer imports of these modules; those imported are loaded when the block ends without an error.

    After an error or an exit (a help text, a flag that is refused) nothing is loaded: no computation follows.
    """
    finder = _Deferring([name for name in names if name not in sys.modules])
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
    for name in finder.modules:
        _run(sys.modules[name])
