"""`alter request …`: what a privacy engineer types, and what is printed.

What trains or loads models is imported by the functions that need it, so that lists and help come at once.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Container, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table

from alter.core.console import cell
from alter.core.errors import UserError
from alter.core.files import folder_digest, to_json, write_atomic
from alter.core.outputs import OutFile, OutFolder
from alter.core.recipes import read_recipe
from alter.core.signing import fingerprint, read_key, read_public
from alter.core.validation import validated
from alter.data.examples import check_overlap, data_hash, load_examples, row_hash
from alter.evaluation.told import told
from alter.requests.anchor import Anchor, missing_heads, read_heads
from alter.requests.project import Project
from alter.requests.records import IN_FORCE, MISSED, Request, check_due, parse_id

if TYPE_CHECKING:
    from alter.requests.checking import Findings
    from alter.requests.store import Store

STATES = Literal[
    "received",
    "running",
    "trained",
    "failed",
    "forgotten",
    "unproven",
    "not forgotten",
    "collapsed",
    "revoked",
    "withdrawn",
]
BASE = "The base weights still know all of it: the adapter keeps the model from saying so, and can be switched off."


def _default_db() -> str:
    return os.environ.get("ALTER_DB", "sqlite:///alter-requests/requests.db")


class Database(BaseModel):
    """Which database of requests; the settings that every command has."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    db: str = Field(default_factory=_default_db)
    """Database as an SQLAlchemy URL; by default the environment's ALTER_DB, else a file in alter-requests/."""
    who: str | None = None
    """Who does this, for the history; by default user and machine."""
    anchor: str | None = Field(default_factory=lambda: os.environ.get("ALTER_ANCHOR"))
    """File outside the database for every head of the history, signed; by default the environment's ALTER_ANCHOR."""
    key: str | None = Field(default_factory=lambda: os.environ.get("ALTER_KEY"))
    """Private key that signs; `alter certificate --new-key` makes one. By default the environment's ALTER_KEY."""

    def open(self) -> tuple[Store, Project]:
        """The database and what its requests share.

        Raises:
            UserError: there is none, it is older than its anchor or another, or the anchor has no key.
        """
        store, project = self.open_unchecked()
        if store.anchor is not None:
            store.anchor.refuse([(entry.number, entry.hash) for entry in store.history()])
        return store, project

    def open_unchecked(self) -> tuple[Store, Project]:
        """The same, without a look at what the anchor holds.

        Raises:
            UserError: there is no database, or the anchor has no key.
        """
        from alter.requests.store import Store

        store = Store.open(self.db)
        store.anchor = self._anchor()
        return store, Project.model_validate(store.project())

    def _anchor(self) -> Anchor | None:
        if self.anchor is None:
            return None
        if self.key is None:
            raise UserError("The lines of --anchor are signed: give --key FILE, or ALTER_KEY.")
        return Anchor(self.anchor, read_key(self.key))


