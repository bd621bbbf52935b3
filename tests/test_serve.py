"""The server as the openai client sees it, many clients at once, its limits and its end; and the chat in a terminal."""

import asyncio
import http.client
import io
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pydantic
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from alter import cli
from alter.core.errors import UserError
from alter.data.chat import set_template_arguments
from alter.data.encoding import Encoded, encode_prompt
from alter.data.rows import Example
from alter.inference.generation import generate
from alter.inference.scoring import score
from alter.serving import engine as engines
from alter.serving.chat import Chat, chat
from alter.serving.engine import Engine, draw
from alter.serving.jobs import Job, Scored
from alter.serving.openai import Api, Refused, Serve, application, configured, serve
from alter.serving.protocol import ChatAsked, Prompt, TextAsked, explain, text_ids
from alter.serving.replies import TextReply
from alter.serving.text import token_texts, visible
from pico import byte_tokenizer, pico, run_on, save_pico, write_people

openai = pytest.importorskip("openai", reason="the openai client is in the extra [judge]")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is in the extra [serve]")
requests = pytest.importorskip("starlette.requests", reason="Starlette is in the extra [serve]")


class Running:
    """A server in a thread."""

    def __init__(self, engine=None, **settings):
        self.engine = engine or Engine(pico(0), byte_tokenizer(), max_batch=settings.get("max_batch", 16))
        given = Serve(model="pico", **settings)
        config = configured(application(given, self.engine), given)
        config.port = 0
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def client(self, **settings):
        given = dict(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=60)
        return openai.OpenAI(**{**given, **settings})

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)
        self.engine.close()


@pytest.fixture(scope="module")
def running():
    one = Running(max_tokens=40)
    yield one
    one.stop()


def expected(question, tokens=12):
    tokenizer = byte_tokenizer()
    turns = ({"role": "user", "content": question},)
    ids = encode_prompt(tokenizer, Example(prompt=question, answer="", kind="messages", messages=turns))
    return generate(pico(0), tokenizer, [ids], max_new_tokens=tokens, progress=False)[0]


def ask(client, question, **settings):
    given = dict(model="pico", messages=[{"role": "user", "content": question}], max_tokens=12, temperature=0)
    return client.chat.completions.create(**{**given, **settings})


def test_chat_answers_as_generate_does(running):
    reply = ask(running.client(), "Who?")
    assert reply.choices[0].message.content == expected("Who?")
    assert reply.model == "pico"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.choices[0].finish_reason == ("length" if reply.usage.completion_tokens == 12 else "stop")


def test_streaming_gives_the_same_text(running):
    chunks = list(ask(running.client(), "Who?", stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.strip() == expected("Who?")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices].count(None) == len(chunks) - 2
    assert chunks[-1].usage.completion_tokens > 0
    assert len(chunks) > 4


def test_completions_continue_each_prompt(running):
    reply = running.client().completions.create(
        model="pico", prompt=["Once upon", "The wind"], max_tokens=6, temperature=0
    )
    assert [choice.index for choice in reply.choices] == [0, 1]
    tokenizer = byte_tokenizer()
    for choice, prompt in zip(reply.choices, ["Once upon", "The wind"], strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = pico(0).generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        assert choice.text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    streamed = running.client().completions.create(
        model="pico", prompt="Once upon", max_tokens=6, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == reply.choices[0].text


def test_models_and_health(running):
    assert [model.id for model in running.client().models.list()] == ["pico"]
    assert running.client().models.with_raw_response.list().status_code == 200


def test_sampling_depends_on_the_seed_alone(running):
    def sampled(seed, **settings):
        return ask(running.client(), "Who?", temperature=1.5, seed=seed, **settings).choices[0].message.content

    alone = sampled(3)
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(sampled, [1, 2, 3, 4, 3, 5]))
    assert together[2] == together[4] == alone
    assert len(set(together)) > 2
    several = ask(running.client(), "Who?", temperature=1.5, seed=3, n=3)
    assert several.choices[0].message.content == alone
    assert len({choice.message.content for choice in several.choices}) > 1


def test_temperature_and_top_p_match_a_loop():
    torch.manual_seed(0)
    scores = torch.randn(1, 6) * 2
    p = torch.softmax(scores[0] / 0.7, -1)
    order = p.argsort(descending=True).tolist()
    kept, total = [], 0.0
    for index in order:
        if kept and total >= 0.6:
            break
        kept.append(index)
        total += p[index].item()
    counts = torch.zeros(6)
    for seed in range(3000):
        job = Job([1], 1, 0.7, 0.6, (), seed, lambda piece: None)
        counts[engines._Rows([job])(None, scores).argmax()] += 1
    target = torch.zeros(6)
    target[kept] = p[kept] / p[kept].sum()
    assert (counts / 3000 - target).abs().max() < 0.04
    assert set(counts.nonzero()[:, 0].tolist()) == set(kept)


def test_stop_text_ends_before_it_is_sent(running):
    whole = ask(running.client(), "Who?").choices[0].message.content
    stop = whole[4:6]
    cut = ask(running.client(), "Who?", stop=[stop, "never"])
    assert cut.choices[0].message.content == whole[: whole.index(stop)].strip()
    assert cut.choices[0].finish_reason == "stop"
    pieces = ask(running.client(), "Who?", stop=stop, stream=True)
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in pieces).strip() == whole[: whole.index(stop)].strip()
    )


