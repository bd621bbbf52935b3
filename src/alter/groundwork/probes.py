"""Passes over the untouched base model that need more than a forward: gradients, layer outputs, further training.

They serve the initializers (`alter.methods.initializers`) and the objectives that aim away from a reinforced model. Nothing here
changes the model: LoRA factors act through hooks on its linear layers for as long as a block lasts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alter.core import progress
from alter.data import Collator, Encoded
from alter.groundwork.frozen import labelled
from alter.inference import InputMoments
from alter.logits import Part, head_on, measuring
from alter.methods import Emitted, Factors, covariance, variance


@contextmanager
def low_rank(layers: Mapping[str, nn.Linear], factors: Mapping[str, Factors], scaling: float) -> Iterator[None]:
    """Within the block each layer adds scaling * B A x to its output."""

    def hook(A: Tensor, B: Tensor) -> Any:
        return lambda _, inputs, output: output + scaling * (inputs[0].to(A.dtype) @ A.t() @ B.t()).to(output.dtype)

    handles = [layers[name].register_forward_hook(hook(*factors[name])) for name in factors]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _batches(
    rows: Sequence[Encoded], size: int, pad_token_id: int, device: Any, order: Sequence[int]
) -> Iterator[Any]:
    collate = Collator(pad_token_id)
    for start in range(0, len(order), size):
        members = [rows[i] for i in order[start : start + size]]
        batch = collate([{"input_ids": row.input_ids, "labels": row.labels} for row in members])
        yield {name: value.to(device) for name, value in batch.items()}


def _mean_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Return the mean cross-entropy of a batch's labelled tokens, and how many there are."""
    positions = labelled(batch["labels"])
    truth = batch["labels"][:, 1:][positions[:, :-1]]
    part = Part(len(truth), lambda logits, at: Emitted(logits, truth[at]).nll[:, None])
    with measuring(model, positions, [part]):
        nll = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return nll.mean(), len(truth)


