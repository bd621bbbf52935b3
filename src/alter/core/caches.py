"""Under which name transformers hands a cache to a model and takes it back: `past_key_values`, and from 5.24 on `cache`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

NAMES = ("cache", "past_key_values", "cache_params")
"""All names that there are or were; the last is Mamba's before 5.24."""


def cache_given(inputs: Mapping[str, Any]) -> Any:
    """Return the cache among a model's inputs, under whatever name; None if there is none."""
    found = next((value for name in NAMES if (value := inputs.get(name)) is not None), None)
    return next(filter(is_cache, inputs.values()), None) if found is None else found


def cache_of(output: Any) -> Any:
    """Return the cache in the output of a model or of `generate`, under whatever name; None if there is none."""
    # the newest name first: the others warn there
    found = next((value for name in NAMES if (value := getattr(output, name, None)) is not None), None)
    parts = output if isinstance(output, tuple) else output.values() if isinstance(output, Mapping) else ()
    return next(filter(is_cache, parts), None) if found is None else found


def is_cache(value: Any) -> bool:
    """Tell whether a value is a cache of transformers'."""
    from transformers.cache_utils import Cache

    return isinstance(value, Cache)


def as_input(cache: Any) -> dict[str, Any]:
    """Return a cache as an input of a model or of `generate`; nothing for None."""
    return {} if cache is None else {_name(): cache}


@functools.cache
def _name() -> str:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
