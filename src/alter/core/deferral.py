"""Modules that take seconds to import, put off until something of them is used.

`import torch` takes longer than all else that a command does before it has read its flags. Inside `deferred`, such an
import gives a module that loads itself when an attribute of it is read first (`importlib.util.LazyLoader`): the settings
of a command, which hold methods that compute, come without what they compute with. Only `import NAME` is put off:
`from NAME import ...` and the import of a submodule load it at once.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

HEAVY = ("torch", "numpy")
"""What commands' settings import and do not need."""


class _Deferring(MetaPathFinder):
    """Finds modules as they are, and has them loaded when they are used first."""

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
            spec.loader = importlib.util.LazyLoader(spec.loader)
            self.modules.append(fullname)
        return spec


@contextmanager
def deferred(names: Sequence[str] = HEAVY) -> Iterator[None]:
    """Put off imports of these modules inside the block; what was imported in it is loaded when it ends well.

    After an error or an exit (a help text, a flag that is refused) nothing is loaded: nobody goes on to compute.
    """
    finder = _Deferring([name for name in names if name not in sys.modules])
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
    for name in finder.modules:
        # any attribute loads the module
        _ = sys.modules[name].__name__
