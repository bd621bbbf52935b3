"""The database of erasure requests: states that move along allowed edges, and a history that nobody can rewrite unseen.

Every change of a request is one transaction that also appends to the history. Each entry of the history holds the hash
of the one before it, so an entry that is altered, removed or inserted breaks the chain; and each entry about a request
holds the hash of all its columns, evidence included, so that these cannot be altered either. `check_chain` finds both. A
chain that was computed anew as a whole, or cut at its end, shows only beside a head that was written down elsewhere, as
`alter.requests.anchor` does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sql
from sqlalchemy import event

from alter.core.errors import UserError, nearest
from alter.core.files import to_json
from alter.requests.anchor import Anchor

SCHEMA = 2
"""Version of the tables; a database of another one is refused."""

EDGES: dict[str, tuple[str, ...]] = {
    "received": ("running", "withdrawn"),
    "running": ("trained", "failed", "received"),
    "trained": ("forgotten", "unproven", "not forgotten", "collapsed", "failed", "received"),
    "failed": ("running", "withdrawn"),
    "not forgotten": ("running", "withdrawn"),
    "collapsed": ("running", "withdrawn"),
    "forgotten": ("revoked",),
    "unproven": ("revoked",),
    "revoked": (),
    "withdrawn": (),
}
"""Where a request may go from each state. `trained` has an adapter that was not measured yet; from there it goes to what
`alter.evaluation.verdict` says. Back to `received`: a run that was cut off before it took effect."""

IN_FORCE = ("forgotten", "unproven")
"""States in which the adapter in force holds a request."""

MISSED = ("failed", "not forgotten", "collapsed")
"""States from which a request may be tried again."""

LEASE_SECONDS = 120
"""A run on another machine that has not shown a sign of life for so long is taken for dead."""

_TABLES = sql.MetaData()
_META = sql.Table(
    "alter_meta", _TABLES, sql.Column("key", sql.String(40), primary_key=True), sql.Column("value", sql.Text)
)
_REQUESTS = sql.Table(
    "alter_requests",
    _TABLES,
    sql.Column("id", sql.Integer, primary_key=True, autoincrement=True),
    sql.Column("subject", sql.Text, nullable=False),
    sql.Column("state", sql.String(20), nullable=False),
    sql.Column("received", sql.String(40), nullable=False),
    sql.Column("due", sql.String(40)),
    sql.Column("data", sql.Text, nullable=False),
    sql.Column("data_hash", sql.String(64), nullable=False),
    sql.Column("row_hashes", sql.JSON, nullable=False),
    sql.Column("rows", sql.Integer, nullable=False),
    sql.Column("text", sql.Text),
    sql.Column("expert", sql.Integer),
    sql.Column("run", sql.JSON),
    sql.Column("before", sql.JSON),
    sql.Column("after", sql.JSON),
    sql.Column("salt", sql.String(32), nullable=False),
)
_HISTORY = sql.Table(
    "alter_history",
    _TABLES,
    sql.Column("number", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("request", sql.Integer),
    sql.Column("at", sql.String(40), nullable=False),
    sql.Column("who", sql.Text, nullable=False),
    sql.Column("what", sql.String(40), nullable=False),
    sql.Column("details", sql.Text, nullable=False),
    sql.Column("previous", sql.String(64), nullable=False),
    sql.Column("hash", sql.String(64), nullable=False),
)
_LEASE = sql.Table(
    "alter_lease",
    _TABLES,
    sql.Column("name", sql.String(40), primary_key=True),
    sql.Column("host", sql.Text, nullable=False),
    sql.Column("pid", sql.Integer, nullable=False),
    sql.Column("started", sql.Float, nullable=False),
    sql.Column("seen", sql.Float, nullable=False),
)

_APPEND_ONLY = {
    "sqlite": [
        f"CREATE TRIGGER alter_history_{verb.lower()} BEFORE {verb} ON alter_history "
        "BEGIN SELECT RAISE(ABORT, 'the history is append-only'); END"
        for verb in ("UPDATE", "DELETE")
    ],
    "postgresql": [
        "CREATE OR REPLACE FUNCTION alter_history_fixed() RETURNS trigger AS "
        "$$ BEGIN RAISE EXCEPTION 'the history is append-only'; END $$ LANGUAGE plpgsql",
        "CREATE TRIGGER alter_history_fixed BEFORE UPDATE OR DELETE OR TRUNCATE ON alter_history "
        "FOR EACH STATEMENT EXECUTE FUNCTION alter_history_fixed()",
    ],
}


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
        """How people write the request's id: R-0007."""
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


