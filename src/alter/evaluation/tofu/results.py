"""Per-row results of one model on TOFU, and the figures of its table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from alter import metrics
from alter.core import Array, UserError
from alter.evaluation.figures import Figures, Groups, interval_over
from alter.evaluation.tofu.sets import PARAPHRASED, UTILITY_SETS
from alter.storage import Record

Mode = Literal["strict", "compat"]


@dataclass
class TofuSet:
    """Everything measured on one set, one entry per row; what was not measured is None.

    Attributes:
        authors: of the rows, where they are known: intervals of means draw all rows of an author together.
        fingerprint: hash of the rows; results can be compared item by item only if it is the same.
        loss: average loss of the answer, [n].
        right_loss: average loss of the answer that the truth ratio takes for right, [n].
        wrong_loss: average losses of the wrong answers, [n, 5] or [n, 3].
        prob: probability of the answer; for real authors and world facts its share among all candidates, [n].
        truth_ratio: raw ratio P(wrong) / P(right), [n].
        reworded: probability of the answer when the question is asked in other words, [n].
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
    reworded: Array | None = None
    exact_memorization: Array | None = None
    extraction_strength: Array | None = None
    questions: list[str] | None = None
    references: list[str] | None = None
    generations: list[str] | None = None
    rouge: Array | None = None
    attacks: dict[str, Array] = field(default_factory=dict)
    holdout_attacks: dict[str, Array] = field(default_factory=dict)
    holdout: str | None = None
    authors: Groups | None = None

    def set_likelihood(self, loss: Array, right_loss: Array, wrong_loss: Array, *, compat: bool) -> None:
        """Fill in the losses and what follows from them: probability and truth ratio."""
        self.loss, self.right_loss, self.wrong_loss = loss, right_loss, wrong_loss
        if self.name in PARAPHRASED:
            self.prob = metrics.likelihood.probability(loss)
        else:
            self.prob = metrics.likelihood.normalised_probability(loss, wrong_loss, compat=compat)
        self.truth_ratio = metrics.likelihood.truth_ratio(right_loss, wrong_loss, compat=compat)


