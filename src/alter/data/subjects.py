"""Whether a text mentions a person or a thing: a name, a handle or a telephone number, in any spelling."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence

from alter.core import MARKS, UNSPACED, UserError, is_word
from alter.data.rows import Example, said

_HYPHENS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"), "-")
_QUOTES = dict.fromkeys(map(ord, "\u2018\u2019\u201a\u201b\u02bc\u0060\u00b4\u2032\uff07"), "'")

_PHONE = re.compile(r"\+?[\d\s().\-/]+")
_DIGITS = 6
"""Least digits of a telephone number."""

_IN_WORD = rf"[\w{re.escape(MARKS)}]"

_KOREAN = r"(?:씨|님|이|가|은|는|을|를|의|에|에게|에서|와|과|도|로|으로|만|께|께서|랑|이랑|이다|입니다)*"
"""What Korean writes against a name."""


def _form(text: str) -> str:
    """Normalise case, width, normal form, hyphens, apostrophes and spacing; drop joiners and soft hyphens."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = "".join(character for character in text if unicodedata.category(character) != "Cf")
    return " ".join(text.translate(_HYPHENS | _QUOTES).split())


@functools.lru_cache(256)
def _pattern(subject: str) -> re.Pattern[str]:
    form = _form(subject)
    digits = re.sub(r"\D", "", form)
    if len(digits) >= _DIGITS and _PHONE.fullmatch(form):
        return _number(form, digits)
    start, end = 0, len(form)
    # quotes and punctuation around a name are no part of it; the sign of a handle is
    while start < end and not is_word(form[start]) and form[start] not in "@#+":
        start += 1
    while end > start and not is_word(form[end - 1]) and form[end - 1] not in "+#":
        end -= 1
    name = form[start:end] or form
    words = [re.escape(word) for word in re.split(r"[\s\-]+", name) if word]
    body = r"[\s\-_]+".join(words) if len(words) > 1 else re.escape(name)
    if "\uac00" <= name[-1] <= "\ud7a3":
        body += _KOREAN
    # a letter, mark or digit beside it makes another word of it, except where no spaces are set
    left = "" if UNSPACED.match(name[0]) or not is_word(name[0]) else f"(?<!{_IN_WORD})"
    right = "" if UNSPACED.match(name[-1]) or not is_word(name[-1]) else f"(?!{_IN_WORD})"
    return re.compile(left + body + right)


def _number(form: str, digits: str) -> re.Pattern[str]:
    """Match a telephone number with any signs between its digits, and +49, 0049 or 0 before what follows the country's code."""
    forms = {digits}
    plus = form.startswith("+")
    if plus or digits.startswith("00"):
        whole = digits if plus else digits[2:]
        forms |= {whole, f"00{whole}", *(f"0{whole[n:]}" for n in (1, 2, 3) if len(whole) - n >= _DIGITS)}
    gap = r"[\s().\-/]*"
    bodies = "|".join(gap.join(one) for one in sorted(forms, key=len, reverse=True))
    national = (
        rf"|(?:\+|(?<!\d)00)\d{{1,3}}{gap}(?:\(0\))?{gap}{gap.join(digits[1:])}"
        if digits[0] == "0" != digits[1]
        else ""
    )
    return re.compile(rf"(?<!\d)(?:{bodies}{national})(?!\d)")


def mentions(subject: str, text: str) -> bool:
    """Return whether `text` names `subject`, as words of its own: "Ann" is in "Ann's" and in "(ann)", not in "Annex".

    Case, normal form and width of characters, kinds of hyphens, apostrophes and spaces, and quotes or punctuation around
    the subject do not matter. In scripts without spaces (Chinese, Japanese, Thai) it may stand anywhere, in Korean before
    what is written against a name. A telephone number is found whatever stands between its digits, with or without the
    code of its country. Names are not declined: "Anna" is not found in "Annas Haus".

    Raises:
        UserError: the subject is empty.
    """
    if not _form(subject):
        raise UserError("The subject is empty: say whom or what it is about.")
    return _pattern(subject).search(_form(text)) is not None


def rows_about(subject: str, rows: Sequence[Example]) -> list[Example]:
    """Return the rows that mention a subject in any of their turns, prompt or answer; of a chat in several rows, the first.

    Raises:
        UserError: the subject is empty.
    """
    found: dict[int, Example] = {}
    for row in rows:
        if row.index not in found:
            texts = [*map(said, row.messages), row.prompt or "", row.answer]
            if mentions(subject, "\n".join(texts)):
                found[row.index] = row
    return list(found.values())