def test_many_clients_get_what_one_gets(running):
    questions = [f"Question {i % 7} of {'many' * (i % 5)}?" for i in range(48)]
    single = {question: expected(question) for question in set(questions)}
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda q: ask(running.client(), q).choices[0].message.content, questions))
    assert replies == [single[question] for question in questions]


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"model": "gpt-4"}, 404, "not served here"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "nothing to answer"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "text alone",
        ),
        ({"messages": [{"role": "user", "content": "long " * 60}]}, 400, "context of 128"),
        ({"top_logprobs": 3}, 400, "`logprobs` true as well"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        ({"presence_penalty": 0.5}, 400, "`presence_penalty`: only 0 is supported"),
        ({"seed": 2**63}, 400, "seed"),
        ({"seed": 2**70}, 400, "seed"),
        ({"temperature": 10.5}, 400, "temperature"),
        ({"stop": list("abcde")}, 400, "at most 4"),
        ({"stop": ["x" * 257]}, 400, "at most 256"),
        ({"n": 17}, 400, "`n`: "),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "no text"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "no content"),
        ({"messages": [{"role": "user"}]}, 400, "no content"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}, {"role": "user", "content": "x"}]},
            400,
            "no function with a name",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]},
                    {"role": "user", "content": "x"},
                ]
            },
            400,
            "arguments of a call of 'f' are no JSON",
        ),
    ],
)
def test_what_is_refused(running, changes, status, says):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(running.client(), "Who?", **changes)
    assert caught.value.status_code == status
    assert says in str(caught.value)


TOOLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls or [] %}[{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}]{% endfor %}{% if m.tool_call_id %}#{{ m.tool_call_id }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_chat_leaves_thoughts_empty_unless_its_client_asks_for_them():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}<think></think>"
        "{% endif %}{% endif %}"
    )
    turns = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Who?"}]

    def prompt(**more):
        [found] = ChatAsked(messages=turns, **more).prompts(tokenizer)
        return tokenizer.decode(found)

    assert prompt() == prompt(chat_template_kwargs={"enable_thinking": False})
    assert prompt() == "<system>Brief.<user>Who?<assistant><think></think>"
    assert prompt(chat_template_kwargs={"enable_thinking": True}) == "<system>Brief.<user>Who?<assistant>"
    # what the server was started with yields to what its client asks for, of this request alone
    set_template_arguments(tokenizer, ["enable_thinking=false"])
    assert prompt(chat_template_kwargs={"enable_thinking": True}) == "<system>Brief.<user>Who?<assistant>"
    assert prompt().endswith("<assistant><think></think>")


@pytest.mark.parametrize(
    "template", [TOOLS, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"]
)
def test_earlier_calls_of_tools_are_part_of_the_prompt(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"who": "Ada"}'}}
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Who is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "Ada, 36"}]},
    ]
    [prompt] = ChatAsked(messages=turns).prompts(tokenizer)
    # a template that knows no calls gets them as text
    called = '[find {"who": "Ada"}]' if template == TOOLS else '{"name": "find", "arguments": {"who": "Ada"}}'
    told = "#c1" if template == TOOLS else ""
    said = f"<system>Be brief.<user>Who is it?<assistant>{called}<tool>Ada, 36{told}<assistant>"
    assert tokenizer.decode(prompt) == said
    # the form before calls of tools
    old = [
        *turns[:2],
        {"role": "assistant", "content": None, "function_call": {"name": "find", "arguments": '{"who": "Ada"}'}},
        {"role": "function", "name": "find", "content": "Ada, 36"},
    ]
    [prompt] = ChatAsked(messages=old).prompts(tokenizer)
    assert tokenizer.decode(prompt) == said.replace("#c1", "")


def test_body_that_is_no_json_or_too_large(running):
    for body, status in ((b"{", 400), (b"x" * 1_000_001, 413)):
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
        try:
            connection.request("POST", "/v1/chat/completions", body)
            response = connection.getresponse()
            assert response.status == status
            assert "message" in json.loads(response.read())["error"]
        except (BrokenPipeError, ConnectionResetError):
            assert status == 413
        connection.close()


def test_key(monkeypatch):
    monkeypatch.delenv("PICO_KEY", raising=False)
    engine = Engine(pico(0), byte_tokenizer())
    given = Serve(model="pico", api_key_env="PICO_KEY")
    with pytest.raises(UserError, match="PICO_KEY, which is not set"):
        application(given, engine)
    monkeypatch.setenv("PICO_KEY", "secret")
    one = Running(engine, api_key_env="PICO_KEY")
    with pytest.raises(openai.AuthenticationError):
        ask(one.client(), "Who?")
    assert ask(one.client(api_key="secret"), "Who?").choices[0].message.content == expected("Who?")
    one.stop()


class Slow:
    """Makes each step of a model's decoding take a while."""

    def __init__(self, monkeypatch, seconds):
        real = engines._Rows.__call__

        def slowly(self, *args):
            time.sleep(seconds)
            return real(self, *args)

        monkeypatch.setattr(engines._Rows, "__call__", slowly)


def test_too_many_waiting_are_turned_away(monkeypatch):
    Slow(monkeypatch, 0.05)
    one = Running(Engine(pico(0), byte_tokenizer(), max_batch=1, max_waiting=1))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: outcome(one), range(8)))
    assert "ok" in results
    assert "RateLimitError" in results
    one.stop()


def outcome(one, **settings):
    try:
        ask(one.client(), "Who?", **settings)
    except openai.APIStatusError as error:
        return type(error).__name__
    return "ok"


