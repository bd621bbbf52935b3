"""Connect to a database: its engine, its URL as it may be shown, and driver errors as one line."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy import event

from alter.core import UserError

PATIENCE = 60.0
"""Seconds that a command waits for other processes to leave a SQLite database."""


def without_password(url: str) -> str:
    """Return the URL without passwords, in its authority and among its options."""
    try:
        parsed = sql.make_url(url)
    except sql.exc.ArgumentError:
        return re.sub(r"//.*@", "//***@", url)
    secret = [name for name in parsed.query if re.search(r"pass|secret|token|key", name, re.IGNORECASE)]
    return parsed.update_query_dict(dict.fromkeys(secret, "***")).render_as_string(hide_password=True)


def folder_of(url: str) -> Path | None:
    """Return the folder of a SQLite database's file; None for a database of a server, and of what is no URL."""
    with suppress(sql.exc.ArgumentError):
        parsed = sql.make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database:
            return Path(parsed.database).resolve().parent
    return None


@contextmanager
def database_errors(url: str) -> Iterator[None]:
    """Turn what a database driver raises into one line for the user."""
    try:
        yield
    except sql.exc.DatabaseError as error:
        reason = " ".join(str(error.orig).split())
        if "append-only" in reason:
            raise
        raise UserError(f"{without_password(url)} cannot be used as a database of requests: {reason}.") from None


def engine_for(url: str, *, create: bool) -> sql.Engine:
    """Make an engine with the settings that keep the file whole: for SQLite a write-ahead log that is flushed to disk.

    Raises:
        UserError: the URL is none, its driver is missing, or the SQLite file is not there.
    """
    try:
        parsed = sql.make_url(url)
        if parsed.get_backend_name() == "sqlite":
            file = parsed.database
            if not file or file == ":memory:":
                raise UserError(f"`db` is {url!r}: a database in memory is gone when the command ends; name a file.")
            if create:
                others = _tables(file) if Path(file).is_file() else None
                if others and "alter_meta" not in others:
                    raise UserError(
                        f"{without_password(url)} is a database of another program (with the table {others[0]}): give a file of its "
                        "own as `db`."
                    )
                Path(file).expanduser().resolve().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                # whom it is about is nobody else's business; SQLite gives its log the mode of the file
                Path(file).touch(mode=0o600)
            elif not Path(file).is_file():
                raise UserError(f"No database at {file}: make it with `alter request init`, or give its `db`.")
            elif (tables := _tables(file)) is not None and "alter_meta" not in tables:
                raise UserError(
                    f"{without_password(url)} holds no erasure requests; make them with `alter request init`, or give their `db`."
                )
            engine = sql.create_engine(parsed, connect_args={"timeout": PATIENCE}, isolation_level="AUTOCOMMIT")
            event.listen(engine, "connect", _durable)
            return engine
        if parsed.drivername == "postgresql":
            # the driver that is installed with the extra, and the one that is still developed
            parsed = parsed.set(drivername="postgresql+psycopg")
        return sql.create_engine(parsed, pool_pre_ping=True)
    except (sql.exc.NoSuchModuleError, ModuleNotFoundError) as error:
        how = "Install the driver of this database."
        if parsed.drivername == "postgresql+psycopg":
            how = 'It needs psycopg: pip install "alter-unlearning[postgres]"'
        raise UserError(f"`db` is {without_password(url)!r}: {error}. {how}") from None
    except sql.exc.ArgumentError:
        raise UserError(
            f"`db` is {without_password(url)!r}, which is no database URL; expected for example sqlite:///requests.db or "
            "postgresql://user@host/name."
        ) from None


def _tables(file: str) -> list[str] | None:
    """Return the tables of a SQLite file; None if it cannot be read as a database, which connecting will say; nothing is written.

    Another program's database would be changed by connecting: its journal is another one afterwards.
    """
    try:
        with closing(
            sqlite3.connect(f"{Path(file).resolve().as_uri()}?mode=ro", uri=True, timeout=PATIENCE)
        ) as connection:
            return [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    except sqlite3.Error:
        return None


def _durable(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
