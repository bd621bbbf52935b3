"""What survives unlearning: how far a cell disturbed the model, and what a relearning attacker recovers from it.

Disturbance is the mean KL divergence of the original's next-token distributions from the model's on ordinary text, which no
method was trained on; the leak is leak@k (`alter.evaluation.leakage`) before and after an attacker has trained all weights
on some of the part's forget rows, on the others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from alter.attacks import train_steps
from alter.comparison.settings import Survival
from alter.core import UserError
from alter.data import Example, encode, encode_all
from alter.data.background import background
from alter.evaluation import Groups, Leak, leaked, metric_record
from alter.inference import context_length, evaluating, virtual_tokens
from alter.storage import Record

PASSAGES = 64
"""Passages of ordinary text, of each kind in turn."""
TOKENS = 128
"""Tokens of a passage that are read."""

Load = Callable[[], tuple[Any, Any]]


def ordinary_passages(tokenizer: Any, context: int | None = None) -> list[list[int]]:
    """Return token ids of ordinary text that ships with the package and joins no router's fit, within a context."""
    most = TOKENS if context is None else min(TOKENS, context)
    kinds = background(unseen=True).values()
    longest = max(map(len, kinds), default=0)
    rows = [kind[i] for i in range(longest) for kind in kinds if i < len(kind)][:PASSAGES]
    return [ids for row in rows if len(ids := encode(tokenizer, row).input_ids[:most]) > 1]


def mean_divergences(original: Any, model: Any, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """Return KL(original || model) per token in nats, the mean over each text's positions, [texts].

    Raises:
        UserError: the two have vocabularies of different sizes.
    """
    found = []
    with evaluating(original), evaluating(model):
        for text in texts:
            ids = torch.tensor([list(text)], device=next(model.parameters()).device)
            p, q = (
                each(input_ids=ids, use_cache=False).logits[0, virtual_tokens(each) :].float().log_softmax(-1)
                for each in (original, model)
            )
            if p.shape != q.shape:
                raise UserError(f"The model has {q.shape[-1]} tokens and the original {p.shape[-1]}: no disturbance.")
            # what the original excludes has weight 0, whatever the model says
            gap = torch.where(p.isfinite(), p.exp() * (p - q), torch.zeros_like(p))
            found.append(float(gap.sum(-1).mean()))
    return np.array(found, dtype=np.float64)


def divided(rows: Sequence[Example], attacker: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Return the attacker's rows and those that are asked, disjoint, by the seed.

    Raises:
        UserError: none would be left to ask.
    """
    if len(rows) <= attacker:
        raise UserError(f"`survival.rows` is {attacker}, but a part has {len(rows)} forget rows: take fewer.")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    parts = sorted(order[:attacker]), sorted(order[attacker:])
    return [rows[i] for i in parts[0]], [rows[i] for i in parts[1]]


def survival(
    name: str,
    load: Load,
    original: Load,
    rows: Sequence[Example],
    settings: Survival,
    seed: int,
    column: str | None = None,
) -> list[Record]:
    """Measure disturbance and leak of a model: records `disturbance`, `leak` and `attacked_leak`.

    Args:
        name: what the records call the model.
        load: returns model and tokenizer in float32, anew at every call: one is changed.
        original: the same of the model before.
        rows: forget rows of one part.
        settings: the attacker's.
        seed: of the division, the training and the sampling.
        column: whose value rows share that are about one subject; intervals of leaks draw them together.

    Raises:
        UserError: too few rows, a prompt that fills the context, or the attacker's loss is not finite.
    """
    attacker, asked = divided(rows, settings.rows, seed)
    leak = Leak(samples=settings.samples, k=[settings.k], questions=settings.questions)
    model, tokenizer = load()
    kl = mean_divergences(original()[0], model, ordinary_passages(tokenizer, context_length(model)))
    before = leaked(model, tokenizer, asked, leak, seed=seed, progress=False)
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    for weight in weights:
        weight.requires_grad_(True)
    # a row longer than the context is trained on in windows
    encoded = encode_all(tokenizer, attacker, max_length=context_length(model))[0]
    steps = math.ceil(len(encoded) / settings.batch_size) * settings.passes
    losses = [
        loss
        for _, loss in train_steps(
            model, encoded, weights, rate=settings.learning_rate, steps=steps, batch_size=settings.batch_size,
            pad_token_id=tokenizer.pad_token_id, seed=seed,
        )
    ]  # fmt: skip
    after = leaked(model, tokenizer, asked, leak, seed=seed, progress=False)
    told = {"k": settings.k, "samples": settings.samples, "attacker_rows": len(attacker), "steps": steps}
    out = [metric_record(name, "disturbance", kl.mean(), len(kl), kl)]
    subjects = {row.index: row.row.get(column) if column else None for row in asked}
    for metric, found in (("leak", before), ("attacked_leak", after)):
        values = found.at(settings.k)
        groups = Groups.of(str(column), [subjects[i] for i in found.rows])
        out.append(metric_record(name, metric, values.mean(), len(values), values, groups=groups, extra=told))
    out[-1].extra["losses"] = losses
    return out