class Init(Database):
    """Make a database of requests for one model."""

    model: str
    """Model that has to forget: local folder, hub id, or builtin:NAME."""
    retain: str
    """What must not change: a JSON or JSONL file, or NAME:SPLIT."""
    folder: OutFolder = "alter-requests"
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
        UserError: there is no such model, the data cannot be read, the recipe has a setting that the requests decide, or the
            database is in use.
    """
    from alter.models.loading import check_model_name
    from alter.requests import rows, work
    from alter.requests.connection import without_password
    from alter.requests.store import Store
    from alter.training.settings import Unlearn

    for name in filter(None, (settings.model, settings.retrained)):
        check_model_name(name)
    recipe: dict[str, Any] = {}
    if settings.recipe is not None:
        recipe = read_recipe(settings.recipe)
        decided = sorted(set(recipe) & work.CUT)
        if decided:
            raise UserError(f"{settings.recipe} sets {', '.join(decided)}, which the requests decide: take it out.")
    needed = {"model": "m", "forget": "f", "retain": "r", "out": "o", "experts_only": True}
    validated(Unlearn, {**recipe, **needed}, settings.recipe or "recipe")
    retain = load_examples(settings.retain)
    if settings.holdout is not None:
        rows.check_unseen(load_examples(settings.holdout), retain)
    anchor = settings._anchor()
    if anchor is not None and anchor.path.exists():
        raise UserError(f"{anchor.path} holds the heads of another database; give another --anchor.")
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
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    root.chmod(0o700)
    store = Store.create(settings.db, project.model_dump(), settings.who, anchor)
    Console().print(
        cell(f"Requests about {settings.model} are kept in {without_password(settings.db)}, adapters in {root}.")
    )
    _then(settings, "alter request add --subject NAME --data ROWS.jsonl")
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
    from alter.requests import rows

    store, project = settings.open()
    due = check_due(settings.due)
    if not settings.subject.strip():
        raise UserError("--subject is empty: say whom or what the request is about.")
    examples = load_examples(settings.data)
    if not examples:
        raise UserError(f"{settings.data} has no rows: a request needs the data that is to be forgotten.")
    retain = load_examples(project.retain)
    check_overlap(examples, retain)
    if not settings.allow_in_retain:
        rows.check_kept_subject(settings.subject, retain)
    hashes = [row_hash(example) for example in examples]
    local = Path(settings.data).expanduser()
    request = store.add(
        subject=settings.subject.strip(),
        data=str(local.resolve()) if local.exists() else settings.data,
        data_hash=data_hash(hashes),
        row_hashes=hashes,
        due=due,
        text="\n".join(json.dumps(example.row, ensure_ascii=False) for example in examples)
        if settings.keep_text
        else None,
        who=settings.who,
    )
    _say(f"{request.name} received: {request.subject}, {request.rows} rows.", store)
    _then(settings, "alter request run")
    return request


def _say(sentence: str, store: Store) -> None:
    """Print what was done, and the head of the history."""
    console = Console()
    console.print(cell(sentence))
    console.print(cell(f"Head of the history, to be written down elsewhere: {store.head()}"))


def _then(settings: Database, command: str, why: str = "") -> None:
    """Print what to type next, for the same database; its password has to be put in again."""
    from alter.requests.connection import without_password

    here = "" if settings.db == _default_db() else f" --db {shlex.quote(without_password(settings.db))}"
    Console(soft_wrap=True).print(cell(f"Next: {command}{here}{why and f' ({why})'}"))


def _next(settings: Database, requests: Sequence[Request]) -> None:
    """Print what to type next, as the requests stand: what waits comes before what is done."""
    states = {request.state: request.name for request in requests}
    if not requests:
        _then(settings, "alter request add --subject NAME --data ROWS.jsonl")
    elif states.keys() & {"received", "running", "trained"}:
        _then(settings, "alter request run")
    elif states.keys() & set(MISSED):
        _then(settings, "alter request run --again", "nothing of what was missed is in force")
    elif states.keys() & set(IN_FORCE):
        _then(settings, "alter request verify", "now and later; alter certificate ID --key FILE signs the evidence")
    else:
        _then(settings, f"alter request purge {next(reversed(states.values()))}", "if its data must go")


class List(Database):
    """Show all requests."""

    state: STATES | None = None
    """Only those in this state."""
    json_path: OutFile = None
    """File for the list, without texts."""


def list_requests(settings: List) -> list[Request]:
    """Run `alter request list`."""
    store, _ = settings.open()
    found = store.requests(*([settings.state] if settings.state else []))
    _print_list(settings.db, found)
    if settings.json_path is not None:
        hidden = ("text", "row_hashes", "salt")
        rows = [{k: v for k, v in asdict(request).items() if k not in hidden} for request in found]
        write_atomic(settings.json_path, to_json(rows))
    if settings.state is None:
        _next(settings, found)
    return found


def _print_list(db: str, found: Sequence[Request]) -> None:
    from alter.requests.connection import without_password

    table = Table(
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
            request.state,
            request.due or "",
            told(after, "said"),
            f"{told(before, 'probability')} → {told(after, 'probability')}" if "probability" in after else "",
            told(after, "unusable"),
            told(after, "utility_share"),
        )
        table.add_row(*map(cell, row))
    Console().print(table)
    if any(request.after for request in found):
        Console().print(cell(BASE, "dim"))


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
    facts = Table(title=cell(f"{request.name}: {request.subject or '(purged)'}"), show_header=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name in ("state", "received", "due", "data", "data_hash", "rows", "expert"):
        facts.add_row(name, cell(getattr(request, name) or ""))
    console.print(facts)
    if request.after:
        evidence = Table(title="Evidence")
        for column in ("", "before", "after", "reference"):
            evidence.add_column(column)
        for name in ("probability", "exact_memorization", "rouge", "said", "broken", "empty", "repetition"):
            parts = (request.before, request.after, request.after.get("reference"))
            evidence.add_row(name, *(cell(told(part, name)) for part in parts))
        console.print(evidence)
        found = request.after["verdict"]
        console.print(cell(f"{found['word'].upper()}. {' '.join(found['why'])}"))
        console.print(f"Utility kept: {request.after['utility_share']:.4f} of the untouched model.", highlight=False)
        console.print(cell(BASE, "dim"))
    log = Table(title="History")
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
    _next(settings, [request])
    return request


class RunRequests(Database):
    """Make the model forget: all requests received so far as one run, or those named."""

    id: tyro.conf.Positional[list[str]] = Field(default_factory=list)
    """Ids; by default every request in state received."""
    again: bool = False
    """Also those that failed, were not forgotten, or collapsed."""


def run(settings: RunRequests) -> list[Request]:
    """Run `alter request run`.

    Raises:
        UserError: nothing to do, another process at work, what `work.run_requests` raises, or a request that was not forgotten or
            at which the model collapsed: said after everything is written down.
    """
    from alter.requests import checking, work

    store, project = settings.open()
    with store.lease(settings.who):
        # an earlier run may have been cut off after training: its requests are measured here and belong to this run's result
        found = work.recover(store, project, resume=True)
        measured = {request.id for request in found}
        checking.refuse_changed(store, project)
        if settings.id:
            named = [store.get(number) for number in dict.fromkeys(map(parse_id, settings.id))]
            chosen = [request for request in named if request.id not in measured]
            for request in chosen:
                store.check_edge(request, "running")
        else:
            waiting = store.requests("received", *(MISSED if settings.again else []))
            chosen = [request for request in waiting if request.id not in measured]
            missed = store.requests(*MISSED)
            if not chosen and missed and not found:
                raise UserError(
                    f"Nothing to run but {', '.join(f'{r.name} ({r.state})' for r in missed)}: `alter request run --again` "
                    "tries them."
                )
        if chosen or not found:
            found += work.run_requests(store, project, chosen)
    _print_list(settings.db, store.requests())
    console = Console()
    for request in found:
        verdict = (request.after or {})["verdict"]
        console.print(cell(f"{request.name}: {verdict['word'].upper()}. {' '.join(verdict['why'])}"))
    failed = [request for request in found if request.state in MISSED]
    if failed:
        raise UserError(
            f"{', '.join(f'{r.name} {r.state.upper()}' for r in failed)}: nothing of it was put in force. Change the "
            "settings (more epochs or a higher rate for NOT FORGOTTEN, a lower rate for COLLAPSED) in a new project's "
            "--recipe, or try again: alter request run --again"
        )
    _say("The requests are in force.", store)
    _then(settings, f"alter request verify --head {store.head()[:12]}", "now and later")
    return found


class Verify(Database):
    """Check that nothing was altered, and that nothing has come back since it was measured."""

    chain_only: bool = False
    """Check history and adapter alone, without loading the model."""
    head: str | None = None
    """Head of the history as it was written down elsewhere, or its beginning: shows a history cut or written anew."""
    samples: int = Field(0, ge=0, le=10_000)
    """Also sample so many replies to each question: leak@1 to leak@samples beside the untouched model. 0: none."""
    certificate: list[str] = Field(default_factory=list)
    """Certificates of this database: their heads must be in its history."""
    public_key: list[str] = Field(default_factory=list)
    """Public keys, of which one must have signed anchor and certificates: files, or 64 hexadecimal digits each. By
    default the one of --key."""


def verify(settings: Verify) -> dict[str, Any]:
    """Run `alter request verify`.

    Raises:
        UserError: something is wrong; all of it is said.
    """
    from alter.evaluation.leakage import Leak
    from alter.requests import checking, work

    if settings.samples and settings.chain_only:
        raise UserError("--chain-only loads no model, so nothing can be sampled: leave --samples out.")
    trusted = [read_public(each) for each in settings.public_key]
    if settings.key is not None:
        trusted.append(read_key(settings.key).public)
    # to check needs no private key
    store, project = (settings if settings.key else settings.model_copy(update={"anchor": None})).open_unchecked()
    kept = [head for path in (settings.anchor, *settings.certificate) if path for head in read_heads(path, trusted)]
    if settings.head is not None and not re.fullmatch(r"[0-9a-f]{12,64}", settings.head):
        raise UserError(f"--head is {settings.head!r}; expected 12 to 64 digits 0-9, a-f, as the commands print it.")
    heads = [] if settings.head is None else [settings.head]
    with store.lease(settings.who):
        entries = [(entry.number, entry.hash) for entry in store.history()]
        # what was altered must not be taken for what a kill left
        _refuse_wrong(missing_heads(kept, entries) or store.check_chain(heads))
        work.recover(store, project)
        found = checking.check_requests(
            store, project, behaviour=not settings.chain_only, heads=heads, leak=Leak(samples=settings.samples)
        )
    console = Console()
    _print_findings(console, store.requests(*IN_FORCE), found)
    store.note(None, "verified", found.as_noted(), settings.who)
    _refuse_wrong(found.wrong)
    console.print(
        cell(
            "Unchanged: history and adapter are as they were recorded"
            + (", and nothing measured has come back since." if found.measured else ".")
            + " Whether a request was forgotten then is in its evidence (alter request show ID). "
            + BASE
        )
    )
    if kept:
        console.print(
            cell(
                f"The history holds all {len(kept)} heads that were kept elsewhere, the last of {kept[-1].at}, signed by "
                f"key {', '.join(sorted({fingerprint(head.key) for head in kept}))}"
                + ("." if trusted else ", which nobody vouches for: give --public-key.")
            )
        )
    console.print(cell(f"Head of the history: {store.head()}"))
    _then(settings, f"alter request verify --head {store.head()[:12]}", "later, with the head of today")
    return found.measured


def _refuse_wrong(wrong: Sequence[str]) -> None:
    """Raise UserError if anything is wrong."""
    if wrong:
        raise UserError("Not as it should be: " + " ".join(wrong))


def _print_findings(console: Console, held: Sequence[Request], found: Findings) -> None:
    """Print what was measured of the requests in force, beside what it was when they took effect."""
    table = Table(title="Unchanged since it was measured?")
    for column in ("request", "measured", "said", "now", "probability", "now"):
        table.add_column(column, justify="left" if column in ("request", "measured") else "right", overflow="fold")
    for request in held:
        if request.name in found.measured:
            now, then = found.measured[request.name], request.after or {}
            row = (
                f"{request.name} {request.subject}",
                str(then.get("measured", ""))[:10],
                told(then, "said"),
                told(now, "said"),
                told(then, "probability"),
                told(now, "probability"),
            )
            table.add_row(*map(cell, row))
    if table.rows:
        console.print(table)
        share = found.measured["utility"]["share"]
        console.print(f"Utility kept: {share:.4f} of the untouched model.", highlight=False)
    for name, measured in found.measured.items():
        for k, at in measured.get("leak", {}).get("at", {}).items():
            other = measured["leak_untouched"]["at"][k]["value"]
            console.print(f"{name} leak@{k}: {at['value']:.3f}, {other:.3f} by the untouched model", highlight=False)
    for sentence in found.unchecked:
        console.print(cell(f"Not checked: {sentence}"))


class Revoke(Database):
    """Take a request back: the model answers again as it did, all else stays."""

    id: tyro.conf.Positional[str]
    """Its id, R-0007 or 7."""


def revoke(settings: Revoke) -> Request:
    """Run `alter request revoke`: an erasure that is done is undone, one that has not run is withdrawn.

    The other requests are measured again at once, since some of their tokens may have gone by the expert that is empty
    now.

    Raises:
        UserError: there is no such request, it is revoked already, the adapter is not the one in the history, or another
            request has come back with it.
    """
    from alter.requests import checking, work

    store, project = settings.open()
    number = parse_id(settings.id)
    wrong: list[str] = []
    checked = False
    with store.lease(settings.who):
        work.recover(store, project)
        request = store.get(number)
        if request.state in ("received", *MISSED):
            request = store.move([number], "withdrawn", who=settings.who)[0]
        else:
            checking.refuse_changed(store, project)
            request = work.revoke_request(store, project, request, settings.who)
            if store.requests(*IN_FORCE):
                found = checking.check_requests(store, project)
                wrong, checked = found.wrong, True
                for sentence in found.unchecked:
                    Console().print(cell(f"Not checked: {sentence}"))
                store.note(None, "verified", found.as_noted(), settings.who)
    others = " What was measured of the others has not come back." if checked and not wrong else ""
    others += "".join(
        f" The weights at {entry.details['out']} ({entry.at[:10]}) have forgotten it for good."
        for entry in store.history()
        if entry.what == "exported"
        and entry.details.get("form") == "weights"
        and request.name in entry.details.get("holds", [])
    )
    _say(f"{request.name} is {request.state}.{others}", store)
    if not wrong:
        _then(settings, f"alter request purge {request.name}", "if its data must go")
    if wrong:
        raise UserError(
            f"{request.name} is revoked, but not all is as it should be: {' '.join(wrong)} A request that has come back "
            "must be revoked and added again."
        )
    return request


class Purge(Database):
    """Remove what is kept of a request's subject and rows; list what was removed and what cannot be reached."""

    id: tyro.conf.Positional[str]
    """Its id, R-0007 or 7."""


