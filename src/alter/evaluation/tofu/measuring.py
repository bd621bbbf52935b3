"""Measure a model on TOFU: every sequence is scored once, every question answered once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from alter import metrics
from alter.core import Array, UserError, nearest
from alter.data import Encoded, encode, ensure_pad_token, examples
from alter.evaluation.base import quick_look
from alter.evaluation.tofu.reference import as_reference, lacking
from alter.evaluation.tofu.replies import answer_questions, prompts_of
from alter.evaluation.tofu.results import Mode, TofuReference, TofuResult, TofuSet, check_reference
from alter.evaluation.tofu.sets import PARAPHRASED, SETS, SPLITS, holdout_rows, rows_fingerprint, set_authors, set_rows
from alter.inference import (
    Scores,
    begun_replies,
    check_rows,
    gradient_norms,
    score,
    score_beside_base,
)
from alter.storage import Record

WHICH = ("likelihood", "generation")
SCORING = "TOFU: scoring answers"
REWORDED = "paraphrased_question"
"""Column of TOFU's perturbed files with each question in other words."""


def tofu_metrics(
    model: Any,
    tokenizer: Any,
    split: str = "forget10",
    data: str = "builtin",
    mode: Mode = "strict",
    which: Iterable[str] = WHICH,
    *,
    sets: Iterable[str] = SETS,
    holdout: str | None = None,
    gradnorm: bool = False,
    limit: int | None = None,
    seed: int = 0,
    reference: TofuResult | TofuReference | Sequence[Record] | None = None,
    batch_tokens: int | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> TofuResult:
    """Measure a model in memory on TOFU, each sequence with one forward pass.

    Args:
        model, tokenizer: as in `alter.inference.scoring.score`. A tokenizer without a pad token pads with its end-of-sequence
            token: in strict mode padding is hidden by length, so the choice changes no number.
        split: forget01, forget05 or forget10.
        data: "builtin", a folder with TOFU's files, or a hub id.
        mode: "strict" or "compat" (see `alter.metrics`).
        which: "likelihood" (probabilities, truth ratios, memorisation, attacks), "generation" (ROUGE, diversity).
        sets: of forget, retain, real_authors, world_facts.
        holdout: rows never trained on, for the membership attacks: what `alter.data.sources.read_rows` reads. None: the split
            holdoutNN of `data`; where there is none, a note says so and the attacks are left out.
        gradnorm: also attack by the gradient's norm, which costs a backward per forget and holdout row.
        limit: only this many rows of each set, drawn by `seed`; None: all, as TOFU is reported.
        reference: the retrained model's result or records, of the same split, mode and rows; gives forget quality.
        batch_tokens, batch_size: padded tokens in a scoring batch (None: see `score`), prompts in a generation batch.

    Raises:
        UserError: no such split, set or kind of metric, rows without the columns that are needed or too long for the
            model's context, a reference of something else; all of it before the first forward. Or what `score` raises.
    """
    asked = _asked(
        model, tokenizer, split, data, mode, tuple(which), tuple(sets), holdout, limit, seed, as_reference(reference)
    )
    scores = None
    if asked.answers is not None:
        scores = score(
            model,
            asked.answers.encoded,
            pad_token_id=tokenizer.pad_token_id,
            batch_tokens=batch_tokens,
            moments="holdout" in asked.answers.where,
            compat=mode == "compat",
            progress=progress,
            label=SCORING,
        )
    return _measured(asked.result, asked, model, tokenizer, scores, gradnorm, batch_size, progress)


def tofu_metrics_beside_base(
    model: Any,
    tokenizer: Any,
    split: str = "forget10",
    data: str = "builtin",
    *,
    sets: Iterable[str] = SETS,
    limit: int | None = None,
    seed: int = 0,
    reference: TofuResult | TofuReference | Sequence[Record] | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> tuple[TofuResult, TofuResult]:
    """Measure the untouched model inside an adapted one and the adapted one, as `tofu_metrics` does one after the other.

    The untouched model's pass over an answer tells a routed adapter's routes, too, so that the two take less time than alone.

    Args:
        model: a PeftModel.
        tokenizer, split, data, sets, limit, seed, reference, batch_size, progress: as in `tofu_metrics`.

    Raises:
        UserError: as `tofu_metrics`.
    """
    asked = _asked(
        model, tokenizer, split, data, "strict", WHICH, tuple(sets), None, limit, seed, as_reference(reference)
    )
    assert asked.answers is not None
    before, after = score_beside_base(
        model,
        asked.answers.encoded,
        pad_token_id=tokenizer.pad_token_id,
        moments="holdout" in asked.answers.where,
        progress=progress,
        label=SCORING,
    )
    with model.disable_adapter():
        base = _measured(deepcopy(asked.result), asked, model, tokenizer, before, False, batch_size, progress)
    return base, _measured(asked.result, asked, model, tokenizer, after, False, batch_size, progress)


@dataclass(frozen=True)
class _Asked:
    """What a model is asked: rows by set, answers to score, prompts to reply to, and the result that is to be filled in."""

    result: TofuResult
    rows: dict[str, list[dict[str, Any]]]
    answers: _Answers | None
    prompts: list[list[int]] | None
    limit: int | None
    seed: int
    holdout: str | None


def _asked(
    model: Any,
    tokenizer: Any,
    split: str,
    data: str,
    mode: Mode,
    which: Sequence[str],
    sets: Sequence[str],
    holdout: str | None,
    limit: int | None,
    seed: int,
    reference: TofuReference | None,
) -> _Asked:
    """Encode all that a model is to score and to answer, and refuse it where that cannot be done."""
    _check_choices(split, mode, which, sets, limit)
    result = TofuResult(split, data, mode, {}, reference=reference)
    rows = _rows(result, sets, limit, seed)
    forget = result.sets.get("forget")
    ensure_pad_token(tokenizer)
    answers = prompts = None
    if "likelihood" in which:
        unseen = None if forget is None else _unseen(result, forget, holdout, limit, seed)
        answers = _answers(tokenizer, rows, unseen, mode == "compat")
        check_rows(model, answers.encoded, answers.names)
    if "generation" in which:
        prompts = prompts_of(model, tokenizer, rows, mode == "compat")
    return _Asked(result, rows, answers, prompts, limit, seed, holdout)


def _measured(
    result: TofuResult,
    asked: _Asked,
    model: Any,
    tokenizer: Any,
    scores: Scores | None,
    gradnorm: bool,
    batch_size: int,
    progress: bool,
) -> TofuResult:
    """Fill in the result from the scores and from the model's replies."""
    begun = None
    if asked.answers is not None and scores is not None:
        _likelihood(result, model, tokenizer, asked.answers, scores, gradnorm, progress)
        if asked.prompts is not None and result.mode == "strict":
            begun = _begun(result, model, asked.answers, scores, asked.prompts)
        forget = result.sets.get("forget")
        if forget is not None:
            result.notes += lacking(result, forget, result.data, asked.limit, asked.seed, asked.holdout)
    if asked.prompts is not None:
        answer_questions(result, model, tokenizer, asked.rows, asked.prompts, begun, batch_size, progress)
    return result


def _rows(result: TofuResult, sets: Sequence[str], limit: int | None, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each set and note the sets in the result; refuse a reference measured on other rows."""
    rows = {key: set_rows(key, result.split, result.data, limit, seed) for key in sets}
    result.sets = {
        key: TofuSet(key, len(own), rows_fingerprint(own), authors=set_authors(key, own, result.data))
        for key, own in rows.items()
    }
    if limit is not None:
        result.notes.append(quick_look(limit))
    forget = result.sets.get("forget")
    if forget is not None and result.reference is not None:
        check_reference(result.reference, result.split, result.mode, forget)
    return rows


def _unseen(
    result: TofuResult, forget: TofuSet, holdout: str | None, limit: int | None, seed: int
) -> list[dict[str, Any]] | None:
    """Return the holdout rows, noted in the result, or None where there are none."""
    unseen, notes = holdout_rows(result.split, result.data, holdout, limit, seed)
    result.notes += notes
    if unseen is not None:
        forget.holdout = rows_fingerprint(unseen)
        if result.reference is not None:
            check_reference(result.reference, result.split, result.mode, forget)
    return unseen


def _check_choices(split: str, mode: str, which: Sequence[str], sets: Sequence[str], limit: int | None) -> None:
    """Refuse an unknown split, mode, kind of metric or set."""
    for value, choices in [(split, SPLITS), (mode, ("strict", "compat")), *((w, WHICH) for w in which)]:
        _choice(value, choices)
    for key in sets:
        _choice(key, SETS)
    if limit is not None and limit < 1:
        raise UserError(f"`limit` is {limit}; expected at least 1 row, or none for all rows.")


def _choice(value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{value!r} is not one of {', '.join(choices)}.{nearest(value, choices)}")


@dataclass(frozen=True)
class _Answers:
    """Every (question, answer) pair to score, what errors call each, and which stretch of them belongs to which set.

    In a set's stretch each row has its answer, its paraphrased answer (forget and retain), and its wrong answers; in the
    stretch `reworded` are the forget set's answers again, to the paraphrased questions, where all of its rows have one.
    """

    encoded: list[Encoded]
    names: list[str]
    where: dict[str, slice]


def _answers(
    tokenizer: Any, rows: dict[str, list[dict[str, Any]]], holdout: list[dict[str, Any]] | None, compat: bool
) -> _Answers:
    found = _Answers([], [], {})
    for key, own_rows in (rows | ({"holdout": holdout} if holdout is not None else {})).items():
        start = len(found.encoded)
        for example in examples(own_rows):
            texts = [example.answer]
            if key in PARAPHRASED:
                texts.append(example.row["paraphrased_answer"])
            if key != "holdout":
                texts += example.row["perturbed_answer"]
            found.encoded.extend(encode(tokenizer, example, answer=text, compat=compat) for text in texts)
            found.names.extend([f"Row {example.index} of the {key} set"] * len(texts))
        found.where[key] = slice(start, len(found.encoded))
    forget = examples(rows.get("forget", []))
    if forget and all(example.row.get(REWORDED) for example in forget):
        start = len(found.encoded)
        found.encoded.extend(encode(tokenizer, row, prompt=row.row[REWORDED], compat=compat) for row in forget)
        found.names.extend(f"Row {row.index} of the forget set, asked in other words," for row in forget)
        found.where["reworded"] = slice(start, len(found.encoded))
    return found


def _likelihood(
    result: TofuResult,
    model: Any,
    tokenizer: Any,
    answers: _Answers,
    scores: Scores,
    gradnorm: bool,
    progress: bool,
) -> None:
    """Fill in what follows from the token log-probabilities of every (question, answer) pair."""
    compat = result.mode == "compat"
    unseen = answers.where.get("holdout")
    for key, part in result.sets.items():
        where = answers.where[key]
        own = scores[where]
        width = len(own.logprob) // part.n
        loss = metrics.likelihood.average_loss(own.logprob).reshape(part.n, width)
        first_wrong = 2 if key in PARAPHRASED else 1
        part.set_likelihood(loss[:, 0], loss[:, first_wrong - 1], loss[:, first_wrong:], compat=compat)
        if key == "forget":
            if "reworded" in answers.where:
                part.reworded = metrics.likelihood.probability(
                    metrics.likelihood.average_loss(scores[answers.where["reworded"]].logprob)
                )
            part.exact_memorization = metrics.memorisation.exact_memorization(own.correct[::width])
            part.extraction_strength = metrics.memorisation.extraction_strength(own.correct[::width], compat=compat)
            if unseen is not None:
                true = slice(where.start, where.stop, width)
                part.attacks, part.holdout_attacks = (
                    _attacks(scores[rows], answers.encoded[rows], tokenizer, compat) for rows in (true, unseen)
                )
                if gradnorm:
                    part.attacks["mia_gradnorm"], part.holdout_attacks["mia_gradnorm"] = (
                        metrics.membership.mia_gradnorm(
                            gradient_norms(
                                model,
                                answers.encoded[rows],
                                pad_token_id=tokenizer.pad_token_id,
                                compat=compat,
                                progress=progress,
                                label=f"TOFU: gradients of the {name} set",
                            )
                        )
                        for name, rows in (("forget", true), ("holdout", unseen))
                    )


def _begun(
    result: TofuResult, model: Any, answers: _Answers, scores: Scores, prompts: list[list[int]]
) -> list[list[int]] | None:
    """Return how each reply begins, as the scores of the true answers tell; None where they do not."""
    places: list[int] = []
    for key, part in result.sets.items():
        where = answers.where[key]
        places += range(where.start, where.stop, (where.stop - where.start) // part.n)
    return begun_replies(model, [answers.encoded[i] for i in places], [scores.correct[i] for i in places], prompts)


def _attacks(scores: Scores, encoded: Sequence[Encoded], tokenizer: Any, compat: bool) -> dict[str, Array]:
    assert scores.mean is not None
    assert scores.var is not None
    labels = [[token for token in row.labels if token != -100] for row in encoded]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in labels]
    return {
        "mia_loss": metrics.membership.mia_loss(scores.logprob, compat=compat),
        "mia_zlib": metrics.membership.mia_zlib(scores.logprob, texts, compat=compat),
        "mia_min_k": metrics.membership.mia_min_k(scores.logprob, compat=compat),
        "mia_min_k_plus_plus": metrics.membership.mia_min_k_plus_plus(
            scores.logprob, scores.mean, scores.var, compat=compat
        ),
    }
