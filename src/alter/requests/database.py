"""The database of requests that a command uses, its anchor and the signing key: settings that all request commands share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from alter.core import UserError
from alter.requests.anchor import Anchor
from alter.requests.signing import read_key

if TYPE_CHECKING:
    from alter.requests.project import Project
    from alter.requests.store import Store


def default_db() -> str:
    """Return the default database URL: the environment's ALTER_DB, else a file in `alter-requests/`."""
    return os.environ.get("ALTER_DB", "sqlite:///alter-requests/requests.db")


class Database(BaseModel):
    """Which database of requests; the settings that every command has."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    db: str = Field(default_factory=default_db)
    """Database as an SQLAlchemy URL; by default the environment's ALTER_DB, else a file in alter-requests/."""
    who: str | None = None
    """Who does this, for the history; by default user and machine."""
    anchor: str | None = Field(default_factory=lambda: os.environ.get("ALTER_ANCHOR"))
    """File outside the database for every head of the history, signed; by default the environment's ALTER_ANCHOR."""
    key: str | None = Field(default_factory=lambda: os.environ.get("ALTER_KEY"))
    """Private key that signs; `alter certificate --new-key` makes one. By default the environment's ALTER_KEY."""

    def open(self) -> tuple[Store, Project]:
        """Return the database and what its requests share.

        Raises:
            UserError: there is none, it is older than its anchor or another, or the anchor has no key.
        """
        store, project = self.open_unchecked()
        if store.anchor is not None:
            store.anchor.refuse([(entry.number, entry.hash) for entry in store.history()])
        return store, project

    def open_unchecked(self) -> tuple[Store, Project]:
        """Open the database as `open` does, without comparing it with the anchor.

        Raises:
            UserError: there is no database, or the anchor has no key.
        """
        from alter.requests.bases import present
        from alter.requests.store import Store

        store = Store.open(self.db)
        store.anchor = self.open_anchor()
        return store, present(store)

    def open_anchor(self) -> Anchor | None:
        """Return the anchor with the key that signs its lines; None where the settings name none.

        Raises:
            UserError: there is no key, or the file holds none.
        """
        if self.anchor is None:
            return None
        if self.key is None:
            raise UserError("The lines of `anchor` are signed: give `key` FILE, or ALTER_KEY.")
        return Anchor(self.anchor, read_key(self.key))
