"""The harness's own class for models (`HFLM`) with our batches and refusals; importing this needs lm-evaluation-harness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from alter.core import UserError, progress
from alter.inference import MAX_LOGITS, decided


def rows_of_requests(requests: Sequence[Any]) -> dict[tuple[int, ...], list[int]]:
    """Return the places of the requests by their tokens without the last: such requests share a row of a batch."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for i, (_, context, continuation) in enumerate(requests):
        rows.setdefault((*context, *continuation[:-1]), []).append(i)
    return rows


def check_context(prompt: str, length: int, new: int, context: int) -> None:
    """Refuse a prompt that does not fit into the model's context.

    Args:
        prompt: its text.
        length: its tokens.
        new: tokens that are to follow it.
        context: tokens that the model can take.

    Raises:
        UserError: says by how much.
    """
    if length + new <= context:
        return
    which = (
        f"with {new} new ones it exceeds the model's context of {context}"
        if new
        else f"the model's context is {context}"
    )
    raise UserError(
        f"A prompt has {length} tokens, {which}: it ends with {prompt[-80:]!r}. Leave it out, ask with fewer examples "
        "(`num_fewshot`), or evaluate a model with a longer context."
    )


def token_batches(order: Sequence[tuple[int, ...]], tokens: int) -> list[list[tuple[int, ...]]]:
    """Return rows, longest first, in batches of at most `tokens` padded tokens, at least one row each."""
    batches: list[list[tuple[int, ...]]] = []
    for row in order:
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0]) <= tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


class HarnessModel(HFLM):
    """See `harness_model`.

    Attributes:
        batch_tokens: padded tokens in a batch of log-likelihoods.
        batch_rows: prompts in a generation batch.
        label: name on the progress bar.
        asked: tokens of the prompt in each row that is being asked.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int | None, batch_rows: int, label: str) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_rows, softmax_dtype="float32")
        if batch_tokens is None:
            batch_tokens = 4096 if self.device.type == "cpu" else 16384
        self.batch_tokens = max(1, min(batch_tokens, MAX_LOGITS // model.config.get_text_config().vocab_size))
        self.batch_rows = batch_rows
        self.label = label
        self.asked: dict[tuple[int, ...], int] = {}

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
        rows = rows_of_requests(requests)
        self.asked = {row: len(requests[members[0]][1]) for row, members in rows.items()}
        order = sorted(rows, key=len, reverse=True)
        if order:
            check_context(self.tokenizer.decode(order[0]), len(order[0]), 0, self.max_length)
        batches = token_batches(order, self.batch_tokens)
        answers: list[Any] = [None] * len(requests)
        for batch in progress(batches, total=len(batches), label=self.label):
            members = [i for row in batch for i in rows[row]]
            self.batch_size_per_gpu = len(batch)
            part = super()._loglikelihood_tokens([requests[i] for i in members], disable_tqdm=True)
            for i, answer in zip(members, part, strict=True):
                answers[i] = answer
        self.batch_size_per_gpu = self.batch_rows
        if any(math.isnan(logprob) for logprob, _ in answers):
            raise UserError(
                f"The model's logits are NaN; its weights or its number format ({self.model.dtype}) are broken. "
                "Try `dtype` float32, or an earlier checkpoint."
            )
        return answers

    def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
        if not getattr(self.model, "decides", False):
            return self.model(input_ids=inps, use_cache=False).logits
        # a guard that looks at prompts must know where they end, and what is padding
        found = [max((row for row in self.asked if tuple(ids[: len(row)]) == row), key=len) for ids in inps.tolist()]
        lengths = torch.tensor([len(row) for row in found], device=inps.device)
        mask = (torch.arange(inps.shape[1], device=inps.device) < lengths[:, None]).long()
        told = decided(self.model, inps, mask, [self.asked[row] for row in found])
        return self.model(input_ids=inps, attention_mask=mask, use_cache=False, **told).logits

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        for prompt, settings in (request.args for request in requests):
            length, new = len(self.tok_encode(prompt)), int(settings.get("max_gen_toks", self.max_gen_toks))
            check_context(prompt, length, new, self.max_length)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)
