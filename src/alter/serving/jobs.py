"""One answer to generate: its prompt, its settings, and its tokens' probabilities."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from alter.core import UserError

Finish = Literal["stop", "length", "timeout", "cancelled", "error"]


@dataclass(frozen=True)
class Scored:
    """A token's probability.

    Attributes:
        token: its id.
        logprob: natural log of its probability where it stands; None for the first token of all.
        top: the likeliest tokens there with theirs, best first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Job:
    """One answer to generate, and where its pieces go.

    Attributes:
        ids: tokens of the prompt.
        max_tokens: most new tokens; 0 only scores the prompt.
        temperature: 0 takes the likeliest token.
        top_p: share of the probability that sampling keeps.
        stop: texts before which the answer ends.
        seed: of its own random numbers.
        put: takes each new piece of text, then `None`; called from the engine's thread.
        deadline: `time.monotonic()` at which it is cut off.
        logprobs: how many of the likeliest tokens to tell beside each token; None tells no probabilities.
        echo: tell the probabilities of the prompt's tokens as well.
        strip: leave out white space at both ends of the answer.
        cancelled: set by others: nobody waits for it any more.
        finish: why it has ended; None before.
        error: what went wrong, if `finish` is "error".
        tokens: of the answer so far, without the one that ended it.
        text: of the answer so far.
        sent: what of the text `put` has got.
        prompt_scored, scored: probabilities of the prompt's tokens and of the new ones, the ending token included.
        certain: how many of `scored` no stop text can take back.
    """

    ids: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    seed: int
    put: Callable[[str | None], None]
    deadline: float = float("inf")
    logprobs: int | None = None
    echo: bool = False
    strip: bool = False
    cancelled: bool = False
    finish: Finish | None = None
    error: str | None = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    sent: str = ""
    prompt_scored: list[Scored] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    certain: int = 0

    def send(self, text: str, last: bool = False) -> None:
        """Send what is new in `text`, the beginning of the answer; a restarted job first catches up with what was sent.

        Raises:
            UserError: it does not continue what was sent.
        """
        if not (text.startswith(self.sent) or (self.sent.startswith(text) and not last)):
            raise UserError("The answer was begun with another text, and what was sent cannot be taken back.")
        if len(text) > len(self.sent):
            self.put(text[len(self.sent) :])
            self.sent = text

    def close(self, why: Finish, error: str | None = None) -> None:
        """Finish the answer, and send the rest of its text.

        Raises:
            UserError: see `send`.
        """
        if self.strip:
            self.text = self.text.strip()
        if why in ("cancelled", "timeout") and self.sent.startswith(self.text):
            # a restarted job that has not caught up ends where it was
            self.text = self.sent
        if error is None:
            self.send(self.text, last=True)
        self.finish, self.error = why, error
        self.put(None)

    def over(self) -> bool:
        """Close the job if it was cancelled or its time is up; return whether it has ended."""
        if self.finish is None and self.cancelled:
            self.close("cancelled")
        elif self.finish is None and time.monotonic() > self.deadline:
            self.close("timeout")
        return self.finish is not None

    def restart(self) -> None:
        """Start generation over; what was sent stays sent."""
        self.tokens, self.text, self.prompt_scored, self.scored, self.certain = [], "", [], [], 0
