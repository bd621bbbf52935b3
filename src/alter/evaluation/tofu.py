"""TOFU (Maini et al. 2024, arXiv:2401.06121): which rows, which answers and which metrics make its table.

| set          | rows               | right answer for the truth ratio | probability                    |
|--------------|--------------------|----------------------------------|--------------------------------|
| forget       | forgetNN_perturbed | paraphrased                      | of the answer                  |
| retain       | retain_perturbed   | paraphrased                      | of the answer                  |
| real_authors | real_authors_pert. | plain                            | answer's share among 1 + 3     |
| world_facts  | world_facts_pert.  | plain                            | answer's share among 1 + 3     |

ROUGE-L recall is that of a greedy reply of at most 200 tokens; an empty reply is a reply: ROUGE 0, repetition 0, and a
note says how many there are. A reply that does not fit into the model's context is refused before anything is measured.

Membership attacks compare the forget set's answers with holdout rows, which no model has seen: TOFU's holdoutNN, or any
rows of your own. Five of the six come from the pass that scores the answers; `mia_gradnorm` costs a backward per row and
is made on request; `mia_reference` and PrivLeak need the retrained model. Model utility is the harmonic mean of the nine figures
of the last three sets; forget quality compares the truth ratios on the forget set with those of a model retrained
without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pydantic
import tyro

from alter import metrics
from alter.core.cache import cache_folder
from alter.core.errors import UserError, nearest
from alter.core.files import digest, file_digest, from_json
from alter.core.records import Record, read_records
from alter.data.encoding import Encoded, encode, encode_prompt, ensure_pad_token
from alter.data.examples import Example, examples
from alter.data.sources import read_rows, tofu_rows
from alter.evaluation.base import Evaluation, say
from alter.evaluation.leakage import Leak, leaked
from alter.models.generation import check_prompts, generate
from alter.models.loading import Subject
from alter.models.scoring import Scores, check_rows, gradient_norms, score

Array = npt.NDArray[np.float64]
Mode = Literal["strict", "compat"]
UTILITY_SETS = ("retain", "real_authors", "world_facts")
SETS = ("forget", *UTILITY_SETS)
PARAPHRASED = ("forget", "retain")
SPLITS = ("forget01", "forget05", "forget10")
WHICH = ("likelihood", "generation")
MAX_NEW_TOKENS = 200


@dataclass
class TofuSet:
    """Everything measured on one set, one entry per row; what was not measured is None.

    Attributes:
        fingerprint: hash of the rows; results can be compared item by item only if it is the same.
        loss: average loss of the answer, [n].
        right_loss: average loss of the answer that the truth ratio takes for right, [n].
        wrong_loss: average losses of the wrong answers, [n, 5] or [n, 3].
        prob: probability of the answer; for real authors and world facts its share among all candidates, [n].
        truth_ratio: raw ratio P(wrong) / P(right), [n].
        exact_memorization, extraction_strength: [n].
        references, generations: what should be said and what is said, after `questions`.
        rouge: ROUGE-L recall, [n].
        attacks: membership scores by the attack's name, [n]; `holdout_attacks` those of rows never trained on, [m],
            and `holdout` the hash of these rows.
    """

    name: str
    n: int
    fingerprint: str
    loss: Array | None = None
    right_loss: Array | None = None
    wrong_loss: Array | None = None
    prob: Array | None = None
    truth_ratio: Array | None = None
    exact_memorization: Array | None = None
    extraction_strength: Array | None = None
    questions: list[str] | None = None
    references: list[str] | None = None
    generations: list[str] | None = None
    rouge: Array | None = None
    attacks: dict[str, Array] = field(default_factory=dict)
    holdout_attacks: dict[str, Array] = field(default_factory=dict)
    holdout: str | None = None

    def set_likelihood(self, loss: Array, right_loss: Array, wrong_loss: Array, *, compat: bool) -> None:
        """Fill in the losses and what follows from them: probability and truth ratio."""
        self.loss, self.right_loss, self.wrong_loss = loss, right_loss, wrong_loss
        if self.name in PARAPHRASED:
            self.prob = metrics.probability(loss)
        else:
            self.prob = metrics.normalised_probability(loss, wrong_loss, compat=compat)
        self.truth_ratio = metrics.truth_ratio(right_loss, wrong_loss, compat=compat)


@dataclass(frozen=True)
class Reference:
    """What a retrained model contributes: raw truth ratios on the forget set, and where there are holdout rows (`holdout`
    is their hash) its min-k AUC, and its losses of the forget and of the holdout rows.
    """

    source: str
    split: str | None
    mode: str | None
    fingerprint: str | None
    truth_ratio: Array
    min_k_auc: float | None = None
    losses: tuple[Array, Array] | None = None
    holdout: str | None = None


@dataclass
class TofuResult:
    """Per-row results of one model on TOFU; `records(name)` makes the figures of the table out of them.

    `notes` says in full sentences what could not be computed, why, and which command helps.
    """

    split: str
    data: str
    mode: Mode
    sets: dict[str, TofuSet]
    reference: Reference | None = None
    notes: list[str] = field(default_factory=list)

    def as_reference(self, source: str = "the retrained model") -> Reference:
        """Return what other models are compared with, if this is the result of the retrained model.

        Raises:
            UserError: the truth ratios on the forget set were not measured.
        """
        forget = self.sets.get("forget")
        if forget is None or forget.truth_ratio is None:
            raise UserError(f"{source} has no truth ratios on the forget set: evaluate its likelihoods on that set.")
        losses = None
        if "mia_loss" in forget.attacks:
            losses = (forget.attacks["mia_loss"], forget.holdout_attacks["mia_loss"])
        min_k = _aucs(forget.attacks, forget.holdout_attacks).get("mia_min_k")
        return Reference(
            source, self.split, self.mode, forget.fingerprint, forget.truth_ratio, min_k, losses, forget.holdout
        )

    def records(self, name: str) -> list[Record]:
        """Return the figures of TOFU's table that these results allow, as records of the model `name`.

        `per_item` of a truth ratio is the raw ratio of each row: so a retrained model's file can be the reference.
        """
        out: list[Record] = []

        def add(metric: str, value: Any, n: int, items: Array | None = None, **extra: Any) -> None:
            direction = metrics.CATALOGUE[metric].higher_is_better
            base = {"benchmark": "tofu", "split": self.split, "data": self.data}
            per_item = None if items is None else [float(x) for x in items]
            out.append(Record(name, metric, float(value), n, self.mode, direction, per_item, base | extra))

        for key, part in self.sets.items():
            extra: dict[str, Any] = {"fingerprint": part.fingerprint}
            if part.prob is not None and part.truth_ratio is not None:
                add(f"{key}_probability", part.prob.mean(), part.n, part.prob, **extra)
                add(f"{key}_truth_ratio", self._ratio(part).mean(), part.n, part.truth_ratio, **extra)
            if part.rouge is not None:
                texts = {"questions": part.questions, "references": part.references, "generations": part.generations}
                empty = sum(not text for text in part.generations or [])
                add(f"{key}_rouge", part.rouge.mean(), part.n, part.rouge, **extra, **texts, empty=empty)
        forget = self.sets.get("forget")
        if forget is not None:
            extra = {"fingerprint": forget.fingerprint}
            if forget.exact_memorization is not None and forget.extraction_strength is not None:
                em = forget.exact_memorization
                counted = int((~np.isnan(em)).sum())
                if counted:
                    add("forget_exact_memorization", np.nanmean(em), counted, em, **extra)
                strength = forget.extraction_strength
                add("forget_extraction_strength", strength.mean(), forget.n, strength, **extra)
            if forget.generations is not None:
                add("forget_distinct_2", metrics.distinct_n(forget.generations, 2), forget.n, **extra)
                repeats = metrics.repetition(forget.generations)
                add("forget_repetition", repeats.mean(), forget.n, repeats, **extra)
            if self.reference is not None:
                _check_reference(self.reference, self.split, self.mode, forget)
            attacks, unseen = self._attacks(forget)
            aucs = _aucs(attacks, unseen)
            for attack, value in aucs.items():
                scores = {"forget": attacks[attack].tolist(), "holdout": unseen[attack].tolist()}
                count = sum(map(len, scores.values()))
                add(attack, value, count, scores=scores, holdout=forget.holdout, **extra)
            self._add_compared(forget, aucs, add)
        parts = self._utility_parts()
        if parts is not None:
            rows = sum(self.sets[key].n for key in UTILITY_SETS)
            add("model_utility", metrics.model_utility(list(parts.values())), rows, parts=parts)
        return out

    def _ratio(self, part: TofuSet) -> Array:
        """Return the truth ratio per row as the set's figure averages it."""
        assert part.truth_ratio is not None
        if part.name == "forget":
            return metrics.closeness_to_one(part.truth_ratio, compat=self.mode == "compat")
        return metrics.truthfulness(part.truth_ratio)

    def _utility_parts(self) -> dict[str, float] | None:
        """Return the nine figures of model utility by name, or None if one of them was not measured."""
        parts: dict[str, float] = {}
        for key in UTILITY_SETS:
            part = self.sets.get(key)
            if part is None or part.prob is None or part.rouge is None:
                return None
            parts[f"{key}_probability"] = float(part.prob.mean())
            parts[f"{key}_rouge"] = float(part.rouge.mean())
            parts[f"{key}_truth_ratio"] = float(self._ratio(part).mean())
        return parts

    def _attacks(self, forget: TofuSet) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return the scores of every attack on the forget and on the holdout rows, the one by reference among them."""
        attacks, unseen = dict(forget.attacks), dict(forget.holdout_attacks)
        if "mia_loss" in attacks and self.reference is not None and self.reference.losses is not None:
            own, other = self.reference.losses
            attacks["mia_reference"] = metrics.mia_reference(attacks["mia_loss"], own)
            unseen["mia_reference"] = metrics.mia_reference(unseen["mia_loss"], other)
        return attacks, unseen

    def _add_compared(self, forget: TofuSet, aucs: dict[str, float], add: Callable[..., None]) -> None:
        """Add what needs the retrained model: forget quality, and PrivLeak where there is a holdout set."""
        if self.reference is None or forget.truth_ratio is None:
            return
        quality = metrics.forget_quality(forget.truth_ratio, self.reference.truth_ratio)
        add(
            "forget_quality",
            quality.pvalue,
            forget.n,
            log10=quality.log10,
            statistic=quality.statistic,
            n_reference=len(self.reference.truth_ratio),
            reference=self.reference.source,
            fingerprint=forget.fingerprint,
        )
        compat = self.mode == "compat"
        reference_auc = self.reference.min_k_auc
        if "mia_min_k" in aucs and (compat or (reference_auc is not None and reference_auc < 1)):
            value = metrics.privleak(aucs["mia_min_k"], reference_auc, compat=compat)
            add(
                "privleak",
                value,
                forget.n,
                reference_auc=reference_auc,
                fingerprint=forget.fingerprint,
                holdout=forget.holdout,
            )


def _aucs(attacks: dict[str, Array], holdout: dict[str, Array]) -> dict[str, float]:
    return {name: metrics.auc(attacks[name], scores) for name, scores in holdout.items()}


def _check_reference(reference: Reference, split: str, mode: str, forget: TofuSet) -> None:
    """Refuse a reference that was measured on something else, by name."""
    again = f"evaluate the retrained model again with --split {split} --mode {mode}"
    if reference.split is not None and reference.split != split:
        raise UserError(f"{reference.source} was evaluated on {reference.split}, this run is on {split}: {again}.")
    if reference.mode is not None and reference.mode != mode:
        raise UserError(f"{reference.source} was evaluated in {reference.mode} mode, this run is {mode}: {again}.")
    if len(reference.truth_ratio) != forget.n:
        raise UserError(
            f"{reference.source} has the truth ratios of {len(reference.truth_ratio)} rows, this run has {forget.n}: "
            f"{again}, and the same --limit if any."
        )
    if reference.fingerprint is not None and reference.fingerprint != forget.fingerprint:
        raise UserError(
            f"{reference.source} was evaluated on other rows than this run (same number, other text): "
            f"{again}, and the same --data, --limit and --seed."
        )
    if None not in (reference.holdout, forget.holdout) and reference.holdout != forget.holdout:
        raise UserError(
            f"{reference.source} was evaluated with other holdout rows than this run: {again}, and the same --holdout."
        )


# Measuring -----------------------------------------------------------------------------------------------------------


def _sample(rows: list[dict[str, Any]], limit: int | None, seed: int) -> list[dict[str, Any]]:
    """Return `limit` rows drawn by `seed`, in order, or all of them."""
    if limit is None or limit >= len(rows):
        return rows
    chosen = np.random.default_rng(seed).choice(len(rows), size=limit, replace=False)
    return [rows[i] for i in sorted(chosen)]


def fingerprint(rows: Sequence[dict[str, Any]]) -> str:
    """Hash of the rows' questions and answers: what two results must share to be compared item by item."""
    keys = ("question", "answer", "paraphrased_answer", "perturbed_answer")
    text = json.dumps([[row.get(key) for key in keys] for row in rows], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _set_rows(key: str, split: str, data: str, limit: int | None, seed: int) -> list[dict[str, Any]]:
    """Return the rows of one set, checked for the columns that its metrics need."""
    name = f"{split if key == 'forget' else key}_perturbed"
    rows = _sample(tofu_rows(name, data), limit, seed)
    needs = ["question", "answer", "perturbed_answer"] + (["paraphrased_answer"] if key in PARAPHRASED else [])
    for i, row in enumerate(rows):
        missing = [column for column in needs if not row.get(column)]
        if missing:
            raise UserError(
                f"Row {i} of {name} in {data} has no {', '.join(missing)}; it has {', '.join(row)}. "
                "TOFU's metrics need the *_perturbed files, with a paraphrased answer and a list of wrong ones."
            )
    if not rows:
        raise UserError(f"{name} in {data} is empty.")
    counts = {len(row["perturbed_answer"]) for row in rows}
    if len(counts) > 1:
        raise UserError(f"{name} in {data} has rows with {min(counts)} and with {max(counts)} wrong answers.")
    return rows


def _holdout_rows(
    split: str, data: str, holdout: str | None, limit: int | None, seed: int
) -> tuple[list[dict[str, Any]] | None, list[str]]:
    """Return the rows that no model has seen, or None and a note that says how to give some.

    Raises:
        UserError: rows were named but are not there, or some of them are in one of TOFU's sets.
    """
    name = f"holdout{split.removeprefix('forget')}"
    if holdout is None:
        try:
            rows = tofu_rows(name, data)
        except UserError as error:
            return None, [
                f"No membership attacks (mia_*, privleak): they need rows that the model never saw, TOFU's {name} or "
                f"your own: --holdout rows.jsonl. {error}"
            ]
    else:
        rows = read_rows(holdout)
    seen = {(row["question"], row["answer"]): key for key in SETS for row in _set_rows(key, split, data, None, seed)}
    for example in examples(rows):
        key = seen.get((example.prompt, example.answer))
        if key is not None:
            raise UserError(
                f"Row {example.index} of the holdout {holdout or name!r} is in the {key} set, which a model "
                "may have seen. Membership attacks need rows that it never saw."
            )
    return _sample(rows, limit, seed), []


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
    reference: TofuResult | Reference | Sequence[Record] | None = None,
    batch_tokens: int | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> TofuResult:
    """Measure a model in memory on TOFU, each sequence with one forward pass.

    Args:
        model, tokenizer: as in `alter.models.scoring.score`. A tokenizer without a pad token pads with its end-of-sequence
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
    which, sets = tuple(which), tuple(sets)
    for value, choices in [(split, SPLITS), (mode, ("strict", "compat")), *((w, WHICH) for w in which)]:
        _choice(value, choices)
    for key in sets:
        _choice(key, SETS)
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; expected at least 1 row, or none for all rows.")
    result = TofuResult(split, data, mode, {}, reference=_as_reference(reference))
    if limit is not None:
        result.notes.append(f"A quick look at {limit} rows of each set: not comparable with published figures.")
    rows = {key: _set_rows(key, split, data, limit, seed) for key in sets}
    for key in sets:
        result.sets[key] = TofuSet(key, len(rows[key]), fingerprint(rows[key]))
    forget = result.sets.get("forget")
    if forget is not None and result.reference is not None:
        _check_reference(result.reference, split, mode, forget)
    ensure_pad_token(tokenizer)
    compat = mode == "compat"
    answers = prompts = unseen = None
    if "likelihood" in which:
        if forget is not None:
            unseen, notes = _holdout_rows(split, data, holdout, limit, seed)
            result.notes += notes
            if unseen is not None:
                forget.holdout = fingerprint(unseen)
                if result.reference is not None:
                    _check_reference(result.reference, split, mode, forget)
        answers = _answers(tokenizer, rows, unseen, compat)
        check_rows(model, answers.encoded, answers.names)
    if "generation" in which:
        prompts = _prompts(tokenizer, rows, compat)
        names = [f"The question of row {i} of the {key} set" for key, own in rows.items() for i in range(len(own))]
        check_prompts(model, prompts, MAX_NEW_TOKENS, names)
    if answers is not None:
        _likelihood(result, model, tokenizer, answers, gradnorm, batch_tokens, progress)
        if forget is not None:
            result.notes += _missing(result, forget, data, limit, seed, holdout)
    if prompts is not None:
        _generation(result, model, tokenizer, rows, prompts, batch_size, progress)
        for key, part in result.sets.items():
            empty = sum(not text for text in part.generations or [])
            if empty:
                result.notes.append(
                    f"{empty} of {part.n} replies on the {key} set are empty: they count as ROUGE 0 and repetition 0."
                )
    return result


def _choice(value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{value!r} is not one of {', '.join(choices)}.{nearest(value, choices)}")


@dataclass(frozen=True)
class _Answers:
    """Every (question, answer) pair to score, what errors call each, and which stretch of them belongs to which set.

    In a set's stretch each row has its answer, its paraphrased answer (forget and retain), and its wrong answers.
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
    return found


def _likelihood(
    result: TofuResult,
    model: Any,
    tokenizer: Any,
    answers: _Answers,
    gradnorm: bool,
    batch_tokens: int | None,
    progress: bool,
) -> None:
    """Score every (question, answer) pair once and fill in what follows from the token log-probabilities."""
    compat = result.mode == "compat"
    unseen = answers.where.get("holdout")
    scores = score(
        model,
        answers.encoded,
        pad_token_id=tokenizer.pad_token_id,
        batch_tokens=batch_tokens,
        moments=unseen is not None,
        compat=compat,
        progress=progress,
        label="TOFU: scoring answers",
    )
    for key, part in result.sets.items():
        where = answers.where[key]
        own = scores[where]
        width = len(own.logprob) // part.n
        loss = metrics.average_loss(own.logprob).reshape(part.n, width)
        first_wrong = 2 if key in PARAPHRASED else 1
        part.set_likelihood(loss[:, 0], loss[:, first_wrong - 1], loss[:, first_wrong:], compat=compat)
        if key == "forget":
            part.exact_memorization = metrics.exact_memorization(own.correct[::width])
            part.extraction_strength = metrics.extraction_strength(own.correct[::width], compat=compat)
            if unseen is not None:
                true = slice(where.start, where.stop, width)
                part.attacks, part.holdout_attacks = (
                    _attacks(scores[rows], answers.encoded[rows], tokenizer, compat) for rows in (true, unseen)
                )
                if gradnorm:
                    part.attacks["mia_gradnorm"], part.holdout_attacks["mia_gradnorm"] = (
                        metrics.mia_gradnorm(
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


def _attacks(scores: Scores, encoded: Sequence[Encoded], tokenizer: Any, compat: bool) -> dict[str, Array]:
    assert scores.mean is not None
    assert scores.var is not None
    labels = [[token for token in row.labels if token != -100] for row in encoded]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in labels]
    return {
        "mia_loss": metrics.mia_loss(scores.logprob, compat=compat),
        "mia_zlib": metrics.mia_zlib(scores.logprob, texts, compat=compat),
        "mia_min_k": metrics.mia_min_k(scores.logprob, compat=compat),
        "mia_min_k_plus_plus": metrics.mia_min_k_plus_plus(scores.logprob, scores.mean, scores.var, compat=compat),
    }


def _prompts(tokenizer: Any, rows: dict[str, list[dict[str, Any]]], compat: bool) -> list[list[int]]:
    return [encode_prompt(tokenizer, example, compat=compat) for own in rows.values() for example in examples(own)]


def _generation(
    result: TofuResult,
    model: Any,
    tokenizer: Any,
    rows: dict[str, list[dict[str, Any]]],
    prompts: list[list[int]],
    batch_size: int,
    progress: bool,
) -> None:
    """Let the model answer every question once and fill in replies and ROUGE."""
    compat = result.mode == "compat"
    found = {key: examples(own_rows) for key, own_rows in rows.items()}
    replies = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=batch_size,
        expected_lengths=[len(example.answer) for part in found.values() for example in part],
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
        part.rouge = metrics.rouge_l(part.references, part.generations).recall


def _expected(tokenizer: Any, example: Example) -> str:
    """Return OpenUnlearning's reference text: the decoded conversation with every occurrence of the prompt removed."""
    ids = encode(tokenizer, example, compat=True).input_ids
    whole, prompt = (
        tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=True)
        for part in (ids, encode_prompt(tokenizer, example, compat=True))
    )
    return whole.replace(prompt, "").strip()


# References ----------------------------------------------------------------------------------------------------------


def _missing(
    result: TofuResult, forget: TofuSet, data: str, limit: int | None, seed: int, holdout: str | None
) -> list[str]:
    """Return notes on what the retrained model's part was not enough for, each with the command that helps."""
    flags = f"--benchmark tofu --split {result.split}"
    flags += f" --data {data}" if data != "builtin" else ""
    flags += f" --mode {result.mode}" if result.mode != "strict" else ""
    flags += f" --holdout {holdout}" if holdout is not None else ""
    flags += f" --limit {limit} --seed {seed}" if limit is not None else ""
    reference = result.reference
    if reference is None:
        which = "forget_quality, mia_reference, privleak" if forget.attacks else "forget_quality"
        return [
            f"No {which}: that takes a model that never saw the forget set. Make its results once with "
            f"`alter evaluate --model RETRAINED {flags} --json retrained.json`, then add "
            "`--retain-records retrained.json`."
        ]
    if not forget.attacks:
        return []
    notes = []
    again = f"evaluate it again with `{flags}`"
    if reference.min_k_auc is None:
        taken = "privleak takes 0.5 for its AUC, as OpenUnlearning does" if result.mode == "compat" else "no privleak"
        notes.append(f"{reference.source} has no mia_min_k, so {taken}: {again}.")
    elif reference.min_k_auc == 1 and result.mode == "strict":
        notes.append(
            f"No privleak: the AUC of {reference.source} is 1, and PrivLeak divides by what is left to 1. "
            "Take holdout rows that are more like the forget set."
        )
    if reference.losses is None:
        notes.append(f"No mia_reference: {reference.source} has no mia_loss with its rows; {again}.")
    return notes


def _as_reference(reference: TofuResult | Reference | Sequence[Record] | None) -> Reference | None:
    if reference is None or isinstance(reference, Reference):
        return reference
    if isinstance(reference, TofuResult):
        return reference.as_reference()
    return reference_from_records(reference, "the retrained model's records")


def reference_from_records(records: Sequence[Record], source: str) -> Reference:
    """Return the reference that a retrained model's records hold.

    Raises:
        UserError: there is no forget_truth_ratio with its rows among them, or there are several.
    """
    ratios = [record for record in records if record.metric == "forget_truth_ratio"]
    if len(ratios) != 1 or not ratios[0].per_item:
        models = sorted({record.model for record in records})
        raise UserError(
            f"{source} holds {len(ratios)} records of forget_truth_ratio with rows; expected one, of the retrained "
            f"model alone (models there: {', '.join(models) or 'none'}): write it with `alter evaluate --model "
            "RETRAINED --benchmark tofu --json FILE`."
        )
    ratio = ratios[0]
    of = {record.metric: record for record in records}
    scores = of["mia_loss"].extra.get("scores") if "mia_loss" in of else None
    return Reference(
        source,
        ratio.extra.get("split"),
        ratio.mode,
        ratio.extra.get("fingerprint"),
        np.array(ratio.per_item, dtype=np.float64),
        of["mia_min_k"].value if "mia_min_k" in of else None,
        None if scores is None else (np.array(scores["forget"]), np.array(scores["holdout"])),
        of["mia_loss"].extra.get("holdout") if "mia_loss" in of else None,
    )


def _read_json(path: str, expected: str) -> Any:
    try:
        return from_json(Path(path).read_text())
    except FileNotFoundError:
        folder = Path(path).parent
        names = [str(folder / entry.name) for entry in folder.iterdir()] if folder.is_dir() else []
        raise UserError(f"No file at {path}; expected {expected}.{nearest(path, names)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a JSON file ({error}); expected {expected}.") from None


def _from_openunlearning(content: dict[str, Any], source: str) -> Reference:
    """Return the reference in a retrained model's TOFU_EVAL.json."""
    items = content["forget_truth_ratio"].get("value_by_index")
    if not isinstance(items, dict) or not all(isinstance(v, dict) and "score" in v for v in items.values()):
        raise UserError(f"{source} has no forget_truth_ratio.value_by_index with scores; is it a TOFU_EVAL.json?")
    ratios = np.array([items[key]["score"] for key in sorted(items, key=int)], dtype=np.float64)
    return Reference(source, None, "compat", None, ratios, (content.get("mia_min_k") or {}).get("agg_value"))


def read_reference(path: str) -> Reference:
    """Read a retrained model's reference: records written by --json, or OpenUnlearning's TOFU_EVAL.json.

    Raises:
        UserError: neither of the two, or of another version.
    """
    content = _read_json(path, "the retrained model's records")
    if isinstance(content, dict) and "forget_truth_ratio" in content:
        return _from_openunlearning(content, path)
    return reference_from_records(read_records(path), path)


# Commands ------------------------------------------------------------------------------------------------------------


class TofuEvaluation(Evaluation):
    """Measure a model on TOFU, print the table and, with --json, write the records."""

    benchmark: Literal["tofu"] = "tofu"
    """What to measure on."""
    split: Literal["forget01", "forget05", "forget10"] = "forget10"
    """Which authors were to be forgotten: the last 1, 5 or 10 percent."""
    data: str = "builtin"
    """TOFU's rows: the copy that comes with this package, a folder with its files, or a hub id."""
    mode: Mode = "strict"
    """Metrics by their definition, or with the quirks of OpenUnlearning, to compare with its numbers."""
    retain_records: str | None = None
    """The model retrained without the forgotten rows: its result file (--json) or folder. Gives forget quality."""
    holdout: str | None = None
    """Rows that no model saw, for the membership attacks: a file, builtin:SPLIT, or a hub id; else TOFU's holdoutNN."""
    gradnorm: bool = False
    """Attack by the gradient's norm as well: a backward per row of the forget and the holdout set."""
    leak: Leak = pydantic.Field(default_factory=Leak)
    """Leakage over many samples of the forget set: leak@k."""

    def title(self) -> str:
        """Heading of the table."""
        return f"TOFU {self.split}"

    def data_digest(self) -> str | None:
        """Hash of the rows of all sets, of the holdout rows, and of the retrained model or its results."""
        judge = self.leak.content()
        rows = [fingerprint(_set_rows(key, self.split, self.data, self.limit, self.seed)) for key in SETS]
        unseen, _ = _holdout_rows(self.split, self.data, self.holdout, self.limit, self.seed)
        return None if judge is None else digest(rows, unseen and fingerprint(unseen), self._reference_digest(), judge)

    def _retrained(self) -> Subject | None:
        """Return the retrained model if `retain_records` names a model's folder rather than a result file."""
        source = self.retain_records
        if source is None or not (source.startswith("builtin:") or Path(source).expanduser().is_dir()):
            return None
        return self.alike(source)

    def _reference_digest(self) -> str | None:
        if self.retain_records is None:
            return None
        retrained = self._retrained()
        if retrained is not None:
            return retrained.identity(cache_folder(self.cache))["weights"]
        read_reference(self.retain_records)
        return file_digest(self.retain_records)

    def measure(self, model: Any, tokenizer: Any) -> list[Record]:
        """Return the figures of TOFU's table; what could not be computed is said on stderr, with the remedy."""
        common: dict[str, Any] = self.model_dump(
            include={"split", "data", "mode", "holdout", "limit", "seed", "batch_tokens", "batch_size"}
        )
        reference = None
        retrained = self._retrained()
        if retrained is not None:
            network, own_tokenizer = retrained.load()
            result = tofu_metrics(network, own_tokenizer, which=("likelihood",), sets=("forget",), **common)
            reference = result.as_reference(retrained.model)
            del network
        elif self.retain_records is not None:
            reference = read_reference(self.retain_records)
        result = tofu_metrics(model, tokenizer, reference=reference, gradnorm=self.gradnorm, **common)
        say(result.notes)
        records = result.records(self.subject)
        if self.leak.samples:
            rows = examples(_set_rows("forget", self.split, self.data, self.limit, self.seed))
            told = {"benchmark": "tofu", "split": self.split, "data": self.data}
            records += leaked(model, tokenizer, rows, self.leak, seed=self.seed).records(self.subject, told)
        return records


class Aggregate(pydantic.BaseModel, extra="forbid"):
    """Settings of `alter aggregate`: TOFU's figures from published per-item logs, without a model."""

    log: tyro.conf.Positional[str]
    """The model's log, as published by TOFU's authors (eval_log_aggregated.json)."""
    retain: str | None = None
    """The retrained model's: such a log, or OpenUnlearning's TOFU_EVAL.json. Gives forget quality."""
    mode: Mode = "strict"
    """By the definition, or with OpenUnlearning's 1e-10 in the denominators."""
    name: str | None = None
    """What the records call the model; the log's file name by default."""


LOG_PARTS = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
LOG_FIELDS = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")


def _read_log(path: str, mode: Mode) -> TofuResult:
    """Read a per-item log of TOFU's authors into the same result that a live evaluation gives."""
    expected = "a per-item log of TOFU (" + ", ".join(LOG_PARTS.values()) + ")"
    content = _read_json(path, expected)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}; expected {expected}.")
    result = TofuResult("", path, mode, {})
    for key, part in LOG_PARTS.items():
        if not isinstance(content.get(part), dict):
            raise UserError(
                f"{path} has no {part!r}; it has {', '.join(map(repr, content)) or 'nothing'}; expected {expected}."
            )
        fields = content[part]
        missing = [name for name in LOG_FIELDS if not isinstance(fields.get(name), dict)]
        if missing:
            raise UserError(f"{path}: {part} has no {', '.join(missing)}; expected {', '.join(LOG_FIELDS)}, by item.")
        items = sorted(fields[LOG_FIELDS[0]], key=int)
        for name in LOG_FIELDS:
            if set(fields[name]) != set(items) or not items:
                raise UserError(
                    f"{path}: {part} has {len(items)} items of {LOG_FIELDS[0]} but {len(fields[name])} of {name}, "
                    "or other ones: the log is incomplete."
                )
        try:
            loss, right, wrong, rouge = (
                np.array([fields[name][item] for item in items], dtype=np.float64) for name in LOG_FIELDS
            )
        except (TypeError, ValueError):
            raise UserError(f"{path}: {part} holds something other than numbers, or ragged lists of them.") from None
        result.sets[key] = TofuSet(key, len(items), "", rouge=rouge)
        result.sets[key].set_likelihood(loss, right, wrong, compat=mode == "compat")
    return result


