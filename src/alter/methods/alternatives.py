"""The forget rows once more, as an objective asks for them: refused, with random labels, led elsewhere, substituted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from alter.core.console import progress
from alter.core.errors import UserError
from alter.data.encoding import Encoded, encode
from alter.data.examples import Example
from alter.data.sources import refusals
from alter.methods.frozen import View
from alter.methods.invented import invented
from alter.methods.objectives import Forget, Persona, PreferInvented

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
"""How a diversion begins; our wording of ELM's templates."""

ROWS_AT_ONCE = 32
"""Diversions that are written side by side."""

PROMPT_TOKENS = 60
"""Longest prompt that a diversion starts from; raw text has no prompt, and lends its first half up to this length."""


def alternatives(
    objective: Forget,
    tokenizer: Any,
    base: Any,
    examples: Sequence[Example],
    rows: Sequence[Encoded],
    *,
    seed: int,
    max_length: int | None,
) -> list[Encoded]:
    """One alternative for each forget row; a function of the arguments alone, so that a resumed run has the same ones.

    Args:
        objective: says which kind it needs; none gives an empty list.
        tokenizer: of the model.
        base: the untouched model, which writes diversions.
        examples: the forget rows.
        rows: the same, encoded.
        seed: of what is drawn.
        max_length: longest sequence.

    Raises:
        UserError: raw text is to be refused, which has no question, or a row has no substitute.
    """
    kind = objective.needs.alternative
    generator = np.random.default_rng(seed)
    if kind == "refusal":
        if any(example.kind == "text" for example in examples):
            raise UserError(
                f"objective.kind {objective.kind} answers forget rows with a refusal, but they are raw text without a "
                "question: give rows with question and answer, or another objective."
            )
        lines = refusals()
        drawn = generator.integers(len(lines), size=len(examples)).tolist()
        return [
            encode(tokenizer, example, answer=lines[i], max_length=max_length)
            for example, i in zip(examples, drawn, strict=True)
        ]
    if kind == "random_labels":
        kept = {-100, *tokenizer.all_special_ids}
        vocabulary = base.config.get_text_config().vocab_size
        return [
            replace(
                row,
                labels=[y if y in kept else int(generator.integers(vocabulary)) for y in row.labels],
            )
            for row in rows
        ]
    if kind == "substitute":
        without = [example.index for example in examples if not str(example.row.get("substitute") or "").strip()]
        if without or any(example.kind == "text" for example in examples):
            where = f"row {without[0]} has none" if without else "raw text has no question to answer otherwise"
            raise UserError(
                f"objective.kind {objective.kind} learns each forget row's column 'substitute', and {where}: give rows as "
                "`alter forget` writes them (question, answer, substitute), or another objective."
            )
        return [
            encode(tokenizer, example, answer=example.row["substitute"], max_length=max_length) for example in examples
        ]
    if kind == "invented":
        assert isinstance(objective, PreferInvented)
        return invented(tokenizer, base, examples, new_tokens=objective.new_tokens, seed=seed, max_length=max_length)
    if kind == "diversion":
        assert isinstance(objective, Persona)
        return diversions(objective, tokenizer, base, rows, seed=seed, max_length=max_length)
    return []


def persona_views(
    objective: Forget, tokenizer: Any, rows: Sequence[Encoded] = (), limit: int | None = None
) -> dict[str, View]:
    """ELM's two further passes: the same rows after the words of an expert and of a novice.

    Raises:
        UserError: the longest of `rows` does not fit into `limit` tokens behind them.
    """
    assert isinstance(objective, Persona)
    views = {
        name: View(
            tuple(tokenizer(text.format(concept=objective.concept), add_special_tokens=False)["input_ids"]),
            tokenizer.bos_token_id,
        )
        for name, text in (("expert", EXPERT), ("novice", NOVICE))
    }
    words = max(len(view.prefix) for view in views.values())
    longest = max((len(row.input_ids) for row in rows), default=0)
    if limit is not None and longest + words > limit:
        raise UserError(
            f"ELM puts {words} tokens of a persona before each row, and the longest row has {longest} of the model's "
            f"{limit}: give max_length of at most {limit - words}, or shorten objective.concept."
        )
    return views