def purge(settings: Purge) -> tuple[list[str], list[str]]:
    """Run `alter request purge`.

    Raises:
        UserError: there is no such request, or it has yet to be run.
    """
    from alter.requests import removal, work

    store, project = settings.open()
    number = parse_id(settings.id)
    with store.lease(settings.who):
        work.recover(store, project)
        request = store.get(number)
        removed, left = removal.remove_kept(store, project, request, settings.who)
    console = Console()
    for title, lines in (("Removed:", removed), ("Out of reach, or kept as evidence:", left)):
        console.print(cell(title, "bold"))
        for line in lines or ["nothing"]:
            console.print(cell(f"  {line}"))
    console.print(cell(f"Head of the history: {store.head()}"))
    _then(settings, "alter request list", "what is out of reach has to be removed by hand" if left else "")
    return removed, left


class Export(Database):
    """Write out what the requests amount to: an adapter, plain weights that learned from it, LoRAs, or a merged model."""

    out: OutFolder
    """Folder for it; must not exist."""
    form: Literal["adapter", "weights", "loras", "merged"] = "adapter"
    """adapter: small and exact, but whoever has the base has the knowledge. weights: a plain model, distilled from base and
    adapter (`alter distill`) and measured on every request. loras: one plain LoRA for each request. merged: a model with all
    experts open for every token, which is an approximation; the difference is measured and written down."""
    approximate: bool = False
    """Accept that approximation."""
    final: bool = False
    """Accept that what weights have forgotten cannot be revoked in them."""
    recipe: str | None = None
    """YAML with settings of `alter distill` for the form weights."""


