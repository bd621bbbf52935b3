"""Local files as rows: JSON, JSON lines, CSV, Parquet, and running text as passages. Each row knows its place."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alter.core import UserError, nearest
from alter.data.letters import LETTER, letter_text
from alter.storage import from_json, read_text

PASSAGE_CHARACTERS = 1000
"""A running text becomes passages: whole paragraphs, joined until a passage has at least this many characters."""

PARAGRAPH_CHARACTERS = 4000
"""A longer paragraph is cut at its lines, sentences or words: many texts have one paragraph a line, and no blank line."""

TEXT_ENDINGS = (".txt", ".md", LETTER)
ENDINGS = (".json", ".jsonl", ".ndjson", *TEXT_ENDINGS, ".csv", ".tsv", ".parquet")
"""Endings of the files that `read_file` reads; capitals do not matter."""


MOST_CHARACTERS = 5_000_000
"""Characters of one text in a row, more than *War and Peace* has: tokens of a longer one would take gigabytes."""


Row = dict[str, Any]
"""A row of data: its columns by name."""


class PlacedRow(dict[str, Any]):
    """The columns of one row, and where it was read: `"rows.jsonl line 7"`, or nothing."""

    def __init__(self, columns: Mapping[str, Any], place: str = "") -> None:
        super().__init__(columns)
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return PlacedRow, (dict(self), self.place)


def with_columns(row: Mapping[str, Any], columns: Mapping[str, Any]) -> PlacedRow:
    """Return the row with more columns, at its place."""
    return PlacedRow({**row, **columns}, getattr(row, "place", ""))


def plain_values(row: Mapping[str, Any]) -> Row:
    """Return a row with values that JSON has, since rows are written down as such: of a date, a decimal or bytes the text."""
    return {str(name): _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return plain_values(value)
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).hex()
    if hasattr(value, "tolist"):
        # numpy's arrays and numbers
        return _plain(value.tolist())
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


# Running text --------------------------------------------------------------------------------------------------------


def text_pieces(text: str, size: int) -> list[str]:
    """Cut a text into pieces of `size` characters or a little more, at the end of a line, else of a sentence, else of a word.

    No piece has over twice `size` characters; joined, the pieces are the text again.
    """
    pieces: list[str] = []
    start = 0
    while len(text) - start > size:
        end = start + 2 * size
        stretch = text[start + size : end]
        for pattern in (r"\n", r"[.!?…。！？।۔؟]+[\"'”’»）」』]*(?:\s+|(?<=[。！？」』]))", r"\s+"):
            found = re.search(pattern, stretch)
            if found:
                end = start + size + found.end()
                break
        pieces.append(text[start:end])
        start = end
    if start < len(text):
        pieces.append(text[start:])
    return pieces


def passages(text: str) -> list[tuple[str, int]]:
    """Join paragraphs (a blank line between) into passages of at least `PASSAGE_CHARACTERS` characters.

    A paragraph of more than `PARAGRAPH_CHARACTERS` is cut into pieces of about that least size.

    Returns:
        each passage, and the number of the line on which it begins, from 1.
    """
    found: list[tuple[str, int]] = []
    current, began = "", 1
    line = 1
    for paragraph, gap in _paragraphs(text):
        if paragraph.strip():
            first = line + paragraph[: len(paragraph) - len(paragraph.lstrip())].count("\n")
            words = paragraph.strip()
            if len(words) > PARAGRAPH_CHARACTERS:
                if current:
                    found.append((current, began))
                    current = ""
                for piece in text_pieces(words, PASSAGE_CHARACTERS):
                    if piece.strip():
                        found.append((piece.strip(), first))
                    first += piece.count("\n")
            else:
                current, began = (f"{current}\n\n{words}", began) if current else (words, first)
                if len(current) >= PASSAGE_CHARACTERS:
                    found.append((current, began))
                    current = ""
        line += paragraph.count("\n") + gap
    if current:
        found.append((current, began))
    return found


def _paragraphs(text: str) -> Iterator[tuple[str, int]]:
    """Yield each stretch between blank lines, and the number of line ends behind it."""
    start = 0
    for between in re.finditer(r"\n\s*\n", text):
        yield text[start : between.start()], between[0].count("\n")
        start = between.end()
    yield text[start:], 0


# Tables and JSON -----------------------------------------------------------------------------------------------------


def _table(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a CSV file with a header; an empty cell is None."""
    text = read_text(path, line_ends=False)
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    signs = "\t" if path.suffix.lower() == ".tsv" else max(",;\t|", key=lambda sign: (header.count(sign), sign == ","))
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=signs, strict=True)
    rows: list[dict[str, Any]] = []
    try:
        names = [name.strip() for name in next(reader, [])]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None or not all(names):
            fix = (
                "name each once"
                if twice
                else "name it, or leave it out, as pandas does with `df.to_csv(path, index=False)`"
            )
            raise UserError(
                f"{path} has {'two columns' if twice else 'a column'} named {twice or ''!r} in its first line: {fix}."
            )
        began = reader.line_num + 1
        for cells in reader:
            if cells:
                if len(cells) > len(names):
                    raise UserError(
                        f"{path} line {began} has {len(cells)} cells, the first line names {len(names)} columns: put text "
                        f"that holds {signs!r} between quotes."
                    )
                padded = [*cells, *[""] * (len(names) - len(cells))]
                rows.append(
                    PlacedRow({n: c or None for n, c in zip(names, padded, strict=True)}, f"{path} line {began}")
                )
            began = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not CSV: {error}.") from None
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        found = parquet.read_table(path).to_pylist()
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a parquet file: {(str(error).splitlines() or ['unreadable'])[0]}") from None
    return [PlacedRow(plain_values(row), f"{path} row {number}") for number, row in enumerate(found, start=1)]


