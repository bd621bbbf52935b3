"""Tokens as text: what each token adds, what is final, and what is safe to show in a terminal or on a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""Character that an unfinished one decodes to."""
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A token of a byte-fallback vocabulary that stands for one byte."""


def settled(tokenizer: Any, ids: Sequence[int], text: str) -> str:
    """Return the beginning of `text`, which `ids` decode to without special tokens, that no further token can change.

    An unfinished character waits for its last byte. A run of single bytes decodes as a whole: one that is no character
    breaks all of them, so the run waits for the token after it. A tokenizer that cleans spaces up may join what stands
    around the last space.
    """
    end = len(ids)
    while end and BYTE_TOKEN.fullmatch(tokenizer.convert_ids_to_tokens(ids[end - 1]) or ""):
        end -= 1
    if end < len(ids):
        before = tokenizer.decode(ids[:end], skip_special_tokens=True)
        text = before if text.startswith(before) else ""
    text = text.rstrip(UNFINISHED)
    if getattr(tokenizer, "clean_up_tokenization_spaces", False) and " " in text:
        text = text[: text.rindex(" ")]
    return text


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return what each token adds to the text: joined, they give the whole text, special tokens included.

    A token that leaves a character unfinished adds nothing; the one that finishes it adds it.
    """
    found: list[str] = []
    # each is decoded behind the token before it only: the time grows with the length, not with its square
    start = shown = 0
    for end in range(1, len(ids) + 1):
        before, text = _decode(tokenizer, ids[start:shown]), _decode(tokenizer, ids[start:end])
        unfinished = text.endswith(UNFINISHED) and end < len(ids)
        if unfinished or not text.startswith(before):
            found.append("")
            continue
        found.append(text[len(before) :])
        start, shown = shown, end
    return found


def is_special(tokenizer: Any, token: int) -> bool:
    """Tell whether a token is left out of a text that is decoded without special tokens."""
    return bool(_decode(tokenizer, [token])) and not tokenizer.decode([token], skip_special_tokens=True)


def added(tokenizer: Any, before: Sequence[int], token: int) -> str:
    """Return what a token adds to the text behind other tokens; its name in the vocabulary if that is no whole character."""
    start = _decode(tokenizer, before[-1:])
    text = _decode(tokenizer, [*before[-1:], token])
    piece = text[len(start) :] if text.startswith(start) else _decode(tokenizer, [token])
    return str(tokenizer.convert_ids_to_tokens(token)) if UNFINISHED in piece or not piece else piece


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def visible(text: str) -> str:
    """Replace control characters by visible symbols, except line breaks and tabs, so that none acts on a terminal."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else "\u2421" if "\x7f" <= c <= "\x9f" else c
        for c in text
    )
