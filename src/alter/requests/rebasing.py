"""`alter request distill`: write what is in force into the base's own weights; later requests start from these.

Nothing takes effect before the weights are written, measured on the requests and, where rows are still there, on those of
earlier bases. Then one transaction makes the requests `distilled`, which is final. A process killed before that has
no effect; the next command removes what it left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from alter.core import Finding, UserError, cell
from alter.requests.bases import present
from alter.requests.database import Database
from alter.requests.display import print_bases, print_list, say_with_head, then
from alter.requests.records import IN_FORCE, Request, now, unnamed

if TYPE_CHECKING:
    from alter.requests.handout import Erased
    from alter.requests.project import Project
    from alter.requests.store import Store


class DistillRequests(Database):
    """Distil the requests in force into plain weights of the base; later ones start from these, revoking ends.

    Ends with status 3, and changes nothing, where the weights have not forgotten or lose what was to stay.
    """

    final: bool = False
    """Accept that none of these requests can be revoked any more."""
    recipe: str | None = None
    """YAML with settings of `alter distill`; by default those of the project's `distill_recipe`."""


def distill_requests(settings: DistillRequests) -> list[Request]:
    """Run `alter request distill`; returns the requests that were distilled.

    Raises:
        UserError: no request is in force, `final` was not given, adapter or base are not those in the history, or what
            `change_base` raises.
    """
    from alter.requests import checking, handout, work

    store, project = settings.open()
    recipe = project.distill if settings.recipe is None else handout.distill_settings(settings.recipe)
    with store.lease(settings.who):
        work.recover(store, project)
        checking.refuse_changed(store, project)
        held = store.requests(*IN_FORCE)
        if not held:
            raise UserError(
                "No request is in force beyond the base: there is nothing to distil. `alter request list` shows all."
            )
        if not settings.final:
            raise UserError(f"{_final(held)} Add `final` if that is meant.")
        found = change_base(store, project, recipe)
    _show(settings, store, found)
    return found


def _final(held: Sequence[Request]) -> str:
    """Return the warning about what distilling takes away."""
    names = ", ".join(request.name for request in held)
    return (
        f"Distilling {names} is final: the new base's own weights forget what they ask for, so none of them can be revoked "
        "afterwards."
    )


def check_final(final: bool, project: Project) -> None:
    """Refuse `final` in a project that does not set when to distil.

    Raises:
        UserError: the project has no `distill_every`.
    """
    if final and project.distill_every is None:
        raise UserError(
            "`final` accepts that requests are distilled when `distill_every` of `alter request init` is reached, which this "
            "project does not have: leave it out, and use `alter request distill` when you want it."
        )


def distil_if_due(settings: Database, final: bool) -> bool:
    """Distil once the number of requests in force reaches `distill_every` and `final` accepts it; else print that it is due.

    Returns:
        whether it was due.
    """
    from alter.requests import checking, work

    store, project = settings.open()
    held = store.requests(*IN_FORCE)
    if project.distill_every is None or len(held) < project.distill_every:
        return False
    if not final:
        Console().print(cell(f"{len(held)} requests are in force: it is time to distil them. {_final(held)}"))
        then(settings, "alter request distill --final", "or revoke first what may have to come back")
        return True
    with store.lease(settings.who):
        work.recover(store, project)
        checking.refuse_changed(store, project)
        found = change_base(store, project, project.distill)
    _show(settings, store, found)
    return True


def _show(settings: Database, store: Store, found: Sequence[Request]) -> None:
    from alter.requests.bases import bases

    print_list(settings.db, store.requests())
    print_bases(bases(store), present(store))
    say_with_head(
        f"{', '.join(request.name for request in found)}: distilled. Later requests begin anew on the new base.", store
    )
    then(settings, f"alter request verify --head {store.head()[:12]}", "now and later; purge removes the bases before")


