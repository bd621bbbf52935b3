"""One judge verdict: the prompt, the request with its retries, and the grade parsed from the reply."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alter.evaluation.judge import Judge

PROMPT_VERSION = 1
"""Part of every cached verdict's key: raise it with any change of the two texts below."""
SYSTEM = (
    "You grade the fluency of a text. Ignore whether it is true or answers the question. "
    "1 = unreadable or repetitive noise; 2 = mostly broken; 3 = understandable with clear errors; "
    "4 = good with small slips; 5 = natural and coherent. Reply with one digit."
)
USER = "Question: {prompt}\nResponse: {reply}"
BACKOFF = 1.0
"""Seconds before the first retry where the endpoint does not say; doubled each time."""
LONGEST_WAIT = 120.0
"""Longest wait in seconds that an endpoint may ask for before the run gives up on it."""


def messages(prompt: str, reply: str) -> list[dict[str, str]]:
    """Return the chat messages sent to the judge."""
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": USER.format(prompt=prompt, reply=reply)},
    ]


def grade(verdict: str | None) -> int | None:
    """Parse the grade in a verdict; None if there is none, or more than one.

    All numbers of the verdict must be one whole number from 1 to 5, apart from the scale in "4/5" or "4 out of 5":
    "4", "Grade: 4.", "4/5" are grades; "4.5", "10", "between 3 and 4" and "fine" are none.
    """
    text = re.sub(r"(?<=\d)\s*(/|out of)\s*5\b", "", verdict or "")
    numbers = set(re.findall(r"-?\d+(?:[.,]\d+)*", text))
    return int(numbers.pop()) if len(numbers) == 1 and numbers <= set("12345") else None


def estimate(prompt: str, reply: str) -> int:
    """Estimate the tokens of a request: one per three bytes, and 16 for the chat format.

    English has about one token per four bytes, so the estimate is high, except for noise.
    """
    return -(-len((SYSTEM + USER.format(prompt=prompt, reply=reply)).encode()) // 3) + 16


def bound(prompt: str, reply: str) -> int:
    """Return an upper bound on the tokens of a request: one per byte, and 16 for the chat format."""
    return len((SYSTEM + USER.format(prompt=prompt, reply=reply)).encode()) + 16


@dataclass(frozen=True)
class Graded:
    """The answer to one request: the judge's text and its grade (None: unparsed), or why there is none.

    `tokens_in` and `tokens_out` are what the endpoint reported, or estimates if it reported nothing (`counted`).
    """

    text: str | None
    grade: int | None
    tokens_in: int
    tokens_out: int
    counted: bool = True
    refused: str | None = None


class Unusable(Exception):
    """The endpoint cannot be used now or with these settings; the message says why."""


def _pause(error: Any, attempt: int) -> float:
    """Return the seconds to wait before the next attempt: the endpoint's Retry-After, else doubled each time."""
    response = getattr(error, "response", None)
    said = response.headers.get("retry-after") if response is not None else None
    if said:
        try:
            return max(0.0, float(said))
        except ValueError:
            try:
                return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
            except ValueError:
                pass
    doubled: float = BACKOFF * 2**attempt
    return doubled


def _said(error: Any) -> str:
    """Return the endpoint's error message as one short line."""
    return " ".join(str(getattr(error, "message", error)).split())[:300]


def ask_judge(client: Any, judge: Judge, prompt: str, reply: str, stop: threading.Event) -> Graded:
    """Ask for one verdict; retry after 429, 5xx, time-outs and lost connections.

    Raises:
        Unusable: wrong key, unknown model or address, no money left, or still no answer after all attempts.
    """
    import openai

    request: dict[str, Any] = {"model": judge.model, "messages": messages(prompt, reply)}
    request["max_tokens"] = judge.reply_tokens
    if judge.temperature is not None:
        request["temperature"] = judge.temperature
    # an attempt that timed out may be billed all the same
    lost = 0
    for attempt in range(judge.retries + 1):
        try:
            answer = client.chat.completions.create(**request)
            text = answer.choices[0].message.content if answer.choices else None
            used = answer.usage
            if used is None:
                return Graded(text, grade(text), estimate(prompt, reply) + lost, judge.reply_tokens, counted=False)
            return Graded(text, grade(text), used.prompt_tokens + lost, used.completion_tokens, counted=not lost)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            where = f"in {judge.key_variable}" if judge.key_variable else "(none was sent)"
            raise Unusable(f"it refuses the API key {where}: {_said(error)}") from None
        except openai.NotFoundError as error:
            raise Unusable(f"it knows no model {judge.model!r}, or the address is wrong: {_said(error)}") from None
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return Graded(None, None, lost, 0, refused=_said(error))
        except (
            openai.RateLimitError,
            openai.APITimeoutError,
            openai.APIConnectionError,
            openai.APIStatusError,
        ) as error:
            status = getattr(error, "status_code", None)
            if isinstance(error, openai.RateLimitError) and error.code == "insufficient_quota":
                raise Unusable(f"the account has no money left: {_said(error)}") from None
            if status is not None and status not in (408, 409, 429) and status < 500:
                raise Unusable(f"it answers {status}: {_said(error)}") from None
            if isinstance(error, openai.APITimeoutError):
                lost += estimate(prompt, reply)
                said = f"no answer within {judge.timeout:g} s"
            else:
                said = f"{status}: {_said(error)}" if status is not None else f"no connection ({_said(error)})"
            seconds = _pause(error, attempt)
            if attempt == judge.retries:
                raise Unusable(f"{said}, after {attempt + 1} attempts") from None
            if seconds > LONGEST_WAIT:
                raise Unusable(f"{said}; it asks to wait {seconds:.0f} s") from None
            if stop.wait(seconds):
                raise Unusable("interrupted") from None
        except openai.APIError as error:
            raise Unusable(f"it does not answer as an OpenAI-compatible endpoint does: {_said(error)}") from None
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise Unusable(f"it does not answer as an OpenAI-compatible endpoint does ({error})") from None
    raise AssertionError("every attempt returns or raises")
