"""`alter request run`, `revoke` and `purge`: the commands that change the adapter or delete data, and their output.

What trains or loads models is imported by the functions that need it, so that the help comes at once.
"""

from __future__ import annotations

import tyro
from pydantic import Field
from rich.console import Console

from alter.core import Finding, UserError, cell, warn
from alter.requests.database import Database
from alter.requests.display import print_list, say_with_head, then
from alter.requests.records import IN_FORCE, MISSED, Request, parse_id


class RunRequests(Database):
    """Make the model forget: all requests received so far as one run, or those named.

    Ends with status 3 where one is NOT FORGOTTEN, the model COLLAPSED at it, or an earlier one has come back.
    """

    id: tyro.conf.Positional[list[str]] = Field(default_factory=list)
    """Ids; by default every request in state received."""
    again: bool = False
    """Also those that failed, were not forgotten, or collapsed."""
    final: bool = False
    """Where the `distill_every` of `alter request init` is reached: distil at once, after which none of those in force can be revoked."""


def run(settings: RunRequests) -> list[Request]:
    """Run `alter request run`.

    Raises:
        UserError: nothing to do, another process at work, or what `work.run_requests` raises.
        Finding: a request was not forgotten or the model collapsed at it, or an earlier one has come back with it: said after
            everything is written down.
    """
    from alter.requests import checking, evidence, rebasing, work

    store, project = settings.open()
    rebasing.check_final(settings.final, project)
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
    print_list(settings.db, store.requests())
    console = Console()
    for request in found:
        verdict = (request.after or {})["verdict"]
        console.print(cell(f"{request.name}: {verdict['word'].upper()}. {' '.join(verdict['why'])}"))
    # of those found, all that took effect did so in the last one's version
    earlier = (found[-1].after or {})["earlier"] if any(request.state in IN_FORCE for request in found) else {}
    back = [sentence for name, now in earlier.items() for sentence in checking.risen(store.get(parse_id(name)), now)]
    failed = [request for request in found if request.state in MISSED]
    if failed:
        raise Finding(
            f"{', '.join(f'{r.name} {r.state.upper()}' for r in failed)}: nothing of it was put in force. Change the "
            "settings (more epochs or a higher rate for NOT FORGOTTEN, a lower rate for COLLAPSED) in a new project's "
            f"`recipe`, or try again with `again`.{''.join(f' {sentence}' for sentence in back)}"
        )
    say_with_head("The requests are in force.", store)
    for share in {request.after["utility_share"] or 0.0 for request in found if request.after}:
        if share < evidence.UTILITY_SHARE:
            warn(
                f"Utility is {share:.3f} of the untouched model's, below {evidence.UTILITY_SHARE}, which `alter request verify` will "
                "find wrong: revoke, and give a lower rate in a new project's `recipe`."
            )
    if back:
        raise Finding(
            f"{' '.join(back)} The requests of this run are in force; one that has come back must be revoked and added again."
        )
    if not rebasing.distil_if_due(settings, settings.final):
        then(settings, f"alter request verify --head {store.head()[:12]}", "now and later")
    return [store.get(request.id) for request in found]


class Revoke(Database):
    """Take a request back: the model answers again as it did, all else stays."""

    id: tyro.conf.Positional[str]
    """Its id, R-0007 or 7."""


def revoke(settings: Revoke) -> Request:
    """Run `alter request revoke`: undo an erasure in force, or withdraw one that has not run.

    The other requests are measured again at once, since some of their tokens may have been routed to the expert that
    is empty now.

    Raises:
        UserError: there is no such request, it is revoked already, or the adapter is not the one in the history.
        Finding: another request has come back with it.
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
    say_with_head(f"{request.name} is {request.state}.{others}", store)
    if not wrong:
        then(settings, f"alter request purge {request.name}", "if its data must go")
    if wrong:
        raise Finding(
            f"{request.name} is revoked, but the check after it failed: {' '.join(wrong)} A request that has come back "
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
    then(settings, "alter request list", "what is out of reach has to be removed by hand" if left else "")
    return removed, left
