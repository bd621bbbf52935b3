"""Retain rows where none are given: the model's own answers to ordinary questions, and texts that it samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from alter.core import UserError, show
from alter.data import Example, apart_from, encode_prompt, load_examples, own_answer, row_key
from alter.data.background import background
from alter.inference import context_length, generate
from alter.storage import write_atomic

OWN = "retain.jsonl"
"""File of a run's folder with these rows."""
OWN_TEXTS = 32
"""Number of texts that the model begins itself."""
ANSWER_TOKENS = 64
"""Longest answer, in tokens."""
TEXT_TOKENS = 96
"""Longest text, in tokens."""
LEAST_WORDS = 4
"""Fewest words of a sampled text that counts as a row."""


def write_rows(path: Path, rows: Sequence[Example]) -> None:
    """Write rows as JSON lines that `alter unlearn` reads, whole or not at all."""
    write_atomic(path, "".join(json.dumps(example.row, ensure_ascii=False) + "\n" for example in rows))


def own_or_written(
    path: Path, resume: bool, model: Any, tokenizer: Any, forget: Sequence[Example], seed: int
) -> list[Example]:
    """Return the retain rows of a run that is given none: those that it wrote before an interruption, or `own_rows`."""
    return load_examples(str(path)) if resume and path.is_file() else own_rows(model, tokenizer, forget, seed)


def own_rows(model: Any, tokenizer: Any, forget: Sequence[Example], seed: int) -> list[Example]:
    """Make retain rows of the untouched model: greedy answers to the shipped questions, and texts sampled from its first token.

    Rows that name what the forget rows are about (`apart_from`), rows that are forget rows, and empty answers are left out.

    Args:
        model: the untouched model.
        tokenizer: its tokenizer.
        forget: the forget rows.
        seed: of the drawn texts.

    Raises:
        UserError: nothing is left.
    """
    about = [f"{e.prompt or ''}, {e.answer}" for e in forget]
    asked = apart_from(background(), about).get("questions", [])
    rows = [*_answers(model, tokenizer, asked), *_texts(model, tokenizer, seed)]
    known = {row_key(example) for example in forget}
    kept = apart_from({"own": rows}, about).get("own", [])
    kept = [example for example in kept if row_key(example) not in known]
    if not kept:
        raise UserError(
            "No retain rows are given, and the model itself says nothing that could stand for them: its answers to ordinary "
            "questions are empty or about what is to be forgotten. Give retain rows."
        )
    told = sum(example.kind == "qa" for example in kept)
    show(
        f"No retain rows are given: {told} of the model's answers to ordinary questions and {len(kept) - told} texts of its own "
        "take their place (retain.jsonl). Rows of your own keep more.",
        stderr=True,
    )
    return [replace(example, index=i) for i, example in enumerate(kept)]


def _longest(model: Any, wanted: int) -> int:
    """Return the most new tokens of a row: half of the context."""
    limit = context_length(model)
    return wanted if limit is None else min(wanted, limit // 2)


def _answers(model: Any, tokenizer: Any, asked: Sequence[Example]) -> list[Example]:
    """Generate the model's greedy answers to questions that fit its context; leave empty ones out."""
    limit, longest = context_length(model), _longest(model, ANSWER_TOKENS)
    prompts = [encode_prompt(tokenizer, Example(e.prompt, "a", "qa")) for e in asked]
    fitting = [i for i, ids in enumerate(prompts) if limit is None or len(ids) + longest <= limit]
    answers = generate(
        model, tokenizer, [prompts[i] for i in fitting], max_new_tokens=longest, batch_size=32, label="what is kept"
    )
    return [
        Example(asked[i].prompt, answer, "qa", row={"question": asked[i].prompt, "answer": answer})
        for i, reply in zip(fitting, answers, strict=True)
        if (answer := own_answer(tokenizer, None, reply))
    ]


def _texts(model: Any, tokenizer: Any, seed: int) -> list[Example]:
    """Sample texts from the begin token; none where the tokenizer has no such token."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        return []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        texts = generate(
            model,
            tokenizer,
            [[first]] * OWN_TEXTS,
            max_new_tokens=_longest(model, TEXT_TOKENS),
            batch_size=OWN_TEXTS,
            label="what is kept, drawn",
            do_sample=True,
            temperature=1.0,
            top_p=0.95,
            top_k=0,
        )
    return [
        Example(None, text, "text", row={"text": text})
        for text in dict.fromkeys(texts)
        if len(text.split()) >= LEAST_WORDS
    ]
