"""`alter serve` and `alter chat`: a model and its adapter behind an OpenAI-compatible endpoint, or in the terminal.

One thread owns the model. Requests that wait when it is free are answered together: one batch, one decoding loop, each
row with its own length, temperature and stop strings, and its own random numbers, so that an answer does not depend on
who else asked. Routing is active as in any other forward pass.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pydantic
import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from alter.core.errors import UserError
from alter.data.encoding import encode_prompt
from alter.data.examples import Example
from alter.models.generation import stop_ids
from alter.models.loading import Subject
from alter.models.scoring import context_length, evaluating


@dataclass
class Job:
    """One answer to be made: what to continue, how, and where its pieces go.

    Attributes:
        ids: tokens of the prompt.
        max_tokens: most new tokens.
        temperature: 0 takes the likeliest token.
        top_p: share of the probability that sampling keeps.
        stop: texts before which the answer ends.
        seed: of its own random numbers.
        put: takes each new piece of text, then `None`; called from the model's thread.
        deadline: `time.monotonic()` at which it is cut off.
    """

    ids: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    seed: int
    put: Callable[[str | None], None]
    deadline: float = float("inf")
    cancelled: bool = False
    finish: Literal["stop", "length", "timeout", "cancelled", "error"] | None = None
    error: str | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    sent: int = 0


class _Rows(LogitsProcessor):
    """Leaves each row the one token that it takes: the likeliest, or one drawn with the row's own numbers."""

    def __init__(self, jobs: Sequence[Job], device: torch.device) -> None:
        self.jobs = jobs
        self.generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
        self.device = device

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = scores.argmax(dim=-1)
        for row, job in enumerate(self.jobs):
            if job.temperature > 0 and job.finish is None:
                p = torch.softmax(scores[row].float().cpu() / job.temperature, dim=-1)
                ordered, index = p.sort(descending=True)
                # the likeliest token always stays
                ordered[1:][ordered.cumsum(0)[:-1] >= job.top_p] = 0.0
                chosen[row] = index[torch.multinomial(ordered, 1, generator=self.generators[row])].to(chosen.device)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


