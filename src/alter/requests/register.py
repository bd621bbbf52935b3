"""`alter request list` and `show`: print the recorded requests, or one of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

import tyro
from rich.console import Console

from alter.core import cell
from alter.evaluation.told import told
from alter.rendering import FittedTable
from alter.requests.bases import bases
from alter.requests.database import Database
from alter.requests.display import print_bases, print_list, still_known, suggest
from alter.requests.records import Request, parse_id
from alter.settings import OutFile
from alter.storage import to_json, write_atomic

STATES = Literal[
    "received",
    "running",
    "trained",
    "failed",
    "forgotten",
    "unproven",
    "not forgotten",
    "collapsed",
    "distilled",
    "revoked",
    "withdrawn",
]


class List(Database):
    """Show all requests."""

    state: STATES | None = None
    """Only those in this state."""
    json_path: OutFile = None
    """File for the list, without texts."""


def list_requests(settings: List) -> list[Request]:
    """Run `alter request list`."""
    store, project = settings.open()
    found = store.requests(*([settings.state] if settings.state else []))
    print_list(settings.db, found)
    print_bases(bases(store), project)
    if settings.json_path is not None:
        hidden = ("text", "row_hashes", "salt")
        rows = [{k: v for k, v in asdict(request).items() if k not in hidden} for request in found]
        write_atomic(settings.json_path, to_json(rows))
    if settings.state is None:
        suggest(settings, found)
    return found


class Show(Database):
    """Show one request: what it is, its evidence, and all that happened to it."""

    id: tyro.conf.Positional[str]
    """Its id, R-0007 or 7."""
    json_path: OutFile = None
    """File for all of it."""


def show_request(settings: Show) -> Request:
    """Run `alter request show`.

    Raises:
        UserError: there is no such request.
    """
    store, _ = settings.open()
    request = store.get(parse_id(settings.id))
    history = store.history(request.id)
    console = Console()
    facts = FittedTable(title=cell(f"{request.name}: {request.subject or '(purged)'}"), show_header=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name in ("state", "received", "due", "data", "data_hash", "rows", "expert"):
        facts.add_row(name, cell(getattr(request, name) or ""))
    console.print(facts)
    if request.after:
        evidence = FittedTable(title="Evidence")
        for column in ("", "before", "after", "reference"):
            evidence.add_column(column)
        for name in ("probability", "exact_memorization", "rouge", "said", "broken", "empty", "repetition"):
            parts = (request.before, request.after, request.after.get("reference"))
            evidence.add_row(name, *(cell(told(part, name)) for part in parts))
        console.print(evidence)
        found = request.after["verdict"]
        console.print(cell(f"{found['word'].upper()}. {' '.join(found['why'])}"))
        console.print(f"Utility kept: {request.after['utility_share']:.4f} of the untouched model.", highlight=False)
        console.print(cell(still_known([request]), "dim"))
    log = FittedTable(title="History")
    for column in ("at", "who", "what", "details", "hash"):
        log.add_column(column, overflow="fold")
    for entry in history:
        kept = {key: value for key, value in entry.details.items() if value is not None and key != "record"}
        details = ", ".join(f"{key}: {value}" for key, value in kept.items())
        log.add_row(*map(cell, (entry.at, entry.who, entry.what, details, entry.hash[:12])))
    console.print(log)
    console.print(cell(f"Head of the history: {store.head()}"))
    if settings.json_path is not None:
        content = {**asdict(request), "salt": None, "history": [asdict(entry) for entry in history]}
        write_atomic(settings.json_path, to_json(content))
    suggest(settings, [request])
    return request
