"""Score rows with a model: log-probabilities of labelled tokens.

One forward pass per row serves every likelihood metric of `alter.metrics`. Batches are spread over the ranks of a launch
(`alter.core.processes`), and every rank gets the results of all rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from alter.core import Array, UserError, processes
from alter.data import Collator, Encoded, batches_by_length
from alter.inference.passes import (
    check_embedded,
    context_length,
    device_of,
    evaluating,
    inner_model,
    shown,
    text_config,
    virtual_tokens,
)
from alter.inference.sharing import SharedBatch, shared_batches, shared_logits, shared_logits_beside, shares

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

MAX_LOGITS = 2**28
"""Most logits in one batch (1 GiB in fp32): with a large vocabulary it shrinks the batch."""
CHUNK_LOGITS = 2**23
"""Most logits that are turned into fp32 at a time."""


@dataclass
class Scores:
    """Per labelled token, for a list of rows in the order given; every list is ragged: one 1-D array per row.

    Attributes:
        logprob: natural log of the probability of the label, float32.
        correct: whether the label is the likeliest token, bool.
        mean, var: mean and variance of log p under p at each position, float32; None unless asked for.
    """

    logprob: list[npt.NDArray[np.float32]]
    correct: list[npt.NDArray[np.bool_]]
    mean: list[npt.NDArray[np.float32]] | None = None
    var: list[npt.NDArray[np.float32]] | None = None

    def __getitem__(self, rows: slice) -> Scores:
        """Return the scores of a slice of the rows."""
        mean = None if self.mean is None else self.mean[rows]
        var = None if self.var is None else self.var[rows]
        return Scores(self.logprob[rows], self.correct[rows], mean, var)


def _batch_tokens(chosen: int | None, device: torch.device) -> int:
    """Return the padded tokens of a batch: on a CPU few enough that a small model's activations stay in its caches."""
    return chosen or (1024 if device.type == "cpu" else 16384)


def check_rows(model: nn.Module, encoded: Sequence[Encoded], names: Sequence[str] | None = None) -> None:
    """Check rows before any pass, as `score` would.

    Args:
        names: what errors call each row; by default "Row 0", "Row 1", ...

    Raises:
        UserError: a row has nothing to score, is longer than the model's context, or has a token without an embedding.
    """
    context = context_length(model)
    for i, row in enumerate(encoded):
        name = f"Row {i}" if names is None else names[i]
        if len(row.labels) != len(row.input_ids):
            raise ValueError(f"row {i} has {len(row.input_ids)} tokens but {len(row.labels)} labels")
        if not any(label != -100 for label in row.labels[1:]):
            raise UserError(
                f"{name} has no labelled token to score (the first token has nothing before it and cannot be): "
                "its answer is empty or was cut off; remove the row or raise the maximum length."
            )
        if context is not None and len(row.input_ids) > context:
            raise UserError(
                f"{name} has {len(row.input_ids)} tokens, the model's context is {context}: "
                "shorten the row or evaluate a model with a longer context."
            )
        check_embedded(model, row.input_ids, name)


def score(
    model: nn.Module,
    encoded: Sequence[Encoded],
    *,
    pad_token_id: int,
    batch_tokens: int | None = None,
    moments: bool = False,
    compat: bool = False,
    progress: bool = True,
    label: str = "scoring",
    around: Callable[[Sequence[int], int], AbstractContextManager[None]] | None = None,
) -> Scores:
    """Return log-probability and correctness of every labelled token, with one forward pass per row.

    Rows are sorted by length and packed into batches. Where many begin alike (one question with many answers), a batch holds
    each shared token once (see `alter.inference.sharing`). Only positions that
    predict a label are taken through the head (where the model supports it) and turned into fp32, in chunks. The model
    is called as usual, so adapters with hooks take part; it is in eval mode meanwhile, without gradients.

    Args:
        model: a causal language model of transformers, or a PeftModel around one.
        encoded: rows; tokens with label -100 are context. A label at the first position is not scored.
        pad_token_id: fills rows up on the right; masked by length, so a pad id inside a row is attended to.
        batch_tokens: padded tokens in a batch; None: 16384, or 1024 on a CPU, whose caches larger ones overflow. A
            longer row is a batch of its own.
        moments: also compute mean and variance of log p under p (needed for min-k++).
        compat: as OpenUnlearning, hide every token equal to `pad_token_id` from attention, inside rows too.
        progress: show a progress bar on stderr.
        label: name on the progress bar.
        around: a block that goes around the pass of each batch, given its rows' numbers and the length to which they are padded.

    Raises:
        UserError: a row has nothing to score, is longer than the model's context, or gets NaN logits.
    """
    check_rows(model, encoded)
    tokens = _tokens_at_once(model, batch_tokens)
    shared = None if compat or around is not None else _shared_batches(model, encoded, tokens)
    collate = Collator(pad_token_id)

    def run(batch: list[int]) -> list[npt.NDArray[Any]]:
        inputs = collate([{"input_ids": encoded[i].input_ids, "labels": encoded[i].labels} for i in batch])
        if compat:
            inputs["attention_mask"] = (inputs["input_ids"] != pad_token_id).long()
        with nullcontext() if around is None else around(batch, inputs["input_ids"].shape[1]):
            return _scores_of(model, inputs, batch, moments)

    if shared is not None:
        found = _by_row(
            model, encoded, shared, lambda batch: _shared_scores(model, encoded, batch, moments), progress, label
        )
    else:
        batches = batches_by_length([len(row.input_ids) for row in encoded], tokens)
        found = _by_row(model, encoded, batches, run, progress, label, apart=around is None)
    return _scores(found, moments)


