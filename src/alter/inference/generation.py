"""Answer many prompts: batched decoding with a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from alter.core import UserError, as_input, cache_of, processes
from alter.data import Collator, ensure_pad_token
from alter.inference.decoding import OTHERS, PENALTIES, Decoding
from alter.inference.passes import (
    check_embedded,
    context_length,
    device_of,
    evaluating,
    inner_model,
    prompted,
    shown,
)

if TYPE_CHECKING:
    from torch import nn


# Generation ----------------------------------------------------------------------------------------------------------


def check_prompts(
    model: nn.Module, prompts: Sequence[list[int]], max_new_tokens: int, names: Sequence[str] | None = None
) -> None:
    """Check prompts before any pass, as `generate` would; `names` as in `check_rows`, "Prompt 0" by default.

    Raises:
        UserError: a prompt is empty or has a token without an embedding, or prompt and reply do not fit into the context.
    """
    context = context_length(model)
    for i, prompt in enumerate(prompts):
        name = f"Prompt {i}" if names is None else names[i]
        if not prompt:
            raise UserError(f"{name} is empty: there is nothing to continue.")
        if context is not None and len(prompt) + max_new_tokens > context:
            raise UserError(
                f"{name} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds the model's context "
                f"of {context}: generate at most {max(context - len(prompt), 0)}, or shorten the prompt."
            )
        check_embedded(model, prompt, name)


def left_padded(
    prompts: Sequence[list[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left-padded prompts [B, T] and their attention mask."""
    batch = Collator(pad_token_id, side="left")([{"input_ids": prompt} for prompt in prompts])
    return batch["input_ids"].to(device), batch["attention_mask"].to(device)


def _batches(model: Any, prompts: Sequence[list[int]], order: Sequence[int], size: int) -> list[list[int]]:
    """Cut the numbers of prompts into batches; of one length, where a model takes no padding (`prompted`)."""
    groups: dict[int, list[int]] = {}
    for i in order:
        groups.setdefault(len(prompts[i]) if prompted(model) else 0, []).append(i)
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def _decoded(tokenizer: Any, replies: Sequence[list[int]]) -> list[str]:
    return [tokenizer.decode(reply, skip_special_tokens=True).strip() for reply in replies]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 200,
    batch_size: int = 64,
    expected_lengths: Sequence[int] | None = None,
    begun: Sequence[Sequence[int]] | None = None,
    compat: bool = False,
    progress: bool = True,
    label: str = "generating",
    **sampling: Any,
) -> list[str]:
    """Return what the model says after each prompt: decoded without special tokens, stripped, in the order given.

    Rows are sorted by length and left-padded; positions count from a prompt's first token. A reply ends at the
    first end-of-sequence token (the tokenizer's, or any of the model's generation settings) or after `max_new_tokens`.

    Args:
        model: as in `score`; it is in eval mode meanwhile.
        tokenizer: if it has no pad token, its end-of-sequence token becomes it.
        prompts: token ids, none of them empty.
        expected_lengths: how long each reply will about be, in any unit: a batch runs until its longest reply ends, so
            likely lengths that are alike share one. Changes the time only. None: all alike.
        begun: tokens that each reply is known to begin with, of a model that `says_what_it_scores`; a stop token ends it.
        compat: as OpenUnlearning, hide every token equal to the pad token from attention, inside prompts too.
        sampling: further settings of `model.generate`, for example `do_sample=True, temperature=0.7`. Default: greedy.

    Raises:
        UserError: a prompt is empty, prompt and reply do not fit into the model's context, or its logits are not finite.
    """
    check_prompts(model, prompts, max_new_tokens)
    ensure_pad_token(tokenizer)
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    decoding = Decoding.of(model, tokenizer, max_new_tokens, greedy | sampling, whole=bool(sampling))
    decoding = decoding.by_nucleus(sampling, inner_model(model).generation_config)
    device = device_of(model)
    likely = [0] * len(prompts) if expected_lengths is None else expected_lengths
    told, ended = _told(begun or [[] for _ in prompts], decoding)
    prompts = [[*prompt, *first] for prompt, first in zip(prompts, told, strict=True)]
    order = sorted((i for i in range(len(prompts)) if not ended[i]), key=lambda i: (-likely[i], -len(prompts[i]), i))
    batches = _batches(model, prompts, order, batch_size)
    # a batch of samples has a seed of its own, so that what it says does not depend on the batches before it
    drawn = int(torch.randint(2**62, (1,))) if decoding.draws else None
    seed = processes.from_first(lambda: drawn)
    devices = [device] if device.type == "cuda" else []

    def run(number: int) -> list[str]:
        ids, mask = left_padded([prompts[i] for i in batches[number]], tokenizer.pad_token_id, device)
        if compat:
            mask = (ids != tokenizer.pad_token_id).long()
        with torch.random.fork_rng(devices=devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed + number)
            limits = [max_new_tokens - len(told[i]) for i in batches[number]]
            replies = _continue(model, ids, mask, decoding, limits=limits)
            return _decoded(tokenizer, [told[i] + reply for i, reply in zip(batches[number], replies, strict=True)])

    texts = _decoded(tokenizer, told)
    with evaluating(model), contiguous_head(model):
        said = zip(batches, processes.spread(range(len(batches)), run, model, apart=True), strict=True)
        for batch, replies in shown(said, len(batches), label, progress):
            for i, reply in zip(batch, replies, strict=True):
                texts[i] = reply
    return texts