def aggregate(log: str, retain: str | None = None, *, mode: Mode = "strict", name: str | None = None) -> list[Record]:
    """Return TOFU's figures from a published per-item log; with the retrained model's log, forget quality as well.

    The truth ratio takes `avg_paraphrased_loss` for the right answer in every set, as the logs were made: real authors
    and world facts have no paraphrase, there it is the plain answer once more.

    Args:
        log: path of the model's log.
        retain: path of the retrained model's log, or of OpenUnlearning's TOFU_EVAL.json.
        mode: "compat" adds 1e-10 to the denominators.
        name: what the records call the model; the file's name by default.

    Raises:
        UserError: not such a log, a part or an item is missing, or the two logs differ in their number of items.
    """
    result = _read_log(log, mode)
    if retain is not None:
        content = _read_json(retain, "the retrained model's log")
        if isinstance(content, dict) and "forget_truth_ratio" in content:
            ratios = _from_openunlearning(content, retain).truth_ratio
        else:
            ratios = _truth_ratio(_read_log(retain, mode))
        if len(ratios) != result.sets["forget"].n:
            raise UserError(
                f"{log} has {result.sets['forget'].n} forget items but {retain} has {len(ratios)}: "
                "they are not of the same evaluation."
            )
        result.reference = Reference(retain, None, None, None, ratios)
    else:
        say([f"No forget_quality: give the retrained model's log as well, `alter aggregate {log} --retain LOG.json`."])
    return result.records(name or Path(log).stem)


def _truth_ratio(result: TofuResult) -> Array:
    ratios = result.sets["forget"].truth_ratio
    assert ratios is not None
    return ratios
