"""Where in a model an adapter goes: blocks by share of the depth, linear layers by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard

from pydantic import BeforeValidator, Field

from alter.core import UserError, nearest

if TYPE_CHECKING:
    from torch import nn


def _one_pattern(given: Any) -> Any:
    """Unwrap a list of one that cannot be a layer's name: `all-linear`, or a pattern, which the command line made a list."""
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], str):
        given = given if re.fullmatch(r"[\w.]+", given[0]) else given[0]
    if isinstance(given, str):
        try:
            re.compile(given)
        except re.error as error:
            raise ValueError(
                f"{given!r} is no regular expression ({error}): give one that whole names of layers match, such as "
                r"'.*\.(q|v)_proj', or the names' endings, such as q_proj v_proj"
            ) from None
    return given


Targets = Annotated[list[str] | str | None, BeforeValidator(_one_pattern)]
"""Which linear layers: endings of their names, one regular expression for whole names, or "all-linear"."""


Share = Annotated[float, Field(ge=0, le=1)]
"""A share of a model's depth."""


def blocks(model: nn.Module) -> tuple[str, int]:
    """Return the name of a model's list of blocks (`model.layers`) and their number.

    Raises:
        UserError: no parameter lies in a numbered block.
    """
    found: dict[str, set[int]] = {}
    for name, _ in model.named_parameters():
        match = re.match(r"(.*?)\.(\d+)\.", name)
        if match:
            found.setdefault(match[1], set()).add(int(match[2]))
    if not found:
        raise UserError(f"{type(model).__name__} has no numbered blocks, so a share of its depth means nothing.")
    name = max(found, key=lambda key: len(found[key]))
    return name, len(found[name])


def block_at(depth: float, count: int) -> int:
    """Return the block of `count` whose middle is nearest to a share of the depth: 7.5 / 32 is block 7 of 32, 1 of 6."""
    return min(range(count), key=lambda i: (abs((i + 0.5) / count - depth), i))


def blocks_within(span: tuple[float, float], count: int) -> list[int]:
    """Return the blocks of `count` whose middle lies within two shares of the depth; at least the one nearest to their mean."""
    inside = [i for i in range(count) if span[0] <= (i + 0.5) / count <= span[1]]
    return inside or [block_at(sum(span) / 2, count)]


def _is_linear(module: Any) -> TypeGuard[nn.Linear]:
    """Tell whether a module is a linear layer; one of GPT-2 (Conv1D) counts."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def target_names(model: Any, given: Sequence[str] | str | None) -> list[str] | str:
    """Return the names of the linear layers to adapt: those given, or all of the blocks' for a known architecture.

    "all-linear" stands for all linear layers in numbered blocks of any architecture.

    Raises:
        UserError: nothing is given and the architecture is not known.
    """
    from alter.adapter import TARGETS, linear_layers

    if given == "all-linear":
        inside = f"{blocks(model)[0]}."
        linear = (name for name, module in model.named_modules() if _is_linear(module))
        return sorted({name.rpartition(".")[2] for name in linear if name.startswith(inside)})
    if given is not None:
        return given if isinstance(given, str) else list(given)
    kind = model.config.model_type
    if kind not in TARGETS:
        raise UserError(
            f"`adapter.target_modules` is not given, and no default is known for model type {kind!r}."
            f"{nearest(kind, TARGETS)} The linear layers of this model are: {', '.join(linear_layers(model))}."
        )
    return TARGETS[kind]


def target_layers(model: nn.Module, names: Sequence[str] | str, chosen: Sequence[int] | None) -> dict[str, nn.Linear]:
    """Return the linear layers that a LoRA adapter with these settings goes on, by name.

    Raises:
        UserError: there is none.
    """
    from alter.adapter import linear_layers

    found = {}
    for name, module in model.named_modules():
        ending = bool(re.fullmatch(names, name)) if isinstance(names, str) else name.rpartition(".")[2] in names
        number = re.search(r"\.(\d+)\.", f".{name}.")
        if _is_linear(module) and ending and (chosen is None or (number and int(number[1]) in chosen)):
            found[name] = module
    if not found:
        raise UserError(f"No linear layer is named {names!r}; there are: {', '.join(linear_layers(model))}.")
    return found
