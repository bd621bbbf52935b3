"""A simulated relearning attacker inside distillation: forgotten content must survive its steps.

Of a student that only says something else about what it knew, a few steps on a few forgotten rows bring the others back. So
the student is led, before each step, a little way to where such an attacker would take it, and learns there; the gradient
is applied where it was before. That is the first order of what Tamirisa et al. 2024 ("Tamper-resistant safeguards",
arXiv:2408.00761) do, and with one step sharpness-aware unlearning (Fan et al. 2025, arXiv:2502.05374) with the sign for a
norm, since an attacker's Adam begins with steps of that form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from alter.logits import Part, measuring


def surprise(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean of -log p of the true next token, in nats, at `positions` [B, T] of `input_ids` [B, T]."""
    place = batch["positions"]
    true = batch["input_ids"].roll(-1, dims=1)[place]

    def lost(logits: Tensor, at: slice) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.float(), true[at], reduction="none")[:, None]

    with measuring(model, place, [Part(len(true), lost)]):
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found: Tensor = model(**given, use_cache=False).logits
    return found[:, 0].mean()


@contextmanager
def attacked(
    model: Any,
    batches: Iterator[dict[str, Tensor]],
    rate: float,
    passes: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[None]:
    """Inside the block, the weights are where an attacker's steps take them; on exit they are restored to the bit.

    A step subtracts `rate` times the sign of the gradient of the mean surprise at the true answers from each weight that
    trains.

    Args:
        model: the student.
        batches: one for each step, with `input_ids`, `attention_mask` and `positions` of the tokens before those to learn.
        rate: how far each weight moves in a step.
        passes: the context of a pass, such as autocast.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    try:
        for batch in batches:
            with passes():
                lost = surprise(model, batch)
            gradients = torch.autograd.grad(lost, weights, allow_unused=True)
            with torch.no_grad():
                for weight, gradient in zip(weights, gradients, strict=True):
                    if gradient is not None:
                        weight.sub_(gradient.sign(), alpha=rate)
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
