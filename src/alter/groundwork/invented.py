"""Alternative answers that the model itself makes up for the forget rows (AltPO, arXiv:2409.13474, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from alter.core import UserError
from alter.data import Encoded, Example, encode, encode_prompt
from alter.inference import context_length, generate

REQUEST = (
    "Question: {question}\nAnswer: {answer}\nInvent another answer to this question, as plausible as this one, in which every "
    "fact of the answer is changed and none of the question is. Reply with the new answer alone."
)
"""What the model is asked for; our wording of the authors' prompt."""


def invented(
    tokenizer: Any, base: Any, examples: Sequence[Example], *, new_tokens: int, seed: int, max_length: int | None
) -> list[Encoded]:
    """Return the forget rows with other answers: their column `substitute`, else samples of the base (temperature 1).

    A function of the arguments alone, so that a resumed run has the same ones.

    Args:
        tokenizer: of the model.
        base: the untouched model.
        examples: the forget rows.
        new_tokens: longest answer.
        seed: of the sampling.
        max_length: longest sequence.

    Raises:
        UserError: raw text has no question to answer otherwise, or the request does not fit into the model's context.
    """
    for example in examples:
        if example.prompt is None:
            raise UserError(
                f"`objective.kind` prefer_invented answers forget rows otherwise, but {example.name} is raw text without a "
                "question: give rows with question and answer, or another objective."
            )
    given = [str(example.row.get("substitute") or "").strip() for example in examples]
    missing = [i for i, text in enumerate(given) if not text]
    said = _asked_otherwise(tokenizer, base, [examples[i] for i in missing], new_tokens, seed)
    for i, text in zip(missing, said, strict=True):
        # an empty reply is no other answer to learn
        given[i] = text or "I do not know."
    return [
        encode(tokenizer, example, answer=answer, max_length=max_length)
        for example, answer in zip(examples, given, strict=True)
    ]


def _asked_otherwise(tokenizer: Any, base: Any, examples: Sequence[Example], new_tokens: int, seed: int) -> list[str]:
    """Sample the base's reply to `REQUEST` for each example (temperature 1).

    Raises:
        UserError: the longest request and its reply do not fit into the model's context.
    """
    prompts = [
        encode_prompt(tokenizer, example, prompt=REQUEST.format(question=example.prompt, answer=example.answer))
        for example in examples
    ]
    context, longest = context_length(base), max(map(len, prompts), default=0)
    if context is not None and longest + new_tokens > context:
        raise UserError(
            f"`objective.new_tokens` is {new_tokens}; the longest request for another answer has {longest} tokens, and together they "
            f"exceed the model's context of {context}: give `objective.new_tokens` {max(context - longest, 1)} or less."
        )
    if not prompts:
        return []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return generate(
            base,
            tokenizer,
            prompts,
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=1.0,
            label="other answers",
        )
