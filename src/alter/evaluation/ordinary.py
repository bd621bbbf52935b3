"""The cost of forgetting on ordinary text never shown in training: the loss of each token before and after."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from alter.data import Encoded, Example, apart_from, encode
from alter.data.background import background
from alter.inference import context_length, score
from alter.settings import rounded

ALL = "all"
"""Name of the figures of all kinds together."""


def ordinary_loss(
    model: Any, tokenizer: Any, forget: Sequence[Example], base: Any = None
) -> dict[str, dict[str, float]]:
    """Measure the mean negative log-likelihood of ordinary text with and without the adapter, or of two models.

    The text is the shipped sample of kinds that no router is fitted on, without passages that name what `forget` is about.

    Args:
        model: a `PeftModel`, or any model if its `base` is given.
        tokenizer: its tokenizer.
        forget: rows that were to be forgotten.
        base: the model before; by default `model` with its adapter switched off.

    Returns:
        by kind, and for `ALL`: `tokens`, the mean loss `before` and `after` in nats, and `change`, after / before - 1.
    """
    texts = [f"{example.prompt or ''}, {example.answer}" for example in forget]
    limit = context_length(model)
    rows: list[Encoded] = []
    kinds: list[str] = []
    for kind, examples in apart_from(background(unseen=True), texts).items():
        for example in examples:
            # of a text longer than the context its beginning; of a chat that does not fit nothing
            row = encode(tokenizer, example, max_length=limit if example.kind == "text" else None)
            if (limit is None or len(row.input_ids) <= limit) and len(row.input_ids) > 1:
                rows.append(row)
                kinds.append(kind)
    after = score(model, rows, pad_token_id=tokenizer.pad_token_id, label="ordinary text").logprob
    with nullcontext() if base is not None else model.disable_adapter():
        before = score(
            model if base is None else base, rows, pad_token_id=tokenizer.pad_token_id, label="ordinary text, before"
        ).logprob
    found = {}
    for name in [*dict.fromkeys(kinds), ALL]:
        chosen = [i for i, kind in enumerate(kinds) if name in (kind, ALL)]
        was, now = (-np.concatenate([part[i] for i in chosen]).astype(np.float64) for part in (before, after))
        found[name] = {
            "tokens": len(was),
            "before": float(was.mean()),
            "after": float(now.mean()),
            "change": float(now.mean() / was.mean() - 1),
        }
    return found


def ordinary_sentence(found: dict[str, dict[str, float]]) -> str:
    """Summarise the result of `ordinary_loss` in a sentence."""
    every = found[ALL]
    kinds = ", ".join(f"{name} {rounded(figures['change'], '+.2%')}" for name, figures in found.items() if name != ALL)
    return (
        f"Ordinary text never shown: the loss of {every['tokens']} tokens differs by {rounded(every['change'], '+.2%')} from the base's "
        f"({every['before']:.4f} before, {every['after']:.4f} after; {kinds})."
    )
