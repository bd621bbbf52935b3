"""`alter request init` and `add`: create a database of requests for one model, and record requests in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from rich.console import Console

from alter.core import UserError, cell
from alter.data import check_overlap, data_hash, from_anywhere, load_examples, row_hash
from alter.requests.database import Database
from alter.requests.display import say_with_head, then
from alter.requests.project import Project
from alter.requests.records import Request, check_due
from alter.settings import Count, OutFolder, read_recipe, validated

if TYPE_CHECKING:
    from alter.requests.store import Store


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
    distill_every: Count | None = Field(None, ge=1)
    """Distil into the weights, for good (alter request distill), once this many requests are in force."""
    distill_recipe: str | None = None
    """YAML with settings of that `alter distill`."""


def init(settings: Init) -> Store:
    """Run `alter request init`.

    Raises:
        UserError: there is no such model, the data cannot be read, the recipe has a setting that the requests decide, or the
            database is in use.
    """
    from alter.models import check_model_name
    from alter.requests import rows
    from alter.requests.connection import folder_of, without_password
    from alter.requests.store import Store

    for name in filter(None, (settings.model, settings.retrained)):
        check_model_name(name)
    recipe, distilling = _recipes(settings)
    retain = load_examples(settings.retain)
    if settings.holdout is not None:
        rows.check_unseen(load_examples(settings.holdout), retain)
    anchor = settings.open_anchor()
    if anchor is not None and anchor.path.exists():
        raise UserError(f"{anchor.path} holds the heads of another database; give another `anchor`.")
    root = Path(settings.folder)
    if any(os.path.lexists(root / name) for name in ("adapter", "adapters", "bases")):
        raise UserError(
            f"{root} holds the adapters of requests already: use them as they are (`alter request list`), or give another `folder` "
            "and `db`."
        )
    home, beside = root.resolve(), folder_of(settings.db)
    project = Project(
        model=from_anywhere(settings.model),
        retain=from_anywhere(settings.retain),
        folder=str(home.relative_to(beside) if beside and home.is_relative_to(beside) else home),
        holdout=settings.holdout and from_anywhere(settings.holdout),
        retrained=settings.retrained and from_anywhere(settings.retrained),
        recipe=recipe,
        distill_every=settings.distill_every,
        distill=distilling,
    )
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    root.chmod(0o700)
    store = Store.create(settings.db, project.model_dump(), settings.who, anchor)
    # the folder is taken from now on: two databases would sweep away each other's runs
    (root / "adapters").mkdir(mode=0o700, exist_ok=True)
    Console().print(
        cell(f"Requests about {settings.model} are kept in {without_password(settings.db)}, adapters in {root}.")
    )
    if settings.distill_every is not None:
        Console().print(
            cell(
                f"When {settings.distill_every} requests are in force, `alter request run` asks for them to be distilled into "
                "the weights; `alter request run --final` does it at once. A distilled request cannot be revoked."
            )
        )
    then(settings, "alter request add --subject NAME --data ROWS.jsonl")
    return store


def _recipes(settings: Init) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the settings of `alter unlearn` and `alter distill` that every request uses.

    Raises:
        UserError: a recipe cannot be read, or has a setting that is unknown or that the requests decide.
    """
    from alter.requests.work import CUT
    from alter.training import Unlearn

    recipe: dict[str, Any] = {}
    if settings.recipe is not None:
        recipe = read_recipe(settings.recipe)
        decided = sorted(set(recipe) & CUT)
        if decided:
            raise UserError(f"{settings.recipe} sets {', '.join(decided)}, which the requests decide: take it out.")
    distilling: dict[str, Any] = {}
    if settings.distill_recipe is not None:
        from alter.requests.handout import distill_settings

        distilling = distill_settings(settings.distill_recipe)
    needed = {"model": "m", "forget": "f", "retain": "r", "out": "o", "experts_only": True}
    validated(Unlearn, {**recipe, **needed}, settings.recipe or "recipe")
    return recipe, distilling


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
    """Run `alter request add`: record an erasure request.

    Raises:
        UserError: no rows, rows or subject in the retain set, rows that another request has, a due date that is none.
    """
    from alter.requests import rows

    store, project = settings.open()
    due = check_due(settings.due)
    if not settings.subject.strip():
        raise UserError("`subject` is empty: say whom or what the request is about.")
    examples = load_examples(settings.data)
    if not examples:
        raise UserError(f"{settings.data} has no rows: a request needs the data that is to be forgotten.")
    retain = load_examples(project.retain)
    check_overlap(examples, retain)
    if not settings.allow_in_retain:
        rows.check_kept_subject(settings.subject, retain)
    hashes = [row_hash(example) for example in examples]
    request = store.add(
        subject=settings.subject.strip(),
        data=from_anywhere(settings.data),
        data_hash=data_hash(hashes),
        row_hashes=hashes,
        due=due,
        text="\n".join(json.dumps(example.row, ensure_ascii=False) for example in examples)
        if settings.keep_text
        else None,
        who=settings.who,
    )
    say_with_head(f"{request.name} received: {request.subject}, {request.rows} rows.", store)
    then(settings, "alter request run")
    return request