@dataclass(frozen=True)
class TofuReference:
    """The retrained model's part: raw truth ratios on the forget set and, where there are holdout rows (`holdout` is
    their
    hash), its min-k AUC and its losses of forget and holdout rows.
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
    reference: TofuReference | None = None
    notes: list[str] = field(default_factory=list)

    def as_reference(self, source: str = "the retrained model") -> TofuReference:
        """Return the result as the reference of other models, if this model is the retrained one.

        Raises:
            UserError: the truth ratios on the forget set were not measured.
        """
        forget = self.sets.get("forget")
        if forget is None or forget.truth_ratio is None:
            raise UserError(f"{source} has no truth ratios on the forget set: evaluate its likelihoods on that set.")
        losses = None
        if "mia_loss" in forget.attacks:
            losses = (forget.attacks["mia_loss"], forget.holdout_attacks["mia_loss"])
        min_k = aucs(forget.attacks, forget.holdout_attacks).get("mia_min_k")
        return TofuReference(
            source, self.split, self.mode, forget.fingerprint, forget.truth_ratio, min_k, losses, forget.holdout
        )

    def records(self, name: str) -> list[Record]:
        """Return the figures of TOFU's table that these results allow, as records of the model `name`.

        `per_item` of a truth ratio is the raw ratio of each row: so a retrained model's file can be the reference.
        """
        base = {"benchmark": "tofu", "split": self.split, "data": self.data}
        figures = Figures(name, base, self.mode)
        add = figures.add
        for key, part in self.sets.items():
            extra: dict[str, Any] = {"fingerprint": part.fingerprint, "groups": part.authors}
            if part.reworded is not None:
                # first: of the metrics that cost no attack it held best (docs/results/metrics.md)
                add(f"{key}_probability_reworded", part.reworded.mean(), part.n, part.reworded, **extra)
            if part.prob is not None and part.truth_ratio is not None:
                add(f"{key}_probability", part.prob.mean(), part.n, part.prob, **extra)
                ratio = self._ratio(part)
                interval = interval_over(ratio.tolist(), part.authors)
                add(f"{key}_truth_ratio", ratio.mean(), part.n, part.truth_ratio, interval=interval, **extra)
            if part.rouge is not None:
                texts: dict[str, Any] = {
                    "questions": part.questions,
                    "references": part.references,
                    "generations": part.generations,
                }
                # what is counted of the replies is over authors too
                if part.authors is not None:
                    texts["authors"] = part.authors.numbers
                empty = sum(not text for text in part.generations or [])
                add(f"{key}_rouge", part.rouge.mean(), part.n, part.rouge, **extra, **texts, empty=empty)
        forget = self.sets.get("forget")
        if forget is not None:
            extra = {"fingerprint": forget.fingerprint}
            if forget.exact_memorization is not None and forget.extraction_strength is not None:
                em = forget.exact_memorization
                counted = int((~np.isnan(em)).sum())
                if counted:
                    add("forget_exact_memorization", np.nanmean(em), counted, em, forget.authors, **extra)
                strength = forget.extraction_strength
                add("forget_extraction_strength", strength.mean(), forget.n, strength, forget.authors, **extra)
            if forget.generations is not None:
                add("forget_distinct_2", metrics.text.distinct_n(forget.generations, 2), forget.n, **extra)
                repeats = metrics.text.repetition(forget.generations)
                add("forget_repetition", repeats.mean(), forget.n, repeats, forget.authors, **extra)
            if self.reference is not None:
                check_reference(self.reference, self.split, self.mode, forget)
            attacks, unseen = self._attacks(forget)
            found = aucs(attacks, unseen)
            for attack, value in found.items():
                scores = {"forget": attacks[attack].tolist(), "holdout": unseen[attack].tolist()}
                sizes = [len(each) for each in scores.values()]
                add(
                    attack, value, sum(sizes), scores=scores, holdout=forget.holdout,
                    interval=metrics.samples.auc_interval(value, *sizes), **extra,
                )  # fmt: skip
            self._add_compared(forget, found, add)
        parts = self._utility_parts()
        if parts is not None:
            rows = sum(self.sets[key].n for key in UTILITY_SETS)
            authors = [self.sets[key].authors for key in UTILITY_SETS]
            numbers = [None if own is None else own.numbers for own in authors]
            interval = metrics.samples.utility_interval(self._utility_rows(), numbers)
            known = next((own for own in authors if own is not None), None)
            utility = metrics.likelihood.model_utility(list(parts.values()))
            add("model_utility", utility, rows, parts=parts, interval=interval, groups=known)
        return figures.records

    def _ratio(self, part: TofuSet) -> Array:
        """Return the truth ratio per row as the set's figure averages it."""
        assert part.truth_ratio is not None
        if part.name == "forget":
            return metrics.likelihood.closeness_to_one(part.truth_ratio, compat=self.mode == "compat")
        return metrics.likelihood.truthfulness(part.truth_ratio)

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

    def _utility_rows(self) -> list[Array]:
        """Return of each set of model utility its three figures by row, [3, n]."""
        return [
            np.stack([part.prob, part.rouge, self._ratio(part)])  # type: ignore[list-item]  # all measured: `_utility_parts`
            for part in (self.sets[key] for key in UTILITY_SETS)
        ]

    def _attacks(self, forget: TofuSet) -> tuple[dict[str, Array], dict[str, Array]]:
        """Return the scores of every attack on the forget and on the holdout rows, the one by reference among them."""
        attacks, unseen = dict(forget.attacks), dict(forget.holdout_attacks)
        if "mia_loss" in attacks and self.reference is not None and self.reference.losses is not None:
            own, other = self.reference.losses
            attacks["mia_reference"] = metrics.membership.mia_reference(attacks["mia_loss"], own)
            unseen["mia_reference"] = metrics.membership.mia_reference(unseen["mia_loss"], other)
        return attacks, unseen

    def _add_compared(self, forget: TofuSet, found: dict[str, float], add: Callable[..., None]) -> None:
        """Add what needs the retrained model: forget quality, and PrivLeak where there is a holdout set."""
        if self.reference is None or forget.truth_ratio is None:
            return
        quality = metrics.likelihood.forget_quality(forget.truth_ratio, self.reference.truth_ratio)
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
        if "mia_min_k" in found and (compat or (reference_auc is not None and reference_auc < 1)):
            sizes = forget.n, len(forget.holdout_attacks["mia_min_k"])
            value, *ends = (
                metrics.membership.privleak(auc, reference_auc, compat=compat)
                for auc in (found["mia_min_k"], *metrics.samples.auc_interval(found["mia_min_k"], *sizes))
            )
            add(
                "privleak",
                value,
                forget.n,
                reference_auc=reference_auc,
                interval=sorted(ends),
                fingerprint=forget.fingerprint,
                holdout=forget.holdout,
            )


def aucs(attacks: dict[str, Array], holdout: dict[str, Array]) -> dict[str, float]:
    return {name: metrics.membership.auc(attacks[name], scores) for name, scores in holdout.items()}


def check_reference(reference: TofuReference, split: str, mode: str, forget: TofuSet) -> None:
    """Refuse a reference of another split, other rows or another mode; the message names it."""
    again = f"evaluate the retrained model again with `split` {split} `mode` {mode}"
    if reference.split is not None and reference.split != split:
        raise UserError(f"{reference.source} was evaluated on {reference.split}, this run is on {split}: {again}.")
    if reference.mode is not None and reference.mode != mode:
        raise UserError(f"{reference.source} was evaluated in {reference.mode} mode, this run is {mode}: {again}.")
    if len(reference.truth_ratio) != forget.n:
        raise UserError(
            f"{reference.source} has the truth ratios of {len(reference.truth_ratio)} rows, this run has {forget.n}: "
            f"{again}, and the same `limit` if any."
        )
    if reference.fingerprint is not None and reference.fingerprint != forget.fingerprint:
        raise UserError(
            f"{reference.source} was evaluated on other rows than this run (same number, other text): "
            f"{again}, and the same `data`, `limit` and `seed`."
        )
    if None not in (reference.holdout, forget.holdout) and reference.holdout != forget.holdout:
        raise UserError(
            f"{reference.source} was evaluated with other holdout rows than this run: {again}, and the same `holdout`."
        )
