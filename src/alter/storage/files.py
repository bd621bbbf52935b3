"""Write files atomically, write JSON that every reader accepts, and hash content."""

from __future__ import annotations

import contextlib
import csv
import errno
import glob
import hashlib
import io
import json
import math
import os
import platform
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from alter.core import UserError, warn

HERE = f"{zlib.crc32(platform.node().encode()):08x}"
"""This machine, in the names of temporary files: a process of another one cannot be asked whether it lives."""


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        # another user's
        return True
    return True


def _remove_left(folder: Path, begun: str) -> None:
    """Delete temporary files whose names begin so and whose process was killed: they may hold what was to be forgotten."""
    for path in folder.glob(f"{glob.escape(begun)}*"):
        process = path.name.removeprefix(begun).partition("-")[0]
        if process.isdecimal() and not _runs(int(process)):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path, *, private: bool = False, name: str | None = None) -> Iterator[Path]:
    """Yield a temporary file beside `path` that takes its place when the block ends, flushed to disk; on an error it goes.

    Args:
        path: a file, or nothing yet; its folder exists.
        private: for its owner alone, whatever the umask says.
        name: of the temporary file, by default a new one; with a fixed one the next writing takes the place of what a kill left.
    """
    if name is None:
        begun = f".{path.name}.{HERE}-"
        _remove_left(path.parent, begun)
        handle, made = tempfile.mkstemp(dir=path.parent, prefix=f"{begun}{os.getpid()}-")
        os.close(handle)
        temporary = Path(made)
    else:
        temporary = path.with_name(name)
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o600 if private else 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: str | os.PathLike[str], content: str | bytes, *, private: bool = False) -> None:
    """Write `content` to `path` whole or not at all: a temporary file beside it, flushed to disk, then renamed.

    With `private` it is for its owner alone, whatever the umask says.

    A link stays a link: what it points to is written. A device or a pipe (/dev/null, /dev/stdout) is written into.
    """
    path = Path(os.path.realpath(path))
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, "wb", buffering=0) as device:
            device.write(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, private=private) as temporary:
        temporary.write_bytes(data)


def check_disk(folder: Path, needed: int, what: str, advice: str) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        folder: on that disk, or one that is yet to be made there.
        needed: bytes.
        what: takes so much, with its verb.
        advice: what to do besides making room.

    Raises:
        UserError: says how much is needed and how much is free.
    """
    free = shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free
    if needed > free:
        raise UserError(
            f"{folder} is on a disk with {free / 1e9:.1f} GB free, and {what} {needed / 1e9:.1f} GB: make room, {advice}."
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def to_csv(rows: Iterable[Iterable[Any]]) -> str:
    """Format rows as CSV, one to a line. A text that a spreadsheet would take for a formula gets an apostrophe before it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        writer.writerow([f"'{c}" if isinstance(c, str) and c[:1] in tuple("=+-@\t\r") else c for c in row])
    return text.getvalue()


def digest(*parts: Any) -> str:
    """Return a short SHA-256 of JSON-able parts: the key under which a cached result may be reused."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by null, so that any reader can open the file."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def to_json(content: Any) -> str:
    """Dump `content` as strict JSON (no NaN), one trailing newline."""
    return json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


BOMS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
"""Marks at the beginning of a file that say how its text is written."""


def read_text(path: str | os.PathLike[str], *, line_ends: bool = True) -> str:
    """Return the text of a file: UTF-8, or UTF-16 or UTF-32 where the file begins with their mark.

    Args:
        path: the file.
        line_ends: make every line end in a line feed alone, whatever system wrote the file.

    Raises:
        UserError: the file cannot be opened or is no such text.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    encoding = next((name for mark, name in BOMS if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not {encoding.upper().removesuffix('-SIG')} text ({error}); save it as UTF-8."
        ) from None
    if "\0" in text:
        raise UserError(
            f"{path} holds bytes of zero, as UTF-16 without its mark does and no text in UTF-8: save it as UTF-8."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n") if line_ends else text


DEEPEST = 100
"""Most lists and objects inside each other in JSON that others wrote: what walks through them calls itself for each."""


class _Twice(ValueError):
    """An object names a key twice: readers differ in which they take."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's keys and values, each key once."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Twice(f"it names {twice!r} twice in one object")
    return made


def _too_deep(value: Any) -> bool:
    """Tell whether lists and objects stand inside each other more than `DEEPEST` times."""
    level = [value]
    for _ in range(DEEPEST + 1):
        found = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list)))
        level = [each for inside in found for each in inside if isinstance(each, (dict, list))]
        if not level:
            return False
    return True


def from_json(text: str) -> Any:
    """Parse JSON that others wrote.

    Raises:
        ValueError: it is not JSON, is nested too deep, names a key twice in an object, holds a number too long to read, or half a
            character (a lone surrogate, which no file can hold); the message says which.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}: line {error.lineno} column {error.colno}") from None
    except _Twice:
        raise
    except ValueError:
        raise ValueError("it holds a number of too many digits") from None
    if _too_deep(value):
        raise ValueError("it is nested too deep")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(f"it holds half a character, {half} without its other half") from None
    return value


def read_object(path: str | os.PathLike[str], expected: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: the file.
        expected: what it should hold, for the message.

    Raises:
        UserError: the file cannot be read, is not JSON, or holds no object.
    """
    text = read_text(path)
    try:
        value = from_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); expected {expected}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; expected {expected}, an object.")
    return value


# Digests of files ----------------------------------------------------------------------------------------------------

CONTENT = (".safetensors", ".gguf", ".bin", ".json", ".txt", ".model", ".tiktoken", ".jinja")
"""Endings of the files of a model's or adapter's folder that loading can read: weights, configuration, tokenizer."""


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
        folder: the folder, with what lies in its subfolders (an inference form's LoRA is in `lora`), links to folders included,
            but for hidden ones.
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
    root = Path(folder)
    for path in loadable(root):
        inside = path.relative_to(root)
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
        parts.append([inside.as_posix(), found])
    if store is not None and learned:
        _write_quietly(store, json.dumps(known | learned))
    return digest(parts)


def loadable(folder: Path) -> list[Path]:
    """Return the files of a model's or adapter's folder that loading can read, also behind links, but for hidden folders, sorted."""
    return [
        path
        for path in sorted(_inside(folder, set()))
        if path.suffix in CONTENT
        and not any(part.startswith(".") for part in path.relative_to(folder).parts[:-1])
        and path.is_file()
    ]


def _inside(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Yield what lies in a folder at any depth; of folders that links lead to, each once."""
    here = folder.resolve()
    if here in seen:
        return
    seen.add(here)
    for path in folder.iterdir():
        yield path
        if path.is_dir():
            yield from _inside(path, seen)


def _write_quietly(path: Path, content: str) -> None:
    """Write a file of the cache; a cache that cannot be written is reported on stderr, without an error.

    Its folder is for the user alone: results hold what a model said, and data that somebody wanted forgotten.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(path, content)
    except OSError as error:
        warn(f"The cache at {path.parent} cannot be written ({error.strerror}); results are not kept.")
