"""Sources of rows as a user writes them: local files, `builtin`, a folder or a dataset of the hub, and what is cut out of them."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from alter.core import UserError, memory, nearest
from alter.data.files import Row, plain_values, read_file, rename, with_columns
from alter.data.hub import hub_rows, is_hub_id, local_path, muse_rows
from alter.data.tofu import TOFU_HUB, TOFU_SPLITS, tofu_rows
from alter.storage import digest

ROW_COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("qa", ("question", "answer")),
    ("qa", ("instruction", "output")),
    ("qa", ("instruction", "response")),
    ("qa", ("query", "response")),
    ("qa", ("prompt", "response")),
    ("completion", ("prompt", "completion")),
    ("messages", ("messages",)),
    ("messages", ("conversations",)),
    ("text", ("text",)),
)
"""Kinds of rows and the columns that make them, in the order in which they are looked for."""

KNOWN_COLUMNS = tuple(dict.fromkeys(name for _, columns in ROW_COLUMNS for name in columns))

SLICE = re.compile(r"(.+)\[([^\[\]:]*):([^\[\]:]*)\]", re.DOTALL)
"""A source with `[N:M]` behind it: its rows from N on, counted from 0, and before M."""

GivenRows = str | PathLike[str] | Iterable[Mapping[str, Any]]
"""Rows of a set: what a command takes (a file, NAME:SPLIT), or the rows themselves: dicts, or a `datasets.Dataset`."""

OTHER_COLUMNS = re.compile(r"(.+?)@([^@=,]+=[^@=,]+(?:,[^@=,]+=[^@=,]+)*)", re.DOTALL)
"""A source with `@question=Frage,answer=Antwort` behind it: which of its columns are the ones that a row needs."""


def _split_source(source: str, split: str | None) -> tuple[str, str | None]:
    """Take a `:split` ending off `source`; a file that exists under the whole name wins."""
    if split is not None or Path(source).exists() or ":" not in source:
        return source, split
    base, _, ending = source.rpartition(":")
    if not base or not ending or "\\" in ending:
        return source, split
    # a split of MUSE has a slash itself (sust/forget_2): then what is before the colon must be a folder or a hub id
    if "/" in ending and not (
        re.fullmatch(r"[\w.-]+/[\w.-]+", ending) and (Path(base).expanduser().is_dir() or is_hub_id(base))
    ):
        return source, split
    return base, ending


def _matching_rows(pattern: Path) -> list[Row]:
    """Return the rows of all files whose name matches a pattern, file after file in the order of their names."""
    try:
        files = sorted(path for path in pattern.parent.glob(pattern.name) if path.is_file())
    except ValueError as error:
        raise UserError(f"{str(pattern)!r} is no pattern of file names: {error}.") from None
    if not files:
        raise UserError(f"No file matches {str(pattern)!r}; only the name after the last / may hold *, ? and [...].")
    return [row for path in files for row in read_file(path)]


def read_rows(source: str, split: str | None = None) -> list[Row]:
    """Return the rows of `source`, each a dict of its columns.

    Args:
        source: a local file (`.json` of lines or one array, `.jsonl`, `.csv`, `.tsv`, `.parquet`; `.txt`, `.md` and `.eml` become
            passages of about 1000 characters, column `text`); a folder that holds TOFU-named files; `builtin` for the
            shipped TOFU; a hub id (`locuslab/TOFU`, `org/name`, `org/name:config`); or a pattern of file names
            (`books/*.txt`).
        split: which TOFU split for a folder, `builtin` and `locuslab/TOFU`; for another hub id its configuration, of
            which `train` is read, or configuration and split (`muse-bench/MUSE-News:sust/forget_2`); a folder of that
            layout takes the latter too (see `muse_rows`). May be written behind a colon in `source` instead.

    Behind that `@question=Frage,answer=Antwort` says which columns are meant (`letters.csv@text=Brief`; `@answer=Antwort` where the
    other one is called `question` already), behind all of it `[:N]` takes the first N rows
    (`cais/wmdp-corpora:cyber-forget-corpus[:500]`), `[N:M]` and `[N:]` those from row N on, counted from 0, and several sources
    are read one after another if ` + ` stands between them; each of their rows then names its own in a column `source`. Hub
    rows that hold nothing but `text`, some of it blank, are the lines of a running text (wikitext): the first M are joined to
    passages as those of a `.txt` file are, before `[N:M]` takes of these.

    Raises:
        UserError: nothing there, empty, not readable, an unknown split or column, or the hub cannot be reached.
    """
    if (rows := memory.held(source)) is not None:
        return [plain_values(row) for row in rows]
    if source.startswith(memory.PREFIX):
        raise UserError("The rows were given in memory, and no file holds them: give them again.")
    if not source.strip():
        raise UserError("A source of rows is empty; expected a file, a hub id, or a name like 'builtin:forget10'.")
    try:
        # a file whose own name holds the sign wins
        if " + " in source and not os.path.exists(source):
            parts = [part.strip() for part in source.split(" + ")]
            if not all(parts):
                raise UserError(f"{source!r} has nothing on one side of a ' + '; expected a source on both.")
            return [with_columns(row, {"source": part}) for part in parts for row in read_rows(part, split)]
        sliced = None if os.path.exists(source) else SLICE.fullmatch(source)
        if sliced is None:
            return _named_rows(source, split, None)
        first, end = _ends(source, sliced[2], sliced[3])
        rows = _named_rows(sliced[1], split, end)
        if first >= len(rows):
            raise UserError(
                f"{source!r} begins at row {first}, counted from 0, and {sliced[1]!r} has {len(rows)} rows."
            )
        return rows[first:end]
    except OSError as error:
        raise UserError(f"Cannot read {source!r}: {error.strerror or error}.") from None


def _ends(source: str, first: str, end: str) -> tuple[int, int | None]:
    """Return the first row of a slice and the one before which it ends, None for all that follow.

    Raises:
        UserError: one of them is no number, or there is no row between them.
    """
    places = [part.strip() for part in (first, end)]
    numbers = [part.isascii() and part.isdecimal() and len(part) < 19 for part in places if part]
    if not numbers or not all(numbers):
        raise UserError(
            f"{source!r} ends in [{first}:{end}]; expected numbers of rows, as in [:100] for the first 100, [20:40] or [20:]."
        )
    begins, ends = int(places[0] or 0), int(places[1]) if places[1] else None
    if ends is not None and ends <= begins:
        raise UserError(
            f"{source!r} ends in [{first}:{end}], which is no row: the second number must be above {begins}."
        )
    return begins, ends


def _local(name: str) -> tuple[str, str]:
    """Split one source, or a model's name, into the path of this machine that it begins with ("" if none) and what stands behind it."""
    if name.startswith("builtin:"):
        return "", name
    ends = (len(name), *(place for place, sign in enumerate(name) if sign in "@[:"))
    begun = [name[:end] for end in ends if end]
    there = (path for path in begun if os.path.exists(os.path.expanduser(path)))
    path = next(there, None) or next((path for path in begun if glob.glob(os.path.expanduser(path))), "")
    return path, name[len(path) :]


