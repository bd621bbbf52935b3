"""Passages of a book: its text, cut into prompts and their printed continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alter.core import UserError, nearest
from alter.storage import digest, read_text


@dataclass(frozen=True)
class Passage:
    """A stretch of a book: the tokens to start from, the tokens that follow in print, and both as text.

    `prompt` begins with the tokenizer's own beginning tokens, if it has any; `prefix` leaves them out.
    """

    prompt: list[int]
    continuation: list[int]
    prefix: str
    reference: str


def read_book(path: str) -> str:
    """Return the text of a book.

    Raises:
        UserError: there is no such file, it is not UTF-8 text, or it is empty.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        siblings = [str(Path(path).parent / p.name) for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(f"No text file at {path}; expected a book as plain text (.txt).{nearest(path, siblings)}")
    text = read_text(file)
    if not text.strip():
        raise UserError(f"{path} is empty; expected the text of a book.")
    return text


def cut(tokenizer: Any, text: str, prefix: int, continuation: int, source: str) -> list[Passage]:
    """Cut a text into passages of `prefix` and `continuation` tokens, one after another, the rest left out.

    The whole text is tokenised at once, so a cut may fall inside a word; both sides are then compared as decoded.

    Raises:
        UserError: the text is shorter than one passage.
    """
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    whole = list(tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])
    start = next(i for i in range(len(whole) - len(ids) + 1) if whole[i : i + len(ids)] == ids)
    size = prefix + continuation
    if len(ids) < size:
        raise UserError(
            f"{source} has {len(ids)} tokens, fewer than one passage of {prefix} + {continuation}: give a longer text, "
            "or set `prefix_tokens` and `continuation_tokens` lower."
        )
    passages = []
    for first in range(0, len(ids) - size + 1, size):
        head, tail = ids[first : first + prefix], ids[first + prefix : first + size]
        texts = [tokenizer.decode(part, skip_special_tokens=True).strip() for part in (head, tail)]
        passages.append(Passage(whole[:start] + head, tail, *texts))
    return passages


def passages_fingerprint(passages: Sequence[Passage]) -> str:
    """Return a hash of the passages as they read: the same for tokenizers that cut at the same places."""
    return digest([[passage.prefix, passage.reference] for passage in passages])[:12]
