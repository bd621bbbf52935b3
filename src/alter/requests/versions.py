"""Versions of a project's adapter: the manifest, the link to the one in force, and weights without one expert.

A version is written whole (`adapters/0003/`), with a manifest of which expert serves which request, before the link
`adapter` moves to it in one step. Folders and files are for their owner alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save

from alter.core import UserError
from alter.requests.project import Project
from alter.storage import folder_digest, read_object, to_json, write_atomic

CLOSED = -1e4
"""Bias of a router's row that opens for no token; the row's weights are zero."""


@contextmanager
def private() -> Iterator[None]:
    """Inside the block, create files for their owner alone (umask 077)."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def manifest(project: Project) -> dict[str, Any]:
    """Return which expert serves which request in the adapter in force; version 0 before the first.

    Raises:
        UserError: the link to the adapter in force leads nowhere.
    """
    if not project.adapter.exists():
        if project.adapter.is_symlink():
            raise UserError(
                f"{project.adapter} leads to {os.readlink(project.adapter)}, which is gone: what the requests made is lost. "
                "Put it back from a copy, or make a new project with `alter request init` and add the requests again."
            )
        return {"version": 0, "experts": {}, "cleared": []}
    return read_object(project.adapter / "requests.json", "which expert serves which request")


def put_in_force(project: Project, source: Path, entry: Mapping[str, Any]) -> Path:
    """Write a new version from an adapter folder, then move the link to it in one step.

    Args:
        project: whose adapter.
        source: folder of the adapter.
        entry: the manifest of the new version.
    """
    versions = project.root / "adapters"
    versions.mkdir(mode=0o700, parents=True, exist_ok=True)
    final = versions / f"{entry['version']:04d}"
    partial = versions / f".{final.name}.partial"
    for left_over in (partial, final):
        # a version that the link never reached was not in force
        shutil.rmtree(left_over, ignore_errors=True)
    shutil.copytree(source, partial, symlinks=False)
    partial.chmod(0o700)
    write_atomic(partial / "requests.json", to_json(dict(entry)))
    for path in partial.iterdir():
        if path.is_file():
            path.chmod(0o600)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    os.replace(partial, final)
    link = project.root / ".adapter.link"
    link.unlink(missing_ok=True)
    link.symlink_to(Path("adapters") / final.name)
    os.replace(link, project.adapter)
    folder = os.open(project.root, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return final


def adapter_digest(project: Project) -> str | None:
    """Return the digest of the adapter in force, its manifest included; None without one."""
    return folder_digest(project.adapter.resolve()) if project.adapter.exists() else None


def clear_expert(adapter: Path, expert: int) -> bytes:
    """Return the adapter's weights without one forget expert, as the content of a safetensors file.

    Its columns of every B become zero, and its row of the router such that no token opens it: an emptied expert that
    still took tokens would answer as the base does where another request's expert should. The file alone is enough: what
    was removed must not depend on a model that loads.

    Raises:
        UserError: the adapter has no such expert.
    """
    from alter.adapter import expert_columns

    config = read_object(adapter / "adapter_config.json", "the settings of an adapter")
    experts = config["num_forget_experts"]
    if not 1 <= expert <= experts:
        raise UserError(f"{adapter} has forget experts 1 to {experts}; there is no expert {expert}.")
    tensors = load_file(str(adapter / "adapter_model.safetensors"))
    for name, value in tensors.items():
        if ".alter_B." in name:
            expert_columns(value, expert, experts)[:] = 0.0
        elif ".alter_router." in name and config["router"] != "dense":
            value[expert] = CLOSED if name.endswith("bias") else 0.0
    content: bytes = save(tensors, metadata={"format": "pt"})
    return content
