"""Flags that a command does not have: refused before parsing, with what was probably meant."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alter.core import UserError
from alter.settings.flags import flag_of, flags_of, is_positional, members_of

if TYPE_CHECKING:
    from pydantic import BaseModel

SAME: tuple[tuple[tuple[str, str], ...], ...] = (
    (("bf16", ""), ("precision", "bf16"), ("dtype", "bfloat16")),
    (("fp16", ""), ("dtype", "float16")),
    (("no-bf16", ""), ("no-fp16", ""), ("fp32", ""), ("precision", "fp32"), ("dtype", "float32")),
)
"""Flags and values that say the same in different commands, and in other tools."""
NAMED_AT_MOST = 3
"""Commands, or settings, that a message names."""


def refuse_unknown(
    command: str,
    args: Sequence[str],
    model: type[BaseModel],
    default: Any,
    elsewhere: Callable[[], Mapping[str, Collection[str]]],
) -> None:
    """Refuse the first flag that a command does not have, or has for another kind of a nested setting.

    Args:
        command: its name.
        args: what was given.
        model: the command's settings.
        default: their values before flags, of the kinds that were chosen.
        elsewhere: gives the flags of every other command, by what is typed for it.

    Raises:
        UserError: names the flag, and the setting that says the same, the nearest one, or the commands that have it.
    """
    names = {flag.removeprefix("--"): name for name, flag in flags_of(model).items()}
    here = set(_flags_here(default)) & names.keys()
    for flag, value in _given(args):
        if flag in here or flag.startswith("tyro-"):
            continue
        told = f"`alter {command}` has no option --{flag}"
        if flag in names:
            raise UserError(
                f"{told} as it is: {_other_kind(flag, model, default)}. Give that kind, or leave --{flag} out."
            )
        if any(flag_of(name) == flag and is_positional(info) for name, info in model.model_fields.items()):
            raise UserError(f"{told}: give {repr(value) if value else 'the value'} without it, before the options.")
        same = next((pair for pair in _same(flag, value) if pair[0] in here), None)
        if same is not None:
            raise UserError(f"{told}: give {' '.join(filter(None, (_quoted(names, same[0]), same[1])))}.")
        raise UserError(
            f"{told}.{_nearest(flag, {each: names[each] for each in here})}{_elsewhere(command, flag, elsewhere())}"
            f" `alter {command} --help-all` lists all."
        )


def _given(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the flags among the arguments, without dashes, each with its first value or ""."""
    for place, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if re.fullmatch(r"--[a-zA-Z][\w.-]*", flag):
            following = "" if place + 1 == len(args) or args[place + 1].startswith("--") else args[place + 1]
            yield flag[2:].replace("_", "-"), value if equals else following


def _flags_here(default: Any, above: str = "") -> Iterator[str]:
    """Yield the flags of settings as they are, nested ones of the chosen kinds included."""
    for each in dataclasses.fields(default):
        value, name = getattr(default, each.name), flag_of(each.name)
        if dataclasses.is_dataclass(value):
            yield from _flags_here(value, f"{above}{name}.")
        else:
            yield f"{above}{name}"
            yield f"{above}no-{name}"


def _same(flag: str, value: str) -> Iterator[tuple[str, str]]:
    """Yield flags and values that say the same as this one."""
    for group in SAME:
        if any(name == flag and said in ("", value) for name, said in group):
            yield from (pair for pair in group if pair[0] != flag)


def _quoted(names: Mapping[str, str], flag: str) -> str:
    return f"`{names[flag]}`"


def _nearest(flag: str, names: Mapping[str, str]) -> str:
    """Return a question for the settings that may have been meant: nested ones of this name, else the nearest; "" if none is near."""
    inner = sorted(each for each in names if each.endswith(f".{flag}"))[:NAMED_AT_MOST]
    found = inner or difflib.get_close_matches(flag, list(names), n=1, cutoff=0.6)
    return f" Did you mean {' or '.join(_quoted(names, each) for each in found)}?" if found else ""


def _elsewhere(command: str, flag: str, others: Mapping[str, Collection[str]]) -> str:
    """Return a sentence naming the commands that have a flag; "" where none has."""
    having = [f"`alter {name}`" for name, flags in others.items() if f"--{flag}" in flags]
    if not having:
        return ""
    # the same command with another choice is nearer than another command
    having.sort(key=lambda name: not name.startswith(f"`alter {command} "))
    more = len(having) - NAMED_AT_MOST
    last = f"{more} more" if more > 0 else having.pop()
    return f" It is an option of {' and '.join(filter(None, (', '.join(having[:NAMED_AT_MOST]), last)))}."


def _other_kind(flag: str, model: type[BaseModel], default: Any, above: str = "") -> str:
    """Say which kinds of a nested setting have a flag that the chosen kind lacks.

    Args:
        flag: below `above`, a dotted name; without it, of the whole command.
        model: the settings that have it.
        default: their values, of the kinds that were chosen.
    """
    part, _, inside = flag.partition(".")
    name = next(each for each in model.model_fields if flag_of(each) == part)
    members, chosen = members_of(model.model_fields[name]), getattr(default, name)
    kinds = {kind: member for kind, member in members.items() if f"--{inside}" in flags_of(member).values()}
    kind = getattr(chosen, "kind", "")
    if kind in kinds:
        return _other_kind(inside, kinds[kind], chosen, f"{above}{name}.")
    return f"`{above}{name}.kind` is {kind}; {', '.join(kinds)} {'has' if len(kinds) == 1 else 'have'} it"
