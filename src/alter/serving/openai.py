"""`alter serve`: a model and its adapter behind an OpenAI-compatible endpoint.

`Api` holds the routes; `alter.serving.replies` writes the answers. Bodies are read and put into tokens
beside the event loop, and everything that can be refused is refused before it waits for the model.
"""

from __future__ import annotations

import asyncio
import gc
import queue
import secrets
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import pydantic

from alter.core import UserError
from alter.serving.engine import Engine, check_count
from alter.serving.protocol import Asked, ChatAsked, Prompt, TextAsked, error_body, explain
from alter.serving.replies import ChatReply, Reply, TextReply
from alter.serving.settings import Serve
from alter.serving.web import HostGuard, address, listen, patient_for


class Refused(Exception):
    """A refused request: the status, and the error's message, kind and further fields."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", **more: str | None) -> None:
        super().__init__(message)
        self.status, self.content = status, error_body(message, kind, **more)


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
        return json_response({"status": "ok", "waiting": self.engine.waiting.qsize()})

    async def models(self, request: Any) -> Any:
        """GET /v1/models: the one model."""
        self._check_key(request)
        return json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: Any) -> Any:
        """GET /v1/models/NAME: the one model, if it is called so."""
        self._check_key(request)
        self._check_name(request.path_params["name"])
        return json_response(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "alter"}

    async def chat(self, request: Any) -> Any:
        """POST /v1/chat/completions."""
        return await self._answer(request, ChatAsked, ChatReply)

    async def completions(self, request: Any) -> Any:
        """POST /v1/completions."""
        return await self._answer(request, TextAsked, TextReply)

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
        """Read the body, if it is small enough and comes in time."""
        from starlette.requests import ClientDisconnect

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
        except TimeoutError:
            raise Refused(408, f"The request did not arrive within {self.settings.read_timeout:g} s.") from None
        except ClientDisconnect:
            # nobody reads it; without it the log holds a trace of a mistake of ours
            raise Refused(499, "The client has gone.") from None
        return bytes(body)

    def _understand(self, body: bytes, form: type[Asked]) -> tuple[Asked, list[Prompt]]:
        """Parse a body into what it asks for, and its prompts into tokens."""
        try:
            asked = form.model_validate_json(body)
        except pydantic.ValidationError as error:
            message, field = explain(error)
            raise Refused(400, message, param=field) from None
        self._check_name(asked.model)
        try:
            # before any prompt is read: a small body can ask for millions of answers
            check_count(asked.count, self.engine.waiting.maxsize)
            return asked, asked.prompts(self.engine.tokenizer)
        except UserError as error:
            raise Refused(400, str(error)) from None

    async def _answer(self, request: Any, form: type[Asked], kind: type[Reply]) -> Any:
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
        return json_response(await asyncio.get_running_loop().run_in_executor(self.tokenizing, reply.body))


def json_response(content: Any, status: int = 200, **headers: str) -> Any:
    """Return a JSON response."""
    from starlette.responses import JSONResponse

    return JSONResponse(content, status_code=status, headers=headers)


HEADERS = {408: {"connection": "close"}, 413: {"connection": "close"}, 429: {"retry-after": "1"}}
"""What a refusal says besides its body; a body that was not read to its end leaves a connection of no use."""


async def _refused(request: Any, error: Any) -> Any:
    return json_response(error.content, error.status, **HEADERS.get(error.status, {}))


async def _unknown(request: Any, error: Any) -> Any:
    """Return the error for what the router itself refuses: an unknown path, or a wrong method."""
    text = f"{request.method} {request.url.path}: {error.detail}. There are POST /v1/chat/completions, POST "
    text += "/v1/completions, GET /v1/models and GET /health."
    return json_response(error_body(text), error.status_code, **(error.headers or {}))


async def _broken(request: Any, error: Exception) -> Any:
    return json_response(error_body("The server made a mistake; its log says more.", "server_error"), 500)


def application(settings: Serve, engine: Engine) -> Any:
    """Build the web application that answers with an engine, to be mounted or run by any ASGI server.

    `alter serve` puts a check of the Host header and a limit on slow requests before it; whoever mounts it looks to these.

    Args:
        settings: limits, key and name of the model, as `alter serve` takes them; the engine has the model itself.
        engine: that answers.

    Raises:
        UserError: Starlette is not installed, or the variable of the key is empty.
    """
    return routed(settings, Api(settings, engine))


def routed(settings: Serve, api: Api) -> Any:
    """Build the web application of some routes.

    Raises:
        UserError: Starlette is not installed.
    """
    _check_installed("starlette")
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.routing import Route

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


def _check_installed(*names: str) -> None:
    for name in names:
        if find_spec(name) is None:
            raise UserError(f'alter serve needs {name}, which is not installed: pip install "alter-unlearning[serve]"')


def configured(app: Any, settings: Serve) -> Any:
    """Return uvicorn's configuration: the application under its own names only, with a time limit on request heads."""
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
        UserError: see `routed` and `load_model`; or the address is taken.
    """
    _check_installed("starlette", "uvicorn", *(["httpx"] if settings.upstream is not None else []))
    import uvicorn

    listener = listen(settings.host, settings.port)
    # read the keys before the slow loading of the model
    settings.key()
    settings.upstream_key()
    model, tokenizer = settings.load()
    # freeze what is loaded, so that collecting after each batch skips it
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
    config = configured(routed(settings, api), settings)
    print(
        f"{settings.served_name()} answers at {address(settings.host, listener)}/v1 (Ctrl-C stops)",
        file=sys.stderr,
        flush=True,
    )
    uvicorn.Server(config).run(sockets=[listener])
    if engine is not None:
        engine.close()
