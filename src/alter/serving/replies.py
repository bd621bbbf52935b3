"""Answers in OpenAI's protocol, whole or streamed: one `Reply` per request, one engine job per choice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any

from alter.serving.engine import Engine
from alter.serving.jobs import Job, Scored
from alter.serving.protocol import Asked, Prompt, error_body
from alter.serving.settings import Serve
from alter.serving.text import UNFINISHED, added, is_special, token_texts


class Reply(ABC):
    """The answer to one request: one job for each choice, and its serialisation.

    Args:
        name: of the model.
        asked: the body.
        prompts: what is continued.
        engine: that the jobs go to.
        limits: settings of the server.
    """

    prefix: str
    whole: str
    part: str
    stripped = False

    def __init__(self, name: str, asked: Asked, prompts: Sequence[Prompt], engine: Engine, limits: Serve) -> None:
        self.asked, self.engine, self.prompts = asked, engine, list(prompts)
        self.common = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        self.pieces: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()
        self.told: list[int] = []
        self.places: list[int] = []
        self.jobs: list[Job] = []
        loop = asyncio.get_running_loop()
        seed = secrets.randbits(31) if asked.seed is None else asked.seed
        top, stops = asked.top(), asked.stops()
        for prompt in prompts:
            # by default the answer may fill the context
            room = limits.max_tokens if engine.context is None else max(engine.context - len(prompt), 1)
            most = min(limits.max_tokens, room if asked.limit is None else asked.limit)
            for choice in range(asked.n):
                index = len(self.jobs)

                def put(piece: str | None, index: int = index) -> None:
                    # a stopped server takes no more jobs
                    with contextlib.suppress(RuntimeError):
                        loop.call_soon_threadsafe(self.pieces.put_nowait, (index, piece))

                self.jobs.append(
                    Job(
                        ids=prompt,
                        max_tokens=most,
                        temperature=asked.temperature,
                        top_p=asked.top_p,
                        stop=stops,
                        # random numbers of their own for each choice, and still those of its seed alone
                        seed=(seed + choice) % 2**63,
                        put=put,
                        deadline=time.monotonic() + limits.timeout,
                        logprobs=top,
                        echo=asked.echoed,
                        strip=self.stripped,
                    )
                )
                self.told.append(0)
                self.places.append(0)

    def cancel(self) -> None:
        """Cancel all jobs."""
        for job in self.jobs:
            job.cancelled = True

    async def wait(self) -> None:
        """Wait until all jobs have ended."""
        left = len(self.jobs)
        while left:
            _, piece = await self.pieces.get()
            left -= piece is None

    def usage(self) -> dict[str, int]:
        """Count tokens: of the prompts, each counted once, and of the answers."""
        prompt = sum(len(one) for one in self.prompts)
        new = sum(len(job.tokens) for job in self.jobs)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def body(self) -> dict[str, Any]:
        """Return the whole answer."""
        choices = [
            {"index": index, "finish_reason": _reason(job), "logprobs": self.likely(index), **self.text(index)}
            for index, job in enumerate(self.jobs)
        ]
        return {**self.common, "object": self.whole, "choices": choices, "usage": self.usage()}

    async def events(self) -> AsyncIterator[str]:
        """Yield the answer as server-sent events, piece by piece."""
        try:
            for index in range(len(self.jobs)):
                begin = self.begin(index)
                if begin is not None:
                    yield self._event(index, begin)
            left = len(self.jobs)
            while left:
                index, piece = await self.pieces.get()
                job = self.jobs[index]
                left -= piece is None
                if piece is not None:
                    yield self._event(index, self.delta(piece))
                elif job.error is not None:
                    yield f"data: {json.dumps(error_body(job.error, 'server_error'))}\n\n"
                else:
                    yield self._event(index, self.delta(None), _reason(job))
            if self.asked.stream_options.include_usage:
                last = {**self.common, "object": self.part, "choices": [], "usage": self.usage()}
                yield f"data: {json.dumps(last)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            # cancel the rows of a client that has gone
            self.cancel()

    def _event(self, index: int, content: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": index, "finish_reason": finish, "logprobs": self.likely(index), **content}
        event = {**self.common, "object": self.part, "choices": [choice]}
        return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"

    def _scored(self, index: int) -> tuple[list[Scored], list[str], list[int]]:
        """Return the probabilities not sent yet, each token's text, and where in the answer it stands.

        Special tokens have a text but stand for none in the answer.
        In a stream a token waits as long as a stop text may take it back, and one that leaves a character unfinished for the one
        that finishes it.
        """
        job, start = self.jobs[index], self.told[index]
        given = [*job.prompt_scored, *(job.scored[: job.certain] if job.finish is None else job.scored)]
        behind = given[max(start - 4, 0) : start]
        texts = token_texts(self.engine.tokenizer, [one.token for one in (*behind, *given[start:])])[len(behind) :]
        while job.finish is None and texts and texts[-1].endswith(UNFINISHED):
            texts.pop()
        self.told[index] += len(texts)
        own, places = given[start : start + len(texts)], []
        for one, text in zip(own, texts, strict=True):
            places.append(self.places[index])
            self.places[index] += 0 if is_special(self.engine.tokenizer, one.token) else len(text)
        return own, texts, places

    @abstractmethod
    def text(self, index: int) -> dict[str, Any]:
        """Return a choice's answer for the whole form."""

    @abstractmethod
    def begin(self, index: int) -> dict[str, Any] | None:
        """Return the first delta of a choice's stream, if there is one."""

    @abstractmethod
    def delta(self, piece: str | None) -> dict[str, Any]:
        """Return a piece of an answer as a stream delta; None: the text has ended."""

    @abstractmethod
    def likely(self, index: int) -> dict[str, Any] | None:
        """Return probabilities of the choice's tokens not sent yet; None if they were not asked for."""


