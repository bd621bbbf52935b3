"""Models loaded with what a run made of them."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

from alter.api.given import as_library
from alter.api.runs import Run
from alter.core import UserError
from alter.settings import in_words


def load(
    model: str | PathLike[str] | Run,
    adapter: str | PathLike[str] | None = None,
    *,
    dtype: Any = "auto",
    device: Any = None,
    quantization: Any = None,
    chat_template_kwargs: Sequence[str] = (),
) -> tuple[Any, Any]:
    """Load a model and its tokenizer, with an adapter of any kind that `alter unlearn` makes.

    Args:
        model: folder, hub id, builtin:NAME, or a `Run`, which brings its adapter.
        adapter: folder or hub id of the adapter.
        dtype: auto, float32, bfloat16 or float16; or the torch.dtype.
        device: cpu, cuda, cuda:0, mps, or the torch.device; the GPU by default if there is one.
        quantization: "4bit" or "8bit".
        chat_template_kwargs: variables of the chat template, each NAME=VALUE (enable_thinking=false); by default those of a `Run`.

    Returns:
        model, ready for inference, and tokenizer.

    Raises:
        UserError: no such model or adapter, or one that does not fit the other.
    """
    from alter.models import load_model

    if isinstance(model, Run):
        adapter = adapter or model.adapter
        chat_template_kwargs = chat_template_kwargs or model.template
        model = model.model
    for name, value in {"model": model, "adapter": "" if adapter is None else adapter}.items():
        if not isinstance(value, (str, PathLike)):
            raise UserError(f"`{name}` is of {type(value).__name__}; expected the name of what is to be loaded.")
    with as_library():
        return load_model(
            in_words(model), in_words(adapter), in_words(dtype), in_words(device), quantization, chat_template_kwargs
        )