def test_answer_is_cut_off_in_time(monkeypatch):
    Slow(monkeypatch, 0.1)
    one = Running(timeout=0.45)
    started = time.time()
    reply = ask(one.client(), "Who?", max_tokens=40)
    assert time.time() - started < 3
    assert reply.choices[0].finish_reason == "length"
    assert 0 < reply.usage.completion_tokens < 12
    one.stop()


def test_client_that_leaves_frees_its_row(monkeypatch):
    Slow(monkeypatch, 0.2)
    one = Running()
    stream = ask(one.client(), "Who?", max_tokens=60, stream=True)
    next(iter(stream))
    stream.close()
    started = time.time()
    assert ask(one.client(), "Who?", max_tokens=2).choices
    # all 60 steps would take 12 s
    assert time.time() - started < 8
    one.stop()


def test_model_that_breaks_is_an_error_and_the_server_lives(monkeypatch, running):
    real = running.engine.model.generate

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(running.engine.model, "generate", broken)
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        ask(running.client(), "Who?")
    monkeypatch.setattr(running.engine.model, "generate", real)
    assert ask(running.client(), "Who?").choices[0].message.content == expected("Who?")


@pytest.mark.slow
def test_process_stops_gracefully(tmp_path):
    folder = save_pico(tmp_path / "model")
    command = [
        sys.executable,
        "-m",
        "alter",
        "serve",
        "--model",
        str(folder),
        "--port",
        "0",
        "--device",
        "cpu",
        "--name",
        "pico",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stderr:
        if "answers at" in line:
            break
    port = int(line.split(":")[2].split("/")[0])
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0, timeout=60)
    stream = ask(client, "Who?", max_tokens=60, stream=True)
    pieces = [next(iter(stream))]
    process.send_signal(signal.SIGTERM)
    pieces += list(stream)
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")
    assert process.wait(30) in (0, -signal.SIGTERM)
    # the address is free again, and one that is taken is said so
    listener = http.client.HTTPConnection("127.0.0.1", port)
    with pytest.raises(ConnectionRefusedError):
        listener.request("GET", "/health")


def test_address_that_is_taken(running, tmp_path):
    with pytest.raises(UserError, match=r"Cannot listen on 127\.0\.0\.1"):
        serve(Serve(model="pico", port=running.port))


def test_chat_in_the_terminal(tmp_path, monkeypatch, capsys):
    folder = save_pico(tmp_path / "model")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n\n/new\nWho?\n/new\n/base Who?\nWho?\n/quit\nnever\n"))
    turns = chat(Chat(model=str(folder), max_tokens=12, device="cpu"))
    assert turns == [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": expected("Who?")}]
    assert capsys.readouterr().out.count(expected("Who?").strip()[:5]) >= 3


# What clients send besides


@pytest.mark.parametrize(
    "field",
    [
        "temperature",
        "top_p",
        "n",
        "stream",
        "seed",
        "stop",
        "max_tokens",
        "logprobs",
        "top_logprobs",
        "stream_options",
        "tools",
        "tool_choice",
        "functions",
        "logit_bias",
        "response_format",
        "user",
        "store",
        "metadata",
    ],
)
def test_null_is_the_default(running, field):
    given = {"messages": [{"role": "user", "content": "Who?"}], "temperature": 0, "max_tokens": 4, field: None}
    assert post(running, "/v1/chat/completions", given)[0] == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frequency_penalty", 0),
        ("presence_penalty", 0.0),
        ("logit_bias", {}),
        ("tools", []),
        ("tool_choice", "none"),
        ("response_format", {"type": "text"}),
        ("logprobs", False),
        ("user", "someone"),
        ("parallel_tool_calls", True),
        ("service_tier", "auto"),
        ("stop", []),
    ],
)
def test_what_changes_nothing_is_taken(running, field, value):
    assert ask(running.client(), "Who?", extra_body={field: value}).choices[0].message.content == expected("Who?")


def post(one, path, content, method="POST", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=30)
    connection.request(method, path, None if content is None else json.dumps(content), headers)
    response = connection.getresponse()
    body = json.loads(response.read())
    connection.close()
    return response.status, body


def test_names_and_lists_of_parts(running):
    parts = [{"type": "text", "text": "W"}, {"type": "text", "text": "ho?"}]
    said = {"role": "assistant", "content": "I", "refusal": None, "tool_calls": None, "function_call": None}
    given = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_completion_tokens": 12}
    status, body = post(running, "/v1/chat/completions", given)
    assert status == 200
    assert body["choices"][0]["message"]["content"] == expected("Who?")
    given["messages"] = [{"role": "developer", "content": "x"}, given["messages"][0], said, given["messages"][0]]
    assert post(running, "/v1/chat/completions", given)[0] == 200


def test_max_completion_tokens(running):
    assert ask(running.client(), "Who?", extra_body={"max_completion_tokens": 3}).usage.completion_tokens <= 3


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)],
)
def test_unknown_paths_are_errors_in_the_same_form(running, method, path, status):
    got, body = post(running, path, None, method)
    assert got == status
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "/v1/chat/completions" in body["error"]["message"]


def test_errors_name_the_field(running):
    given = {"messages": [{"role": "user", "content": "Who?"}], "top_p": 2}
    assert post(running, "/v1/chat/completions", given)[1]["error"]["param"] == "top_p"


