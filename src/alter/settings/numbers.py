"""Numeric types that settings share: seeds, temperatures and counts, within bounds that can be worked with; and how numbers are shown."""

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

# Counts: the lower bound is the setting's own ------------------------------------------------------------------------

BatchSize = Annotated[int, Field(le=4096)]
"""Rows, prompts or replies that a model takes at once, all of them laid out in memory."""
Steps = Annotated[int, Field(le=1_000_000)]
"""Steps of a training, texts that are sampled one by one, minutes."""
Passes = Annotated[float, Field(le=10_000)]
"""Passes over rows."""
Tokens = Annotated[int, Field(le=1_000_000)]
"""Tokens of a text or of its end, or entries of a vocabulary."""
Count = Annotated[int, Field(le=10_000)]
"""Ranks, experts, replies to a question, attempts, processors: each costs memory or a repetition of the work."""
Rows = Annotated[int, Field(le=1_000_000_000)]
"""Most rows to take of those there are, or another upper limit of which more costs nothing."""

# Text ----------------------------------------------------------------------------------------------------------------


def rounded(value: float, form: str) -> str:
    """Return a number in a format such as `.3f`; what rounds to zero has no sign."""
    shown = format(value, form)
    return shown if shown.strip("+-0,.%") else shown.lstrip("+-")
