"""Datasets of the hub, and local folders laid out as they are there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from alter.core import UserError, nearest
from alter.data.files import ENDINGS, Row, passages, plain_values, read_file

MUSE_HUB = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
"""Hub ids of the two corpora of MUSE."""


def local_path(name: str) -> Path:
    """Expand ~ in a path."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UserError(
            f"{name!r} begins with the name of a user who is not here; write ./{name} for a file."
        ) from None
    except ValueError as error:
        raise UserError(f"{name!r} is no path: {error}.") from None


def is_hub_id(source: str) -> bool:
    """Tell whether a source has the form org/name and is no path."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not looks_like_path(source)


def looks_like_path(source: str) -> bool:
    """Tell whether a source begins or ends as a file's path does."""
    return source.lower().endswith(ENDINGS) or source.startswith((".", "/", "~"))


def _joined_lines(rows: list[Row]) -> list[Row]:
    """Join rows of nothing but `text` to passages if some are blank: then a row is a line of a running text (wikitext)."""
    if list(rows[0]) != ["text"]:
        return rows
    lines = [str(row["text"] or "") for row in rows]
    if all(line.strip() for line in lines):
        return rows
    return [{"text": passage} for passage, _ in passages("\n\n".join(lines))]


def hub_rows(repository: str, config: str | None, split: str, alternative: str, first: int | None = None) -> list[Row]:
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
    rows = _joined_lines([plain_values(row) for row in loaded]) if len(loaded) else []
    if not rows:
        raise UserError(f"{name!r} (split {split!r}) on the hub holds no rows.")
    return rows


def _files_of(place: Path) -> list[Path]:
    """Return the file of one split, PLACE.json, .jsonl or .parquet, or its parts, PLACE-*.parquet; empty if there is none.

    Raises:
        UserError: it is there in two of these forms.
    """
    files = [place.parent / f"{place.name}{ending}" for ending in (".json", ".jsonl", ".parquet")]
    found = [path for path in files if path.is_file()]
    shards = sorted(place.parent.glob(f"{place.name}-*.parquet"))
    if len(found) + bool(shards) > 1:
        names = ", ".join(path.name for path in found + shards)
        raise UserError(f"{place.parent} holds {place.name} more than once ({names}): keep one of them.")
    return shards or found


def _check_hub_id(data: str, of: str, wanted: str) -> None:
    """Refuse what is no folder of a benchmark's files and no hub id either."""
    folder = local_path(data)
    if not is_hub_id(data):
        siblings = [str(sibling) for sibling in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(
            f"No folder of {of}'s files at {data!r}.{nearest(str(folder), siblings)} Give a folder or {wanted}."
        )


def muse_rows(split: str, data: str, first: int | None = None) -> list[Row]:
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
    folder = local_path(data)
    if not folder.is_dir():
        _check_hub_id(data, "MUSE", f"a hub id like {MUSE_HUB['news']!r}")
        return hub_rows(data, config, name, "Download the data set and give its folder instead.", first)
    files = _files_of(folder / config / name)
    if not files:
        there = sorted({str(path.relative_to(folder)) for path in folder.glob("*/*") if path.is_file()})
        raise UserError(
            f"{data} has no {split} (as .json, .jsonl or .parquet); it has {', '.join(there[:20]) or 'no such files'}."
            f"{nearest(split + '.json', there)} Expected MUSE's layout, CONFIGURATION/SPLIT.json."
        )
    if files[0].suffix == ".parquet":
        return _joined_lines([row for path in files for row in read_file(path)])
    return read_file(files[0], texts=True)


def layout_rows(data: str, config: str | None, split: str, stems: Sequence[str], of: str) -> list[Row]:
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
    folder = local_path(data)
    if not folder.is_dir():
        _check_hub_id(data, of, "a hub id")
        return hub_rows(data, config, split, "Download the data set and give its folder instead.")
    for stem in stems:
        files = _files_of(folder / stem)
        if files:
            return [row for path in files for row in read_file(path)]
    there = sorted({str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()})
    raise UserError(
        f"{data} has no {' or '.join(stems)} (as .json, .jsonl or .parquet), which {of} needs; it has "
        f"{', '.join(there[:20]) or 'no files'}.{nearest(stems[0] + '.json', there)}"
    )
