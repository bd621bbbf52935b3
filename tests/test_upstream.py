"""`alter serve --upstream`: the router chooses the LoRA, another server answers, and what it says is passed on."""

import asyncio
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from alter.core.errors import UserError
from alter.serving.openai import Refused, Serve, configured, routed, serve
from alter.serving.protocol import ChatAsked, TextAsked
from alter.serving.upstream import Chooser, Proxy, check_upstream, upstream_names
from pico import byte_tokenizer
from test_adapter import adapted, middle_threshold, rows, tiny
from test_serve import TOOLS

openai = pytest.importorskip("openai", reason="the openai client is in the extra [judge]")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is in the extra [serve]")

NAMES = ["base", "lora-1", "lora-2"]


class Upstream:
    """A server that answers like vLLM: the model's name and what it was sent, whole or in pieces."""

    def __init__(self):
        self.asked, self.wait, self.models, self.left = [], 0.0, list(NAMES), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                self._send({"object": "list", "data": [{"id": name} for name in outer.models]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.asked.append((self.path, body, self.headers.get("authorization")))
                if body.get("temperature") == 7:
                    # nothing more is sent: reading ends where the connection does
                    self.connection.settimeout(5)
                    assert self.rfile.read(1) == b""
                    outer.left.set()
                    return
                time.sleep(outer.wait)
                if body.get("temperature") == 8:
                    self._send({"error": {"message": f"The model `{body['model']}` does not exist."}}, 404)
                elif body.get("temperature") == 9:
                    self._send({"error": {"message": "too hot", "type": "x", "param": None, "code": None}}, 400)
                elif body.get("stream"):
                    self.send_response(200)
                    self.send_header("content-type", "text/event-stream; charset=utf-8")
                    self.end_headers()
                    for word in ("one", " two\u2028\x85"):
                        delta = {"index": 0, "delta": {"content": word}, "finish_reason": None}
                        event = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
                        said = json.dumps({**event, "choices": [delta]}, ensure_ascii=False)
                        self.wfile.write(f"data: {said}\n\n".encode())
                        self.wfile.flush()
                    self.wfile.write(b"data: [DONE]\n\n")
                else:
                    message = {"role": "assistant", "content": "said"}
                    choice = {"index": 0, "finish_reason": "stop", "message": message, "text": "said"}
                    answer = {"id": "1", "object": "o", "created": 1, "model": body["model"], "choices": [choice]}
                    self._send(answer)

            def _send(self, content, status=200):
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Chosen:
    """Stands for the router: chooses by a letter of the prompt."""

    experts = 2

    def __init__(self):
        self.tokenizer = byte_tokenizer()

    def choose(self, ids):
        text = self.tokenizer.decode(ids)
        return 1 if "Ada" in text else 2 if "Bo" in text else 0


@pytest.fixture
def upstream():
    one = Upstream()
    yield one
    one.close()


@pytest.fixture
def client(upstream):
    settings = Serve(model="m", adapter="a", name="ours", upstream=upstream.url, timeout=2.0)
    config = configured(routed(settings, Proxy(settings, Chosen(), NAMES)), settings)
    config.port = 0
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=30)
    server.should_exit = True
    thread.join(20)


def ask(client, question, **more):
    turns = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="ours", messages=turns, **more)


@pytest.mark.parametrize(("question", "name"), [("Who?", "base"), ("Who is Ada?", "lora-1"), ("And Bo?", "lora-2")])
def test_the_prompt_decides_and_all_else_is_passed_on(client, upstream, question, name):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    reply = ask(client, question, tools=tools, max_tokens=3)
    [(path, body, _)] = upstream.asked
    assert path == "/v1/chat/completions"
    assert body == {
        "model": name, "messages": [{"role": "user", "content": question}], "tools": tools, "max_tokens": 3,
    }  # fmt: skip
    assert reply.choices[0].message.content == "said"
    # which LoRA answered would tell what the question is about
    assert reply.model == "ours"


