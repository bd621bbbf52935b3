"""`alter request export`: the settings, the limits that must be accepted, and the folder that is written.

What trains or loads models is imported by the function that needs it, so that the help comes at once.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from alter.core import UserError, cell
from alter.requests.database import Database
from alter.requests.records import HELD
from alter.settings import OutFolder
from alter.storage import folder_digest, write_atomic


class ExportRequests(Database):
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


def _distill_recipe(settings: ExportRequests) -> dict[str, Any]:
    """Return the settings of `alter distill` for the form weights.

    Raises:
        UserError: it sets one of them, or another form is wanted.
    """
    if settings.recipe is None:
        return {}
    if settings.form != "weights":
        raise UserError("`recipe` holds settings of `alter distill`, which only `form` weights uses: leave it out.")
    from alter.requests import handout

    return handout.distill_settings(settings.recipe)


def _check_accepted(settings: ExportRequests, held: Sequence[str]) -> None:
    """Refuse an inexact or irrevocable form that was not accepted by its flag; `held` are the requests in force."""
    if settings.form == "merged" and not settings.approximate:
        raise UserError(
            "A routed adapter is no fixed change of the weights, so merging it is not exact: `approximate` opens "
            "all experts for every token and measures what that costs. `form` adapter is exact."
        )
    if settings.form == "weights" and not settings.final:
        raise UserError(
            f"Weights that have forgotten {', '.join(held)} cannot be given it back: revoking takes it back in the adapter "
            "alone. Add `final` if that is meant."
        )


def export_requests(settings: ExportRequests) -> Path:
    """Run `alter request export`.

    Raises:
        UserError: nothing is done yet, the folder exists, the adapter is not the one in the history, or merging would be
            inexact and that was not accepted.
    """
    from alter.requests import checking, handout, versions, work

    store, project = settings.open()
    out = Path(settings.out)
    if out.exists():
        raise UserError(f"{out} exists; give another `out`.")
    recipe = _distill_recipe(settings)
    with store.lease(settings.who):
        work.recover(store, project)
        checking.refuse_changed(store, project)
        inside = versions.manifest(project)
        if not inside["version"]:
            there = (
                f" The plain weights of base {project.base} are the folder {project.model}." if project.base else ""
            )
            raise UserError(f"Nothing to export: no request has run yet. `alter request run` does it.{there}")
        held = [request.name for request in store.requests(*HELD)]
        _check_accepted(settings, held)
        measured = None
        named: list[str] = []
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            if settings.form == "merged":
                measured = handout.merge(project, partial)
            elif settings.form == "weights":
                measured = handout.erase(store, project, partial, recipe)
            elif settings.form == "loras":
                named = handout.write_loras(store, project, partial)
            else:
                shutil.copytree(project.adapter.resolve(), partial)
            write_atomic(partial / "README.md", handout.export_card(store, project, settings.form, measured))
            details = {"form": settings.form, "version": inside["version"], "out": os.path.abspath(out), "holds": held}
            if settings.form == "weights":
                details["weights"] = folder_digest(partial)
            # before the folder is there: no export is missing from the history
            store.note(None, "exported", details, settings.who)
            partial.replace(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    Console().print(f"{settings.form}: {out}", highlight=False, markup=False)
    model, made, adapter = (shlex.quote(str(each)) for each in (project.model, out, project.adapter))
    command = {
        "adapter": f"alter serve --model {model} --adapter {made}",
        "loras": f"alter serve --model {model} --adapter {adapter} --upstream URL --upstream-loras {shlex.join(named)}",
    }.get(settings.form, f"alter serve --model {made}")
    before = f"load its folders beside {model} in another server, then " if settings.form == "loras" else ""
    Console(soft_wrap=True).print(cell(f"Next: {before}{command}"))
    if settings.form == "weights":
        Console(soft_wrap=True).print(
            cell(
                f"Later requests can begin anew on these weights, with a database of their own: `alter request init --model {made}`"
            )
        )
    return out
