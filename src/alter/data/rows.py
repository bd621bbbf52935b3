"""Bring rows to one form, and check that no row is in both the forget set and the retain set."""

from __future__ import annotations

import bisect
import difflib
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alter.core import UserError, nearest
from alter.data.files import text_pieces
from alter.data.sources import KNOWN_COLUMNS, ROW_COLUMNS, read_rows


@dataclass(frozen=True)
class Example:
    """One thing to learn, keep or forget.

    `prompt` is the user turn of a question or completion row (for `messages` the last user turn before the answer, for raw
    text None); `answer` the labelled text: answer, completion, an assistant's turn, or the text itself. `messages` holds
    the turns before the labelled one, `reply` that turn itself where it calls tools. `row` has all original columns
    (paraphrased and perturbed answers, for instance) and, read again, gives this example alone. `index` is the row's number
    in its source, from 0, `place` where that is ("rows.jsonl line 7", if known); a chat gives an example for each of the
    assistant's turns, of which `last` marks the last.
    """

    prompt: str | None
    answer: str
    kind: str
    messages: tuple[dict[str, Any], ...] = ()
    domain: str | None = None
    index: int = 0
    row: dict[str, Any] = field(default_factory=dict, compare=False)
    reply: dict[str, Any] | None = None
    place: str = field(default="", compare=False)
    last: bool = field(default=True, compare=False)

    @property
    def name(self) -> str:
        """Name of the example in messages."""
        return self.place or f"Row {self.index}"


def row_hash(example: Example) -> str:
    """Return the SHA-256 of one row's content: its turns, prompt and answer."""
    content = [example.prompt, example.answer, [dict(turn) for turn in example.messages]]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def data_hash(hashes: Sequence[str]) -> str:
    """Return the SHA-256 of some rows, computed from theirs in order."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Turns of a chat

ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""Names that some data sets give to the roles."""


def said(turn: Mapping[str, Any]) -> str:
    """Return a turn as text: its content, and each tool call as a line of JSON."""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in turn.get("tool_calls") or ()]
    return "\n".join([*filter(None, [turn["content"]]), *calls])


def _turn(given: Any, where: str) -> dict[str, Any]:
    """Normalise a turn to role, content as text, and tool calls."""
    if not isinstance(given, Mapping):
        raise UserError(f"{where} has a message without role and content.")
    role = given.get("role", given.get("from"))
    content = given.get("content", given.get("value"))
    calls = given.get("tool_calls") or []
    if not isinstance(role, str) or not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise UserError(f"{where} has a message without role and content.")
    role = ROLE_NAMES.get(role.lower(), role.lower())
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if content is None and (calls or (role == "assistant" and {"content", "value"} & set(given))):
        content = ""
    if not isinstance(content, str):
        raise UserError(f"{where} has a message without role and content.")
    extra = {key: given[key] for key in ("name", "tool_call_id") if isinstance(given.get(key), str)}
    return {"role": role, "content": content, **({"tool_calls": calls} if calls else {}), **extra}


def turns_of(messages: Sequence[Any], where: str) -> list[dict[str, Any]]:
    """Return the turns of a chat with role, content as text, and calls of tools where there are some.

    Args:
        messages: turns as data sets have them: `role` or `from`, and `content` or `value` that is a text, a list of parts, or
            null beside `tool_calls`.
        where: what an error calls the row.

    Raises:
        UserError: a turn without role and content, or with a part that is no text.
    """
    return [_turn(turn, where) for turn in messages]


def _part(part: Any, where: str) -> str:
    """Return the text of one part of a list content."""
    text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise UserError(f"{where} has a message with a part of type {kind!r}; only text can be learned: take it out.")
    return text


def _learned(turn: Any) -> bool:
    """Tell whether an assistant's turn is trained on: `weight: 0` (or `train: false`) makes it context alone."""
    return bool(turn.get("weight", turn.get("train", True)))


def _chat(row: Mapping[str, Any], column: str, where: str) -> list[dict[str, Any]]:
    """Return the fields of an example for each turn of the assistant that has something before it."""
    given = row[column]
    turns = turns_of(given, where)
    spoken = [n for n, turn in enumerate(turns) if turn["role"] == "assistant" and _learned(given[n])]
    asked = [n for n in spoken if n and said(turns[n]).strip()]
    if not asked:
        raise UserError(
            f"{where} does not end with an assistant's answer to an earlier message, and has none before its end."
        )
    result = []
    for number in asked:
        before = tuple(turns[:number])
        # cut after this turn, with the others as context alone: read again, the row is this example and no other
        own = [
            {**turn, "weight": 0} if n in spoken and n < number else turn for n, turn in enumerate(given[: number + 1])
        ]
        result.append(
            {
                "prompt": next((turn["content"] for turn in reversed(before) if turn["role"] == "user"), None),
                "answer": said(turns[number]),
                "messages": before,
                "reply": turns[number] if "tool_calls" in turns[number] else None,
                "row": dict(row) if asked == [len(turns) - 1] else {**row, column: own},
                "last": number == asked[-1],
            }
        )
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Examples