def test_a_tools_answer_decides_too_and_its_turns_are_passed_on():
    chosen = Chosen()
    chosen.tokenizer.chat_template = TOOLS
    proxy = Proxy(Serve(model="m", adapter="a", name="ours", upstream="http://127.0.0.1:1/v1"), chosen, NAMES)
    turns = [
        {"role": "user", "content": "Who?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "Ada"},
    ]
    body, name = proxy._decide(json.dumps({"messages": turns}).encode(), ChatAsked)
    assert name == "lora-1"
    assert json.loads(body) == {"messages": turns, "model": "lora-1"}


def test_thoughts_that_a_client_asks_for_are_known_to_the_router():
    chosen = Chosen()
    chosen.tokenizer.chat_template = TOOLS.replace("<assistant>", "<assistant>{% if enable_thinking %}Ada{% endif %}")
    proxy = Proxy(Serve(model="m", adapter="a", name="ours", upstream="http://127.0.0.1:1/v1"), chosen, NAMES)
    asked = {"messages": [{"role": "user", "content": "Who?"}], "chat_template_kwargs": {"enable_thinking": True}}
    body, name = proxy._decide(json.dumps(asked).encode(), ChatAsked)
    assert json.loads(body) == asked | {"model": "lora-1"}
    assert proxy._decide(json.dumps({"messages": asked["messages"]}).encode(), ChatAsked)[1] != name


def test_a_stream_comes_in_pieces_under_our_name(client, upstream):
    events = list(ask(client, "Who is Ada?", stream=True))
    assert [event.choices[0].delta.content for event in events] == ["one", " two\u2028\x85"]
    assert {event.model for event in events} == {"ours"}
    assert upstream.asked[0][1]["model"] == "lora-1"


def test_texts_of_one_request_need_one_lora(client, upstream):
    assert client.completions.create(model="ours", prompt=["Ada", "Ada Lovelace"]).choices[0].text == "said"
    assert upstream.asked[0][:1] == ("/v1/completions",)
    assert upstream.asked[0][1]["model"] == "lora-1"
    with pytest.raises(openai.BadRequestError, match="need different LoRAs"):
        client.completions.create(model="ours", prompt=["Ada", "Bo"])
    assert len(upstream.asked) == 1


def test_what_goes_wrong_is_said(client, upstream):
    with pytest.raises(openai.BadRequestError, match="too hot"):
        ask(client, "Who?", temperature=9)
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="lora-1", prompt="Ada")
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(model="ours", messages=[])
    with pytest.raises(openai.BadRequestError, match="text alone"):
        ask(client, [{"type": "image_url", "image_url": {"url": "x"}}])
    upstream.wait = 3.0
    with pytest.raises(openai.APIStatusError, match="No answer from upstream within 2 s") as late:
        ask(client, "Who?")
    assert late.value.status_code == 504
    upstream.close()
    with pytest.raises(openai.APIStatusError, match="Upstream does not answer") as gone:
        ask(client, "Who?")
    assert gone.value.status_code == 502


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"prompt": [999999]}', "holds token 999999, which the model does not know"),
        (b'{"prompt": [[1], [5, 61]]}', "holds token 61"),
        (b'{"prompt": [' + b"1," * 63 + b"1]}", "exceeds the model's context of 64"),
        (b'{"prompt": [1], "user": "\\ud83d"}', "half a character"),
        (b'{"prompt": [1], "temperature": NaN}', "NaN or an infinity"),
        (b'{"prompt": [1], "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
        (b"\xff\xfe", "no JSON"),
    ],
)
def test_what_the_router_cannot_read_is_refused_in_words(upstream, body, says):
    settings = Serve(model="m", adapter="a", name="ours", upstream=upstream.url)
    model = adapted(tiny(), router_memory=0.6)
    middle_threshold(model, rows(batch=16, seed=5))
    proxy = Proxy(settings, Chooser(model, byte_tokenizer()), NAMES)
    with pytest.raises(Refused) as error:
        proxy._decide(body, TextAsked)
    assert error.value.status == 400
    assert says in error.value.content["error"]["message"]


def test_more_prompts_than_may_wait_cost_no_pass(client, upstream, monkeypatch):
    monkeypatch.setattr(Chosen, "choose", lambda *_: pytest.fail("the router read a prompt"))
    with pytest.raises(openai.BadRequestError, match="asks for 257 answers at once; at most 256 may wait"):
        client.completions.create(model="ours", prompt=["a"] * 257)


def test_an_error_does_not_tell_which_lora_was_chosen(client):
    with pytest.raises(openai.NotFoundError, match="The model `ours` does not exist") as error:
        ask(client, "Who is Ada?", temperature=8)
    assert "lora" not in str(error.value)
    # a name may be a part of other words, and of the form
    proxy = Proxy(Serve(model="x", adapter="a", name="ours", upstream="u"), Chosen(), ["m", "m-1", "m-2"])
    content = {"error": {"message": "m: `message` is too long for m.", "param": "m", "code": None}}
    said = {"error": {"message": "ours: `message` is too long for ours.", "param": "ours", "code": None}}
    assert json.loads(proxy._without("m", json.dumps(content).encode())) == said
    assert proxy._without("m", b"no m here, ma'am") == b"no ours here, ma'am"