def _one_object(text: str) -> Row | None:
    """Return the object that a text is, over any number of lines; None if it is none."""
    try:
        whole = from_json(text)
    except ValueError:
        return None
    return whole if isinstance(whole, dict) else None


def _json(path: Path, text: str, texts: bool) -> list[dict[str, Any]]:
    """Read the rows of JSON lines, or of one array or object over any number of lines; with `texts`, a string is a row's text."""
    found: list[tuple[Any, str]] = []
    if text.lstrip().startswith("["):
        try:
            found = [(row, f"{path} row {number}") for number, row in enumerate(from_json(text), start=1)]
        except ValueError as error:
            raise UserError(f"{path} starts as a JSON array but is not valid JSON: {error}.") from None
    else:
        # a JSON string may hold U+2028, U+2029 and U+0085, at which `splitlines` would cut
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                found.append((from_json(line), f"{path} line {number}"))
            except ValueError as error:
                if (whole := _one_object(text)) is not None and not found:
                    found.append((whole, f"{path} row 1"))
                    break
                raise UserError(f"{path}, line {number} is not JSON ({error}); expected one object a line.") from None
    if texts:
        found = [({"text": row} if isinstance(row, str) else row, place) for row, place in found]
    for number, (row, _) in enumerate(found, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number} is a {type(row).__name__}; expected an object with named columns.")
    return [PlacedRow(row, place) for row, place in found]


def running_text(path: Path) -> str:
    """Return the running text of a file that ends in one of `TEXT_ENDINGS`.

    Raises:
        UserError: it cannot be read.
    """
    return letter_text(path) if path.suffix.lower() == LETTER else read_text(path)


def read_file(path: Path, texts: bool = False) -> list[dict[str, Any]]:
    """Return the rows of a local file (see `ENDINGS`).

    `.json` holds lines, one array or one object, `.csv` and `.tsv` a header and rows (separated by comma, semicolon, tab or bar), and
    `.txt`, `.md` and `.eml` (an e-mail) a running text, cut into `passages`.

    Args:
        path: the file.
        texts: in JSON, a string stands for a row with the column `text`.

    Raises:
        UserError: an ending that is not known, a file that cannot be read, one without rows, or a text of more than `MOST_CHARACTERS`.
    """
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise UserError(
            f"{path} is not a {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]} file; convert it to JSON lines, one row a line."
        )
    if ending == ".parquet":
        rows = _parquet(path)
    elif ending in (".csv", ".tsv"):
        rows = _table(path)
    else:
        text = running_text(path) if ending in TEXT_ENDINGS else read_text(path)
        if not text.strip():
            raise UserError(f"{path} is empty; expected at least one row.")
        if ending in TEXT_ENDINGS:
            return [PlacedRow({"text": passage}, f"{path} line {line}") for passage, line in passages(text)]
        rows = _json(path, text, texts)
    if not rows:
        raise UserError(f"{path} holds no rows; expected at least one.")
    for row in rows:
        longest = _longest(row)
        if longest > MOST_CHARACTERS:
            raise UserError(
                f"{getattr(row, 'place', path)} has a text of {longest:,} characters; a row's text has {MOST_CHARACTERS:,} at most: make "
                "several rows of it, or give running text as a .txt file, which is cut into passages."
            )
    return rows


def _longest(value: Any) -> int:
    """Return the length of the longest text in a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, (dict, list)):
        return max(map(_longest, value.values() if isinstance(value, dict) else value), default=0)
    return 0


def rename(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], known: Sequence[str]) -> list[dict[str, Any]]:
    """Give columns the names that `alter` knows: `{"question": "Frage"}` makes `question` of the column `Frage`.

    Other columns in `known` are left out: what was named decides what a row is.

    Args:
        rows: what was read.
        names: column by the name that it gets.
        known: names of columns that would decide what a row is.

    Raises:
        UserError: no row has such a column.
    """
    there = list(dict.fromkeys(column for row in rows for column in row))
    for wanted in names.values():
        if wanted not in there:
            raise UserError(f"No column {wanted!r}.{nearest(wanted, there)} Columns: {', '.join(map(repr, there))}.")
    result: list[dict[str, Any]] = []
    for row in rows:
        kept = {name: value for name, value in row.items() if name not in known and name not in names.values()}
        kept |= {name: row.get(column) for name, column in names.items()}
        result.append(PlacedRow(kept, getattr(row, "place", "")))
    return result
