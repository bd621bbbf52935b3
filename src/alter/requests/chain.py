"""The history's hash chain: entries that hold the hash of the one before, and of all columns of their request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sql

from alter.requests.records import now
from alter.requests.tables import HISTORY, REQUESTS, request_row


def entry_hash(number: int, request: int | None, at: str, who: str, what: str, details: str, previous: str) -> str:
    """Return the SHA-256 of a history entry, including the hash of the entry before it."""
    content = json.dumps([number, request, at, who, what, details, previous], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def record_hash(columns: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all columns of a request."""
    content = {name: columns[name] for name in sorted(column.name for column in REQUESTS.columns)}
    return hashlib.sha256(json.dumps(content, ensure_ascii=True, sort_keys=True).encode()).hexdigest()


def last_entry(connection: sql.Connection) -> tuple[int, str]:
    """Return number and hash of the last entry of the history; 0 and "" where there is none."""
    query = sql.select(HISTORY.c.number, HISTORY.c.hash).order_by(HISTORY.c.number.desc()).limit(1)
    row = connection.execute(query).one_or_none()
    return (0, "") if row is None else (row[0], row[1])


def append_entry(
    connection: sql.Connection, request: int | None, who: str, what: str, details: Mapping[str, Any]
) -> None:
    """Append to the history; an entry about a request holds the hash of all its columns as they are now."""
    number, previous = last_entry(connection)
    if request is not None:
        request_row(connection, request)
        columns = connection.execute(sql.select(REQUESTS).where(REQUESTS.c.id == request)).mappings().one()
        details = {**details, "record": record_hash(dict(columns))}
    content: dict[str, Any] = {
        "number": number + 1,
        "request": request,
        "at": now(),
        "who": who,
        "what": what,
        "details": json.dumps(dict(details), ensure_ascii=False, sort_keys=True),
        "previous": previous,
    }
    connection.execute(sql.insert(HISTORY).values(**content, hash=entry_hash(**content)))


def chain_faults(
    rows: Sequence[sql.RowMapping], records: Mapping[int, Mapping[str, Any]], project: str, heads: Sequence[str]
) -> list[str]:
    """Return what is wrong with a chain, as sentences; empty if it is intact.

    Args:
        rows: the history, oldest first.
        records: all columns of each request, by id.
        project: what all requests share, as JSON, as the database has it now.
        heads: hashes that were noted earlier and must still be in it.
    """
    wrong, previous = [], ""
    last: dict[int, str] = {}
    for expected, row in enumerate(rows, start=1):
        content = {key: row[key] for key in ("number", "request", "at", "who", "what", "details", "previous")}
        if row["number"] != expected:
            wrong.append(f"Entry {expected} of the history is missing.")
            break
        if row["previous"] != previous or row["hash"] != entry_hash(**content):
            wrong.append(f"Entry {expected} of the history ({row['what']}, {row['at']}) was altered.")
            break
        previous = row["hash"]
        if row["request"] is not None:
            last[row["request"]] = json.loads(row["details"])["record"]
    else:
        known = {row["hash"] for row in rows}
        missing = [head for head in heads if not any(each.startswith(head) for each in known)]
        if missing:
            wrong.append(
                f"The history was cut or written anew: it once had the head {missing[0][:12]}, which it has no more."
            )
    if wrong:
        return wrong
    if not rows:
        return ["The history is gone."]
    if json.loads(rows[0]["details"]).get("project") != json.loads(project):
        wrong.append("What all requests share (model, retain set, recipe, folder) is not what it was made with.")
    for number, record in records.items():
        if number not in last:
            wrong.append(f"R-{number:04d} is not in the history.")
        elif last[number] != record_hash(record):
            wrong.append(
                f"R-{number:04d} (state {record['state']!r}) was altered: state, dates, subject, data, run or evidence "
                "are not those of its history."
            )
    return wrong + [f"R-{number:04d} was removed." for number in last if number not in records]
