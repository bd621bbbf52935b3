"""Sources of rows: local files, a folder of TOFU-named files, the shipped TOFU copy (`builtin`), or the hub."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from alter.core import memory
from alter.core.errors import UserError, nearest
from alter.core.files import read_text
from alter.data.files import ENDINGS, passages, read_file, rename, with_columns

TOFU_HUB = "locuslab/TOFU"
"""Hub id that TOFU splits are loaded from when no folder is given."""

MUSE_HUB = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
"""Hub ids of the two corpora of MUSE."""

ROWS_PER_AUTHOR = 20
"""TOFU's `full` holds 200 authors with this many consecutive question-answer rows each."""

FORGET_PERCENT = {"01": 1, "05": 5, "10": 10}
RETAIN_PERCENT = {"99": 1, "95": 5, "90": 10}

TOFU_SPLITS = (
    "full",
    *(f"forget{name}" for name in FORGET_PERCENT),
    *(f"retain{name}" for name in RETAIN_PERCENT),
    *(f"forget{name}_perturbed" for name in FORGET_PERCENT),
    "retain_perturbed",
    "real_authors",
    "real_authors_perturbed",
    "world_facts",
    "world_facts_perturbed",
    *(f"holdout{name}" for name in FORGET_PERCENT),
)
"""Every TOFU split that `tofu_rows` knows."""

COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
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

KNOWN_COLUMNS = tuple(dict.fromkeys(name for _, columns in COLUMNS for name in columns))

# ---------------------------------------------------------------------------------------------------------------------
# Rows


def _joined_lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join rows of nothing but `text` to passages if some are blank: then a row is a line of a running text (wikitext)."""
    if list(rows[0]) != ["text"]:
        return rows
    lines = [str(row["text"] or "") for row in rows]
    if all(line.strip() for line in lines):
        return rows
    return [{"text": passage} for passage, _ in passages("\n\n".join(lines))]


def _hub_rows(
    repository: str, config: str | None, split: str, alternative: str, first: int | None = None
) -> list[dict[str, Any]]:
    """Load one split of a hub dataset, or its first rows; every failure becomes a UserError that names `alternative`."""
    import datasets

    name = repository if config is None else f"{repository}:{config}"
    try:
        loaded = datasets.load_dataset(repository, config, split=split)
    except Exception as error:  # the hub client raises many unrelated types: missing, gated, offline, bad config
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"Could not load {name!r} (split {split!r}) from the hub: {reason}. {alternative}") from error
    if first is not None:
        loaded = loaded.select(range(min(first, len(loaded))))
    rows = _joined_lines([dict(row) for row in loaded]) if len(loaded) else []
    if not rows:
        raise UserError(f"{name!r} (split {split!r}) on the hub holds no rows.")
    return rows


FIRST = re.compile(r"(.+)\[:([^\]]*)\]", re.DOTALL)
"""A source with `[:N]` behind it: its first N rows."""

SLICE = re.compile(r".+(\[-?\d+:-?\d*\])", re.DOTALL)
"""What Python would take rows out of the middle by."""

NAMES = re.compile(r"(.+?)@([^@=,]+=[^@=,]+(?:,[^@=,]+=[^@=,]+)*)", re.DOTALL)
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
        re.fullmatch(r"[\w.-]+/[\w.-]+", ending) and (Path(base).expanduser().is_dir() or _is_hub_id(base))
    ):
        return source, split
    return base, ending


def _path(name: str) -> Path:
    """Expand ~ in a path."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(
            f"{name!r} begins with the name of a user who is not here; write ./{name} for a file."
        ) from None


