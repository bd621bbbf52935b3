"""Exports of a package whose modules are imported when an export is first asked for (PEP 562).

An `__init__` that imported what it exports would load torch for a help text. So it lists its exports as

    if TYPE_CHECKING:
        from alter.data.encoding import Encoded as Encoded
        from alter.data.encoding import encode as encode

    lazy(globals())

which type checkers and editors read as imports, and of which `lazy` reads each name's module out of the file. `from alter.data
import encode` then imports that module and no other, each time anew, so that a test may replace a name where it is defined.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HOMES: dict[str, Mapping[str, str]] = {}


def lazy(package: dict[str, Any]) -> None:
    """Give a package `__all__`, `__dir__` and `__getattr__` for what its file imports under `if TYPE_CHECKING`.

    A submodule may be exported as well; another name must not be that of a submodule, which Python binds in its place.

    Args:
        package: the `globals()` of the package's `__init__`.
    """
    own = package["__name__"]
    found = {}
    for block in ast.parse(Path(package["__file__"]).read_text(encoding="utf-8")).body:
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING":
            for node in block.body:
                assert isinstance(node, ast.ImportFrom), ast.unparse(node)
                for name in node.names:
                    found[name.name] = f"{own}.{name.name}" if node.module == own else str(node.module)

    def names() -> list[str]:
        return sorted({*package, *found})

    def export(name: str) -> Any:
        if name not in found:
            raise AttributeError(f"module {own!r} has no attribute {name!r}")
        home = importlib.import_module(found[name])
        return home if found[name] == f"{own}.{name}" else getattr(home, name)

    _HOMES[own] = found
    package.update(__all__=sorted(found), __dir__=names, __getattr__=export)


def homes(package: str) -> Mapping[str, str]:
    """Return the module of each lazy export of a package, which is imported for it; nothing of one that imports all."""
    importlib.import_module(package)
    return _HOMES.get(package, {})
