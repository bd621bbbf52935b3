"""Work spread over forks of a process: the results of one process, and nothing left behind whatever ends it."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import children
from alter import inference
from alter.core import UserError, forked, passing, processes, silent
from alter.data.encoding import Encoded
from alter.evaluation import tofu_metrics
from alter.groundwork.frozen import Needs, trace_rows
from alter.models import load_model
from pico import PAD, byte_tokenizer, pico
from test_adapter import adapted, tiny
from test_distributed import _rows, measured
from test_sharing import answers

TWO = 2


@pytest.fixture
def two_threads(monkeypatch):
    """As with two threads, of which this process keeps one: so numbers are equal to the bit."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: TWO)
    forks = []
    before = os.fork

    def fork():
        forks.append(before())
        return forks[-1]

    monkeypatch.setattr(os, "fork", fork)
    yield forks
    assert not {child.pid for child in psutil.Process().children()} & set(forks)


def test_forks_measure_what_one_process_does(two_threads):
    expected = measured()
    assert not two_threads
    with processes.together(""):
        found = measured()
    # scores, hidden states and both kinds of replies; gradients are of one process
    assert len(two_threads) == 4 * TWO
    for name, one in expected.items():
        for mine, theirs in zip(found[name], one, strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=name)


def test_replies_follow_seeds_not_forks(two_threads):
    prompts, asked = [[65, 66, 67], [70, 71]] * 3, {"max_new_tokens": 5, "batch_size": 4, "progress": False}
    one = inference.sample(pico(), byte_tokenizer(), prompts, 2, seed=3, **asked)
    with forked.allowed():
        assert inference.sample(pico(), byte_tokenizer(), prompts, 2, seed=3, **asked) == one
    assert two_threads


def test_forks_trace_what_one_process_does(two_threads):
    rows, model = _rows() * 40, adapted(tiny())
    rows = [Encoded([token % model.config.vocab_size for token in row.input_ids], row.labels, 1) for row in rows]
    asked = {"pad_token_id": 0, "features": True, "gates": True, "reference_k": 3, "needs": Needs(views=("base",))}
    one = trace_rows(model, rows, **asked)
    with forked.allowed():
        two = trace_rows(model, rows, **asked)
        taken = []
        trace_rows(model, rows, **asked, take=lambda i, states: taken.append(i))
    assert len(two_threads) == TWO
    for mine, theirs in zip(one, two, strict=True):
        assert torch.equal(mine.entropy, theirs.entropy)
        assert torch.equal(mine.features, theirs.features)
        assert torch.equal(mine.gates, theirs.gates)
        assert torch.equal(mine.reference.logp, theirs.reference.logp)


def test_forks_score_the_base_and_the_adapted_model_as_one_process_does(two_threads):
    model = adapted(tiny()).eval()
    rows = answers(high=model.config.vocab_size)
    asked = {"pad_token_id": 0, "batch_tokens": 30, "progress": False}
    one = inference.score_beside_base(model, rows, **asked)
    with forked.allowed():
        two = inference.score_beside_base(model, rows, **asked)
    assert len(two_threads) == TWO
    for mine, theirs in zip(one, two, strict=True):
        assert [values.tolist() for values in mine.logprob] == [values.tolist() for values in theirs.logprob]


def test_a_benchmark_gives_the_same_records(two_threads):
    model, tokenizer = load_model("builtin:tofu-mini/retrained", device="cpu")
    one = tofu_metrics(model, tokenizer, limit=3, progress=False).records("retrained")
    with forked.allowed():
        two = tofu_metrics(model, tokenizer, limit=3, progress=False).records("retrained")
    assert len(two_threads) >= TWO
    assert repr(one) == repr(two)


@pytest.mark.parametrize("allowed", [0, 1])
def test_what_the_system_refuses_is_done_by_fewer(two_threads, monkeypatch, allowed):
    before = os.fork

    def fork():
        if len(two_threads) >= allowed:
            raise BlockingIOError("Resource temporarily unavailable")
        return before()

    monkeypatch.setattr(os, "fork", fork)
    found = list(forked.mapped(range(5), lambda i: (i, os.getpid()), TWO))
    assert [i for i, _ in found] == list(range(5))
    assert {pid for _, pid in found} == (set(two_threads) or {os.getpid()})


def test_items_are_handed_out_as_forks_get_done(two_threads):
    def work(i):
        time.sleep(0.5 if i == 0 else 0.0)
        return i, os.getpid()

    found = list(forked.mapped(range(20), work, TWO))
    assert [i for i, _ in found] == list(range(20))
    assert {pid for _, pid in found} == set(two_threads)
    assert len({pid for _, pid in found[1:]}) == 1