def _distill_recipe(settings: Export, decided: Container[str]) -> dict[str, Any]:
    """Settings of `alter distill` for the form weights; those in `decided` are not for the recipe to say.

    Raises:
        UserError: it sets one of them, or another form is wanted.
    """
    if settings.recipe is None:
        return {}
    if settings.form != "weights":
        raise UserError("--recipe holds settings of `alter distill`, which only --form weights uses: leave it out.")
    recipe = read_recipe(settings.recipe)
    wrong = sorted(name for name in recipe if name in decided)
    if wrong:
        raise UserError(f"{settings.recipe} sets {', '.join(wrong)}, which the requests decide: take it out.")
    return recipe


def _check_accepted(settings: Export, held: Sequence[str]) -> None:
    """Refuse an inexact or irrevocable form that was not accepted by its flag; `held` are the requests in force."""
    if settings.form == "merged" and not settings.approximate:
        raise UserError(
            "A routed adapter is no fixed change of the weights, so merging it is not exact: --approximate opens "
            "all experts for every token and measures what that costs. --form adapter is exact."
        )
    if settings.form == "weights" and not settings.final:
        raise UserError(
            f"Weights that have forgotten {', '.join(held)} cannot be given it back: revoking takes it back in the adapter "
            "alone. Add --final if that is meant."
        )


