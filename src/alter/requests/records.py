"""Database records: an erasure request, an entry of its history, and the states that a request passes through."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from alter.core import UserError

EDGES: dict[str, tuple[str, ...]] = {
    "received": ("running", "withdrawn"),
    "running": ("trained", "failed", "received"),
    "trained": ("forgotten", "unproven", "not forgotten", "collapsed", "failed", "received"),
    "failed": ("running", "withdrawn"),
    "not forgotten": ("running", "withdrawn"),
    "collapsed": ("running", "withdrawn"),
    "forgotten": ("revoked", "distilled"),
    "unproven": ("revoked", "distilled"),
    "distilled": (),
    "revoked": (),
    "withdrawn": (),
}
"""Where a request may go from each state. `trained` has an adapter that was not measured yet; from there it goes to what
`alter.evaluation.verdict` says. Back to `received`: a run that was cut off before it took effect. `distilled`: the weights of
the base themselves have forgotten it, which nothing takes back."""


IN_FORCE = ("forgotten", "unproven")
"""States in which the adapter in force holds a request."""


HELD = (*IN_FORCE, "distilled")
"""States in which adapter or base in force have forgotten a request."""


MISSED = ("failed", "not forgotten", "collapsed")
"""States from which a request may be tried again."""


@dataclass(frozen=True)
class Request:
    """One erasure request as the database holds it.

    Attributes:
        id: number that the database gave it; `name` is how people write it, R-0007.
        subject: whom or what it is about, in the words of who received it.
        state: one of `EDGES`.
        received, due: ISO 8601; `received` with the time, in UTC, `due` a date or None.
        data: location of the rows to forget.
        data_hash: SHA-256 of their content; `row_hashes` of each row's, `rows` their number.
        text: the rows themselves, only if that was asked for.
        expert: the forget expert that holds the erasure, in the states of `IN_FORCE` and once revoked.
        run: record of the run (settings, versions, times, adapter version), from `trained` on.
        before, after: evidence; see `alter.requests.work`.
        salt: random; without it the hash of the columns, which stays in the history, says nothing of the subject.
    """

    id: int
    subject: str
    state: str
    received: str
    due: str | None
    data: str
    data_hash: str
    row_hashes: list[str]
    rows: int
    text: str | None
    expert: int | None
    run: dict[str, Any] | None
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    salt: str

    @property
    def name(self) -> str:
        """The request's printed id: R-0007."""
        return f"R-{self.id:04d}"


@dataclass(frozen=True)
class Entry:
    """One line of the history; `details` holds what changed, `request` is None where it is about the database."""

    number: int
    request: int | None
    at: str
    who: str
    what: str
    details: dict[str, Any]
    previous: str
    hash: str


def unnamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a run without those that name the forgotten, whom records and certificates are not to name."""
    return {name: value for name, value in settings.items() if name not in ("names", "other_names")}


def now() -> str:
    """Return the current time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def default_who() -> str:
    """Return the actor that the history names: user and machine."""
    import psutil

    return f"{psutil.Process().username()}@{socket.gethostname()}"


def parse_id(text: str) -> int:
    """Return the number in `7`, `R-7` or `R-0007`.

    Raises:
        UserError: it is none of these.
    """
    digits = text.upper().removeprefix("R-").lstrip("0") or "0"
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 19):
        raise UserError(f"{text!r} is not the id of a request; expected a form like R-0007 or 7.")
    return int(digits)


def check_due(text: str | None) -> str | None:
    """Return a due date after checking its form.

    Raises:
        UserError: it is not a date of the form 2026-12-31.
    """
    if text is not None:
        try:
            # newer Pythons also read 20261231 and 2026-W53-4
            formed = date.fromisoformat(text).isoformat() == text
        except ValueError:
            formed = False
        if not formed:
            raise UserError(f"`due` is {text!r}; expected a date of the form 2026-12-31.")
    return text
