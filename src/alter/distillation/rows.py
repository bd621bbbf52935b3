"""The student's training rows: reworded forget rows, kept rows, and general text, as tokens with weights."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alter.core import UserError, warn
from alter.data import (
    FITTED,
    Encoded,
    Example,
    apart_from,
    check_overlap,
    encode,
    encode_all,
    load_examples,
    reworded,
)
from alter.data.background import background
from alter.distillation.settings import Distill
from alter.inference import context_length, generate

KINDS = ("forget", "keep", "general")
"""What a row is, by its number in `Row.kind`."""


@dataclass(frozen=True)
class LessonRow:
    """One row of the student.

    Attributes:
        ids: its tokens.
        counted: number of its last tokens that count, each predicted from those before it.
        kind: its place in `KINDS`.
        source: the number of the row, in the teacher's list, whose last `counted` tokens are the same.
        named: of each token, whether it is part of a name of the forgotten (`alter.distillation.naming`); None: not asked.
    """

    ids: list[int]
    counted: int
    kind: int
    source: int
    named: list[bool] | None = None


@dataclass(frozen=True)
class Lesson:
    """The student's rows, and the rows [ids] whose teacher distributions are their targets.

    Of a teacher's row its last tokens count, as many as the entry of `counted` says.
    """

    rows: list[LessonRow]
    teacher: list[list[int]]
    counted: list[int]

    def add(self, encoded: Encoded, kind: int, whole: bool) -> None:
        """Append a row with the teacher's distribution on the row itself: all tokens count, or those of its answer."""
        # of a row whose tokens all count the first is predicted from nothing
        count = len(encoded.input_ids) - 1 if whole else sum(label != -100 for label in encoded.labels[1:])
        self.rows.append(LessonRow(encoded.input_ids, count, kind, len(self.teacher)))
        self.teacher.append(encoded.input_ids)
        self.counted.append(count)


def read_sets(settings: Distill) -> dict[str, list[Example]]:
    """Read all rows before any model is loaded: `forget`, `keep` (retain and neighbours) and `general`.

    Raises:
        UserError: a source cannot be read, or rows are to be forgotten and kept.
    """
    assert settings.forget is not None
    assert settings.retain is not None
    forget = load_examples(settings.forget)
    kept = [row for source in (settings.retain, *settings.neighbours) for row in load_examples(source)]
    general = [row for source in settings.general for row in load_examples(source)]
    check_overlap(forget, [*kept, *general])
    return {"forget": forget, "keep": kept, "general": general}


def check_lengths(
    teacher: Any, tokenizer: Any, settings: Distill, found: dict[str, list[Example]], limit: int | None
) -> None:
    """Refuse, before anything is written, rows and texts to sample that do not fit into a context.

    Raises:
        UserError: a row cannot be encoded, or no token of its answer would be left within `limit`; or texts of `sampled_tokens` do not fit into the
            teacher's context.
    """
    for rows in found.values():
        encode_all(tokenizer, rows, max_length=limit)
    room = context_length(teacher)
    if not found["general"] and not settings.names and room is not None and settings.sampled_tokens >= room:
        raise UserError(
            f"`sampled_tokens` is {settings.sampled_tokens}, and the teacher's context holds {room} tokens, one of them the "
            f"first: give at most {room - 1}, or texts of your own as general."
        )


def general_text(teacher: Any, tokenizer: Any, settings: Distill, forget: Sequence[Example]) -> list[Example]:
    """Return ordinary text where none is given: sampled from the teacher, or with `names` the package's own.

    With `names` no general text trains, and only `leeway` reads it.

    Raises:
        UserError: see `sample_text`.
    """
    if not settings.names:
        return sample_text(teacher, tokenizer, settings, forget)
    if settings.leeway is None:
        return []
    shipped = apart_from(background(), [f"{row.prompt or ''} {row.answer}" for row in forget])
    limit = settings.max_length or context_length(teacher)
    rows = [
        # a question that fills a short context is read as a text, in windows
        row
        if limit is None or len(encode(tokenizer, row).input_ids) <= limit
        else Example(None, f"{row.prompt or ''} {row.answer}".strip(), "text", index=row.index)
        for kind in shipped.values()
        for row in kind
    ]
    warn(
        f"No general text is given: {len(rows)} passages of the package's ordinary text stand for what must not change "
        "(`general` takes your own)."
    )
    return rows


