"""Run the base model inside an adapted one as it was before any adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from alter.adapter.state import ForwardState, RoutingContext
from alter.logits import Head


def base_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield all submodules except the inside of tuner layers, whose adapters are not part of the base model."""
    yield module
    for name, child in module._modules.items():
        if child is not None and (name == "base_layer" or not isinstance(module, BaseTunerLayer)):
            yield from base_modules(child)


@contextmanager
def frozen_base(context: RoutingContext, module: nn.Module, state: ForwardState) -> Iterator[None]:
    """Inside the block the model is the untouched base: no gradients, no dropout, no trained copies of modules.

    Flips flags only; `requires_grad` and the adapters' own switches stay as they are.
    """
    parts = list(base_modules(module))
    training = [part for part in parts if part.training]
    trained = [part for part in parts if isinstance(part, AuxiliaryTrainingWrapper) and not part.disable_adapters]
    previous, context.state = context.state, state
    try:
        for part in training:
            part.__dict__["training"] = False
        for part in trained:
            part.__dict__["_disable_adapters"] = True
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.__dict__["training"] = True
        for part in trained:
            part.__dict__["_disable_adapters"] = False
        context.state = previous


def run_frozen(
    context: RoutingContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], state: ForwardState
) -> Any:
    """Run the untouched base model."""
    with frozen_base(context, module, state):
        return module.forward(*args, **kwargs)


def read_frozen(
    context: RoutingContext, model: PreTrainedModel, inputs: dict[str, Any], state: ForwardState
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Run the frozen base without its head; return the head's input [B, T, D] and a function to logits [n, V] of n rows of it.

    The logits of all positions never exist at once: those of 64 prompts are gigabytes.
    """
    head = Head(model)
    with head.reading() as read:
        run_frozen(context, model, (), inputs, state)

    def logits(rows: Tensor) -> Tensor:
        with frozen_base(context, model, ForwardState(frozen=True)):
            return head.logits(rows)

    return read[0], logits
