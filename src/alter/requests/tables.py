"""The tables of the database of requests."""

from __future__ import annotations

import sqlalchemy as sql

from alter.core import UserError, nearest
from alter.requests.records import Request

TABLES = sql.MetaData()
META = sql.Table(
    "alter_meta", TABLES, sql.Column("key", sql.String(40), primary_key=True), sql.Column("value", sql.Text)
)
REQUESTS = sql.Table(
    "alter_requests",
    TABLES,
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
HISTORY = sql.Table(
    "alter_history",
    TABLES,
    sql.Column("number", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("request", sql.Integer),
    sql.Column("at", sql.String(40), nullable=False),
    sql.Column("who", sql.Text, nullable=False),
    sql.Column("what", sql.String(40), nullable=False),
    sql.Column("details", sql.Text, nullable=False),
    sql.Column("previous", sql.String(64), nullable=False),
    sql.Column("hash", sql.String(64), nullable=False),
)
LEASE = sql.Table(
    "alter_lease",
    TABLES,
    sql.Column("name", sql.String(40), primary_key=True),
    sql.Column("host", sql.Text, nullable=False),
    sql.Column("pid", sql.Integer, nullable=False),
    sql.Column("started", sql.Float, nullable=False),
    sql.Column("seen", sql.Float, nullable=False),
)

APPEND_ONLY = {
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


def request_row(connection: sql.Connection, number: int) -> Request:
    """Return one request's row.

    Raises:
        UserError: there is none with this id.
    """
    row = connection.execute(sql.select(REQUESTS).where(REQUESTS.c.id == number)).mappings().one_or_none()
    if row is None:
        known = [f"R-{n:04d}" for n in connection.execute(sql.select(REQUESTS.c.id)).scalars()]
        there = f"there are {known[0]} to {known[-1]}" if known else "there are none yet"
        raise UserError(f"There is no request R-{number:04d}; {there}.{nearest(f'R-{number:04d}', known)}")
    return Request(**row)