def _parts(source: str) -> list[str]:
    """Return the sources that are read one after the other; a file whose own name holds the sign wins."""
    return source.split(" + ") if " + " in source and not os.path.exists(source) else [source]


def local_parts(source: str) -> list[Path]:
    """Return the files and folders of this machine that a source of rows, or a model's name, is read from; of a pattern the folder."""
    paths = [Path(found).expanduser() for part in _parts(source) if (found := _local(part.strip())[0])]
    return [path if path.exists() else path.parent for path in paths]


def from_anywhere(source: str) -> str:
    """Return a model's name or a source of rows with local paths made absolute: what is read later may be read in another folder.

    What stands behind a path (`[:100]`, `@question=Frage`, `:train`) and what is no local path stays.
    """
    made = []
    for part in _parts(source):
        path, behind = _local(part)
        made.append(os.path.abspath(os.path.expanduser(path)) + behind if path else part)
    return " + ".join(made)


LOCAL_ROWS = "local rows"
"""What a card calls rows of a file: its name and its folder may be a person's."""


def for_others(source: str) -> str:
    """Return a source of rows as those may read it who get the weights: what lies on this machine is `LOCAL_ROWS`."""

    def public(part: str) -> bool:
        return not _local(part)[0] and (part.startswith("builtin:") or is_hub_id(re.split(r"[@\[:]", part)[0]))

    parts = [part.strip() for part in _parts(source)]
    return " + ".join(dict.fromkeys(part if public(part) else LOCAL_ROWS for part in parts))


ROWS_NAMED = ("forget", "retain", "holdout", "general", "neighbours")
PRIVATE = ("out", "run", "adapter", "start_from", "retain_records", "names", "other_names", "resume", "overwrite")