def test_one_process_where_forks_would_not_help(two_threads, monkeypatch):
    model, items = pico(), 6
    assert forked.number(items, model) == 1, "not asked for"
    with forked.allowed():
        assert forked.number(items, model) == TWO
        assert forked.number(1, model) == 1
        assert forked.number(items, pico().to("meta")) == 1
        for thing, name, value in (
            (torch, "get_num_threads", lambda: 1),
            (torch, "get_num_threads", lambda: items + 1),
            (forked, "ROOM", psutil.virtual_memory().available),
            (torch.cuda, "is_initialized", lambda: True),
            (forked, "SMALL", 10),
            (sys, "platform", "darwin"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(thing, name, value)
                assert forked.number(items, model) == 1, name
        # a fork forks nothing
        assert set(forked.mapped(range(4), lambda _: forked.number(items, model), TWO)) == {1}
    with silent(), processes.together(""):
        assert forked.number(items, model) == 1, "a process of others"


# Ends ----------------------------------------------------------------------------------------------------------------


def test_the_error_of_the_earliest_item_is_raised(two_threads):
    def work(i):
        if i == 1:
            time.sleep(0.3)
        if i in (1, 2):
            raise UserError(f"row {i}")
        return i

    seen = []
    with pytest.raises(UserError, match="row 1"):
        seen.extend(iter(forked.mapped(range(9), work, TWO)))
    assert seen == [0]


class Unreadable(Exception):
    def __init__(self, one, other):
        super().__init__(one + other)


@pytest.mark.parametrize("error", [Unreadable("a", "b"), ValueError(lambda: 0)], ids=["reading", "writing"])
def test_an_error_that_cannot_be_sent_is_told(two_threads, error):
    def work(_):
        raise error

    with pytest.raises(RuntimeError, match=type(error).__name__):
        list(forked.mapped(range(3), work, TWO))


def test_an_error_of_a_row_is_that_of_one_process(two_threads):
    model = pico()
    model.lm_head.weight.data[:] = float("nan")
    with forked.allowed(), pytest.raises(UserError, match="Row 3"):
        inference.score(model, _rows(), pad_token_id=PAD, batch_tokens=40, progress=False)


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was ended by SIGKILL"),
        (lambda: os._exit(7), "ended with status 7"),
        (lambda: sys.exit(0), "ended with status 1"),
    ],
)
def test_a_fork_that_dies_is_an_error_that_says_why(two_threads, end, how):
    def work(i):
        if i == 5:
            end()
        return i

    with pytest.raises(UserError, match=f"{how} before it was done.*OMP_NUM_THREADS=1") as raised:
        list(forked.mapped(range(9), work, TWO))
    # a comparison records what a run refuses, and runs again what the system ended
    assert passing(raised.value)


def test_a_fork_whose_status_nobody_keeps(two_threads):
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert list(forked.mapped(range(4), lambda i: i, TWO)) == [0, 1, 2, 3]
        with pytest.raises(UserError, match="the work ended before"):
            list(forked.mapped(range(4), lambda _: os._exit(0), TWO))
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_what_is_not_read_to_the_end_leaves_no_process(two_threads):
    found = forked.mapped(range(9), lambda i: i, TWO)
    assert next(found) == 0
    found.close()


@pytest.fixture
def interruptible():
    """Take interrupts as in a terminal, children too: a suite that was started in the background ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_comes_before_the_wait_is_seen(two_threads, interruptible):
    # a thread of its own takes the signal, so that the system's wait is not broken off, as where it comes just before
    timer = threading.Timer(0.5, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT))
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(forked.mapped(range(4), lambda _: time.sleep(60), TWO))
    assert time.monotonic() - started < 30
    timer.join()


WORK = """
import sys, time
import torch
from alter import cli
from alter.core import forked

def work(i):
    open(f"{i}.begun", "w").close()
    time.sleep(600)

cli._run = lambda *_: list(forked.mapped(range(8), work, 2))
sys.exit(cli.main(["evaluate"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_outlives_the_process_that_forked(tmp_path, number, interruptible):
    child = children.Child(code=WORK, cwd=tmp_path)
    _wait(lambda: len(list(Path(tmp_path).glob("*.begun"))) == TWO)
    forks = psutil.Process(child.pid).children()
    assert len(forks) == TWO
    # a terminal sends an interrupt to all of them
    for pid in [fork.pid for fork in forks] * (number == signal.SIGINT) + [child.pid]:
        os.kill(pid, number)
    assert child.wait(60) == (130 if number == signal.SIGINT else -number)
    _wait(lambda: not any(fork.is_running() and fork.status() != psutil.STATUS_ZOMBIE for fork in forks))
    if number == signal.SIGINT:
        assert child.stderr == "alter: interrupted\n"


def _wait(done):
    until = time.monotonic() + 120
    while not done():
        assert time.monotonic() < until
        time.sleep(0.02)
