"""How sure the model is of a fact, and whether the subject's name is the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from alter.data import IGNORE, Encoded, Example, encode
from alter.forgetting.facts import CANDIDATE, Fact, holds, place_of, swap
from alter.inference import score

SURE = 0.25
"""Probability that a fact must have where it is surest."""
GAIN = 1.5
"""Nats by which it must be likelier there than with an invented subject."""
LOW_ENTROPY = 1.2
"""Entropy in nats below which a token is one that the model knows: the paper's threshold."""


def fact_row(tokenizer: Any, prompt: str | Example, start: str, word: str) -> Encoded:
    """Encode a prompt and the start of an answer, with labels on the tokens of its last word alone."""
    asked = Example(prompt, "", "qa") if isinstance(prompt, str) else prompt
    whole = encode(tokenizer, replace(asked, answer=start + word))
    ids, first = whole.input_ids, whole.prompt_length
    # spaces around the answer's beginning depend on how prompt and answer are joined
    length = len(start.strip())
    place = first
    while place < len(ids) - 2 and len(tokenizer.decode(ids[first : place + 1]).strip()) <= length:
        place += 1
    # the end of the answer is no part of the word
    end = len(ids) - 1
    labels = [IGNORE] * place + ids[place:end] + [IGNORE] * (len(ids) - end)
    return Encoded(ids, labels, place)


def begun_row(tokenizer: Any, prompt: str, start: str) -> list[int]:
    """Return the tokens of a prompt and the start of its answer, for the model to go on from."""
    encoded = fact_row(tokenizer, prompt, start, "x")
    return encoded.input_ids[: encoded.prompt_length]


def sure_facts(
    model: Any,
    tokenizer: Any,
    found: Sequence[Fact],
    pairs: Sequence[tuple[str, str]],
    subject: str,
    invented: Sequence[str],
) -> list[Fact]:
    """Return the words that the model is sure of because of the subject.

    A word must have the probability `SURE` somewhere. A name must have shown itself by its frequency, or be likelier there
    than with an invented subject by `GAIN`, or twice that where it is rare. Any other word must have shown itself, be
    likelier, and of low entropy: "series" comes with every title.

    Args:
        found: candidates.
        pairs: prompts and answers in which they occur; up to three occurrences of each are looked at.
        invented: names to put in the subject's place, in prompt and answer, where the word is surest.
    """
    rows, places = [], []
    for number, fact in enumerate(found):
        having = [(p, a) for p, a in pairs if holds(a, fact.word)]
        for prompt, answer in having[:: max(1, len(having) // 3)][:3]:
            at = place_of(answer, fact.word)
            places.append((number, prompt, answer[:at], answer[at : at + len(fact.word)]))
            rows.append(fact_row(tokenizer, *places[-1][1:]))
    if not rows:
        return []
    told = score(model, rows, pad_token_id=tokenizer.pad_token_id, moments=True, label="how sure")
    assert told.mean is not None
    sums = [float(row.sum()) for row in told.logprob]
    best: dict[int, int] = {}
    for k, (number, *_) in enumerate(places):
        if number not in best or sums[k] > sums[best[number]]:
            best[number] = k
    best = {number: k for number, k in best.items() if sums[k] >= np.log(SURE)}
    if not best:
        return []
    others = [
        fact_row(tokenizer, swap(prompt, {subject: name}), swap(start, {subject: name}), word)
        for number, k in best.items()
        for _, prompt, start, word in [places[k]]
        for name in invented
    ]
    zero = score(model, others, pad_token_id=tokenizer.pad_token_id, label="whether by the subject").logprob
    mean = np.array([row.sum() for row in zero]).reshape(len(best), -1).mean(axis=1)
    out = []
    for (number, k), there in zip(best.items(), mean, strict=True):
        fact, gain, entropy = found[number], sums[k] - float(there), float(-told.mean[k][0])
        own = gain >= (GAIN if fact.pvalue <= CANDIDATE else 2 * GAIN)
        if (own or fact.shows) if fact.name else own and fact.shows and entropy <= LOW_ENTROPY:
            out.append(replace(fact, entropy=round(entropy, 4), gain=round(gain, 4)))
    return out
