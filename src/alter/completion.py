"""`alter completion`: a script that completes commands, options and their choices in a shell."""

from __future__ import annotations

import argparse
import importlib
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

import tyro
from pydantic import BaseModel, ConfigDict

from alter.commands import COMMANDS, Command
from alter.plugins import BENCHMARKS, NamesOf
from alter.settings import flag_of, is_positional, members_of


class Completion(BaseModel):
    """Print a script that completes alter's commands and options: eval "$(alter completion bash)"."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """The shell that is to complete."""


def completion(settings: Completion) -> str:
    """Run `alter completion`: print the script, which names every command, option and choice of this version."""
    import shtab

    script = str(shtab.complete(parser(), settings.shell))
    print(script)
    return script


def parser() -> argparse.ArgumentParser:
    """Return all commands with their options as an argparse parser: for completion, not for parsing."""
    whole = argparse.ArgumentParser("alter")
    commands = whole.add_subparsers()
    groups: dict[str, Any] = {}
    for name, found in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if group and group not in groups:
            groups[group] = commands.add_parser(group, help=f"{group}s").add_subparsers()
        _fill((groups[group] if group else commands).add_parser(last, help=found.help), found)
    return whole


def _fill(into: argparse.ArgumentParser, found: Command) -> None:
    import shtab

    owners = [(found.module, found.settings)] if found.chooser is None else [BENCHMARKS[name] for name in BENCHMARKS]
    flags: dict[str, Any] = {} if found.chooser is None else {f"--{found.chooser}": list(BENCHMARKS)}
    for module, settings in owners:
        for flag, choices in options(getattr(importlib.import_module(module), settings)):
            flags.setdefault(flag, choices)
    for flag, choices in flags.items():
        if choices == SWITCH:
            into.add_argument(flag, flag.replace("--", "--no-", 1), action="store_true")
            continue
        if flag.startswith("-"):
            given = into.add_argument(flag, choices=choices)
        else:
            given = into.add_argument(flag, choices=choices, nargs="*")
        if choices is None:
            # what takes a text may take a file
            given.complete = shtab.FILE  # type: ignore[attr-defined]


SWITCH: list[str] = []
"""Choices of an option that takes no value."""


def options(model: type[BaseModel], where: str = "") -> Iterator[tuple[str, list[str] | None]]:
    """Yield the options of some settings, nested ones of every kind included, with their choices or None."""
    for name, info in model.model_fields.items():
        members: Mapping[str, type[BaseModel]] = members_of(info)
        kinds = [kind for kind in members if kind]
        if kinds:
            yield f"--{where}{flag_of(name)}.kind", kinds
        for member in members.values():
            for flag, choices in options(member, f"{where}{flag_of(name)}."):
                if not flag.endswith(".kind") or flag.count(".") > where.count(".") + 1:
                    yield flag, choices
        if not members:
            positional = not where and is_positional(info)
            named = next((item.names() for item in info.metadata if isinstance(item, NamesOf)), None)
            yield (name if positional else f"--{where}{flag_of(name)}"), named or _choices(info.annotation)


def _choices(annotation: Any) -> list[str] | None:
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    if annotation is bool:
        return SWITCH
    if get_origin(annotation) in (list, Union, types.UnionType):
        found = [_choices(inner) for inner in get_args(annotation) if inner is not type(None)]
        return found[0] if len(found) == 1 else None
    return None
