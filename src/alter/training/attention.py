"""Attention for training on a CPU, where PyTorch's 16-bit backward pass is several times slower than in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HALVES = (torch.bfloat16, torch.float16)


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Compute transformers' scaled dot-product attention, in float32 where 16-bit CPU tensors need a gradient.

    Args:
        module: the attention layer.
        query, key, value: [B, heads, T, D].
        attention_mask: boolean, or added to the scores; [B, 1, T, T].

    Returns:
        [B, T, heads, D] in the query's numbers, and no weights.
    """
    slow = query.device.type == "cpu" and query.dtype in HALVES and torch.is_grad_enabled()
    if not slow or not (query.requires_grad or key.requires_grad or value.requires_grad):
        plain: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return plain
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    # autocast would turn the inputs back into 16 bits
    with torch.autocast("cpu", enabled=False):
        out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **settings)
    return out.to(query.dtype), None


@contextmanager
def attention_for_training() -> Iterator[None]:
    """Inside the block, route models whose attention is "sdpa" through `attend`."""
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
