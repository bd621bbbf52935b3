"""`alter request …`: what a privacy engineer types, and what is printed."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from alter.core.errors import UserError, nearest
from alter.core.files import to_json, write_atomic
from alter.data.examples import load_examples
from alter.requests import work
from alter.requests.store import Request, Store, check_due, parse_id
from alter.requests.work import Project
from alter.training.settings import Unlearn

STATES = Literal["received", "running", "failed", "done", "revoked", "withdrawn"]


def _default_db() -> str:
    return os.environ.get("ALTER_DB", "sqlite:///alter-requests/requests.db")


class Database(BaseModel):
    """Which database of requests; the settings that every command has."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    db: str = Field(default_factory=_default_db)
    """Database as an SQLAlchemy URL; by default the environment's ALTER_DB, else a file in alter-requests/."""
    who: str | None = None
    """Who does this, for the history; by default user and machine."""

    def open(self) -> tuple[Store, Project]:
        """The database and what its requests share."""
        store = Store.open(self.db)
        return store, Project.model_validate(store.project())


class Init(Database):
    """Make a database of requests for one model."""

    model: str
    """Model that has to forget: local folder, hub id, or builtin:NAME."""
    retain: str
    """What must not change: a JSON or JSONL file, or NAME:SPLIT."""
    folder: str = "alter-requests"
    """Where adapters and runs lie."""
    holdout: str | None = None
    """Rows that the model never saw, as the reference of what not knowing looks like."""
    retrained: str | None = None
    """Model retrained without the requests' rows, if there is one: a better reference than a holdout."""
    recipe: str | None = None
    """YAML with the settings of `alter unlearn` that every request uses."""


def init(settings: Init) -> Store:
    """Run `alter request init`.

    Raises:
        UserError: the data cannot be read, the recipe has a setting that the requests decide, or the database is in use.
    """
    recipe: dict[str, Any] = {}
    if settings.recipe is not None:
        path = Path(settings.recipe)
        if not path.is_file():
            near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
            raise UserError(f"No recipe at {path}.{near}")
        recipe = yaml.safe_load(path.read_text()) or {}
        decided = sorted(set(recipe) & work.CUT)
        if decided:
            raise UserError(f"{path} sets {', '.join(decided)}, which the requests decide: take it out.")
    Unlearn.model_validate({**recipe, "model": "m", "forget": "f", "retain": "r", "out": "o", "experts_only": True})
    retain = load_examples(settings.retain)
    if settings.holdout is not None:
        work.check_unseen(load_examples(settings.holdout), retain)
    root = Path(settings.folder)
    if (root / "adapter").exists():
        raise UserError(f"{root} holds the adapter of other requests; give another --folder.")
    project = Project(
        model=settings.model,
        retain=settings.retain,
        folder=str(root.resolve()),
        holdout=settings.holdout,
        retrained=settings.retrained,
        recipe=recipe,
    )
    root.mkdir(parents=True, exist_ok=True)
    store = Store.create(settings.db, project.model_dump(), settings.who)
    Console().print(
        f"Requests about {settings.model} are kept in {settings.db}, adapters in {root}.\n"
        "Next: alter request add --subject NAME --data ROWS.jsonl",
        highlight=False,
        markup=False,
    )
    return store


class Add(Database):
    """Write down an erasure request."""

    subject: str
    """Whom or what it is about."""
    data: str
    """The rows to forget: a JSON, JSONL or text file, or NAME:SPLIT."""
    due: str | None = None
    """Date until which it must be done, 2026-12-31."""
    keep_text: bool = False
    """Store the rows themselves in the database, not only where they lie and their hash."""
    allow_in_retain: bool = False
    """Accept a subject whose name occurs in the retain set."""


def add(settings: Add) -> Request:
    """Run `alter request add`.

    Raises:
        UserError: no rows, rows or subject in the retain set, rows that another request has, a due date that is none.
    """
    store, project = settings.open()
    due = check_due(settings.due)
    if not settings.subject.strip():
        raise UserError("--subject is empty: say whom or what the request is about.")
    examples = load_examples(settings.data)
    if not examples:
        raise UserError(f"{settings.data} has no rows: a request needs the data that is to be forgotten.")
    retain = load_examples(project.retain)
    work.check_overlap(examples, retain)
    if not settings.allow_in_retain:
        work.check_subject(settings.subject, retain)
    hashes = [work.row_hash(example) for example in examples]
    local = Path(settings.data).expanduser()
    request = store.add(
        subject=settings.subject.strip(),
        data=str(local.resolve()) if local.exists() else settings.data,
        data_hash=work.data_hash(hashes),
        row_hashes=hashes,
        due=due,
        text="\n".join(json.dumps(example.row, ensure_ascii=False) for example in examples)
        if settings.keep_text
        else None,
        who=settings.who,
    )
    Console().print(f"{request.name} received: {request.subject}, {request.rows} rows.", highlight=False, markup=False)
    return request


