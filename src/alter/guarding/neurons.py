"""Statistics for Neuron Adjust and Key Space Detection (arXiv:2503.21730): neurons on both sets, and the cube of keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alter.adapter import base_fingerprint
from alter.core import UserError, progress, show
from alter.data import Collator, Encoded, Example, apart_from, batches_by_length, encode, encode_all
from alter.data.background import background
from alter.guarding.settings import KeySpace, MakeGuard, NeuronAdjust
from alter.inference import evaluating
from alter.methods import block_at, blocks
from alter.models import NEURONS, Abstaining, Adjusted, Form, ModelSettings, by_token, keys_of

FIRST_MATRIX = ("gate_proj", "w1", "fc1", "c_fc", "fc_in", "dense_h_to_4h", "up_proj")
SECOND = ("down_proj", "w2", "fc2", "c_proj", "fc_out", "dense_4h_to_h")
"""What architectures call a feed-forward layer's linear layers, before and after the activation."""


def layer_in(model: Any, block: int, names: Sequence[str]) -> str:
    """Return the full name of a block's feed-forward layer, the first that exists among `names`.

    Raises:
        UserError: the block has none of them.
    """
    place, _ = blocks(model)
    found = {name.rpartition(".")[2]: name for name, _ in model.get_submodule(f"{place}.{block}").named_modules()}
    for name in names:
        # attention has a c_proj of its own in GPT-2
        if name in found and "attn" not in found[name]:
            return f"{place}.{block}.{found[name]}"
    raise UserError(
        f"Block {block} of {type(model).__name__} has no feed-forward layer of a known name ({', '.join(names)})."
    )


