"""Fit ECO's classifier of prompts and search for the strength of its noise (arXiv:2406.07933)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from alter.adapter import base_fingerprint
from alter.core import Array, UserError, show, warn
from alter.data import Collator, Encoded, Example, apart_from, encode_all
from alter.data.background import background
from alter.guarding.classifier import fit_classifier, measure, prompt_windows, prompts_of
from alter.guarding.settings import Eco, MakeGuard
from alter.inference import context_length, score
from alter.models import CLASSIFIER, Corrupted, Form, ModelSettings, PromptClassifier, as_names

START = [10.0**power for power in range(-1, 6)]
"""Strengths that the search looks at first, in units of the embeddings' root mean square."""


def zeroth_order(
    distance: Callable[[float], float], start: float, *, rate: float, probe: float, rounds: int, enough: float
) -> float:
    """Minimise f by gradient-free descent, x - rate (f(x + e) - f(x - e)) / 2e, `rounds` times; return the best x met.

    It stops where f is below `enough`. (ECO's search; a reading: x is the strength's power of ten, where the authors search
    over the strength itself with rate 100, from a start chosen by hand for each model.)
    """
    seen = {start: distance(start)}
    x = start
    for _ in range(rounds):
        if min(seen.values()) < enough:
            break
        above, below = seen.setdefault(x + probe, distance(x + probe)), seen.setdefault(x - probe, distance(x - probe))
        x -= rate * (above - below) / (2 * probe)
        seen[x] = distance(x)
    return min(seen, key=lambda power: seen[power])


def answer_loss(model: Any, rows: Sequence[Encoded], pad_token_id: int) -> float:
    """Return the mean over rows of an answer's negative log-probability, in nats a token."""
    found = score(model, rows, pad_token_id=pad_token_id, progress=False)
    return float(np.mean([-values.mean() for values in found.logprob]))


def swapped(tokenizer: Any, examples: Sequence[Example], limit: int | None) -> list[Encoded]:
    """Give each row the answer of the next one, as a model that does not know might; in windows of at most `limit` tokens."""
    others = [*examples[1:], examples[0]]
    given = [replace(own, answer=other.answer) for own, other in zip(examples, others, strict=True)]
    return encode_all(tokenizer, given, max_length=limit)[0]


def make_eco(run: MakeGuard, how: Eco, forget: Sequence[Example], retain: Sequence[Example]) -> Form:
    """Return ECO's guard for a model: its classifier, and the strength at which the answers to recognised prompts are as
    unlikely as for a model that never knew them.

    Raises:
        UserError: too few rows, no prompt that the classifier recognises, or models that do not load.
    """
    model, tokenizer = ModelSettings(
        model=run.model, dtype=run.dtype, device=run.device, chat_template_kwargs=run.chat_template_kwargs
    ).load()
    width = model.get_input_embeddings().embedding_dim
    if how.dims > width:
        raise UserError(
            f"`guard.dims` is {how.dims}, but an embedding of {run.model} has {width} dimensions: give {width} or less."
        )
    pad, limit = tokenizer.pad_token_id, getattr(model.config.get_text_config(), "max_position_embeddings", None)
    named = [f"{row.prompt or ''} {row.answer}" for row in forget]
    ordinary = apart_from(background(), named)
    kept = [*retain, *(row for rows in ordinary.values() for row in rows)]
    own = [(prompt, row.kind == "text") for row in forget for prompt in prompts_of(tokenizer, [row], limit)]
    others = prompts_of(tokenizer, kept, limit)
    if how.strength is None:
        # before anything is fitted: a prompt may leave no room for its answer
        encode_all(tokenizer, forget, max_length=limit, label="forget")
    depth = max(1, round(how.depth * model.config.num_hidden_layers))

    def looks(prompts: Sequence[list[int]], label: str) -> list[tuple[Array, Array]]:
        plain = prompt_windows(model, prompts, depth, how.window, pad, label)
        named = [as_names(tokenizer, prompt) for prompt in prompts]
        return [*zip(plain, prompt_windows(model, named, depth, how.window, pad, f"{label}, as names"), strict=True)]

    fitted = fit_classifier(
        looks([prompt for prompt, _ in own], "to forget"), looks(others, "others"), whole=[whole for _, whole in own],
        false_alarms=how.false_alarms, threshold=how.threshold, seed=run.seed,
    )  # fmt: skip
    found = {"recognised": float(fitted.caught.mean()), "false_alarms": float(fitted.alarms.mean())}
    show(
        f"classifier: {found['recognised']:.0%} of {len(own)} forget prompts recognised, {found['false_alarms']:.1%} of "
        f"{len(others)} others (cross-validation; above {fitted.threshold:.3g})",
        stderr=True,
    )
    unseen = apart_from(background(unseen=True), named)

    held_out = measure(
        tokenizer, forget, retain, unseen, limit, lambda asked: fitted.recognised(looks(asked, "measured"))
    )
    tensors = {"weight": torch.from_numpy(fitted.weight).float(), "bias": torch.from_numpy(fitted.bias).float()}
    settings: dict[str, Any] = {
        "kind": Corrupted.kind, "depth": depth, "window": how.window, "looks": 2, "threshold": fitted.threshold, "dims": how.dims, "seed": run.seed,
        "strength": how.strength, "base": base_fingerprint(model),
        "cross_validation": found, "measured": held_out,
    }  # fmt: skip
    if how.strength is None:
        guarded = Corrupted(model, PromptClassifier(tensors["weight"], tensors["bias"], how.window), settings).eval()
        guarded.tokenizer = tokenizer
        settings["search"] = search(run, how, guarded, tokenizer, forget)
        settings["strength"] = settings["search"]["strength"]
    return settings, {CLASSIFIER: tensors}