def change_base(store: Store, project: Project, recipe: Mapping[str, Any]) -> list[Request]:
    """Distil base and adapter into plain weights, measure them, and put them in force as the base of later requests.

    Args:
        store, project: where the requests are; the caller holds the lease.
        recipe: settings of `alter distill`, but for those that the requests decide.

    Returns:
        the requests that were in force, distilled.

    Raises:
        UserError: the weights have not forgotten a request in force, or one of an earlier base has come back with them, or
            utility fell below its share of the first model's, or what `alter.requests.handout.erased` raises; nothing is
            changed.
    """
    from alter.requests import handout
    from alter.requests.certificate.form import model_hashes
    from alter.storage import folder_digest

    held = store.requests(*IN_FORCE)
    origin = {
        "base": project.base,
        "name": Path(project.model).name if Path(project.model).exists() else project.model,
    }
    files = model_hashes(project.model)
    place = project.base_folder(project.base + 1)
    with handout.erased(store, project, recipe) as made:
        share = _utility(project, made)
        earlier = _earlier(store, project, made.weights)
        place.mkdir(mode=0o700, parents=True)
        place.parent.chmod(0o700)
        os.replace(made.weights, place / "model")
        for path in (place / "model").iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        details = {"base": project.base + 1, "weights": folder_digest(place / "model"), "utility": share}
        values = {
            request.id: {
                "run": {
                    **(request.run or {}),
                    "distilled": {"origin": {**origin, "files": files}, "settings": unnamed(recipe)},
                },
                "after": _evidence(request, made, share, earlier, project.base + 1),
            }
            for request in held
        }
        return store.move([request.id for request in held], "distilled", details=details, values=values)


def _utility(project: Project, made: Erased) -> float:
    """Return the share of the first model's utility that is left after all changes of base.

    Raises:
        Finding: it is too little.
    """
    from alter.requests.evidence import UTILITY_SHARE, utility_of

    before, after = (utility_of(made.known["retain"][form][1]) for form in ("base", "weights"))
    share = project.kept * after / before if before else 0.0
    if not share >= UTILITY_SHARE:
        raise Finding(
            f"Nothing was changed: the new weights would keep {share:.3f} of the first model's utility, below {UTILITY_SHARE}. "
            "Give a lower `learning_rate`, or more of what must stay (neighbours, general), in `recipe`."
        )
    return share


def _earlier(store: Store, project: Project, weights: Path) -> dict[str, Any]:
    """Measure the new weights on the requests that earlier bases hold.

    Raises:
        Finding: one has come back.
    """
    from alter.models import load_model
    from alter.requests.checking import come_back
    from alter.requests.evidence import known_of
    from alter.requests.rows import NOT_THERE, rows_if_there

    requests = store.requests("distilled")
    if not requests:
        return {}
    model, tokenizer = load_model(str(weights), template=project.template)
    found: dict[str, Any] = {}
    wrong: list[str] = []
    for request in requests:
        rows = rows_if_there(request)
        if rows is None:
            found[request.name] = {"not_checked": NOT_THERE}
            continue
        measures, found[request.name] = known_of(model, tokenizer, rows, answers=project.answers)
        wrong += come_back(request, measures, found[request.name])
    if wrong:
        raise Finding(f"Nothing was changed: {' '.join(wrong)} Give other settings in `recipe`.")
    return found


def _evidence(request: Request, made: Erased, share: float, earlier: Mapping[str, Any], base: int) -> dict[str, Any]:
    """Return what the database stores as a distilled request's `after`: the weights' figures beside the adapter's."""
    known = made.known[request.name]
    return {
        **known["weights"][1],
        "reference": {"by": "adapter", **known["adapter"][1]},
        "verdict": made.verdicts[request.name].to_dict(),
        "utility": made.known["retain"]["weights"][1],
        "utility_share": share,
        "earlier": dict(earlier),
        "measured": now(),
        "base": base,
        "adapter": request.after,
    }
