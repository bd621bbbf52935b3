"""Read recipes (settings in a YAML file) strictly: no key is dropped, and no value converted to another type."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from alter.core import UserError, nearest
from alter.storage import read_text

MOST_VALUES = 100_000
"""Most values of a recipe, an anchored one (&a) counted at each of its uses (*a)."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a duplicate key and a key that is not text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or more"
                raise UserError(f"line {line} has the key {shown!r}, which YAML reads as no text: put it in quotes.")
            if key.value in seen:
                raise UserError(f"line {line} gives {key.value!r} a second time: give each setting once.")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _size(value: Any, known: dict[int, int], inside: set[int]) -> int:
    """Count values, an anchored one at each of its uses; infinite for a value that contains itself."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) in inside:
        return MOST_VALUES + 1
    if id(value) not in known:
        inside.add(id(value))
        members = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(member, known, inside) for member in members)
        inside.discard(id(value))
    return known[id(value)]


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the settings in a recipe, by name.

    Raises:
        UserError: the file is missing or cannot be read, is not YAML, gives a key twice or one that is no text, holds more
            than `MOST_VALUES` values, or something else than settings by name.
    """
    path = Path(path)
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise UserError(f"No recipe at {path}.{near}")
    text = read_text(path)
    try:
        given = yaml.load(text, _Loader) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except UserError as error:
        raise UserError(f"{path}, {error}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deep.") from None
    except ValueError as error:
        # a date or a number that YAML's form allows and that does not exist
        raise UserError(f"{path} holds a value that cannot be read: {str(error)[:200]}.") from None
    if not isinstance(given, dict):
        raise UserError(f"{path} holds {type(given).__name__}, expected settings as keys and values.")
    if _size(given, {}, set()) > MOST_VALUES:
        raise UserError(f"{path} holds over {MOST_VALUES} values, or one that holds itself: that is no recipe.")
    return given
