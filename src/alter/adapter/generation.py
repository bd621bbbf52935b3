"""Routing state of a generation: the next tokens' routes, kept on its key-value cache or its session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alter.adapter.routing import History
from alter.core import UserError


@dataclass(eq=False)
class Continuation:
    """Values at the end of a forward pass that route the next token."""

    mask: Tensor
    past: dict[str, Tensor]
    ids: Tensor | None = None


class DecodeState:
    """Routes of the tokens that come next, one row per row of the cache it rides on."""

    MIRRORED = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop", "reset")

    def __init__(self) -> None:
        self.gates: dict[str, Tensor] = {}
        self.past: dict[str, Tensor] = {}
        self.silent: dict[str, bool] = {}
        self.stale: str | None = None
        self.history: History | None = None

    @classmethod
    def of(cls, cache: Any) -> DecodeState | None:
        """Return the state on a cache, or None if no ALTER forward pass has left one."""
        return getattr(cache, "_alter_state", None)

    @classmethod
    def attach(cls, cache: Any) -> DecodeState:
        """Attach a state to a cache, and mirror the cache's batch operations on it."""
        state = cls.of(cache)
        if state is None:
            state = cls()
            cache._alter_state = state
            for name in cls.MIRRORED:
                if hasattr(type(cache), name):
                    # not a closure: a cache is copied and pickled with its routes
                    setattr(cache, name, partial(_mirrored, cache, name))
        return state

    def apply(self, operation: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor t by operation(t)."""
        for tensors in (self.gates, self.past):
            for name, value in tensors.items():
                tensors[name] = operation(value)
        if self.history is not None:
            self.history.apply(operation)

    def mirror(self, method: str, argument: Any) -> None:
        """Apply to the routes what a method of the cache has done to the keys and values."""
        if method == "reset":
            self.gates, self.past, self.silent, self.stale, self.history = {}, {}, {}, None, None
        elif method == "crop" and self.history is not None:
            # the argument is minus the number of tokens to remove
            self.history.crop(self.history.length + int(argument))
        elif method == "crop":
            if int(argument) != 0:
                self.stale = "tokens were cropped from its end"
        elif method == "batch_repeat_interleave":
            self.apply(lambda t: t.repeat_interleave(argument, dim=0))
        elif isinstance(argument, Tensor):
            self.apply(lambda t: t[argument.to(t.device)])
        else:
            self.apply(lambda t: t[argument])


def _mirrored(cache: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    result = getattr(type(cache), method)(cache, *args, **kwargs)
    values = [*args, *kwargs.values()]
    cache._alter_state.mirror(method, values[0] if values else None)
    return result


@dataclass
class Session:
    """History of one `generate` call without a key-value cache: every token's gates, and those of the next token."""

    ids: Tensor | None = None
    mask: Tensor | None = None
    gates: dict[str, Tensor] = field(default_factory=dict)
    next: dict[str, Tensor] = field(default_factory=dict)
    past: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def _keys(ids: Tensor, mask: Tensor) -> list[bytes]:
        table = torch.stack([ids, mask.to(ids.dtype)], 1).cpu().numpy()
        return [row.tobytes() for row in table]

    def rows(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return, for each row of `ids` [B, T + 1], the row of the history that it extends by one token.

        Raises:
            UserError: a row extends none.
        """
        assert self.ids is not None
        assert self.mask is not None
        known = {key: row for row, key in reversed(list(enumerate(self._keys(self.ids, self.mask))))}
        found = [known.get(key) for key in self._keys(ids[:, :-1], mask[:, :-1])]
        if None in found:
            raise UserError(
                "ALTER cannot follow this way of generating: a row of the batch is not a row of the previous step with one "
                "more token. Greedy search, sampling and beam search work; assisted and contrastive decoding do not."
            )
        return torch.tensor(found, device=ids.device)
