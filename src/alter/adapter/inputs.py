"""Read the inputs and outputs of a model (tokens, masks, caches, logits) in any form that transformers uses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from alter.core import UserError, caches, is_cache


@lru_cache(maxsize=64)
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Return the parameter names of a module's forward method."""
    return _names(type(module).forward)


def token_mask(attention_mask: Any, batch: int, length: int, device: torch.device, cached: int = 0) -> Tensor:
    """Return a mask [batch, length], true on real tokens, from any attention mask that transformers passes to a model.

    A mask with more columns than there are tokens covers cached ones too; the tokens are its last columns. Under a
    4-D mask a token is real if it may attend to itself, `cached` columns further on (or fewer, where a window has fewer).

    Raises:
        UserError: the mask has another form.
    """
    if isinstance(attention_mask, Mapping):
        attention_mask = next((value for value in attention_mask.values() if value is not None), None)
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -length:].bool().to(device)
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
        if length == 1:
            return torch.ones(batch, 1, dtype=torch.bool, device=device)
        offset = min(cached, attention_mask.shape[-1] - length)
        own = attention_mask[:, 0].diagonal(offset, dim1=-2, dim2=-1)[:, :length]
        real = own if own.dtype == torch.bool else own == 0
        return real.expand(batch, length).to(device)
    raise UserError(
        f"ALTER cannot tell padding from tokens in an attention_mask of type {type(attention_mask).__name__}"
        + (f" with {attention_mask.dim()} dimensions" if isinstance(attention_mask, Tensor) else "")
        + "; give a 2-D one, [batch, tokens] with 1 on real tokens."
    )


def sequence_starts(inputs: Mapping[str, Any], mask: Tensor) -> Tensor | None:
    """Return a mask [B, T] of tokens at position 0, where sequences are packed into a row; None without position_ids."""
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] != mask.shape[1]:
        return None
    return (positions == 0).expand_as(mask).to(mask.device)


class SharedRows:
    """Rows of a batch that holds the tokens that rows share once: `model(..., alter_rows=places)`, for one row of N tokens.

    Args:
        places: [R, T], which of the N tokens stands where in each row; -1 after a row's end.
    """

    def __init__(self, places: Tensor) -> None:
        self.mask = places >= 0
        self._flat = places.clamp(min=0).flatten()
        known = self.mask.flatten().nonzero()[:, 0]
        first = known.new_full((int(places.max()) + 1,), places.numel())
        self._first = first.scatter_reduce(0, self._flat[known], known, "amin")

    def spread(self, values: Tensor) -> Tensor:
        """Turn values [1, N, ...] of the tokens into those of the rows, [R, T, ...]."""
        return values[0].index_select(0, self._flat.to(values.device)).view(*self.mask.shape, *values.shape[2:])

    def once(self, values: Tensor) -> Tensor:
        """Turn values [R, T, ...] into those of each token in the first row that has it, [1, N, ...]."""
        return values.flatten(0, 1).index_select(0, self._first.to(values.device))[None]


NOT_FOR_FROZEN = frozenset(
    {
        "alter_routing",
        "alter_rows",
        "labels",
        *caches.NAMES,
        "logits_to_keep",
        "num_logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_cache",
        "cache_position",
    }
)


def frozen_inputs(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's inputs for one pass over whole rows: no labels, no cache, all logits."""
    kwargs = {name: value for name, value in inputs.items() if name not in NOT_FOR_FROZEN and not is_cache(value)}
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if isinstance(tokens, Tensor):
        length = tokens.shape[1]

        def cut(mask: Any) -> Any:
            # a mask made for a static cache has a column for every slot
            return mask[..., :length, :length] if isinstance(mask, Tensor) and mask.dim() == 4 else mask

        mask = kwargs.get("attention_mask")
        if mask is not None:
            kwargs["attention_mask"] = (
                {name: cut(value) for name, value in mask.items()} if isinstance(mask, Mapping) else cut(mask)
            )
    if "use_cache" in inputs or "use_cache" in parameter_names(module):
        kwargs["use_cache"] = False
    if "return_dict" in inputs or "return_dict" in parameter_names(module):
        kwargs["return_dict"] = True
    return kwargs


def output_logits(output: Any) -> Tensor | None:
    """Return the logits [B, T, V] in a model's output of any form; None if there are none."""
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple):
        logits = next((part for part in output if isinstance(part, Tensor) and part.dim() == 3), None)
    return logits if isinstance(logits, Tensor) and logits.dim() == 3 else None


def cached_tokens(cache: Any, known: int) -> int:
    """Return how many tokens a cache holds; where recurrent states alone are in it, which do not tell, `known`, or 1."""
    layers = getattr(cache, "layers", ())
    if layers and not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        return max(known, 1) if cache.has_previous_state() else 0
    return int(cache.get_seq_length())


def model_logits(module: nn.Module, output: Any) -> Tensor | None:
    """Return the next-token logits in the output of a model with a language-model head, else None."""
    if not isinstance(module, PreTrainedModel) or module.get_output_embeddings() is None:
        return None
    return output_logits(output)