def test_model_is_called_as_the_user_likes(tmp_path):
    assert Serve(model="owner/name").served_name() == "owner/name"
    folder = tmp_path / "runs" / "r1" / "adapter"
    folder.mkdir(parents=True)
    assert (
        Serve(model="builtin:tofu-mini/original", adapter=str(folder)).served_name() == "builtin:tofu-mini/original+r1"
    )
    assert Serve(model=str(tmp_path / "runs")).served_name() == "runs"
    assert Serve(model="x", adapter=str(folder), name="mine").served_name() == "mine"


def test_one_name_is_served(running):
    assert running.client().models.retrieve("pico").id == "pico"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        running.client().models.retrieve("other")


# Rows that fail alone


def job(ids, tokens=4, **settings):
    return Job(
        **{**dict(ids=ids, max_tokens=tokens, temperature=0.0, top_p=1.0, stop=(), seed=0, put=[].append), **settings}
    )


@pytest.fixture
def idle(monkeypatch):
    """An engine whose thread does not run: batches are handed to it by the test."""
    monkeypatch.setattr(Engine, "_work", lambda self: None)
    return lambda model=None, **settings: Engine(model or pico(0), byte_tokenizer(), **settings)


def test_a_row_fails_alone(idle):
    def gone(piece):
        raise RuntimeError("nobody there")

    engine = idle()
    good, alone = job([1, 2, 3], 6), job([1, 2, 3], 6)
    engine._answer([alone])
    bad = [job([5, 6], seed=2**70, temperature=1.0), job([5, 6], stop=(3,)), job([400])]
    engine._answer([good, *bad])
    assert (good.finish, good.text) == (alone.finish, alone.text)
    assert [one.finish for one in bad] == ["error"] * 3
    assert "".join(piece for piece in good.put.__self__ if piece) == good.text
    # pieces that were sent before the batch failed are not sent again
    assert [piece for one in (good, alone) for piece in one.put.__self__].count(None) == 2


def test_a_tiny_temperature_is_the_likeliest_token(running):
    for temperature in (1e-45, 5e-324, 1e-9):
        assert ask(running.client(), "Who?", temperature=temperature).choices[0].message.content == expected("Who?")
    scores = torch.tensor([1.0, 3.0, -torch.inf, 2.0])
    assert draw(scores, 1e-45, 1.0, torch.Generator().manual_seed(0)).tolist() == [1]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_rounding_draws_no_other_token(top_p):
    """What is drawn from a flat distribution, as behind a corrupted prompt, does not depend on who else asked."""
    torch.manual_seed(0)
    for seed in range(200):
        scores = torch.randn(16_000)
        rounded = scores + (torch.rand(16_000) - 0.5) * 5e-6
        one, other = (draw(x, 1.0, top_p, torch.Generator().manual_seed(seed)) for x in (scores, rounded))
        assert one == other


def test_sampling_keeps_the_likeliest_tokens_that_hold_top_p():
    scores, generator = torch.tensor([0.1, 0.5, 0.15, 0.25]).log(), torch.Generator().manual_seed(0)
    for top_p, kept in ((0.7, [1, 3]), (0.4, [1]), (1.0, [0, 1, 2, 3])):
        drawn = torch.cat([draw(scores, 1.0, top_p, generator) for _ in range(2000)])
        share = torch.bincount(drawn, minlength=4) / len(drawn)
        expected = torch.zeros(4)
        expected[kept] = scores.exp()[kept] / scores.exp()[kept].sum()
        torch.testing.assert_close(share, expected, atol=0.04, rtol=0)


def test_prompts_that_together_pass_the_context(idle):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=256, eos_token_id=256
    )
    model = GPT2LMHeadModel(config).eval()
    engine = idle(model)
    engine.stop = set()
    model.generation_config.eos_token_id = None
    sizes = [(4, 55), (50, 4), (30, 20)]
    alone, together = ([job([5] * n, tokens) for n, tokens in sizes] for _ in range(2))
    for one in alone:
        engine._answer([one])
    engine._answer(together)
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert [len(one.tokens) for one in together] == [55, 4, 20]
    # a cache that keeps its rows: those that would pass the context are answered alone
    again = [job([5] * n, tokens) for n, tokens in sizes]
    engines_can_drop = engines.can_drop_rows
    try:
        engines.can_drop_rows = lambda cache: False
        engine._answer(again)
    finally:
        engines.can_drop_rows = engines_can_drop
    assert [one.tokens for one in again] == [one.tokens for one in alone]


def test_logits_that_are_not_finite_are_said(idle):
    model = pico(0)
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    for one in (job([1, 2]), job([1, 2], 0, logprobs=1, echo=True)):
        idle(model)._answer([one])
        assert one.finish == "error"
        assert "not finite" in one.error


def test_jobs_of_one_request_are_queued_together_or_not_at_all(idle):
    engine = idle(max_waiting=3)
    engine.submit(job([1]), job([1]))
    with pytest.raises(queue.Full):
        engine.submit(job([1]), job([1]))
    with pytest.raises(UserError, match="context of 128"):
        engine.submit(job([1]), job([1] * 128))
    with pytest.raises(UserError, match="token 300, which the model does not know"):
        engine.submit(job([1]), job([300]))
    assert engine.waiting.qsize() == 2
    with pytest.raises(UserError, match="at most 3 may wait"):
        engine.submit(*(job([1]) for _ in range(4)))


