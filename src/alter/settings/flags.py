"""Settings as flags: names of pydantic fields on the command line, and the values that they may have."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Container, Iterator, Sequence
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from alter.core import UserError, nearest
from alter.plugins import NamesOf, OneOf

if TYPE_CHECKING:
    from pydantic import BaseModel

RENAMED = {"json_path": "json", "lambda_": "lambda"}
"""Flags of fields whose names Python or pydantic reserves."""


def flag_of(field: str) -> str:
    """Return the name of a field's flag, without the leading dashes."""
    return RENAMED.get(field, field).replace("_", "-")


NAMED = re.compile(r"`([a-z]\w*(?:\.\w+)*)(=False)?`")
"""A setting in a message: its name in backticks, dotted where it is nested; with =False, a switch that is off."""


def with_flags(message: str, model: type[BaseModel]) -> str:
    """Return a message with the settings of a command that it names in backticks as flags: `adapter.r` as --adapter.r.

    Other words in backticks stay as they are, settings of other commands among them.
    """
    if NAMED.search(message) is None:
        return message
    flags = flags_of(model)
    return NAMED.sub(lambda found: flags.get(found[1] + (found[2] or ""), found[0]), message)


def flags_of(model: type[BaseModel]) -> dict[str, str]:
    """Return every setting's flag by its name, nested settings of every kind included, and every switch's that is off."""
    return dict(_flags(model, "", ""))


def _flags(model: type[BaseModel], names: str, above: str) -> Iterator[tuple[str, str]]:
    for name, info in model.model_fields.items():
        members = members_of(info)
        for member in members.values():
            yield from _flags(member, f"{names}{name}.", f"{above}{flag_of(name)}.")
        if members or is_positional(info):
            continue
        yield f"{names}{name}", f"--{above}{flag_of(name)}"
        if info.annotation is bool:
            yield f"{names}{name}=False", f"--{above}no-{flag_of(name)}"


def is_positional(info: Any) -> bool:
    """Tell whether a field is given on the command line by its place, without a flag."""
    return any("Positional" in repr(item) for item in info.metadata if type(item).__module__.startswith("tyro"))


def members_of(info: Any) -> dict[str, type[BaseModel]]:
    """Return the models that a field may hold, by `kind` (or one under "" for a plain nested model); empty for a value."""
    from pydantic import BaseModel

    for item in info.metadata:
        if isinstance(item, OneOf):
            return dict(item.registry)
    annotation = info.annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {"": annotation}
    found = [m for m in get_args(annotation) if isinstance(m, type) and issubclass(m, BaseModel)]
    return {m.model_fields["kind"].default if "kind" in m.model_fields else "": m for m in found}


def _chosen_kind(
    where: str, members: dict[str, type[BaseModel]], inner: Any, default: Any, kinds: dict[str, str]
) -> tuple[str, dict[str, Any]]:
    """Return the kind of a nested setting, from flags (`kinds`) or else the recipe (`inner`), and its own settings."""
    if not isinstance(inner, dict):
        raise UserError(f"Setting `{where}` is {inner!r}; expected keys and values.")
    named = inner.get("kind") or getattr(default, "kind", "")
    kind = str(kinds.get(where) or named)
    if kind != named:
        # what the recipe says of another kind means nothing for the one that the flag names
        inner = {}
    if kind not in members:
        raise UserError(
            f"`{where}.kind` is {kind!r}; expected one of {', '.join(members)}.{nearest(kind, members)} "
            "One of your own needs --plugin FILE.py."
        )
    if not inner and default is not None and getattr(default, "kind", "") == kind:
        inner = default.model_dump()
    return kind, {**inner, "kind": kind} if kind else inner


def with_defaults(
    model: type[BaseModel],
    given: dict[str, Any],
    where: str,
    kinds: dict[str, str],
    choices: Sequence[str] = (),
    shown: Container[str] | None = None,
    worded: Callable[[str], str] = str,
) -> Any:
    """Return a plain dataclass with the model's fields, for tyro to fill; pydantic checks all values afterwards, at once.

    For a help text `shown` names the fields that are in it, besides those without a default and every `kind`; None: all. The
    others are left out, as each costs time. `worded` gives the text of a field's help as a user of the command line reads it.
    """
    import tyro
    from pydantic_core import PydanticUndefined

    unknown = [key for key in given if key not in model.model_fields]
    if unknown:
        known = list(model.model_fields)
        raise UserError(
            f"Unknown setting {where}{unknown[0]!r}; expected one of {', '.join(known)}.{nearest(unknown[0], known)}"
        )
    fields: list[Any] = []
    values: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        members = members_of(info)
        annotation: Any = info.annotation
        if members:
            default = info.get_default(call_default_factory=True)
            kind, inner = _chosen_kind(f"{where}{name}", members, given.get(name, {}), default, kinds)
            value = with_defaults(members[kind], inner, f"{where}{name}.", kinds, list(members), shown, worded)
            if shown is not None and not dataclasses.fields(value):
                continue
            # with a help of its own, as tyro would else look for one in the sources of all classes
            annotation = Annotated[type(value), tyro.conf.arg(help="")]
        elif name in given:
            value = given[name]
            if isinstance(value, list) and _fixed(annotation):
                value = tuple(value)  # a recipe and a preset know lists alone, which tyro does not show as a tuple
        else:
            value = info.get_default(call_default_factory=True)
            value = tyro.MISSING if value is PydanticUndefined else value
        if not members:
            if shown is not None and name != "kind" and f"{where}{name}" not in shown and value is not tyro.MISSING:
                continue
            help_ = (
                f"One of {', '.join(choices)}."
                if name == "kind" and len(choices) > 1
                else worded(info.description or "")
            )
            if worded is not str:
                help_ += "".join(
                    f" They are {', '.join(item.names())}." for item in info.metadata if isinstance(item, NamesOf)
                )
            annotation = _annotated(
                name, str if name == "kind" and isinstance(value, str) else annotation, info, help_
            )
        fields.append((name, annotation))
        values[name] = value
    return dataclasses.make_dataclass(model.__name__, fields)(**values)