TEXT_CHARACTERS = 100_000
"""A longer raw text becomes several examples: nothing is cut off, and a tokenizer needs memory in proportion."""

PROMPT_CHARACTERS = 1_000_000
"""Most characters of a prompt or an answer."""


def _named(rows: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> str:
    """Name rows in a message, by their places if those are known."""
    places = [getattr(rows[number], "place", "") for number in numbers[:10]]
    shown = ", ".join(places) if all(places) else f"Rows {', '.join(map(str, numbers[:10]))}"
    return shown if len(numbers) <= 10 else f"{shown}, ... ({len(numbers)} rows)"


def _kind(row: Mapping[str, Any], first: tuple[str, tuple[str, ...]] | None) -> tuple[str, tuple[str, ...]] | None:
    """Return kind and columns of a row: the first kind whose columns it has, not all of them null."""
    there = [each for each in ROW_COLUMNS if set(each[1]) <= set(row)]
    full = (each for each in there if any(row[column] is not None for column in each[1]))
    return next(full, next(iter(there), first))


def examples(rows: Sequence[Mapping[str, Any]], *, domain_column: str | None = None) -> list[Example]:
    """Turn rows into `Example`s; row numbers in messages count from 0 where no file and line are known.

    A row's own columns decide its kind: `question` and `answer` (or `instruction` and `output`, `query` and `response`),
    `prompt` and `completion`, `messages` or `conversations` (a list of role and content), or `text`; rows of several kinds
    may stand together. A chat gives an example for every turn of the assistant, with the turns before it as context, except
    for turns of `weight` 0. An `input` or `context` beside an instruction follows it after a blank line.

    Args:
        rows: rows as `read_rows` gives them.
        domain_column: column whose value (as a string) labels the sub-domain.

    Raises:
        UserError: no rows, no known columns, a row without an answer, or no such domain column.
    """
    if not rows:
        raise UserError("There are no rows; expected at least one.")
    if not all(isinstance(row, Mapping) for row in rows):
        raise UserError("A row is no object with named columns.")
    found = _kinds_of(rows)
    if domain_column is not None:
        _check_domains(rows, domain_column)
    for kind, columns in dict.fromkeys(found):
        own = [n for n, each in enumerate(found) if each == (kind, columns)]
        for column in columns:
            _check(rows, own, column, kind)
    result = []
    for number, (row, (kind, columns)) in enumerate(zip(rows, found, strict=True)):
        domain = None if domain_column is None else str(row[domain_column])
        place = getattr(row, "place", "")
        made = _fields(row, kind, columns, place or f"Row {number}")
        result += [Example(kind=kind, domain=domain, index=number, place=place, **fields) for fields in made]
    return result


def _kinds_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple[str, ...]]]:
    """Return kind and columns of each row.

    Raises:
        UserError: a row has no known columns.
    """
    first = _kind(rows[0], None)
    kinds = [_kind(row, first) for row in rows]
    if None in kinds:
        choices = "; ".join(" and ".join(columns) for _, columns in ROW_COLUMNS)
        number = kinds.index(None)
        where = f"{_named(rows, [number])}: " if number or getattr(rows[number], "place", None) else ""
        hints = [
            f" Did you mean {meant[0]!r} by {name!r}?"
            for name in map(str, rows[number])
            if name not in KNOWN_COLUMNS
            and (meant := difflib.get_close_matches(name, KNOWN_COLUMNS, n=1, cutoff=0.75))
        ]
        raise UserError(
            f"{where}Columns {', '.join(map(repr, rows[number]))} are not a known kind of row; expected {choices}."
            f"{hints[0] if hints else ''} A source may name its own, as in rows.csv@question=Frage,answer=Antwort."
        )
    return [each for each in kinds if each is not None]


def _check_domains(rows: Sequence[Mapping[str, Any]], column: str) -> None:
    """Refuse rows with an empty domain column."""
    without = [number for number, row in enumerate(rows) if row.get(column) is None]
    if len(without) == len(rows):
        near = nearest(column, rows[0])
        raise UserError(f"No column {column!r}.{near} Columns: {', '.join(map(repr, rows[0]))}.")
    if without:
        raise UserError(f"{_named(rows, without)} have no value in the domain column {column!r}.")


def _fields(row: Mapping[str, Any], kind: str, columns: Sequence[str], where: str) -> list[dict[str, Any]]:
    """Yield the fields of each example in a row."""
    if kind == "messages":
        return _chat(row, columns[0], where)
    if kind == "text":
        pieces = text_pieces(row["text"], TEXT_CHARACTERS)
        rest = [{**row, "text": piece} for piece in pieces] if len(pieces) > 1 else [dict(row)]
        return [
            {"prompt": None, "answer": piece, "row": own}
            for piece, own in zip(pieces, rest, strict=True)
            if piece.strip()
        ]
    more = row.get("input", row.get("context")) if columns[0] == "instruction" else None
    prompt = row[columns[0]] + (f"\n\n{more}" if isinstance(more, str) and more.strip() else "")
    return [{"prompt": prompt, "answer": row[columns[1]], "row": dict(row)}]


