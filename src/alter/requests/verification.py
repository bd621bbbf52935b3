"""`alter request verify`: check that history and adapter are as recorded, and that nothing forgotten has come back.

The model is loaded by the functions that need it, so that the help comes at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field
from rich.console import Console

from alter.core import Finding, UserError, cell
from alter.evaluation.told import told
from alter.rendering import FittedTable
from alter.requests.anchor import missing_heads, read_heads
from alter.requests.database import Database
from alter.requests.display import still_known, then
from alter.requests.records import HELD, Request
from alter.requests.signing import fingerprint, read_key, read_public

if TYPE_CHECKING:
    from alter.requests.checking import Findings


class Verify(Database):
    """Check that nothing was altered, and that nothing has come back since it was measured.

    Ends with status 3 where something was or has.
    """

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
    default the one of `key`."""


def verify(settings: Verify) -> dict[str, Any]:
    """Run `alter request verify`.

    Raises:
        UserError: something is wrong; the message lists all of it.
    """
    from alter.evaluation import Leak
    from alter.requests import checking, work

    if settings.samples and settings.chain_only:
        raise UserError("`chain_only` loads no model, so nothing can be sampled: leave `samples` out.")
    trusted = [read_public(each) for each in settings.public_key]
    if settings.key is not None:
        trusted.append(read_key(settings.key).public)
    # checking needs no private key
    store, project = (settings if settings.key else settings.model_copy(update={"anchor": None})).open_unchecked()
    kept = [head for path in (settings.anchor, *settings.certificate) if path for head in read_heads(path, trusted)]
    if settings.head is not None and not re.fullmatch(r"[0-9a-f]{12,64}", settings.head):
        raise UserError(f"`head` is {settings.head!r}; expected 12 to 64 digits 0-9, a-f, as the commands print it.")
    heads = [] if settings.head is None else [settings.head]
    with store.lease(settings.who):
        entries = [(entry.number, entry.hash) for entry in store.history()]
        # an alteration must not be taken for the leftovers of a kill
        _refuse_wrong(missing_heads(kept, entries) or store.check_chain(heads))
        work.recover(store, project)
        found = checking.check_requests(
            store, project, behaviour=not settings.chain_only, heads=heads, leak=Leak(samples=settings.samples)
        )
    console = Console()
    _print_findings(console, store.requests(*HELD), found)
    store.note(None, "verified", found.as_noted(), settings.who)
    _refuse_wrong(found.wrong)
    console.print(
        cell(
            "Unchanged: history and adapter are as they were recorded"
            + (", and nothing measured has come back since." if found.measured else ".")
            + " Whether a request was forgotten then is in its evidence (alter request show ID). "
            + still_known(store.requests(*HELD))
        )
    )
    if kept:
        console.print(
            cell(
                f"The history holds all {len(kept)} heads that were kept elsewhere, the last of {kept[-1].at}, signed by "
                f"key {', '.join(sorted({fingerprint(head.key) for head in kept}))}"
                + ("." if trusted else ", which nobody vouches for: give `public_key`.")
            )
        )
    console.print(cell(f"Head of the history: {store.head()}"))
    then(settings, f"alter request verify --head {store.head()[:12]}", "later, with the head of today")
    return found.measured


def _refuse_wrong(wrong: Sequence[str]) -> None:
    """Raise Finding if the check found anything wrong."""
    if wrong:
        raise Finding("Not as it should be: " + " ".join(wrong))


def _print_findings(console: Console, held: Sequence[Request], found: Findings) -> None:
    """Print the forgotten requests' figures beside those measured when they took effect."""
    table = FittedTable(title="Unchanged since it was measured?")
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