def _told(begun: Sequence[Sequence[int]], decoding: Decoding) -> tuple[list[list[int]], list[bool]]:
    """Cut known beginnings at the first stop token and at the longest reply; return them, and which replies have ended."""
    told = []
    for tokens in begun:
        end = next((t for t, token in enumerate(tokens) if token in decoding.stop), None)
        told.append(list(tokens[:end])[: decoding.new_tokens])
    lengths = [min(len(tokens), decoding.new_tokens) for tokens in begun]
    ended = [len(own) < length or length == decoding.new_tokens for own, length in zip(told, lengths, strict=True)]
    return told, ended


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    count: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 200,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
    label: str = "sampling",
) -> list[list[str]]:
    """Return `count` sampled replies to each prompt, [prompts][count], as `generate` writes them.

    Every token is drawn from the model's own distribution: nothing but `temperature` and `top_p` reshapes it, whatever the
    model's generation settings say (a repetition penalty, say). The
    prompt is read once for all replies of a batch; its keys and values are then repeated for each of them, where the
    cache allows it (see `can_drop_rows`).

    Args:
        model, tokenizer, prompts: as in `generate`.
        count: replies to each prompt.
        temperature: above 0.
        top_p: share of the probability that is kept, in (0, 1].
        batch_size: replies that are sampled at a time.
        seed: of the draws. The generators of the caller stay as they are. With another batch size other replies are drawn.

    Raises:
        UserError: a prompt is empty, prompt and reply do not fit into the model's context, or its logits are not finite.
    """
    check_prompts(model, prompts, max_new_tokens)
    ensure_pad_token(tokenizer)
    chosen = dict.fromkeys((*OTHERS, *PENALTIES)) | {"do_sample": True, "num_beams": 1, "top_k": 0}
    chosen |= {"temperature": temperature, "top_p": top_p}
    decoding = Decoding.of(model, tokenizer, max_new_tokens, chosen, whole=False)
    device = device_of(model)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    together, each = max(1, batch_size // count), min(count, batch_size)
    batches = [
        (batch, min(each, count - done))
        for batch in _batches(model, prompts, order, together)
        for done in range(0, count, each)
    ]

    def run(number: int) -> list[list[str]]:
        batch, copies = batches[number]
        ids, mask = left_padded([prompts[i] for i in batch], tokenizer.pad_token_id, device)
        texts = _decoded(tokenizer, _drawn(model, ids, mask, copies, decoding, seed * 1_000_003 + number))
        return [texts[k * copies : (k + 1) * copies] for k in range(len(batch))]

    found: list[list[str]] = [[] for _ in prompts]
    with evaluating(model), contiguous_head(model):
        said = zip(batches, processes.spread(range(len(batches)), run, model, apart=True), strict=True)
        for (batch, _), replies in shown(said, len(batches), label, progress):
            for i, texts in zip(batch, replies, strict=True):
                found[i] += texts
    return found


def _drawn(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, copies: int, decoding: Decoding, seed: int
) -> list[list[int]]:
    """Return `copies` sampled replies to each of the left-padded prompts [B, T], one prompt after the other."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    temperature, top_p = decoding.settings["temperature"], decoding.settings["top_p"]
    warp = LogitsProcessorList([TemperatureLogitsWarper(temperature)] if temperature != 1 else [])
    if top_p < 1:
        warp.append(TopPLogitsWarper(top_p))
    # read before the seed is set: whether caches are shared changes no draw
    read = None if decoding.whole else _read(model, ids, mask, decoding.settings)
    ids, mask = ids.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0)
    with torch.random.fork_rng(devices=[ids.device] if ids.device.type == "cuda" else []):
        torch.manual_seed(seed)
        begun = None
        if read is not None:
            cache, scores = read
            cache.batch_repeat_interleave(copies)
            scores = warp(ids, scores.repeat_interleave(copies, dim=0))
            first = torch.multinomial(scores.softmax(dim=-1), num_samples=1)
            begun = torch.cat([ids, first], dim=1), cache
        return _continue(model, ids, mask, decoding, begun)


def _read(model: Any, ids: torch.Tensor, mask: torch.Tensor, settings: dict[str, Any]) -> tuple[Any, Any] | None:
    """Return the cache of left-padded prompts [B, T] and the next token's scores [B, V], or None where it cannot be shared."""
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=1,
        return_dict_in_generate=True,
        output_scores=True,
        # greedy: the token is not used, and the scores are not reshaped yet
        **settings | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None},
    )
    cache = cache_of(out)
    return (cache, out.scores[0].float()) if can_drop_rows(cache) else None


