"""Pruning attacks: zero weights by magnitude or by Wanda's score, which may uncover suppressed knowledge."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alter.attacks.base import Bench, Impossible
from alter.attacks.weights import base_linears, base_weights, expert_weights, is_turned
from alter.data import encode_all
from alter.inference import context_length, evaluating
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

    Those of a mixture's experts are [experts, in], by the tensor's name: over the tokens that the router sends to each, and 1
    for an expert that gets none, whose magnitudes then decide. One pass of the dense model. (A reading: the authors prune block
    by block and take the inputs that the pruned blocks before give.)

    Raises:
        Impossible: it has experts whose layers are not known.
    """
    sums: dict[str, Tensor] = {}
    handles = []

    def add(name: str, squares: Tensor) -> None:
        sums[name] = sums[name] + squares if name in sums else squares

    for name, module in base_linears(model):

        def note(_: Any, inputs: tuple[Any, ...], name: str = name) -> None:
            add(name, inputs[0].detach().float().flatten(0, -2).pow(2).sum(0))

        handles.append(module.register_forward_pre_hook(note))
    experts = {path.rpartition(".")[0]: module for path, module, _ in expert_weights(model)}
    for path, module in experts.items():
        if not hasattr(module, "_apply_gate"):
            raise Impossible(
                f"Wanda needs the input of every layer, and the experts of {type(model).__name__} do not show theirs."
            )

        def ask(experts: Any, inputs: tuple[Any, ...], path: str = path) -> None:
            for name, squares in _expert_squares(experts, *inputs[:2]).items():
                add(f"{path}.{name}", squares)

        handles.append(module.register_forward_pre_hook(ask))
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            # one row at a time: padding would count as input
            for ids in rows:
                model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for path, _, _ in expert_weights(model):
        sums[path] = torch.where(sums[path].sum(dim=1, keepdim=True) > 0, sums[path], 1.0)
    return {name: total.sqrt() for name, total in sums.items()}


def _expert_squares(experts: Any, states: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """Return the sums of squares of each expert's inputs over the tokens that come to it, [experts, in], by its tensor's name.

    Args:
        experts: all of one block, in transformers' form.
        states: [tokens, width].
        chosen: numbers of the experts that each token goes to, [tokens, K].
    """
    first = "gate_up_proj" if experts.has_gate else "up_proj"

    def linear(x: Tensor, name: str, expert: int) -> Tensor:
        weight, bias = getattr(experts, name)[expert], getattr(experts, f"{name}_bias", None)
        made: Tensor = x @ (weight if is_turned(experts) else weight.t())
        return made if bias is None else made + bias[expert]

    found: dict[str, list[Tensor]] = {first: [], "down_proj": []}
    for expert in range(len(experts.down_proj)):
        own = states.flatten(0, -2)[(chosen == expert).any(dim=-1).flatten()]
        inner = linear(own, first, expert)
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        for name, given in ((first, own), ("down_proj", inner)):
            found[name].append(given.float().pow(2).sum(dim=0))
    return {name: torch.stack(squares) for name, squares in found.items()}


@torch.no_grad()
def prune(model: Any, share: float, norms: dict[str, Tensor] | None = None) -> int:
    """Set the `share` of every base linear layer's and expert's weights to zero, in place; adapters keep theirs. Returns how many.

    Args:
        model: the model.
        share: of each layer's weights.
        norms: see `input_norms`: then Wanda chooses; None: the smallest of each layer go.

    Raises:
        Impossible: a layer is quantised, or the model has no linear layer.
    """
    zeros, done = 0, 0
    for name, weight in base_weights(model):
        for number, matrix in enumerate(weight if weight.dim() == 3 else (weight,)):
            values = matrix.float()
            if norms is None:
                gone = by_size(values, share)
            else:
                gone = by_wanda(values, norms[name] if weight.dim() == 2 else norms[name][number], share)
            matrix.masked_fill_(gone, 0)
            zeros += int(gone.sum())
            done += 1
    if not done:
        raise Impossible(f"{type(model).__name__} has no linear layer to prune.")
    return zeros


def pruned(bench: Bench, *, percent: int, wanda: bool) -> list[Record]:
    """Prune the base weights under the adapter, and measure. Wanda is calibrated on the attacker's unrelated rows."""
    model, tokenizer = bench.fresh()
    norms = None
    if wanda:
        count = min(bench.settings.relearn.rows, len(bench.unrelated))
        given = random.Random(bench.settings.seed).sample(bench.unrelated, count)
        rows = encode_all(tokenizer, given, max_length=context_length(model))[0]
        norms = input_norms(model, [row.input_ids for row in rows])
    zeros = prune(model, percent / 100, norms)
    name = f"{'wanda' if wanda else 'prune'}_{percent}"
    return bench.measure(name, model, bench.items(bench.measured), part="other", zeros=zeros)