def score_beside_base(
    model: Any,
    encoded: Sequence[Encoded],
    *,
    pad_token_id: int,
    batch_tokens: int | None = None,
    moments: bool = False,
    progress: bool = True,
    label: str = "scoring",
) -> tuple[Scores, Scores]:
    """Return the scores of the untouched model inside an adapted one, and of the adapted one, as `score` gives them.

    Where rows share tokens, the pass of the untouched model that tells a routed adapter's routes serves for both.

    Args:
        model: a PeftModel.
        encoded, pad_token_id, batch_tokens, moments, progress, label: as in `score`.

    Raises:
        UserError: as `score`.
    """
    check_rows(model, encoded)
    shared = _shared_batches(model, encoded, _tokens_at_once(model, batch_tokens))
    if shared is None:
        settings: dict[str, Any] = dict(
            pad_token_id=pad_token_id, batch_tokens=batch_tokens, moments=moments, progress=progress, label=label
        )
        with model.disable_adapter():
            base = score(model, encoded, **settings)
        return base, score(model, encoded, **settings)

    def run(batch: SharedBatch) -> list[npt.NDArray[Any]]:
        return _shared_scores(model, encoded, batch, moments, beside=True)

    columns = _by_row(model, encoded, shared, run, progress, label)
    half = len(columns) // 2
    return _scores(columns[:half], moments), _scores(columns[half:], moments)