class List(Database):
    """Show all requests."""

    state: STATES | None = None
    """Only those in this state."""
    json_path: str | None = None
    """File for the list, without texts."""


def _figure(values: dict[str, Any] | None, name: str) -> str:
    value = (values or {}).get(name)
    return "" if value is None else f"{value:.3f}"


def list_requests(settings: List) -> list[Request]:
    """Run `alter request list`."""
    store, _ = settings.open()
    found = store.requests(*([settings.state] if settings.state else []))
    table = Table(
        title=f"Erasure requests in {settings.db.split('@')[-1]}",
        caption="ROUGE-L recall of the answers before and after, and of a model that never saw the rows",
    )
    for column in ("id", "subject", "state", "due", "rows", "ROUGE-L", "forgotten", "utility"):
        table.add_column(column, justify="right" if column in ("rows", "utility") else "left", overflow="fold")
    for request in found:
        after = request.after or {}
        forgotten = {True: "yes", False: "NO", None: "?" if after else ""}[after.get("forgotten")]
        rouge = ""
        if after:
            rouge = f"{_figure(request.before, 'rouge') or '-'} → {_figure(after, 'rouge') or '-'}"
            if after.get("reference"):
                rouge += f" ({_figure(after['reference'], 'rouge') or '-'})"
        table.add_row(
            request.name,
            request.subject,
            request.state,
            request.due or "",
            str(request.rows),
            rouge,
            forgotten,
            _figure(after, "utility_share"),
        )
    Console().print(table)
    if settings.json_path is not None:
        hidden = ("text", "row_hashes")
        rows = [{k: v for k, v in asdict(request).items() if k not in hidden} for request in found]
        write_atomic(settings.json_path, to_json(rows))
    return found


class Show(Database):
    """Show one request: what it is, its evidence, and all that happened to it."""

    id: tyro.conf.Positional[str]
    """Its id, R-0007 or 7."""
    json_path: str | None = None
    """File for all of it."""