@contextmanager
def _only(model: nn.Module, wanted: Sequence[Tensor]) -> Iterator[None]:
    """Within the block gradients are taken of these parameters alone."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = {id(parameter) for parameter in wanted}
    for parameter in before:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


def fisher(
    model: Any, layers: Mapping[str, nn.Linear], rows: Sequence[Encoded], *, batch: int, pad_token_id: int, label: str
) -> dict[str, Tensor]:
    """Compute FILA's empirical Fisher information of each layer's weight: sum of n g^2 over batches, over the sum of n.

    g is the gradient of the batch's mean cross-entropy, n its number of labelled tokens. fp32, on the CPU.
    """
    device = next(model.parameters()).device
    total = {name: torch.zeros(layer.weight.shape) for name, layer in layers.items()}
    weights = [layer.weight for layer in layers.values()]
    tokens = 0
    with _only(model, weights):
        source = _batches(rows, batch, pad_token_id, device, range(len(rows)))
        for inputs in progress(source, total=-(-len(rows) // batch), label=label):
            loss, n = _mean_loss(model, inputs)
            for name, grad in zip(layers, torch.autograd.grad(loss, weights), strict=True):
                total[name] += n * grad.float().cpu().square()
            tokens += n
    return {name: value / tokens for name, value in total.items()}


def factor_variances(
    model: Any,
    layers: Mapping[str, nn.Linear],
    rows: Sequence[Encoded],
    start: Mapping[str, Factors],
    *,
    scaling: float,
    epochs: int,
    batch: int,
    seed: int,
    pad_token_id: int,
    label: str,
) -> tuple[dict[str, Factors], int]:
    """Measure VILA's variances of the gradients of LoRA factors, over batches weighted by their tokens; nothing is updated.

    Returns:
        the variances, in the shapes of the factors, and the number of tokens seen.
    """
    device = next(model.parameters()).device
    leaves = [factor for factors in start.values() for factor in factors]
    totals = [torch.zeros_like(leaf) for leaf in leaves]
    squares = [torch.zeros_like(leaf) for leaf in leaves]
    generator = torch.Generator().manual_seed(seed)
    tokens = 0
    with _only(model, []), low_rank(layers, start, scaling):
        for _ in range(epochs):
            order = torch.randperm(len(rows), generator=generator).tolist()
            source = _batches(rows, batch, pad_token_id, device, order)
            for inputs in progress(source, total=-(-len(rows) // batch), label=label):
                loss, n = _mean_loss(model, inputs)
                for total, square, grad in zip(totals, squares, torch.autograd.grad(loss, leaves), strict=True):
                    total += n * grad
                    square += n * grad.square()
                tokens += n
    found = [variance(total, square, tokens) for total, square in zip(totals, squares, strict=True)]
    pairs = zip(found[::2], found[1::2], strict=True)
    return {name: Factors(a, b) for name, (a, b) in zip(start, pairs, strict=True)}, tokens


@torch.no_grad()
def output_covariances(
    model: Any, layers: Mapping[str, nn.Linear], rows: Sequence[Encoded], *, batch: int, pad_token_id: int, label: str
) -> dict[str, Tensor]:
    """Compute REGLU's covariance [out, out] of each layer's output, summed over a row's real tokens; float64, on the CPU."""
    device = next(model.parameters()).device
    features: dict[str, list[Tensor]] = {name: [] for name in layers}
    real: list[Tensor] = []

    def hook(name: str) -> Any:
        def keep(_: Any, __: Any, output: Tensor) -> None:
            features[name].append((output.double() * real[-1][..., None]).sum(1).cpu())

        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        source = _batches(rows, batch, pad_token_id, device, range(len(rows)))
        for inputs in progress(source, total=-(-len(rows) // batch), label=label):
            real.append(inputs["attention_mask"])
            with head_on(model, torch.zeros_like(inputs["labels"], dtype=torch.bool)):
                model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: covariance(torch.cat(parts)) for name, parts in features.items()}


@torch.no_grad()
def input_covariances(
    model: Any, layers: Mapping[str, nn.Linear], rows: Sequence[Encoded], *, batch: int, pad_token_id: int, label: str
) -> dict[str, Tensor]:
    """Compute the mean outer product [in, in] of each layer's inputs over the rows' real tokens, summed in float64."""
    device = next(model.parameters()).device
    found = InputMoments(layers)
    source = _batches(rows, batch, pad_token_id, device, range(len(rows)))
    for inputs in progress(source, total=-(-len(rows) // batch), label=label):
        nowhere = torch.zeros_like(inputs["labels"], dtype=torch.bool)
        with found.listening(inputs["attention_mask"]), head_on(model, nowhere):
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
    return {name: value / found.total for name, value in found.sums.items()}


def elicited_gradients(
    model: Any,
    layers: Mapping[str, nn.Linear],
    rows: Sequence[Encoded],
    *,
    r: int,
    scaling: float,
    learning_rate: float,
    batch: int,
    seed: int,
    pad_token_id: int,
) -> dict[str, Tensor]:
    """Compute RepSelect's gradient [out, in] of each layer's weight: of minus the mean cross-entropy, summed over batches.

    It is taken under LoRA factors that have learned the rows for one epoch, by plain gradient descent; fp32. The model
    itself does not change.
    """
    device = next(model.parameters()).device
    factors = fresh_factors(layers, r, torch.Generator().manual_seed(seed), device)
    leaves = [factor for pair in factors.values() for factor in pair]
    weights = [layer.weight for layer in layers.values()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    total = {name: torch.zeros_like(layer.weight, dtype=torch.float32) for name, layer in layers.items()}
    with low_rank(layers, factors, scaling):
        with _only(model, []):
            source = _batches(rows, batch, pad_token_id, device, order)
            for inputs in progress(source, total=-(-len(rows) // batch), label="eliciting"):
                loss, _ = _mean_loss(model, inputs)
                with torch.no_grad():
                    for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                        leaf -= learning_rate * grad
        with _only(model, weights):
            source = _batches(rows, batch, pad_token_id, device, order)
            for inputs in progress(source, total=-(-len(rows) // batch), label="gradients"):
                loss, _ = _mean_loss(model, inputs)
                for name, grad in zip(layers, torch.autograd.grad(loss, weights), strict=True):
                    total[name] -= grad.float()
    return total


def fresh_factors(
    layers: Mapping[str, nn.Linear], r: int, generator: torch.Generator, device: Any
) -> dict[str, Factors]:
    """Return LoRA's standard start, which adds nothing: A Kaiming-uniform, B zero; both with gradients."""
    factors = {}
    for name, layer in layers.items():
        # Kaiming-uniform with a = sqrt(5) is uniform within 1 / sqrt(in)
        A = (torch.rand(r, layer.in_features, generator=generator) * 2 - 1) / layer.in_features**0.5
        B = torch.zeros(layer.out_features, r)
        factors[name] = Factors(A.to(device).requires_grad_(), B.to(device).requires_grad_())
    return factors


def reinforce(
    model: Any,
    layers: Mapping[str, nn.Linear],
    rows: Sequence[Encoded],
    *,
    r: int,
    scaling: float,
    epochs: int,
    learning_rate: float,
    batch: int,
    seed: int,
    pad_token_id: int,
) -> dict[str, Factors]:
    """Train LoRA factors that learn `rows` still better, and return them; the model itself does not change.

    (WHP trains all weights of a copy; factors in hooks are a reading that needs no second model.)
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    factors = fresh_factors(layers, r, generator, device)
    leaves = [factor for pair in factors.values() for factor in pair]
    optimizer = torch.optim.AdamW(leaves, lr=learning_rate, weight_decay=0.0)
    with _only(model, []), low_rank(layers, factors, scaling):
        for _ in range(epochs):
            order = torch.randperm(len(rows), generator=generator).tolist()
            source = _batches(rows, batch, pad_token_id, device, order)
            for inputs in progress(source, total=-(-len(rows) // batch), label="reinforcing"):
                loss, _ = _mean_loss(model, inputs)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return {name: Factors(pair.A.detach(), pair.B.detach()) for name, pair in factors.items()}
