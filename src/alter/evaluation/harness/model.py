"""A model in memory as lm-evaluation-harness asks it: batches by tokens, fp32, nothing cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from alter.core.console import progress
from alter.core.errors import UserError
from alter.models.scoring import MAX_LOGITS, decided


def rows_of_requests(requests: Sequence[Any]) -> dict[tuple[int, ...], list[int]]:
    """Return the places of the requests by their tokens without the last: such requests share a row of a batch."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for i, (_, context, continuation) in enumerate(requests):
        rows.setdefault((*context, *continuation[:-1]), []).append(i)
    return rows


def check_room(prompt: str, length: int, new: int, context: int) -> None:
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
        "(--num-fewshot), or evaluate a model with a longer context."
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


def harness_model(
    model: Any, tokenizer: Any, *, batch_tokens: int | None = None, batch_size: int = 64, label: str = "answering"
) -> Any:
    """Return the harness's model (`HFLM`) around one that is loaded, with an ALTER adapter's routing active.

    The harness pads on the right and passes no attention mask. That is safe for causal models, routed ones too, since
    the route of a token depends on the tokens before it only. Unlike in the harness:

    * Batches hold `batch_tokens` padded tokens instead of a fixed number of rows, longest first.
    * Log-probabilities are fp32; the harness keeps the model's dtype, whose rounding can make letters tie.
    * A prompt that does not fit into the context is refused; the harness cuts off its beginning.
    * NaN is refused; the harness would take the first choice.

    Args:
        model, tokenizer: as in `alter.models.scoring.score`.
        batch_tokens: padded tokens in a batch; None: 16384, or 4096 on a CPU.
        batch_size: prompts in a generation batch.
        label: name on the progress bar.
    """
    from lm_eval.models.huggingface import HFLM

    class HarnessModel(HFLM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            rows = rows_of_requests(requests)
            self.asked = {row: len(requests[members[0]][1]) for row, members in rows.items()}
            order = sorted(rows, key=len, reverse=True)
            if order:
                check_room(self.tokenizer.decode(order[0]), len(order[0]), 0, self.max_length)
            batches = token_batches(order, tokens)
            answers: list[Any] = [None] * len(requests)
            for batch in progress(batches, total=len(batches), label=label):
                members = [i for row in batch for i in rows[row]]
                self.batch_size_per_gpu = len(batch)
                part = super()._loglikelihood_tokens([requests[i] for i in members], disable_tqdm=True)
                for i, answer in zip(members, part, strict=True):
                    answers[i] = answer
            self.batch_size_per_gpu = batch_size
            if any(math.isnan(logprob) for logprob, _ in answers):
                raise UserError(
                    f"The model's logits are NaN; its weights or its number format ({self.model.dtype}) are broken. "
                    "Try --dtype float32, or an earlier checkpoint."
                )
            return answers

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            if not getattr(self.model, "decides", False):
                return self.model(input_ids=inps, use_cache=False).logits
            # a guard that looks at prompts must know where they end, and what is padding
            found = [
                max((row for row in self.asked if tuple(ids[: len(row)]) == row), key=len) for ids in inps.tolist()
            ]
            lengths = torch.tensor([len(row) for row in found], device=inps.device)
            mask = (torch.arange(inps.shape[1], device=inps.device) < lengths[:, None]).long()
            told = decided(self.model, inps, mask, [self.asked[row] for row in found])
            return self.model(input_ids=inps, attention_mask=mask, use_cache=False, **told).logits

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            for prompt, settings in (request.args for request in requests):
                length, new = len(self.tok_encode(prompt)), int(settings.get("max_gen_toks", self.max_gen_toks))
                check_room(prompt, length, new, self.max_length)
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

    wrapped = HarnessModel(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    if batch_tokens is None:
        batch_tokens = 4096 if wrapped.device.type == "cpu" else 16384
    tokens = max(1, min(batch_tokens, MAX_LOGITS // model.config.get_text_config().vocab_size))
    return wrapped
