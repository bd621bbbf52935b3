"""Rows that begin alike, scored without computing a shared token twice: a batch holds every prefix once.

All layers but attention treat a token by itself, so they see one row of the distinct tokens. Attention alone is computed row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from alter.data import IGNORE, Encoded

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION = "alter_shared"
"""Name under which transformers knows the attention of such batches."""
LAYOUT = 4
"""Largest number of tokens of the rows, filled up to one length, in multiples of the distinct tokens that a batch may hold."""
WORTH = 0.9
"""Largest share of distinct tokens at which such batches are used: below it they are faster."""
ROUNDING = 0.02
"""Largest relative difference of logits that is rounding in 16 bits."""


@dataclass(frozen=True)
class SharedBatch:
    """Rows of token ids with every shared prefix once, N distinct tokens in all.

    Attributes:
        rows: numbers of the R rows, in order of their tokens.
        ids, positions: [1, N], each distinct token and its place in its rows.
        places: [R, T], which distinct token stands where in each row; -1 after a row's end.
        sources: [N], where each distinct token stands first in the flattened rows.
    """

    rows: list[int]
    ids: Tensor
    positions: Tensor
    places: Tensor
    sources: Tensor

    @classmethod
    def of(cls, encoded: Sequence[Encoded], rows: Sequence[int]) -> SharedBatch:
        """Make the batch of some of the rows."""
        order = sorted(rows, key=lambda i: encoded[i].input_ids)
        tokens = [np.asarray(encoded[i].input_ids) for i in order]
        places = np.full((len(order), max(map(len, tokens))), -1)
        ids, positions, sources, total = [], [], [], 0
        for k, own in enumerate(tokens):
            shared = common(tokens[k - 1], own) if k else 0
            places[k, :shared] = places[k - 1, :shared]
            new = len(own) - shared
            places[k, shared : len(own)] = np.arange(total, total + new)
            ids.append(own[shared:])
            positions.append(np.arange(shared, len(own)))
            sources.append(positions[-1] + k * places.shape[1])
            total += new
        flat = [torch.from_numpy(np.concatenate(parts)) for parts in (ids, positions, sources)]
        return cls(order, flat[0][None], flat[1][None], torch.from_numpy(places), flat[2])

    def to(self, device: torch.device) -> SharedBatch:
        """Return the batch on a device."""
        tensors = (self.ids, self.positions, self.places, self.sources)
        return SharedBatch(self.rows, *(tensor.to(device) for tensor in tensors))

    def scored(self, encoded: Sequence[Encoded]) -> tuple[Tensor, Tensor, list[int]]:
        """Return what predicts each labelled token, row after row, its label, and how many of them each row has."""
        labels = torch.full(self.places.shape, IGNORE)
        for k, i in enumerate(self.rows):
            labels[k, : len(encoded[i].labels)] = torch.tensor(encoded[i].labels)
        predicts = labels[:, 1:] != IGNORE
        return self.places[:, :-1][predicts], labels[:, 1:][predicts], predicts.sum(1).tolist()


def common(one: Any, other: Any) -> int:
    """Count the leading numbers that two arrays share."""
    most = min(len(one), len(other))
    differs = one[:most] != other[:most]
    return int(differs.argmax()) if differs.any() else most


def shared_batches(encoded: Sequence[Encoded], tokens: int) -> list[SharedBatch] | None:
    """Group rows of one prompt into batches of about `tokens` distinct tokens; None where rows share too little.

    The longest rows come first. A batch has more tokens than that if one of its rows has.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(encoded):
        groups.setdefault(tuple(row.input_ids[: row.prompt_length]), []).append(i)
    longest = {key: max(len(encoded[i].input_ids) for i in rows) for key, rows in groups.items()}
    batches: list[list[int]] = []
    distinct = length = 0
    for key in sorted(groups, key=lambda key: -longest[key]):
        rows = sorted(groups[key], key=lambda i: encoded[i].input_ids)
        own = [np.asarray(encoded[i].input_ids) for i in rows]
        new = [len(row) - (common(own[k - 1], row) if k else 0) for k, row in enumerate(own)]
        # a question that a batch of its own holds is not torn apart
        apart = distinct + sum(new) > tokens >= sum(new)
        for k, i in enumerate(rows):
            widest = max(length, len(own[k]))
            fits = batches and distinct + new[k] <= tokens and (len(batches[-1]) + 1) * widest <= LAYOUT * tokens
            if not fits or (apart and k == 0):
                batches.append([])
                distinct, length = len(own[k]) - new[k], 0
            batches[-1].append(i)
            distinct, length = distinct + new[k], max(length, len(own[k]))
    found = [SharedBatch.of(encoded, rows) for rows in batches]
    total = sum(len(row.input_ids) for row in encoded)
    return found if sum(batch.ids.numel() for batch in found) <= WORTH * total else None


# The forward pass ----------------------------------------------------------------------------------------------------

_present: ContextVar[SharedBatch | None] = ContextVar("alter_shared_batch", default=None)


class Unshareable(RuntimeError):
    """A model's attention has a form that is not computed here."""


