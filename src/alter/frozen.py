"""What the frozen base knows of a fixed data set: entropies, router features, reference distributions. Computed once.

The base never changes while an adapter trains, so nothing here is computed during training: one pass over the rows that
the run will see, kept next to the run in safetensors, and reused when the run resumes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from alter.data import Collator, Encoded
from alter.objectives import Reference
from alter.records import progress, write_atomic

TOKENS_PER_BATCH = 8192


@dataclass
class Row:
    """One row under the frozen base: T tokens, of which n are labelled, N forget experts, D router features.

    `entropy` [T], `features` [T, D] and `gates` [T, N + 1] belong to each token's generating step (see
    `AlterModel.trace`); `reference` holds the distributions an objective compares with, at the n labelled tokens.
    """

    entropy: Tensor
    features: Tensor | None = None
    gates: Tensor | None = None
    reference: Reference | None = None


def batches_by_length(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Group row numbers of similar length so that rows x longest length stays within `tokens` (at least one row)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    for index in order:
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def labelled(labels: Tensor) -> Tensor:
    """[B, T] bool: the position whose distribution gives a labelled token is one before that token."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != -100
    return mask


def top_k(logp: Tensor, k: int) -> Reference:
    """Keep the k most likely tokens of [n, V] log-probabilities."""
    values, ids = logp.topk(min(k, logp.shape[-1]), dim=-1)
    return Reference(ids.to(torch.int32), values)


@torch.no_grad()
def trace_rows(
    model: Any,
    rows: Sequence[Encoded],
    *,
    pad_token_id: int,
    features: bool = False,
    gates: bool = False,
    reference_k: int = 0,
    label: str = "frozen base",
) -> list[Row]:
    """Run the frozen base once over `rows`.

    Args:
        model: `PeftModel` with an ALTER adapter; its base is what runs.
        rows: encoded rows, any lengths.
        pad_token_id: fills up shorter rows of a batch.
        features: keep the router's features, fp16.
        gates: keep the gates that the adapter's router gives now.
        reference_k: keep this many most likely tokens per labelled position; 0 keeps no reference.

    Returns:
        one `Row` per input row, in order, on the CPU.
    """
    device = next(model.parameters()).device
    collate = Collator(pad_token_id)
    result: dict[int, Row] = {}
    groups = batches_by_length([len(row.input_ids) for row in rows], TOKENS_PER_BATCH)
    for group in progress(groups, total=len(groups), label=label):
        batch = collate([{"input_ids": rows[i].input_ids, "labels": rows[i].labels} for i in group])
        batch = {name: value.to(device) for name, value in batch.items()}
        traced = model.base_model.trace(batch["input_ids"], batch["attention_mask"])
        opened = None
        if gates:
            opened = model.base_model.route(traced.entropy, traced.features, batch["attention_mask"]).half().cpu()
        positions = labelled(batch["labels"])
        for place, i in enumerate(group):
            length = len(rows[i].input_ids)
            reference = None
            if reference_k:
                logp = torch.log_softmax(traced.logits[place][positions[place]].float(), dim=-1)
                reference = top_k(logp.cpu(), reference_k)
            result[i] = Row(
                traced.entropy[place, :length].float().cpu(),
                traced.features[place, :length].half().cpu() if features and traced.features is not None else None,
                opened[place, :length] if opened is not None else None,
                reference,
            )
    return [result[i] for i in range(len(rows))]


@dataclass
class Frozen:
    """All that a run takes from the frozen base: its rows, the fitted router's parameters, and what the fit found."""

    rows: list[Row]
    router: dict[str, Tensor]
    found: dict[str, float]


def store(path: Path, frozen: Frozen, key: str) -> None:
    """Write entropies, gates, references and router to one safetensors file, whole or not at all."""
    rows = frozen.rows
    references = [row.reference for row in rows if row.reference is not None]
    tensors = {
        "lengths": torch.tensor([len(row.entropy) for row in rows]),
        "labelled": torch.tensor([0 if row.reference is None else len(row.reference.ids) for row in rows]),
        "entropy": torch.cat([row.entropy for row in rows]),
        "gates": torch.cat([row.gates for row in rows if row.gates is not None]),
    }
    if references:
        tensors["ids"] = torch.cat([reference.ids for reference in references])
        tensors["logp"] = torch.cat([reference.logp for reference in references])
    tensors |= {f"router.{name}": value.contiguous() for name, value in frozen.router.items()}
    write_atomic(path, save(tensors, metadata={"key": key, "found": json.dumps(frozen.found)}))


def restore(path: Path, key: str) -> Frozen | None:
    """Read what `store` wrote under the same key; None if there is none, or it was made from anything else."""
    if not path.exists():
        return None
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
        if metadata["key"] != key:
            return None
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    lengths, counts = tensors["lengths"].tolist(), tensors["labelled"].tolist()
    rows = [
        Row(entropy, gates=gates)
        for entropy, gates in zip(tensors["entropy"].split(lengths), tensors["gates"].split(lengths), strict=True)
    ]
    if "ids" in tensors:
        for row, ids, logp in zip(rows, tensors["ids"].split(counts), tensors["logp"].split(counts), strict=True):
            row.reference = Reference(ids, logp) if len(ids) else None
    router = {name.removeprefix("router."): value for name, value in tensors.items() if name.startswith("router.")}
    return Frozen(rows, router, json.loads(metadata["found"]))
