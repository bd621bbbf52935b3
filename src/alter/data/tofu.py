"""TOFU's splits: the shipped copy, a folder of files named after them, or the hub."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from alter.core import UserError, nearest
from alter.data.files import Row, read_file
from alter.data.hub import hub_rows, local_path, looks_like_path
from alter.storage import read_text

TOFU_HUB = "locuslab/TOFU"
"""Hub id that TOFU splits are loaded from when no folder is given."""

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


def _derived(split: str, full: list[Row]) -> list[Row] | None:
    """Cut `forgetNN` (the last NN percent) or `retainNN` (what is before) out of `full`; None for other splits."""
    for prefix, percents in (("forget", FORGET_PERCENT), ("retain", RETAIN_PERCENT)):
        percent = percents.get(split.removeprefix(prefix)) if split.startswith(prefix) else None
        if percent is not None:
            cut = len(full) - round(len(full) * percent / 100)
            return full[cut:] if prefix == "forget" else full[:cut]
    return None


def _with_authors(split: str, rows: list[Row], total: int) -> list[Row]:
    """Add the column `author` (row of `full` // 20) to the splits whose rows are a stretch of `full`."""
    if split == "full" or split in {f"retain{name}" for name in RETAIN_PERCENT}:
        first = 0
    elif split.removesuffix("_perturbed") in {f"forget{name}" for name in FORGET_PERCENT}:
        first = total - len(rows)
    else:
        return rows
    # rows that were taken out of a split keep the author that they had there
    return [
        {**row, "author": row.get("author", (first + number) // ROWS_PER_AUTHOR)} for number, row in enumerate(rows)
    ]


def tofu_authors(rows: Sequence[Row], data: str | None = None) -> list[int | None]:
    """Return the author of each row: that of its column `author`, or of the same question and answer in `full`; None for other rows.

    Raises:
        UserError: a row has no author, and `data` holds no `full` to look it up in.
    """
    if all("author" in row for row in rows):
        return [row["author"] for row in rows]
    full = {(row["question"], row["answer"]): row.get("author") for row in tofu_rows("full", data)}
    return [row.get("author", full.get((row.get("question"), row.get("answer")))) for row in rows]


@functools.cache
def _shipped_text(path: Path) -> tuple[dict[str, Any], ...]:
    """Read the rows of a file of this package once a process: a run needs them several times and nothing changes them."""
    return tuple(read_file(path))


def _shipped_rows(path: Path) -> list[Row]:
    """Return a copy of the rows of a file of this package."""
    # its values are texts and lists of texts
    return [
        {name: value[:] if isinstance(value, list) else value for name, value in row.items()}
        for row in _shipped_text(path)
    ]


def tofu_rows(split: str, data: str | None = None) -> list[Row]:
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
    elif data is not None and local_path(data).is_dir():
        folder = local_path(data)
    else:
        folder = None
    if folder is None:
        repository = data or TOFU_HUB
        if data is not None and (looks_like_path(data) or data.count("/") != 1):
            raise UserError(
                f"No folder of TOFU files at {data!r}; give a folder, 'builtin' or a hub id like {TOFU_HUB!r}."
            )
        holdout = split.startswith("holdout")
        alternative = (
            f"Save its rows as {split}.json in a folder and give that folder."
            if holdout
            else f"The shipped copy needs no network: use 'builtin:{split}' (or data 'builtin')."
        )
        rows = hub_rows(repository, split, "train", alternative)
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


def refusals(data: str | None = None) -> list[str]:
    """Return TOFU's 100 refusals ("I'm not sure about that.", ...), one per line of `idontknow.jsonl`.

    Args:
        data: a folder that holds `idontknow.jsonl`, or None for the shipped copy.
    """
    folder = Path(str(resources.files("alter"))) / "assets" / "tofu" if data is None else local_path(data)
    path = folder / "idontknow.jsonl"
    if not path.is_file():
        raise UserError(f"No idontknow.jsonl in {data!r}; expected plain lines, one refusal each.")
    lines = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty; expected one refusal a line.")
    return lines