def _continue(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    decoding: Decoding,
    begun: tuple[torch.Tensor, Any] | None = None,
    limits: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return the new tokens of each row of left-padded prompts [B, T], up to its first stop token, or to its limit.

    `begun` is the prompts with a first new token, [B, T + 1], and the cache of the prompts, where they are known already.
    After every `decoding.segment` tokens, rows that have ended leave the batch, keys and values included, where the cache allows
    it (see `can_drop_rows`); else they stay, and what follows their end is not looked at.
    """
    replies: list[list[int]] = [[] for _ in ids]
    ended = [False] * len(ids)
    rows = list(range(len(ids)))
    carried: dict[str, Any] = {}
    most = list(limits or [decoding.new_tokens] * len(ids))
    while True:
        if begun is None:
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=min(
                    decoding.segment, *(most[row] - len(replies[row]) for row in rows if not ended[row])
                ),
                return_dict_in_generate=True,
                **carried,
                **decoding.settings,
            )
            begun = out.sequences, cache_of(out)
        (whole, cache), begun = begun, None
        new = whole[:, ids.shape[1] :]
        for row, tokens in zip(rows, new.tolist(), strict=True):
            if not ended[row]:
                end = next((t for t, token in enumerate(tokens) if token in decoding.stop), None)
                replies[row] += tokens[:end]
                ended[row] = end is not None or len(replies[row]) >= most[row]
        if all(ended):
            return replies
        ids, mask = whole, torch.cat([mask, torch.ones_like(new)], dim=1)
        carried = as_input(cache)
        if can_drop_rows(cache):
            going = [k for k, row in enumerate(rows) if not ended[row]]
            kept = torch.tensor(going, device=ids.device)
            cache.batch_select_indices(kept)
            ids, mask, rows = ids[kept], mask[kept], [rows[k] for k in going]


@contextmanager
def contiguous_head(model: Any) -> Iterator[None]:
    """Inside the block, make the head's input contiguous.

    Of the last states of prompts, cut out of all states, PyTorch copies the whole head once for each row, in 16 bits on a CPU:
    3.6 GB for 64 rows of SmolLM2.
    """
    head = inner_model(model).get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def can_drop_rows(cache: Any) -> bool:
    """Tell whether a cache holds only growing keys and values, one row for each row of the batch."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in plain for layer in cache.layers)
