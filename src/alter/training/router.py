"""Fits the router that sends each token to an expert, on hidden states of the frozen base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from alter.core import show
from alter.data import Encoded
from alter.groundwork import frozen
from alter.logits import check_threshold, threshold_from_quantile
from alter.settings import nested
from alter.training.evidence import OWN_WORDS, Evidence, FitRows, evidence_of, fit_rows
from alter.training.openset import caught, open_set
from alter.training.probe import fit_entropy_probe
from alter.training.rates import measure_router, say_rates

if TYPE_CHECKING:
    from alter.training.batches import RunRows
    from alter.training.settings import Unlearn


NEARLY = 0.05
"""How much less a memory may catch than the best one, to be taken for its shortness."""


def fit_router(
    model: Any,
    run: Unlearn,
    rows: RunRows,
    tokenizer: Any,
    trace: Callable[[list[Encoded], bool], list[frozen.FrozenRow]],
    limit: int | None = None,
) -> dict[str, Any]:
    """Set the entropy threshold and fit probe and router, all on the frozen base, before the adapter trains.

    The router reads hidden states of the frozen base, which no training step changes, so it is fitted once instead of
    next to the task losses: for every new expert one linear score, Fisher's discriminant of the answers of its own forget
    rows against all ordinary text (see `alter.training.openset`); the retention expert's logit is 0. So a row of the router
    depends on no earlier expert's, and an expert that comes later leaves it as it is. This is a reading of the paper, like
    the supervision itself.

    Args:
        model: with the adapter.
        run: the settings.
        rows: the data; `rows.examples` are its forget rows before they were encoded.
        tokenizer: encodes the shipped sample and other wordings.
        trace: gives entropies of rows under the frozen base, with what the router reads if so asked.
        limit: the model's context.

    Returns:
        what was found: the threshold, the share of tokens routed as their row says, per kind of row, and, with a learned
        router, what `measure_router` measures.
    """
    generator = np.random.default_rng(run.seed)
    config = model.peft_config["default"]
    learned = config.router == "learned"
    parts = fit_rows(run, rows, tokenizer, limit, generator)
    if not learned:
        parts = [part for part in parts if part.name in ("forget", "retain", OWN_WORDS)]
    traced = iter(trace([row for part in parts for row in part.rows], learned))
    for part in parts:
        part.traced = [next(traced) for _ in part.rows]
    found: dict[str, Any] = {"entropy_threshold": _set_threshold(config, run, parts)}
    if config.router == "static":
        return found
    if config.probed and run.start_from is None:
        found["probe"] = _set_probe(model, parts)
    new = sorted(set(rows.expert))
    router = model.base_model.router_host[1].alter_router["default"].requires_grad_(False)
    if learned:
        found |= _set_router(router, config, run, parts, new, generator)
    else:
        _draw_gate(router, 0 if run.start_from is None else min(new), generator)
    if run.start_from is None:
        # spare experts are never chosen
        router.bias[max(new) + 1 :] = -1e4
    found |= _accuracy(router, [_evidence(part, config, run) for part in parts])
    if learned and rows.examples:
        found |= measure_router(model, rows, tokenizer, limit)
        say_rates(found)
    return found


def _evidence(part: FitRows, config: Any, run: Unlearn) -> Evidence:
    """Return a kind's evidence at the memory of the router."""
    return evidence_of(part, config.threshold, config.router_memory, run.router_fit.method == "discriminant")


def _set_threshold(config: Any, run: Unlearn, parts: Sequence[FitRows]) -> float:
    """Set the entropy threshold to the quantile on retain rows, if the settings give one; return it."""
    adapter: Any = run.adapter
    if run.start_from is None and adapter.entropy_quantile is not None:
        kept = next((part for part in parts if part.name in ("retain", OWN_WORDS)), parts[-1])
        entropy = torch.cat([row.entropy for row in kept.traced if row.entropy is not None])
        with nested("adapter", {name: name for name in ("entropy_quantile", "entropy_threshold", "entropy_q")}):
            config.entropy_threshold = threshold_from_quantile(entropy, adapter.entropy_quantile)
            check_threshold(config.entropy_q, config.entropy_threshold, config.vocab_size)
    return float(config.threshold)


def _set_probe(model: Any, parts: Sequence[FitRows]) -> dict[str, Any]:
    """Fit the entropy probe, store it in the router's layer, and return how often it agrees with the entropy."""
    probe = model.base_model.router_host[1].alter_probe["default"]
    threshold = model.peft_config["default"].threshold
    weight, bias, found = fit_entropy_probe([row for part in parts for row in part.traced], threshold)
    with torch.no_grad():
        probe.weight.copy_(weight)
        probe.bias.copy_(bias)
    show(
        f"Probe: on rows it was not fitted on, it and the exact entropy agree on {found['agreement']:.1%} of "
        f"{found['tokens']} tokens; {found['high']:.1%} are high.",
        stderr=True,
    )
    return found


def _set_router(
    router: Any,
    config: Any,
    run: Unlearn,
    parts: Sequence[FitRows],
    new: Sequence[int],
    generator: np.random.Generator,
) -> dict[str, Any]:
    """Fit the rows of the new experts at the best of the tried memories; return memory and opening level."""
    adapter: Any = run.adapter
    fit, answers = run.router_fit, run.router_fit.method == "discriminant"
    given = adapter.router_memory is not None or run.start_from is not None
    tried: list[tuple[float, float, tuple[Tensor, Tensor, float]]] = []
    for memory in [config.router_memory] if given or not answers else sorted(fit.memories):
        data = [evidence_of(part, config.threshold, memory, answers) for part in parts]
        made = open_set(data, new, fit, generator)
        tried.append((memory, caught(data, made), made))
    # of equals the shortest, which a long text before a question does not drown
    best = max(share for _, share, _ in tried)
    config.router_memory, _, (weight, bias, level) = next(each for each in tried if each[1] >= best - NEARLY)
    # the fit is done on the CPU, wherever the model is
    router.weight[new], router.bias[new] = weight.to(router.weight), (bias - level).to(router.bias)
    if run.start_from is None:
        router.weight[0], router.bias[0] = 0.0, 0.0
    return {"router_memory": config.router_memory, "opening_level": level}


def _draw_gate(router: Any, first: int, generator: np.random.Generator) -> None:
    """Draw W_g of the literal gate (router="entropy", Eq. 7) from N(0, 1), without bias, from the row `first` on.

    It stays as drawn: no value of one scalar tells one row from another, and at the low temperature the softmax passes no
    gradient. That is a reading of the paper. As entropies are positive, the expert with the largest weight takes all
    low-entropy tokens. An adapter that grows keeps the rows that it has.
    """
    drawn = torch.from_numpy(generator.standard_normal((len(router.weight) - first, 1)))
    router.weight[first:], router.bias[first:] = drawn.to(router.weight), 0.0


def _accuracy(router: Any, data: Sequence[Evidence]) -> dict[str, float | None]:
    """Return the share of the forget and of the ordinary tokens whose highest logit is that of their row's expert."""
    x, y = torch.cat([tokens.x for tokens in data]), torch.cat([tokens.y for tokens in data])
    fitted = torch.nn.functional.linear(x, router.weight.to(x), router.bias.to(x))
    right = fitted.argmax(-1) == y
    kept = right[y == 0] if (y == 0).any() else right[:0]
    return {
        "router_accuracy_forget": float(right[y > 0].float().mean()),
        "router_accuracy_retain": float(kept.float().mean()) if len(kept) else None,
    }