def _reason(job: Job) -> str:
    return "stop" if job.finish == "stop" else "length"


class ChatReply(Reply):
    """The answer to /v1/chat/completions: without white space at its ends, streamed or not."""

    prefix, whole, part, stripped = "chatcmpl", "chat.completion", "chat.completion.chunk", True

    def text(self, index: int) -> dict[str, Any]:
        """See `Reply.text`."""
        return {"message": {"role": "assistant", "content": self.jobs[index].text, "refusal": None}}

    def begin(self, index: int) -> dict[str, Any]:
        """See `Reply.begin`."""
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, piece: str | None) -> dict[str, Any]:
        """See `Reply.delta`."""
        return {"delta": {} if piece is None else {"content": piece}}

    def likely(self, index: int) -> dict[str, Any] | None:
        """See `Reply.likely`."""
        job, tokenizer = self.jobs[index], self.engine.tokenizer
        if job.logprobs is None:
            return None
        before = [*job.ids, *(one.token for one in job.scored[: self.told[index]])]
        content = []
        for one in self._scored(index)[0]:
            top = [_likely(added(tokenizer, before, token), logp) for token, logp in one.top[: job.logprobs]]
            content.append({**_likely(added(tokenizer, before, one.token), one.logprob), "top_logprobs": top})
            before.append(one.token)
        return {"content": content, "refusal": None}


def _likely(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class TextReply(Reply):
    """The answer to /v1/completions: the text as it is, behind the prompt if that was asked for."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def _prompt(self, index: int) -> str:
        return self.prompts[index // self.asked.n].text if self.asked.echoed else ""

    def text(self, index: int) -> dict[str, Any]:
        """See `Reply.text`."""
        return {"text": self._prompt(index) + self.jobs[index].text}

    def begin(self, index: int) -> dict[str, Any] | None:
        """See `Reply.begin`."""
        return {"text": self._prompt(index)} if self.asked.echoed else None

    def delta(self, piece: str | None) -> dict[str, Any]:
        """See `Reply.delta`."""
        return {"text": piece or ""}

    def likely(self, index: int) -> dict[str, Any] | None:
        """See `Reply.likely`."""
        job, tokenizer = self.jobs[index], self.engine.tokenizer
        if job.logprobs is None:
            return None
        every = [one.token for one in (*job.prompt_scored, *job.scored)]
        start = self.told[index]
        given, texts, offsets = self._scored(index)
        top: list[dict[str, float] | None] = []
        for number, one in enumerate(given, start=start):
            if one.logprob is None:
                top.append(None)
                continue
            likely: dict[str, float] = {}
            for token, logp in (*one.top[: job.logprobs], (one.token, one.logprob)):
                # of two tokens with one text the likelier stays
                likely.setdefault(added(tokenizer, every[:number], token), logp)
            top.append(likely)
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in given],
            "top_logprobs": top,
            "text_offset": offsets,
        }
