"""`alter serve`: a model and its adapter behind an OpenAI-compatible endpoint.

`Api` holds the routes, `Reply` writes the answer to one request, whole or as a stream. Bodies are read and put into tokens
beside the event loop, and everything that can be refused is refused before it waits for the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import queue
import secrets
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pydantic

from alter.core.errors import UserError
from alter.serving.engine import Engine, Job, Scored
from alter.serving.protocol import Body, ChatBody, Prompt, TextBody, explain, refusal
from alter.serving.settings import Serve
from alter.serving.text import BROKEN, added, pieces
from alter.serving.web import HostGuard, address, listen, patient_for

# An answer ------------------------------------------------------------------------------------------------------------


class Reply(ABC):
    """The answer to one request: one job for each choice, and how the protocol writes them.

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

    def __init__(self, name: str, asked: Body, prompts: Sequence[Prompt], engine: Engine, limits: Serve) -> None:
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
            # without a wish the answer may be as long as there is room
            room = limits.max_tokens if engine.context is None else max(engine.context - len(prompt.ids), 1)
            most = min(limits.max_tokens, room if asked.limit is None else asked.limit)
            for choice in range(asked.n):
                index = len(self.jobs)

                def put(piece: str | None, index: int = index) -> None:
                    # a server that has stopped takes nothing any more
                    with contextlib.suppress(RuntimeError):
                        loop.call_soon_threadsafe(self.pieces.put_nowait, (index, piece))

                self.jobs.append(
                    Job(
                        ids=prompt.ids,
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
        """Leave the rows to nobody."""
        for job in self.jobs:
            job.cancelled = True

    async def wait(self) -> None:
        """Wait until all jobs have ended."""
        left = len(self.jobs)
        while left:
            _, piece = await self.pieces.get()
            left -= piece is None

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, each counted once, and of the answers."""
        prompt = sum(len(one.ids) for one in self.prompts)
        new = sum(len(job.tokens) for job in self.jobs)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [
            {"index": index, "finish_reason": _reason(job), "logprobs": self.likely(index), **self.text(index)}
            for index, job in enumerate(self.jobs)
        ]
        return {**self.common, "object": self.whole, "choices": choices, "usage": self.usage()}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events, piece by piece."""
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
                    yield f"data: {json.dumps(refusal(job.error, 'server_error'))}\n\n"
                else:
                    yield self._event(index, self.delta(None), _reason(job))
            if self.asked.stream_options.include_usage:
                last = {**self.common, "object": self.part, "choices": [], "usage": self.usage()}
                yield f"data: {json.dumps(last)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            # a client that has gone leaves its rows to nobody
            self.cancel()

    def _event(self, index: int, content: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": index, "finish_reason": finish, "logprobs": self.likely(index), **content}
        event = {**self.common, "object": self.part, "choices": [choice]}
        return f"data: {json.dumps(event, ensure_ascii=False)}\n\n"

    def _scored(self, index: int) -> tuple[list[Scored], list[str], int]:
        """Probabilities that were not told yet, what each token adds to the text, and where the first one begins.

        In a stream a token that leaves a character unfinished waits for the one that finishes it.
        """
        job, start, place = self.jobs[index], self.told[index], self.places[index]
        given = [*job.prompt_scored, *job.scored]
        behind = given[max(start - 4, 0) : start]
        texts = pieces(self.engine.tokenizer, [one.token for one in (*behind, *given[start:])])[len(behind) :]
        while job.finish is None and texts and texts[-1].endswith(BROKEN):
            texts.pop()
        self.told[index] += len(texts)
        self.places[index] += sum(map(len, texts))
        return given[start : start + len(texts)], texts, place

    @abstractmethod
    def text(self, index: int) -> dict[str, Any]:
        """A choice's answer as the whole form has it."""

    @abstractmethod
    def begin(self, index: int) -> dict[str, Any] | None:
        """What a stream begins a choice with, if with anything."""

    @abstractmethod
    def delta(self, piece: str | None) -> dict[str, Any]:
        """A piece of an answer as a stream has it; None: no text any more."""

    @abstractmethod
    def likely(self, index: int) -> dict[str, Any] | None:
        """Probabilities of the choice's tokens that were not told yet; None if they were not asked for."""


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
        given, texts, place = self._scored(index)
        offsets: list[int] = []
        top: list[dict[str, float] | None] = []
        for number, (one, text) in enumerate(zip(given, texts, strict=True), start=start):
            offsets.append(place)
            place += len(text)
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


# The routes -----------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """A request that is not answered: the status, and the error's message, kind and further fields."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", **more: str | None) -> None:
        super().__init__(message)
        self.status, self.content = status, refusal(message, kind, **more)


class Api:
    """The routes, around an engine.

    Args:
        settings: of the server.
        engine: that answers.
    """

    def __init__(self, settings: Serve, engine: Any) -> None:
        self.settings, self.engine = settings, engine
        self.name, self.created = settings.served_name(), int(time.time())
        self.key = settings.key()
        # one at a time: a tokenizer's settings are not safe from other threads
        self.tokenizing = ThreadPoolExecutor(1, "alter-tokenizer")

    async def health(self, request: Any) -> Any:
        """GET /health: that the server lives, and how many answers wait."""
        return as_json({"status": "ok", "waiting": self.engine.waiting.qsize()})

    async def models(self, request: Any) -> Any:
        """GET /v1/models: the one model."""
        self._check_key(request)
        return as_json({"object": "list", "data": [self._model()]})

    async def model(self, request: Any) -> Any:
        """GET /v1/models/NAME: the one model, if it is called so."""
        self._check_key(request)
        self._check_name(request.path_params["name"])
        return as_json(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "alter"}

    async def chat(self, request: Any) -> Any:
        """POST /v1/chat/completions."""
        return await self._answer(request, ChatBody, ChatReply)

    async def completions(self, request: Any) -> Any:
        """POST /v1/completions."""
        return await self._answer(request, TextBody, TextReply)

    def _check_key(self, request: Any) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and not secrets.compare_digest(given.encode(), self.key.encode()):
            raise Refused(401, "Incorrect API key.", "authentication_error", code="invalid_api_key")

    def _check_name(self, name: str) -> None:
        if name and name != self.name:
            raise Refused(
                404,
                f"The model {name!r} is not served here; expected {self.name!r}.",
                param="model",
                code="model_not_found",
            )

    async def _read(self, request: Any) -> bytes:
        """The body, if it is small enough and comes in time."""
        most = self.settings.max_body_bytes
        too_large = Refused(413, f"The request is larger than {most} bytes.")
        said = request.headers.get("content-length", "0")
        if said.isdigit() and int(said) > most:
            raise too_large
        body = bytearray()

        async def all_of_it() -> None:
            async for chunk in request.stream():
                body.extend(chunk)
                if len(body) > most:
                    raise too_large

        try:
            await asyncio.wait_for(all_of_it(), self.settings.read_timeout)
        except asyncio.TimeoutError:
            raise Refused(408, f"The request did not arrive within {self.settings.read_timeout:g} s.") from None
        return bytes(body)

    def _understand(self, body: bytes, form: type[Body]) -> tuple[Body, list[Prompt]]:
        """What a body asks for, and its prompts in tokens."""
        try:
            asked = form.model_validateas_json(body)
        except pydantic.ValidationError as error:
            message, field = explain(error)
            raise Refused(400, message, param=field) from None
        self._check_name(asked.model)
        try:
            return asked, asked.prompts(self.engine.tokenizer)
        except UserError as error:
            raise Refused(400, str(error)) from None

    async def _answer(self, request: Any, form: type[Body], kind: type[Reply]) -> Any:
        from starlette.responses import StreamingResponse

        self._check_key(request)
        body = await self._read(request)
        loop = asyncio.get_running_loop()
        asked, prompts = await loop.run_in_executor(self.tokenizing, self._understand, body, form)
        try:
            reply = kind(self.name, asked, prompts, self.engine, self.settings)
            self.engine.submit(*reply.jobs)
        except UserError as error:
            raise Refused(400, str(error)) from None
        except queue.Full:
            raise Refused(429, "Too many requests are waiting; try again later.", "rate_limit_error") from None
        if asked.stream:
            return StreamingResponse(reply.events(), media_type="text/event-stream")
        return await self._whole(request, reply)

    async def _whole(self, request: Any, reply: Reply) -> Any:
        async def gone() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(0.25)
            reply.cancel()

        watcher = asyncio.create_task(gone())
        try:
            await reply.wait()
        finally:
            watcher.cancel()
            reply.cancel()
        for job in reply.jobs:
            if job.error is not None:
                raise Refused(500, job.error, "server_error")
        late = any(job.finish == "timeout" for job in reply.jobs)
        if late and not any(job.tokens for job in reply.jobs):
            raise Refused(504, f"No answer within {self.settings.timeout:g} s.", "timeout")
        return as_json(await asyncio.get_running_loop().run_in_executor(self.tokenizing, reply.body))


def as_json(content: Any, status: int = 200, **headers: str) -> Any:
    """A response of JSON."""
    from starlette.responses import JSONResponse

    return JSONResponse(content, status_code=status, headers=headers)


HEADERS = {408: {"connection": "close"}, 413: {"connection": "close"}, 429: {"retry-after": "1"}}
"""What a refusal says besides its body; a body that was not read to its end leaves a connection of no use."""


async def _refused(request: Any, error: Any) -> Any:
    return as_json(error.content, error.status, **HEADERS.get(error.status, {}))


async def _unknown(request: Any, error: Any) -> Any:
    """What the router itself refuses: no such path, or not by this method."""
    text = f"{request.method} {request.url.path}: {error.detail}. There are POST /v1/chat/completions, POST "
    text += "/v1/completions, GET /v1/models and GET /health."
    return as_json(refusal(text), error.status_code, **(error.headers or {}))


async def _broken(request: Any, error: Exception) -> Any:
    return as_json(refusal("The server made a mistake; its log says more.", "server_error"), 500)


def application(settings: Serve, api: Api) -> Any:
    """The web application of the routes; `serve` puts a look at the Host header before it.

    Raises:
        UserError: Starlette is not installed, or the variable of the key is empty.
    """
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.middleware.cors import CORSMiddleware
        from starlette.routing import Route
    except ImportError:
        raise _missing() from None
    routes = [
        Route("/health", api.health),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/completions", api.completions, methods=["POST"]),
    ]
    cors = Middleware(
        CORSMiddleware, allow_origins=settings.allowed_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
    )
    return Starlette(
        routes=routes,
        middleware=[cors] if settings.allowed_origins else [],
        exception_handlers={Refused: _refused, HTTPException: _unknown, Exception: _broken},
    )


def _missing() -> UserError:
    return UserError('alter serve needs Starlette and uvicorn: pip install "alter-unlearning[serve]"')


def configured(app: Any, settings: Serve) -> Any:
    """uvicorn's configuration: the application under its own names only, and no patience with a slow head."""
    import uvicorn

    return uvicorn.Config(
        HostGuard(app, settings.host, settings.allowed_hosts),
        http=patient_for(settings.read_timeout),
        log_level="warning",
        timeout_graceful_shutdown=int(settings.timeout) + 1,
        server_header=False,
    )


def serve(settings: Serve) -> None:
    """Run `alter serve` until it is told to stop; answers under way are finished.

    Raises:
        UserError: see `application` and `load_model`; or the address is taken.
    """
    try:
        import uvicorn
    except ImportError:
        raise _missing() from None
    listener = listen(settings.host, settings.port)
    # the keys are looked at before the model takes its time
    settings.key()
    settings.upstream_key()
    model, tokenizer = settings.load()
    # what is loaded now stays: collecting after each batch need not look at it
    gc.collect()
    gc.freeze()
    engine: Engine | None = None
    if settings.upstream is not None:
        from alter.serving.upstream import Chooser, Proxy, check_upstream, upstream_names

        chooser = Chooser(model, tokenizer)
        names = upstream_names(settings, chooser.experts)
        check_upstream(settings, names)
        api: Api = Proxy(settings, chooser, names)
    else:
        engine = Engine(model, tokenizer, max_batch=settings.max_batch, max_waiting=settings.max_waiting)
        api = Api(settings, engine)
    config = configured(application(settings, api), settings)
    print(
        f"{settings.served_name()} answers at {address(settings.host, listener)}/v1 (Ctrl-C stops)",
        file=sys.stderr,
        flush=True,
    )
    uvicorn.Server(config).run(sockets=[listener])
    if engine is not None:
        engine.close()