def test_a_small_body_that_asks_for_millions_of_answers_is_refused_before_a_prompt_is_read(running, monkeypatch):
    monkeypatch.setattr(TextAsked, "prompts", lambda *_: pytest.fail("a prompt was read"))
    with pytest.raises(openai.BadRequestError, match="asks for 4800 answers at once; at most 256 may wait"):
        running.client().completions.create(model="pico", prompt=["a"] * 300, n=16, max_tokens=1)


def test_jobs_that_nobody_waits_for_cost_nothing(idle, monkeypatch):
    engine = idle()
    monkeypatch.setattr(engine.model, "generate", None)
    left, late = job([1], cancelled=True), job([1], deadline=0.0)
    engine._answer([left, late])
    assert (left.finish, late.finish) == ("cancelled", "timeout")


@pytest.mark.parametrize(("how", "finish"), [({"cancelled": True}, "cancelled"), ({"deadline": 0.0}, "timeout")])
def test_an_answer_that_was_begun_again_may_end_before_it_has_caught_up(idle, how, finish):
    """The engine's thread must outlive it: nobody else would be answered any more."""
    engine = idle()
    begun = job([1, 2, 3], sent="what was sent before the batch failed", **how)
    engine._answer([begun])
    assert (begun.finish, begun.text) == (finish, begun.sent)
    assert begun.put.__self__ == [None]
    chat = job([1, 2, 3], sent="Hello", text=" Hel", strip=True, **how)
    engine._answer([chat])
    assert (chat.finish, chat.text) == (finish, "Hello")
    # what does not go on with what was sent is an error of this answer alone
    other = job([1, 2, 3], sent="abc", text="xyz", **how)
    engine._answer([other])
    assert other.finish == "error"


# Streams


def fallback_tokenizer():
    """A byte-fallback vocabulary, as Llama 2's and Gemma's: a character that is no token becomes its bytes."""
    vocab = {"<unk>": 0, "<eos>": 1, "<pad>": 2} | {f"<0x{i:02X}>": i + 3 for i in range(256)}
    vocab |= {c: 259 + i for i, c in enumerate("abcdefgh▁.")}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def spelled(text):
    return [byte + 3 for byte in text.encode()]


def letters(text):
    return [259 + "abcdefgh▁.".index(c) for c in text]


@pytest.mark.parametrize(
    ("tokens", "stop"),
    [
        ([*letters("▁a"), *spelled("日本"), *letters("b")], ()),
        ([*letters("a"), *spelled("é"), *spelled("本")[:2], *letters("b▁c")], ()),
        ([*spelled("日"), *spelled("本")[:1]], ()),
        ([*spelled("日本語"), *letters("abc")], ("語",)),
        ([*letters("abcabd"), *spelled("é")], ("abd",)),
        ([*letters("▁▁ab▁.▁▁")], ()),
        ([*letters("ab"), *spelled("é"), *letters("ab"), *letters("cd")], ("abcde", "abd")),
    ],
)
@pytest.mark.parametrize("strip", [False, True])
def test_pieces_are_the_whole_text(tokens, stop, strip):
    tokenizer = fallback_tokenizer()
    one = job([1], len(tokens) + 1, stop=stop, strip=strip)
    rows = engines._Rows([one])
    watch = engines._Watch(rows, tokenizer, {1})
    for token in [*tokens, 1]:
        watch(torch.tensor([[token]]), None)
        sent = "".join(piece for piece in one.put.__self__ if piece)
        assert tokenizer.decode(tokens, skip_special_tokens=True).startswith(sent) or strip
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    for text in stop:
        whole = whole.partition(text)[0]
    assert one.finish == "stop"
    assert sent == one.text == (whole.strip() if strip else whole)


@pytest.mark.parametrize("tokens", [[*letters("ab"), *spelled("日"), *letters("cd")], [*letters("abc")]])
def test_probabilities_before_a_stop_text_are_of_whole_characters(tokens):
    tokenizer = fallback_tokenizer()
    one = job([1], 20, stop=("c",), logprobs=0)
    watch = engines._Watch(engines._Rows([one]), tokenizer, {1})
    for token in tokens:
        one.scored += [Scored(token, -1.0)] * (one.finish is None)
        watch(torch.tensor([[token]]), None)
    assert one.finish == "stop"
    assert "".join(token_texts(tokenizer, [each.token for each in one.scored])) == one.text


def test_offsets_are_places_in_the_text_which_holds_no_special_token():
    tokenizer = fallback_tokenizer()
    prompt = [1, *letters("ab"), 1, *spelled("é"), *letters("c")]

    async def whole():
        asked = TextAsked(prompt=prompt, logprobs=0, echo=True)
        engine = SimpleNamespace(context=None, tokenizer=tokenizer)
        reply = TextReply("pico", asked, asked.prompts(tokenizer), engine, Serve(model="pico"))
        (one,) = reply.jobs
        one.prompt_scored = [Scored(token, -1.0) for token in prompt]
        one.tokens, one.scored, one.text = letters("d"), [Scored(letters("d")[0], -1.0), Scored(1, -1.0)], "d"
        one.close("stop")
        return reply.body()["choices"][0]

    choice = asyncio.run(whole())
    assert choice["text"] == "abécd"
    assert choice["logprobs"]["tokens"] == ["<eos>", "a", "b", "<eos>", "", "é", "c", "d", "<eos>"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2, 2, 2, 3, 4, 5]