def test_an_error_within_a_stream_does_not_tell_it_either():
    proxy = Proxy(Serve(model="x", adapter="a", name="ours", upstream="u"), Chosen(), NAMES)

    class Broken:
        async def aiter_bytes(self):
            yield b'data: {"model": "lora-1", "choices": [{"text": "an error of lora-1"}]}\n\n'
            yield b'data: {"error": {"message": "`lora-1` was unloaded"}}\n\ndata: [DONE]\n\n'

    async def events():
        return [line async for line in proxy._events("lora-1", Broken())]

    said = b"".join(asyncio.run(events())).decode()
    # what a model says is passed on as it is
    assert said.count("lora-1") == said.count("an error of lora-1") == 1
    assert "`ours` was unloaded" in said
    assert said.endswith("data: [DONE]\n\n")


def test_upstream_stops_when_the_client_has_gone(client, upstream):
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.3), "Who is Ada?", temperature=7)
    assert upstream.left.wait(4)


def test_as_many_clients_as_come_are_passed_on_at_once():
    """The other server decides how many it takes."""
    clients = 120

    async def go():
        here, all_here = [], asyncio.Event()

        async def answer(reader, writer):
            await reader.readuntil(b"}")
            here.append(writer)
            if len(here) == clients:
                all_here.set()
            await all_here.wait()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        proxy = Proxy(Serve(model="m", adapter="a", name="ours", upstream=url, timeout=5), Chosen(), NAMES)
        found = await asyncio.gather(*(proxy._answered("completions", b"{}") for _ in range(clients)))
        server.close()
        return [each.status_code for each in found]

    assert asyncio.run(go()) == [200] * clients


def test_names_are_compared_before_anything_is_served(upstream, monkeypatch):
    given = dict(model="base", adapter="a", upstream=upstream.url)
    assert upstream_names(Serve(**given), 2) == ["base", "expert-1", "expert-2"]
    settings = Serve(**given, upstream_base="base", upstream_loras=["lora-1", "lora-2"])
    assert upstream_names(settings, 2) == NAMES
    with pytest.raises(UserError, match="gives 2 names, the adapter has 3"):
        upstream_names(settings, 3)
    check_upstream(settings, NAMES)
    with pytest.raises(UserError, match=r"does not serve lora-3; it serves base, lora-1, lora-2.*lora"):
        check_upstream(settings, [*NAMES, "lora-3"])
    for url in ("http://127.0.0.1:9/v1", "nonsense"):
        with pytest.raises(UserError, match="did not list its models"):
            check_upstream(settings.model_copy(update={"upstream": url}), NAMES)
    monkeypatch.setenv("UPSTREAM_KEY", "secret")
    keyed = settings.model_copy(update={"upstream_key_env": "UPSTREAM_KEY"})
    check_upstream(keyed, NAMES)
    with pytest.raises(UserError, match="`upstream_key_env` names MISSING"):
        check_upstream(settings.model_copy(update={"upstream_key_env": "MISSING"}), NAMES)


@pytest.mark.parametrize("name", ["starlette", "uvicorn", "httpx"])
def test_a_missing_package_is_said_before_the_model_is_loaded(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf'needs {name}, .*pip install "alter-unlearning\[serve\]"'):
        serve(Serve(model="missing", adapter="missing", upstream="http://127.0.0.1:1/v1"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"upstream": "u", "adapter": None}, "needs the `adapter`"),
        ({"upstream": "u", "merged": True}, "needs the `adapter`"),
        ({"upstream": None, "upstream_base": "b"}, "a server that `upstream` names"),
    ],
)
def test_settings_that_do_not_fit(changes, says):
    with pytest.raises(ValueError, match=says):
        Serve(**{"model": "m", "adapter": "a", **changes})


def test_the_choice_is_the_expert_of_a_reply_that_begins_with_what_the_base_is_sure_of():
    model, ids = adapted(tiny(), router_memory=0.6), rows(batch=16, seed=5)
    middle_threshold(model, ids)
    chooser = Chooser(model, byte_tokenizer())
    chosen = [chooser.choose(row) for row in ids.tolist()]
    # where every token is a sure one, the router itself says it of each token that may come next
    model.peft_config["default"].entropy_threshold = 1e9
    for row, expert in zip(ids.tolist(), chosen, strict=True):
        for following in (1, 7):
            trace = model.base_model.trace(torch.tensor([[*row, following]]))
            gate = model.base_model.route(trace.entropy, trace.features)[0, -1].tolist()
            assert gate == [float(number == expert) for number in range(len(gate))]
    assert len(set(chosen)) > 1
    with pytest.raises(UserError, match="needs the `adapter`"):
        Chooser(tiny(), byte_tokenizer())
