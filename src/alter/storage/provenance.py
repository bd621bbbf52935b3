"""The provenance of a figure: code, libraries, machine, time."""

from __future__ import annotations

import os
import platform
import subprocess
import zlib
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from alter.plugins import plugins_digest

# Provenance ----------------------------------------------------------------------------------------------------------
from alter.storage.files import digest, file_digest
from alter.storage.records import VERSION, Record

LIBRARIES = (
    "torch", "transformers", "tokenizers", "peft", "accelerate", "datasets", "bitsandbytes", "numpy", "scipy",
    "scikit-learn", "nltk", "rouge-score", "sacrebleu", "lm-eval",
)  # fmt: skip
"""Libraries that a number can depend on; their versions are part of every provenance and of every cache key."""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return the versions of this package and of installed libraries that a number can depend on."""
    found = {name: _version(name) for name in ("alter-unlearning", *LIBRARIES)}
    return {name: version for name, version in found.items() if version is not None} | {
        "python": platform.python_version(),
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
    }


def commit() -> str | None:
    """Return the commit of the working tree that this package runs from, "+" added if its code was changed since.

    None if the package is installed rather than checked out, or where there is no git.
    """
    package = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True)
        except OSError:
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() / "src" / "alter" != package:
        return None
    head = git("rev-parse", "--short", "HEAD")
    return None if head is None else head + ("+" if git("status", "--porcelain", "--", str(package)) else "")


def provenance(**facts: Any) -> dict[str, Any]:
    """Return the provenance of a result: time, code, library versions and machine; and the `facts` given.

    For a result of a model these are `settings`, `seed`, `device`, `dtype`, and the digests `weights`, `adapter`, `data`.
    """
    found = versions()
    return {
        **facts,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "alter": found.pop("alter-unlearning", None),
        "commit": commit(),
        "python": found.pop("python"),
        "versions": found,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "metrics_version": VERSION,
    }


def code_digest() -> str:
    """Return a hash of this package's own code and of plugins': an edited or another version never gets the numbers of this one."""
    package = Path(__file__).parent.parent
    own = [[str(p.relative_to(package)), file_digest(p)] for p in sorted(package.rglob("*.py"))]
    return digest([*own, plugins_digest()])


def stamped(records: Iterable[Record], **facts: Any) -> list[Record]:
    """Return the records with the provenance of this process and `facts` (see `provenance`)."""
    made = provenance(**facts)
    return [replace(record, provenance=made) for record in records]
