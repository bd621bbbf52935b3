"""What scores tell of a greedy reply, so that it need not be generated again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from alter.data import Encoded
from alter.inference.decoding import OTHERS, WARPED
from alter.inference.passes import inner_model
from alter.inference.sharing import known_kind

PLAIN = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "max_length",
    "max_new_tokens",
    "use_cache",
    "transformers_version",
    *WARPED,
    *OTHERS,
}
"""A model's own settings that do not change what it says greedily."""
NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "length_penalty": 1.0}
"""Settings that change it at other values than these."""


def says_what_it_scores(model: Any) -> bool:
    """Tell whether a model's greedy reply goes on where each token was the likeliest when the whole reply was scored.

    So it is of plain models and of LoRA, in at least 32 bits, without settings that reshape the likeliest token; of a routed
    adapter only if one pass tells the routes, since otherwise the frozen base sees prompts alone.
    """
    inner = inner_model(model)
    context = inner.__dict__.get("_alter_context")
    routed = [] if context is None else [context.configs[name] for name in context.active()]
    own = {name: value for name, value in inner.generation_config.to_diff_dict().items() if name not in PLAIN}
    return (
        known_kind(model, inner)
        and inner.dtype in (torch.float32, torch.float64)
        and all(value in (None, False) or name[0] == "_" or NEUTRAL.get(name) == value for name, value in own.items())
        and all(config.one_pass or not config.routed for config in routed)
    )


def begun_replies(
    model: Any, rows: Sequence[Encoded], correct: Sequence[Any], prompts: Sequence[list[int]]
) -> list[list[int]] | None:
    """Return how each greedy reply begins, as scores tell: with the row's own text, as far as each token was the likeliest.

    Args:
        model: that was scored, and is to reply; None is returned unless it `says_what_it_scores`.
        rows: as scored; a row that does not begin with its prompt tells nothing.
        correct: of `Scores`.
        prompts: what is asked.
    """
    if not says_what_it_scores(model):
        return None
    begun: list[list[int]] = []
    for row, right, prompt in zip(rows, correct, prompts, strict=True):
        before = len(prompt) - row.prompt_length
        known = before >= 0 and row.input_ids[: len(prompt)] == prompt
        # a label that was not scored would be taken for one that was
        if not known or len(right) != len(row.input_ids) - row.prompt_length:
            begun.append([])
            continue
        left = right[before:]
        said = len(left) if left.all() else int(left.argmin())
        begun.append(row.input_ids[len(prompt) :][:said])
    return begun
