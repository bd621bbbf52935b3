"""The engine: one thread owns the model and answers queued requests, batch by batch.

Requests that wait when the model is free are answered together: one decoding loop in which each row has its own length,
temperature, stop texts and random numbers, so that an answer depends on who else asked by rounding in 16 bits at most. Rows that
have ended leave the batch every few tokens. Routing is active as in any other forward pass.
"""

from __future__ import annotations

import gc
import queue
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from alter.core import UserError, as_input, cache_of
from alter.inference import (
    SEGMENT,
    can_drop_rows,
    context_length,
    contiguous_head,
    evaluating,
    left_padded,
    prompted,
    stop_ids,
    virtual_tokens,
)
from alter.serving.jobs import Job, Scored
from alter.serving.text import settled

NOT_FINITE = "The model's logits are not finite; serve it with `alter serve --dtype float32`."


def scored(logp: Tensor, token: int, count: int) -> Scored:
    """Return the token and the `count` likeliest ones under log-probabilities [V]."""
    values, index = logp.topk(min(count, len(logp)))
    return Scored(token, logp[token].item(), tuple(zip(index.tolist(), values.tolist(), strict=True)))


def draw(scores: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Sample a token [1] from logits [V] at a temperature above 0, among the likeliest that hold `top_p`."""
    wide = scores.double().cpu()
    # from the largest, so that no temperature is too small: what overflows has probability 0
    p = torch.softmax((wide - wide.max()) / temperature, dim=-1)
    if top_p < 1:
        ordered, index = p.sort(descending=True)
        # the likeliest token always stays
        ordered[1:][ordered.cumsum(0)[:-1] >= top_p] = 0.0
        p = torch.zeros_like(p).scatter(0, index, ordered)
    # in the vocabulary's order: where neighbours in rank change places by rounding, each keeps its own random number
    return torch.multinomial(p, 1, generator=generator)


class _Rows(LogitsProcessor):
    """Logits processor that leaves each row one token: the likeliest, or one sampled with the row's own generator."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)
        self.generators = [torch.Generator().manual_seed(job.seed) for job in jobs]

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with some of the rows."""
        self.jobs = [self.jobs[row] for row in rows]
        self.generators = [self.generators[row] for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = scores.argmax(dim=-1)
        finite = scores.amax(dim=-1).isfinite().tolist()
        for row, job in enumerate(self.jobs):
            if job.finish is not None:
                continue
            if not finite[row]:
                job.close("error", NOT_FINITE)
                continue
            if job.temperature > 0:
                chosen[row] = draw(scores[row], job.temperature, job.top_p, self.generators[row]).to(chosen.device)
            if job.logprobs is not None:
                logp = scores[row].float().log_softmax(-1)
                job.scored.append(scored(logp, int(chosen[row]), job.logprobs))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


class _Watch(StoppingCriteria):
    """Stopping criterion that takes every row's new token, sends its text, and tells which rows have ended."""

    def __init__(self, rows: _Rows, tokenizer: Any, stop: set[int]) -> None:
        self.rows, self.tokenizer, self.stop = rows, tokenizer, stop

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for job, token in zip(self.rows.jobs, input_ids[:, -1].tolist(), strict=True):
            if not job.over():
                self._take(job, token)
        return torch.tensor([job.finish is not None for job in self.rows.jobs], device=input_ids.device)

    def _take(self, job: Job, token: int) -> None:
        if token in self.stop:
            job.close("stop")
            return
        job.tokens.append(token)
        job.text = self.tokenizer.decode(job.tokens, skip_special_tokens=True)
        found = [place for place in (job.text.find(text) for text in job.stop) if place >= 0]
        if found:
            self._cut(job, min(found))
            job.close("stop")
        elif len(job.tokens) >= job.max_tokens:
            job.close("length")
        else:
            job.send(self._certain(job))

    def _cut(self, job: Job, end: int) -> None:
        """Cut the text at a stop text, and drop the tokens that add nothing before it."""
        job.text = job.text[:end]
        if job.logprobs is not None:
            # a character that is not finished looks as long as a whole one
            numbers = range(job.certain, len(job.tokens))
            texts = (self.tokenizer.decode(job.tokens[:n], skip_special_tokens=True) for n in numbers)
            enough = (n for n, text in zip(numbers, texts, strict=True) if text.startswith(job.text))
            del job.scored[next(enough, len(job.tokens)) :]

    def _certain(self, job: Job) -> str:
        """Return the part of the text that no later token can change or take back."""
        text = settled(self.tokenizer, job.tokens, job.text)
        held = 0
        for stop in job.stop:
            held = max([held, *(n for n in range(1, len(stop)) if text.endswith(stop[:n]))])
        if not held and text == job.text:
            job.certain = len(job.scored)
        text = text[: len(text) - held]
        return text.strip() if job.strip else text


def check_prompt(ids: Sequence[int], new: int, vocabulary: int, context: int | None) -> None:
    """Refuse a prompt that a model cannot continue by `new` tokens.

    Args:
        ids: its tokens.
        new: tokens of the answer.
        vocabulary: number of tokens that the model knows.
        context: tokens that it can read; None: no limit.

    Raises:
        UserError: it is empty, holds tokens that the model does not know, or does not fit into the context with its answer.
    """
    if not ids:
        raise UserError("The prompt is empty: there is nothing to continue.")
    unknown = next((token for token in ids if not 0 <= token < vocabulary), None)
    if unknown is not None:
        raise UserError(
            f"The prompt holds token {unknown}, which the model does not know: its tokens are 0 to {vocabulary - 1}."
        )
    if context is not None and len(ids) + new > context:
        raise UserError(
            f"The prompt has {len(ids)} tokens; with {new} new ones it exceeds the model's context of {context}. Ask for at most "
            f"{max(context - len(ids), 0)} (`max_tokens`), or shorten it."
        )


def check_count(count: int, most: int) -> None:
    """Refuse a request for more answers than may ever wait.

    Raises:
        UserError: there are more than `most`.
    """
    if count > most:
        raise UserError(f"The request asks for {count} answers at once; at most {most} may wait (`max_waiting`).")


class Engine:
    """The model, its queue, and the thread that serves it.

    Args:
        model, tokenizer: any causal language model, with or without an adapter, or an inference form.
        max_batch: answers that are made together.
        max_waiting: answers that may wait.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_batch: int = 16, max_waiting: int = 256) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_batch = max_batch
        self.waiting: queue.Queue[Job | None] = queue.Queue(max_waiting)
        self.context = context_length(model)
        self.stop = stop_ids(model, tokenizer)
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        self.entry = threading.Lock()
        self.thread = threading.Thread(target=self._work, daemon=True, name="alter-engine")
        self.thread.start()

    def check(self, job: Job) -> None:
        """Refuse a job that the model cannot run.

        Raises:
            UserError: see `check_prompt`; or the probabilities of a prompt are asked of a guard that acts on answers alone: beside the
                last token stand those of the untouched answer's first.
        """
        check_prompt(job.ids, job.max_tokens, self.vocabulary, self.context)
        if job.echo and job.logprobs is not None and getattr(self.model, "answers_alone", False):
            raise UserError(
                "`echo` with `logprobs` is refused: the guard that is served acts on answers alone, so the probabilities of a prompt's "
                "tokens would be those of the model behind it. Leave one of the two out."
            )

    def submit(self, *jobs: Job) -> None:
        """Queue jobs: all of them, or none.

        Raises:
            UserError: see `check` and `check_count`.
            queue.Full: the queue is full at present.
        """
        for job in jobs:
            self.check(job)
        check_count(len(jobs), self.waiting.maxsize)
        # the engine only takes away, so what has room now has room below
        with self.entry:
            if self.waiting.qsize() + len(jobs) > self.waiting.maxsize:
                raise queue.Full
            for job in jobs:
                self.waiting.put_nowait(job)

    def close(self) -> None:
        """Finish queued jobs, then end the thread."""
        self.waiting.put(None)
        self.thread.join()

    def _work(self) -> None:
        while True:
            first = self.waiting.get()
            if first is None:
                return
            batch, last = [first], False
            while len(batch) < self.max_batch:
                try:
                    job = self.waiting.get_nowait()
                except queue.Empty:
                    break
                if job is None:
                    last = True
                    break
                batch.append(job)
            self._answer(batch)
            # a batch leaves cycles that hold its keys and values; without this, memory comes back late
            gc.collect()
            if last:
                return

    def _answer(self, batch: list[Job]) -> None:
        """Answer a batch; if it fails, answer each open row alone, so that one row does not fail the others."""
        going = batch
        try:
            going = [job for job in batch if not job.over()]
            if going:
                self._decode(going)
        except Exception as error:  # whatever fails in a row or in the model, the thread lives and clients are told
            going = [job for job in going if job.finish is None]
            for job in going:
                if len(batch) > 1:
                    job.restart()
                    self._answer([job])
                else:
                    job.close(
                        "error", str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                    )

    def _decode(self, batch: list[Job]) -> None:
        for job in batch:
            if job.echo and job.logprobs is not None:
                job.prompt_scored = self._score(job.ids, job.logprobs)
            if job.max_tokens == 0:
                job.close("length")
        batch = [job for job in batch if job.finish is None]
        own = self._settings()
        # a least length looks at the whole answer, a static cache has room for one call: those run in one piece
        alone = prompted(self.model)
        whole = alone or own.min_new_tokens is not None or own.cache_implementation is not None
        longest = max((job.max_tokens for job in batch), default=0)
        if len(batch) > 1 and (alone or (whole and not self._fit(batch, longest))):
            for job in batch:
                self._answer([job])
        elif batch:
            with evaluating(self.model):
                self._continue(batch, whole)

    def _settings(self) -> Any:
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return inner.generation_config

    def _fit(self, jobs: Sequence[Job], steps: int) -> bool:
        """Tell whether every row stays inside the context for so many new tokens."""
        return self.context is None or all(len(job.ids) + steps <= self.context for job in jobs)

    def _continue(self, jobs: list[Job], whole: bool) -> None:
        """Decode until all rows have ended; unless `whole`, those that have ended leave after every `SEGMENT` tokens."""
        device = next(self.model.parameters()).device
        pad = self.tokenizer.pad_token_id
        ids, mask = left_padded([job.ids for job in jobs], pad, device)
        rows = _Rows(jobs)
        watch = _Watch(rows, self.tokenizer, self.stop)
        done = 0
        carried: dict[str, Any] = {}
        while True:
            left = [job.max_tokens - done for job in rows.jobs if job.finish is None]
            # no further than the first row that must end, so that none passes the context
            steps = max(left) if whole else min(*left, SEGMENT)
            if not self._fit(rows.jobs, done + steps):
                break
            with contiguous_head(self.model):
                out = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=steps,
                    do_sample=False,
                    num_beams=1,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    use_cache=True,
                    pad_token_id=pad,
                    return_dict_in_generate=True,
                    logits_processor=LogitsProcessorList([rows]),
                    stopping_criteria=StoppingCriteriaList([watch]),
                    **carried,
                )
            new = out.sequences.shape[1] - ids.shape[1]
            done += new
            going = [row for row, job in enumerate(rows.jobs) if job.finish is None]
            if not going:
                return
            ids, mask = out.sequences, torch.cat([mask, mask.new_ones(len(mask), new)], dim=1)
            cache = cache_of(out)
            carried = as_input(cache)
            if len(going) < len(rows.jobs) and (cache is None or can_drop_rows(cache)):
                kept = torch.tensor(going, device=device)
                if cache is not None:
                    cache.batch_select_indices(kept)
                ids, mask = ids[kept], mask[kept]
                rows.keep(going)
        # rows that have ended cannot leave this kind of cache, and would pass the context beside the longer ones
        for job in rows.jobs:
            if job.finish is None:
                job.restart()
                self._answer([job])

    def _score(self, ids: list[int], count: int) -> list[Scored]:
        """Compute the probabilities of a prompt's tokens given their prefixes, in one forward pass.

        Raises:
            UserError: the logits are not finite.
        """
        with evaluating(self.model):
            row = torch.tensor([ids], device=next(self.model.parameters()).device)
            logits = self.model(input_ids=row, use_cache=False).logits[0, virtual_tokens(self.model) :]
            if not logits.amax(dim=-1).isfinite().all():
                raise UserError(NOT_FINITE)
            found = [Scored(ids[0])]
            for place in range(1, len(ids)):
                found.append(scored(logits[place - 1].float().log_softmax(-1), ids[place], count))
            return found
