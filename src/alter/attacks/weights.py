"""Attacks with access to the weights: relearning, quantisation, removing the adapter."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from alter import metrics
from alter.attacks.base import Bench, Budget, Impossible
from alter.data import Collator, Encoded, encode_all
from alter.inference import context_length, decided, evaluating, score, virtual_tokens
from alter.storage import Record


def base_linears(model: Any) -> list[tuple[str, Any]]:
    """Yield name and module of every linear layer of the base model, under an adapter or not; the head is left out.

    Layers that share their weight, as a guard's assistant does with the base, are there once.
    """
    head = model.get_output_embeddings()
    head = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    found: list[tuple[str, Any]] = []
    # keep the weights themselves: an id() can be reused once its object is gone
    seen: dict[int, Any] = {} if head is None else {id(head.weight): head.weight}

    def visit(module: Any, path: str) -> None:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        if not isinstance(module, (nn.Linear, Conv1D)):
            for name, child in module.named_children():
                visit(child, f"{path}.{name}" if path else name)
        elif id(weight := module.weight) not in seen:
            seen[id(weight)] = weight
            found.append((path, module))

    visit(model, "")
    return found


def expert_weights(model: Any) -> list[tuple[str, Any, str]]:
    """Return every tensor that holds the weights of all experts of a mixture: its path, its module and its name in that.

    Each is [experts, out, in], or [experts, in, out] where the module `is_turned`. Such experts are no linear layers.
    """
    return [
        (f"{path}.{name}", module, name)
        for path, module in model.named_modules()
        if "Expert" in type(module).__name__
        for name, weight in module.named_parameters(recurse=False)
        if weight.dim() == 3
    ]


def is_turned(module: Any) -> bool:
    """Return whether a layer, or a mixture's experts, hold their weights as [in, out]."""
    return isinstance(module, Conv1D) or bool(getattr(module, "is_transposed", False))


def base_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight of `base_linears` as [out, in] and of `expert_weights` as [experts, out, in], by its layer's or its own name.

    They are views: what is written to them is written to the model.

    Raises:
        Impossible: one is quantised.
    """
    found = [(name, module, module.weight) for name, module in base_linears(model)]
    found += [(path, module, getattr(module, name)) for path, module, name in expert_weights(model)]
    for path, module, weight in found:
        if not weight.is_floating_point():
            raise Impossible(f"Layer {path} is quantised already ({weight.dtype}): give the full-precision model.")
        yield path, weight.transpose(-1, -2) if is_turned(module) else weight


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 levels of NormalFloat-4 (Dettmers et al. 2023, arXiv:2305.14314, appendix E)."""
NF4_BLOCK = 64