def _tokens_at_once(model: nn.Module, chosen: int | None) -> int:
    return max(1, min(_batch_tokens(chosen, device_of(model)), MAX_LOGITS // int(text_config(model).vocab_size)))


Batch = TypeVar("Batch", list[int], SharedBatch)


def _by_row(
    model: nn.Module,
    encoded: Sequence[Encoded],
    batches: list[Batch],
    run: Callable[[Batch], list[npt.NDArray[Any]]],
    progress: bool,
    label: str,
    *,
    apart: bool = True,
) -> list[list[npt.NDArray[Any]]]:
    """Return what `run` finds for the labelled tokens of batches, one array for each of its columns and each row.

    `apart`: it has no effect but what it finds.
    """
    out: list[list[npt.NDArray[Any]]] = []
    with evaluating(model):
        found = zip(batches, processes.spread(batches, run, model, apart=apart), strict=True)
        for batch, parts in shown(found, len(batches), label, progress):
            rows = batch.rows if isinstance(batch, SharedBatch) else batch
            counts = [sum(label != -100 for label in encoded[i].labels[1:]) for i in rows]
            out = out or [[np.empty(0)] * len(encoded) for _ in parts]
            for values, part in zip(out, parts, strict=True):
                for i, piece in zip(rows, np.split(part, np.cumsum(counts)[:-1]), strict=True):
                    values[i] = piece
    return out


def _scores(columns: list[list[npt.NDArray[Any]]], moments: bool) -> Scores:
    out = columns or [[], [], [], []]
    return Scores(out[0], out[1], *(out[2:4] if moments else (None, None)))


def _shared_batches(model: nn.Module, encoded: Sequence[Encoded], tokens: int) -> list[SharedBatch] | None:
    """Return batches in which tokens that rows share stand once; None where that saves little, or the model computes none."""
    batches = shared_batches(encoded, tokens)
    if batches is None:
        return None
    with evaluating(model):
        return batches if shares(model, inner_model(model), batches) else None


def _shared_scores(
    model: nn.Module, encoded: Sequence[Encoded], batch: SharedBatch, moments: bool, *, beside: bool = False
) -> list[npt.NDArray[Any]]:
    """Return what `_scores_of` does for the rows of a batch; with `beside`, of the untouched model before the adapted one.

    Raises:
        UserError: a row, called by its number, gets NaN logits.
    """
    device = device_of(model)
    predicting, targets, counts = batch.scored(encoded)
    wanted, columns = predicting.unique(return_inverse=True)
    columns, targets = columns.to(device), targets.to(device)
    compute = shared_logits_beside if beside else shared_logits
    found = compute(model, inner_model(model), batch.to(device), wanted.to(device))
    parts: list[npt.NDArray[Any]] = []
    for logits in found if isinstance(found, tuple) else (found,):
        own = _statistics(logits[None], torch.zeros_like(columns), columns, targets, moments)
        _check_numbers(own[0], [i for i, n in zip(batch.rows, counts, strict=True) for _ in range(n)], logits)
        parts += own
    return parts


def _check_numbers(logprob: Array, rows: Sequence[int], logits: torch.Tensor) -> None:
    bad = np.isnan(logprob).nonzero()[0]
    if len(bad):
        raise UserError(
            f"Row {rows[bad[0]]}: the model's logits are NaN; its weights or its number format ({logits.dtype}) are "
            "broken. Try `dtype` float32, or an earlier checkpoint."
        )


def decided(model: Any, ids: torch.Tensor, mask: torch.Tensor, prompts: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return the extra arguments of a forward pass over rows [B, T] with answers: a guard's decision on their prompts.

    Args:
        model: any; only a guard that `decides` gets arguments (`alter.models.guards.Guard`).
        ids, mask: the rows, and the attention mask.
        prompts: how many of each row's tokens are the prompt; a row with none, or one only, is asked as a whole.
    """
    if not getattr(model, "decides", False) or not model.enabled:
        return {}
    with torch.no_grad():
        return {"decision": model.decide(ids, mask, [n if n > 1 else ids.shape[1] for n in prompts])}


def _prompt_lengths(labels: torch.Tensor) -> list[int]:
    """Count the tokens before the first label of each row [B, T]."""
    return (labels != -100).int().argmax(dim=1).tolist()


def logits_at(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, prompts: Sequence[int]
) -> torch.Tensor:
    """Return the logits [B, K, V] at K positions; the head runs on these alone, where the model supports it."""
    places = positions.to(ids.device) + virtual_tokens(model)
    sliced = "logits_to_keep" in inspect.signature(inner_model(model).forward).parameters
    keep = {"logits_to_keep": places} if sliced else {}
    logits: torch.Tensor = model(
        input_ids=ids, attention_mask=mask, use_cache=False, **keep, **decided(model, ids, mask, prompts)
    ).logits
    return logits if sliced else logits[:, places]


def _scores_of(
    model: Any, inputs: dict[str, torch.Tensor], numbers: Sequence[int], moments: bool
) -> list[npt.NDArray[Any]]:
    """Return what `_statistics` gives for the labelled tokens of a batch, one row after the other.

    Raises:
        UserError: a row, called by its number, gets NaN logits.
    """
    device = device_of(model)
    labels = inputs["labels"]
    predicts = labels[:, 1:] != -100
    positions = predicts.any(dim=0).nonzero()[:, 0]
    ids, mask = inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
    logits = logits_at(model, ids, mask, positions, _prompt_lengths(labels))
    rows, columns = predicts[:, positions].nonzero(as_tuple=True)
    targets = labels[:, 1:][:, positions][rows, columns]
    parts = _statistics(logits, rows.to(device), columns.to(device), targets.to(device), moments)
    _check_numbers(parts[0], [numbers[row] for row in rows.tolist()], logits)
    return parts


def _statistics(
    logits: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, targets: torch.Tensor, moments: bool
) -> list[npt.NDArray[Any]]:
    """Return log-probability, correctness (and mean and variance of log p) at the given places of [B, K, V] logits."""
    pieces: list[tuple[torch.Tensor, ...]] = []
    size = max(1, CHUNK_LOGITS // logits.shape[-1])
    for start in range(0, len(rows), size):
        chunk = slice(start, start + size)
        x = logits[rows[chunk], columns[chunk]].float()
        target = targets[chunk, None]
        piece: tuple[torch.Tensor, ...] = (
            x.gather(1, target)[:, 0] - x.logsumexp(dim=1),
            x.argmax(dim=1) == target[:, 0],
        )
        if moments:
            # a logit of -inf has weight 0; the clamp keeps 0 * inf from making it NaN
            logp = x.log_softmax(dim=1).clamp(min=-1e4)
            p = logp.exp()
            mean = (p * logp).sum(dim=1)
            piece += (mean, (p * (logp - mean[:, None]) ** 2).sum(dim=1))
        pieces.append(tuple(value.cpu() for value in piece))
    return [torch.cat(column).numpy() for column in zip(*pieces, strict=True)]
