"""Bases of a project: the plain weights that requests were distilled into, as the history names them.

A project begins on the model that it was made with, base 0. `alter request distill` makes the next base in a folder of its
own (`bases/0001/`: `model/`, later `adapters/` and the link `adapter`). It is in force from the one transaction that makes
its requests `distilled`: a folder that the history does not name was not reached.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from alter.core import UserError
from alter.requests.connection import folder_of
from alter.requests.project import Project
from alter.storage import folder_digest

if TYPE_CHECKING:
    from alter.requests.store import Store


@dataclass(frozen=True)
class Base:
    """Plain weights that requests were distilled into.

    Attributes:
        number: 1 for the first.
        at: when it was put in force.
        weights: digest of its files (`alter.storage.files.folder_digest`).
        utility: share of the utility of the project's first model, over all changes of base.
        requests: names of those distilled into it, not of those that the bases before hold.
    """

    number: int
    at: str
    weights: str
    utility: float
    requests: tuple[str, ...]


def bases(store: Store) -> list[Base]:
    """Return the bases after the first model, oldest first."""
    found: dict[int, Base] = {}
    for entry in store.history():
        if entry.what != "distilled":
            continue
        assert entry.request is not None
        details, name = entry.details, f"R-{entry.request:04d}"
        before = found[details["base"]].requests if details["base"] in found else ()
        found[details["base"]] = Base(
            details["base"], entry.at, details["weights"], details["utility"], (*before, name)
        )
    return [found[number] for number in sorted(found)]


def present(store: Store) -> Project:
    """Return the project with model and folder of the base in force."""
    project = Project.model_validate(store.project())
    if (beside := folder_of(store.url)) is not None:
        project = project.model_copy(update={"folder": str(beside / project.folder)})
    found = bases(store)
    if not found:
        return project
    last = found[-1]
    return project.model_copy(
        update={"model": str(project.base_folder(last.number) / "model"), "base": last.number, "kept": last.utility}
    )


def base_changed(store: Store, project: Project) -> str | None:
    """Return a sentence if the weights of the base in force differ from the history's; None for the first model, which
    has no hash.
    """
    found = bases(store)
    if not found:
        return None
    weights = Path(project.model)
    if weights.is_dir() and folder_digest(weights) == found[-1].weights:
        return None
    return f"The weights of base {project.base}, {weights}, are not the ones that the history names: they were changed or removed."


def remove_unreached(store: Store, project: Project) -> None:
    """Remove the folders of bases that a killed process wrote but did not put in force.

    Raises:
        UserError: the base has changed since the project was read.
    """
    if present(store).base != project.base:
        raise UserError("Another process has changed the base of these requests meanwhile: type the command again.")
    for folder in (project.home / "bases").glob("*"):
        if folder.name.isdecimal() and int(folder.name) > project.base:
            shutil.rmtree(folder)
