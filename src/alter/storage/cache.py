"""Cache results by the digest of everything they depend on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alter.core import warn
from alter.storage.files import _write_quietly, digest, finite
from alter.storage.records import Record, _records


def cache_folder(chosen: str | None = None) -> Path | None:
    """Return the folder of the cache, or None if it is "off".

    Args:
        chosen: a folder or "off"; None: the environment's ALTER_CACHE (a folder or "off"), else `alter` in
            XDG_CACHE_HOME, else `~/.cache/alter`.
    """
    chosen = chosen or os.environ.get("ALTER_CACHE")
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "alter"


# Cache of results ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cached:
    """A cached result: its records, its notes for stderr, and the model's name in the records."""

    records: list[Record]
    notes: list[str]
    subject: str


def recall(folder: Path, key: dict[str, Any]) -> Cached | None:
    """Return the result stored under exactly this key (JSON values only), or None.

    The file holds the whole key and a hash of its contents: a file that is broken, edited or of another key is
    reported on stderr and ignored.
    """
    path = folder / "results" / f"{digest(key)}.json"
    try:
        found = json.loads(path.read_text())
        content = found["content"]
        if found["key"] != key or found["sha256"] != digest(content):
            raise ValueError("its contents are not what was stored")
        return Cached(_records(content["records"], str(path)), list(content["notes"]), str(content["subject"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn(f"The cached result {path} cannot be used ({type(error).__name__}: {error}); measuring again.")
        return None


def remember(folder: Path, key: dict[str, Any], result: Cached) -> None:
    """Store a result under its key; a folder that cannot be written is reported on stderr, without an error."""
    content = json.loads(json.dumps(finite(asdict(result)), allow_nan=False))
    stored = {"key": key, "sha256": digest(content), "content": content}
    _write_quietly(folder / "results" / f"{digest(key)}.json", json.dumps(stored))