def now() -> str:
    """The present in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def default_who() -> str:
    """Who is at work, for the history: user and machine."""
    return f"{psutil.Process().username()}@{socket.gethostname()}"


def _entry_hash(number: int, request: int | None, at: str, who: str, what: str, details: str, previous: str) -> str:
    content = json.dumps([number, request, at, who, what, details, previous], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def record_hash(columns: Mapping[str, Any]) -> str:
    """SHA-256 of all columns of a request."""
    content = {name: columns[name] for name in sorted(column.name for column in _REQUESTS.columns)}
    return hashlib.sha256(json.dumps(content, ensure_ascii=True, sort_keys=True).encode()).hexdigest()


def parse_id(text: str) -> int:
    """The number in `7`, `R-7` or `R-0007`.

    Raises:
        UserError: it is none of these.
    """
    digits = text.upper().removeprefix("R-").lstrip("0") or "0"
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 19):
        raise UserError(f"{text!r} is not the id of a request; expected a form like R-0007 or 7.")
    return int(digits)


def check_due(text: str | None) -> str | None:
    """The due date as given, checked.

    Raises:
        UserError: it is not a date of the form 2026-12-31.
    """
    if text is not None:
        try:
            date.fromisoformat(text)
        except ValueError:
            raise UserError(f"--due is {text!r}; expected a date of the form 2026-12-31.") from None
    return text


class Store:
    """The database, opened. Each method is one transaction; several processes may use it at once."""

    def __init__(self, engine: sql.Engine, url: str) -> None:
        self.engine, self.url, self.who = engine, url, default_who()
        # where every new head of the history is also written, if anywhere
        self.anchor: Anchor | None = None

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
        store = cls(_engine(url, create=True), url)
        store.anchor = anchor
        with _said(url), store._write(lock=False) as connection:
            if sql.inspect(connection).has_table("alter_meta"):
                raise UserError(f"{shown(url)} holds requests already; give another --db, or use it as it is.")
            _TABLES.create_all(connection)
            for statement in _APPEND_ONLY.get(store.engine.dialect.name, []):
                connection.execute(sql.text(statement))
            values = {"schema": str(SCHEMA), "project": json.dumps(dict(project), ensure_ascii=False)}
            connection.execute(sql.insert(_META), [{"key": key, "value": value} for key, value in values.items()])
            _append(connection, None, who or store.who, "created", {"project": dict(project)})
        return store

    @classmethod
    def open(cls, url: str) -> Store:
        """Open a database that `create` made.

        Raises:
            UserError: there is none, it is not a database or not one of requests, or a newer version wrote it.
        """
        store = cls(_engine(url, create=False), url)
        with _said(url), store.engine.connect() as connection:
            if not sql.inspect(connection).has_table("alter_meta"):
                raise UserError(f"{shown(url)} holds no erasure requests; make them with `alter request init`.")
            found = connection.execute(sql.select(_META.c.value).where(_META.c.key == "schema")).scalar_one()
        if int(found) < SCHEMA:
            raise UserError(
                f"{shown(url)} was written by an older version of alter (tables {found}, this one knows {SCHEMA}), whose "
                "history covers states alone and says 'done' of what was not measured: make a new one with `alter request "
                "init` and add its requests again."
            )
        if int(found) > SCHEMA:
            raise UserError(
                f"{shown(url)} was written by a newer version of alter (tables {found}, this one knows {SCHEMA}): "
                'update it with `pip install --upgrade "alter-unlearning"`.'
            )
        return store

    def project(self) -> dict[str, Any]:
        """What all requests share, as it was given to `create`."""
        with _said(self.url), self.engine.connect() as connection:
            text = connection.execute(sql.select(_META.c.value).where(_META.c.key == "project")).scalar_one()
        return json.loads(text)

    # Reading

    def requests(self, *states: str) -> list[Request]:
        """All requests, or those in the given states, oldest first."""
        query = sql.select(_REQUESTS).order_by(_REQUESTS.c.id)
        if states:
            query = query.where(_REQUESTS.c.state.in_(states))
        with _said(self.url), self.engine.connect() as connection:
            return [Request(**row) for row in connection.execute(query).mappings()]

    def get(self, number: int) -> Request:
        """One request.

        Raises:
            UserError: there is none with this id.
        """
        with _said(self.url), self.engine.connect() as connection:
            return _get(connection, number)

    def history(self, number: int | None = None) -> list[Entry]:
        """The history, of one request or of all, oldest first."""
        query = sql.select(_HISTORY).order_by(_HISTORY.c.number)
        if number is not None:
            query = query.where(_HISTORY.c.request == number)
        with _said(self.url), self.engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return [Entry(**{**row, "details": json.loads(row["details"])}) for row in rows]

    def head(self) -> str:
        """Hash of the last entry of the history: written down elsewhere, it fixes all that came before it."""
        with _said(self.url), self.engine.connect() as connection:
            return _last(connection)[1]

    def check_chain(self, heads: Sequence[str] = ()) -> list[str]:
        """What is wrong with the history, in sentences; nothing if it is whole.

        Args:
            heads: hashes that were noted earlier and must still be in it.
        """
        with _said(self.url), self.engine.connect() as connection:
            rows = connection.execute(sql.select(_HISTORY).order_by(_HISTORY.c.number)).mappings().all()
            records = {row["id"]: dict(row) for row in connection.execute(sql.select(_REQUESTS)).mappings()}
            meta = dict(connection.execute(sql.select(_META.c.key, _META.c.value)).tuples().all())
        wrong, previous = [], ""
        last: dict[int, str] = {}
        for expected, row in enumerate(rows, start=1):
            content = {key: row[key] for key in ("number", "request", "at", "who", "what", "details", "previous")}
            if row["number"] != expected:
                wrong.append(f"Entry {expected} of the history is missing.")
                break
            if row["previous"] != previous or row["hash"] != _entry_hash(**content):
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
        if json.loads(rows[0]["details"]).get("project") != json.loads(meta.get("project", "null")):
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
        with _said(self.url), self._write() as connection:
            standing = connection.execute(
                sql.select(_REQUESTS.c.id, _REQUESTS.c.subject, _REQUESTS.c.row_hashes, _REQUESTS.c.state)
                .where(_REQUESTS.c.state.not_in(["withdrawn", "revoked"]))
                .order_by(_REQUESTS.c.id)
            ).all()
            for number, other, hashes, state in standing:
                shared = len(set(hashes) & set(row_hashes))
                if shared:
                    share = "the same data" if shared == len(set(row_hashes)) else f"{shared} of these rows"
                    raise UserError(f"R-{number:04d} ({other}, {state}) has {share} already; nothing was added.")
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
            inserted = connection.execute(sql.insert(_REQUESTS).values(**values)).inserted_primary_key
            assert inserted is not None
            number = inserted[0]
            # the subject and the text stay out of the history, which cannot be erased
            shown = {key: values[key] for key in ("data_hash", "rows", "received", "due")}
            _append(connection, number, who, "received", {"from": None, "to": "received", **shown})
            return _get(connection, number)

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
        with _said(self.url), self._write() as connection:
            for number in numbers:
                request = _get(connection, number)
                self.check_edge(request, to)
                # as JSON will give it back, or its hash would be another's
                own = json.loads(to_json(dict((values or {}).get(number, {}))))
                connection.execute(sql.update(_REQUESTS).where(_REQUESTS.c.id == number).values(state=to, **own))
                entry = {"from": request.state, "to": to, **(details or {})}
                _append(connection, number, who or self.who, what or to, entry)
            return [_get(connection, number) for number in numbers]

    def check_edge(self, request: Request, to: str) -> None:
        """Refuse a state that the request may not go to from where it is."""
        if to not in EDGES[request.state]:
            raise UserError(_refused(request, to))

    def note(self, number: int | None, what: str, details: Mapping[str, Any], who: str | None = None) -> None:
        """Append to the history something that changes no state: a check, a measurement, an export."""
        with _said(self.url), self._write() as connection:
            _append(connection, number, who or self.who, what, dict(details))

    def forget(self, number: int, who: str | None = None) -> list[str]:
        """Take what the database holds of a request's subject and rows out of it; returns what that was.

        Subject, text, location and the rows' hashes go; state, dates, the hash of the data and the evidence stay. The
        pages that held them are written over.

        Raises:
            UserError: there is no such request.
        """
        with _said(self.url), self._write() as connection:
            request = _get(connection, number)
            there = {"subject": request.subject, "text": request.text, "location": request.data}
            gone = [name for name, value in there.items() if value] + (["row hashes"] if request.row_hashes else [])
            empty: dict[str, Any] = {"subject": "", "text": None, "data": "", "row_hashes": []}
            connection.execute(
                sql.update(_REQUESTS).where(_REQUESTS.c.id == number).values(**empty, salt=secrets.token_hex(16))
            )
            _append(connection, number, who or self.who, "purged", {"gone": gone})
        if self.engine.dialect.name == "sqlite":
            with _said(self.url), self.engine.connect() as connection:
                for statement in ("VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
                    connection.exec_driver_sql(statement)
        return gone

    @contextmanager
    def _write(self, lock: bool = True) -> Iterator[sql.Connection]:
        """One transaction that no other writer's overlaps; without `lock` where there are no tables to lock yet."""
        with self.engine.connect() as connection:
            if self.engine.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            elif not lock:
                connection.begin()
            elif self.engine.dialect.name == "postgresql":
                connection.execute(sql.text("LOCK TABLE alter_history IN EXCLUSIVE MODE"))
            else:
                connection.execute(sql.select(_META.c.value).where(_META.c.key == "schema").with_for_update())
            try:
                yield connection
            except BaseException:
                connection.rollback()
                raise
            last = _last(connection) if self.anchor is not None else (0, "")
            connection.commit()
            if self.anchor is not None:
                self.anchor.append(*last, now())

    # One worker at a time

    @contextmanager
    def lease(self, who: str | None = None) -> Iterator[None]:
        """Hold the right to change adapters; one process at a time has it. A dead holder's passes on.

        Args:
            who: whom the history names for what is done meanwhile; user and machine by default.

        Raises:
            UserError: a living process holds it.
        """
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
        with _said(self.url), self._write() as connection:
            row = connection.execute(sql.select(_LEASE).where(_LEASE.c.name == "run")).mappings().one_or_none()
            if row is not None and _alive(row):
                raise UserError(
                    f"Process {row['pid']} on {row['host']} is working on these requests; wait until it is done."
                )
            connection.execute(sql.delete(_LEASE).where(_LEASE.c.name == "run"))
            connection.execute(sql.insert(_LEASE).values(name="run", seen=_seconds(), **me))
        self.who = who or self.who
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(LEASE_SECONDS / 4):
                # a sign of life that cannot be written now may be the next time
                with suppress(sql.exc.DatabaseError), self._write() as connection:
                    mine = (_LEASE.c.name == "run") & (_LEASE.c.pid == me["pid"]) & (_LEASE.c.host == me["host"])
                    connection.execute(sql.update(_LEASE).where(mine).values(seen=_seconds()))

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            with _said(self.url), self._write() as connection:
                mine = (_LEASE.c.name == "run") & (_LEASE.c.pid == me["pid"]) & (_LEASE.c.host == me["host"])
                connection.execute(sql.delete(_LEASE).where(mine))