class _Watch(BaseStreamer, StoppingCriteria):
    """Takes the new token of every row, sends its text, and says which rows have ended."""

    def __init__(self, jobs: Sequence[Job], tokenizer: Any, stop: set[int]) -> None:
        self.jobs, self.tokenizer, self.stop = jobs, tokenizer, stop
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take what `generate` hands over: first the prompts, then one token per row and step."""
        if self.prompt:
            self.prompt = False
            return
        for job, token in zip(self.jobs, value.reshape(-1).tolist(), strict=True):
            if job.finish is None:
                self._take(job, token)

    def end(self) -> None:
        """Close the rows that are still open: they have all the tokens they may have."""
        for job in self.jobs:
            if job.finish is None:
                self._close(job, "length")

    def _take(self, job: Job, token: int) -> None:
        if job.cancelled or time.monotonic() > job.deadline:
            self._close(job, "cancelled" if job.cancelled else "timeout")
            return
        if token in self.stop:
            self._close(job, "stop")
            return
        job.tokens.append(token)
        job.text = self.tokenizer.decode(job.tokens, skip_special_tokens=True)
        found = [place for place in (job.text.find(text) for text in job.stop) if place >= 0]
        if found:
            job.text = job.text[: min(found)]
            self._close(job, "stop")
        elif len(job.tokens) >= job.max_tokens:
            self._close(job, "length")
        else:
            # an unfinished character, and what may become a stop text, wait for the next token
            held = 1 if job.text.endswith("\N{REPLACEMENT CHARACTER}") else 0
            for text in job.stop:
                held = max([held, *(n for n in range(1, len(text)) if job.text.endswith(text[:n]))])
            self._send(job, job.text[: len(job.text) - held])

    def _send(self, job: Job, text: str) -> None:
        if len(text) > job.sent:
            job.put(text[job.sent :])
            job.sent = len(text)

    def _close(self, job: Job, why: Literal["stop", "length", "timeout", "cancelled"]) -> None:
        job.finish = why
        self._send(job, job.text)
        job.put(None)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        done = [job.finish is not None for job in self.jobs]
        return torch.tensor(done, device=input_ids.device)


class Engine:
    """The model, its queue and the thread that works on it."""

    def __init__(self, model: Any, tokenizer: Any, *, max_batch: int = 16, max_waiting: int = 256) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_batch = max_batch
        self.waiting: queue.Queue[Job | None] = queue.Queue(max_waiting)
        self.context = context_length(model)
        self.stop = stop_ids(model, tokenizer)
        self.thread = threading.Thread(target=self._work, daemon=True, name="alter-engine")
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            UserError: its prompt is empty or does not fit the model's context with its answer.
            queue.Full: too many wait.
        """
        if not job.ids:
            raise UserError("The prompt is empty: there is nothing to continue.")
        if self.context is not None and len(job.ids) + job.max_tokens > self.context:
            raise UserError(
                f"The prompt has {len(job.ids)} tokens; with {job.max_tokens} new ones it exceeds the model's context of "
                f"{self.context}. Ask for at most {max(self.context - len(job.ids), 0)} (max_tokens), or shorten it."
            )
        self.waiting.put_nowait(job)

    def close(self) -> None:
        """Finish what is queued, then end the thread."""
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
        try:
            self._decode(batch)
        except Exception as error:  # the thread must outlive a batch that fails; its clients are told
            for job in batch:
                if job.finish is None:
                    job.finish, job.error = "error", f"{type(error).__name__}: {error}"
                    job.put(None)

    def _decode(self, batch: list[Job]) -> None:
        device = next(self.model.parameters()).device
        width = max(len(job.ids) for job in batch)
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(batch), width), pad)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for row, job in enumerate(batch):
            ids[row, width - len(job.ids) :] = torch.tensor(job.ids)
            mask[row, width - len(job.ids) :] = 1
        watch = _Watch(batch, self.tokenizer, self.stop)
        with evaluating(self.model):
            self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max(job.max_tokens for job in batch),
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                logits_processor=LogitsProcessorList([_Rows(batch, device)]),
                stopping_criteria=StoppingCriteriaList([watch]),
                streamer=watch,
            )


# The protocol ---------------------------------------------------------------------------------------------------------


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "user", "assistant", "developer"]
    content: str | list[dict[str, Any]]

    def text(self) -> str:
        """The turn's text.

        Raises:
            UserError: there is something else than text in it.
        """
        if isinstance(self.content, str):
            return self.content
        if any(part.get("type") != "text" for part in self.content):
            raise UserError("A message holds something else than text; this server answers text alone.")
        return "".join(part["text"] for part in self.content)


class _Asked(BaseModel):
    """What both endpoints take. Unknown fields are refused: ignoring them would answer another question."""

    model_config = ConfigDict(extra="forbid")

    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=16)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    seed: int | None = None
    user: str | None = None

    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class ChatAsked(_Asked):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def prompts(self, tokenizer: Any) -> list[list[int]]:
        """The one prompt, in tokens."""
        turns = tuple(
            {"role": "system" if turn.role == "developer" else turn.role, "content": turn.text()}
            for turn in self.messages
        )
        if turns[-1]["role"] == "assistant":
            raise UserError("The last message is the assistant's: there is nothing to answer.")
        last = turns[-1]["content"]
        return [encode_prompt(tokenizer, Example(prompt=last, answer="", kind="messages", messages=turns))]


class TextAsked(_Asked):
    """Body of POST /v1/completions."""

    prompt: str | list[str]
    echo: Literal[False] = False

    def prompts(self, tokenizer: Any) -> list[list[int]]:
        """Each prompt in tokens, as it is."""
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if not texts or not all(texts):
            raise UserError("A prompt is empty: there is nothing to continue.")
        return [encode_prompt(tokenizer, Example(prompt=text, answer="", kind="completion")) for text in texts]