class _Tilt(LogitsProcessor):
    """What the next token is chosen by, from the logits [3 R, V] of R rows plain, as an expert and as a novice."""

    def __init__(self, guidance: float, temperature: float) -> None:
        self.guidance, self.temperature = guidance, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logp = torch.log_softmax(scores.float() / self.temperature, dim=-1)
        plain, expert, novice = logp.chunk(3)
        # the three go on with the same token
        return (plain - self.guidance * (expert - novice)).repeat(3, 1)


@torch.no_grad()
def diversions(
    objective: Persona,
    tokenizer: Any,
    base: Any,
    rows: Sequence[Encoded],
    *,
    seed: int,
    max_length: int | None,
) -> list[Encoded]:
    """Each row's prompt, a change of subject, and what the base goes on with under ELM's tilt; all but the prompt labelled.

    The next token is the likeliest by log p - guidance (log p_expert - log p_novice): three rows are written for one,
    which is what makes ELM slow before it trains.

    Raises:
        UserError: prompt, change of subject and persona leave no room in the context.
    """
    generator = np.random.default_rng(seed)
    views = list(persona_views(objective, tokenizer).values())
    limit = max_length or base.config.get_text_config().max_position_embeddings
    longest = max(len(view.prefix) for view in views)
    starts, rooms = [], []
    for row in rows:
        prompt = row.input_ids[: row.prompt_length]
        if row.prompt_length <= 1:
            prompt = row.input_ids[: max(1, len(row.input_ids) // 2)]
        prompt = prompt[:PROMPT_TOKENS]
        text = " " + CHANGES_OF_SUBJECT[int(generator.integers(len(CHANGES_OF_SUBJECT)))]
        change = tokenizer(text, add_special_tokens=False)["input_ids"]
        room = limit - len(prompt) - len(change) - longest
        if room < 1:
            raise UserError(
                f"ELM's diversions need {limit - room} tokens for prompt, change of subject and persona, and the model's "
                f"context or max_length is {limit}: raise it, or shorten objective.concept."
            )
        starts.append((prompt, change))
        rooms.append(min(objective.new_tokens, room))
    # rows with as much room side by side: none may grow beyond the context
    order = sorted(range(len(rows)), key=lambda i: rooms[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and len(groups[-1]) < ROWS_AT_ONCE and rooms[groups[-1][0]] == rooms[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    stop, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    tilt = LogitsProcessorList([_Tilt(objective.guidance, objective.temperature)])
    written: dict[int, list[int]] = {}
    # a model's own penalties are no part of the tilt
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        for group in progress(groups, total=len(groups), label="diversions"):
            plain = [[*starts[i][0], *starts[i][1]] for i in group]
            inputs = plain + [view.extend(Encoded(ids, ids, 0))["input_ids"] for view in views for ids in plain]
            width = max(map(len, inputs))
            ids = torch.tensor([[pad] * (width - len(row)) + row for row in inputs], device=base.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in inputs], device=base.device)
            said = base.generate(
                input_ids=ids,
                attention_mask=mask,
                logits_processor=tilt,
                do_sample=False,
                max_new_tokens=rooms[group[0]],
                eos_token_id=stop,
                pad_token_id=pad,
            )
            for i, start, new in zip(group, plain, said[: len(group), width:].tolist(), strict=True):
                written[i] = start + (new[: new.index(stop) + 1] if stop in new else new)
    finally:
        base.generation_config = own
    return [
        Encoded(ids, [-100] * len(prompt) + ids[len(prompt) :], len(prompt))
        for ids, (prompt, _) in zip((written[i] for i in range(len(rows))), starts, strict=True)
    ]