@torch.no_grad()
def statistics(
    model: Any, layers: Sequence[str], rows: Sequence[Encoded], pad_token_id: int, label: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute mean and standard deviation [K], in float64, of each layer's output over the rows' real tokens."""
    device = next(model.parameters()).device
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    real: list[Tensor] = []

    def hook(name: str) -> Any:
        def add(_: nn.Module, __: Any, output: Tensor) -> None:
            states = by_token(output, real[-1].shape)[real[-1]].double()
            sums[name] = sums.get(name, 0) + states.sum(0)
            squares[name] = squares.get(name, 0) + states.square().sum(0)

        return add

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
    collate, tokens = Collator(pad_token_id), 0
    groups = batches_by_length([len(row.input_ids) for row in rows], 8192)
    try:
        with evaluating(model):
            for group in progress(groups, total=len(groups), label=label):
                batch = collate([{"input_ids": rows[i].input_ids} for i in group])
                real.append(batch["attention_mask"].bool().to(device))
                tokens += int(real[-1].sum())
                given = {name: value.to(device) for name, value in batch.items()}
                model(**given, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, total in sums.items():
        mean = total / tokens
        spread = (squares[name] / tokens - mean.square()).clamp_min(0).sqrt()
        found[name] = mean, spread.clamp_min(1e-6)
    return found


def chosen_neurons(
    forget: Mapping[str, tuple[Tensor, Tensor]], retain: Mapping[str, tuple[Tensor, Tensor]], share: float
) -> dict[str, Tensor]:
    """Choose the `share` of all layers' neurons whose means differ most, at least one: numbers by layer."""
    apart = {name: (mean - retain[name][0]).abs() for name, (mean, _) in forget.items()}
    flat = torch.cat(list(apart.values()))
    taken = torch.zeros(len(flat), dtype=torch.bool)
    taken[flat.cpu().topk(max(1, round(share * len(flat)))).indices] = True
    parts = taken.split([len(value) for value in apart.values()])
    return {name: part.nonzero()[:, 0] for name, part in zip(apart, parts, strict=True) if part.any()}


def cube(forget: Tensor, retain: Tensor, share: float | None, false_alarms: float) -> tuple[Tensor, Tensor, float]:
    """Compute mean and deviation [D] of forget keys [n, D], and the cube's half-width in deviations.

    `share` of what covers all forget keys; without one the most at which at most a share `false_alarms` of retain keys lie
    inside, and no more than covers the forget keys.
    """
    mean, std = forget.mean(0), forget.std(0).clamp_min(1e-6)
    covers = float(((forget - mean).abs() / std).amax())
    if share is not None:
        return mean, std, share * covers
    reach = ((retain - mean).abs() / std).amax(1).sort().values
    allowed = int(false_alarms * len(reach))
    if allowed >= len(reach):
        return mean, std, covers
    return mean, std, min(covers, float(reach[allowed]) * (1 - 1e-6))


def _rows(
    run: MakeGuard, forget: Sequence[Example], retain: Sequence[Example]
) -> tuple[Any, Any, list[Encoded], list[Encoded]]:
    model, tokenizer = ModelSettings(
        model=run.model, dtype=run.dtype, device=run.device, chat_template_kwargs=run.chat_template_kwargs
    ).load()
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    ordinary = apart_from(background(), [f"{row.prompt or ''} {row.answer}" for row in forget])
    rows, _ = encode_all(tokenizer, list(forget), max_length=limit, label="forget")
    others, _ = encode_all(tokenizer, list(retain), max_length=limit, label="retain")
    # of a passage that is longer than the context its beginning will do
    for passage in (passage for part in ordinary.values() for passage in part):
        whole = encode(tokenizer, passage)
        asked = whole.prompt_length if limit is None else min(whole.prompt_length, limit)
        others.append(Encoded(whole.input_ids[:limit], whole.labels[:limit], asked))
    if len(rows) < 2 or len(others) < 2:
        raise UserError(
            f"This guard needs at least two rows to forget and two to keep; there are {len(rows)} and {len(others)}."
        )
    return model, tokenizer, rows, others


def make_neurons(run: MakeGuard, how: NeuronAdjust, forget: Sequence[Example], retain: Sequence[Example]) -> Form:
    """Return Neuron Adjust's guard for a model.

    Raises:
        UserError: too few rows, or a model without such layers.
    """
    model, tokenizer, rows, others = _rows(run, forget, retain)
    layers = [layer_in(model, number, FIRST_MATRIX) for number in range(blocks(model)[1])]
    of_forget, of_retain = (
        statistics(model, layers, part, tokenizer.pad_token_id, label)
        for part, label in ((rows, "forget neurons"), (others, "retain neurons"))
    )
    chosen = chosen_neurons(of_forget, of_retain, how.share)
    tensors: dict[str, Tensor] = {}
    for name, ids in chosen.items():
        tensors[f"{name}/ids"] = ids
        for kind, found in (("f", of_forget), ("r", of_retain)):
            for what, value in zip("ms", found[name], strict=True):
                tensors[f"{name}/{what}_{kind}"] = value.cpu()[ids].float()
    show(f"{sum(map(len, chosen.values()))} neurons of {len(chosen)} layers are adjusted", stderr=True)
    return {"kind": Adjusted.kind, "seed": run.seed, "base": base_fingerprint(model)}, {NEURONS: tensors}


def make_key_space(run: MakeGuard, how: KeySpace, forget: Sequence[Example], retain: Sequence[Example]) -> Form:
    """Return Key Space Detection's guard for a model.

    Raises:
        UserError: too few rows, or a model without such a layer.
    """
    model, tokenizer, rows, others = _rows(run, forget, retain)
    layer = layer_in(model, block_at(how.depth, blocks(model)[1]), SECOND)
    collate, device = Collator(tokenizer.pad_token_id), next(model.parameters()).device

    def keys(part: Sequence[Encoded]) -> Tensor:
        found = []
        with evaluating(model):
            for row in part:
                # a row of text is asked as a whole
                prompt = row.input_ids[: row.prompt_length] if row.prompt_length > 1 else row.input_ids
                batch = {name: value.to(device) for name, value in collate([{"input_ids": prompt}]).items()}
                asked = torch.tensor([len(prompt)], device=device)
                found.append(keys_of(model, layer, batch["input_ids"], batch["attention_mask"], asked).double().cpu())
        return torch.cat(found)

    of_forget, of_retain = keys(rows), keys(others)
    mean, std, half = cube(of_forget, of_retain, how.share, how.false_alarms)
    caught, alarms = (
        float((((part - mean).abs() / std).amax(1) <= half).double().mean()) for part in (of_forget, of_retain)
    )
    show(f"{100 * caught:.0f} % of forget prompts and {100 * alarms:.1f} % of others lie in the cube", stderr=True)
    settings = {
        "kind": Abstaining.kind, "layer": layer, "half": half, "end": tokenizer.eos_token_id,
        "inside": {"forget": caught, "others": alarms}, "base": base_fingerprint(model),
    }  # fmt: skip
    return settings, {NEURONS: {"mean": mean.float(), "std": std.float()}}