def shared_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Return the causal attention [1, N, H, D] of the distinct tokens of the present batch, each within a row of its own.

    Raises:
        Unshareable: the attention has a window, a cap, a bias or sinks, or is not causal.
    """
    batch = _present.get()
    odd = [
        name for name in ("softcap", "s_aux", "position_bias", "sliding_window", "cache") if more.get(name) is not None
    ]
    if batch is None or odd or dropout or is_causal is False or not getattr(module, "is_causal", True):
        raise Unshareable(f"{type(module).__name__} has {odd or 'attention that is not causal'}")
    rows, length = batch.places.shape
    flat = batch.places.clamp(min=0).flatten()

    def spread(x: Tensor) -> Tensor:
        # [1, heads, N, D] to [R, heads, T, D]
        return x[0].transpose(0, 1).index_select(0, flat).view(rows, length, *x.shape[1::2]).transpose(1, 2)

    found = torch.nn.functional.scaled_dot_product_attention(
        spread(query),
        spread(key),
        spread(value),
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return found.transpose(1, 2).flatten(0, 1).index_select(0, batch.sources)[None], None


def _configs(inner: Any) -> list[Any]:
    """Return the configurations of a model's parts that say how they compute attention."""
    found = {id(part.config): part.config for part in inner.modules() if hasattr(part, "config")}
    return [config for config in found.values() if getattr(config, "_attn_implementation", None) == "sdpa"]


@contextmanager
def _shared(inner: Any, batch: SharedBatch) -> Iterator[None]:
    """Inside the block, the model's attention is that of this batch."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, shared_attention)
    configs = _configs(inner)
    token = _present.set(batch)
    try:
        for config in configs:
            config._attn_implementation = ATTENTION
        yield
    finally:
        for config in configs:
            config._attn_implementation = "sdpa"
        _present.reset(token)


def shared_logits(model: Any, inner: Any, batch: SharedBatch, wanted: Tensor) -> Tensor:
    """Return the logits [K, V] of K distinct tokens of a batch, which is on the model's device; the head runs on these alone.

    Args:
        model: for which `shares` is true.
        inner: the transformers model in it.
        batch: the batch.
        wanted: [K], the tokens.

    Raises:
        Unshareable: see `shared_attention`.
    """
    more = {"alter_rows": batch.places} if "_alter_context" in inner.__dict__ else {}
    with _shared(inner, batch):
        logits: Tensor = model(
            input_ids=batch.ids, position_ids=batch.positions, use_cache=False, logits_to_keep=wanted, **more
        ).logits
    return logits[0]


def shared_logits_beside(model: Any, inner: Any, batch: SharedBatch, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits [K, V] of the untouched model and of the adapted one; otherwise as `shared_logits`.

    Of an ALTER adapter in all blocks, the pass of the untouched model is the one that tells the routes.
    """
    context = inner.__dict__.get("_alter_context")
    if context is not None and [context.configs[name].router for name in context.active()] == ["learned"]:
        with _shared(inner, batch):
            base, adapted = model.base_model.beside_base(batch.ids, batch.positions, batch.places, wanted)
        return base, adapted
    with model.disable_adapter():
        base = shared_logits(model, inner, batch, wanted)
    return base, shared_logits(model, inner, batch, wanted)


def known_kind(model: Any, inner: Any) -> bool:
    """Tell whether a model is one of transformers' own, by itself or with a LoRA or an ALTER adapter."""
    kinds = {str(config.peft_type).rpartition(".")[2] for config in getattr(model, "peft_config", {}).values()}
    return type(inner).__module__.startswith("transformers.models.") and kinds <= {"ALTER", "LORA"}


def shares(model: Any, inner: Any, batches: Sequence[SharedBatch]) -> bool:
    """Tell whether a model computes shared batches: of a known kind, and with the logits of a plain pass on two rows.

    Args:
        model: in eval mode, without gradients.
        inner: the transformers model in it.
        batches: what it is to compute.
    """
    if not known_kind(model, inner) or not getattr(inner, "_supports_attention_backend", False) or not _configs(inner):
        return False
    # some models put a window into the mask alone, which is not looked at here, and two short rows do not reach its end
    text = inner.config.get_text_config()
    ends = [end for name in ("sliding_window", "attention_chunk_size") if (end := getattr(text, name, None))]
    if ends and max(batch.places.shape[1] for batch in batches) > min(ends):
        return False
    two = _pair(batches)
    if two is None:
        return False
    device = next(model.parameters()).device
    lengths = (two.places >= 0).sum(1).tolist()
    tokens = two.ids[0][two.places.clamp(min=0)].to(device)
    mask = (two.places >= 0).to(device)
    try:
        found = shared_logits(model, inner, two.to(device), torch.arange(two.ids.numel(), device=device))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    whole = model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).logits
    expected = torch.cat([row[:length] for row, length in zip(whole, lengths, strict=True)]).float()
    spread = found[
        torch.cat([row[:length] for row, length in zip(two.places, lengths, strict=True)]).to(device)
    ].float()
    most = 1e-3 if found.dtype in (torch.float32, torch.float64) else ROUNDING
    return bool((spread - expected).norm() <= most * expected.norm())


def _pair(batches: Sequence[SharedBatch]) -> SharedBatch | None:
    """Return a batch of the two shortest neighbours that begin alike and differ; None if there are none."""
    best: tuple[int, SharedBatch, int] | None = None
    for batch in batches:
        lengths = (batch.places >= 0).sum(1)
        alike = (batch.places[1:] == batch.places[:-1]) & (batch.places[1:] >= 0)
        shared = alike.sum(1)
        good = (shared > 0) & (shared < lengths[1:]) & (shared < lengths[:-1])
        for k in good.nonzero()[:, 0].tolist():
            size = int(lengths[k] + lengths[k + 1])
            if best is None or size < best[0]:
                best = size, batch, k
    if best is None:
        return None
    _, batch, k = best
    places = batch.places[k : k + 2]
    rows = [Encoded(batch.ids[0][own[own >= 0]].tolist(), [], 0) for own in places]
    return SharedBatch.of(rows, [0, 1])
