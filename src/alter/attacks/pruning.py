"""Pruning attacks: zero weights by magnitude or by Wanda's score, which may uncover suppressed knowledge."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from alter.attacks.base import Bench, Impossible
from alter.attacks.weights import base_linears
from alter.data import encode_all
from alter.inference import evaluating
from alter.storage import Record


def smallest(scores: Tensor, share: float) -> Tensor:
    """Mark the `share` of lowest scores in each row, [rows, columns] bool; floor(share * columns) of each.

    Of equal scores the earlier column goes first.
    """
    count = int(share * scores.shape[1] + 1e-9)
    order = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def by_size(weight: Tensor, share: float) -> Tensor:
    """Mark the `share` of a layer's weights [out, in] that are smallest in magnitude, over the whole layer."""
    return smallest(weight.abs().reshape(1, -1), share).view_as(weight)


def by_wanda(weight: Tensor, norms: Tensor, share: float) -> Tensor:
    """Mark the `share` of each output's weights with the lowest |W_ij| ||X_j||_2 (Wanda; Sun et al. 2024, Eq. 1).

    Args:
        weight: [out, in].
        norms: [in], the 2-norm of each input over all calibration tokens.
        share: of each row.
    """
    return smallest(weight.abs() * norms, share)


@torch.no_grad()
def input_norms(model: Any, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Compute the 2-norm of every input of every base linear layer over all tokens of `rows`, each [in], by the layer's name.

    One pass of the dense model. (A reading: the authors prune block by block and take the inputs that the pruned blocks
    before give.)
    """
    sums: dict[str, Tensor] = {}
    handles = []
    for name, module in base_linears(model):

        def note(_: Any, inputs: tuple[Any, ...], name: str = name) -> None:
            squares = inputs[0].detach().float().flatten(0, -2).pow(2).sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        handles.append(module.register_forward_pre_hook(note))
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            # one row at a time: padding would count as input
            for ids in rows:
                model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.sqrt() for name, total in sums.items()}


@torch.no_grad()
def prune(model: Any, share: float, norms: dict[str, Tensor] | None = None) -> int:
    """Set the `share` of every base linear layer's weights to zero, in place; adapters keep theirs. Returns how many.

    Args:
        model: the model.
        share: of each layer's weights.
        norms: see `input_norms`: then Wanda chooses; None: the smallest of each layer go.

    Raises:
        Impossible: a layer is quantised, or the model has no plain linear layer.
    """
    zeros = 0
    layers = base_linears(model)
    for name, module in layers:
        weight = module.weight
        if not weight.is_floating_point():
            raise Impossible(f"Layer {name} is quantised already ({weight.dtype}): give the full-precision model.")
        turned = isinstance(module, Conv1D)
        values = (weight.t() if turned else weight).float()
        gone = by_size(values, share) if norms is None else by_wanda(values, norms[name], share)
        weight.masked_fill_(gone.t() if turned else gone, 0)
        zeros += int(gone.sum())
    if not layers:
        raise Impossible(f"{type(model).__name__} has no linear layer to prune.")
    return zeros


def pruned(bench: Bench, *, percent: int, wanda: bool) -> list[Record]:
    """Prune the base weights under the adapter, and measure. Wanda is calibrated on the attacker's unrelated rows."""
    model, tokenizer = bench.fresh()
    norms = None
    if wanda:
        count = min(bench.settings.relearn.rows, len(bench.unrelated))
        chosen = random.Random(bench.settings.seed).sample(range(len(bench.unrelated)), count)
        longest = getattr(model.config, "max_position_embeddings", None)
        rows = encode_all(tokenizer, [bench.unrelated[i] for i in chosen], max_length=longest)[0]
        norms = input_norms(model, [row.input_ids for row in rows])
    zeros = prune(model, percent / 100, norms)
    name = f"{'wanda' if wanda else 'prune'}_{percent}"
    return bench.measure(name, model, bench.items(bench.measured), part="other", zeros=zeros)
