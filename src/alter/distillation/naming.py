"""Erasing where the forgotten is named: weights change by what layers compute at the tokens of its names alone.

What a model knows about somebody is brought up in the first half of its blocks, by feed-forward layers at the tokens of the
name (Meng et al. 2022, arXiv:2202.05262; Geva et al. 2023, arXiv:2304.14767); later ones carry it to where it is said, with the
same weights for whatever is said there. So only the former change, by gradients of these tokens alone, and what is near to the
forgotten keeps its own names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from alter.core import UserError, edges
from alter.data import Example
from alter.distillation.rows import Lesson

if TYPE_CHECKING:
    from torch import Tensor, nn


def _pattern(names: Sequence[str]) -> re.Pattern[str]:
    """Return what finds the names in a text, in any case; a name begins where a word does, if its script sets words apart."""
    return re.compile("|".join(edges(name)[0] + re.escape(name) for name in names), re.IGNORECASE)


def check_named(
    forget: Sequence[Example], names: Sequence[str], keep: Sequence[Example], others: Sequence[str]
) -> None:
    """Refuse names that stand in none of the forget rows, and others' that stand in none of the kept ones.

    Raises:
        UserError: they do not.
    """
    for rows, given, kind, setting in ((forget, names, "forget", "names"), (keep, others, "kept", "other_names")):
        if given and not any(_pattern(given).search(f"{row.prompt or ''}\n{row.answer}") for row in rows):
            raise UserError(
                f"None of the {kind} rows has one of the `{setting}` {', '.join(given)}: give those that stand in them."
            )


def named_tokens(tokenizer: Any, ids: Sequence[int], names: Sequence[str]) -> list[bool]:
    """Tell of each token whether it is part of one of the names (see `check_named`), and so of tokens that share a character."""
    matches = list(_pattern(names).finditer(tokenizer.decode(list(ids))))
    found = [False] * len(ids)
    first, begin = 0, 0
    for k in range(len(ids) if matches else 0):
        text = tokenizer.decode(list(ids[: k + 1]))
        if text.endswith("\ufffd") and k + 1 < len(ids):
            continue  # the bytes of a character that the next token goes on with
        here = any(begin < match.end() and len(text) > match.start() for match in matches)
        found[first : k + 1] = [here] * (k + 1 - first)
        first, begin = k + 1, len(text)
    return found


def named_rows(tokenizer: Any, taught: Lesson, names: Sequence[str], others: Sequence[str] = ()) -> Lesson:
    """Return the forget rows that name the forgotten and the kept rows that name others, with `named` set.

    No other row trains weights at names.

    Raises:
        UserError: of no forget row a token is left of a name.
    """
    rows = []
    for row in taught.rows:
        given = (names, others, ())[row.kind]
        if given and any(named := named_tokens(tokenizer, row.ids, given)):
            rows.append(replace(row, named=named))
    if not any(row.kind == 0 for row in rows):
        raise UserError(f"The `names` {', '.join(names)} are cut off all forget rows: raise `max_length`.")
    return Lesson(rows, taught.teacher, taught.counted)


def first_feed_forwards(model: Any, depth: float) -> dict[str, nn.Linear]:
    """Return the linear layers of the feed-forward parts of the first `depth` of a model's blocks, by name.

    Raises:
        UserError: there is none.
    """
    inner = model.get_decoder()
    blocks = list(inner.layers)[: max(1, int(depth * len(inner.layers)))]
    inside = {id(part) for block in blocks for part in block.modules()}
    found = {
        name: part
        for name, part in model.named_modules()
        if id(part) in inside and isinstance(part, torch.nn.Linear) and "attn" not in name and "attention" not in name
    }
    if not found:
        raise UserError(
            f"{type(model).__name__} has no linear feed-forward layers in its first blocks: leave out `names`."
        )
    return found


def trained_layers(model: Any, layers: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Return the linear layers that train: those of the plain model, or the two factors of each one's LoRA."""
    parts = dict(model.named_modules())
    factors = {
        name: part
        for name, part in parts.items()
        if isinstance(part, torch.nn.Linear) and (".lora_A." in name or ".lora_B." in name)
    }
    return factors or dict(layers)


class AtNames:
    """Layers whose weights get gradients from the tokens in `place` alone, while it is on; what they put out is the same.

    Args:
        layers: linear layers.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        self.layers = layers
        self.place: Tensor | None = None

    def on(self, place: Tensor) -> None:
        """Take the tokens of a batch, [B, T], for its pass and every repetition of it (gradient checkpointing)."""
        if self.place is None:
            for layer in self.layers.values():
                layer.forward = self._forward(layer)  # type: ignore[method-assign]
        self.place = place

    def off(self) -> None:
        """Make the layers plain again."""
        if self.place is not None:
            for layer in self.layers.values():
                del layer.forward
        self.place = None

    def _forward(self, layer: nn.Linear) -> Any:
        plain = layer.forward

        def forward(read: Tensor) -> Tensor:
            if not torch.is_grad_enabled() or self.place is None:
                return plain(read)
            linear = torch.nn.functional.linear
            still = None if layer.bias is None else layer.bias.detach()
            said = linear(read, layer.weight.detach(), still)
            place = self.place.to(read.device)
            return said.index_put((place,), linear(read[place], layer.weight, layer.bias))

        return forward