def settings_for_others(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's settings as its card shows them: no folder or file of this machine, and none of the names that were given.

    Args:
        settings: as JSON has them; `adapter` and the like are left out where they are paths, `ROWS_NAMED` go through `for_others`.
    """
    told: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            told[name] = settings_for_others(value)
        elif name in ROWS_NAMED and isinstance(value, str):
            told[name] = for_others(value)
        elif name in ROWS_NAMED and isinstance(value, list):
            told[name] = [for_others(str(each)) for each in value]
        elif name not in PRIVATE:
            told[name] = value
    return told


def check_unread(out: Path, reads: Iterable[tuple[str, str | None]]) -> None:
    """Refuse to delete a folder in which something lies that is about to be read.

    Args:
        out: the folder.
        reads: settings, and the sources of rows or models that they name.

    Raises:
        UserError: one of them lies in it.
    """
    for name, source in reads:
        for path in [] if source is None else local_parts(source):
            if path.resolve().is_relative_to(out.resolve()):
                raise UserError(f"`overwrite` would delete {path}, which `{name}` names: give another `out`.")


def _named_rows(source: str, split: str | None, first: int | None) -> list[Row]:
    """Read rows of a source that may end in names of its columns."""
    found = None if os.path.exists(source) else OTHER_COLUMNS.fullmatch(source)
    if found is None:
        return _rows_of(source, split, first)
    names = {k.strip(): v.strip() for k, v in (part.split("=") for part in found[2].split(","))}
    # one that is named beside one that needs no other name is half of a kind
    whole = any(set(columns) <= set(names) for _, columns in ROW_COLUMNS)
    return rename(_rows_of(found[1], split, first), names, KNOWN_COLUMNS if whole else ())


def _rows_of(source: str, split: str | None, first: int | None) -> list[Row]:
    """Read one source, as `read_rows`; with `first`, the hub gives no more rows than that."""
    source, split = _split_source(source, split)
    if source == "builtin" or source.lower() == TOFU_HUB.lower():
        if split is None:
            raise UserError(f"{source!r} has several splits; say which, for example {source + ':forget10'!r}.")
        return tofu_rows(split, "builtin" if source == "builtin" else None)
    path = local_path(source)
    if split is not None and "/" in split and not path.is_file():
        return muse_rows(split, source, first)
    if path.is_dir():
        if {"dataset_info.json", "dataset_dict.json"} & set(os.listdir(path)):
            raise UserError(
                f"{source!r} is a dataset that save_to_disk wrote: write a split of it with `dataset.to_json('rows.jsonl')`."
            )
        if split is None:
            raise UserError(f"{source!r} is a folder; say which split of it, for example {source + ':forget10'!r}.")
        return tofu_rows(split, source)
    if path.is_file():
        if split is not None:
            raise UserError(f"{source!r} is one file and has no split {split!r}; leave the split out.")
        return read_file(path)
    if any(mark in source for mark in "*?["):
        return _matching_rows(path)
    if os.path.lexists(path):
        what = "a device or a pipe" if path.exists() else "a link that leads nowhere"
        raise UserError(f"{source!r} is {what}; expected a file, which can be read more than once.")
    if not is_hub_id(source):
        siblings = [str(sibling) for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(str(path), siblings) or nearest(source, [f"builtin:{name}" for name in TOFU_SPLITS])
        raise UserError(f"No file or folder at {source!r}.{near} A hub id has the form org/name.")
    alternative = "Download its rows as a .jsonl file and give that file's path instead."
    return hub_rows(source, split, "train", alternative, first)


@contextlib.contextmanager
def named_rows(rows: GivenRows) -> Iterator[str]:
    """Yield a name under which the commands find the rows while the block runs.

    Raises:
        UserError: they are none, or no rows.
    """
    if isinstance(rows, (str, PathLike)):
        yield str(rows)
        return
    given = list(rows) if isinstance(rows, Iterable) and not isinstance(rows, (Mapping, bytes)) else None
    wrong = [row for row in given or () if not isinstance(row, Mapping)]
    if given is None or wrong:
        what = f"a {type(rows).__name__}" + (f" of {type(wrong[0]).__name__}" if wrong else "")
        raise UserError(
            f"The rows are {what}; expected a list of dicts, each of a row's columns (of a DataFrame: `df.to_dict('records')`), "
            "a `datasets.Dataset` (of a DatasetDict one of its splits), or the name of a file."
        )
    held = [dict(row) for row in given]
    if not held:
        raise UserError("The rows are empty; expected at least one, each a dict of its columns.")
    with memory.holding(digest(held)[:16], held) as name:
        yield name