def test_a_stream_tells_no_probability_of_a_token_that_a_stop_text_takes_back():
    tokenizer = fallback_tokenizer()

    async def streamed():
        asked = TextAsked(prompt="a", stop=["cde"], logprobs=0, stream=True)
        engine = SimpleNamespace(context=None, tokenizer=tokenizer)
        reply = TextReply("pico", asked, [Prompt(letters("a"), "a")], engine, Serve(model="pico"))
        (one,) = reply.jobs
        watch = engines._Watch(engines._Rows([one]), tokenizer, {1})
        told = []
        for token in letters("abcdcde"):
            one.scored.append(Scored(token, -1.0))
            watch(torch.tensor([[token]]), None)
            told += reply.likely(0)["tokens"]
        assert one.finish == "stop"
        return told

    assert asyncio.run(streamed()) == list("abcd")


def test_a_stream_in_parts_goes_out_while_it_is_made():
    tokenizer = fallback_tokenizer()
    one = job([1], 9)
    watch = engines._Watch(engines._Rows([one]), tokenizer, {1})
    for token in letters("abc"):
        watch(torch.tensor([[token]]), None)
    assert one.put.__self__ == ["a", "b", "c"]


@pytest.mark.parametrize("seed", range(4))
def test_stream_and_whole_are_equal_to_the_letter(running, seed):
    given = dict(temperature=1.5, seed=seed, max_tokens=30, stop=["e", "Q1"])
    whole = ask(running.client(), "Who?", **given).choices[0].message.content
    chunks = ask(running.client(), "Who?", stream=True, **given)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


# Probabilities


def naive_logprobs(ids):
    """Log-probability of each id but the first, and of the likeliest at its place: one forward pass per id."""
    found = []
    for t in range(1, len(ids)):
        with torch.no_grad():
            logp = pico(0)(input_ids=torch.tensor([ids[:t]])).logits[0, -1].double().log_softmax(-1)
        found.append((logp[ids[t]].item(), logp.max().item()))
    return found


def test_completions_tell_probabilities_with_the_prompt(running):
    ids = byte_tokenizer()("Once é")["input_ids"]
    create = running.client().completions.create
    given = dict(model="pico", max_tokens=3, temperature=0, logprobs=2, echo=True)
    choice = create(prompt="Once é", **given).choices[0]
    told = choice.logprobs
    answer = create(prompt="Once é", max_tokens=3, temperature=0, model="pico").choices[0].text
    assert choice.text == "Once é" + answer
    assert told.token_logprobs[0] is None
    assert told.top_logprobs[0] is None
    new = pico(0).generate(input_ids=torch.tensor([ids]), max_new_tokens=3, do_sample=False)[0].tolist()
    expect = naive_logprobs(new)
    assert told.token_logprobs[1:] == pytest.approx([own for own, _ in expect], abs=1e-4)
    assert [max(top.values()) for top in told.top_logprobs[1:]] == pytest.approx(
        [best for _, best in expect], abs=1e-4
    )
    assert all(2 <= len(top) <= 3 for top in told.top_logprobs[1:])
    for text, place in zip(told.tokens, told.text_offset, strict=True):
        assert choice.text.startswith(text, place) or "\N{REPLACEMENT CHARACTER}" in text
    # as token ids, scored only, and as a stream
    same = create(prompt=ids, **given).choices[0]
    assert (same.text, same.logprobs) == (choice.text, told)
    scored = create(prompt=[ids, ids[:4]], **{**given, "max_tokens": 0}).choices
    assert scored[0].logprobs.token_logprobs == told.token_logprobs[: len(ids)]
    assert scored[0].text == "Once é"
    assert scored[1].logprobs.token_logprobs == pytest.approx([None, *told.token_logprobs[1:4]], abs=1e-4)
    chunks = list(create(prompt="Once é", stream=True, **given))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    assert [text for part in parts for text in part.tokens] == told.tokens
    assert [value for part in parts for value in part.token_logprobs] == told.token_logprobs
    assert [place for part in parts for place in part.text_offset] == told.text_offset


