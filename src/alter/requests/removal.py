"""Delete what is kept: leftovers of runs and, at the end, a request's subject and rows."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from alter.core import UserError
from alter.requests.checking import noted_adapter
from alter.requests.project import Project
from alter.requests.records import HELD, IN_FORCE, Request
from alter.requests.store import Store
from alter.requests.versions import adapter_digest, manifest

OF_A_RUN = re.compile(r"\.?([0-9a-f]{24}|weights)(\.jsonl.*)?")
"""Names in `runs/`: a run's key or the weights of an export, as a folder or as rows, also half-written."""


def sweep(project: Project, keep: str | None = None) -> list[str]:
    """Delete rows, checkpoints and unused adapters that runs left behind; return what was deleted.

    Nothing else is touched: the folder may be one that its user keeps other things in.

    Args:
        keep: key of a run whose folder is to stay.
    """
    removed: list[str] = []
    left: list[Path] = []
    for root in map(project.base_folder, range(project.base + 1)):
        left += [path for path in (root / "runs").glob("*") if OF_A_RUN.fullmatch(path.name)]
        left += [root / name for name in (".adapter.link", ".revoked") if os.path.lexists(root / name)]
        left += [*root.glob(".*.partial"), *(root / "adapters").glob(".[0-9]*.partial")]
    # a version that the link never reached was not in force
    version = manifest(project)["version"]
    left += [p for p in (project.root / "adapters").glob("[0-9]*") if p.name.isdecimal() and int(p.name) > version]
    for path in dict.fromkeys(left):
        if path.name == keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        removed.append(str(path))
    return removed


def _remove_earlier(project: Project) -> list[str]:
    """Delete the adapters and weights of earlier bases, which know more than the base in force; report what was deleted."""
    removed = []
    for number in range(project.base):
        root = project.base_folder(number)
        (root / "adapter").unlink(missing_ok=True)
        # the first base is the project's folder itself, with more in it
        for folder in (root / "adapters",) if number == 0 else (root,):
            if folder.exists():
                shutil.rmtree(folder)
                removed.append(f"{folder} (of base {number}, which is in force no more)")
    return removed


def remove_kept(
    store: Store, project: Project, request: Request, who: str | None = None
) -> tuple[list[str], list[str]]:
    """Delete what the database and the project's folder hold of a request's subject and rows.

    Returns:
        what was removed, and what cannot be reached from here, in sentences.

    Raises:
        UserError: the request has yet to be run, and needs its rows.
    """
    if request.state not in (*HELD, "revoked", "withdrawn"):
        raise UserError(
            f"{request.name} is {request.state}: its rows are needed to run it. Withdraw it first (`alter request revoke "
            f"{request.name}`), or run it."
        )
    removed = [f"{path} (left by a run)" for path in sweep(project)]
    # beside an old copy of database or folder, the adapter that the history names may be one of the earlier ones
    sound = adapter_digest(project) == noted_adapter(store)
    current = f"{manifest(project)['version']:04d}"
    for folder in sorted((project.root / "adapters").glob("[0-9]*")):
        if sound and folder.name.isdecimal() and folder.name != current:
            shutil.rmtree(folder)
            removed.append(f"{folder} (an adapter that is in force no more)")
    removed += _remove_earlier(project)
    location = request.data
    removed += [f"{name} of {request.name} in the database" for name in store.forget(request.id, who)]
    whole = store.write_over()
    first = store.project()["model"]
    if request.state == "distilled":
        left = [
            f"The model {first}, from which base {project.base} was made, still knows what it knew: delete its copies."
        ]
    else:
        only = ": the adapter only keeps it from saying so" if request.state in IN_FORCE else ""
        left = [
            f"The base model {project.model} still knows what it knew{only}.",
            *([f"So does {first}, from which that was made."] if project.base else []),
        ]
    if request.state in IN_FORCE:
        left.append(
            f"Without its rows {request.name} can no longer be measured, nor can what is in force be distilled: that takes the rows "
            "of every request in force."
        )
    if not sound:
        left.append(
            f"The adapters in {project.root / 'adapters'}: the one in force is not the one that the history names, so none was removed. "
            "Put database and folder back from one copy, and purge again."
        )
    if location and Path(location).exists():
        left.append(f"The rows themselves at {location}: delete them if they must go.")
    elif location:
        left.append(f"Wherever {location} is kept or copied.")
    if request.expert is not None and request.state in IN_FORCE:
        left.append(
            f"The adapter's router still knows which texts are the request's (expert {request.expert}), also in exports."
        )
    left += [
        f"The export at {entry.details['out']} ({entry.at[:10]})."
        for entry in store.history()
        if entry.what == "exported"
    ]
    left.append("The history, which cannot be rewritten: dates, who did what, a salted hash, the hash of the data.")
    left.append(
        "Results in alter's cache (ALTER_CACHE, ~/.cache/alter), reports, backups, and copies of the database."
    )
    if not whole and store.url.startswith("sqlite"):
        left.append(
            f"Old pages of the database's file, since another process reads it: end that, and purge {request.name} again."
        )
    if not store.url.startswith("sqlite"):
        left.append("Old row versions in the database server, until it is vacuumed, and its log.")
    return removed, left