class Serve(Subject):
    """Answer over HTTP as OpenAI's API does: /v1/chat/completions, /v1/completions, /v1/models, /health."""

    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine alone."""
    port: int = Field(8000, ge=0, le=65535)
    """Port; 0 takes a free one and says which."""
    name: str | None = None
    """What the model is called in answers; the adapter's or the model's name by default."""
    api_key_env: str | None = None
    """Environment variable that holds the key which clients must send; without it anyone who reaches the port may ask."""
    max_batch: int = Field(16, ge=1)
    """Answers that are made together."""
    max_waiting: int = Field(256, ge=1)
    """Answers that may wait; more are turned away with 429."""
    max_body_bytes: int = Field(1_000_000, ge=1)
    """Largest request; a larger one is turned away with 413."""
    max_tokens: int = Field(1024, ge=1)
    """Most new tokens of an answer, whatever a client asks for."""
    timeout: float = Field(120.0, gt=0)
    """Seconds after which an answer is cut off, waiting included."""

    def served_name(self) -> str:
        """What the model is called in answers."""
        return self.name or self.adapter or self.model


def application(settings: Serve, engine: Engine) -> Any:
    """The web application: FastAPI around an engine.

    Raises:
        UserError: FastAPI is not installed, or the variable of the key is empty.
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse, StreamingResponse
    except ImportError:
        raise UserError('alter serve needs FastAPI and uvicorn: pip install "alter-unlearning[serve]"') from None
    key = None
    if settings.api_key_env is not None:
        key = os.environ.get(settings.api_key_env)
        if not key:
            raise UserError(f"--api-key-env names {settings.api_key_env}, which is not set: export it first.")
    app = FastAPI(title="alter", docs_url=None, redoc_url=None, openapi_url=None)
    name, created = settings.served_name(), int(time.time())

    def refuse(status: int, message: str, kind: str = "invalid_request_error", **headers: str) -> JSONResponse:
        content = {"error": {"message": message, "type": kind, "param": None, "code": None}}
        return JSONResponse(content, status_code=status, headers=headers)

    @app.middleware("http")
    async def guard(request: Request, forward: Callable[[Request], Any]) -> Any:
        if key is not None and request.url.path != "/health":
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not secrets.compare_digest(given.encode(), key.encode()):
                return refuse(401, "Incorrect API key.", "authentication_error")
        return await forward(request)

    async def read(request: Request, form: type[_Asked]) -> Any:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > settings.max_body_bytes:
                return refuse(413, f"The request is larger than {settings.max_body_bytes} bytes.", connection="close")
        try:
            asked = form.model_validate_json(body)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the body"
            return refuse(400, f"{where}: {first['msg']}.")
        if asked.model and asked.model != name:
            return refuse(404, f"The model {asked.model!r} is not served here; expected {name!r}.")
        return asked

    def jobs_of(asked: Any, loop: asyncio.AbstractEventLoop) -> tuple[list[Job], list[asyncio.Queue[str | None]]]:
        wanted = asked.max_tokens or getattr(asked, "max_completion_tokens", None)
        jobs: list[Job] = []
        queues: list[asyncio.Queue[str | None]] = []
        seed = secrets.randbits(31) if asked.seed is None else asked.seed
        for ids in asked.prompts(engine.tokenizer):
            # without a wish the answer may be as long as there is room
            room = settings.max_tokens if engine.context is None else max(engine.context - len(ids), 0)
            limit = min(settings.max_tokens, wanted if wanted is not None else max(room, 1))
            for choice in range(asked.n):
                pieces: asyncio.Queue[str | None] = asyncio.Queue()

                def put(piece: str | None, pieces: asyncio.Queue[str | None] = pieces) -> None:
                    loop.call_soon_threadsafe(pieces.put_nowait, piece)

                deadline = time.monotonic() + settings.timeout
                jobs.append(
                    Job(ids, limit, asked.temperature, asked.top_p, asked.stops(), seed + choice, put, deadline)
                )
                queues.append(pieces)
        return jobs, queues

    async def answer(request: Request, asked: Any, kind: str) -> Any:
        if not isinstance(asked, _Asked):
            return asked
        chat = kind == "chat.completion"
        try:
            jobs, queues = jobs_of(asked, asyncio.get_running_loop())
            for job in jobs:
                engine.submit(job)
        except UserError as error:
            return refuse(400, str(error))
        except queue.Full:
            for job in jobs:
                job.cancelled = True
            return refuse(
                429, "Too many requests are waiting; try again later.", "rate_limit_error", **{"retry-after": "1"}
            )
        number = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        common = {"id": number, "created": created if created > time.time() else int(time.time()), "model": name}

        def usage() -> dict[str, int]:
            prompt = sum({id(job.ids): len(job.ids) for job in jobs}.values())
            new = sum(len(job.tokens) for job in jobs)
            return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

        def reason(job: Job) -> str:
            return "stop" if job.finish == "stop" else "length"

        if asked.stream:
            include = bool((asked.stream_options or {}).get("include_usage"))

            def event(choices: list[dict[str, Any]], **more: Any) -> str:
                content = {**common, "object": "chat.completion.chunk" if chat else "text_completion"}
                return f"data: {json.dumps({**content, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

            def piece(index: int, text: str | None, finish: str | None, first: bool = False) -> str:
                choice: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": None}
                if chat:
                    choice["delta"] = ({"role": "assistant"} if first else {}) | (
                        {} if text is None else {"content": text}
                    )
                else:
                    choice["text"] = text or ""
                return event([choice])

            async def stream() -> AsyncIterator[str]:
                try:
                    if chat:
                        for index in range(len(jobs)):
                            yield piece(index, "", None, first=True)
                    merged: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()

                    async def forward(index: int, source: asyncio.Queue[str | None]) -> None:
                        while True:
                            text = await source.get()
                            await merged.put((index, text))
                            if text is None:
                                return

                    tasks = [asyncio.create_task(forward(i, source)) for i, source in enumerate(queues)]
                    left = len(tasks)
                    while left:
                        index, text = await merged.get()
                        if text is not None:
                            yield piece(index, text, None)
                            continue
                        left -= 1
                        if jobs[index].error is not None:
                            error = {"message": jobs[index].error, "type": "server_error", "param": None, "code": None}
                            yield f"data: {json.dumps({'error': error})}\n\n"
                        else:
                            yield piece(index, None, reason(jobs[index]))
                    if include:
                        yield event([], usage=usage())
                    yield "data: [DONE]\n\n"
                finally:
                    # a client that has gone leaves its rows to nobody
                    for job in jobs:
                        job.cancelled = True

            return StreamingResponse(stream(), media_type="text/event-stream")

        async def gone() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(0.25)
            for job in jobs:
                job.cancelled = True

        watcher = asyncio.create_task(gone())
        try:
            for pieces in queues:
                while await pieces.get() is not None:
                    pass
        finally:
            watcher.cancel()
        for job in jobs:
            if job.error is not None:
                return refuse(500, job.error, "server_error")
        choices = []
        for index, job in enumerate(jobs):
            choice: dict[str, Any] = {"index": index, "finish_reason": reason(job), "logprobs": None}
            if chat:
                choice["message"] = {"role": "assistant", "content": job.text.strip(), "refusal": None}
            else:
                choice["text"] = job.text
            choices.append(choice)
        body = {
            **common,
            "object": "chat.completion" if chat else "text_completion",
            "choices": choices,
            "usage": usage(),
        }
        if any(job.finish == "timeout" for job in jobs) and not any(job.tokens for job in jobs):
            return refuse(504, f"No answer within {settings.timeout:g} s.", "timeout")
        return JSONResponse(body)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": engine.waiting.qsize()}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": created, "owned_by": "alter"}]}

    # annotations are strings in this file, so FastAPI is told what the parameter is
    async def chat_completions(request) -> Any:
        return await answer(request, await read(request, ChatAsked), "chat.completion")

    async def completions(request) -> Any:
        return await answer(request, await read(request, TextAsked), "text_completion")

    app.add_route("/v1/chat/completions", chat_completions, methods=["POST"])
    app.add_route("/v1/completions", completions, methods=["POST"])
    return app


