"""Exports of a package whose modules are imported when an export is first asked for (PEP 562).

An `__init__` that imported what it exports would load torch for a help text. So it lists its exports as

    with lazy(globals()):
        from alter.data.encoding import Encoded as Encoded
        from alter.data.encoding import encode as encode

which type checkers and editors read as imports, and which at run time only notes each name's module. `from alter.data import
encode` then imports that module and no other, each time anew, so that a test may replace a name where it is defined.
"""

from __future__ import annotations

import _thread
import builtins
import importlib
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

_HOMES: dict[str, Mapping[str, str]] = {}
_TURN = _thread.allocate_lock()
"""`builtins.__import__` is one for all threads, and replaced by one package at a time; imports of others pass through. A lock
of `threading`'s would be a tenth of what `import alter` costs."""


class lazy:
    """Note the `from MODULE import NAME as NAME` of a block as exports of a package, without importing anything.

    Afterwards the package has `__all__`, `__dir__` and `__getattr__` for them. A submodule may be exported as well; another
    name must not be that of a submodule, which Python binds in its place.

    Args:
        package: the `globals()` of a package's `__init__`.
    """

    def __init__(self, package: dict[str, Any]) -> None:
        self.package = package
        self.homes: dict[str, str] = {}

    def __enter__(self) -> None:
        _TURN.acquire()
        self.real = builtins.__import__
        builtins.__import__ = self._note

    def _note(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if globals is not self.package:
            return self.real(name, globals, locals, fromlist or (), level)
        own = self.package["__name__"]
        self.homes |= {given: f"{own}.{given}" if name == own else name for given in fromlist or ()}
        return SimpleNamespace(**dict.fromkeys(fromlist or ()))

    def __exit__(self, *error: object) -> None:
        builtins.__import__ = self.real
        _TURN.release()
        for name in self.homes:
            self.package.pop(name, None)
        _HOMES[self.package["__name__"]] = self.homes
        self.package.update(__all__=sorted(self.homes), __dir__=self._names, __getattr__=self._found)

    def _names(self) -> list[str]:
        return sorted({*self.package, *self.homes})

    def _found(self, name: str) -> Any:
        own = self.package["__name__"]
        if name not in self.homes:
            raise AttributeError(f"module {own!r} has no attribute {name!r}")
        home = importlib.import_module(self.homes[name])
        return home if self.homes[name] == f"{own}.{name}" else getattr(home, name)


def homes(package: str) -> Mapping[str, str]:
    """Return the module of each lazy export of a package, which is imported for it; nothing of one that imports all."""
    importlib.import_module(package)
    return _HOMES.get(package, {})