def show(settings: Show) -> Request:
    """Run `alter request show`.

    Raises:
        UserError: there is no such request.
    """
    store, _ = settings.open()
    request = store.get(parse_id(settings.id))
    history = store.history(request.id)
    console = Console()
    facts = Table(title=f"{request.name}: {request.subject}", show_header=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name in ("state", "received", "due", "data", "data_hash", "rows", "expert"):
        facts.add_row(name, str(getattr(request, name) or ""))
    console.print(facts)
    if request.after:
        evidence = Table(title="Evidence")
        for column in ("", "before", "after", "reference"):
            evidence.add_column(column)
        for name in ("probability", "exact_memorization", "rouge"):
            evidence.add_row(
                name,
                _figure(request.before, name),
                _figure(request.after, name),
                _figure(request.after.get("reference"), name),
            )
        console.print(evidence)
        console.print(f"Utility kept: {request.after['utility_share']:.4f} of the untouched model.", highlight=False)
    log = Table(title="History")
    for column in ("at", "who", "what", "details", "hash"):
        log.add_column(column, overflow="fold")
    for entry in history:
        details = ", ".join(f"{key}: {value}" for key, value in entry.details.items() if value is not None)
        log.add_row(entry.at, entry.who, entry.what, details, entry.hash[:12])
    console.print(log)
    if settings.json_path is not None:
        content = {**asdict(request), "history": [asdict(entry) for entry in history]}
        write_atomic(settings.json_path, to_json(content))
    return request


class Run(Database):
    """Make the model forget: all requests received so far as one run, or those named."""

    id: tyro.conf.Positional[list[str]] = Field(default_factory=list)
    """Ids; by default every request in state received."""
    again: bool = False
    """Also those that failed."""


def run(settings: Run) -> list[Request]:
    """Run `alter request run`.

    Raises:
        UserError: nothing to do, another process at work, or what `work.run` raises.
    """
    store, project = settings.open()
    with store.lease(settings.who):
        work.recover(store, project)
        if settings.id:
            chosen = [store.get(number) for number in dict.fromkeys(map(parse_id, settings.id))]
            for request in chosen:
                store.check_edge(request, "running")
        else:
            chosen = store.requests("received", *(["failed"] if settings.again else []))
            if not chosen and store.requests("failed"):
                raise UserError("Nothing to run but requests that failed: `alter request run --again` tries them.")
        done = work.run(store, project, chosen)
    list_requests(List(db=settings.db))
    return done


class Verify(Database):
    """Check that nothing was altered and that what was forgotten still is."""

    chain_only: bool = False
    """Check history and adapter alone, without loading the model."""


def verify(settings: Verify) -> dict[str, Any]:
    """Run `alter request verify`.

    Raises:
        UserError: something is wrong; all of it is said.
    """
    store, project = settings.open()
    with store.lease(settings.who):
        work.recover(store, project)
        found, wrong, unchecked = work.verify(store, project, behaviour=not settings.chain_only)
    console = Console()
    table = Table(title="Still forgotten?")
    for column in ("request", "ROUGE-L when done", "now", "probability when done", "now"):
        table.add_column(column, justify="left" if column == "request" else "right")
    for request in store.requests("done"):
        if request.name in found:
            now = found[request.name]
            table.add_row(
                f"{request.name} {request.subject}",
                _figure(request.after, "rouge"),
                _figure(now, "rouge"),
                _figure(request.after, "probability"),
                _figure(now, "probability"),
            )
    if table.rows:
        console.print(table)
        console.print(f"Utility kept: {found['utility']['share']:.4f} of the untouched model.", highlight=False)
    for sentence in unchecked:
        console.print(f"Not checked: {sentence}", highlight=False, markup=False)
    store.note(None, "verified", {"wrong": wrong, "unchecked": unchecked, "measured": found}, settings.who)
    if wrong:
        raise UserError("Not as it should be: " + " ".join(wrong))
    console.print(f"All is as it should be. Head of the history: {store.head()}", highlight=False)
    return found


class Revoke(Database):
    """Take a request back: the model answers again as it did, all else stays."""

    id: tyro.conf.Positional[str]
    """Its id, R-0007 or 7."""


def revoke(settings: Revoke) -> Request:
    """Run `alter request revoke`: an erasure that is done is undone, one that has not run is withdrawn.

    Raises:
        UserError: there is no such request, or it is revoked already.
    """
    store, project = settings.open()
    number = parse_id(settings.id)
    with store.lease(settings.who):
        work.recover(store, project)
        request = store.get(number)
        if request.state in ("received", "failed"):
            request = store.move([number], "withdrawn", who=settings.who)[0]
        else:
            request = work.revoke(store, project, request, settings.who)
    Console().print(f"{request.name} is {request.state}.", highlight=False)
    return request


class Export(Database):
    """Write out what the requests amount to: an adapter, or a merged model."""

    out: str
    """Folder for it; must not exist."""
    form: Literal["adapter", "merged"] = "adapter"
    """adapter: small and exact, but whoever has the base has the knowledge. merged: a model without its base, which for
    routed experts is an approximation; the difference is measured and written down."""
    approximate: bool = False
    """Accept that approximation."""


def export(settings: Export) -> Path:
    """Run `alter request export`.

    Raises:
        UserError: nothing is done yet, the folder exists, or merging would be inexact and that was not accepted.
    """
    store, project = settings.open()
    out = Path(settings.out)
    if out.exists():
        raise UserError(f"{out} exists; give another --out.")
    with store.lease(settings.who):
        work.recover(store, project)
        inside = work.manifest(project)
        if not inside["version"]:
            raise UserError("Nothing to export: no request has run yet. `alter request run` does it.")
        measured = None
        out.parent.mkdir(parents=True, exist_ok=True)
        if settings.form == "merged":
            if not settings.approximate:
                raise UserError(
                    "A routed adapter is no fixed change of the weights, so merging it is not exact: --approximate opens "
                    "all experts for every token and measures what that costs. --form adapter is exact."
                )
            measured = work.merge(project, out)
        else:
            partial = out.with_name(f".{out.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(project.adapter.resolve(), partial)
            partial.replace(out)
        write_atomic(out / "README.md", work.card(store, project, settings.form, measured))
        details = {"form": settings.form, "version": inside["version"], "out": str(out)}
        store.note(None, "exported", details, settings.who)
    Console().print(f"{settings.form}: {out}", highlight=False, markup=False)
    return out