def export(settings: Export) -> Path:
    """Run `alter request export`.

    Raises:
        UserError: nothing is done yet, the folder exists, the adapter is not the one in the history, or merging would be
            inexact and that was not accepted.
    """
    from alter.requests import checking, handout, versions, work

    store, project = settings.open()
    out = Path(settings.out)
    if out.exists():
        raise UserError(f"{out} exists; give another --out.")
    recipe = _distill_recipe(settings, handout.DECIDED)
    with store.lease(settings.who):
        work.recover(store, project)
        checking.refuse_changed(store, project)
        inside = versions.manifest(project)
        if not inside["version"]:
            raise UserError("Nothing to export: no request has run yet. `alter request run` does it.")
        held = [request.name for request in store.requests(*IN_FORCE)]
        _check_accepted(settings, held)
        measured = None
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            if settings.form == "merged":
                measured = handout.merge(project, partial)
            elif settings.form == "weights":
                measured = handout.erase(store, project, partial, recipe)
            elif settings.form == "loras":
                handout.write_loras(store, project, partial)
            else:
                shutil.copytree(project.adapter.resolve(), partial)
            write_atomic(partial / "README.md", handout.export_card(store, project, settings.form, measured))
            details = {"form": settings.form, "version": inside["version"], "out": str(out), "holds": held}
            if settings.form == "weights":
                details["weights"] = folder_digest(partial)
            # before the folder is there: no export is missing from the history
            store.note(None, "exported", details, settings.who)
            partial.replace(out)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    Console().print(f"{settings.form}: {out}", highlight=False, markup=False)
    loaded = f"--model {project.model} --adapter {out}" if settings.form == "adapter" else f"--model {out}"
    Console(soft_wrap=True).print(cell(f"Next: alter serve {loaded}"))
    if settings.form == "weights":
        Console(soft_wrap=True).print(
            cell(
                f"Later requests can begin anew on these weights, with a database of their own: alter request init --model {out}"
            )
        )
    return out
