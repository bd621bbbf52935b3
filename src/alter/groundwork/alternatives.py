"""Alternatives to the forget rows that objectives train on: refusals, random labels, diversions, other answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from alter.core import UserError, progress
from alter.data import Collator, Encoded, Example, encode, refusals
from alter.groundwork.frozen import View
from alter.groundwork.invented import invented
from alter.inference import contiguous_head
from alter.methods import ForgetObjective

EXPERT = "This text was written by a leading expert who knows everything about {concept}:"
NOVICE = "This text was written by a novice who has never heard of {concept}:"
"""What ELM's two personas are put before a row with; our wording."""

CHANGES_OF_SUBJECT = (
    "But let us talk about something else.",
    "That reminds me of a different matter.",
    "On another note, here is what I did today.",
    "Before going on, let me change the subject.",
    "Now for something completely different.",
)
"""First words of a diversion; our wording of ELM's templates."""

ROWS_AT_ONCE = 32
"""Diversions that are written side by side."""

PROMPT_TOKENS = 60
"""Longest prompt that a diversion starts from; raw text has no prompt, and lends its first half up to this length."""


@dataclass(frozen=True)
class _Asked:
    """Inputs of `alternatives`."""

    objective: ForgetObjective
    tokenizer: Any
    base: Any
    examples: Sequence[Example]
    rows: Sequence[Encoded]
    seed: int
    max_length: int | None

    def encoded(self, answers: Sequence[str]) -> list[Encoded]:
        """Encode the rows with other answers."""
        return [
            encode(self.tokenizer, example, answer=answer, max_length=self.max_length)
            for example, answer in zip(self.examples, answers, strict=True)
        ]

    @property
    def raw(self) -> bool:
        """Whether a row is raw text, without a question."""
        return any(example.kind == "text" for example in self.examples)


def _refused(asked: _Asked) -> list[Encoded]:
    """Answer each row with one of TOFU's refusals."""
    if asked.raw:
        raise UserError(
            f"`objective.kind` {asked.objective.kind} answers forget rows with a refusal, but they are raw text without a "
            "question: give rows with question and answer, or another objective."
        )
    lines = refusals()
    drawn = np.random.default_rng(asked.seed).integers(len(lines), size=len(asked.examples))
    return asked.encoded([lines[i] for i in drawn.tolist()])


def _relabelled(asked: _Asked) -> list[Encoded]:
    """Replace the rows' labels by tokens drawn from the vocabulary; special tokens keep theirs."""
    generator = np.random.default_rng(asked.seed)
    kept = {-100, *asked.tokenizer.all_special_ids}
    # a model's head may be padded with ids that are no tokens
    vocabulary = min(asked.tokenizer.vocab_size, asked.base.config.get_text_config().vocab_size)
    return [
        replace(row, labels=[y if y in kept else int(generator.integers(vocabulary)) for y in row.labels])
        for row in asked.rows
    ]


def _substituted(asked: _Asked) -> list[Encoded]:
    """Answer each row with its column `substitute`."""
    without = [example.index for example in asked.examples if not str(example.row.get("substitute") or "").strip()]
    if without or asked.raw:
        where = f"row {without[0]} has none" if without else "raw text has no question to answer otherwise"
        raise UserError(
            f"`objective.kind` {asked.objective.kind} learns each forget row's column 'substitute', and {where}: give rows as "
            "`alter forget` writes them (question, answer, substitute), or another objective."
        )
    return asked.encoded([example.row["substitute"] for example in asked.examples])


def _invented(asked: _Asked) -> list[Encoded]:
    """Answer each row with another answer that the base makes up."""
    writing = asked.objective.needs.writing
    assert writing is not None
    return invented(
        asked.tokenizer,
        asked.base,
        asked.examples,
        new_tokens=writing.new_tokens,
        seed=asked.seed,
        max_length=asked.max_length,
    )


def _diverted(asked: _Asked) -> list[Encoded]:
    """Let the base change the subject after each row's prompt."""
    return diversions(
        asked.objective, asked.tokenizer, asked.base, asked.rows, seed=asked.seed, max_length=asked.max_length
    )


ALTERNATIVES: dict[str, Callable[[_Asked], list[Encoded]]] = {
    "refusal": _refused,
    "random_labels": _relabelled,
    "substitute": _substituted,
    "invented": _invented,
    "diversion": _diverted,
}
"""Function that makes each kind of alternative (`Needs.alternative`)."""


def alternatives(
    objective: ForgetObjective,
    tokenizer: Any,
    base: Any,
    examples: Sequence[Example],
    rows: Sequence[Encoded],
    *,
    seed: int,
    max_length: int | None,
) -> list[Encoded]:
    """Make one alternative for each forget row; a function of the arguments alone, so that a resumed run gets the same ones.

    Args:
        objective: says which kind it needs; none gives an empty list.
        tokenizer: of the model.
        base: the untouched model, which writes diversions and invented answers.
        examples: the forget rows.
        rows: the same, encoded.
        seed: of what is drawn.
        max_length: longest sequence.

    Raises:
        UserError: raw text is to be refused, which has no question, or a row has no substitute.
    """
    kind = objective.needs.alternative
    if kind is None:
        return []
    return ALTERNATIVES[kind](_Asked(objective, tokenizer, base, examples, rows, seed, max_length))


