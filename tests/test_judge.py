"""The judge against a small local server that speaks the real protocol: verdicts, failures, limits, the cache."""

import json
import math
import re
import sqlite3
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from alter import cli
from alter.core.errors import UserError
from alter.evaluation import grading, judge
from alter.evaluation.grading import bound, estimate, grade
from alter.evaluation.judge import Judge, judge_replies
from alter.evaluation.judged import judge_records
from alter.storage.records import Record, read_records, write_records

KEY = "sk-test-1234"
PAIRS = [(f"Who is {i}?", f"She is number {i}, a writer.") for i in range(6)]
PROMPTS = [prompt for prompt, _ in PAIRS]


class Server:
    """Answers /v1/chat/completions; `answer(number, body)` gives what: a verdict, or (status, headers, body)."""

    def __init__(self, answer=lambda number, body: "4", usage=(50, 1), delay=0.0):
        self.answer, self.usage, self.delay = answer, usage, delay
        self.bodies, self.times, self.paths = [], [], []
        self.now = self.most = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.times.append(time.monotonic())
                    outer.paths.append(self.path)
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                try:
                    self.reply(number, body)
                finally:
                    with outer.lock:
                        outer.now -= 1

            def reply(self, number, body):
                if outer.delay:
                    time.sleep(outer.delay)
                if self.headers.get("Authorization") != f"Bearer {KEY}":
                    return self.send(
                        401, {}, {"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}
                    )
                said = outer.answer(number, body)
                if isinstance(said, tuple):
                    return self.send(*said)
                content = {
                    "id": "chatcmpl-1",
                    "object": "chat.completion",
                    "created": 0,
                    "model": body["model"],
                    "choices": [
                        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
                    ],
                }
                if outer.usage:
                    sent, got = outer.usage
                    content["usage"] = {"prompt_tokens": sent, "completion_tokens": got, "total_tokens": sent + got}
                return self.send(200, {}, content)

            def send(self, status, headers, content):
                data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                try:
                    self.send_response(status)
                    for name, value in {
                        "Content-Type": "application/json",
                        "Content-Length": len(data),
                        **headers,
                    }.items():
                        self.send_header(name, str(value))
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client did not wait

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def serve(monkeypatch, tmp_path):
    servers = []

    def start(*args, **kwargs):
        servers.append(Server(*args, **kwargs))
        return servers[-1]

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ALTER_CACHE", str(tmp_path / "cache"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(grading, "BACKOFF", 0.01)
    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def make(server, **settings):
    return Judge(**{"url": server.url, "model": "judge-1", "concurrency": 1} | settings)


def error(status, message="no", code=None, **headers):
    return status, headers, {"error": {"message": message, "code": code}}


# ---- verdicts


@pytest.mark.parametrize(
    ("text", "found"),
    [("4", 4), (" 5.\n", 5), ("Grade: 3", 3), ("4/5", 4), ("2 out of 5", 2), ("**1**", 1), ("3, yes 3", 3)]
    + [(text, None) for text in ("", None, "fine", "0", "6", "10", "4.5", "-3", "3 or 4", "3-4", "45", "five", "4,5")],
)
def test_a_verdict_is_one_whole_number_from_1_to_5(text, found):
    assert grade(text) == found


def test_grades_mean_and_variance_are_those_of_all_grades(serve):
    said = {pair[1]: 1 + i % 5 for i, pair in enumerate(PAIRS)}
    server = serve(lambda number, body: str(said[body["messages"][1]["content"].split("Response: ")[1]]))
    settings = make(server, concurrency=3, price_in=2.0, price_out=10.0)
    found = judge_replies(settings, PAIRS)
    naive = [1, 2, 3, 4, 5, 1]
    assert found.grades.tolist() == [[g] for g in naive]
    assert (found.calls, found.tokens_in, found.tokens_out, found.cached, found.missing) == (6, 300, 6, 0, 0)
    assert found.cost == pytest.approx((300 * 2 + 6 * 10) / 1e6)
    mean, variance, unparsed = judge_records("m", settings, found, PROMPTS, {})
    assert mean.value == pytest.approx(sum(naive) / 6)
    assert variance.value == pytest.approx(sum((g - sum(naive) / 6) ** 2 for g in naive) / 6)
    assert (mean.n, mean.per_item, unparsed.value, unparsed.n) == (6, [float(g) for g in naive], 0.0, 6)
    assert mean.extra["counts"] == {"1": 2, "2": 1, "3": 1, "4": 1, "5": 1}
    body = server.bodies[0]
    assert set(server.paths) == {"/v1/chat/completions"}
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-1", 0.0, 8)
    assert body["messages"][0] == {"role": "system", "content": grading.SYSTEM}
    assert body["messages"][1]["content"] in [f"Question: {p}\nResponse: {r}" for p, r in PAIRS]
    # the key is sent, and kept nowhere
    assert KEY not in json.dumps([record.extra for record in (mean, variance, unparsed)], default=str)


def test_repeats_empty_replies_equal_pairs_and_unparsed_verdicts(serve):
    answers = iter(["5", "3", "no idea", "2", "4", "4"])
    server = serve(lambda number, body: next(answers))
    settings = make(server, repeats=2, temperature=None)
    found = judge_replies(settings, [("a", "x {reply}"), ("b", " \n"), ("c", "y"), ("a", "x {reply}"), ("d", "z")])
    assert len(server.bodies) == 6
    assert found.grades[:2].tolist() == [[5, 3], [1, 1]]
    assert math.isnan(found.grades[2, 0])
    assert found.grades[2, 1] == 2
    assert found.grades[3:].tolist() == [[5, 3], [4, 4]]
    assert (found.empty, found.unparsed, found.missing, found.examples) == (1, 1, 0, ["no idea"])
    assert "1 verdicts were no grade" in found.note()[0]
    assert "temperature" not in server.bodies[0]
    mean, _, unparsed = judge_records("m", settings, found, list("abcad"), {})
    assert (mean.n, unparsed.n, unparsed.value) == (9, 8, 1 / 8)
    assert math.isclose(mean.value, (5 + 3 + 1 + 1 + 2 + 5 + 3 + 4 + 4) / 9)
    assert mean.per_item[2] == 2


def test_no_grade_at_all_is_no_number(serve):
    settings = make(serve(lambda number, body: "fine"))
    mean, variance, unparsed = judge_records("m", settings, judge_replies(settings, PAIRS), PROMPTS, {})
    assert (mean.value, variance.value, mean.n, unparsed.value) == (None, None, 0, 1.0)
    nothing = judge_records("m", settings, judge_replies(settings, []), [], {})
    assert [record.value for record in nothing] == [None, None, None]


# ---- failures


def test_429_waits_as_long_as_the_endpoint_says(serve):
    server = serve(lambda number, body: error(429, "slow down", **{"Retry-After": "0.4"}) if number == 0 else "4")
    found = judge_replies(make(server), PAIRS[:1])
    assert found.grades.tolist() == [[4]]
    assert server.times[1] - server.times[0] >= 0.4


def test_500_is_tried_again_with_growing_pauses(serve, monkeypatch):
    monkeypatch.setattr(grading, "BACKOFF", 0.1)
    server = serve(lambda number, body: error(500) if number < 3 else "2")
    assert judge_replies(make(server), PAIRS[:1]).grades.tolist() == [[2]]
    gaps = np.diff(server.times)
    assert gaps[0] >= 0.1
    assert gaps[1] >= 0.2
    assert gaps[2] >= 0.4


def test_a_slow_answer_times_out_and_counts_as_spent(serve):
    def answer(number, body):
        if number == 0:
            time.sleep(1.0)
        return "3"

    server = serve(answer)
    found = judge_replies(make(server, timeout=0.3), PAIRS[:1])
    assert found.grades.tolist() == [[3]]
    assert found.tokens_in == 50 + estimate(*PAIRS[0])
    assert not found.counted
    assert "partly estimates" in found.note()[-1]


@pytest.mark.parametrize(
    ("answer", "calls", "says"),
    [
        (error(500, "broken"), 3, "500: .*broken.*, after 3 attempts"),
        (error(404, "no such model"), 1, "knows no model 'judge-1'"),
        (error(403, "not yours"), 1, "refuses the API key in OPENAI_API_KEY"),
        (error(418, "teapot"), 1, "answers 418"),
        (error(429, "pay", code="insufficient_quota"), 1, "no money left"),
        (error(429, "tomorrow", **{"Retry-After": "86400"}), 1, "asks to wait 86400 s"),
        ((200, {"Content-Type": "text/html"}, "<html>hello</html>"), 1, "not answer as an OpenAI-compatible"),
        ((200, {}, "{"), 1, "not answer as an OpenAI-compatible"),
        (error(400, "bad temperature"), 5, "refuses every request: .*bad temperature"),
    ],
)
def test_an_endpoint_that_cannot_be_used(serve, answer, calls, says):
    server = serve(lambda number, body: answer)
    with pytest.raises(UserError, match=says):
        judge_replies(make(server, retries=2), PAIRS)
    assert len(server.bodies) == calls


def test_a_wrong_key_is_said_at_once(serve, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-wrong")
    server = serve()
    with pytest.raises(UserError, match=r"refuses the API key in MY_KEY: .*Incorrect API key") as caught:
        judge_replies(make(server, key_variable="MY_KEY"), PAIRS)
    assert len(server.bodies) == 1
    assert "sk-wrong" not in str(caught.value)


def test_nobody_there(serve):
    server = serve()
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UserError, match=r"no connection .*after 2 attempts"):
        judge_replies(make(server, retries=1), PAIRS)


def test_one_refused_text_costs_only_itself(serve):
    server = serve(lambda number, body: error(400, "content filter") if number == 1 else "5")
    found = judge_replies(make(server), PAIRS)
    assert (found.refused, found.missing, found.stopped) == (1, 0, None)
    assert int(np.isfinite(found.grades).sum()) == 5
    assert "content filter" in found.note()[0]


def test_no_more_requests_at_a_time_than_allowed(serve):
    server = serve(delay=0.03)
    judge_replies(make(server, concurrency=2), PAIRS)
    assert server.most == 2


# ---- limits


def test_the_estimate_is_checked_before_the_first_call(serve):
    server = serve()
    needed = sum(estimate(*pair) for pair in PAIRS) + 8 * len(PAIRS)
    with pytest.raises(
        UserError, match=rf"about {needed} tokens, above the limit \(`judge.max_tokens` {needed - 1}\)"
    ):
        judge_replies(make(server, max_tokens=needed - 1), PAIRS)
    with pytest.raises(UserError, match="in money, above the limit"):
        judge_replies(make(server, max_cost=needed / 1e6 - 1e-5, price_in=1.0, price_out=1.0), PAIRS)
    assert server.bodies == []


@pytest.mark.parametrize("by", ["tokens", "cost"])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_limit_stops_cleanly_and_is_not_exceeded(serve, by, concurrency):
    """The endpoint counts more tokens than were estimated: still the limit holds, and what was done is kept."""
    many = [(f"q{i}", f"reply {i}") for i in range(20)]
    largest = bound("q10", "reply 10")
    server = serve(usage=(largest, 8))
    limit = 8 * (largest + 8)
    assert sum(estimate(*pair) for pair in many) + 8 * 20 < 2.5 * limit
    limits = {"max_tokens": limit} if by == "tokens" else {"max_cost": limit / 1e6, "price_in": 1.0, "price_out": 1.0}
    monkey = pytest.MonkeyPatch()
    monkey.setattr(judge, "_check_estimate", lambda *args: None)
    try:
        found = judge_replies(make(server, concurrency=concurrency, **limits), many)
    finally:
        monkey.undo()
    assert found.tokens_in + found.tokens_out <= limit
    assert 7 <= found.calls <= 8
    assert found.missing == 20 - found.calls
    assert "limit on tokens or cost is reached" in found.note()[0]
    # the rest later, the first ones from the cache
    server.usage = (5, 1)
    again = judge_replies(make(server), many)
    assert (again.cached, again.calls, again.missing) == (found.calls, 20 - found.calls, 0)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_long_verdicts_are_reserved_too(serve, monkeypatch, concurrency):
    monkeypatch.setattr(judge, "_check_estimate", lambda *args: None)
    server = serve(usage=(100, 5000))
    found = judge_replies(make(server, concurrency=concurrency, reply_tokens=5000, max_tokens=18000), PAIRS)
    assert found.tokens_in + found.tokens_out <= 18000
    assert (found.calls, found.missing) == (3, 3)


def test_tokens_that_are_not_reported_are_estimated(serve):
    found = judge_replies(make(serve(usage=None)), PAIRS)
    assert found.tokens_in == sum(estimate(*pair) for pair in PAIRS)
    assert not found.counted


@pytest.mark.parametrize("reply", ["", "ab", "längere Wörter", "漢字" * 50])
def test_estimate_and_bound_are_of_the_bytes(reply):
    size = len((grading.SYSTEM + f"Question: q\nResponse: {reply}").encode())
    assert estimate("q", reply) == math.ceil(size / 3) + 16
    assert bound("q", reply) == size + 16


# ---- the cache


def test_an_interrupted_run_goes_on_without_paying_twice(serve):
    server = serve(lambda number, body: "4" if number < 3 else error(500))
    first = judge_replies(make(server, retries=0), PAIRS)
    assert (first.calls, first.missing) == (3, 3)
    assert "500" in first.stopped
    server.answer = lambda number, body: "2"
    second = judge_replies(make(server), PAIRS)
    assert (second.calls, second.cached, second.tokens_in) == (3, 3, 150)
    assert second.grades.tolist() == [[4], [4], [4], [2], [2], [2]]
    third = judge_replies(make(server), PAIRS)
    assert (third.calls, third.cached, third.cost) == (0, 6, None)


def test_what_is_under_way_at_an_interrupt_is_kept(serve, monkeypatch):
    server = serve(lambda number, body: (time.sleep(0.0 if number == 0 else 0.3), "4")[1])

    def interrupted(iterable, **_):
        for item in iterable:
            yield item
            raise KeyboardInterrupt

    monkeypatch.setattr(judge, "progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judge_replies(make(server, concurrency=3), PAIRS)
    sent = len(server.bodies)
    assert sent < len(PAIRS)
    monkeypatch.setattr(judge, "progress", lambda iterable, **_: iterable)
    assert judge_replies(make(server), PAIRS).cached == sent


@pytest.mark.parametrize(
    "change", [{"model": "judge-2"}, {"temperature": 0.5}, {"reply_tokens": 9}, {"repeats": 2}, {"url": "/other/v1"}]
)
def test_another_judge_is_asked_again(serve, change):
    server = serve()
    judge_replies(make(server), PAIRS[:2])
    if "url" in change:
        change = {"url": server.url + change["url"]}
    found = judge_replies(make(server, **change), PAIRS[:2])
    assert found.calls == 2
    assert found.cached == (2 if "repeats" in change else 0)


def test_another_prompt_version_reply_or_question_is_asked_again(serve, monkeypatch):
    server = serve()
    judge_replies(make(server), PAIRS[:1])
    assert judge_replies(make(server), [(PAIRS[0][0], PAIRS[0][1] + " ")]).calls == 1
    assert judge_replies(make(server), [(PAIRS[0][0] + " ", PAIRS[0][1])]).calls == 1
    monkeypatch.setattr(judge, "PROMPT_VERSION", 2)
    assert judge_replies(make(server), PAIRS[:1]).calls == 1


def test_the_cache_holds_no_text_and_no_key(serve, tmp_path):
    judge_replies(make(serve(), cache=str(tmp_path / "deep" / "v.sqlite")), PAIRS)
    content = (tmp_path / "deep" / "v.sqlite").read_bytes()
    assert KEY.encode() not in content
    assert b"writer" not in content
    with sqlite3.connect(tmp_path / "deep" / "v.sqlite") as connection:
        assert connection.execute("SELECT count(*), min(text), sum(tokens_in) FROM verdicts").fetchone() == (
            6,
            "4",
            300,
        )


def test_a_cache_that_is_none(serve, tmp_path, monkeypatch):
    (tmp_path / "v").write_text("this is not a database, it is a note\n" * 40)
    with pytest.raises(UserError, match="cache of verdicts"):
        judge_replies(make(serve(), cache=str(tmp_path / "v")), PAIRS)
    with pytest.raises(UserError, match="cache of verdicts"):
        judge_replies(make(serve(), cache=str(tmp_path / "v" / "x")), PAIRS)
    monkeypatch.setenv("ALTER_CACHE", "off")
    server = serve()
    judge_replies(make(server), PAIRS[:1])
    assert judge_replies(make(server), PAIRS[:1]).cached == 0


# ---- settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "m"}, "needs `judge.url`"),
        ({"url": "http://h"}, "needs `judge.model`"),
        ({"url": "localhost:8000", "model": "m"}, "expected http"),
        ({"url": "http://me:secret@h/v1", "model": "m"}, "would end up in records"),
        ({"url": "http://h/v1?key=secret", "model": "m"}, "would end up in records"),
        ({"url": "http://h", "model": "m", "key_variable": "NO_SUCH_KEY"}, "NO_SUCH_KEY holds no API key"),
        ({"url": "http://h", "model": "m", "max_cost": 1.0, "price_in": 1.0}, "needs `judge.price_in` and"),
    ],
)
def test_settings_that_cannot_work(monkeypatch, settings, says):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        Judge(**settings).check()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "base"),
    [("http://h", "http://h/v1"), ("http://h:1/", "http://h:1/v1"), ("http://h/api/v3/", "http://h/api/v3")],
)
def test_a_bare_host_means_v1(url, base):
    assert Judge(url=url).base_url == base


