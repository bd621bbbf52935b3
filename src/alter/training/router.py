"""Fits the router that sends each token to an expert, on hidden states of the frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from alter.adapter.routing import pool
from alter.logits.entropy import check_threshold, threshold_from_quantile
from alter.methods import frozen
from alter.methods.adapters import (
    AlterAdapter,
)

if TYPE_CHECKING:
    from alter.training.batches import Rows
    from alter.training.settings import Unlearn


class RouterFit(BaseModel):
    """How the router learns which expert serves which token: one logistic regression per expert on hidden states."""

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(1000, ge=1)
    retain_weight: float = Field(
        30.0,
        gt=0,
        description="How much worse it is to open an expert for a retain token than to miss a forget token.",
    )
    learning_rate: float = Field(0.03, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    max_tokens: int = Field(150_000, ge=1, description="Tokens kept for the fit; drawn at random from all.")


def fit_router(model: Any, run: Unlearn, rows: Rows, pad_token_id: int) -> dict[str, float]:
    """Set the entropy threshold and train the router, both on the frozen base, before the adapter trains.

    The router reads hidden states of the frozen base, which no training step changes, so it is fitted once instead of
    next to the task losses: for every new expert one logistic regression, its own forget rows against all other rows;
    the retention expert's logit is 0. So a row of the router depends on no other expert's, and an expert that comes
    later leaves it as it is. This is a reading of the paper, like the supervision itself.

    The literal gate (router="entropy", Eq. 7) has no bias, and its W_g stays as drawn, N(0, 1): no value of one scalar
    tells one row from another, and at the low temperature the softmax passes no gradient. That too is a reading. As
    entropies are positive, the expert with the largest weight takes all low-entropy tokens.

    Returns:
        what was found: the threshold, the share of tokens routed as their row says, per kind of row.
    """
    assert isinstance(run.adapter, AlterAdapter)
    generator = np.random.default_rng(run.seed)
    config = model.peft_config["default"]
    parts: list[list[int]] = []
    left = run.router_fit.max_tokens
    # forget rows take half at most; retain rows, of which there are more, take what is left
    for encoded, limit in ((rows.forget, left // 2), (rows.retain, left)):
        chosen, total = [], 0
        for i in generator.permutation(len(encoded)).tolist():
            if total >= min(limit, left):
                break
            chosen.append(i)
            total += len(encoded[i].input_ids)
        left -= total
        parts.append(chosen)
    chosen_rows = [rows.forget[i] for i in parts[0]] + [rows.retain[i] for i in parts[1]]
    traced = frozen.trace_rows(
        model, chosen_rows, pad_token_id=pad_token_id, label="router", features=config.router == "learned"
    )
    found: dict[str, float] = {}
    if run.start_from is None and run.adapter.entropy_quantile is not None:
        retain_entropy = torch.cat([row.entropy for row in traced[len(parts[0]) :] if row.entropy is not None])
        config.entropy_threshold = threshold_from_quantile(retain_entropy, run.adapter.entropy_quantile)
        check_threshold(config.entropy_q, config.entropy_threshold, config.vocab_size)
    found["entropy_threshold"] = float(config.threshold)
    if config.router == "static":
        return found
    inputs, targets = [], []
    for place, row in enumerate(traced):
        assert row.entropy is not None
        evidence = row.entropy[:, None] if row.features is None else row.features.float()
        label = rows.expert[parts[0][place]] if place < len(parts[0]) else 0
        # the first token of a row has no evidence and is never routed
        evidence = pool(evidence[None, 1:], torch.ones(1, len(evidence) - 1), config.router_memory)[0]
        inputs.append(evidence)
        targets.append(torch.full((len(evidence),), label))
    x, y = torch.cat(inputs), torch.cat(targets)
    new = sorted(set(rows.expert))
    _, host = model.base_model.router_host
    router = host.alter_router["default"].requires_grad_(False)
    if config.router == "entropy":
        # an adapter that grows keeps the rows that it has
        first = 0 if run.start_from is None else min(new)
        drawn = torch.from_numpy(generator.standard_normal((len(router.weight) - first, 1)))
        router.weight[first:], router.bias[first:] = drawn.to(router.weight), 0.0
    else:
        weight, bias = _regress(x, y, new, run.router_fit, generator)
        # the fit is done on the CPU, wherever the model is
        router.weight[new], router.bias[new] = weight.to(router.weight), bias.to(router.bias)
        if run.start_from is None:
            router.weight[0], router.bias[0] = 0.0, 0.0
    if run.start_from is None:
        # spare experts are never chosen
        router.bias[max(new) + 1 :] = -1e4
    fitted = torch.nn.functional.linear(x, router.weight.to(x), router.bias.to(x))
    right = fitted.argmax(-1) == y
    found["router_accuracy_forget"] = float(right[y > 0].float().mean())
    found["router_accuracy_retain"] = float(right[y == 0].float().mean())
    return found


def _regress(
    x: Tensor, y: Tensor, new: Sequence[int], fit: RouterFit, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """One logistic regression for each of the `new` experts: tokens x [T, D] of its own rows (y [T] names it) or not.

    Returns:
        weights [len(new), D] and biases [len(new)].
    """
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / std
    is_own = y[:, None] == torch.tensor(new)
    head = torch.nn.Linear(x.shape[1], len(new))
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=fit.learning_rate, weight_decay=fit.weight_decay)
    of_forget, of_retain = (y > 0).nonzero()[:, 0], (y == 0).nonzero()[:, 0]
    for step in range(fit.steps):
        for group in optimizer.param_groups:
            group["lr"] = fit.learning_rate * (1 - step / fit.steps)
        drawn = [part[torch.from_numpy(generator.integers(len(part), size=1024))] for part in (of_forget, of_retain)]
        batch = torch.cat(drawn)
        own, logits = is_own[batch], head(x[batch])
        hit = torch.nn.functional.softplus(-logits)[own].mean()
        miss = torch.nn.functional.softplus(logits)[~own].mean()
        loss = hit + fit.retain_weight * miss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = (head.weight / std).detach()
    return weight, (head.bias - weight @ mean).detach()
