"""Steps that stay out of what kept text uses, so that weights forget without disturbing the rest.

A layer W puts out W x. A step dW changes what it puts out for kept text by dW x, on average by tr(dW C dW^T) with C the second
moments of the inputs x there. Each step is multiplied by P = m (C + m 1)^-1: of a direction that kept text uses with mean square
v it keeps the share m / (v + m), so that what is left is in directions that the forgotten rows use and others hardly do. (A
hard projection on what is not used at all is AlphaEdit's, Fang et al. 2025, arXiv:2410.02355; of a small model nothing is unused.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from alter.core import progress
from alter.data import Collator, batches_by_length
from alter.inference import InputMoments, evaluating

BATCH_TOKENS = 2048
"""Padded tokens in one pass over the kept rows."""
MOST_TOKENS = 65_536
"""Tokens from which on only every second row, every third one, ... is read: moments of a thousand dimensions need no more."""


def shares_left(moments: Tensor, leeway: float) -> Tensor:
    """Return P = m (C + m 1)^-1 [in, in] in float32, with m `leeway` times the median of C's eigenvalues.

    The median, and not the mean, since a few directions hold most of what is put through a layer (the first token's).

    Args:
        moments: C, mean outer product of a layer's inputs, [in, in].
        leeway: how large directions may be in C and still be free, beside the median one; larger leaves more of a step.
    """
    values, vectors = torch.linalg.eigh(moments.double())
    values = values.clamp_min(0)
    # directions that nothing uses are free, also where half of them are such
    m = leeway * values.quantile(0.5).clamp_min(1e-6 * values[-1]).clamp_min(torch.finfo(torch.float64).tiny)
    projector: Tensor = (vectors * (m / (values + m))) @ vectors.t()
    return projector.float()


def blocks_linears(model: Any) -> dict[str, nn.Linear]:
    """Return the linear layers of a model's transformer blocks by name: all but the head."""
    head = model.get_output_embeddings()
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head}


@torch.no_grad()
def measured_shares(
    model: Any, layers: Mapping[str, nn.Linear], rows: Sequence[list[int]], leeway: float, pad_token_id: int
) -> dict[str, Tensor]:
    """Return `shares_left` of each layer, with the moments of its inputs over the tokens of kept rows [ids].

    Of more than `MOST_TOKENS` tokens every k-th row is read, with the least k that is enough.
    """
    found = InputMoments(layers)
    rows = rows[:: max(1, math.ceil(sum(map(len, rows)) / MOST_TOKENS))]
    collate = Collator(pad_token_id)
    device = next(model.parameters()).device
    batches = batches_by_length([len(row) for row in rows], BATCH_TOKENS)
    with evaluating(model):
        for numbers in progress(batches, total=len(batches), label="what is kept"):
            batch = collate([{"input_ids": rows[i], "labels": rows[i]} for i in numbers])
            mask = batch["attention_mask"].to(device)
            with found.listening(mask):
                model.get_decoder()(input_ids=batch["input_ids"].to(device), attention_mask=mask, use_cache=False)
    return {name: shares_left(value / found.total, leeway) for name, value in found.sums.items()}


class Protection(TrainerCallback):
    """Multiplies every step of protected weights by their P, from the right; all other weights stay as they are.

    Args:
        model: the student; only protected weights train from here on. Of a LoRA its A begins multiplied by P too, so that B A
            is within.
        shares: P by the name of a layer of the plain model.
    """

    def __init__(self, model: nn.Module, shares: Mapping[str, Tensor]) -> None:
        self.protected: list[tuple[nn.Parameter, Tensor]] = []
        self.before: list[Tensor] = []
        for name, part in model.named_modules():
            share = shares.get(name.removeprefix("base_model.model."))
            if share is None:
                continue
            lora = getattr(part, "lora_A", None)
            weight = part.weight if lora is None else lora["default"].weight
            share = share.to(weight.device)
            if lora is not None:
                with torch.no_grad():
                    weight.copy_(weight @ share)
            self.protected.append((weight, share))
        protected = {id(weight) for weight, _ in self.protected}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(id(parameter) in protected or ".lora_B." in name)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Keep the weights from before the step."""
        self.before = [weight.detach().clone() for weight, _ in self.protected]

    @torch.no_grad()
    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step again, as far as it is allowed."""
        for (weight, share), before in zip(self.protected, self.before, strict=True):
            weight.copy_(before + (weight - before) @ share)
        self.before = []
