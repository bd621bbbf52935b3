"""The form of a certificate: names of its fields, the figures it states, and the file hashes it identifies models by."""

from __future__ import annotations

import os
from pathlib import Path

from alter.core import UserError
from alter.storage import file_digest, loadable

FORM = "alter certificate"
VERSION = 1
"""Version of the contents; a newer one is refused."""

FIGURES = {
    "said": "said_interval",
    "probability": "probability_interval",
    "exact_memorization": None,
    "rouge": None,
    "broken": None,
    "empty": None,
}
"""What is stated of the rows, and where the evidence keeps its 95 % interval."""


def hashes(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the SHA-256 of a file, or of each file in a folder that loading can read, by name; hidden folders are skipped.

    Raises:
        UserError: there is no such file, or nothing to load in the folder.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return {root.name: file_digest(root)}
    found = {file.relative_to(root).as_posix(): file_digest(file) for file in loadable(root)} if root.is_dir() else {}
    if not found:
        raise UserError(f"{path} holds no model and no adapter to take the hash of.")
    return found


def model_hashes(name: str) -> dict[str, str]:
    """Return the `hashes` of a model by name: a folder, a GGUF file, builtin:NAME, or a hub id as it lies in the local cache.

    Raises:
        UserError: there is no such model on this machine.
    """
    # a local path needs no library that loads models
    if Path(name).expanduser().exists():
        return hashes(name)
    from alter.models import gguf_place, shipped_model

    local = shipped_model(name)
    place = gguf_place(local)
    if place is not None and place.path is not None:
        return hashes(place.path)
    if Path(local).expanduser().exists():
        return hashes(local)
    from huggingface_hub import hf_hub_download

    home, file = (local, "config.json") if place is None else (place.home, place.file)
    try:
        found = Path(hf_hub_download(home, file, local_files_only=True))
    except (OSError, ValueError):
        raise UserError(f"No model {name} on this machine to take the hash of: give a folder.") from None
    return hashes(found.parent if place is None else found)
