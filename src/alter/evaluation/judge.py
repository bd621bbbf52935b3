"""A language model as judge of fluency, behind any OpenAI-compatible endpoint: grades 1 to 5, with limits on the cost.

Flu-mean and Flu-var of the ALTER paper (arXiv:2603.01792) are grades by GPT-4o, "average of 5 responses" on a scale of
1 to 5. Our readings, since neither the prompt nor the definition is published: the prompt below is our own; the five
responses are five sampled replies of the model to each prompt, graded once each (`repeats` grades one reply several
times instead); Flu-mean is the mean and Flu-var the population variance of all grades together.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from alter.core import Array, UserError, progress
from alter.evaluation.grading import PROMPT_VERSION, Graded, Unusable, ask_judge, bound, estimate, grade
from alter.settings import Count, Rows, Tokens
from alter.storage import cache_folder

EMPTY_GRADE = 1
"""An empty reply is the scale's "unreadable": it gets this grade without a call."""
REFUSED_AT_ONCE = 5
"""So many requests refused as bad before any verdict: the settings are wrong, not the texts."""


class Judge(BaseModel):
    """The judge that grades replies: endpoint, retries, and limits on the cost."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    url: str | None = None
    """OpenAI-compatible endpoint, https://api.openai.com/v1 for instance; /v1 is added to a bare host. None: no judge."""
    model: str | None = None
    """Name of the judge at that endpoint."""
    key_variable: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the API key; None for an endpoint without keys."""
    repeats: Count = Field(1, ge=1)
    """Verdicts asked for each reply."""
    temperature: float | None = Field(0.0, ge=0)
    """Sampling temperature of the judge; None leaves it out of the request, for models that refuse the parameter."""
    reply_tokens: Tokens = Field(8, ge=1)
    """Longest verdict."""
    timeout: float = Field(60.0, gt=0)
    """Seconds that one attempt may take."""
    retries: Count = Field(5, ge=0)
    """New attempts after 429, 5xx, a time-out or a lost connection."""
    concurrency: Count = Field(4, ge=1)
    """Requests under way at a time."""
    max_tokens: Rows | None = Field(2_000_000, ge=1)
    """Most tokens, in and out together, that one run may use; None: no limit."""
    max_cost: float | None = Field(None, gt=0)
    """Most money that one run may cost, in the currency of the prices; needs both."""
    price_in: float | None = Field(None, ge=0)
    """Price of a million tokens sent."""
    price_out: float | None = Field(None, ge=0)
    """Price of a million tokens received."""
    cache: str | None = None
    """SQLite file of verdicts, which are never paid twice; by default judge.sqlite in ALTER_CACHE or ~/.cache/alter."""

    @property
    def wanted(self) -> bool:
        """Whether a judge is configured."""
        return self.url is not None

    def check(self) -> None:
        """Find mistakes in the settings, before anything is loaded or sent.

        Raises:
            UserError: no model, not a URL, no key in the environment, no prices for a limit, or no `openai` library.
        """
        if self.url is None:
            if self.model is not None:
                raise UserError(f"`judge.model` {self.model!r} needs `judge.url`, where that model answers.")
            return
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"`judge.url` is {self.url!r}; expected http:// or https:// and a host.")
        if parts.username or parts.password or parts.query:
            raise UserError(
                "`judge.url` holds a user, a password or a query, which would end up in records; "
                "put the key into an environment variable and name it with `judge.key_variable`."
            )
        if not self.model:
            raise UserError("`judge.url` needs `judge.model`, the name of the judge at that endpoint.")
        if self.key_variable is not None and not os.environ.get(self.key_variable):
            raise UserError(
                f"The environment variable {self.key_variable} holds no API key: export it, name another with "
                "`judge.key_variable`, or `judge.key_variable` None for an endpoint without keys."
            )
        if self.max_cost is not None and (self.price_in is None or self.price_out is None):
            raise UserError("`judge.max_cost` needs `judge.price_in` and `judge.price_out`, per million tokens.")
        try:
            import openai  # noqa: F401
        except ImportError:
            raise UserError('A judge needs the openai library: pip install "alter-unlearning[judge]".') from None

    @property
    def base_url(self) -> str:
        """The endpoint as the library takes it."""
        assert self.url is not None
        return self.url.rstrip("/") + ("" if urlsplit(self.url).path.strip("/") else "/v1")

    def cost(self, tokens_in: int, tokens_out: int) -> float | None:
        """Return what so many tokens cost, or None without prices."""
        if self.price_in is None or self.price_out is None:
            return None
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def within(self, tokens_in: int, tokens_out: int) -> bool:
        """Tell whether this many tokens stay within both limits."""
        cost = self.cost(tokens_in, tokens_out)
        return (self.max_tokens is None or tokens_in + tokens_out <= self.max_tokens) and (
            self.max_cost is None or cost is None or cost <= self.max_cost
        )


# The cache -----------------------------------------------------------------------------------------------------------


def _key(judge: Judge, prompt: str, reply: str, repeat: int) -> str:
    """Return the key of a verdict: everything that it depends on, texts only as this hash, so that the cache holds
    nothing forgotten.
    """
    parts = [PROMPT_VERSION, judge.base_url, judge.model, judge.temperature, judge.reply_tokens, prompt, reply, repeat]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@contextmanager
def _verdicts(judge: Judge) -> Iterator[sqlite3.Connection]:
    """Open the cache of verdicts, which commits each row by itself."""
    folder = cache_folder()
    path = Path(judge.cache).expanduser() if judge.cache else None if folder is None else folder / "judge.sqlite"
    try:
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise sqlite3.OperationalError(str(error)) from None
        with closing(sqlite3.connect(":memory:" if path is None else path, timeout=30)) as connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, text TEXT, tokens_in INT, tokens_out INT)"
            )
            yield connection
    except sqlite3.Error as error:
        raise UserError(f"Cannot use {path} as the cache of verdicts: {error}. Give another `judge.cache`.") from None


# All verdicts --------------------------------------------------------------------------------------------------------


@dataclass
class Grades:
    """Grades of n replies, and the calls and tokens that they took.

    Attributes:
        grades: [n, repeats]; NaN where there is none.
        empty: replies graded `EMPTY_GRADE` without a call.
        unparsed: verdicts without a grade, `examples` the first of them.
        refused: requests that the endpoint refused as bad (a content filter, for instance), `reasons` the first.
        missing: verdicts not asked for or not received because the run stopped; `stopped` says why.
        calls, cached: verdicts received now, and taken from the cache.
        tokens_in, tokens_out: used now; `counted` is False if a part had to be estimated.
        cost: of them, None without prices.
    """

    grades: Array
    empty: int = 0
    unparsed: int = 0
    refused: int = 0
    missing: int = 0
    calls: int = 0
    cached: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    counted: bool = True
    cost: float | None = None
    stopped: str | None = None
    examples: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def note(self) -> list[str]:
        """Return what a reader must know besides the numbers, in full sentences."""
        notes = []
        if self.stopped is not None:
            notes.append(
                f"Judging stopped: {self.stopped}. {self.missing} verdicts are missing; those received are kept."
            )
        if self.unparsed:
            shown = ", ".join(map(repr, self.examples))
            notes.append(f"{self.unparsed} verdicts were no grade from 1 to 5 and do not count: {shown}.")
        if self.refused:
            notes.append(f"The judge refused {self.refused} replies, which do not count: {'; '.join(self.reasons)}.")
        if not self.counted:
            notes.append("The endpoint did not report all tokens: their number and cost are partly estimates.")
        return notes


def judge_replies(judge: Judge, pairs: Sequence[tuple[str, str]]) -> Grades:
    """Have each (prompt, reply) graded, `judge.repeats` times; equal pairs are asked once.

    Verdicts are written to the cache as they come in: whatever ends the run, what was received is not asked again. An
    empty reply gets `EMPTY_GRADE` without a call. A run that reaches a limit, or whose endpoint fails, stops and returns
    what there is, with the reason in `stopped`. Limits count this run's requests; one is sent only if even its
    largest possible size (`bound`) is within them, so they are not exceeded.

    Raises:
        UserError: settings (see `Judge.check`); the estimate of the calls to make exceeds a limit (nothing is sent); or
            there is not a single verdict because of the endpoint: wrong key, unknown model, not reachable.
    """
    judge.check()
    result = Grades(np.full((len(pairs), judge.repeats), np.nan))
    waiting: dict[str, list[tuple[int, int]]] = {}
    for i, (prompt, reply) in enumerate(pairs):
        if not reply.strip():
            result.grades[i] = EMPTY_GRADE
            result.empty += 1
            continue
        for repeat in range(judge.repeats):
            waiting.setdefault(_key(judge, prompt, reply, repeat), []).append((i, repeat))

    def settle(key: str, text: str | None) -> None:
        found = grade(text)
        for place in waiting[key]:
            if found is None:
                result.unparsed += 1
                if len(result.examples) < 3:
                    result.examples.append((text or "")[:60])
            else:
                result.grades[place] = found

    with _verdicts(judge) as cache:
        known = {}
        for key in waiting:
            row = cache.execute("SELECT text FROM verdicts WHERE key = ?", (key,)).fetchone()
            if row is not None:
                known[key] = row[0]
        for key, text in known.items():
            settle(key, text)
            result.cached += len(waiting[key])
        asked = [(key, *pairs[places[0][0]]) for key, places in waiting.items() if key not in known]
        if asked:
            _check_estimate(judge, asked)
            _Round(judge, cache, settle, waiting, result).ask(asked)
    result.cost = judge.cost(result.tokens_in, result.tokens_out)
    return result


def _check_estimate(judge: Judge, asked: Sequence[tuple[str, str, str]]) -> None:
    tokens_in, tokens_out = sum(estimate(p, r) for _, p, r in asked), judge.reply_tokens * len(asked)
    if judge.within(tokens_in, tokens_out):
        return
    cost = judge.cost(tokens_in, tokens_out)
    price = "" if cost is None else f", {cost:.4g} in money"
    limits = {"`judge.max_tokens`": judge.max_tokens, "`judge.max_cost`": judge.max_cost}
    told = ", ".join(f"{name} {value:g}" for name, value in limits.items() if value is not None)
    raise UserError(
        f"{len(asked)} verdicts would take about {tokens_in + tokens_out} tokens{price}, above the limit ({told}): "
        "nothing was sent. Raise the limit, or grade fewer replies."
    )


class _Round:
    """The requests of one run: sent `judge.concurrency` at a time, each verdict kept as it comes in.

    Args:
        judge: who is asked.
        cache: where verdicts are kept.
        settle: told each verdict's key and text.
        waiting: places in `result.grades` by key.
        result: filled in.
    """

    def __init__(
        self,
        judge: Judge,
        cache: sqlite3.Connection,
        settle: Callable[[str, str | None], None],
        waiting: Mapping[str, Sequence[tuple[int, int]]],
        result: Grades,
    ) -> None:
        self.judge, self.cache, self.settle, self.waiting, self.result = judge, cache, settle, waiting, result
        self.stop = threading.Event()
        self.under_way: dict[Future[Graded], tuple[str, int]] = {}
        self.failed: str | None = None

    def ask(self, asked: Sequence[tuple[str, str, str]]) -> None:
        """Send all requests (key, prompt, reply) that the limits and the endpoint allow.

        Raises:
            UserError: there is not a single verdict because of the endpoint.
        """
        import openai

        judge, result = self.judge, self.result
        client = openai.OpenAI(
            base_url=judge.base_url,
            api_key=os.environ[judge.key_variable] if judge.key_variable else "none",
            timeout=judge.timeout,
            max_retries=0,
        )
        with client, ThreadPoolExecutor(judge.concurrency) as pool:
            try:
                for _ in progress(self._run(client, pool, asked), total=len(asked), label="judging"):
                    pass
            finally:
                # however it ends, what is under way is paid for: keep it; but nobody waits for new attempts
                self.stop.set()
                while self.under_way:
                    list(self._take())
        if self.failed is not None:
            result.stopped = f"{judge.base_url}: {self.failed}"
            if result.calls == 0 and result.cached == 0:
                raise UserError(f"The judge at {judge.base_url} cannot be used: {self.failed}.")
        result.missing = sum(map(len, self.waiting.values())) - result.unparsed - result.refused
        result.missing -= int(np.isfinite(result.grades).sum()) - result.empty * judge.repeats

    def _run(self, client: Any, pool: ThreadPoolExecutor, asked: Sequence[tuple[str, str, str]]) -> Iterator[str]:
        """Submit requests until all are sent, a limit is reached or the endpoint fails; yield finished keys."""
        queue = list(reversed(asked))
        while (queue or self.under_way) and self.failed is None:
            while queue and len(self.under_way) < self.judge.concurrency and self._fits(*queue[-1][1:]):
                key, prompt, reply = queue.pop()
                future = pool.submit(ask_judge, client, self.judge, prompt, reply, self.stop)
                self.under_way[future] = (key, bound(prompt, reply))
            if not self.under_way:
                self.result.stopped = "the limit on tokens or cost is reached (`judge.max_tokens`, `judge.max_cost`)"
                return
            yield from self._take()

    def _fits(self, prompt: str, reply: str) -> bool:
        """Tell whether one more request, at its largest size beside those in flight, stays within the limits."""
        reserved = sum(tokens for _, tokens in self.under_way.values())
        requests = len(self.under_way) + 1
        return self.judge.within(
            self.result.tokens_in + reserved + bound(prompt, reply),
            self.result.tokens_out + requests * self.judge.reply_tokens,
        )

    def _take(self) -> Iterator[str]:
        """Wait for at least one verdict, store the verdicts that arrived, and yield the finished keys."""
        done, _ = wait(self.under_way, return_when=FIRST_COMPLETED)
        for future in done:
            key, _ = self.under_way.pop(future)
            try:
                verdict = future.result()
            except Unusable as error:
                self.failed = self.failed or str(error)
                self.stop.set()
                continue
            self._keep(key, verdict)
            yield key

    def _keep(self, key: str, verdict: Graded) -> None:
        result = self.result
        result.tokens_in += verdict.tokens_in
        result.tokens_out += verdict.tokens_out
        result.counted &= verdict.counted
        if verdict.refused is not None:
            result.refused += len(self.waiting[key])
            if len(result.reasons) < 3:
                result.reasons.append(verdict.refused)
            if result.calls == 0 and result.refused >= REFUSED_AT_ONCE:
                self.failed = self.failed or f"it refuses every request: {verdict.refused}"
                self.stop.set()
            return
        result.calls += 1
        row = (key, verdict.text, verdict.tokens_in, verdict.tokens_out)
        with self.cache:
            self.cache.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?)", row)
        self.settle(key, verdict.text)