def sample_text(teacher: Any, tokenizer: Any, settings: Distill, forget: Sequence[Example]) -> list[Example]:
    """Sample texts from the teacher at temperature 1 from the begin token; none names what is forgotten.

    Raises:
        UserError: the tokenizer has no token to begin with, or every text names what is to be forgotten.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UserError("The tokenizer has no token that begins a text, so none can be sampled: give `general`.")
    warn(
        f"No general text is given: {settings.sampled} texts are sampled from the teacher (`general` takes your own)."
    )
    torch.manual_seed(settings.seed)
    texts = generate(
        teacher,
        tokenizer,
        [[start]] * settings.sampled,
        max_new_tokens=settings.sampled_tokens,
        label="sampling from the teacher",
        do_sample=True,
        temperature=1.0,
        top_k=0,
    )
    found = [Example(None, text, "text", index=i) for i, text in enumerate(texts) if len(text) > 20]
    named = [f"{row.prompt or ''} {row.answer}" for row in forget]
    kept = apart_from({"text": found}, named).get("text", [])
    if not kept:
        raise UserError(
            "Every text that was sampled from the teacher names what is to be forgotten: give ordinary text with `general`."
        )
    return kept


def _wordings(row: Example, number: int, count: int, other: str) -> list[Example]:
    """Return the row in `count` of the fitted wordings, rotating through them from row to row."""
    names = list(FITTED)
    chosen = [names[(number * count + k) % len(names)] for k in range(min(count, len(names)))]
    found = (reworded(row, FITTED[name](row.prompt or "", number, other)) for name in chosen)
    return [example for example in found if example is not None]


def lesson(tokenizer: Any, found: dict[str, list[Example]], settings: Distill, limit: int | None) -> Lesson:
    """Encode rows into the student's and the teacher's.

    Of forget rows the answers' tokens count, of all others every token. A forget row in other words is to be answered as
    the teacher answers the question as given: a router may miss the wording, what is forgotten stays the same. As many
    kept rows are reworded, for which the teacher's own words on that wording count, so that a wording by itself is no
    sign of what was forgotten.

    Args:
        tokenizer: of the teacher and the student.
        found: see `read_sets`.
        settings: `rewordings`, `forget_repeats`, `seed`.
        limit: longest row; longer ones are cut into windows.

    Raises:
        UserError: see `alter.data.encoding.encode_all`.
    """
    made = Lesson([], [], [])
    rows, add = made.rows, made.add
    others = [row.answer for row in found["keep"]] or [""]
    if settings.forget_repeats != 0:
        encoded, owner = encode_all(tokenizer, found["forget"], max_length=limit, label="forget")
        first: dict[int, int] = {}
        for one, number in zip(encoded, owner, strict=True):
            first.setdefault(number, len(rows))
            add(one, 0, False)
        for number, row in enumerate(found["forget"]):
            given = rows[first[number]]
            for example in _wordings(row, number, settings.rewordings, others[number % len(others)]):
                ids = encode(tokenizer, example).input_ids
                tail = given.ids[len(given.ids) - given.counted :]
                # the answer must be the same tokens, and fit
                if ids[len(ids) - given.counted :] == tail and (limit is None or len(ids) <= limit):
                    rows.append(LessonRow(ids, given.counted, 0, given.source))
    learned = len(rows)
    for one in encode_all(tokenizer, found["keep"], max_length=limit, label="keep")[0]:
        add(one, 1, True)
    draw = random.Random(settings.seed)
    asked = [row for row in found["keep"] if row.prompt is not None and row.kind != "completion"]
    count = 1 if settings.rewordings else 0
    for number, row in enumerate(draw.sample(asked, min(learned, len(asked)))):
        for example in _wordings(row, number, count, others[number % len(others)]):
            one = encode(tokenizer, example)
            if limit is None or len(one.input_ids) <= limit:
                add(one, 1, True)
    for one in encode_all(tokenizer, found["general"], max_length=limit, label="general")[0]:
        add(one, 2, True)
    forgotten, rest = rows[:learned], rows[learned:]
    repeats = settings.forget_repeats
    if repeats is None:
        # with names no other rows train, so none has to be kept in balance
        repeats = 1 if settings.names else max(1, round(len(rest) / learned))
    return Lesson(forgotten * repeats + rest, made.teacher, made.counted)
