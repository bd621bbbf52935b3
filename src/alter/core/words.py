"""Split text into words, in any script.

In English and other Latin scripts each function gives what the tools that everyone compares with give (`rouge_score`,
sacrebleu, scikit-learn, white space); they differ there, so these do. What those tools cannot read they drop, or take a
whole sentence for one word: Cyrillic, Greek, Arabic or Devanagari words count here, and each character of a script that
sets no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese).
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Callable, Mapping

UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"
    r"\U00020000-\U0003ffff]"
)
"""One character of a script that writes words without spaces."""


MARKS = "".join(chr(code) for code in range(0x300, 0x10000) if unicodedata.category(chr(code))[0] == "M")
"""Marks of letters, which `\\w` does not match: the vowels of Devanagari among them."""


_ALIKE = str.maketrans(
    "АВЕЅЗІЈКМНОРСТУХЬаеѕіјорсухһԁԛԝΑΒΕΖΗΙΚΜΝΟΡΤΥΧανορυι",
    "ABES3IJKMHOPCTYXbaesijopcyxhdqwABEZHIKMNOPTYXavopui",
)
"""Letters of Cyrillic and Greek that look like those of Latin."""

_SINGLE = re.compile(
    r"(?<!\w)[^\W\d_](?:(?: [^\W\d_](?!\w)){2,}|(?:\.[^\W\d_](?!\w))+|(?:-[^\W\d_](?!\w))+|(?:\*[^\W\d_](?!\w))+)"
)
"""A word whose letters stand apart: "A d a", "A.d.a"."""

_BETWEEN = re.compile(r"(?<=[a-zß-öø-ÿα-ωа-я])(?=[A-ZÀ-ÖØ-ÞΑ-ΩА-Я])|(?<=[,;:!?])(?=[^\W\d_])")
"""Where words follow each other without a space, as their letters or a sign tell."""


JOINED = 20
"""Latin letters without a space from which words are taken to be written together."""
PART = 6
"""Fewest letters in a row that are parted there."""
LONGEST_WORD = 20
"""Letters of a word at most."""


def titled(text: str, ranks: Mapping[str, int] | None = None) -> str:
    """Return a text as if every word in it were a name, however it was typed: a capital first, small letters after it.

    "WHO WAS ada_king's mother?" becomes "Who Was Ada King's Mother?". Other forms of letters are what they stand for (NFKC), and
    what shows nothing (a soft hyphen, a joiner of no width) is left out. "AdaKing", "A d a King" and "A.d.a King" become
    "Ada King" as well; Latin letters lose their accents, and in a word that has Latin letters those of other alphabets that look
    like them are Latin. With the `ranks` of words (see `parted`) `JOINED` Latin letters and more without a space are parted into words.
    """
    plain = unicodedata.normalize("NFKC", text).replace("_", " ")
    plain = "".join(character for character in plain if unicodedata.category(character) != "Cf")
    plain = re.sub(rf"[\w{MARKS}]+", lambda word: _latin(word[0]), plain)
    plain = _SINGLE.sub(lambda run: run[0][::2], plain)
    if ranks:
        plain = re.sub(r"\S+", lambda run: _apart(run[0], ranks), plain)
    plain = _BETWEEN.sub(" ", plain)
    plain = re.sub(r"(?<=\S) {2,}(?=\S)", " ", plain)

    def name(word: re.Match[str]) -> str:
        ending = len(word[0]) == 1 and plain[max(word.start() - 1, 0)] in "'’"
        return word[0].lower() if ending else word[0].capitalize()

    return re.sub(r"\w+", name, plain)


def _apart(run: str, ranks: Mapping[str, int]) -> str:
    """Return what stands without a space with spaces between its words, if it has many letters."""
    if len(re.findall("[A-Za-z]", run)) < JOINED:
        return run
    run = re.sub(r"(?<=['’]s)(?=[A-Za-z])", " ", _BETWEEN.sub(" ", run))
    return re.sub(rf"[A-Za-z]{{{PART},}}", lambda letters: " ".join(parted(letters[0], ranks)), run)


def parted(letters: str, ranks: Mapping[str, int]) -> list[str]:
    """Split letters that are written without spaces into the likeliest words.

    A word costs 1 + ln(10 + rank), since words are about as common as their rank tells; n letters that are no word cost 6 + 2.75 n.
    Of the words of 60 questions of TOFU that SmolLM2's tokens part, 90 % of the boundaries are found (F1).

    Args:
        letters: Latin, in any case.
        ranks: of words in small letters, from the most common one on.
    """
    low = letters.lower()
    best = [0.0]
    begins = [0]
    for end in range(1, len(low) + 1):
        tried = []
        for start in range(max(0, end - LONGEST_WORD), end):
            rank = ranks.get(low[start:end])
            unknown = 6 + 2.75 * (end - start)
            tried.append((best[start] + (unknown if rank is None else 1 + math.log(10 + rank)), start))
        cost, start = min(tried)
        best.append(cost)
        begins.append(start)
    words = []
    end = len(low)
    while end:
        words.append(letters[begins[end] : end])
        end = begins[end]
    return words[::-1]


def _latin(word: str) -> str:
    """Return a word with Latin letters in Latin letters alone, without accents; another one as it is."""
    if word.isascii() or not re.search("[A-Za-z]", unicodedata.normalize("NFD", word)):
        return word
    letters = unicodedata.normalize("NFD", word.translate(_ALIKE))
    return unicodedata.normalize("NFC", re.sub(rf"(?<=[A-Za-z])[{MARKS}]+", "", letters))


def caseless(word: str) -> bool:
    """Tell whether a word begins with a letter that is never written as a capital: Chinese, Arabic, Devanagari, Georgian."""
    return word[:1].isalpha() and word[0].title() == word[0].lower()


def edges(word: str) -> tuple[str, str]:
    """Return what must stand before and after a word in a text, as patterns: no letter or digit, where words are set apart."""
    return "" if UNSPACED.match(word[0]) else r"(?<!\w)", "" if UNSPACED.match(word[-1]) else r"(?!\w)"


_LATIN = re.compile(r"[\u0080-\u036f\u1d00-\u1eff\u2c60-\u2c7f\ua720-\ua7ff\uab30-\uab6f]+")
_PLAIN = re.compile(r"[a-z0-9]+|[^\x00-\x7f]+")
_SIGN = re.compile(
    r"[\u060c\u061b\u061f\u06d4\u0964\u0965\u3001\u3002\u300c-\u3011\uff01-\uff0f\uff1a-\uff20\uff5b-\uff65]"
)
"""Punctuation that stands against a word in those scripts and that no tool for English splits off."""


def runs(text: str) -> list[str]:
    """Split a text into words of any script, in their case: letters, digits and their marks, under NFKC.

    Where no spaces are set, a character (with its marks) each. Joiners inside a word are left out.
    """
    found: list[str] = []
    open_ = False
    for character in unicodedata.normalize("NFKC", text):
        kind = unicodedata.category(character)
        if kind == "Cf":
            continue
        if kind[0] not in "LMN":
            open_ = False
        elif (kind[0] == "M" and open_) or (open_ and not UNSPACED.match(character) and not UNSPACED.match(found[-1])):
            found[-1] += character
        else:
            found.append(character)
            open_ = True
    return found


def words(text: str) -> list[str]:
    """Split a text into words of any script; case, width of characters and normal form do not matter."""
    return [word.casefold() for word in runs(text)]


@functools.cache
def _stemmer() -> Callable[[str], str]:
    from nltk.stem.porter import PorterStemmer

    return functools.lru_cache(1 << 16)(PorterStemmer().stem)


def rouge_words(text: str, *, stem: bool) -> list[str]:
    """Split a text into lower-case words as `rouge_score` does (runs of a-z and 0-9), and into those that it drops.

    It takes a Latin letter with an accent for a space (`café` is `caf`), and so does this, for the sake of published
    numbers, where plain letters are left of the word. Words of other scripts are those of `words`.

    Args:
        text: any text.
        stem: cut English words of more than three letters to their stems (Porter).
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    text = text.lower()
    found: list[str] = []
    for match in _PLAIN.finditer(text):
        piece = match[0]
        if piece.isascii():
            found.append(_stemmer()(piece) if stem and len(piece) > 3 else piece)
            continue
        # a run of Latin letters beside plain ones is the rest of a word that is counted already
        beside = (text[: match.start()][-1:], text[match.end() :][:1])
        edges = [bool(re.match("[a-z0-9]", character)) for character in beside]
        parts = re.split(f"({_LATIN.pattern})", piece)
        for place, part in enumerate(parts):
            own = words(part)
            if _LATIN.match(part):
                first, last = not any(parts[:place]), not any(parts[place + 1 :])
                if (first and edges[0]) or (last and edges[1]) or not any(map(str.isalpha, part)):
                    continue
            found += own
    return found


