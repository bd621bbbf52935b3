"""`alter serve --upstream`: an ALTER adapter's router chooses which plain LoRA of another server answers a request.

Servers such as vLLM cannot route tokens, but they hold many LoRAs and take one for each request by its model's name. The
experts as plain LoRAs (`alter export --form loras`) are loaded there; here only the frozen base and the router run, once
over the prompt. What that loses against routing of tokens is measured by `benchmarks/upstream.py`.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import pydantic
import torch

from alter.adapter import alter_of
from alter.core import UserError, nearest
from alter.inference import context_length, evaluating
from alter.serving.engine import check_count, check_prompt
from alter.serving.openai import Api, Refused, json_response
from alter.serving.protocol import Asked, ChatAsked, TextAsked, explain
from alter.storage import from_json

if TYPE_CHECKING:
    import httpx

    from alter.serving.settings import Serve

PROMPT_FIELDS: dict[type[Asked], tuple[str, ...]] = {
    ChatAsked: ("messages", "chat_template_kwargs"),
    TextAsked: ("prompt",),
}
"""The fields of each endpoint's body that the router reads."""


class Chooser:
    """The router's choice of an expert for whole prompts.

    Args:
        model: base with an ALTER adapter.
        tokenizer: its own.

    Raises:
        UserError: there is no ALTER adapter on it, or none that has a route for the whole network.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        if alter_of(model) is None:
            raise UserError(
                "`upstream` needs the `adapter` whose router chooses: one of ALTER's, with forget experts."
            )
        config = model.active_peft_config
        if config.router not in ("learned", "entropy"):
            raise UserError(
                f"The adapter's router is {config.router!r}, which chooses nothing: `upstream` needs a learned one."
            )
        self.model, self.tokenizer, self.experts = model, tokenizer, int(config.num_forget_experts)

    def choose(self, ids: Sequence[int]) -> int:
        """Return the expert that a low-entropy first reply token would take; 0 for none, which is the base.

        Its evidence is of the whole prompt. Gates within the prompt tell less: a single one that opens by mistake would
        send a long prompt to an expert.

        Args:
            ids: the prompt's tokens [T].

        Raises:
            UserError: the base cannot read them with a token more.
        """
        check_prompt(ids, 1, self.model.get_input_embeddings().weight.shape[0], context_length(self.model))
        with torch.no_grad(), evaluating(self.model):
            # what generates a token decides its route, whichever token it is
            begun = torch.tensor([[*ids, ids[-1]]], device=self.model.device)
            trace = self.model.base_model.trace(begun)
            # an entropy of 0 is below every threshold
            entropy = torch.cat([trace.entropy[:, :-1], torch.zeros_like(trace.entropy[:, -1:])], dim=1)
            return int(self.model.base_model.route(entropy, trace.features)[0, -1].argmax())


def check_upstream(settings: Serve, names: Sequence[str]) -> None:
    """Check that the other server answers and serves all these names.

    Raises:
        UserError: it does not answer, or lacks one.
    """
    import httpx

    url = f"{(settings.upstream or '').rstrip('/')}/models"
    try:
        answer = httpx.get(url, headers=_key(settings), timeout=settings.read_timeout)
        answer.raise_for_status()
        known = [str(each["id"]) for each in answer.json()["data"]]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"`upstream` {settings.upstream}: GET {url} did not list its models ({type(error).__name__}: {error}). Start it "
            "first, and give its address as it is for OpenAI clients, such as http://127.0.0.1:8001/v1."
        ) from None
    missing = [name for name in names if name not in known]
    if missing:
        raise UserError(
            f"`upstream` {settings.upstream} does not serve {', '.join(missing)}; it serves {', '.join(known) or 'nothing'}."
            f"{nearest(missing[0], known)} Load the folders of `alter export --form loras` there under these names, or give "
            "theirs with `upstream_base` and `upstream_loras`."
        )


def upstream_names(settings: Serve, experts: int) -> list[str]:
    """Return the other server's names of the base and of the experts' LoRAs, in this order.

    Raises:
        UserError: another number of names was given than there are experts.
    """
    loras = settings.upstream_loras or [f"expert-{number}" for number in range(1, experts + 1)]
    if len(loras) != experts:
        raise UserError(
            f"`upstream_loras` gives {len(loras)} names, the adapter has {experts} forget experts: give one for each, in order."
        )
    return [settings.upstream_base or settings.model, *loras]


def _key(settings: Serve) -> dict[str, str]:
    key = settings.upstream_key()
    return {} if key is None else {"authorization": f"Bearer {key}"}


async def _lines(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Yield an answer's lines as events have them: U+2028 and others, at which httpx breaks lines too, may stand in a text."""
    left = b""
    async for piece in answer.aiter_bytes():
        *lines, left = (left + piece).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")
    if left:
        yield left


def _streams(answer: httpx.Response) -> bool:
    return str(answer.headers.get("content-type", "")).startswith("text/event-stream")