def _seconds() -> float:
    return datetime.now(timezone.utc).timestamp()


def _alive(row: Any) -> bool:
    """Whether the holder of a lease still runs: its process on this machine, its last sign of life on another."""
    if row["host"] != socket.gethostname():
        return _seconds() - row["seen"] < LEASE_SECONDS
    try:
        process = psutil.Process(row["pid"])
        # a process that got the same number later is another one
        return abs(process.create_time() - row["started"]) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _refused(request: Request, to: str) -> str:
    allowed = EDGES[request.state]
    if request.state == to:
        return f"{request.name} ({request.subject}) is {to} already."
    ways = f"; from there it may only become {' or '.join(allowed)}" if allowed else ", which is final"
    return f"{request.name} ({request.subject}) is {request.state}{ways}: it cannot become {to}."


def _get(connection: sql.Connection, number: int) -> Request:
    row = connection.execute(sql.select(_REQUESTS).where(_REQUESTS.c.id == number)).mappings().one_or_none()
    if row is None:
        known = [f"R-{n:04d}" for n in connection.execute(sql.select(_REQUESTS.c.id)).scalars()]
        there = f"there are {known[0]} to {known[-1]}" if known else "there are none yet"
        raise UserError(f"There is no request R-{number:04d}; {there}.{nearest(f'R-{number:04d}', known)}")
    return Request(**row)