def test_chat_tells_probabilities(running):
    reply = ask(running.client(), "Who?", logprobs=True, top_logprobs=2)
    content = reply.choices[0].logprobs.content
    assert len(content) in (reply.usage.completion_tokens, reply.usage.completion_tokens + 1)
    for one in content:
        assert len(one.top_logprobs) == 2
        assert one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob
        # greedy: the token is the likeliest
        assert one.logprob == one.top_logprobs[0].logprob
        assert bytes(one.bytes).decode() == one.token
    chunks = ask(running.client(), "Who?", logprobs=True, top_logprobs=2, stream=True)
    streamed = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert streamed == content
    assert ask(running.client(), "Who?").choices[0].logprobs is None
    assert ask(running.client(), "Who?", logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_probabilities_end_where_a_stop_text_begins(running):
    whole = ask(running.client(), "Who?").choices[0].message.content
    create = running.client().completions.create
    given = dict(model="pico", prompt="Once upon", temperature=0, max_tokens=12, logprobs=0)
    whole = create(**given).choices[0]
    stop = whole.text[3:5]
    cut = create(**given, stop=stop).choices[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    # the stop text may begin inside a token
    assert "".join(cut.logprobs.tokens[:-1]) in cut.text
    assert "".join(cut.logprobs.tokens).startswith(cut.text)
    assert cut.logprobs.token_logprobs == whole.logprobs.token_logprobs[: len(cut.logprobs.tokens)]


def test_text_completions_know_no_chat_template():
    tokenizer = byte_tokenizer(bos_token="<unused258>")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    asked = TextAsked(prompt="Once upon")
    assert asked.prompts(tokenizer)[0] == tokenizer("Once upon")["input_ids"]
    turns = [{"role": "user", "content": "Once upon"}]
    assert tokenizer.decode(ChatAsked(messages=turns).prompts(tokenizer)[0]).endswith("[user]Once upon[assistant]")


@pytest.mark.parametrize(
    ("form", "body", "said"),
    [
        (
            ChatAsked,
            {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2},
            "`top_logprobs` needs `logprobs`",
        ),
        (TextAsked, {"prompt": "x", "max_tokens": 0}, "`max_tokens` is 0: without `echo`"),
        (TextAsked, {"prompt": "x", "stop": list("abcde")}, "`stop` holds 5 texts"),
        (TextAsked, {"prompt": "x", "stop": "a" * 257}, "`stop` holds a text of 257 characters"),
        (TextAsked, {"prompt": "x", "seed": 2**70}, "`seed`: "),
        (TextAsked, {"prompt": "x", "top_k": 5}, "`top_k`: only 0 or -1 is supported here"),
        (ChatAsked, {"messages": [{"role": "nobody", "content": "x"}]}, "`messages.0.role`: "),
    ],
)
def test_messages_to_clients_name_fields_as_settings_are_named(form, body, said):
    try:
        asked = form.model_validate(body)
        with pytest.raises(UserError) as refused:
            (asked.prompts(byte_tokenizer()), asked.top(), asked.stops())
        told = str(refused.value)
    except pydantic.ValidationError as error:
        told, _ = explain(error)
    assert told.startswith(said)
    assert "--" not in told


def test_a_text_begins_once():
    tokenizer = byte_tokenizer(bos_token="<unused258>")
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<unused258> $A <eos>", special_tokens=[("<unused258>", 258), ("<eos>", 256)]
    )
    plain = [258, *byte_tokenizer()("Once")["input_ids"]]
    assert text_ids(tokenizer, "Once") == plain
    assert text_ids(tokenizer, "<unused258>Once") == plain


def likeliest(text):
    ids = torch.tensor([byte_tokenizer()(text)["input_ids"]])
    return byte_tokenizer().decode(pico(0)(input_ids=ids).logits[0, -1].argmax(), skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_lm_eval_measures_through_the_server_what_it_measures_itself(running, tmp_path, batch_size):
    pytest.importorskip("lm_eval", reason="lm-eval is in the extra [eval]")
    pytest.importorskip("tenacity", reason="lm-eval's API models need tenacity, in the extra [dev]")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    save_pico(tmp_path / "model")
    api = LocalCompletionsAPI(
        base_url=f"http://127.0.0.1:{running.port}/v1/completions",
        model="pico",
        tokenizer=str(tmp_path / "model"),
        tokenizer_backend="huggingface",
        batch_size=batch_size,
        max_length=128,
        max_gen_toks=8,
    )
    own = HFLM(pretrained=pico(0), tokenizer=byte_tokenizer(), batch_size=2, max_length=128, device="cpu")

    def asked(kind, *pairs):
        return [Instance(kind, {}, pair, number) for number, pair in enumerate(pairs)]

    # the likeliest continuation is one of them, so that both verdicts on greedy decoding occur
    start = next(
        (chr(a) + chr(b), text)
        for a in range(65, 91)
        for b in range(97, 123)
        if (text := likeliest(chr(a) + chr(b))).isascii() and text.isalnum()
    )
    pairs = [start, ("Who wrote", " it?"), ("é 日", " x"), ("A", "bc def")]
    mine, theirs = (one.loglikelihood(asked("loglikelihood", *pairs)) for one in (api, own))
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in theirs], abs=1e-3)
    assert [bool(greedy) for _, greedy in mine] == [bool(greedy) for _, greedy in theirs]
    assert {bool(greedy) for _, greedy in mine} == {True, False}
    until = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    generations = [("Who wrote", until), ("Once", until)]
    assert api.generate_until(asked("generate_until", *generations)) == own.generate_until(
        asked("generate_until", *generations)
    )


# Adapters of every kind