class Proxy(Api):
    """Routes that forward to another server: requests and answers pass unchanged except for the model's name.

    Args:
        settings: of this server.
        chooser: that decides about prompts.
        names: see `upstream_names`.
    """

    def __init__(self, settings: Serve, chooser: Chooser, names: Sequence[str]) -> None:
        super().__init__(settings, None)
        self.chooser, self.names = chooser, list(names)
        self._client: httpx.AsyncClient | None = None

    def client(self) -> httpx.AsyncClient:
        """Return the HTTP client for the other server, created on the event loop that uses it."""
        import httpx

        if self._client is None:
            # how many answers are made at once is for the other server to decide
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
            self._client = httpx.AsyncClient(timeout=self.settings.timeout, headers=_key(self.settings), limits=limits)
        return self._client

    async def health(self, request: Any) -> Any:
        """GET /health: that this server lives."""
        return json_response({"status": "ok"})

    async def chat(self, request: Any) -> Any:
        """POST /v1/chat/completions."""
        return await self._pass_on(request, ChatAsked, "chat/completions")

    async def completions(self, request: Any) -> Any:
        """POST /v1/completions."""
        return await self._pass_on(request, TextAsked, "completions")

    def _decide(self, body: bytes, form: type[Asked]) -> tuple[bytes, str]:
        """Return the body for the other server, and the name of the LoRA that the router chooses, which stands in it."""
        try:
            given = from_json(body.decode())
        except ValueError as error:
            raise Refused(400, f"The body is no JSON: {error}.") from None
        if not isinstance(given, dict):
            raise Refused(400, "The body is no JSON object.")
        fields = PROMPT_FIELDS[form]
        self._check_name(str(given.get("model") or ""))
        try:
            # of all else the other server knows best what it takes
            asked = form.model_validate({field: given.get(field) for field in fields})
            # each prompt costs a pass of the base
            check_count(asked.count, self.settings.max_waiting)
            prompts = asked.prompts(self.chooser.tokenizer)
            chosen = {self.chooser.choose(prompt) for prompt in prompts}
        except pydantic.ValidationError as error:
            message, wrong = explain(error)
            raise Refused(400, message, param=wrong) from None
        except UserError as error:
            raise Refused(400, str(error)) from None
        if len(chosen) > 1:
            raise Refused(
                400, "The prompts of this request need different LoRAs: send them one by one.", param=fields[0]
            )
        name = self.names[chosen.pop()]
        try:
            return json.dumps({**given, "model": name}, ensure_ascii=False, allow_nan=False).encode(), name
        except ValueError:
            raise Refused(400, "The body holds NaN or an infinity, which JSON does not have.") from None

    async def _pass_on(self, request: Any, form: type[Asked], path: str) -> Any:
        import httpx
        from starlette.background import BackgroundTask
        from starlette.responses import Response, StreamingResponse

        self._check_key(request)
        body = await self._read(request)
        asked, name = await asyncio.get_running_loop().run_in_executor(self.tokenizing, self._decide, body, form)
        try:
            answer = await self._while_there(request, self._answered(path, asked))
        except httpx.TimeoutException:
            raise Refused(504, f"No answer from upstream within {self.settings.timeout:g} s.", "timeout") from None
        except httpx.HTTPError as error:
            raise Refused(502, f"Upstream does not answer ({type(error).__name__}).", "server_error") from None
        kind = answer.headers.get("content-type", "application/json")
        if _streams(answer):
            return StreamingResponse(
                self._events(name, answer),
                answer.status_code,
                media_type=kind,
                background=BackgroundTask(answer.aclose),
            )
        told = self._without if answer.is_error else self._renamed
        return Response(told(name, answer.content), answer.status_code, media_type=kind)

    async def _answered(self, path: str, body: bytes) -> httpx.Response:
        """Send a body to the other server; return its answer, read to the end unless it is a stream of events."""
        client = self.client()
        url = f"{(self.settings.upstream or '').rstrip('/')}/{path}"
        headers = {"content-type": "application/json"}
        answer = await client.send(client.build_request("POST", url, content=body, headers=headers), stream=True)
        if not _streams(answer):
            await answer.aread()
        return answer

    async def _while_there(self, request: Any, going: Coroutine[Any, Any, httpx.Response]) -> httpx.Response:
        """Await what is done for a client, and cancel it once the client has gone: the other server stops as well."""
        task = asyncio.ensure_future(going)
        left = False

        async def gone() -> None:
            nonlocal left
            while not await request.is_disconnected():
                await asyncio.sleep(0.25)
            left = task.cancel()

        watcher = asyncio.create_task(gone())
        try:
            return await task
        except asyncio.CancelledError:
            if not left:
                raise
            raise Refused(499, "The client has gone.") from None
        finally:
            task.cancel()
            watcher.cancel()

    def _renamed(self, name: str, content: bytes) -> bytes:
        """Put this server's name in place of another into an answer: the LoRA's name would reveal what the prompt is about."""
        try:
            found = json.loads(content)
        except ValueError:
            return content
        if not isinstance(found, dict) or "model" not in found:
            return self._without(name, content) if isinstance(found, dict) and "error" in found else content
        return json.dumps({**found, "model": self.name}, ensure_ascii=False).encode()

    def _without(self, name: str, content: bytes) -> bytes:
        """Put this server's name in place of another in the texts of an error, whose message may name the LoRA."""

        def said(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: said(each) for key, each in value.items()}
            if isinstance(value, list):
                return [said(each) for each in value]
            if isinstance(value, str):
                return re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", lambda _: self.name, value)
            return value

        try:
            return json.dumps(said(json.loads(content)), ensure_ascii=False).encode()
        except ValueError:
            return str(said(content.decode(errors="replace"))).encode()

    async def _events(self, name: str, answer: httpx.Response) -> AsyncIterator[bytes]:
        """Yield a stream's events as they come, each under this server's name."""
        async for line in _lines(answer):
            head, data = line[:5], line[5:].strip()
            yield (b"data: " + self._renamed(name, data) if head == b"data:" and data else line) + b"\n"
