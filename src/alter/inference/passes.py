"""What every pass over a model needs: the model inside an adapter, its device and context, eval mode, a progress bar."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from alter.core import UserError, console

if TYPE_CHECKING:
    from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module, *, gradients: bool = False) -> Iterator[None]:
    """Inside the block: no dropout and, unless `gradients`, no autograd graph; training modes are restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def inner_model(model: Any) -> Any:
    """Return the transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def text_config(model: nn.Module) -> Any:
    return inner_model(model).config.get_text_config()


def context_length(model: nn.Module) -> int | None:
    """Return the most tokens that a model takes, prompt and reply together; None where its configuration does not say.

    What an adapter puts before every row takes places too.
    """
    most: int | None = getattr(text_config(model), "max_position_embeddings", None)
    config: Any = getattr(model, "active_peft_config", None)
    return most - config.num_virtual_tokens if most is not None and prompted(model) else most


def check_embedded(model: Any, ids: Sequence[int], name: str, tokenizer: Any = None) -> None:
    """Refuse tokens that a model has no embedding for, which end in an index error within it.

    Args:
        model: a causal language model of transformers, or a PeftModel around one.
        ids: tokens.
        name: what errors call them.
        tokenizer: writes the token, if it is given.

    Raises:
        UserError: there is one.
    """
    known = getattr(inner_model(model).get_input_embeddings(), "num_embeddings", None)
    highest = max(ids, default=0)
    if known is None or highest < known:
        return
    word = "" if tokenizer is None else f" {tokenizer.convert_ids_to_tokens(highest)!r}"
    raise UserError(
        f"{name} has the token{word} {highest}, but the model has embeddings for {known} tokens, 0 to {known - 1}: its tokenizer "
        "was given more. Make room in the model (`model.resize_token_embeddings(len(tokenizer))`) and save it again."
    )


def prompted(model: Any) -> bool:
    """Tell whether an adapter that is on puts something that it learnt before every row: prompt tuning, P-tuning, prefix tuning.

    Padding on the left would stand between that and the row, and positions are counted through it: rows of one length are asked
    together. A reply is made by one call of `model.generate`, which knows what stands before it.
    """
    config = getattr(model, "active_peft_config", None)
    return config is not None and bool(config.is_prompt_learning) and bool(model.has_active_enabled_adapter)


def virtual_tokens(model: Any) -> int:
    """Return the number of positions that an adapter of virtual tokens (prompt tuning, P-tuning) puts before every row; else 0."""
    if not prompted(model) or model.active_peft_config.peft_type not in ("PROMPT_TUNING", "P_TUNING"):
        return 0
    return int(model.active_peft_config.num_virtual_tokens)


def shown(iterable: Iterable[Any], total: int, label: str, progress: bool) -> Iterable[Any]:
    return console.progress(iterable, total=total, label=label) if progress else iterable
