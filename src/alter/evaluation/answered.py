"""Measure what a model knows of rows: the likelihood of their answers, and its replies to their questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alter import metrics
from alter.core import Array
from alter.data import Encoded, Example, encode, encode_all, reworded, rewording, row_key
from alter.evaluation.leakage import Asked, ask
from alter.evaluation.measures import Measures
from alter.evaluation.verdict import WORDED
from alter.inference import begun_replies, context_length, generate, score


@dataclass(frozen=True)
class Answered:
    """Measurements of some rows: the figures, and the answered rows with their replies.

    Attributes:
        measures: the figures.
        exact: share of the answer's tokens that are the likeliest, of each scored row, [n].
        rows: the scored rows, [n].
        examples: the answered rows, [m]; `probability` is theirs.
        questions, truths, replies: their texts, [m].
    """

    measures: Measures
    exact: Array
    rows: list[Example]
    examples: list[Example]
    probability: Array
    questions: list[str]
    truths: list[str]
    replies: list[str]

    def summary(self) -> dict[str, Any]:
        """Return the figures without any text: those of the measures, and the exact memorisation."""
        known = self.exact[~np.isnan(self.exact)]
        return {**self.measures.summary(), "exact_memorization": float(known.mean()) if known.size else None}


def answer_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Example],
    *,
    answers: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 200,
    batch_tokens: int | None = None,
    batch_size: int = 64,
    label: str = "rows",
    wordings: Sequence[str] = (),
) -> Answered:
    """Measure what a model knows of rows: one forward for each, and greedy replies to some of them.

    Args:
        model, tokenizer: as in `alter.inference.scoring.score`.
        rows: one or more; one that is given twice is measured once, so that `n` counts what is known and not lines of a file.
            Those longer than the model's context are scored in overlapping windows, and answered or continued where prompt and
            reply fit into it.
        answers: number of rows that are answered, drawn by `seed`; None: all, 0: none.
        max_new_tokens: longest reply; no reply is longer than twice the longest answer, which is said.
        batch_tokens, batch_size: of scoring and of generation.
        label: of the progress bar.
        wordings: see `in_other_words`; by default the questions are asked as given alone.

    Raises:
        UserError: a row without anything to score, or what scoring and generating raise.
    """
    once: dict[str, Example] = {}
    for row in rows:
        once.setdefault(row_key(row), row)
    rows = list(once.values())
    limit = context_length(model)
    windows, owner = encode_all(tokenizer, rows, max_length=limit)
    scores = score(
        model, windows, pad_token_id=tokenizer.pad_token_id, batch_tokens=batch_tokens, label=f"{label}: scoring"
    )
    # each labelled token is labelled in one window
    parts: list[list[int]] = [[] for _ in rows]
    for k, number in enumerate(owner):
        parts[number].append(k)
    logprob = [np.concatenate([scores.logprob[k] for k in own]) for own in parts]
    correct = [np.concatenate([scores.correct[k] for k in own]) for own in parts]
    probability = metrics.likelihood.probability(metrics.likelihood.average_loss(logprob))
    chosen = np.random.default_rng(seed).permutation(len(rows))[: len(rows) if answers is None else answers]
    starts = {i: windows[parts[i][0]].input_ids for i in sorted(chosen.tolist())}
    asked, tokens = _asked(tokenizer, rows, starts, max_new_tokens, limit)
    questions, truths = [each.question for each in asked.values()], [each.truth for each in asked.values()]
    whole = {i: parts[i][0] if len(parts[i]) == 1 else None for i in asked}
    told = [Encoded([], [], 0) if k is None else windows[k] for k in whole.values()]
    right = [() if k is None else scores.correct[k] for k in whole.values()]
    begun = begun_replies(model, told, right, [each.prompt for each in asked.values()])
    replies = _replies(model, tokenizer, list(asked.values()), begun, tokens, batch_size, label) if asked else []
    return Answered(
        Measures.of(
            probability,
            questions,
            truths,
            replies,
            in_other_words(model, tokenizer, rows, wordings, batch_tokens=batch_tokens, label=label),
        ),
        # the last token of a raw text is text, where an answer's is its end, which does not count
        metrics.memorisation.exact_memorization(
            [np.append(own, True) if row.kind == "text" else own for row, own in zip(rows, correct, strict=True)]
        ),
        rows,
        [rows[i] for i in asked],
        probability[list(asked)],
        questions,
        truths,
        replies,
    )


def in_other_words(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Example],
    wordings: Sequence[str],
    *,
    batch_tokens: int | None = None,
    label: str = "rows",
) -> dict[str, Array]:
    """Return the length-normalised probability of answers to questions put in other words, [k] for each wording.

    Args:
        model, tokenizer: as in `alter.inference.scoring.score`.
        rows: those with a question are asked again, `WORDED` at most, spread from the first to the last; what is then longer
            than the model's context is left out.
        wordings: names of `alter.data.rewording.MEASURED`; one in which no row can be asked is left out.
        batch_tokens, label: of scoring and of the progress bar.
    """
    limit = context_length(model)
    asked = [row for row in rows if row.prompt is not None and row.kind != "completion"]
    places = np.linspace(0, len(asked) - 1, min(WORDED, len(asked))).astype(int).tolist()
    encoded: list[Encoded] = []
    names: list[str] = []
    for name in wordings if asked else ():
        for i in places:
            other = reworded(asked[i], rewording.MEASURED[name](asked[i].prompt or "", i, ""))
            row = None if other is None else encode(tokenizer, other)
            if row is not None and (limit is None or len(row.input_ids) <= limit):
                encoded.append(row)
                names.append(name)
    if not encoded:
        return {}
    scores = score(
        model,
        encoded,
        pad_token_id=tokenizer.pad_token_id,
        batch_tokens=batch_tokens,
        label=f"{label}: in other words",
    )
    probability = metrics.likelihood.probability(metrics.likelihood.average_loss(scores.logprob))
    return {name: probability[[own == name for own in names]] for name in dict.fromkeys(names)}


def _asked(
    tokenizer: Any, rows: Sequence[Example], starts: Mapping[int, list[int]], longest: int, limit: int | None
) -> tuple[dict[int, Asked], int]:
    """Return what is asked of rows, by their numbers, and the tokens of a reply: rows that fit with it into the context."""
    found = {i: one for i, ids in starts.items() if (one := ask(tokenizer, rows[i], ids, longest)) is not None}
    tokens = min(longest, 2 * max((each.length for each in found.values()), default=1))
    return {i: each for i, each in found.items() if limit is None or len(each.prompt) + tokens <= limit}, tokens


def _replies(
    model: Any,
    tokenizer: Any,
    asked: Sequence[Asked],
    begun: list[list[int]] | None,
    tokens: int,
    batch_size: int,
    label: str,
) -> list[str]:
    """Answer questions greedily, in at most so many tokens each."""
    return generate(
        model,
        tokenizer,
        [each.prompt for each in asked],
        max_new_tokens=tokens,
        batch_size=batch_size,
        expected_lengths=[len(each.truth) for each in asked],
        begun=begun,
        label=f"{label}: answering",
    )
