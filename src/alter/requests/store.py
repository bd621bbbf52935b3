"""The database of erasure requests: states with allowed transitions, and a history that shows every alteration.

Every change of a request is one transaction that also appends to the history. Each entry of the history holds the hash
of the one before it, so an entry that is altered, removed or inserted breaks the chain; and each entry about a request
holds the hash of all its columns, evidence included, so that these cannot be altered either. `check_chain` finds both. A
chain that was computed anew as a whole, or cut at its end, shows only beside a head that was written down elsewhere, as
`alter.requests.anchor` does.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import sqlalchemy as sql

from alter.core import UserError
from alter.requests.anchor import Anchor
from alter.requests.chain import append_entry, chain_faults, last_entry
from alter.requests.connection import database_errors, engine_for, without_password
from alter.requests.records import EDGES, Entry, Request, default_who, now
from alter.requests.tables import APPEND_ONLY, HISTORY, LEASE, META, REQUESTS, TABLES, request_row
from alter.storage import to_json

SCHEMA = 2
"""Version of the tables; a database of another one is refused."""

LEASE_SECONDS = 120
"""Seconds without a heartbeat after which a run on another machine counts as dead."""


class Store:
    """The database, opened. Each method is one transaction; several processes may use it at once."""

    def __init__(self, engine: sql.Engine, url: str) -> None:
        self.engine, self.url = engine, url
        # where every new head of the history is also written, if anywhere
        self.anchor: Anchor | None = None

    @cached_property
    def who(self) -> str:
        """Who is at work where nobody else is named."""
        return default_who()

    # Opening

    @classmethod
    def create(
        cls, url: str, project: Mapping[str, Any], who: str | None = None, anchor: Anchor | None = None
    ) -> Store:
        """Make the tables in an empty database and write down what all its requests share.

        Args:
            url: any SQLAlchemy URL.
            project: model, retain set, recipe, folder; see `alter.requests.project.Project`.
            who: for the history.
            anchor: where the heads of its history are to be written.

        Raises:
            UserError: there are requests in it already, or it cannot be opened.
        """
        store = cls(engine_for(url, create=True), url)
        store.anchor = anchor
        with database_errors(url), store._write(lock=False) as connection:
            if sql.inspect(connection).has_table("alter_meta"):
                raise UserError(
                    f"{without_password(url)} holds requests already; give another `db`, or use it as it is."
                )
            TABLES.create_all(connection)
            for statement in APPEND_ONLY.get(store.engine.dialect.name, []):
                connection.execute(sql.text(statement))
            values = {"schema": str(SCHEMA), "project": json.dumps(dict(project), ensure_ascii=False)}
            connection.execute(sql.insert(META), [{"key": key, "value": value} for key, value in values.items()])
            append_entry(connection, None, who or store.who, "created", {"project": dict(project)})
        return store

    @classmethod
    def open(cls, url: str) -> Store:
        """Open a database that `create` made.

        Raises:
            UserError: there is none, it is not a database or not one of requests, or a newer version wrote it.
        """
        store = cls(engine_for(url, create=False), url)
        with database_errors(url), store.engine.connect() as connection:
            if not sql.inspect(connection).has_table("alter_meta"):
                raise UserError(
                    f"{without_password(url)} holds no erasure requests; make them with `alter request init`."
                )
            found = connection.execute(sql.select(META.c.value).where(META.c.key == "schema")).scalar_one()
        if int(found) < SCHEMA:
            raise UserError(
                f"{without_password(url)} was written by an older version of alter (tables {found}, this one knows {SCHEMA}), whose "
                "history covers states alone and says 'done' of what was not measured: make a new one with `alter request "
                "init` and add its requests again."
            )
        if int(found) > SCHEMA:
            raise UserError(
                f"{without_password(url)} was written by a newer version of alter (tables {found}, this one knows {SCHEMA}): "
                'update it with `pip install --upgrade "alter-unlearning"`.'
            )
        return store

    def project(self) -> dict[str, Any]:
        """Return the shared settings that `create` was given."""
        with database_errors(self.url), self.engine.connect() as connection:
            text = connection.execute(sql.select(META.c.value).where(META.c.key == "project")).scalar_one()
        settings: dict[str, Any] = json.loads(text)
        return settings

    # Reading

    def requests(self, *states: str) -> list[Request]:
        """Return all requests, or those in the given states, oldest first."""
        query = sql.select(REQUESTS).order_by(REQUESTS.c.id)
        if states:
            query = query.where(REQUESTS.c.state.in_(states))
        with database_errors(self.url), self.engine.connect() as connection:
            return [Request(**row) for row in connection.execute(query).mappings()]

    def get(self, number: int) -> Request:
        """Return one request.

        Raises:
            UserError: there is none with this id.
        """
        with database_errors(self.url), self.engine.connect() as connection:
            return request_row(connection, number)

    def history(self, number: int | None = None) -> list[Entry]:
        """Return the history, of one request or of all, oldest first."""
        query = sql.select(HISTORY).order_by(HISTORY.c.number)
        if number is not None:
            query = query.where(HISTORY.c.request == number)
        with database_errors(self.url), self.engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return [Entry(**{**row, "details": json.loads(row["details"])}) for row in rows]

    def head(self) -> str:
        """Return the hash of the last entry; noted elsewhere, it fixes everything before it."""
        with database_errors(self.url), self.engine.connect() as connection:
            return last_entry(connection)[1]

    def check_chain(self, heads: Sequence[str] = ()) -> list[str]:
        """Verify the history's hash chain; return its faults as sentences, none if it is intact.

        Args:
            heads: hashes that were noted earlier and must still be in it.
        """
        with database_errors(self.url), self.engine.connect() as connection:
            rows = connection.execute(sql.select(HISTORY).order_by(HISTORY.c.number)).mappings().all()
            records = {row["id"]: dict(row) for row in connection.execute(sql.select(REQUESTS)).mappings()}
            meta = dict(connection.execute(sql.select(META.c.key, META.c.value)).tuples().all())
        return chain_faults(rows, records, meta.get("project", "null"), heads)

    # Writing

    def add(
        self,
        *,
        subject: str,
        data: str,
        data_hash: str,
        row_hashes: Sequence[str],
        due: str | None = None,
        text: str | None = None,
        who: str | None = None,
    ) -> Request:
        """Write down a new request, in state `received`.

        Raises:
            UserError: another request that stands has the same rows, or some of them; says which.
        """
        who = who or self.who
        with database_errors(self.url), self._write() as connection:
            standing = connection.execute(
                sql.select(*(REQUESTS.c[name] for name in ("id", "subject", "row_hashes", "data_hash", "state")))
                .where(REQUESTS.c.state.not_in(["withdrawn", "revoked"]))
                .order_by(REQUESTS.c.id)
            ).all()
            for number, other, hashes, whole, state in standing:
                # of a purged request the hash of all its rows is left
                shared = len(set(row_hashes)) if whole == data_hash else len(set(hashes) & set(row_hashes))
                if shared:
                    share = "the same data" if shared == len(set(row_hashes)) else f"{shared} of these rows"
                    whom = other or "purged"
                    raise UserError(f"R-{number:04d} ({whom}, {state}) has {share} already; nothing was added.")
            received = now()
            values = {
                "subject": subject,
                "state": "received",
                "received": received,
                "due": due,
                "data": data,
                "data_hash": data_hash,
                "row_hashes": list(row_hashes),
                "rows": len(row_hashes),
                "text": text,
                "salt": secrets.token_hex(16),
            }
            inserted = connection.execute(sql.insert(REQUESTS).values(**values)).inserted_primary_key
            assert inserted is not None
            number = inserted[0]
            # the subject and the text stay out of the history, which cannot be erased
            shown = {key: values[key] for key in ("data_hash", "rows", "received", "due")}
            append_entry(connection, number, who, "received", {"from": None, "to": "received", **shown})
            return request_row(connection, number)

    def move(
        self,
        numbers: Sequence[int],
        to: str,
        *,
        what: str | None = None,
        who: str | None = None,
        details: Mapping[str, Any] | None = None,
        values: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> list[Request]:
        """Move requests to a state, all of them or none, and write columns of each on the way.

        Args:
            numbers: ids.
            to: the new state.
            what: what the history calls it; the state's name by default.
            who: for the history.
            details: kept in the history, for each of them.
            values: columns to set, by id.

        Raises:
            UserError: an id is unknown, or a request may not go there from where it is.
        """
        with database_errors(self.url), self._write() as connection:
            for number in numbers:
                request = request_row(connection, number)
                self.check_edge(request, to)
                # as JSON will give it back, or its hash would be another's
                own = json.loads(to_json(dict((values or {}).get(number, {}))))
                connection.execute(sql.update(REQUESTS).where(REQUESTS.c.id == number).values(state=to, **own))
                entry = {"from": request.state, "to": to, **(details or {})}
                append_entry(connection, number, who or self.who, what or to, entry)
            return [request_row(connection, number) for number in numbers]

    def check_edge(self, request: Request, to: str) -> None:
        """Refuse a transition that the request's state does not allow."""
        if to not in EDGES[request.state]:
            raise UserError(_refused(request, to))

    def note(self, number: int | None, what: str, details: Mapping[str, Any], who: str | None = None) -> None:
        """Append to the history an event that changes no state: a check, a measurement, an export."""
        with database_errors(self.url), self._write() as connection:
            append_entry(connection, number, who or self.who, what, dict(details))

    def forget(self, number: int, who: str | None = None) -> list[str]:
        """Delete a request's subject and rows from the database; return what was deleted.

        Subject, text, location and the rows' hashes go; state, dates, the hash of the data and the evidence stay. What lies in
        old pages of the file goes with `write_over`.

        Raises:
            UserError: there is no such request.
        """
        with database_errors(self.url), self._write() as connection:
            request = request_row(connection, number)
            there = {"subject": request.subject, "text": request.text, "location": request.data}
            gone = [name for name, value in there.items() if value] + (["row hashes"] if request.row_hashes else [])
            empty: dict[str, Any] = {"subject": "", "text": None, "data": "", "row_hashes": []}
            connection.execute(
                sql.update(REQUESTS).where(REQUESTS.c.id == number).values(**empty, salt=secrets.token_hex(16))
            )
            append_entry(connection, number, who or self.who, "purged", {"gone": gone})
        return gone

    def write_over(self) -> bool:
        """Write a SQLite database anew, without the old pages that held what was deleted; False where a reader keeps them."""
        if self.engine.dialect.name != "sqlite":
            return False
        with database_errors(self.url), self.engine.connect() as connection:
            connection.exec_driver_sql("VACUUM")
            busy = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").scalar_one()
        return not busy

    @contextmanager
    def _write(self, lock: bool = True) -> Iterator[sql.Connection]:
        """Open a transaction that no other writer's overlaps; without `lock` where there are no tables to lock yet."""
        with self.engine.connect() as connection:
            if self.engine.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            elif not lock:
                connection.begin()
            elif self.engine.dialect.name == "postgresql":
                connection.execute(sql.text("LOCK TABLE alter_history IN EXCLUSIVE MODE"))
            else:
                connection.execute(sql.select(META.c.value).where(META.c.key == "schema").with_for_update())
            try:
                yield connection
            except BaseException:
                connection.rollback()
                raise
            last = last_entry(connection) if self.anchor is not None else (0, "")
            connection.commit()
            if self.anchor is not None:
                self.anchor.append(*last, now())

    # One worker at a time

    @contextmanager
    def lease(self, who: str | None = None) -> Iterator[None]:
        """Hold the exclusive lease on the project's adapters; a dead holder's lease can be taken over.

        Args:
            who: whom the history names for what is done meanwhile; user and machine by default.

        Raises:
            UserError: a living process holds it.
        """
        import psutil

        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
        with database_errors(self.url), self._write() as connection:
            row = connection.execute(sql.select(LEASE).where(LEASE.c.name == "run")).mappings().one_or_none()
            if row is not None and _alive(row):
                raise UserError(
                    f"Process {row['pid']} on {row['host']} is working on these requests; wait until it is done."
                )
            connection.execute(sql.delete(LEASE).where(LEASE.c.name == "run"))
            connection.execute(sql.insert(LEASE).values(name="run", seen=_seconds(), **me))
        self.who = who or self.who
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(LEASE_SECONDS / 4):
                # a heartbeat that cannot be written now, or the anchor, may be at the next time
                with suppress(sql.exc.DatabaseError, UserError), self._write() as connection:
                    mine = (LEASE.c.name == "run") & (LEASE.c.pid == me["pid"]) & (LEASE.c.host == me["host"])
                    connection.execute(sql.update(LEASE).where(mine).values(seen=_seconds()))

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            with database_errors(self.url), self._write() as connection:
                mine = (LEASE.c.name == "run") & (LEASE.c.pid == me["pid"]) & (LEASE.c.host == me["host"])
                connection.execute(sql.delete(LEASE).where(mine))


def _seconds() -> float:
    return datetime.now(UTC).timestamp()


def _alive(row: Any) -> bool:
    """Tell whether the holder of a lease still runs: by its process on this machine, by its last heartbeat on another."""
    if row["host"] != socket.gethostname():
        seen: float = row["seen"]
        return _seconds() - seen < LEASE_SECONDS
    import psutil

    try:
        process = psutil.Process(row["pid"])
        # a later process may have the same number
        return abs(process.create_time() - row["started"]) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _refused(request: Request, to: str) -> str:
    allowed = EDGES[request.state]
    whom = f"{request.name} ({request.subject or 'purged'})"
    if request.state == to:
        return f"{whom} is {to} already."
    if request.state == "distilled":
        return (
            f"{whom} is distilled, which is final: the weights of its base themselves have forgotten "
            f"it, so it cannot become {to}. The model from before still has it, in a project of its own (`alter request init`)."
        )
    ways = f"; from there it may only become {' or '.join(allowed)}" if allowed else ", which is final"
    return f"{whom} is {request.state}{ways}: it cannot become {to}."