def round_trip(weight: torch.Tensor, bits: Literal[8, 4]) -> torch.Tensor:
    """Quantise a weight [out, in] and return the dequantised values in its own dtype.

    8 bits: each row divided by its largest magnitude over 127 and rounded (the weights of LLM.int8, Dettmers et al.
    2022, arXiv:2208.07339, without its outlier columns). 4 bits: each block of 64 values in row order divided by its
    largest magnitude and moved to the nearest NF4 level (QLoRA, without double quantisation). Zeros stay zero.
    """
    values = weight.detach().float()
    if bits == 8:
        scale = values.abs().amax(dim=1, keepdim=True) / 127
        return (torch.round(values / scale.clamp(min=1e-38)).clamp(-127, 127) * scale).to(weight.dtype)
    flat = values.flatten()
    padded = nn.functional.pad(flat, (0, -len(flat) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    largest = padded.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(NF4, device=weight.device)
    borders = (levels[1:] + levels[:-1]) / 2
    nearest_level = levels[torch.bucketize(padded / largest.clamp(min=1e-38), borders)]
    return (nearest_level * largest).flatten()[: len(flat)].view_as(values).to(weight.dtype)


@torch.no_grad()
def quantize(model: nn.Module, bits: Literal[8, 4]) -> int:
    """Pass the weights of all base linear layers and experts through `round_trip`, in place; adapters keep theirs. Returns how many.

    Raises:
        Impossible: the model has no linear layer, or a quantised one.
    """
    done = 0
    for _, weight in base_weights(model):
        for matrix in weight if weight.dim() == 3 else (weight,):
            matrix.copy_(round_trip(matrix, bits))
            done += 1
    if not done:
        raise Impossible(f"{type(model).__name__} has no linear layer to quantise.")
    return done


class LowRank(nn.Module):
    """The attacker's LoRA (Hu et al. 2022) as a parametrisation: W -> W + 2 B A, zero at the start; each expert has its own."""

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        *experts, rows, columns = weight.shape
        bound = 1 / math.sqrt(columns)
        start = (torch.rand(*experts, rank, columns, generator=generator) * 2 - 1) * bound
        self.A = nn.Parameter(start.to(weight))
        self.B = nn.Parameter(torch.zeros(*experts, rows, rank).to(weight))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight with the update."""
        return weight + 2 * (self.B @ self.A)


def add_update(model: nn.Module, rank: int, seed: int) -> list[nn.Parameter]:
    """Add a low-rank update to every base linear layer and expert, under any adapter; return its parameters, freeze all others."""
    model.requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    trained: list[nn.Parameter] = []
    places = [(module, "weight") for _, module in base_linears(model)]
    places += [(module, name) for _, module, name in expert_weights(model)]
    for module, name in places:
        update = LowRank(getattr(module, name), rank, draw)
        parametrize.register_parametrization(module, name, update)
        trained += [update.A, update.B]
    return trained


def check_trainable(model: Any) -> None:
    """Refuse a model whose linear layers cannot be trained: an attack on the rest would be weaker than it says.

    Raises:
        Impossible: it is quantised, or has no linear layer.
    """
    if not list(base_weights(model)):
        raise Impossible(f"{type(model).__name__} has no linear layer to train.")


class Diverged(Impossible):
    """The loss of a training, or its gradient, is not finite."""


def train_steps(
    model: nn.Module, rows: Sequence[Encoded], weights: Sequence[nn.Parameter], *, rate: float, steps: int,
    batch_size: int, pad_token_id: int, seed: int,
) -> Iterator[tuple[int, float]]:  # fmt: skip
    """Train on the labelled tokens of rows and yield (steps done, loss) after each step; the caller may measure between.

    AdamW without weight decay, constant rate, gradients cut to norm 1, rows shuffled anew in every pass. The model is in
    eval mode: no dropout.

    Raises:
        Diverged: the loss or its gradient is not finite.
    """
    device = next(model.parameters()).device
    collate = Collator(pad_token_id)
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    draw = random.Random(seed)
    queue: list[int] = []
    for step in range(1, steps + 1):
        while len(queue) < min(batch_size, len(rows)):
            queue += draw.sample(range(len(rows)), len(rows))
        chosen, queue = queue[:batch_size], queue[batch_size:]
        batch = collate([{"input_ids": rows[i].input_ids, "labels": rows[i].labels} for i in chosen])
        labels = batch.pop("labels")[:, 1:].to(device)
        given = {name: tensor.to(device) for name, tensor in batch.items()}
        with evaluating(model, gradients=True):
            given |= decided(
                model, given["input_ids"], given["attention_mask"], [rows[i].prompt_length for i in chosen]
            )
            logits = model(**given, use_cache=False).logits[:, virtual_tokens(model) :]
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten())
            if not torch.isfinite(loss):
                raise Diverged(f"The attacker's loss is {loss.item()} at step {step} (rate {rate:g}): lower the rate.")
            optimizer.zero_grad()
            loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        if not torch.isfinite(norm):
            raise Diverged(f"The attacker's gradient is {norm.item()} at step {step} (rate {rate:g}): lower the rate.")
        optimizer.step()
        yield step, loss.item()


def relearn(bench: Bench, *, lora: bool, benign: bool) -> list[Record]:
    """Train on the attacker's rows (or on unrelated ones) and measure after each of the chosen numbers of steps.

    Full: every weight trains, the base's and the adapter's (ALTER: A, experts and router), while the adapter is active
    and routes. LoRA: everything is frozen and a low-rank update is added to each base linear layer and expert, under the
    adapter, which stays active; ALTER's frozen pass sees the updated base as well. In float32.

    Raises:
        Impossible: the weights are quantised, or the training diverges.
    """
    how = bench.settings.relearn
    name = f"{'benign' if benign else 'relearn'}{'_lora' if lora else ''}"
    model, tokenizer = bench.fresh("float32")
    check_trainable(model)
    torch.manual_seed(bench.settings.seed)
    if benign:
        count = min(how.rows, len(bench.unrelated))
        given = random.Random(bench.settings.seed).sample(bench.unrelated, count)
    else:
        given = [bench.rows[i] for i in bench.attacker]
    # a text longer than the context is trained on in windows
    rows = encode_all(tokenizer, given, max_length=context_length(model))[0]
    if lora:
        weights = add_update(model, how.lora_rank, bench.settings.seed)
    else:
        weights = [weight for weight in model.parameters() if weight.is_floating_point()]
        for weight in weights:
            weight.requires_grad_(True)
    other, own = bench.items(bench.measured), bench.items(bench.attacker)
    losses: list[float] = []
    found: list[Record] = []
    run = train_steps(
        model, rows, weights, rate=how.lora_learning_rate if lora else how.learning_rate, steps=how.steps[-1],
        batch_size=how.batch_size, pad_token_id=tokenizer.pad_token_id, seed=bench.settings.seed,
    )  # fmt: skip
    for step, loss in run:
        losses.append(loss)
        if step in how.steps:
            with parametrize.cached():
                extra = {"step": step, "trained_rows": len(rows), "losses": list(losses)}
                found += bench.measure(name, model, other, part="other", **extra)
                if not benign:
                    found += bench.measure(name, model, own, part="relearned", **extra)
    return found


SEARCHED = 4
"""Fewest attacker's rows for a search: a quarter of them tells which rate is best."""
TRIES = 3
"""Rates whose training the budget pays for, by default."""
MOST = 20
"""Rates that are tried, at most."""
FACTOR = 4.0
"""Factor between the first rates that are tried; near the best, half of it on a logarithmic scale."""


def best_rate(first: float, value: Callable[[float], float | None]) -> list[tuple[float, float]]:
    """Search for the best rate: up or down by `FACTOR` while the value improves, then between; return all tried, sorted.

    Args:
        first: the rate to start from.
        value: scores a rate; None ends the search, since the budget is spent.
    """
    tried: dict[float, float] = {}

    def attempt(rate: float) -> bool:
        """Try a rate; whether the search goes on."""
        found = value(rate)
        if found is not None:
            tried[rate] = found
        return found is not None

    def best() -> float:
        return max(tried, key=lambda rate: tried[rate])

    going = attempt(first) and attempt(first * FACTOR)
    up = going and best() != first
    step = FACTOR if up else 1 / FACTOR
    place = first * FACTOR if up else first
    while going and best() == place and len(tried) < MOST - 2:
        place *= step
        going = attempt(place)
    middle = best()
    for rate in (middle * FACTOR**0.5, middle / FACTOR**0.5):
        going = going and attempt(rate)
    return list(tried.items())


def _begin(
    bench: Bench, rate: float, numbers: Sequence[int], steps: int
) -> tuple[Any, int, Iterator[tuple[int, float]]]:
    """Return a freshly loaded model, the rows of each step, and the iterator that trains all its weights on the rows with these numbers."""
    how = bench.settings.relearn
    model, tokenizer = bench.fresh("float32")
    check_trainable(model)
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    for weight in weights:
        weight.requires_grad_(True)
    torch.manual_seed(bench.settings.seed)
    rows = encode_all(tokenizer, [bench.rows[i] for i in numbers], max_length=context_length(model))[0]
    return model, min(how.batch_size, len(rows)), train_steps(
        model, rows, weights, rate=rate, steps=steps, batch_size=how.batch_size, pad_token_id=tokenizer.pad_token_id,
        seed=bench.settings.seed,
    )  # fmt: skip


def relearn_searched(bench: Bench) -> list[Record]:
    """Relearn all weights at the rate and for the number of steps that suit the attacker best, and measure.

    A quarter of the attacker's rows tells what is best: rates from `relearn.learning_rate` on are tried on the others
    (`best_rate`), each as long as `relearn.steps` say, and the model is read at each of these. The final training is on
    all of the attacker's rows. Every model gets a search of its own.

    Raises:
        Impossible: the weights are quantised, or the loss was finite at no rate.
    """
    settings, how = bench.settings, bench.settings.relearn
    count = max(1, len(bench.attacker) // 4)
    chosen, rest = bench.attacker[:count], bench.attacker[count:]
    budget = Budget.of(settings.budget, TRIES * how.steps[-1] * how.batch_size)
    reached: dict[float, tuple[float, int]] = {}

    def value(rate: float) -> float | None:
        if reached and not budget.left:
            return None
        reached[rate] = (-math.inf, how.steps[0])
        items = bench.items(chosen)
        model, size, steps = _begin(bench, rate, rest, how.steps[-1])
        try:
            for step, _ in steps:
                budget.spend(size)
                if step in how.steps:
                    found = score(
                        model,
                        [item.encoded for item in items],
                        pad_token_id=bench.tokenizer.pad_token_id,
                        progress=False,
                    ).logprob
                    mean = -float(np.mean(metrics.likelihood.average_loss(found)))
                    reached[rate] = max(reached[rate], (mean, step))
                    if not budget.left:
                        break
        except Diverged:
            # a rate that breaks the model is none for the attacker
            reached[rate] = (-math.inf, how.steps[0])
        return reached[rate][0]

    tried = best_rate(how.learning_rate, value)
    rate = max(reached, key=lambda each: reached[each])
    steps = reached[rate][1]
    model, _, final = _begin(bench, rate, bench.attacker, steps)
    losses = [loss for _, loss in final]
    extra = {
        "trained_rows": len(bench.attacker), "losses": losses, "rate": rate, "steps": steps,
        "tried": [{"rate": each, "logprob": found, "steps": reached[each][1]} for each, found in tried], **budget.told(),
    }  # fmt: skip
    found = bench.measure("relearn_searched", model, bench.items(bench.measured), part="other", **extra)
    return found + bench.measure("relearn_searched", model, bench.items(bench.attacker), part="relearned", **extra)


def quantized(bench: Bench, *, bits: Literal[8, 4]) -> list[Record]:
    """Quantise the base weights under the adapter, by a round trip in memory, and measure."""
    model, _ = bench.fresh()
    layers = quantize(model, bits)
    return bench.measure(f"quantize_{bits}", model, bench.items(bench.measured), part="other", layers=layers)


def stripped(bench: Bench) -> list[Record]:
    """Disable the adapter: what a holder of the base weights gets."""
    model, _ = bench.shared()
    with model.disable_adapter():
        return bench.measure("strip", model, bench.items(bench.measured), part="other")