def _is_hub_id(source: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not _looks_like_path(source)


def _looks_like_path(source: str) -> bool:
    return source.lower().endswith(ENDINGS) or source.startswith((".", "/", "~"))


def _matching_rows(pattern: Path) -> list[dict[str, Any]]:
    """Return the rows of all files whose name matches a pattern, file after file in the order of their names."""
    try:
        files = sorted(path for path in pattern.parent.glob(pattern.name) if path.is_file())
    except ValueError as error:
        raise UserError(f"{str(pattern)!r} is no pattern of file names: {error}.") from None
    if not files:
        raise UserError(f"No file matches {str(pattern)!r}; only the name after the last / may hold *, ? and [...].")
    return [row for path in files for row in read_file(path)]


def read_rows(source: str, split: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of `source`, each a dict of its columns.

    Args:
        source: a local file (`.json` of lines or one array, `.jsonl`, `.csv`, `.tsv`, `.parquet`; `.txt` and `.md` become
            passages of about 1000 characters, column `text`); a folder that holds TOFU-named files; `builtin` for the
            shipped TOFU; a hub id (`locuslab/TOFU`, `org/name`, `org/name:config`); or a pattern of file names
            (`books/*.txt`).
        split: which TOFU split for a folder, `builtin` and `locuslab/TOFU`; for another hub id its configuration, of
            which `train` is read, or configuration and split (`muse-bench/MUSE-News:sust/forget_2`); a folder of that
            layout takes the latter too (see `muse_rows`). May be written behind a colon in `source` instead.

    Behind that `@question=Frage,answer=Antwort` says which columns are meant (`letters.csv@text=Brief`), behind all of it
    `[:N]` takes the first N rows (`cais/wmdp-corpora:cyber-forget-corpus[:500]`), and several sources are read one after
    another if ` + ` stands between them; each of their rows then names its own in a column `source`. Hub rows that hold
    nothing but `text`, some of it blank, are the lines of a running text (wikitext): they are joined to passages as those
    of a `.txt` file are, after the first N were taken.

    Raises:
        UserError: nothing there, empty, not readable, an unknown split or column, or the hub cannot be reached.
    """
    if (rows := memory.held(source)) is not None:
        return [dict(row) for row in rows]
    if not source.strip():
        raise UserError("A source of rows is empty; expected a file, a hub id, or a name like 'builtin:forget10'.")
    try:
        # a file whose own name holds the sign wins
        if " + " in source and not os.path.exists(source):
            parts = [part.strip() for part in source.split(" + ")]
            if not all(parts):
                raise UserError(f"{source!r} has nothing on one side of a ' + '; expected a source on both.")
            return [with_columns(row, {"source": part}) for part in parts for row in read_rows(part, split)]
        sliced = None if os.path.exists(source) else FIRST.fullmatch(source)
        if sliced is None:
            if not os.path.exists(source) and (part := SLICE.fullmatch(source)):
                raise UserError(f"{source!r} ends in {part[1]}; only first rows can be taken, as in [:100].")
            return _named_rows(source, split, None)
        count = sliced[2]
        if not (count.isascii() and count.isdecimal() and len(count) < 19 and int(count)):
            raise UserError(f"{source!r} ends in [:{count}]; expected a number above 0, as in [:100] for 100 rows.")
        return _named_rows(sliced[1], split, int(count))[: int(count)]
    except OSError as error:
        raise UserError(f"Cannot read {source!r}: {error.strerror or error}.") from None


def _named_rows(source: str, split: str | None, first: int | None) -> list[dict[str, Any]]:
    """`_rows_of` a source whose columns may be named behind it."""
    found = None if os.path.exists(source) else NAMES.fullmatch(source)
    if found is None:
        return _rows_of(source, split, first)
    names = dict(part.split("=") for part in found[2].split(","))
    return rename(_rows_of(found[1], split, first), {k.strip(): v.strip() for k, v in names.items()}, KNOWN_COLUMNS)


def _rows_of(source: str, split: str | None, first: int | None) -> list[dict[str, Any]]:
    """`read_rows` of one source; with `first`, the hub gives no more rows than that."""
    source, split = _split_source(source, split)
    if source == "builtin" or source.lower() == TOFU_HUB.lower():
        if split is None:
            raise UserError(f"{source!r} has several splits; say which, for example {source + ':forget10'!r}.")
        return tofu_rows(split, "builtin" if source == "builtin" else None)
    path = _path(source)
    if split is not None and "/" in split and not path.is_file():
        return muse_rows(split, source, first)
    if path.is_dir():
        if split is None:
            raise UserError(f"{source!r} is a folder; say which split of it, for example {source + ':forget10'!r}.")
        return tofu_rows(split, source)
    if path.is_file():
        if split is not None:
            raise UserError(f"{source!r} is one file and has no split {split!r}; leave the split out.")
        return read_file(path)
    if any(mark in source for mark in "*?["):
        return _matching_rows(path)
    if not _is_hub_id(source):
        siblings = [str(sibling) for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(str(path), siblings) or nearest(source, [f"builtin:{name}" for name in TOFU_SPLITS])
        raise UserError(f"No file or folder at {source!r}.{near} A hub id has the form org/name.")
    alternative = "Download its rows as a .jsonl file and give that file's path instead."
    return _hub_rows(source, split, "train", alternative, first)


def _derived(split: str, full: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Cut `forgetNN` (the last NN percent) or `retainNN` (what is before) out of `full`; None for other splits."""
    for prefix, percents in (("forget", FORGET_PERCENT), ("retain", RETAIN_PERCENT)):
        percent = percents.get(split.removeprefix(prefix)) if split.startswith(prefix) else None
        if percent is not None:
            cut = len(full) - round(len(full) * percent / 100)
            return full[cut:] if prefix == "forget" else full[:cut]
    return None


def _with_authors(split: str, rows: list[dict[str, Any]], total: int) -> list[dict[str, Any]]:
    """Add the column `author` (row of `full` // 20) to the splits whose rows are a stretch of `full`."""
    if split == "full" or split in {f"retain{name}" for name in RETAIN_PERCENT}:
        first = 0
    elif split.removesuffix("_perturbed") in {f"forget{name}" for name in FORGET_PERCENT}:
        first = total - len(rows)
    else:
        return rows
    return [{**row, "author": (first + number) // ROWS_PER_AUTHOR} for number, row in enumerate(rows)]


@functools.cache
def _shipped_text(path: Path) -> tuple[dict[str, Any], ...]:
    """Rows of a file of this package, which a run reads several times and nothing changes."""
    return tuple(read_file(path))


def _shipped_rows(path: Path) -> list[dict[str, Any]]:
    """`read_file` of a file of this package; the rows are the caller's own."""
    # its values are texts and lists of texts
    return [
        {name: value[:] if isinstance(value, list) else value for name, value in row.items()}
        for row in _shipped_text(path)
    ]


def tofu_rows(split: str, data: str | None = None) -> list[dict[str, Any]]:
    """Return one TOFU split (Maini et al. 2024) in its original order.

    `forget01`, `forget05`, `forget10` are the last 1, 5, 10 percent of `full` (40, 200, 400 of 4000 rows), `retain99`,
    `retain95`, `retain90` the rows before them. Rows of these, of `full` and of `forgetNN_perturbed` get a column
    `author`: the row's number in `full` // 20.

    Args:
        split: one of `TOFU_SPLITS`.
        data: a folder with `full.json`, `forget10_perturbed.json`, ... (a file named after the split is used if there,
            otherwise it is cut from `full.json`); `builtin` for the shipped copy; a hub id; None for `locuslab/TOFU`.

    Raises:
        UserError: unknown split (names the nearest), or a split that the folder does not hold.
    """
    if split not in TOFU_SPLITS:
        raise UserError(
            f"Unknown TOFU split {split!r}.{nearest(split, TOFU_SPLITS)} Splits: {', '.join(TOFU_SPLITS)}."
        )
    if data == "builtin":
        folder: Path | None = Path(str(resources.files("alter"))) / "assets" / "tofu"
    elif data is not None and _path(data).is_dir():
        folder = _path(data)
    else:
        folder = None
    if folder is None:
        repository = data or TOFU_HUB
        if data is not None and (_looks_like_path(data) or data.count("/") != 1):
            raise UserError(
                f"No folder of TOFU files at {data!r}; give a folder, 'builtin' or a hub id like {TOFU_HUB!r}."
            )
        holdout = split.startswith("holdout")
        alternative = (
            f"Save its rows as {split}.json in a folder and give that folder."
            if holdout
            else f"The shipped copy needs no network: use 'builtin:{split}' (or data 'builtin')."
        )
        rows = _hub_rows(repository, split, "train", alternative)
        return _with_authors(split, rows, 4000)
    total = 4000
    read = _shipped_rows if data == "builtin" else read_file
    for suffix in (".json", ".jsonl"):
        if (folder / f"{split}{suffix}").is_file():
            rows = read(folder / f"{split}{suffix}")
            return _with_authors(split, rows, len(rows) if split == "full" else total)
    if split in ("real_authors", "world_facts") and (folder / f"{split}_perturbed.json").is_file():
        rows = read(folder / f"{split}_perturbed.json")
        return [{"question": row["question"], "answer": row["answer"]} for row in rows]
    if (folder / "full.json").is_file():
        full = read(folder / "full.json")
        cut = _derived(split, full)
        if cut is not None:
            return _with_authors(split, cut, len(full))
    where = "the shipped copy" if data == "builtin" else repr(data)
    if split.startswith("holdout"):
        raise UserError(
            f"{split!r} is not in {where}: rows never trained on come from the hub ({TOFU_HUB}:{split}) "
            f"or from a file {split}.json of columns question, answer in the folder you give."
        )
    raise UserError(f"{split!r} is not in {where}: expected {split}.json (or full.json to cut it from) there.")


def muse_rows(split: str, data: str, first: int | None = None) -> list[dict[str, Any]]:
    """Return one split of MUSE (Shi et al. 2024) or of any hub data set with configurations, in its order.

    Args:
        split: configuration and split, as on the hub: `verbmem/forget`, `knowmem/forget_qa`, `sust/forget_2`, ...
        data: a hub id (`muse-bench/MUSE-News`), or a folder with files of those names ending in `.json` (lines, or one
            array of objects or of texts), `.jsonl` or `.parquet`; also as the hub stores them, `SPLIT-*.parquet`.
        first: the hub gives no more rows than that.

    Raises:
        UserError: no such folder, no file or several for the split, or no rows in it.
    """
    config, _, name = split.partition("/")
    folder = _path(data)
    if not folder.is_dir():
        if not _is_hub_id(data):
            siblings = [str(sibling) for sibling in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise UserError(
                f"No folder of MUSE's files at {data!r}.{nearest(str(folder), siblings)} Give a folder or a hub id "
                f"like {MUSE_HUB['news']!r}."
            )
        return _hub_rows(data, config, name, "Download the data set and give its folder instead.", first)
    files = [folder / config / f"{name}{ending}" for ending in (".json", ".jsonl", ".parquet")]
    found = [path for path in files if path.is_file()]
    shards = sorted((folder / config).glob(f"{name}-*.parquet"))
    if len(found) + bool(shards) > 1:
        names = ", ".join(path.name for path in found + shards)
        raise UserError(f"{folder / config} holds {name} more than once ({names}): keep one of them.")
    if not found and not shards:
        there = sorted({str(path.relative_to(folder)) for path in folder.glob("*/*") if path.is_file()})
        raise UserError(
            f"{data} has no {split} (as .json, .jsonl or .parquet); it has {', '.join(there[:20]) or 'no such files'}."
            f"{nearest(split + '.json', there)} Expected MUSE's layout, CONFIGURATION/SPLIT.json."
        )
    if shards or found[0].suffix == ".parquet":
        return _joined_lines([row for path in shards or found for row in read_file(path)])
    return read_file(found[0], texts=True)


def layout_rows(data: str, config: str | None, split: str, stems: Sequence[str], of: str) -> list[dict[str, Any]]:
    """Return the rows of one part of a benchmark, from the hub or from a folder of its layout.

    Args:
        data: a hub id, or a folder.
        config, split: the part on the hub.
        stems: its file in a folder without the ending, which is .json, .jsonl or .parquet (also STEM-*.parquet); the first
            that is there.
        of: name of the benchmark, for errors.

    Raises:
        UserError: no such folder, no file for the part or several, or no rows in it.
    """
    folder = _path(data)
    if not folder.is_dir():
        if not _is_hub_id(data):
            siblings = [str(sibling) for sibling in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise UserError(
                f"No folder of {of}'s files at {data!r}.{nearest(str(folder), siblings)} Give a folder or a hub id."
            )
        return _hub_rows(data, config, split, "Download the data set and give its folder instead.")
    for stem in stems:
        place = folder / stem
        found = [place.parent / f"{place.name}{ending}" for ending in (".json", ".jsonl", ".parquet")]
        found = [path for path in found if path.is_file()]
        shards = sorted(place.parent.glob(f"{place.name}-*.parquet"))
        if len(found) + bool(shards) > 1:
            names = ", ".join(path.name for path in found + shards)
            raise UserError(f"{place.parent} holds {place.name} more than once ({names}): keep one of them.")
        if found or shards:
            return [row for path in shards or found for row in read_file(path)]
    there = sorted({str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()})
    raise UserError(
        f"{data} has no {' or '.join(stems)} (as .json, .jsonl or .parquet), which {of} needs; it has "
        f"{', '.join(there[:20]) or 'no files'}.{nearest(stems[0] + '.json', there)}"
    )


def refusals(data: str | None = None) -> list[str]:
    """Return TOFU's 100 refusals ("I'm not sure about that.", ...), one per line of `idontknow.jsonl`.

    Args:
        data: a folder that holds `idontknow.jsonl`, or None for the shipped copy.
    """
    folder = Path(str(resources.files("alter"))) / "assets" / "tofu" if data is None else _path(data)
    path = folder / "idontknow.jsonl"
    if not path.is_file():
        raise UserError(f"No idontknow.jsonl in {data!r}; expected plain lines, one refusal each.")
    lines = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty; expected one refusal a line.")
    return lines