def _fixed(annotation: Any) -> bool:
    """Tell whether a type is a tuple, or is one beside None."""
    return any(get_origin(each) is tuple for each in (annotation, *get_args(annotation)))


def _annotated(name: str, annotation: Any, info: Any, help_: str) -> Any:
    """Return the field's type with a help text and its own tyro markers (positional), but without its constraints."""
    import tyro

    if get_origin(annotation) is UnionType:
        # of one that is written X | Y tyro imports typeguard to see whether the default fits: a tenth of a help's time
        annotation = Union[get_args(annotation)]  # noqa: UP007
    markers = [item for item in info.metadata if type(item).__module__.startswith("tyro")]
    for marker in markers:
        annotation = Annotated[annotation, marker]
    return Annotated[annotation, tyro.conf.arg(name=RENAMED.get(name), help=help_)]


def split_recipe(args: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Split arguments into the settings of the recipe that comes first, if one does, and the flags."""
    if not args or args[0].startswith("-") or not args[0].endswith((".yaml", ".yml")):
        return {}, args
    from alter.settings.recipes import read_recipe

    return read_recipe(args[0]), args[1:]


def _several(annotation: Any) -> bool:
    """Tell whether a flag of this type takes any number of values."""
    return get_origin(annotation) in (list, dict, set, tuple) or any(map(_several, get_args(annotation)))


def list_flags(settings: Any, where: str = "") -> set[str]:
    """Return the names of the flags that take any number of values, of all nested settings."""
    found: set[str] = set()
    for each in dataclasses.fields(settings):
        value = getattr(settings, each.name)
        name = where + each.name.rstrip("_").replace("_", "-")
        if dataclasses.is_dataclass(value):
            found |= list_flags(value, f"{name}.")
        elif _several(each.type):
            found.add(name)
    return found


def given_once(args: Sequence[str], lists: set[str]) -> list[str]:
    """Merge repeated flags: a list flag keeps the values of all its occurrences, of any other flag the last one counts."""
    groups: list[tuple[str, list[str]]] = [("", [])]
    for arg in args:
        flag, equals, value = arg.partition("=")
        if re.fullmatch(r"--[a-zA-Z][\w.-]*", flag):
            groups.append((flag[2:].replace("_", "-"), [value] if equals else []))
        else:
            groups[-1][1].append(arg)
    kept: dict[str, list[str]] = {}
    for name, values in groups:
        if name not in kept:
            kept[name] = list(values)
        elif name in lists:
            kept[name] += values
        else:
            kept[name] = list(values)
    return [part for name, values in kept.items() for part in ([f"--{name}"] if name else []) + values]


def value_of(args: Sequence[str], name: str) -> str | None:
    """Return the value of `--name VALUE` or `--name=VALUE`, or None."""
    for place, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag == f"--{name}":
            return value if equals else (args[place + 1] if place + 1 < len(args) else "")
    return None


LARGEST, SMALLEST = 1e10, 1e-30
"""Bounds of every number that is given: longer counts would run for years, and smaller floats are 0 in 32 bits."""


def check_numbers(values: Any, defaults: Any, given: Any, where: str = "") -> None:
    """Refuse numbers that no setting can have: infinite, NaN, beyond `LARGEST` or nearer to 0 than `SMALLEST`.

    Raises:
        UserError: names the setting.
    """
    if isinstance(values, dict):
        for name, value in values.items():
            inner = [each.get(name) if isinstance(each, dict) else None for each in (defaults, given)]
            check_numbers(value, inner[0], inner[1], f"{where}.{name}".lstrip("."))
    elif isinstance(values, (list, tuple)):
        for value in values:
            check_numbers(value, None, value, where)
    elif isinstance(values, float) and not math.isfinite(values) and (values is not defaults or given is not None):
        raise UserError(f"`{where}` is {values}; expected a finite number.")
    elif isinstance(values, (int, float)) and abs(values) > LARGEST and (values is not defaults or given is not None):
        raise UserError(f"`{where}` is {str(values)[:40]}; expected at most {LARGEST:g} in size.")
    elif isinstance(values, float) and 0 < abs(values) < SMALLEST:
        raise UserError(f"`{where}` is {values}; expected 0, or at least {SMALLEST:g} in size.")


def name_at(place: Sequence[str | int], model: type[BaseModel]) -> str:
    """Return the dotted name of the setting at a place that pydantic names.

    A place also says the kinds of nested settings, and which item of a list, neither of which is a part of the name.
    """
    names: list[str] = []
    members: dict[str, type[BaseModel]] = {"": model}
    for part in place:
        if part in members:
            members = {"": members[str(part)]}
        elif isinstance(part, str):
            names.append(part)
            info = members[""].model_fields.get(part) if "" in members else None
            members = {} if info is None else members_of(info)
    return ".".join(names)
