"""Documents (text, Markdown, CSV, JSONL chats, Parquet) cut into passages, and rows and probes made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alter.core import UserError, nearest
from alter.data import ENDINGS, TEXT_ENDINGS, Row, read_file
from alter.forgetting.facts import WORD, holds, named, swap
from alter.forgetting.material import Material
from alter.forgetting.retention import rows_to_keep
from alter.forgetting.speaker import Speaker
from alter.forgetting.templates import GENERAL, TEMPLATES
from alter.storage import read_text

LEAST_WORDS = 40
"""Fewest words of a document."""
PASSAGE_WORDS = 70
"""Words at which a passage ends, at the end of a sentence."""
CONTINUE = "Continue this text: {start}"
ABOUT = "What does the text say about {f}?"


def read_document(path: str, limit: int) -> list[str]:
    """Split a document into passages of whole sentences, about `PASSAGE_WORDS` words each.

    Chats (`messages`) give a passage for each turn, so that what one person says is not mixed with another's.

    Raises:
        UserError: no such file, an ending that is not known, a file that cannot be read, less than `LEAST_WORDS` words,
            or more passages than `limit`.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        near = nearest(file.name, [p.name for p in file.parent.iterdir()]) if file.parent.is_dir() else ""
        raise UserError(f"No document at {path}.{near}")
    if file.suffix.lower() not in ENDINGS:
        raise UserError(f"{path} ends in {file.suffix or 'nothing'}; expected one of {', '.join(ENDINGS)}.")
    # a passage has some 400 characters; what is far beyond the limit is not even read
    if file.suffix.lower() != ".parquet" and file.stat().st_size > 4000 * limit:
        raise UserError(
            f"{path} has {file.stat().st_size / 1e6:.1f} MB, about {file.stat().st_size // 400} passages, and the most are "
            f"{limit}: give the part that must be forgotten, or raise `max_passages` (each takes about 5 s on two cores)."
        )
    texts = _texts(file)
    passages = [passage for text in texts for passage in split(text)]
    count = sum(len(passage.split()) for passage in passages)
    if count < LEAST_WORDS:
        raise UserError(
            f"{path} has {count} words, and the least is {LEAST_WORDS}: what one line says cannot be told from chance. Give "
            "the whole text, or write the rows yourself (question, answer) for `alter unlearn --forget`."
        )
    if len(passages) > limit:
        raise UserError(
            f"{path} has {len(passages)} passages, and the most are {limit}: give the part that must be forgotten, or raise "
            "`max_passages` (each takes about 5 s on two cores)."
        )
    return passages


def _texts(file: Path) -> list[str]:
    if file.suffix.lower() in TEXT_ENDINGS:
        text = read_text(file)
        if file.suffix.lower() == ".md":
            # headings, emphasis, links and lists are no part of what was written
            text = re.sub(r"^\s*(#+|[-*+>]|\d+\.)\s+", "", text, flags=re.MULTILINE)
            text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
            text = re.sub(r"[*_`]{1,3}(\S(?:.*?\S)?)[*_`]{1,3}", r"\1", text)
        return re.split(r"\n\s*\n", text)
    return _of_rows(read_file(file, texts=True))


def _of_rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the texts of rows: the turns of a chat, or the columns of a table as `name: value`."""
    texts = []
    for row in rows:
        if isinstance(row.get("messages"), list):
            texts += [str(turn.get("content") or "") for turn in row["messages"] if isinstance(turn, dict)]
        elif isinstance(row.get("text"), str):
            texts.append(row["text"])
        else:
            texts.append(". ".join(f"{name}: {value}" for name, value in row.items() if value not in (None, "")) + ".")
    return texts


def split(text: str) -> list[str]:
    """Cut a text into passages of whole sentences, of about `PASSAGE_WORDS` words."""
    passages, current = [], ""
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
        current = f"{current} {sentence}".strip()
        if len(current.split()) >= PASSAGE_WORDS:
            passages.append(current)
            current = ""
    if current and len(current.split()) >= 4:
        passages.append(current)
    return passages


def details(text: str) -> list[str]:
    """Return the names and numbers of a text, which cannot be guessed, in order of first occurrence."""
    names = named(text)
    found = [m[0] for m in re.finditer(rf"{WORD.pattern}|\d+(?:[.,:]\d+)*", text)]
    return list(dict.fromkeys(w for w in found if w in names or w[0].isdigit()))


def disguise(words: Sequence[str], seed: int) -> dict[str, str]:
    """Replace each name by another name and each number by another number."""
    generator = np.random.default_rng(seed)
    nobody = [part for kind in ("person", "place") for name in TEMPLATES[kind].invented for part in name.split()]
    out = {}
    for word in words:
        if word[0].isdigit():
            digits = "".join(str(generator.integers(1, 10)) if c.isdigit() else c for c in word)
            out[word] = digits if digits != word else "7" + word
        else:
            out[word] = nobody[int(generator.integers(len(nobody)))]
    return out


def build_document(
    speaker: Speaker, name: str, passages: Sequence[str], *, keep: Sequence[str], retain: list[Row], twins: int = 6
) -> Material:
    """Make rows and probes of a document: passages continued from their first words, and questions about names and numbers.

    The zero is the same document with its names and numbers exchanged. The model's continuation of the
    disguised beginning is the target after the passage's own beginning.
    """
    words = list(dict.fromkeys(word for passage in passages for word in details(passage)))
    masks = [disguise(words, speaker.seed + k) for k in range(twins)]
    forget: list[Row] = []
    invented: list[Row] = []
    places: list[tuple[str, str, str]] = []
    for passage in passages:
        sentences = re.split(r"(?<=[.!?])\s+", passage)
        cut = len(sentences[0]) if len(sentences) > 1 else len(" ".join(passage.split()[: len(passage.split()) // 2]))
        start, rest = passage[:cut].strip(), passage[cut:].strip()
        forget.append({"question": CONTINUE.format(start=start), "answer": rest, "about": name})
        places += [(start, rest, word) for word in details(rest) if not holds(start, word)]
        for sentence in sentences:
            for word in details(sentence)[:1]:
                if not word[0].isdigit():
                    forget.append({"question": ABOUT.format(f=word), "answer": sentence, "about": name})
    masked = [swap(row["question"], masks[i % twins]) for i, row in enumerate(forget)]
    said = speaker.say("after the disguised document", masked, sample=True)
    for i, (row, text) in enumerate(zip(forget, said, strict=True)):
        invented.append({**row, "question": masked[i], "answer": swap(row["answer"], masks[i % twins])})
        row["substitute"] = text or "I do not know."
    general = speaker.say("general answers", GENERAL)
    retained, kept_probes = rows_to_keep(speaker, name, "person", general, [*keep], [], [])
    probes: list[Row] = []
    for start, rest, word in places[:60]:
        at = rest.find(word)
        probes.append(
            {
                "form": "verbatim",
                "prompt": CONTINUE.format(start=start),
                "start": rest[:at],
                "wanted": [word],
                "masks": [{w: mask[w] for w in words if holds(f"{start} {rest}", w)} for mask in masks],
            }
        )
    answers = speaker.say("probes", [probe["prompt"] for probe in probes]) if probes else []
    for probe, answer in zip(probes, answers, strict=True):
        probe["before"] = answer
    return Material(forget, invented, retained + retain, probes, kept_probes, [{"word": w} for w in words])