KINDS = ["alter", "npo", "uld", "whp_logits", "o3"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """Folders of pico runs: a LoRA, ALTER's adapter and the inference forms."""
    from alter.methods import presets
    from alter.training.run import Unlearn, unlearn

    folder = write_people(tmp_path_factory.mktemp("guards"), ["Ada", "Bo"], 3, 8)
    save_pico(folder / "model", initializer_range=0.2)
    for method in KINDS:
        given = {"method": method, **run_on(folder, folder / method), "max_steps": 3, "batch_size": 2}
        given |= {"gradient_accumulation_steps": 1, "learning_rate": 3e-2}
        settings = presets.expand(given | ({"adapter": {"kind": "lora", "r": 4}} if method == "npo" else {}))
        unlearn(Unlearn.model_validate(settings))
    return folder


@pytest.mark.parametrize("method", KINDS)
def test_every_kind_of_adapter_is_served(guarded, method):
    settings = Serve(
        model=str(guarded / "model"), adapter=str(guarded / method / "adapter"), device="cpu", name="pico"
    )
    model, tokenizer = settings.load()
    one = Running(Engine(model, tokenizer))
    questions = ["Where was Ada born, 1?", "What is 3 plus one?", "Who?"]
    turns = [({"role": "user", "content": question},) for question in questions]
    ids = [encode_prompt(tokenizer, Example(turn[0]["content"], "", "messages", turn)) for turn in turns]
    alone = [generate(model, tokenizer, [row], max_new_tokens=24, progress=False)[0] for row in ids]
    with ThreadPoolExecutor(6) as pool:
        said = list(pool.map(lambda q: ask(one.client(), q, max_tokens=24).choices[0].message.content, questions * 2))
    assert said == alone * 2
    told = one.client().completions.create(model="pico", prompt=ids[0], max_tokens=0, echo=True, logprobs=1)
    scores = score(
        model, [Encoded(ids[0], [-100, *ids[0][1:]], 1)], pad_token_id=tokenizer.pad_token_id, progress=False
    )
    assert told.choices[0].logprobs.token_logprobs[1:] == pytest.approx(scores.logprob[0].tolist(), abs=1e-4)
    one.stop()


# Strangers


def test_foreign_host_names_are_refused():
    one = Running(allowed_hosts=["models.example"])
    for host, status in (
        ("evil.example", 400),
        ("evil.example:8000", 400),
        ("", 400),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:9", 200),
        ("[::1]:9", 200),
        ("192.0.2.7", 200),
        ("models.example", 200),
        ("127.0.0.1.evil.example", 400),
    ):
        got, body = post(one, "/health", None, "GET", Host=host)
        assert got == status, host
        assert status == 200 or "`allowed_hosts`" in body["error"]["message"]
    one.stop()


def test_pages_of_allowed_sites_may_ask():
    one = Running(allowed_origins=["https://site.example"])
    for origin, allowed in (("https://site.example", "https://site.example"), ("https://evil.example", None)):
        connection = http.client.HTTPConnection("127.0.0.1", one.port, timeout=30)
        wish = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-y"}
        connection.request("OPTIONS", "/v1/chat/completions", headers=wish)
        response = connection.getresponse()
        assert response.headers.get("Access-Control-Allow-Origin") == allowed
        connection.close()
    one.stop()


def test_slow_requests_are_ended():
    one = Running(read_timeout=0.5)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    with socket.create_connection(("127.0.0.1", one.port), timeout=20) as slow:
        slow.sendall(head)
        assert slow.recv(100) == b""
    with socket.create_connection(("127.0.0.1", one.port), timeout=20) as slow:
        slow.sendall(head + b"Content-Length: 50\r\n\r\n{")
        assert b" 408 " in slow.recv(4000)
    assert post(one, "/health", None, "GET")[0] == 200
    one.stop()


def test_a_client_that_leaves_while_it_sends_is_no_mistake_of_the_server():
    class Leaving:
        def __init__(self):
            self.headers = {}

        async def stream(self):
            yield b"{"
            raise requests.ClientDisconnect

    with pytest.raises(Refused, match="The client has gone"):
        asyncio.run(Api(Serve(model="m"), None)._read(Leaving()))


def test_a_large_body_is_refused_before_it_is_sent(running):
    with socket.create_connection(("127.0.0.1", running.port), timeout=20) as large:
        large.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n")
        assert b" 413 " in large.recv(4000)


def test_a_long_prompt_holds_nobody_up(running, monkeypatch):
    started = threading.Event()

    def slowly(self, tokenizer):
        started.set()
        time.sleep(2)
        raise UserError("slow")

    monkeypatch.setattr(TextAsked, "prompts", slowly)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(post, running, "/v1/completions", {"prompt": "x"})
        started.wait(10)
        begun = time.time()
        assert post(running, "/health", None, "GET")[0] == 200
        assert time.time() - begun < 1
        assert slow.result()[0] == 400


# The chat's commands


def test_chat_commands(tmp_path, monkeypatch, capsys):
    folder = save_pico(tmp_path / "model")
    monkeypatch.setattr(sys, "stdin", io.StringIO("/help\n/base\n/bse Who?\n/new\n" + "long " * 60 + "\nWho?\n"))
    turns = chat(Chat(model=str(folder), max_tokens=12, device="cpu"))
    assert [turn["content"] for turn in turns] == ["Who?", expected("Who?")]
    told = capsys.readouterr().err
    for says in ("/base  QUESTION", "needs a question", "Did you mean '/base'?", "context of 128"):
        assert says in told


def test_base_in_the_chat_is_the_model_without_its_adapter(guarded, monkeypatch, capsys):
    settings = Chat(
        model=str(guarded / "model"), adapter=str(guarded / "uld" / "adapter"), max_tokens=12, device="cpu"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("/base Who?\nWho?\n"))
    turns = chat(settings)
    said = capsys.readouterr().out.split("\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n"))
    plain = chat(settings.model_copy(update={"adapter": None}))
    assert said[0] == visible(plain[-1]["content"]).split("\n")[0]
    assert turns[-1]["content"] != plain[-1]["content"]


def test_nothing_acts_on_the_terminal():
    assert visible("a\x1b]0;x\x07\x9b2J\r\tb\n") == "a\u241b]0;x\u2407\u24212J\u240d\tb\n"


@pytest.mark.parametrize("host", ["", " "])
@pytest.mark.parametrize("command", ["serve", "inspect"])
def test_an_empty_address_is_not_every_network(command, host, capsys):
    given = ["--model", "nowhere", "--host", host, *(["--adapter", "no"] if command == "inspect" else [])]
    assert cli.main([command, *given]) == 2
    assert "an empty address would be every network of this machine" in capsys.readouterr().err