def serve(settings: Serve) -> None:
    """Run `alter serve` until it is told to stop; answers under way are finished.

    Raises:
        UserError: see `application` and `load_model`; or the address is taken.
    """
    try:
        import uvicorn
    except ImportError:
        raise UserError('alter serve needs FastAPI and uvicorn: pip install "alter-unlearning[serve]"') from None
    import socket

    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        raise UserError(
            f"Cannot listen on {settings.host}:{settings.port}: {error.strerror}. Give another --port."
        ) from None
    # the key is looked at before the model takes its time
    if settings.api_key_env is not None and not os.environ.get(settings.api_key_env):
        raise UserError(f"--api-key-env names {settings.api_key_env}, which is not set: export it first.")
    model, tokenizer = settings.load()
    # what is loaded now stays: collecting after each batch need not look at it
    gc.collect()
    gc.freeze()
    engine = Engine(model, tokenizer, max_batch=settings.max_batch, max_waiting=settings.max_waiting)
    app = application(settings, engine)
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=int(settings.timeout) + 1, server_header=False
    )
    address = f"http://{settings.host}:{listener.getsockname()[1]}/v1"
    print(f"{settings.served_name()} answers at {address} (Ctrl-C stops)", file=sys.stderr, flush=True)
    uvicorn.Server(config).run(sockets=[listener])
    engine.close()


