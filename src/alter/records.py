"""Result records, their provenance and cache, atomic files, progress: what every command that reports a number shares."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
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
    `provenance` says how it came about (see `stamped`): with it, a record taken out of its file still speaks for itself.
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
    provenance: dict[str, Any] = field(default_factory=dict)


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


def _records(rows: Any, source: str) -> list[Record]:
    """Return the records that a JSON list holds; null among the items of a record is NaN, which JSON cannot write."""
    known = {each.name for each in fields(Record)}
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"model", "metric"} <= set(row) for row in rows
    ):
        raise UserError(f"{source} does not hold result records; expected a list of objects written by --json.")
    for row in rows:
        version = row.get("version")
        if version != VERSION:
            said = "no version" if version is None else f"version {version}"
            raise UserError(f"{source} holds metrics of {said}, this is version {VERSION}: evaluate again.")
        wrong = [*(set(row) - known), *({"value", "n"} - set(row))]
        if wrong:
            raise UserError(
                f"{source}: the record of {row['metric']} has an unknown or no {wrong[0]!r}: evaluate again."
            )
    return [
        Record(**row | {"per_item": [math.nan if x is None else x for x in row["per_item"]]})
        if row.get("per_item") is not None
        else Record(**row)
        for row in rows
    ]


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Read what `write_records` wrote.

    Raises:
        UserError: the file is missing, not JSON, not a list of records, or of another version of the metrics.
    """
    try:
        rows = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"No result file at {path}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); expected records written by --json.") from None
    return _records(rows, str(path))


# Provenance ----------------------------------------------------------------------------------------------------------

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
    """Return the versions of this package and of the libraries that a number can depend on, those that are installed."""
    found = {name: _version(name) for name in ("alter-unlearning", *LIBRARIES)}
    return {name: version for name, version in found.items() if version is not None} | {
        "python": platform.python_version(),
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
    }


def commit() -> str | None:
    """Return the commit of the working tree that this package runs from, "+" added if its code was changed since.

    None if the package is installed rather than checked out, or where there is no git.
    """
    package = Path(__file__).resolve().parent

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
    """Return what made a result: when, which code, library versions and machine; and the `facts` given.

    For a result of a model these are `settings`, `seed`, `device`, `dtype`, and the digests `weights`, `adapter`, `data`.
    """
    found = versions()
    return {
        **facts,
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "alter": found.pop("alter-unlearning", None),
        "commit": commit(),
        "python": found.pop("python"),
        "versions": found,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "metrics_version": VERSION,
    }


def stamped(records: Iterable[Record], **facts: Any) -> list[Record]:
    """Return the records with the provenance of this process and `facts` (see `provenance`)."""
    made = provenance(**facts)
    return [replace(record, provenance=made) for record in records]


# Digests of files ----------------------------------------------------------------------------------------------------

CONTENT = (".safetensors", ".bin", ".json", ".txt", ".model", ".tiktoken", ".jinja")
"""Endings of the files of a model's or adapter's folder that loading can read: weights, configuration, tokenizer."""


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


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's contents, read in pieces."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            sha.update(piece)
    return sha.hexdigest()


def folder_digest(folder: str | os.PathLike[str], memo: Path | None = None) -> str:
    """Return a hash of the names and contents of a model's or adapter's files (those ending as in `CONTENT`).

    Args:
        folder: the folder; its subfolders do not count.
        memo: a folder in which `digests.json` keeps the hash of each file by path, size, inode and the times of its
            last change (of the contents and of the file's own entry), so that it is read once. A file changed within
            the last two seconds is read each time, since a clock tick may hide a second change. None: no memo.
    """
    known: dict[str, Any] = {}
    store = None if memo is None else memo / "digests.json"
    if store is not None:
        try:
            known = dict(json.loads(store.read_text()))
        except (OSError, ValueError, TypeError):
            known = {}  # a memo that is missing or broken costs time, nothing else
    parts, learned = [], {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix not in CONTENT or not path.is_file():
            continue
        stat = path.stat()
        state = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
        name = str(path.resolve())
        kept = known.get(name)
        if isinstance(kept, list) and len(kept) == 2 and kept[0] == state:
            found = kept[1]
        else:
            found = file_digest(path)
            if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > 2_000_000_000:
                learned[name] = [state, found]
        parts.append([path.name, found])
    if store is not None and learned:
        _write_quietly(store, json.dumps(known | learned))
    return digest(parts)


def _write_quietly(path: Path, content: str) -> None:
    """Write a file of the cache; a cache that cannot be written is said on stderr and costs no result.

    Its folder is for the user alone: results hold what a model said, and data that somebody wanted forgotten.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        warn(f"The cache at {path.parent} cannot be written ({error.strerror}); results are not kept.")


def code_digest() -> str:
    """Return a hash of this package's own code: an edited or another version never gets the numbers of this one."""
    package = Path(__file__).parent
    return digest([[str(p.relative_to(package)), file_digest(p)] for p in sorted(package.rglob("*.py"))])


# Cache of results ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cached:
    """A result as it was measured: its records, what was said on stderr with it, and what the records called the model."""

    records: list[Record]
    notes: list[str]
    subject: str


def recall(folder: Path, key: dict[str, Any]) -> Cached | None:
    """Return the result that was stored under exactly this key (JSON values only), or None.

    The file holds the whole key and a hash of its contents: a file that is broken, edited or of another key is said on
    stderr and not used.
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
    """Store a result under its key; a folder that cannot be written is said on stderr and costs nothing."""
    content = json.loads(json.dumps(_finite(asdict(result)), allow_nan=False))
    stored = {"key": key, "sha256": digest(content), "content": content}
    _write_quietly(folder / "results" / f"{digest(key)}.json", json.dumps(stored))


def warn(note: str) -> None:
    """Print a note on stderr, as it is."""
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(note)


def progress(iterable: Iterable[T], *, total: int, label: str) -> Iterator[T]:
    """Yield the items while a progress bar with time left is shown on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield from bar.track(iterable, total=total, description=label)