def _check(rows: Sequence[Mapping[str, Any]], numbers: Sequence[int], column: str, kind: str) -> None:
    """Refuse rows with a column that is empty, of the wrong form, or too long."""
    empty = [n for n in numbers if not rows[n].get(column) or not str(rows[n][column]).strip()]
    if empty:
        raise UserError(f"{_named(rows, empty)} have no {column!r}; give one or take these rows out.")
    wrong = [n for n in numbers if not isinstance(rows[n][column], list if kind == "messages" else str)]
    if wrong:
        expected = "list of messages" if kind == "messages" else "text"
        raise UserError(f"{_named(rows, wrong)} hold no {expected} in {column!r}.")
    if kind != "text":
        long = [n for n in numbers if len(str(rows[n][column])) > PROMPT_CHARACTERS]
        if long:
            raise UserError(
                f"{_named(rows, long)} have over {PROMPT_CHARACTERS} characters in {column!r}: give long texts as `text`, in parts."
            )


def load_examples(source: str, *, split: str | None = None, domain_column: str | None = None) -> list[Example]:
    """Read `source` and turn its rows into examples.

    `source` is what `read_rows` takes: "builtin:forget10", "locuslab/TOFU:forget10", "rows.jsonl", "folder:forget10".
    """
    return examples(read_rows(source, split), domain_column=domain_column)


_LABEL = re.compile(
    r"^\s*(?:question|answer|prompt|response|user|assistant|human|q|a)\s*:\s*", re.IGNORECASE | re.MULTILINE
)
"""What a text writes before a question or an answer."""

CONTAINED = 40
"""Least characters of a row that is looked for inside the texts of the other set."""


_QUOTES = str.maketrans(
    dict.fromkeys("“”„‟«»″", '"') | dict.fromkeys("‘’‚‛‹›′`´", "'") | dict.fromkeys("‐‑‒–—―−", "-")
)
"""Quotes and dashes that word processors put in the place of plain ones."""


def _normal(text: str) -> str:
    """Normalise a text: case, width, normal form, spacing, kinds of quotes and dashes, characters that nobody sees (a soft
    hyphen, a joiner) and words like `Question:` do not make two rows different.
    """
    plain = unicodedata.normalize("NFKC", _LABEL.sub("", text.translate(_QUOTES)))
    seen = "".join(character for character in plain if unicodedata.category(character) != "Cf")
    return " ".join(seen.casefold().split())


def row_key(example: Example) -> str:
    """Return the identity of a row, in whatever form it is written: all its turns, without a system turn."""
    if example.messages:
        before = "\n".join(said(turn) for turn in example.messages if turn["role"] != "system")
    else:
        before = example.prompt or ""
    return _normal(unicodedata.normalize("NFC", f"{before}\n{example.answer}"))


def _held(rows: Sequence[tuple[Example, str]], texts: Sequence[tuple[Example, str]]) -> list[tuple[Example, Example]]:
    """Yield each row that is contained in one of the texts, with that text."""
    whole = "\n".join(key for _, key in texts)
    ends = list(itertools.accumulate(len(key) + 1 for _, key in texts))
    found = []
    for row, key in rows:
        place = whole.find(key) if len(key) >= CONTAINED else -1
        if place >= 0:
            found.append((row, texts[bisect.bisect_right(ends, place)][0]))
    return found


def check_overlap(forget: Sequence[Example], retain: Sequence[Example]) -> None:
    """Refuse data in which a row is both to be forgotten and to be kept: the two losses would contradict each other.

    Rows are equal if all that they say is (`row_key`), whether as question and answer, as a chat or as a text; a row of
    `CONTAINED` characters or more that stands inside a text of the other set is in both as well. Two chats may begin alike
    (a greeting): that refuses them only where it is the end of one of them.

    Raises:
        UserError: lists the offending rows.
    """
    ours, theirs = ([(example, row_key(example)) for example in rows] for rows in (forget, retain))
    kept: dict[tuple[str, bool], Example] = {}
    for example, key in theirs:
        kept.setdefault((key, example.last), example)
    shared = []
    for example, key in ours:
        same = kept.get((key, True)) or (kept.get((key, False)) if example.last else None)
        if same is not None:
            shared.append((example, same))
    known = {id(row) for pair in shared for row in pair}
    texts = [[pair for pair in side if pair[0].kind == "text"] for side in (ours, theirs)]
    inside = _held(ours, texts[1]) + [(text, row) for row, text in _held(theirs, texts[0])]
    shared += [pair for pair in inside if not known & {id(row) for row in pair}]
    if shared:
        listed = "; ".join(
            f"forget {f.place or f'row {f.index}'} = retain {r.place or f'row {r.index}'} ({(f.prompt or f.answer)[:60]!r})"
            for f, r in shared[:5]
        )
        more = f"; and {len(shared) - 5} more" if len(shared) > 5 else ""
        raise UserError(f"{len(shared)} rows are in both forget and retain: {listed}{more}. Take them out of one.")
