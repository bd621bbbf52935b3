"""Prepare the first step: the adapter and its start, the frozen base's passes, the training order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alter.adapter import base_fingerprint
from alter.core import UserError
from alter.groundwork import MeasuredGradients, marked
from alter.logits import Depth
from alter.methods import Beginning, Codes, Penalty, block_at, blocks
from alter.models import Form
from alter.storage import digest
from alter.training.batches import Order, Pairs, RunRows, Traced, schedule
from alter.training.codes import codes_of
from alter.training.data import Data, clusters
from alter.training.factors import start_of
from alter.training.folder import CODES, GRADIENT, kept_tensors
from alter.training.frozenpass import trace_run
from alter.training.loaded import Loaded
from alter.training.redirection import redirect, shift_of
from alter.training.sampler import Kin
from alter.training.settings import Unlearn, batches_of_step, hidden_depth, steps_of
from alter.training.trunk import KeptStates, watched_states
from alter.training.views import frozen_views
from alter.training.watcher import KEPT_FOLDER, Watcher


@dataclass(frozen=True)
class Prepared:
    """Everything that training takes and saving writes.

    Attributes:
        model: what is trained, with the adapter on it.
        tokenizer: its tokenizer.
        names: of the sub-domains.
        rows, order, traced: the rows, the order in which they are trained on, and what the frozen base knows of them.
        found: what the router's fit found.
        depth: where the objectives read hidden states, if they do.
        penalty: of the weights alone, if there is one.
        form: what the result needs besides the adapter, if anything.
        watcher: looks at the adapter while it trains, if the run is watched.
        alone: steps before retain rows join.
        trained: how many numbers train.
        kept: the cached output of the blocks below the adapter for the rows, if any.
        measured: what the rule for gradients knows of each weight.
        codes: how the objective compares hidden states, if it does so in a sparse code.
    """

    model: Any
    tokenizer: Any
    names: list[str]
    rows: RunRows
    order: Order
    traced: Traced
    found: dict[str, Any]
    depth: Depth | None
    penalty: Penalty | None
    form: Form | None
    watcher: Watcher | None
    alone: int
    trained: int
    kept: KeptStates | None = None
    measured: dict[str, Tensor] = field(default_factory=dict)
    codes: Codes | None = None

    def dataset(self, at_once: int) -> Pairs:
        """Return the training rows in their order; each process must get a share of a last batch, of `at_once` pairs when whole."""
        return Pairs(self.order, self.rows, self.traced, at_once, None if self.kept is None else self.kept.of)


def prepare(run: Unlearn, data: Data, loaded: Loaded, out: Path) -> Prepared:
    """Prepare everything that the first step needs; passes over the frozen base are cached in `out`.

    Raises:
        UserError: the initializer or the adapter cannot work with these rows or this model.
    """
    base, tokenizer, former = loaded.base, loaded.tokenizer, loaded.former
    views = frozen_views(base, tokenizer, run, loaded.forget, loaded.retain, out / "reinforced.safetensors")
    start, away = start_of(base, tokenizer, run, loaded.forget, loaded.retain, out / "start.safetensors")
    form = run.adapter.form(base, run, loaded.forget, tokenizer.pad_token_id, former)
    depth = depth_of(base, run)
    named, codes = codes_of(run, base, tokenizer, data.forget, data.retain, depth, loaded.limit, out / CODES)
    shift = shift_of(run, base, tokenizer, data.forget, depth, loaded.limit, out / CODES)
    # new experts come behind those of an adapter that grows
    grows = run.adapter.grows and run.start_from is not None
    first = run.adapter.routed_experts(base) if grows else 1
    numbered = grows and run.domain_column is None and not run.name_clusters
    names = clusters(first, len(data.names)) if numbered else data.names
    model = run.adapter.attach(base, run, Beginning(names, start, former))
    _check_numbers(model)
    experts = [first + d for d in loaded.domain]
    paired = run.sampler.epoch_length(loaded.kin, len(loaded.forget), len(loaded.retain))
    rows = RunRows(loaded.forget, loaded.retain, experts, loaded.alternative, loaded.examples, paired)
    watcher = _watcher_of(run, data, loaded, out)
    order = order_of(run, rows, loaded.alone, loaded.kin)
    cache = out / "frozen.safetensors"
    traced, found, below = trace_run(model, tokenizer, run, rows, order, cache, views, depth, loaded.limit)
    if watcher is not None:
        watcher.below = watched_states(run, model, below, watcher.encoded, out)
    penalty = run.adapter.penalty(model, run, away, former)
    measured = measured_of(model, tokenizer, run, rows, out / GRADIENT)
    if codes is not None:
        _mark_names(traced, loaded, named)
    if shift is not None:
        redirect(traced["forget"], loaded.forget, loaded.examples, run.objective, shift)
    # the second half of an initialised adapter is frozen
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) // (1 if start is None else 2)
    return Prepared(
        model,
        tokenizer,
        names,
        rows,
        order,
        traced,
        found,
        depth,
        penalty,
        form,
        watcher,
        loaded.alone,
        trained,
        below,
        measured,
        codes,
    )


def _check_numbers(model: Any) -> None:
    """Refuse to train weights in float16, where squared gradients become 0 and AdamW divides by them.

    Raises:
        UserError: names the first such weight.
    """
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.dtype == torch.float16:
            raise UserError(
                f"{name} would train in float16, where gradients are too small for AdamW, whose steps then are of any size: give "
                "`dtype` float32, or bfloat16."
            )


def _watcher_of(run: Unlearn, data: Data, loaded: Loaded, out: Path) -> Watcher | None:
    """Return the watcher of a run, or None if the run is not watched."""
    if data.watched is None:
        return None
    device = next(loaded.base.parameters()).device
    return Watcher(
        run.watch, data.watched, loaded.tokenizer, max_length=loaded.limit, folder=out / KEPT_FOLDER, device=device
    )


def _mark_names(traced: Traced, loaded: Loaded, named: Sequence[str]) -> None:
    """Mark the tokens of the names `named` in the traced forget rows, in place."""
    for i, row in traced["forget"].items():
        whole = loaded.examples[i].prompt is None
        row.named = torch.tensor(marked(loaded.tokenizer, loaded.forget[i], named, whole=whole))


def measured_of(model: Any, tokenizer: Any, run: Unlearn, rows: RunRows, cache: Path) -> dict[str, Tensor]:
    """Return what the rule for gradients measures on the untouched weights, by parameter; kept in `cache`."""
    if not run.gradient.measures:
        return {}
    key = digest(
        base_fingerprint(model),
        run.model_dump(include={"adapter", "gradient", "batch_size", "seed"}),
        [[row.input_ids for row in part] for part in (rows.forget, rows.retain)],
    )
    passes = MeasuredGradients(model, rows.forget, rows.retain, run.batch_size, run.seed, tokenizer.pad_token_id)
    found = kept_tensors(
        cache, key, lambda: {k: v.cpu() for k, v in run.gradient.statistics(passes, run.seed).items()}
    )
    return {name: value.to(next(model.parameters()).device) for name, value in found.items()}


def depth_of(base: Any, run: Unlearn) -> Depth | None:
    """Return the block whose hidden states the objectives read, or None if they read none.

    Raises:
        UserError: they name different ones.
    """
    share = hidden_depth(run)
    if share is None:
        return None
    place, count = blocks(base)
    block, *behind = list(base.get_submodule(place))[block_at(share, count) :]
    return Depth(block, tuple(behind))


def order_of(run: Unlearn, rows: RunRows, alone: int, kin: Kin | None = None) -> Order:
    """Return the training order; with `max_steps`, only as much of it as is used.

    Args:
        run: the settings.
        rows: the rows.
        alone: steps before retain rows join.
        kin: what rows are to each other, where the sampler asks for it.
    """
    of_step = run.batch_size * batches_of_step(run, rows.epoch)
    steps, _ = steps_of(run, rows.epoch)
    if run.sampler.order != "mixed":
        pairs = steps * of_step if run.max_steps else math.ceil(run.epochs * rows.epoch)
        return run.sampler.take(
            kin, len(rows.forget), len(rows.retain), pairs=pairs, seed=run.seed, alone=alone * of_step
        )
    return schedule(
        [len(row.input_ids) for row in rows.forget],
        [len(row.input_ids) for row in rows.retain],
        # with max_steps the schedule would start again, and with it the steps without retain rows
        epochs=max(run.epochs, steps * of_step / len(rows.forget)) if alone and run.max_steps else run.epochs,
        batch=run.batch_size,
        seed=run.seed,
        alone=alone * of_step,
    )