def _recognised(guarded: Corrupted, row: Encoded, pad: int) -> bool:
    """Tell whether the guard's classifier takes a row's prompt (a raw text as a whole) for one to forget."""
    asked, device = row.prompt_length, next(guarded.parameters()).device
    batch = Collator(pad)([{"input_ids": row.input_ids[:asked] if asked > 1 else row.input_ids}])
    return bool(guarded.decide(batch["input_ids"].to(device), batch["attention_mask"].to(device)).any())


def search(
    run: MakeGuard, how: Eco, guarded: Corrupted, tokenizer: Any, forget: Sequence[Example]
) -> dict[str, float]:
    """Find the strength at which the guarded model's loss on the answers is that of a model that never knew them.

    Returns:
        `strength`, and the losses `wanted`, `reached` and `before`, without noise, in nats a token.

    Raises:
        UserError: the classifier recognises no forget prompt, a prompt leaves no room for its answer in the context, or `retrained`
            does not load.
    """
    pad, limit = tokenizer.pad_token_id, context_length(guarded)
    chosen = np.random.default_rng(run.seed).permutation(len(forget))[: how.rows]
    examples = [forget[i] for i in sorted(chosen)]
    rows, owner = encode_all(tokenizer, examples, max_length=limit)
    seen = [_recognised(guarded, row, pad) for row in rows]
    if not any(seen):
        raise UserError(
            f"The classifier recognises none of {len(rows)} forget prompts above {guarded.settings['threshold']:.3g}: give more "
            "rows, or allow more `guard.false_alarms` or a lower `guard.threshold`."
        )
    examples = [examples[n] for n in dict.fromkeys(n for n, known in zip(owner, seen, strict=True) if known)]
    rows = [row for row, known in zip(rows, seen, strict=True) if known]
    with guarded.disable_adapter():
        before = answer_loss(guarded, rows, pad)
        if how.retrained is None:
            wanted = answer_loss(guarded, swapped(tokenizer, examples, limit), pad)
        else:
            own = ModelSettings(model=run.model, dtype=run.dtype, device=run.device)
            other, words = own.alike(how.retrained).load()
            same, _ = encode_all(words, examples, max_length=context_length(other))
            wanted = answer_loss(other, same, words.pad_token_id)
            del other
    losses: dict[float, float] = {}

    def distance(power: float) -> float:
        guarded.settings["strength"] = 10.0**power
        if power not in losses:
            losses[power] = answer_loss(guarded, rows, pad)
        return abs(losses[power] - wanted)

    weight: Any = guarded.get_input_embeddings().weight
    scale = float(weight.detach().float().square().mean().sqrt())
    start = min((math.log10(scale * times) for times in START), key=distance)
    found = zeroth_order(distance, start, rate=how.rate, probe=how.probe, rounds=how.rounds, enough=how.enough)
    off = distance(found)
    show(
        f"strength {10**found:.3g}: the answers cost {losses[found]:.2f} nats a token, {before:.2f} without noise; wanted are "
        f"{wanted:.2f}",
        stderr=True,
    )
    if off > max(how.enough, 0.1 * abs(wanted - before)):
        warn(
            "No strength comes closer to the wanted loss: raise `guard.dims`, so that the noise acts on more, or give a "
            "`guard.retrained` model, whose loss is then the wanted one."
        )
    return {"strength": 10.0**found, "wanted": wanted, "reached": losses[found], "before": before}
