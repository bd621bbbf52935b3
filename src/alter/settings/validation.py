"""Build settings from user input; a refusal is one line that names the setting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

from alter.core import UserError, nearest
from alter.settings.flags import NAMED, flags_of, name_at

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound="BaseModel")

BOUNDS = {"less_than_equal": ("le", "less"), "greater_than_equal": ("ge", "more")}
"""Of pydantic's errors about a bound that is itself allowed: where it says the bound, and what lies on its other side."""


def validated(model: type[M], given: Mapping[str, Any], source: str) -> M:
    """Return settings built from given values.

    Args:
        model: their class.
        given: values by name.
        source: where they were given, for the message: the path of a recipe.

    Raises:
        UserError: the class refuses one; names it, and the nearest that there is.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        unknown = first["type"] == "extra_forbidden" and len(first["loc"]) == 1
        near = nearest(str(first["loc"][0]), model.model_fields) if unknown else ""
        raise UserError(f"{source}: {refusal(error, model)}{near}") from None


@contextmanager
def nested(above: str, fields: Mapping[str, str]) -> Iterator[None]:
    """Inside the block, a refusal of an object that a nested setting makes names the settings as the user gives them.

    Args:
        above: name of the nested setting, such as `adapter`.
        fields: its own fields by the object's that each fills: `r` of the object becomes `adapter.r`, and others stay.

    Raises:
        UserError: what the block raised, so named.
    """
    try:
        yield
    except UserError as error:
        own = NAMED.sub(
            lambda found: f"`{above}.{fields[found[1]]}{found[2] or ''}`" if found[1] in fields else found[0],
            str(error),
        )
        raise UserError(own) from error


def refusal(error: ValidationError, model: type[BaseModel], otherwise: str = "") -> str:
    """Return pydantic's first error as one line.

    Args:
        error: what it raised.
        model: the class of the settings.
        otherwise: what is named where the settings as a whole are refused.
    """
    from pydantic import BaseModel

    first = error.errors()[0]
    named = name_at(first["loc"], model)
    where = f"`{named}`" if named in flags_of(model) else named or otherwise
    # a model in the place of a name fills a page
    shown = repr(first["input"]).partition("\n")[0][:200]
    got = "" if isinstance(first["input"], (dict, BaseModel)) else f" (got {shown})"
    return f"{where}: {mistake(first, got)}".removeprefix(": ")


def mistake(found: Mapping[str, Any], got: str = "") -> str:
    """Return pydantic's message on one value, as the end of a sentence.

    Args:
        found: one of an error's `errors()`.
        got: the value, named where the message is pydantic's own; our checks name it themselves.
    """
    said = str(found["msg"])
    own = said.removeprefix("Value error, ")
    said = f"{said}{got}" if own == said else own
    said = said if said.endswith((".", "?")) else f"{said}."
    side = BOUNDS.get(found["type"])
    return f"{said} Give {found['ctx'][side[0]]} or {side[1]}." if side else said


def in_words(value: Any) -> Any:
    """Return a path, a torch.dtype or a torch.device as the text that settings hold; anything else as it is."""
    if isinstance(value, PathLike):
        return str(value)
    if isinstance(value, list):
        return [in_words(each) for each in value]
    return str(value).removeprefix("torch.") if type(value).__name__ in ("dtype", "device") else value
