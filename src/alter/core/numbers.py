"""Numeric types that settings share: seeds and sampling temperatures, within bounds that every library accepts."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed: numpy takes no negative one, transformers none of more than 32 bits."""
Temperature = Annotated[float, Field(ge=1e-3, le=1e3)]
"""What logits are divided by before a token is drawn; nearer to 0 they overflow in 16 bits."""


def _greedy_or_drawn(value: float) -> float:
    if value and not 1e-3 <= value <= 1e3:
        raise ValueError("expected 0, which takes the likeliest token, or a number from 0.001 to 1000")
    return value


TemperatureOrZero = Annotated[float, AfterValidator(_greedy_or_drawn)]
"""A temperature, or 0: then the likeliest token is taken."""