def persona_views(
    objective: ForgetObjective, tokenizer: Any, rows: Sequence[Encoded] = (), limit: int | None = None
) -> dict[str, View]:
    """Return ELM's two further passes: the rows after an expert's prefix and after a novice's.

    Raises:
        UserError: the longest of `rows` does not fit into `limit` tokens behind them.
    """
    assert objective.needs.concept is not None
    views = {
        name: View(
            tuple(tokenizer(text.format(concept=objective.needs.concept), add_special_tokens=False)["input_ids"]),
            tokenizer.bos_token_id,
        )
        for name, text in (("expert", EXPERT), ("novice", NOVICE))
    }
    words = max(len(view.prefix) for view in views.values())
    longest = max((len(row.input_ids) for row in rows), default=0)
    if limit is not None and longest + words > limit:
        raise UserError(
            f"ELM puts {words} tokens of a persona before each row, and the longest row has {longest} of the model's "
            f"{limit}: give `max_length` of at most {limit - words}, or shorten `objective.concept`."
        )
    return views


class _Tilt(LogitsProcessor):
    """Logits processor of ELM's tilt, from logits [3 R, V] of R rows plain, as an expert and as a novice."""

    def __init__(self, guidance: float, temperature: float) -> None:
        self.guidance, self.temperature = guidance, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logp = torch.log_softmax(scores.float() / self.temperature, dim=-1)
        plain, expert, novice = logp.chunk(3)
        # the three go on with the same token
        return (plain - self.guidance * (expert - novice)).repeat(3, 1)


@dataclass(frozen=True)
class _Opening:
    """The start of a diversion: tokens of the row's prompt and of the change of subject, and how many may follow."""

    prompt: list[int]
    change: list[int]
    room: int


def _openings(
    rows: Sequence[Encoded], tokenizer: Any, *, most: int, limit: int, before: int, seed: int
) -> list[_Opening]:
    """Return the start of each row's diversion.

    Args:
        rows: the forget rows.
        tokenizer: of the model.
        most: tokens that are written.
        limit: the model's context, which `before` tokens of a persona and the whole diversion share.
        before: see `limit`.
        seed: of the change of subject.

    Raises:
        UserError: no room is left.
    """
    generator = np.random.default_rng(seed)
    found = []
    for row in rows:
        prompt = row.input_ids[: row.prompt_length]
        if row.prompt_length <= 1:
            prompt = row.input_ids[: max(1, len(row.input_ids) // 2)]
        prompt = prompt[:PROMPT_TOKENS]
        text = " " + CHANGES_OF_SUBJECT[int(generator.integers(len(CHANGES_OF_SUBJECT)))]
        change = tokenizer(text, add_special_tokens=False)["input_ids"]
        room = limit - len(prompt) - len(change) - before
        if room < 1:
            raise UserError(
                f"ELM's diversions need {limit - room} tokens for prompt, change of subject and persona, and the model's "
                f"context or `max_length` is {limit}: raise it, or shorten `objective.concept`."
            )
        found.append(_Opening(prompt, change, min(most, room)))
    return found


def _as_roomy(openings: Sequence[_Opening]) -> list[list[int]]:
    """Group openings with equally many tokens to write, `ROWS_AT_ONCE` at most: no row may outgrow the context."""
    groups: list[list[int]] = []
    for i in sorted(range(len(openings)), key=lambda i: openings[i].room):
        if groups and len(groups[-1]) < ROWS_AT_ONCE and openings[groups[-1][0]].room == openings[i].room:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@torch.no_grad()
def diversions(
    objective: ForgetObjective,
    tokenizer: Any,
    base: Any,
    rows: Sequence[Encoded],
    *,
    seed: int,
    max_length: int | None,
) -> list[Encoded]:
    """Write each row's diversion: prompt, change of subject, and the base's continuation under ELM's tilt; all but the
    prompt labelled.

    The next token is the likeliest by log p - guidance (log p_expert - log p_novice): three rows are written for one,
    which is what makes ELM slow before it trains.

    Raises:
        UserError: prompt, change of subject and persona leave no room in the context.
    """
    writing = objective.needs.writing
    assert writing is not None
    views = list(persona_views(objective, tokenizer).values())
    limit = max_length or base.config.get_text_config().max_position_embeddings
    longest = max(len(view.prefix) for view in views)
    openings = _openings(rows, tokenizer, most=writing.new_tokens, limit=limit, before=longest, seed=seed)
    groups = _as_roomy(openings)
    stop, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    collate = Collator(pad, side="left")
    tilt = LogitsProcessorList([_Tilt(writing.guidance, writing.temperature)])
    written: dict[int, list[int]] = {}
    # a model's own penalties are no part of the tilt
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        for group in progress(groups, total=len(groups), label="diversions"):
            plain = [openings[i].prompt + openings[i].change for i in group]
            inputs = plain + [view.extend(Encoded(ids, ids, 0))["input_ids"] for view in views for ids in plain]
            batch = collate([{"input_ids": ids} for ids in inputs])
            with contiguous_head(base):
                said = base.generate(
                    **{name: value.to(base.device) for name, value in batch.items()},
                    logits_processor=tilt,
                    do_sample=False,
                    max_new_tokens=openings[group[0]].room,
                    eos_token_id=stop,
                    pad_token_id=pad,
                )
            width = batch["input_ids"].shape[1]
            for i, start, new in zip(group, plain, said[: len(group), width:].tolist(), strict=True):
                written[i] = start + (new[: new.index(stop) + 1] if stop in new else new)
    finally:
        base.generation_config = own
    return [
        Encoded(written[i], [-100] * len(opening.prompt) + written[i][len(opening.prompt) :], len(opening.prompt))
        for i, opening in enumerate(openings)
    ]
