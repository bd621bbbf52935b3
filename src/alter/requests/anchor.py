"""Heads of the history outside the database: a signed file that only grows, and certificates.

A database restored from an old copy, or cut at its end, is consistent in itself: its history just ends earlier. Any
later head that was kept elsewhere reveals it. The anchor is a file with one signed line per head: number of entries, hash
of the last one, time, and the hash of the line before, so that no line can be changed or taken out of its middle. Lines
cut at its end show beside a copy of the file or a certificate; keep it where the database's owner cannot write over it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from alter.core import UserError
from alter.requests.signing import Forged, Key, canonical, check, fingerprint, read_exact, read_signed
from alter.storage import from_json

FORM = "alter anchor"
VERSION = 1
"""Version of the lines; a newer one is refused."""


@dataclass(frozen=True)
class NotedHead:
    """A head of the history kept outside the database: number of entries, hash, time, where it was read, and the signer."""

    entries: int
    head: str
    at: str
    where: str
    key: str


class Anchor:
    """A signed file of heads to append to; one line for each change of the history."""

    def __init__(self, path: str | os.PathLike[str], key: Key) -> None:
        self.path, self.key = Path(path).expanduser(), key

    def refuse(self, history: Sequence[tuple[int, str]]) -> None:
        """Refuse a database whose history lacks a head of this file; an anchor file that does not exist yet has none.

        Args:
            history: number and hash of every entry, in order.

        Raises:
            UserError: says how the two differ, or what is wrong with the file.
        """
        if self.path.exists() and self.path.stat().st_size:
            wrong = missing_heads(read_heads(str(self.path), [self.key.public]), history)
            if wrong:
                raise UserError(
                    f"{wrong[0]} Nothing was done: `alter request verify --anchor {shlex.quote(str(self.path))}` says more."
                )

    def append(self, entries: int, head: str, at: str) -> None:
        """Append a head and flush it to disk; a head that is the last already, or of fewer entries, is skipped.

        Raises:
            UserError: the file is not one of anchors, was altered, is another key's, or cannot be written.
        """
        import fcntl

        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise UserError(f"The anchor {self.path} cannot be written: {error.strerror}.") from None
        # unbuffered: a failed write must not be retried on closing
        with os.fdopen(handle, "r+b", buffering=0) as file:
            # serialise commands that end at the same time
            fcntl.flock(file, fcntl.LOCK_EX)
            text = _whole_lines(file.read().decode(errors="replace"))
            known = _read_lines(text, str(self.path), [self.key.public])
            if known and known[-1].entries >= entries:
                return  # another command has appended it
            line = self.key.sign(
                {
                    "form": FORM,
                    "version": VERSION,
                    "entries": entries,
                    "head": head,
                    "at": at,
                    "previous": _hash(text.splitlines()[-1]) if known else "",
                }
            )
            self._write(file, len(text.encode()), canonical(line) + b"\n")

    def _write(self, file: FileIO, length: int, line: bytes) -> None:
        """Write a line at offset `length`, over the torn line of a process that was killed while it wrote."""
        try:
            file.truncate(length)
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                file.truncate(length)
            raise UserError(
                f"The anchor {self.path} cannot be written: {error.strerror}. The database holds what was done; the next "
                "command notes its head."
            ) from None


def _whole_lines(text: str) -> str:
    """Return the text without a torn last line: a line without its line end was never written completely."""
    return text[: text.rfind("\n") + 1]


def _hash(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()


def _read_lines(text: str, where: str, trusted: Sequence[str]) -> list[NotedHead]:
    found: list[NotedHead] = []
    previous = ""
    for number, line in enumerate(text.splitlines(), start=1):
        what = f"Line {number} of {where}"
        try:
            content = from_json(line)
        except ValueError:
            raise Forged(f"{what} is no JSON: it is cut off or was altered.") from None
        if not isinstance(content, dict) or content.get("form") != FORM:
            raise UserError(f"{where} is no anchor and no certificate: {what.lower()} is another thing.")
        _known_version(content, what)
        public = check(content, what)
        if canonical(content).decode() != line or content["previous"] != previous:
            raise Forged(f"{what} does not follow the one before: lines were changed or taken out.")
        _trust(public, trusted, what)
        if found and content["entries"] <= found[-1].entries:
            raise Forged(f"{what} goes back in the history.")
        found.append(NotedHead(int(content["entries"]), str(content["head"]), str(content["at"]), what, public))
        previous = _hash(line)
        # without a key that is known, all lines must at least be of one
        trusted = trusted or [public]
    return found


def _known_version(content: dict[str, Any], what: str) -> None:
    if content.get("version") != VERSION:
        raise UserError(
            f"{what} is of version {content.get('version')!r}, this alter knows {VERSION}: update it with "
            '`pip install --upgrade "alter-unlearning"`.'
        )


def _trust(public: str, trusted: Sequence[str], what: str) -> None:
    if trusted and public not in trusted:
        raise Forged(
            f"{what} is signed by another key ({fingerprint(public)}) than the one to trust "
            f"({', '.join(map(fingerprint, trusted))})."
        )


def read_heads(path: str, trusted: Sequence[str] = ()) -> list[NotedHead]:
    """Read the heads of an anchor file, or the one that a certificate names.

    Args:
        path: the file.
        trusted: public keys, one of which must have signed; without any, all lines must be of one key.

    Raises:
        UserError: there is no such file, it is neither, it is of a newer version, or it was altered.
    """
    text = read_exact(path)
    if not text.strip():
        raise UserError(f"{path} is empty: an anchor has at least one line. Was it cut?")
    if not text.startswith("{\n"):
        return _read_lines(_whole_lines(text) or text, path, trusted)
    content = read_signed(text, path)
    _trust(content["key"], trusted, path)
    history = content.get("history")
    if not isinstance(history, dict):
        raise UserError(f"{path} is a certificate of a run without requests: it names no head of a history.")
    return [NotedHead(int(history["entries"]), str(history["head"]), str(content["issued"]), path, content["key"])]


def missing_heads(heads: Sequence[NotedHead], history: Sequence[tuple[int, str]]) -> list[str]:
    """Compare a history with heads kept elsewhere; return the contradictions as sentences, none if it holds them all.

    Args:
        heads: as `read_heads` gives them.
        history: number and hash of every entry, in order.
    """
    known = dict(history)
    wrong = []
    for head in heads:
        if known.get(head.entries) == head.head:
            continue
        if head.entries > len(known):
            wrong.append(
                f"The database is older than {head.where}: that names {head.entries} entries of the history on {head.at}, "
                f"there are {len(known)}. It was restored from an old copy, or cut at its end."
            )
        else:
            wrong.append(
                f"Entry {head.entries} of the history is not the one that {head.where} names: it was written anew."
            )
        # what follows the first difference differs as well
        break
    return wrong