# In the terminal ------------------------------------------------------------------------------------------------------


class Chat(Subject):
    """Talk to a model and its adapter in the terminal; /base asks the model without the adapter, /new starts over."""

    max_tokens: int = Field(200, ge=1)
    """Longest answer, in tokens."""
    temperature: float = Field(0.0, ge=0)
    """0 takes the likeliest tokens."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Share of the probability that sampling keeps."""
    seed: int = 0
    """Of the sampling."""
    system: str | None = None
    """System turn before the first question."""


def chat(settings: Chat) -> list[dict[str, str]]:
    """Run `alter chat`: read questions from standard input until it ends, /quit or Ctrl-C; return the turns.

    Raises:
        UserError: what `load_model` raises.
    """
    model, tokenizer = settings.load()
    start = [{"role": "system", "content": settings.system}] if settings.system else []
    turns = list(start)
    asking = sys.stdin.isatty()
    if asking:
        print(
            "Ask; /base QUESTION asks without the adapter, /new forgets the conversation, /quit ends.", file=sys.stderr
        )
    while True:
        try:
            line = input("> " if asking else "").strip()
        except EOFError:
            return turns
        if line == "/quit":
            return turns
        if line == "/new":
            turns = list(start)
            continue
        base = line.startswith("/base ")
        question = line.removeprefix("/base ").strip()
        if not question:
            continue
        asked = [*turns, {"role": "user", "content": question}]
        ids = encode_prompt(tokenizer, Example(prompt=question, answer="", kind="messages", messages=tuple(asked)))
        context = context_length(model)
        if context is not None and len(ids) + settings.max_tokens > context:
            print("The conversation is longer than the model's context: /new starts over.", file=sys.stderr)
            continue

        def show(piece: str | None) -> None:
            print(piece if piece is not None else "\n", end="", flush=True)

        job = Job(ids, settings.max_tokens, settings.temperature, settings.top_p, (), settings.seed, show)
        engine = Engine(model, tokenizer, max_batch=1)
        if base and settings.adapter is not None:
            with model.disable_adapter():
                engine.submit(job)
                engine.close()
        else:
            engine.submit(job)
            engine.close()
        if job.error is not None:
            raise UserError(job.error)
        if not base:
            turns = [*asked, {"role": "assistant", "content": job.text.strip()}]