def test_no_key_where_none_is_needed(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    Judge(url="http://h", model="m", key_variable=None).check()


# ---- alter judge


def test_saved_replies_are_graded_from_the_command_line(serve, tmp_path, capsys):
    server = serve(lambda number, body: str(1 + number))
    texts = {"questions": ["a", "b"], "generations": ["x", "y"]}
    saved = [Record("mine", "forget_rouge", 0.5, 2, extra=texts), Record("mine", "model_utility", 0.5, 2)]
    write_records(tmp_path / "r.json", saved)
    args = ["judge", "--file", str(tmp_path / "r.json"), "--judge.url", server.url, "--judge.model", "j"]
    assert cli.main([*args, "--judge.concurrency", "1", "--json", str(tmp_path / "g.json")]) == 0
    found = {record.metric: record for record in read_records(tmp_path / "g.json")}
    assert found["fluency_judge_mean"].value == 1.5
    assert found["fluency_judge_mean"].model == "mine"
    assert found["fluency_judge_mean"].extra["source_metric"] == "forget_rouge"
    assert KEY not in (tmp_path / "g.json").read_text()
    capsys.readouterr()

    assert cli.main(["judge", "--file", str(tmp_path / "r.json")]) == 2
    assert "Give the judge" in capsys.readouterr().err
    assert cli.main([*args, "--metric", "model_utility"]) == 2
    assert "has replies under forget_rouge; say which" in capsys.readouterr().err
    write_records(tmp_path / "r.json", saved[1:])
    assert cli.main(args) == 2
    assert "no metric; measure with `alter evaluate" in capsys.readouterr().err