def _last(connection: sql.Connection) -> tuple[int, str]:
    query = sql.select(_HISTORY.c.number, _HISTORY.c.hash).order_by(_HISTORY.c.number.desc()).limit(1)
    row = connection.execute(query).one_or_none()
    return (0, "") if row is None else (row[0], row[1])


def _append(connection: sql.Connection, request: int | None, who: str, what: str, details: Mapping[str, Any]) -> None:
    number, previous = _last(connection)
    if request is not None:
        _get(connection, request)
        columns = connection.execute(sql.select(_REQUESTS).where(_REQUESTS.c.id == request)).mappings().one()
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
    connection.execute(sql.insert(_HISTORY).values(**content, hash=_entry_hash(**content)))


def shown(url: str) -> str:
    """The URL without passwords, neither in its place nor among the options."""
    try:
        parsed = sql.make_url(url)
    except sql.exc.ArgumentError:
        return re.sub(r"//.*@", "//***@", url)
    secret = [name for name in parsed.query if re.search(r"pass|secret|token|key", name, re.IGNORECASE)]
    return parsed.update_query_dict(dict.fromkeys(secret, "***")).render_as_string(hide_password=True)


@contextmanager
def _said(url: str) -> Iterator[None]:
    """Turn what a database driver raises into one line for the user."""
    try:
        yield
    except sql.exc.DatabaseError as error:
        reason = " ".join(str(error.orig).split())
        if "append-only" in reason:
            raise
        raise UserError(f"{shown(url)} cannot be used as a database of requests: {reason}.") from None


