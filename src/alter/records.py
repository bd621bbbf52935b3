"""Result records, atomic files, provenance and progress: what every command that reports a number shares."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from alter.errors import UserError

VERSION = 1
"""Version of the metric definitions; a record of another version is refused when records are read."""

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One number that was measured: of which model, which metric, over how many items, in which mode.

    `mode` is "strict" (what the definition says) or "compat" (the numbers of OpenUnlearning, quirks included).
    `per_item` holds the value of every item where the metric has one; `extra` what belongs to this number alone
    (for a p-value its statistic and log10). `higher_is_better` is None where neither direction is better by itself.
    """

    model: str
    metric: str
    value: float | None
    n: int
    mode: str = "strict"
    higher_is_better: bool | None = None
    per_item: list[float] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write `content` to `path` whole or not at all: a temporary file beside it, flushed to disk, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def digest(*parts: Any) -> str:
    """Short SHA-256 of JSON-able parts: the key under which a cached result may be reused."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null, so that any reader can open the file."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def to_json(content: Any) -> str:
    """Dump `content` as strict JSON (no NaN), one trailing newline."""
    return json.dumps(_finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_records(path: str | os.PathLike[str], records: Sequence[Record]) -> None:
    """Write records as a JSON list of objects, atomically."""
    write_atomic(path, to_json([asdict(record) for record in records]))


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Read what `write_records` wrote.

    Raises:
        UserError: the file is missing, not JSON, not a list of records, or of another version of the metrics.
    """
    try:
        rows = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"No result file at {path}.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); expected records written by --json.") from None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"model", "metric"} <= set(row) for row in rows
    ):
        raise UserError(f"{path} does not hold result records; expected a list of objects written by --json.")
    for row in rows:
        if row.get("version", VERSION) != VERSION:
            raise UserError(f"{path} holds metrics of version {row['version']}, this is {VERSION}: evaluate again.")
    return [Record(**row) for row in rows]


def provenance() -> dict[str, Any]:
    """Return what made a result: library versions, commit of the working tree if any, and the machine."""
    versions = {}
    for name in ("torch", "transformers", "peft", "datasets", "accelerate"):
        versions[name] = metadata.version(name)
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return {
        "commit": git.stdout.strip() or None,
        "python": platform.python_version(),
        "versions": versions,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "metrics_version": VERSION,
    }


def progress(iterable: Iterable[T], *, total: int, label: str) -> Iterator[T]:
    """Yield the items while a progress bar with time left is shown on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield from bar.track(iterable, total=total, description=label)
