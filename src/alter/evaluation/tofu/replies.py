"""Answer TOFU's questions: prompts, replies and their ROUGE."""

from __future__ import annotations

from typing import Any

from alter import metrics
from alter.data import Example, encode, encode_prompt, examples
from alter.evaluation.tofu.results import TofuResult
from alter.inference import check_prompts, generate

MAX_NEW_TOKENS = 200
"""Longest reply."""


def prompts_of(model: Any, tokenizer: Any, rows: dict[str, list[dict[str, Any]]], compat: bool) -> list[list[int]]:
    """Encode every question; refuse one that leaves no room for a reply in the model's context."""
    prompts = [encode_prompt(tokenizer, example, compat=compat) for own in rows.values() for example in examples(own)]
    names = [f"The question of row {i} of the {key} set" for key, own in rows.items() for i in range(len(own))]
    check_prompts(model, prompts, MAX_NEW_TOKENS, names)
    return prompts


def answer_questions(
    result: TofuResult,
    model: Any,
    tokenizer: Any,
    rows: dict[str, list[dict[str, Any]]],
    prompts: list[list[int]],
    begun: list[list[int]] | None,
    batch_size: int,
    progress: bool,
) -> None:
    """Answer every question once; fill in replies and ROUGE."""
    compat = result.mode == "compat"
    found = {key: examples(own_rows) for key, own_rows in rows.items()}
    replies = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=batch_size,
        expected_lengths=[len(example.answer) for part in found.values() for example in part],
        begun=begun,
        compat=compat,
        progress=progress,
        label="TOFU: answering questions",
    )
    start = 0
    for key, part in result.sets.items():
        part.generations = replies[start : start + part.n]
        start += part.n
        part.questions = [example.prompt or "" for example in found[key]]
        part.references = [
            _expected(tokenizer, example) if compat else example.answer.strip() for example in found[key]
        ]
        part.rouge = metrics.text.rouge_l(part.references, part.generations).recall
        empty = sum(not text for text in part.generations)
        if empty:
            result.notes.append(
                f"{empty} of {part.n} replies on the {key} set are empty: they count as ROUGE 0 and repetition 0."
            )


def _expected(tokenizer: Any, example: Example) -> str:
    """Return OpenUnlearning's reference text: the decoded conversation with every occurrence of the prompt removed."""
    ids = encode(tokenizer, example, compat=True).input_ids
    whole, prompt = (
        tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=True)
        for part in (ids, encode_prompt(tokenizer, example, compat=True))
    )
    answer: str = whole.replace(prompt, "").strip()
    return answer
