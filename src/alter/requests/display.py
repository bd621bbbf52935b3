"""Output that the request commands share: what was done, the list of requests, and the next command."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from alter.core import cell
from alter.evaluation.told import told
from alter.rendering import FittedTable
from alter.requests.database import Database, default_db
from alter.requests.records import HELD, MISSED, Request

if TYPE_CHECKING:
    from alter.requests.bases import Base
    from alter.requests.project import Project
    from alter.requests.store import Store

BASE_KNOWS = (
    "The base weights still know all of it: the adapter keeps the model from saying so, and can be switched off."
)

FORGOTTEN = "The weights in force have forgotten what is distilled: only the model from before still knows it."


def still_known(requests: Iterable[Request]) -> str:
    """Return the sentence on who still knows what the requests are about."""
    states = {request.state for request in requests if request.after}
    said = [FORGOTTEN] if "distilled" in states else []
    # it holds for withdrawn requests too: nothing removed them from the base
    return " ".join([*said, BASE_KNOWS] if states - {"distilled"} or not said else said)


def say_with_head(sentence: str, store: Store) -> None:
    """Print what was done, and the head of the history."""
    console = Console()
    console.print(cell(sentence))
    console.print(cell(f"Head of the history, to be written down elsewhere: {store.head()}"))


def then(settings: Database, command: str, why: str = "") -> None:
    """Print the next command, for the same database; a password in the URL must be typed again."""
    from alter.requests.connection import without_password

    here = "" if settings.db == default_db() else f" --db {shlex.quote(without_password(settings.db))}"
    Console(soft_wrap=True).print(cell(f"Next: {command}{here}{why and f' ({why})'}"))


def suggest(settings: Database, requests: Sequence[Request]) -> None:
    """Print the next commands for the requests' states: pending requests before finished ones."""
    states = {request.state: request.name for request in requests}
    if not requests:
        then(settings, "alter request add --subject NAME --data ROWS.jsonl")
    elif states.keys() & {"received", "running", "trained"}:
        then(settings, "alter request run")
    elif states.keys() & set(MISSED):
        then(settings, "alter request run --again", "nothing of what was missed is in force")
    elif states.keys() & set(HELD):
        then(settings, "alter request verify", "now and later; `alter certificate ID --key FILE` signs the evidence")
    else:
        then(settings, f"alter request purge {next(reversed(states.values()))}", "if its data must go")


def print_list(db: str, found: Sequence[Request]) -> None:
    """Print requests of the database at `db` as a table: the state of each, and its figures."""
    from alter.requests.connection import without_password

    table = FittedTable(
        title=cell(f"Erasure requests in {without_password(db)}"),
        caption="said: replies that still give the answer; probability of the true answers before and after;\n"
        "broken: broken or empty replies; utility: share of the untouched model's",
    )
    for column in ("id", "subject", "state", "due", "said", "probability", "broken", "utility"):
        table.add_column(
            column,
            justify="right" if column in ("said", "utility") else "left",
            overflow="fold",
            min_width=len(column),
        )
    for request in found:
        before, after = request.before or {}, request.after or {}
        row = (
            request.name,
            request.subject or "(purged)",
            _state(request),
            request.due or "",
            told(after, "said"),
            f"{told(before, 'probability')} → {told(after, 'probability')}" if "probability" in after else "",
            told(after, "unusable"),
            told(after, "utility_share"),
        )
        table.add_row(*map(cell, row))
    Console().print(table)
    if any(request.after for request in found):
        Console().print(cell(still_known(found), "dim"))


def _state(request: Request) -> str:
    """Return the state; for a distilled request with the base that holds it, and its verdict unless it is the best."""
    if request.state != "distilled" or request.after is None:
        return request.state
    word = request.after["verdict"]["word"]
    return f"distilled, base {request.after['base']}" + ("" if word == "forgotten" else f", {word}")


def print_bases(found: Sequence[Base], project: Project) -> None:
    """Print which weights hold which requests, and which of them are in force."""
    if not found:
        return
    console = Console()
    for base in found:
        earlier = f" and what base {base.number - 1} holds" if base.number > 1 else ""
        console.print(
            cell(
                f"Base {base.number} ({base.at[:10]}, {base.weights[:12]}) holds {', '.join(base.requests)}{earlier}; utility "
                f"{base.utility:.3f} of the first model's"
                + (f". In force: {project.model}" if base is found[-1] else ".")
            )
        )
