"""Ordinary text, shipped with the package, on which a router must open no forget expert."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from alter.data.rows import Example

FOLDER = Path(__file__).parent.parent / "assets" / "background"


def _example(row: dict[str, object], index: int) -> Example:
    if "question" in row:
        return Example(str(row["question"]), str(row["answer"]), "qa", index=index, row=row)
    if "messages" in row:
        turns = row["messages"]
        assert isinstance(turns, list)
        asked = next(turn["content"] for turn in reversed(turns[:-1]) if turn["role"] == "user")
        return Example(asked, turns[-1]["content"], "messages", tuple(turns[:-1]), index=index, row=row)
    return Example(None, str(row["text"]), "text", index=index, row=row)


def background(*, unseen: bool = False) -> dict[str, list[Example]]:
    """Return passages by kind ("prose", "code", "questions", ...): those for every fit, or kinds held out of all fits."""
    files = sorted((FOLDER / "unseen" if unseen else FOLDER).glob("*.jsonl"))
    return {
        path.stem: [_example(json.loads(line), i) for i, line in enumerate(path.read_text("utf-8").splitlines())]
        for path in files
    }


def names_in(text: str) -> set[str]:
    """Return words of four letters or more with a capital in the middle of a sentence, which are mostly names."""
    words = re.finditer(r"(?<=[\w,;] )[^\W\d_][\w'’]{3,}", text)
    return {
        word[0]
        for word in words
        if word[0][0].isupper() and ((before := text[word.start() - 2]).islower() or before in ",;")
    }


def apart_from(found: dict[str, list[Example]], texts: Sequence[str]) -> dict[str, list[Example]]:
    """Drop passages that contain a name of `texts`: what is to be forgotten must not count as ordinary text.

    A name that stands in one of the texts alone, and there among others, may be there by chance: it counts if it is in at
    least a twentieth of them. Kinds of which nothing is left are dropped.
    """
    counts: dict[str, int] = {}
    for text in texts:
        for name in names_in(text):
            counts[name] = counts.get(name, 0) + 1
    subjects = {name for name, count in counts.items() if 20 * count >= len(texts)}
    kept = {
        kind: [e for e in examples if not subjects & set(re.findall(r"[\w'’]+", f"{e.prompt or ''} {e.answer}"))]
        for kind, examples in found.items()
    }
    return {kind: examples for kind, examples in kept.items() if examples}
