"""The server as the openai client sees it, many clients at once, its limits and its end; and the chat in a terminal."""

import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from alter.core.errors import UserError
from alter.data.encoding import encode_prompt
from alter.data.examples import Example
from alter.models.generation import generate
from alter.serving import server
from alter.serving.server import Chat, Engine, Job, Serve, application, chat
from pico import byte_tokenizer, pico, save_pico

openai = pytest.importorskip("openai", reason="the openai client is in the extra [judge]")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is in the extra [serve]")


class Running:
    """A server in a thread."""

    def __init__(self, engine=None, **settings):
        self.engine = engine or Engine(pico(0), byte_tokenizer(), max_batch=settings.get("max_batch", 16))
        app = application(Serve(model="pico", **settings), self.engine)
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
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
        counts[server._Rows([job], torch.device("cpu"))(None, scores).argmax()] += 1
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
        ({"logprobs": True}, 400, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    ],
)
def test_what_is_refused(running, changes, status, says):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(running.client(), "Who?", **changes)
    assert caught.value.status_code == status
    assert says in str(caught.value)


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
    with pytest.raises(UserError, match="PICO_KEY, which is not set"):
        application(Serve(model="pico", api_key_env="PICO_KEY"), engine)
    monkeypatch.setenv("PICO_KEY", "secret")
    one = Running(engine, api_key_env="PICO_KEY")
    with pytest.raises(openai.AuthenticationError):
        ask(one.client(), "Who?")
    assert ask(one.client(api_key="secret"), "Who?").choices[0].message.content == expected("Who?")
    one.stop()


class Slow:
    """Makes each step of a model's decoding take a while."""

    def __init__(self, monkeypatch, seconds):
        real = server._Rows.__call__

        def slowly(self, *args):
            time.sleep(seconds)
            return real(self, *args)

        monkeypatch.setattr(server._Rows, "__call__", slowly)


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
        server.serve(Serve(model="pico", port=running.port))


def test_chat_in_the_terminal(tmp_path, monkeypatch, capsys):
    folder = save_pico(tmp_path / "model")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n\n/new\nWho?\n/new\n/base Who?\nWho?\n/quit\nnever\n"))
    turns = chat(Chat(model=str(folder), max_tokens=12, device="cpu"))
    assert turns == [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": expected("Who?")}]
    assert capsys.readouterr().out.count(expected("Who?").strip()[:5]) >= 3
