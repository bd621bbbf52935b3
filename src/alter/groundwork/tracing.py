"""Causal tracing: which blocks' feed-forward layers restore an answer when the question's embeddings are noised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alter.core import UserError, progress
from alter.data import Collator, Encoded
from alter.groundwork.frozen import labelled
from alter.methods import blocks

FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
"""What architectures call a block's feed-forward layer."""

NOISE = 3.0
"""Standard deviation of the blur, in units of that of the embedding table (ROME, arXiv:2202.05262)."""


def feed_forwards(model: nn.Module) -> list[nn.Module]:
    """Return the feed-forward layer of each block.

    Raises:
        UserError: a block has none by a known name.
    """
    place, _ = blocks(model)
    found = []
    for number, block in enumerate(model.get_submodule(place).children()):
        name = next((name for name in FEED_FORWARD if hasattr(block, name)), None)
        if name is None:
            raise UserError(
                f"`adapter.traced` looks for each block's feed-forward layer, and block {number} of {type(model).__name__} has "
                f"none of the names {', '.join(FEED_FORWARD)}: give `adapter.depth`."
            )
        found.append(getattr(block, name))
    return found


@contextmanager
def _hooked(layers: Mapping[int, nn.Module], hook: Any) -> Iterator[None]:
    handles = [layer.register_forward_hook(hook(number)) for number, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def recovered(
    model: Any, rows: Sequence[Encoded], window: int, *, seed: int, pad_token_id: int, batch: int = 8
) -> list[float]:
    """Measure how much of the answers' log-likelihood each window of blocks restores, averaged over rows.

    The embeddings of a row's prompt get Gaussian noise; then the feed-forward outputs of `window` neighbouring blocks are
    put back to what they are without it. The value of a window is the mean log-probability of the answer's tokens so,
    minus that without anything put back.

    Args:
        model: the untouched model.
        rows: forget rows, each with a prompt.
        window: how many neighbouring blocks.
        seed: of the noise.
        pad_token_id: fills up shorter rows.
        batch: rows at once.

    Returns:
        a number for every window, by its first block.

    Raises:
        UserError: no row has a prompt to blur, or the model has fewer blocks than `window`.
    """
    layers = feed_forwards(model)
    asked = [row for row in rows if row.prompt_length > 1]
    if not asked:
        raise UserError(
            "`adapter.traced` adds noise to the questions of forget rows, and none has one: give `adapter.depth`."
        )
    if window > len(layers):
        raise UserError(f"`adapter.traced` is {window}, and the model has {len(layers)} blocks: give fewer.")
    embedding = model.get_input_embeddings()
    scale = NOISE * float(embedding.weight.float().std())
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(layers) - window + 1, dtype=torch.float64)
    collate = Collator(pad_token_id)
    starts = range(0, len(asked), batch)
    for start in progress(starts, total=len(starts), label="tracing"):
        group = asked[start : start + batch]
        inputs = collate([{"input_ids": row.input_ids, "labels": row.labels} for row in group])
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        noise = torch.zeros(*inputs["input_ids"].shape, embedding.weight.shape[-1], device=model.device)
        for place, row in enumerate(group):
            drawn = torch.randn(row.prompt_length, noise.shape[-1], generator=generator)
            noise[place, : row.prompt_length] = scale * drawn.to(noise)
        total += _brought_back(model, inputs, noise, layers, window)
    return (total / len(asked)).tolist()


def _brought_back(
    model: Any, inputs: Mapping[str, Tensor], noise: Tensor, layers: Sequence[Any], window: int
) -> Tensor:
    """Return each window's gain in the rows' log-likelihoods under noise [B, T, D] on the embeddings, summed over rows."""
    kept: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            kept[number] = output[0] if isinstance(output, tuple) else output

        return hook

    def restore(number: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> Any:
            return (kept[number], *output[1:]) if isinstance(output, tuple) else kept[number]

        return hook

    def blur(_: int) -> Any:
        return lambda _, __, output: output + noise.to(output)

    with _hooked(dict(enumerate(layers)), keep):
        _likelihoods(model, inputs)
    found = []
    with _hooked({0: model.get_input_embeddings()}, blur):
        without = _likelihoods(model, inputs)
        for first in range(len(layers) - window + 1):
            chosen = {number: layers[number] for number in range(first, first + window)}
            with _hooked(chosen, restore):
                found.append(float((_likelihoods(model, inputs) - without).sum()))
    return torch.tensor(found, dtype=torch.float64)


def _likelihoods(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the mean log-probability [B] of each row's labelled tokens."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    positions = labelled(inputs["labels"])[:, :-1]
    truth = inputs["labels"][:, 1:].clamp_min(0)
    logp = torch.log_softmax(logits[:, :-1].double(), -1).gather(-1, truth[..., None])[..., 0]
    return (logp * positions).sum(1) / positions.sum(1).clamp_min(1)
