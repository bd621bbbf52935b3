"""Apply the language-model head to selected rows in chunks, so that the logits of all tokens never exist at once.

A model's logits are not always what its head gives: some are scaled, capped or cut off afterwards. So a chunk goes through
the model's own `forward`, with the body left out and the chunk put in the place of what the head reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from alter.logits.entropy import chunk_rows

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """Consecutive rows, and the function that is applied to their logits.

    Attributes:
        count: number of rows.
        of: maps logits [c, V] and the place of those c rows within the part to [c, m], row by row.
    """

    count: int
    of: Callable[[Tensor, slice], Tensor]


@contextmanager
def standing_in(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block, replace the modules' `forward`; hooks around them stay."""
    # another library may have put its own into a module already
    own = [module.__dict__.get("forward") for module in modules]
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            if before is None:
                del module.forward
            else:
                module.forward = before


class Head:
    """Everything that a causal language model does after its body: `head.logits(states)` equals the model's own logits.

    Args:
        model: of transformers, with a language-model head, or a `PeftModel` around one. What is on the head takes part.
    """

    def __init__(self, model: Any) -> None:
        # importing PEFT registers the adapter, which imports this module
        from peft import PeftModel

        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        self.head = self.model.get_output_embeddings()
        self.body = self.model.get_decoder()
        self.rows = chunk_rows(self.model.config.get_text_config().vocab_size)
        self._blank: Any = None

    @contextmanager
    def reading(self, positions: Tensor | None = None) -> Iterator[list[Tensor]]:
        """Inside the block, a forward pass puts one row only through the head; its logits are meaningless.

        What the head would have read is appended to the list: the rows at `positions` [B, T] as [n, D], or [B, T, D].
        """
        read: list[Tensor] = []

        # each once: chunks may go through the head before the block ends
        def take(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            handles[0].remove()
            read.append(inputs[0] if positions is None else inputs[0][positions])
            # with other strides a matmul of 16-bit numbers would copy the whole head
            return inputs[0][0, :1][None], *inputs[1:]

        def note(_: Any, __: Any, output: Any) -> None:
            handles[1].remove()
            self._leave_out(output)

        handles = [self.head.register_forward_pre_hook(take), self.body.register_forward_hook(note)]
        try:
            yield read
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """Record the input of the head inside the block: the list holds what it read last, [B, T, D].

        For a model that makes passes of its own before it answers, as a router's frozen one, whose logits it needs.
        """
        read: list[Tensor] = []

        def take(_: Any, inputs: tuple[Any, ...]) -> None:
            read[:] = [inputs[0]]

        def note(_: Any, __: Any, output: Any) -> None:
            self._leave_out(output)

        handles = [self.head.register_forward_pre_hook(take), self.body.register_forward_hook(note)]
        try:
            yield read
        finally:
            for handle in handles:
                handle.remove()

    def _leave_out(self, output: Any) -> None:
        """Keep the structure of the body's output, with which `logits` replaces the body."""
        from transformers.modeling_outputs import ModelOutput

        if isinstance(output, ModelOutput):
            last = output["last_hidden_state"]
            self._blank = type(output)(last_hidden_state=last.new_zeros(1, 1, last.shape[-1]))

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits [n, V] of states [n, D], what the head reads at n positions; within autograd.

        A body that neither `reading` nor `listening` has seen run cannot be left out: it then runs on one token, which changes nothing.
        """
        handle = self.head.register_forward_pre_hook(lambda _, inputs: (states[None], *inputs[1:]))
        try:
            with standing_in([self.body] if self._blank is not None else [], lambda *_, **__: self._blank):
                token = torch.zeros(1, 1, dtype=torch.long, device=states.device)
                # not a call: the hooks around the model belong to a pass over real rows
                logits: Tensor = self.model.forward(input_ids=token, use_cache=False).logits[0]
                return logits
        finally:
            handle.remove()

    def in_chunks(self, states: Tensor, parts: Sequence[Part]) -> Tensor:
        """Return [n, m]: what the parts make of the logits of `states` [n, D], of which one chunk at a time exists.

        The backward makes the logits again, all but the last chunk's, with which it begins.
        """
        from torch.utils.checkpoint import checkpoint

        pieces = []
        first = 0
        for part in parts:
            # chunks of about the same size, none of them tiny
            number = -(-part.count // self.rows)
            edges = [part.count * i // number for i in range(number + 1)] if number else []
            pieces += [(part.of, first, slice(a, b)) for a, b in pairwise(edges)]
            first += part.count
        # without rows the head still takes part, so that its parameters have a gradient
        pieces = pieces or [(parts[0].of, 0, slice(0, 0))]

        def values(chunk: Tensor, of: Callable[[Tensor, slice], Tensor], at: slice) -> Tensor:
            return of(self.logits(chunk), at)

        # DeepSpeed ZeRO-3 takes the head's weight away after each use; only a graph made anew fetches it again
        reentrant = any(hasattr(weight, "ds_id") for weight in self.head.parameters())
        found = [
            checkpoint(values, states[first + at.start : first + at.stop], of, at, use_reentrant=reentrant)
            for of, first, at in pieces[:-1]
        ]
        of, first, at = pieces[-1]
        return torch.cat([*found, values(states[first + at.start : first + at.stop], of, at)])


@contextmanager
def measuring(model: Any, positions: Tensor, parts: Sequence[Part]) -> Iterator[None]:
    """Within the block the `logits` of a forward pass are [n, m]: what `parts` make of the logits at `positions`.

    All is done before the model's forward pass ends, where wrappers that gather parameters (FSDP2) have them at hand,
    and what comes out is what they hang their backward on.

    Args:
        model: a causal language model, or a `PeftModel` around one, which may itself be wrapped.
        positions: [B, T] bool, n of them, row by row.
        parts: what to make of them, in the same order; their counts add up to n.
    """
    head = Head(model)

    with head.reading(positions) as read:

        def replace(_: Any, __: Any, output: Any) -> Any:
            output.logits = head.in_chunks(read.pop(), parts)
            return output

        handle = head.model.register_forward_hook(replace, prepend=True)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def head_on(model: Any, positions: Tensor) -> Iterator[None]:
    """Restrict the head to the hidden states at `positions` [B, T] inside the block: logits are [n, V]."""
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][positions], *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
