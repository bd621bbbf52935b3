"""Digests of the code that decides the numbers of a cell."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from alter.core import homes
from alter.plugins import plugins_digest
from alter.storage import digest


def source_digest() -> str:
    """Hash the code that decides a cell's numbers: training, evaluation and all modules of this package they import."""
    return _code_digest(
        [
            "alter.training.run",
            "alter.evaluation.tofu.measuring",
            "alter.evaluation.added",
            "alter.comparison.survival",
            "alter.comparison.own",
        ]
    )


@functools.cache
def distilling_digest() -> str:
    """Hash the code that decides what a distillation makes of a model; it enters the keys of distilled cells alone."""
    return _code_digest(["alter.distillation.run"])


def _code_digest(modules: Sequence[str]) -> str:
    """Hash modules and all modules of this package that they import, at any depth."""
    package = Path(__file__).parent.parent
    waiting, seen = [*modules], set()
    files: list[Path] = []
    while waiting:
        name = waiting.pop()
        if name in seen or not name.startswith("alter."):
            continue
        seen.add(name)
        path = package.joinpath(*name.split(".")[1:])
        owner, _, last = name.rpartition(".")
        home = homes(owner).get(last, name) if path.parent.is_dir() else name
        if home != name:
            waiting.append(home)
            continue
        if path.is_dir() and homes(name):
            continue  # a package that says no more than where its exports are
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not path.is_file():
            continue  # a name out of a module, not a module
        files.append(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                target = importlib.util.resolve_name("." * node.level + node.module, name.rpartition(".")[0])
                waiting += [target, *(f"{target}.{alias.name}" for alias in node.names)]
    own = [[str(path.relative_to(package)), path.read_text()] for path in sorted(files)]
    return digest([*own, plugins_digest()])