def spaced(text: str) -> str:
    """Put spaces around each character of a script that sets none, and around punctuation that English lacks.

    A text without either is returned as it is.
    """
    if UNSPACED.search(text):
        out: list[str] = []
        for character in unicodedata.normalize("NFC", text):
            if out and UNSPACED.match(out[-1]) and unicodedata.category(character)[0] == "M":
                out[-1] += character
            else:
                out.append(character)
        text = "".join(f" {piece} " if UNSPACED.match(piece) else piece for piece in out)
    return _SIGN.sub(r" \g<0> ", text)


def pieces(text: str) -> list[str]:
    """Split a text at white space, in lower case; in scripts without spaces a character is a piece."""
    return spaced(text.lower()).split()


def spans(text: str) -> list[tuple[int, int]]:
    """Return where the pieces of a text begin and end: what stands between white space, or one character (see `pieces`)."""
    found: list[tuple[int, int]] = []
    joined = False
    for place, character in enumerate(text):
        if character.isspace():
            joined = False
        elif joined and unicodedata.category(character)[0] == "M":
            found[-1] = (found[-1][0], place + 1)
        elif UNSPACED.match(character) or not joined or UNSPACED.match(text[found[-1][0]]):
            found.append((place, place + 1))
            joined = True
        else:
            found[-1] = (found[-1][0], place + 1)
    return found


def bare(word: str) -> str:
    """Return a word without case and surrounding punctuation, under NFC; punctuation alone stays."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", word).casefold())
    kept = [place for place, character in enumerate(folded) if is_word(character)]
    return folded[kept[0] : kept[-1] + 1] if kept else word


def is_word(character: str) -> bool:
    """Tell whether a character can be part of a word: a letter, a mark, a digit or an underscore."""
    return character == "_" or unicodedata.category(character)[0] in "LMN"


def terms(text: str) -> list[str]:
    r"""Return the terms of a text for TF-IDF: words of two characters or more, as scikit-learn has them (`\b\w\w+\b`).

    In scripts with marks inside words those belong to them, and in scripts without spaces two characters make a term.
    """
    if not any(UNSPACED.match(character) or _marks(character) for character in text if not character.isascii()):
        return re.findall(r"\b\w\w+\b", text)
    found: list[str] = []
    before = ""
    for run in runs(text):
        if UNSPACED.match(run):
            found += [before + run] if before else []
            before = run
        else:
            found += [run] if len(run) > 1 else []
            before = ""
    return found


def _marks(character: str) -> bool:
    return unicodedata.category(character)[0] == "M"
