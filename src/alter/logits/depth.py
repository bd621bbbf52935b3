"""The hidden states after one block, with or without what a pass computes behind them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from alter.logits.head import standing_in


@dataclass(frozen=True)
class Depth:
    """A block whose hidden states are read, and the blocks after it, which those states do not depend on."""

    block: nn.Module
    behind: tuple[nn.Module, ...] = ()


@contextmanager
def states_of(depth: Depth | None, alone: bool = False) -> Iterator[list[Tensor]]:
    """Within the block the hidden states [B, T, H] that `depth.block` puts out are appended to the list.

    With `alone` nothing else of a pass is wanted: the blocks behind hand on what they get, and logits mean nothing.
    """
    seen: list[Tensor] = []
    if depth is None:
        yield seen
        return
    # what a block puts out besides its states, in the architectures where that is a tuple
    others: list[tuple[Any, ...] | None] = []

    def take(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        others.append(output[1:] if isinstance(output, tuple) else None)

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return states if others[0] is None else (states, *others[0])

    handle = depth.block.register_forward_hook(take)
    try:
        with standing_in(depth.behind if alone else (), hand_on):
            yield seen
    finally:
        handle.remove()
