"""What lies inside a model's passes over rows: gradient norms by tensor, hidden states by depth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from alter.core import Array, UserError, processes
from alter.data import Collator, Encoded, batches_by_length
from alter.inference.passes import device_of, evaluating, shown, virtual_tokens
from alter.inference.scoring import check_rows, decided, logits_at

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn


def gradient_norms(
    model: nn.Module,
    encoded: Sequence[Encoded],
    *,
    pad_token_id: int,
    compat: bool = False,
    progress: bool = True,
    label: str = "gradients",
) -> list[Array]:
    """Return the L2 norm of the gradient of each row's loss, by parameter tensor: one forward and one backward per row.

    The loss is the mean negative log-probability of the row's labelled tokens but the last. The gradient is taken by
    every tensor of floating point that the loss depends on, whether the model trains it or not: base weights under an
    adapter count, and so does the adapter; integer weights (quantised) have no gradient and are left out. The model is
    in eval mode (the tool that compat follows has dropout on here). It is left as it was: training modes, what
    requires a gradient, and what is in `.grad`.

    Args:
        model, encoded: as in `score`.
        pad_token_id: hidden from attention where it occurs in a row, in compat only.
        compat: see `pad_token_id`.

    Returns:
        One array per row, in the order given: [tensors that have a gradient].

    Raises:
        UserError: a row has no labelled token but its last, does not fit into the context, or has a gradient that is
            not finite.
    """
    check_rows(model, encoded)
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]

    def norms_of(i: int) -> Array:
        found = torch.autograd.grad(
            _loss_but_the_last(model, encoded[i], i, pad_token_id if compat else None), weights, allow_unused=True
        )
        sizes = torch.stack([torch.linalg.vector_norm(g.float()) for g in found if g is not None])
        if not sizes.isfinite().all():
            raise UserError(f"Row {i}: the gradient is not finite; try `dtype` float32.")
        return sizes.double().cpu().numpy()

    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with evaluating(model, gradients=True):
            numbers = range(len(encoded))
            return list(shown(processes.spread(numbers, norms_of, model), len(encoded), label, progress))
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def _loss_but_the_last(model: Any, row: Encoded, number: int, hidden: int | None) -> torch.Tensor:
    """Return the mean negative log-probability of a row's labelled tokens but the last.

    Args:
        model: in eval mode.
        row: of labelled tokens.
        number: what an error calls it.
        hidden: token that is kept from attention, if one is.

    Raises:
        UserError: no other token is labelled.
    """
    places = [t - 1 for t in range(1, len(row.labels)) if row.labels[t] != -100][:-1]
    if not places:
        raise UserError(f"Row {number} has no labelled text, only an end: it has no gradient; remove the row.")
    ids = torch.tensor([row.input_ids], device=device_of(model))
    mask = torch.ones_like(ids) if hidden is None else (ids != hidden).long()
    positions = torch.tensor(places, device=ids.device)
    logits = logits_at(model, ids, mask, positions, [places[0] + 1])[0]
    return torch.nn.functional.cross_entropy(logits.float(), ids[0, positions + 1])


def hidden_states(
    model: nn.Module,
    encoded: Sequence[Encoded],
    *,
    pad_token_id: int,
    batch_tokens: int | None = None,
    progress: bool = True,
    label: str = "hidden states",
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """Yield each row's number and its tokens' hidden states at every depth, [tokens, layers + 1, width]; longest first.

    Depth 0 is the embeddings, depth d what the d-th block gives; the last one is after the final norm where the model
    reports it so (as Llama does in transformers). The state of a token is the one that generates the next.

    Args:
        model, encoded, pad_token_id, batch_tokens: as in `score`; labels do not matter, but there must be some.

    Raises:
        UserError: a row has no labelled token, is longer than the model's context, or gets states that are not finite.
    """
    check_rows(model, encoded)
    device = device_of(model)
    lengths = [len(row.input_ids) for row in encoded]
    batches = batches_by_length(lengths, batch_tokens or (4096 if device.type == "cpu" else 16384))
    collate = Collator(pad_token_id)

    def run(batch: list[int]) -> list[npt.NDArray[np.float32]]:
        inputs = collate([{"input_ids": encoded[i].input_ids} for i in batch])
        given = {name: value.to(device) for name, value in inputs.items()}
        # opened for each batch: between two rows, the caller's own gradient mode holds
        prompts = [next(t for t, label in enumerate(encoded[i].labels) if label != -100) for i in batch]
        with evaluating(model):
            more = decided(model, given["input_ids"], given["attention_mask"], prompts)
            states = model(**given, **more, output_hidden_states=True, use_cache=False).hidden_states
        rows = []
        first = virtual_tokens(model)
        for k, i in enumerate(batch):
            own = torch.stack([state[k, first : first + lengths[i]].float() for state in states], dim=1)
            if not own.isfinite().all():
                raise UserError(f"Row {i}: the model's hidden states are not finite; try `dtype` float32.")
            rows.append(own.cpu().numpy())
        return rows

    found = zip(batches, processes.spread(batches, run, model, apart=True), strict=True)
    for batch, rows in shown(found, len(batches), label, progress):
        yield from zip(batch, rows, strict=True)