def _engine(url: str, *, create: bool) -> sql.Engine:
    """An engine with the settings that keep the file whole: for SQLite a write-ahead log that is flushed to disk.

    Raises:
        UserError: the URL is none, its driver is missing, or the SQLite file is not there.
    """
    try:
        parsed = sql.make_url(url)
        if parsed.get_backend_name() == "sqlite":
            file = parsed.database
            if not file or file == ":memory:":
                raise UserError(f"--db is {url!r}: a database in memory is gone when the command ends; name a file.")
            if create:
                Path(file).expanduser().resolve().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                # whom it is about is nobody else's business; SQLite gives its log the mode of the file
                Path(file).touch(mode=0o600)
            elif not Path(file).is_file():
                raise UserError(f"No database at {file}: make it with `alter request init`, or give its --db.")
            engine = sql.create_engine(parsed, connect_args={"timeout": 60}, isolation_level="AUTOCOMMIT")
            event.listen(engine, "connect", _durable)
            return engine
        if parsed.drivername == "postgresql":
            # the driver that is installed with the extra, and the one that is still developed
            parsed = parsed.set(drivername="postgresql+psycopg")
        return sql.create_engine(parsed, pool_pre_ping=True)
    except (sql.exc.NoSuchModuleError, ModuleNotFoundError) as error:
        raise UserError(f"--db is {shown(url)!r}: {error}. Install the driver of this database.") from None
    except sql.exc.ArgumentError:
        raise UserError(
            f"--db is {shown(url)!r}, which is no database URL; expected for example sqlite:///requests.db or "
            "postgresql://user@host/name."
        ) from None


def _durable(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
