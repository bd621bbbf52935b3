"""Knowledge by depth: what each block's output still reveals of the answers, read by the model's or the original's head.

Two readings, neither of which trains anything. The logit lens gives a block's output to the model's own final norm and
head. The unlearning depth score (UDS) puts it into the original model at the same place and lets that one go on: if the
original then still says the answer, the knowledge was there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from alter.attacks.base import Bench, Impossible, Item, interval
from alter.core import Array, progress
from alter.inference import decided, evaluating, virtual_tokens
from alter.storage import Record

ROWS_AT_ONCE = 16
"""Rows in one pass."""
KNOWN_BY_A_BLOCK = 0.05
"""Fall of the log-probability, in nats a token, above which a block counts as one that holds the knowledge (UDS' tau)."""


def decoder_blocks(model: Any) -> nn.ModuleList:
    """Return the model's blocks, in order.

    Raises:
        Impossible: it has no list of them.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    lists = [module for module in decoder.children() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise Impossible(
            f"{type(base).__name__} has no list of blocks, so nothing can be read by depth: leave lens and uds out of "
            "`attacks`."
        )
    return max(lists, key=len)


@contextmanager
def _kept_outputs(model: Any, blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Inside the block, the list holds each block's last output at the rows' own tokens, [B, T, D]."""
    before = virtual_tokens(model)
    kept: list[Tensor] = [torch.empty(0)] * len(blocks)

    def keep(depth: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            kept[depth] = (output[0] if isinstance(output, tuple) else output)[:, before:]

        return hook

    handles = [block.register_forward_hook(keep(depth)) for depth, block in enumerate(blocks)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaced(model: Any, block: nn.Module, states: Tensor, where: Tensor) -> Iterator[None]:
    """Inside the block, the output of the model's `block` is `states` [B, T, D] at the places `where` [B, T] of the rows' own tokens."""
    before = virtual_tokens(model)

    def hook(_: Any, __: Any, output: Any) -> Any:
        own = output[0] if isinstance(output, tuple) else output
        new = torch.cat([own[:, :before], torch.where(where[..., None], states.to(own), own[:, before:])], dim=1)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _batches(items: Sequence[Item], pad: int, device: Any, label: str) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield numbers of items, rising in length, their ids [B, T] and attention mask, padded on the right."""
    order = sorted(range(len(items)), key=lambda i: len(items[i].ids))
    batches = [order[start : start + ROWS_AT_ONCE] for start in range(0, len(order), ROWS_AT_ONCE)]
    for batch in progress(batches, total=len(batches), label=label):
        width = max(len(items[i].ids) for i in batch)
        ids = torch.full((len(batch), width), pad, device=device)
        mask = torch.zeros_like(ids)
        for k, i in enumerate(batch):
            ids[k, : len(items[i].ids)] = torch.tensor(items[i].ids, device=device)
            mask[k, : len(items[i].ids)] = 1
        yield batch, ids, mask


def _generating(items: Sequence[Item], shape: torch.Size, device: Any) -> Tensor:
    """Return the places [B, T] whose output generates a token of the answer: one before each."""
    where = torch.zeros(shape, dtype=torch.bool, device=device)
    for k, item in enumerate(items):
        where[k, item.start - 1 : len(item.ids) - 1] = True
    return where


def _given(model: Any, ids: Tensor, mask: Tensor, items: Sequence[Item]) -> dict[str, Tensor]:
    """Return a forward pass's arguments, with a guard's decision on the prompts, made before states are replaced."""
    return {"input_ids": ids, "attention_mask": mask, **decided(model, ids, mask, [item.start for item in items])}


def _answer_logprob(model: Any, given: dict[str, Tensor], where: Tensor) -> Array:
    """Return the mean log-probability of each row's answer, per token, in nats: [B], float64."""
    ids = given["input_ids"]
    logits = model(**given, use_cache=False).logits[:, virtual_tokens(model) :]
    rows, places = where.nonzero(as_tuple=True)
    picked = logits[rows, places].float()
    logp = picked.gather(1, ids[rows, places + 1, None])[:, 0] - picked.logsumexp(dim=1)
    total = torch.zeros(len(ids), dtype=torch.float64, device=ids.device).index_add(0, rows, logp.double())
    found: Array = (total / where.sum(dim=1)).cpu().numpy()
    return found


def lens_probabilities(model: Any, items: Sequence[Item], pad: int, label: str = "lens") -> Array:
    """Return [rows, blocks]: the probability of each row's answer, per token, that the model's own head reads at a block.

    The head is all that follows the last block, with what an adapter adds to it. Answers are teacher-forced, and the
    probability is the geometric mean over the tokens.
    """
    blocks = decoder_blocks(model)
    found = np.zeros((len(items), len(blocks)))
    with evaluating(model):
        for batch, ids, mask in _batches(items, pad, model.device, label):
            where = _generating([items[i] for i in batch], ids.shape, ids.device)
            given = _given(model, ids, mask, [items[i] for i in batch])
            with _kept_outputs(model, blocks) as kept:
                model(**given, use_cache=False)
            for depth, states in enumerate(list(kept)):
                with _replaced(model, blocks[-1], states, where):
                    found[batch, depth] = np.exp(_answer_logprob(model, given, where))
    return found


def falls(original: Any, source: Any, items: Sequence[Item], pad: int, label: str = "uds") -> Array:
    """Return [rows, blocks]: how far the original's log-probability of an answer falls with a block's output of `source`.

    In nats a token, teacher-forced. The output is put in at the places that generate the answer's tokens.

    Raises:
        Impossible: the two models differ in their number of blocks or in their width.
    """
    blocks, others = decoder_blocks(original), decoder_blocks(source)
    widths = [model.config.get_text_config().hidden_size for model in (original, source)]
    if len(blocks) != len(others) or widths[0] != widths[1]:
        raise Impossible(
            f"UDS puts states of one model into the other, but they have {len(blocks)} and {len(others)} blocks of width "
            f"{widths[0]} and {widths[1]}: leave uds out of `attacks`, or give models of one architecture."
        )
    found = np.zeros((len(items), len(blocks)))
    with evaluating(original), evaluating(source):
        for batch, ids, mask in _batches(items, pad, original.device, label):
            where = _generating([items[i] for i in batch], ids.shape, ids.device)
            own = [items[i] for i in batch]
            with _kept_outputs(source, others) as kept:
                source(**_given(source, ids, mask, own), use_cache=False)
            given = _given(original, ids, mask, own)
            plain = _answer_logprob(original, given, where)
            for depth, states in enumerate(list(kept)):
                with _replaced(original, blocks[depth], states, where):
                    found[batch, depth] = plain - _answer_logprob(original, given, where)
    return found


def depth_scores(retrained: Array, unlearned: Array, threshold: float = KNOWN_BY_A_BLOCK) -> Array:
    """Return the unlearning depth score [rows]: sum of d1 clip(d2 / d1, 0, 1) over sum of d1, over blocks with d1 > threshold.

    1: at every block that holds the knowledge as little is left as in the retrained model; 0: all is left. NaN for a row
    that no block holds.

    Args:
        retrained: d1 [rows, blocks], falls with the retrained model's states.
        unlearned: d2, likewise with the unlearned model's.
    """
    holds = retrained > threshold
    lost = np.where(holds, np.clip(unlearned, 0, np.where(holds, retrained, 1)), 0).sum(axis=1)
    total = np.where(holds, retrained, 0).sum(axis=1)
    scores: Array = np.divide(lost, total, out=np.full(len(total), np.nan), where=total > 0)
    return scores


def lens(bench: Bench) -> list[Record]:
    """Read the answers from every block's output with the model's own head (logit lens): one record per depth.

    Depth d is the output of the d-th block, so the last depth is what the model says.

    Raises:
        Impossible: the model has no list of blocks.
    """
    model, tokenizer = bench.shared()
    items = bench.items(bench.measured)
    found = lens_probabilities(model, items, tokenizer.pad_token_id, "lens: reading")
    rows = [item.index for item in items]
    return [
        bench.record("attack_lens", found[:, depth], attack="lens", depth=depth + 1, rows=rows)
        for depth in range(found.shape[1])
    ]


def unlearning_depth(benches: dict[str, Bench]) -> Record:
    """Measure a model's unlearning depth score, averaged over rows: how deep it forgot, beside a retrained model.

    Lee et al. 2026, arXiv:2605.24614: hidden states are patched into the original model block by block (`falls`,
    `depth_scores`). Readings: the published score looks at annotated entities, behind what the answer says before them; here
    all tokens of the answer count. And the last block's own output is put in, where the authors' code puts in what the final
    norm makes of it, which is then normed again. Rows whose answer the retrained model holds as well as the original have no
    block to look at; they are left out and counted.

    Args:
        benches: of "original", "retrained" and "unlearned".

    Raises:
        Impossible: models of different shapes, or no row with a block that holds its answer.
    """
    bench = benches["unlearned"]
    model, tokenizer = benches["original"].shared()
    items = benches["original"].items(bench.measured)
    found = {}
    for name in ("retrained", "unlearned"):
        source, other = benches[name].shared()
        if other.get_vocab() != tokenizer.get_vocab():
            raise Impossible(
                f"UDS needs models of one vocabulary; the {name} model has another: leave uds out of `attacks`."
            )
        found[name] = falls(model, source, items, tokenizer.pad_token_id, f"uds: {name}")
        benches[name].model = None
    scores = depth_scores(found["retrained"], found["unlearned"])
    told = np.isfinite(scores)
    if not told.any():
        raise Impossible(
            "UDS has nothing to look at: no block of the original knows more of the answers than the retrained model's. Is "
            "`retrained` really another model, and does `original` know the rows?"
        )
    fall = {name: [float(x) for x in values.mean(axis=0)] for name, values in found.items()}
    rows = [item.index for item, ok in zip(items, told, strict=True) if ok]
    ends = {name: [interval(block) for block in values.T] for name, values in found.items()}
    return bench.record(
        "attack_uds", scores[told], attack="uds", falls=fall, fall_intervals=ends, rows=rows,
        left_out=int((~told).sum()),
    )  # fmt: skip
