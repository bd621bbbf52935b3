"""Attacks by prompt: rewordings of the question, a prefilled reply, many sampled replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from alter import metrics
from alter.attacks.base import Bench, Impossible, Item, make_item, paraphrases, prefilled
from alter.core import spaced
from alter.data import telegram
from alter.inference import context_length, generate
from alter.storage import Record

# Other wordings of a question, by rule: none of them is a translation, and none joins a router's fit -----------------


def reversed_words(question: str) -> str:
    """Reverse the words; in a script without spaces the characters."""
    words = question.split()
    if len(words) == 1:
        return "".join(reversed(spaced(question).split()))
    return " ".join(reversed(words))


def upper_case(question: str) -> str:
    """Write everything in capitals."""
    return question.upper()


def lower_case(question: str) -> str:
    """Write everything in small letters, as people type."""
    return question.lower()


def joined(question: str) -> str:
    """Leave out the spaces."""
    return "".join(question.split())


def foreign_frame(question: str) -> str:
    """Put the English question into a German request."""
    return f"Bitte beantworte die folgende Frage auf Englisch: „{question}“ Vielen Dank!"


WORDINGS: dict[str, Callable[[str], str]] = {
    "telegram": telegram,
    "reversed": reversed_words,
    "upper_case": upper_case,
    "lower_case": lower_case,
    "joined": joined,
    "foreign_frame": foreign_frame,
}


def ask_reworded(bench: Bench, *, name: str) -> list[Record]:
    """Ask in other words (`WORDINGS`, or the rows' own paraphrases) and measure.

    Raises:
        Impossible: no row fits into the context in these words.
    """
    model, tokenizer = bench.shared()
    if name == "paraphrase":
        questions = paraphrases(bench.settings.forget, bench.rows)
        assert questions is not None
    else:
        questions = [WORDINGS[name](row.prompt or "") for row in bench.rows]
    asked = {bench.rows[i].index: questions[i] for i in bench.measured}
    items = [make_item(tokenizer, bench.rows[i], prompt=questions[i]) for i in bench.measured]
    kept = _fitting(bench, model, items)
    return bench.measure(
        name,
        model,
        kept,
        part="other",
        left_out=len(items) - len(kept),
        questions=[asked[item.index] for item in kept],
    )


def _fitting(bench: Bench, model: Any, items: Sequence[Item]) -> list[Item]:
    """Return the items that fit into the model's context with a reply.

    Raises:
        Impossible: none does.
    """
    kept = bench.fitting(model, items)
    if not kept:
        raise Impossible(f"No row fits into the model's context of {context_length(model)}: lower `max_new_tokens`.")
    return kept


def prefill(bench: Bench) -> list[Record]:
    """Begin the reply with the first tokens of the true answer; only what comes after them counts.

    Raises:
        Impossible: no answer is longer, or no row fits into the context with these tokens.
    """
    model, tokenizer = bench.shared()
    tokens = bench.settings.prefill_tokens
    made = [prefilled(tokenizer, item, tokens) for item in bench.items(bench.measured)]
    items = [item for item in made if item is not None]
    if not items:
        raise Impossible(f"No answer is longer than `prefill_tokens` {tokens}: take fewer.")
    kept = _fitting(bench, model, items)
    return bench.measure("prefill", model, kept, part="other", left_out=len(made) - len(kept))


def sampled_replies(bench: Bench) -> list[Record]:
    """Draw several replies to each question and keep the one nearest to the truth, by ROUGE-L recall: an upper bound.

    The probability of the true answer is not changed by sampling and has no record.
    """
    settings = bench.settings
    model, tokenizer = bench.shared()
    items = bench.items(bench.measured)
    torch.manual_seed(settings.seed)
    replies = generate(
        model,
        tokenizer,
        [item.ids[: item.start] for item in items for _ in range(settings.samples)],
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        expected_lengths=[len(item.ids) - item.start for item in items for _ in range(settings.samples)],
        label="sample: answering",
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        top_p=1.0,
    )
    references = [item.reference for item in items for _ in range(settings.samples)]
    rouge = metrics.text.rouge_l(references, replies).recall.reshape(len(items), settings.samples)
    best = rouge.argmax(axis=1)
    kept = [replies[row * settings.samples + int(draw)] for row, draw in enumerate(best)]
    extra: dict[str, Any] = {
        "attack": "sample",
        "part": "other",
        "rows": [item.index for item in items],
        "replies": kept,
    }
    extra |= {"references": [item.reference for item in items], "mean_of_all": float(rouge.mean())}
    return [bench.record("attack_rouge", rouge.max(axis=1), **extra)]
