"""Watching a model while it forgets: cheap metrics at chosen steps, a rule for the step to keep, early stopping.

One scoring pass over small seeded subsets makes a check. Everything a rule decides follows from the checks made so
far, which the trainer's state keeps with every checkpoint: so a run that was killed goes on with the same decisions.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy import stats
from transformers import TrainerCallback

from alter import metrics
from alter.core import processes
from alter.core.errors import UserError
from alter.core.files import digest
from alter.data.encoding import Encoded, encode, encode_prompt
from alter.data.examples import Example, load_examples, row_key
from alter.evaluation import tofu
from alter.evaluation.leakage import Leak, leaked
from alter.models.generation import generate
from alter.models.loading import load_model
from alter.models.scoring import score

Array = npt.NDArray[np.float64]
Check = Mapping[str, float]
"""What was measured at one step: `step`, `epoch` and one number per metric."""
KEPT = "kept"
"""Folder of a run that holds the adapter of the best step so far."""
VALIDATION_SHARE = 5
"""At most one in so many retain rows is set aside."""


# Rules ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Which step a rule would keep, whether that step satisfies it, whether training may end, and why in words.

    That a rule is satisfied says nothing of whether the rows are forgotten: `alter.evaluation.verdict` does, at the end.
    """

    step: int
    met: bool
    stop: bool
    why: str


class _Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    needs: ClassVar[tuple[str, ...]] = ()
    """Settings of `Watch` without which the rule cannot decide."""


class KeepLast(_Rule):
    """Keep the last step and never stop early."""

    kind: Literal["none"] = "none"

    def judge(self, checks: Sequence[Check]) -> Verdict:
        """Return the last of the checks."""
        return Verdict(int(checks[-1]["step"]), True, False, "the last step: no rule was chosen")


class _Guarded(_Rule, ABC):
    """What the rules share that must not be satisfied by a broken model.

    A check is allowed if U >= (1 - utility_loss) U_0, with U the mean probability of the answers of retain rows that
    were not trained on, and U_0 that of the untouched model. If no check is allowed, the one of largest U is kept.
    """

    utility_loss: float = Field(0.05, ge=0, lt=1)
    """Share of the probability of unseen retain rows that may be lost."""
    patience: int = Field(0, ge=0)
    """Stop after so many further checks without a better one."""

    def allows(self, check: Check, start: Check) -> bool:
        """Whether the check's utility is near enough to that of the untouched model."""
        return check["retain_probability"] >= (1 - self.utility_loss) * start["retain_probability"]

    def _verdict(self, checks: Sequence[Check], rank: Sequence[tuple[float, ...]], met: Sequence[bool]) -> Verdict:
        """Keep the check of lowest rank, the earliest if several; the first check is the untouched model's."""
        start, later = checks[0], list(zip(checks[1:], rank, met, strict=True))
        allowed = [item for item in later if self.allows(item[0], start)]
        if allowed:
            best, _, good = min(allowed, key=lambda item: (*item[1], item[0]["step"]))
        else:
            best, _, good = min(later, key=lambda item: (-item[0]["retain_probability"], item[0]["step"]))
            good = False
        waited = sum(check["step"] > best["step"] for check in checks)
        why = self._why(best, good)
        if not allowed:
            why = (
                f"no check kept {1 - self.utility_loss:.0%} of the retain probability of the start "
                f"({start['retain_probability']:.3f}); this one lost least ({best['retain_probability']:.3f})"
            )
        return Verdict(int(best["step"]), good, good and waited >= self.patience, why)

    @abstractmethod
    def _why(self, best: Check, good: bool) -> str:
        """Why the kept check is the best one, in words."""


class LikeRetrained(_Guarded):
    """Keep the step that is most like a model retrained without the forget set.

    D is the two-sample Kolmogorov-Smirnov distance between the truth ratios of the forget rows and the retrained
    model's, p its p-value (TOFU's forget quality). Of the allowed checks after step 0, the one of smallest D is kept,
    the earliest if several. The rule is satisfied if its p >= level. The p of one and the same D falls as rows are
    added: look at all forget rows (`watch.forget_rows`) for the p that an evaluation gives. With patience, the p kept
    is the largest of several and flatters.
    """

    kind: Literal["reference"] = "reference"
    level: float = Field(0.05, gt=0, lt=1)
    """Forget quality from which the rule is satisfied."""
    needs: ClassVar[tuple[str, ...]] = ("retain_records",)

    def judge(self, checks: Sequence[Check]) -> Verdict:
        """Return which of the checks to keep; the first one must be that of step 0."""
        rank = [(check["forget_quality_statistic"],) for check in checks[1:]]
        return self._verdict(checks, rank, [check["forget_quality"] >= self.level for check in checks[1:]])

    def refuse(self, start: Check) -> str | None:
        """Say why the rule means nothing for a model that starts like this, or None."""
        if start["forget_quality"] < self.level:
            return None
        return (
            f"Before any training, forget quality is {start['forget_quality']:.3f}, not below the rule's level of "
            f"{self.level}: the model never knew the forget set, or watch.forget_rows are too few to see that it does."
        )

    def _why(self, best: Check, good: bool) -> str:
        quality = f"forget quality {best['forget_quality']:.3g} (KS distance {best['forget_quality_statistic']:.3f})"
        return f"most like the retrained model: {quality}{'' if good else f', still below {self.level}'}"


Score = Literal["loss", "min_k", "exact_memorization", "truth_ratio"]


class LikeUnseen(_Guarded):
    """Keep the first step at which the forget rows are known neither better nor worse than rows never seen.

    Each row has a score that is larger if it is less known; A = P(holdout score > forget score) + P(equal) / 2 is the
    AUC of an attacker that tells forget from holdout rows by it: 1 known, 1/2 like unseen rows, below 1/2
    over-forgotten, which tells them apart as well. p is that of a one-sided test for A > 1/2 (`told_apart`); rows of
    one sub-domain are a group where forget and holdout rows both have the run's `domain_column`. A check is known if
    A > 1/2 + margin or p < level, over-forgotten if it is not and A < 1/2 - margin, satisfied if it is neither. Of the
    allowed checks after step 0, satisfied ones come first, then over-forgotten, then known ones; among equals the one
    of smallest |A - 1/2|, the earliest if several. With `patience` 0, training stops at the first satisfied check; an
    over-forgotten one does not stop it, as some objectives overshoot and come back.

    It looks at one score. Another may still tell the sets apart, because unlearning changes which tokens of an answer
    are unlikely: the reason given for the step names the AUC of every score.

    It assumes that forget and holdout rows would be equally hard to a model that saw neither; `watch.calibrate`, or
    the truth ratio as the score, which sets each row against its own wrong answers, take away what differs.
    """

    kind: Literal["holdout"] = "holdout"
    score: Score = "loss"
    """What says how little a row is known: mean loss, min-k (40 %), share of wrong next tokens, or truth ratio."""
    level: float = Field(0.05, gt=0, lt=0.5)
    """Level of the test that forget rows are better known than holdout rows."""
    margin: float = Field(0.05, gt=0, lt=0.5)
    """How far from 1/2 the AUC may be."""
    needs: ClassVar[tuple[str, ...]] = ("holdout",)

    def judge(self, checks: Sequence[Check]) -> Verdict:
        """Return which of the checks to keep; the first one must be that of step 0."""
        state = [self._state(check) for check in checks[1:]]
        rank = [
            (float(rest), abs(check[f"auc_{self.score}"] - 0.5)) for check, rest in zip(checks[1:], state, strict=True)
        ]
        return self._verdict(checks, rank, [rest == 0 for rest in state])

    def _state(self, check: Check) -> int:
        """0 for a satisfied check, 1 for an over-forgotten one, 2 for one that still knows the forget rows."""
        auc = check[f"auc_{self.score}"]
        if auc > 0.5 + self.margin or check[f"p_{self.score}"] < self.level:
            return 2
        return 1 if auc < 0.5 - self.margin else 0

    def refuse(self, start: Check) -> str | None:
        """Say why the rule means nothing for a model that starts like this, or None."""
        if self._state(start) == 2:
            return None
        return (
            f"Before any training, the forget rows are not better known than the holdout rows (AUC "
            f"{start[f'auc_{self.score}']:.3f} by {self.score}, 1/2 is chance): the model never knew the forget set, "
            "or it was trained on the holdout set as well. The holdout rule cannot say when they are forgotten."
        )

    def _why(self, best: Check, good: bool) -> str:
        others = [name for name in get_args(Score) if name != self.score and f"auc_{name}" in best]
        auc = f"AUC {best[f'auc_{self.score}']:.3f} by {self.score} (p {best[f'p_{self.score}']:.2g})"
        auc += "".join(f", {best[f'auc_{name}']:.3f} by {name}" for name in others)
        if good:
            return f"forget rows are known like holdout rows: {auc}"
        if self._state(best) == 1:
            return f"forget rows are less known than holdout rows, which shows too: {auc}; check more often"
        return f"forget rows are still better known than holdout rows: {auc}"


Rule = Annotated[KeepLast | LikeRetrained | LikeUnseen, Field(discriminator="kind")]


def rows_needed(forget: int, margin: float, level: float) -> int | None:
    """Return how many holdout rows it takes beside `forget` rows to resolve the margin, or None if none are enough.

    With AUC 1/2 + 2 margin, the measured AUC must exceed 1/2 + margin with probability 1 - level: the standard error
    sqrt((n + m + 1) / (12 n m)) of the AUC must be at most margin / z, z the normal quantile of 1 - level.
    """
    bound = (margin / stats.norm.ppf(1 - level)) ** 2
    rest = 12 * forget * bound - 1
    return None if rest <= 0 else int(np.ceil((forget + 1) / rest))


def told_apart(
    forget: npt.ArrayLike, holdout: npt.ArrayLike, groups: tuple[Sequence[str], Sequence[str]] | None = None
) -> tuple[float, float]:
    """Return AUC and p-value of the question whether forget rows are better known than holdout rows.

    Args:
        forget, holdout: scores, larger for rows that are less known, [n] and [m].
        groups: to which group (author, request) each forget and each holdout row belongs: rows of a group resemble
            each other, so that there is less evidence than rows. None: all rows are independent.

    Returns:
        `metrics.auc`, and the p-value of a one-sided test of AUC > 1/2. Without groups Mann-Whitney's (normal
        approximation with continuity and tie correction); with groups that of (AUC - 1/2) / s.e. under Student's t,
        with the standard error of clustered data (Obuchowski 1997, Biometrics 53:567, equal to DeLong's for groups of
        one) and as many degrees of freedom as there are groups, less two. 1/2 and 1 if all scores are equal.

    Raises:
        ValueError: either side is empty or holds NaN, or has rows of a single group.
    """
    auc = metrics.auc(forget, holdout)
    x, y = np.asarray(forget, dtype=np.float64), np.asarray(holdout, dtype=np.float64)
    if np.ptp(np.concatenate([x, y])) == 0:
        return auc, 1.0
    if groups is None:
        return auc, float(stats.mannwhitneyu(x, y, alternative="less", method="asymptotic").pvalue)
    wins = (y > x[:, None]) + 0.5 * (y == x[:, None])
    variance, freedom = 0.0, -2
    for share, labels in ((wins.mean(axis=1), groups[0]), (wins.mean(axis=0), groups[1])):
        names, index = np.unique(np.asarray(labels), return_inverse=True)
        if len(names) < 2:
            raise ValueError("told_apart: groups need two or more on either side")
        sums = np.bincount(index, share - auc)
        variance += len(names) / (len(names) - 1) * float((sums**2).sum()) / len(share) ** 2
        freedom += len(names)
    if variance < 1e-18:
        return auc, 0.0 if auc > 0.5 else 1.0
    return auc, float(stats.t.sf((auc - 0.5) / np.sqrt(variance), freedom))


# Settings ------------------------------------------------------------------------------------------------------------


class Watch(BaseModel):
    """What to measure while training, how often, and which step to keep. Off unless an interval is given."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    every_steps: int | None = Field(None, ge=1)
    """Check after every so many steps, before the first and after the last."""
    every_epoch: float | None = Field(None, gt=0)
    """The same in passes over the forget set: 0.5 checks twice a pass."""
    rule: Rule = Field(default_factory=KeepLast)
    """Which step to keep, and when to stop: none, holdout, reference."""
    stop: bool = True
    """End training when the rule is satisfied; without it, train to the end and then keep the best step."""
    forget: str | None = None
    """Forget rows with paraphrased_answer and perturbed_answer, for truth ratios: builtin:forget10_perturbed."""
    forget_rows: int = Field(200, ge=1)
    """Forget rows to look at, drawn by the seed."""
    retain: str | None = None
    """Retain rows that are not in the retain set; by default `retain_rows` of the retain set are not trained on."""
    retain_rows: int = Field(100, ge=1)
    """Retain rows to look at. Set aside from the retain set, a fifth of it at most, unless `retain` gives them."""
    holdout: str | None = None
    """Rows of the forget set's kind that the model has never seen."""
    holdout_rows: int = Field(200, ge=1)
    """Holdout rows to look at, drawn by the seed."""
    calibrate: str | None = None
    """A model of the same tokenizer that saw neither forget nor holdout rows: loss and min-k count beyond its own."""
    retain_records: str | None = None
    """Result file (`alter evaluate --json`) of a model retrained without the forget set: gives forget quality."""
    replies: int = Field(0, ge=0)
    """Forget and holdout rows to answer at each check, for ROUGE-L."""
    reply_tokens: int = Field(100, ge=1)
    """Longest such answer, in tokens."""
    leak: Leak = Field(default_factory=Leak)
    """Leakage over many samples of the forget rows, at each check: leak@k."""

    @property
    def on(self) -> bool:
        """Whether anything is to be watched."""
        return self.every_steps is not None or self.every_epoch is not None

    @model_validator(mode="after")
    def _complete(self) -> Watch:
        if self.every_steps is not None and self.every_epoch is not None:
            raise ValueError("give either watch.every_steps or watch.every_epoch, not both")
        data = [name for name in ("forget", "retain", "holdout", "calibrate", "retain_records") if getattr(self, name)]
        if not self.on and (data or self.rule.kind != "none"):
            raise ValueError("nothing is watched without watch.every_steps or watch.every_epoch: give one of them")
        if self.leak.samples and not self.on:
            raise ValueError("watch.leak samples at each check: give watch.every_steps or watch.every_epoch as well")
        for name in self.rule.needs:
            if getattr(self, name) is None:
                raise ValueError(f"watch.rule {self.rule.kind!r} needs watch.{name}")
        if self.retain_records is not None and self.forget is None:
            raise ValueError(
                "watch.retain_records compares truth ratios: give the forget rows with paraphrased and perturbed "
                "answers as watch.forget, for example builtin:forget10_perturbed"
            )
        if self.calibrate is not None and self.holdout is None:
            raise ValueError("watch.calibrate makes forget and holdout rows comparable: give watch.holdout as well")
        return self


@dataclass(frozen=True)
class Watched:
    """The rows of a run's checks, read and drawn before a model is loaded; `every` is in steps."""

    forget: list[Example]
    retain: list[Example]
    holdout: list[Example]
    reference: tofu.Reference | None
    every: int


def _draw(rows: Sequence[Example], count: int, seed: int) -> list[int]:
    """Numbers of `count` rows drawn by the seed, in order, or of all of them."""
    if count >= len(rows):
        return list(range(len(rows)))
    return sorted(np.random.default_rng(seed).choice(len(rows), size=count, replace=False).tolist())


def _apart(name: str, rows: Sequence[Example], other: str, others: Sequence[Example], remedy: str) -> None:
    known = {row_key(example): example.index for example in others}
    shared = [example for example in rows if row_key(example) in known]
    if shared:
        first = shared[0]
        raise UserError(
            f"{len(shared)} rows of {name} are in the {other} set as well, the first being row {first.index} = "
            f"{other} row {known[row_key(first)]} ({(first.prompt or first.answer)[:60]!r}): {remedy}"
        )


def _rated(example: Example) -> bool:
    """Whether a row has what its truth ratio needs."""
    return bool(example.row.get("paraphrased_answer")) and bool(example.row.get("perturbed_answer"))


def _load(source: str, domain_column: str | None) -> list[Example]:
    """Load rows, labelled by the column if they have it."""
    rows = load_examples(source)
    if domain_column is None or any(example.row.get(domain_column) is None for example in rows):
        return rows
    return load_examples(source, domain_column=domain_column)


def read_watched(
    watch: Watch,
    forget: Sequence[Example],
    retain: Sequence[Example],
    *,
    domain_column: str | None = None,
    seed: int,
    steps: int,
    steps_per_epoch: float,
) -> tuple[Watched, list[Example]]:
    """Read, check and draw what the checks of a run will look at.

    Args:
        watch: settings that are switched on.
        forget, retain: the run's two sets.
        domain_column: names the groups of rows that resemble each other.
        seed: draws the rows.
        steps, steps_per_epoch: length of the run, and of a pass over the forget set, in optimizer steps.

    Returns:
        the rows of the checks, and the retain rows that are left for training: without the ones set aside, which
        neither the training nor the router's fit may see.

    Raises:
        UserError: an interval beyond the end of the run, rows that are in two sets, too few of them for the rule, or
            a retrained model's records that belong to other rows.
    """
    every = watch.every_steps or max(1, round((watch.every_epoch or 1) * steps_per_epoch))
    if every > steps:
        given = f"watch.every_steps is {every}" if watch.every_steps else f"watch.every_epoch is {watch.every_epoch}"
        raise UserError(f"{given}, but the run has {steps} steps: nothing would be watched. Give a smaller interval.")
    looked = list(forget)
    if watch.forget is not None:
        looked = _load(watch.forget, domain_column)
        known = {row_key(example) for example in forget}
        others = [example.index for example in looked if row_key(example) not in known]
        if others:
            raise UserError(
                f"{len(others)} of {len(looked)} rows of watch.forget ({watch.forget}) are not in the forget set, the "
                f"first being row {others[0]}: give the same questions and answers."
            )
        missing = [example.index for example in looked if not _rated(example)]
        if missing:
            raise UserError(
                f"Row {missing[0]} of watch.forget ({watch.forget}) lacks paraphrased_answer or perturbed_answer "
                f"({len(missing)} rows do): truth ratios need both. Leave watch.forget out to do without."
            )
    holdout: list[Example] = []
    if watch.holdout is not None:
        holdout = _load(watch.holdout, domain_column)
        remedy = "the holdout set must be unseen. Give other rows as watch.holdout."
        _apart("watch.holdout", holdout, "forget", forget, remedy)
        _apart("watch.holdout", holdout, "retain", retain, remedy)
        holdout = [holdout[i] for i in _draw(holdout, watch.holdout_rows, seed)]
    reference = None if watch.retain_records is None else _reference(watch.retain_records, looked)
    looked = [looked[i] for i in _draw(looked, watch.forget_rows, seed)]
    _enough(watch, looked, holdout)
    for name, rows in (("forget", looked), ("holdout", holdout)):
        if watch.replies and any(example.kind == "text" for example in rows):
            raise UserError(f"watch.replies needs questions, but the {name} rows are plain text: leave it out.")
    if watch.retain is not None:
        validation = load_examples(watch.retain)
        _apart("watch.retain", validation, "forget", forget, "they cannot be forgotten and kept. Give other rows.")
        _apart("watch.retain", validation, "retain", retain, "they would be trained on. Take them out of one.")
        validation = [validation[i] for i in _draw(validation, watch.retain_rows, seed)]
        return Watched(looked, validation, holdout, reference, every), list(retain)
    aside = set(_draw(retain, min(watch.retain_rows, len(retain) // VALIDATION_SHARE), seed))
    if not aside:
        raise UserError(
            f"The retain set has {len(retain)} rows, too few to set one in {VALIDATION_SHARE} aside for watching: "
            "give other retain rows as watch.retain."
        )
    validation = [example for i, example in enumerate(retain) if i in aside]
    left = [example for i, example in enumerate(retain) if i not in aside]
    return Watched(looked, validation, holdout, reference, every), left


def _reference(path: str, rows: Sequence[Example]) -> tofu.Reference:
    """The retrained model's truth ratios, refused unless they are of the very rows that are watched."""
    reference = tofu.read_reference(path)
    again = "evaluate the retrained model on the rows of watch.forget with `alter evaluate --json`, in strict mode"
    if reference.mode not in (None, "strict"):
        raise UserError(f"watch.retain_records: {path} was measured in {reference.mode} mode: {again}.")
    own = tofu.fingerprint([example.row for example in rows])
    if len(reference.truth_ratio) != len(rows) or reference.fingerprint not in (None, own):
        what = f" ({reference.split})" if reference.split else ""
        raise UserError(
            f"watch.retain_records: {path} holds truth ratios of {len(reference.truth_ratio)} rows{what} that are not "
            f"the {len(rows)} rows of watch.forget: {again}."
        )
    return reference


def _enough(watch: Watch, forget: Sequence[Example], holdout: Sequence[Example]) -> None:
    """Refuse a holdout rule whose rows cannot show what it asks, and one whose rows lack the score's answers."""
    if not isinstance(watch.rule, LikeUnseen):
        return
    if watch.rule.score == "truth_ratio" and not all(map(_rated, [*forget, *holdout])):
        raise UserError(
            "watch.rule.score truth_ratio needs paraphrased_answer and perturbed_answer in the rows of watch.forget "
            "and of watch.holdout. Take score loss, min_k or exact_memorization."
        )
    needed = rows_needed(len(forget), watch.rule.margin, watch.rule.level)
    if needed is None or len(holdout) < needed:
        n, m = len(forget), len(holdout)
        widest = float(stats.norm.ppf(1 - watch.rule.level) * np.sqrt((n + m + 1) / (12 * n * m)))
        both = next(k for k in range(1, 10**9) if (rows_needed(k, watch.rule.margin, watch.rule.level) or k + 1) <= k)
        wanted = f"{both} of each" if needed is None else f"at least {needed} holdout rows"
        margin = f", or a margin of {np.ceil(100 * widest) / 100:.2f} or more" if widest < 0.49 else ""
        raise UserError(
            f"watch.rule.margin {watch.rule.margin} cannot be resolved with {n} forget and {m} holdout rows: it takes "
            f"{wanted} (watch.forget_rows, watch.holdout_rows){margin}."
        )


COLUMNS = {
    "retain_probability": "retain",
    "forget_probability": "forget",
    "holdout_probability": "holdout",
    "forget_exact_memorization": "forget EM",
    "holdout_exact_memorization": "holdout EM",
    "forget_rouge": "forget ROUGE",
    "holdout_rouge": "holdout ROUGE",
    "forget_quality": "quality",
}
"""Metrics that a check shows if it has them: the plain name is the probability, EM exact memorisation."""


# Checks --------------------------------------------------------------------------------------------------------------


@contextmanager
def undisturbed() -> Iterator[None]:
    """Give every random number generator its state back after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class Watcher(TrainerCallback):
    """Makes the checks of a run, keeps the adapter of the best step in `folder`, and stops the training.

    The checks are entries of the trainer's log history under the key "watch"; nothing else is remembered.
    """

    def __init__(
        self, watch: Watch, watched: Watched, tokenizer: Any, *, max_length: int | None, folder: Path, device: Any
    ) -> None:
        """Encode the rows, and score the calibrating model if there is one.

        Raises:
            UserError: a row whose answer is cut off, or a calibrating model with another tokenizer.
        """
        self.watch, self.watched, self.tokenizer, self.folder = watch, watched, tokenizer, folder
        self.sets = {"forget": watched.forget, "retain": watched.retain, "holdout": watched.holdout}
        self.encoded: list[Encoded] = []
        self.where: dict[str, slice] = {}
        for name, rows in self.sets.items():
            self._add(name, [encode(tokenizer, row, max_length=max_length) for row in rows])
        for name in ("forget", "holdout"):
            rows = self.sets[name]
            if rows and all(map(_rated, rows)):
                answers = [[row.row["paraphrased_answer"], *row.row["perturbed_answer"]] for row in rows]
                if len({len(texts) for texts in answers}) > 1:
                    raise UserError(f"The {name} rows to watch have different numbers of perturbed answers.")
                texts = [(row, text) for row, own in zip(rows, answers, strict=True) for text in own]
                self._add(f"{name}_rated", [encode(tokenizer, r, answer=t, max_length=max_length) for r, t in texts])
        short = [i for i, row in enumerate(self.encoded) if sum(label != -100 for label in row.labels[1:]) < 2]
        if short:
            name = next(name for name, where in self.where.items() if where.start <= short[0] < where.stop)
            raise UserError(
                f"A {name.split('_')[0]} row to watch has less than two labelled tokens, too few to score: "
                "its answer is empty or cut off; take it out or raise max_length."
            )
        self.prompts = {
            name: [encode_prompt(tokenizer, row) for row in self.sets[name][: watch.replies]]
            for name in ("forget", "holdout")
        }
        self.key = digest(watch.model_dump(), [row.input_ids for row in self.encoded])
        self.base = self._calibration(max_length, device) if watch.calibrate else {}
        labels = tuple([str(row.domain) for row in self.sets[name]] for name in ("forget", "holdout"))
        self.groups = (labels[0], labels[1]) if all(len(set(names)) > 1 for names in labels) else None
        self.judge = watch.leak.hit.judge(torch.device(device)) if watch.leak.samples else None
        self.checks: list[dict[str, float]] = []
        self.seconds = 0.0

    def _add(self, name: str, rows: list[Encoded]) -> None:
        self.where[name] = slice(len(self.encoded), len(self.encoded) + len(rows))
        self.encoded += rows

    def _calibration(self, max_length: int | None, device: Any) -> dict[str, dict[str, Array]]:
        assert self.watch.calibrate is not None
        model, tokenizer = load_model(self.watch.calibrate, device=str(device))
        rows = {name: self.encoded[self.where[name]] for name in ("forget", "holdout")}
        for name, encoded in rows.items():
            if [encode(tokenizer, row, max_length=max_length) for row in self.sets[name]] != encoded:
                raise UserError(
                    f"watch.calibrate {self.watch.calibrate} writes the {name} rows in other tokens than the model "
                    "that must forget: give a model of the same tokenizer and chat template."
                )
        scores = {
            name: score(model, encoded, pad_token_id=tokenizer.pad_token_id, label=f"calibration, {name} rows").logprob
            for name, encoded in rows.items()
        }
        return {
            name: {"loss": metrics.mia_loss(part), "min_k": metrics.mia_min_k(part)} for name, part in scores.items()
        }

    def measure(self, model: Any) -> dict[str, float]:
        """Return the numbers of one check, from one scoring pass; the model's modes and all generators are as before.

        Args:
            model: a transformers model with the adapter's layers in it.
        """
        with undisturbed():
            scores = score(model, self.encoded, pad_token_id=self.tokenizer.pad_token_id, progress=False)
            replies = {
                name: generate(model, self.tokenizer, prompts, max_new_tokens=self.watch.reply_tokens, progress=False)
                for name, prompts in self.prompts.items()
                if prompts
            }
            found = None
            if self.judge is not None:
                found = leaked(
                    model, self.tokenizer, self.watched.forget, self.watch.leak, judge=self.judge, progress=False
                )
        out: dict[str, float] = {}
        if found is not None and found.rows:
            out |= {f"leak@{k}": float(found.at(k).mean()) for k in self.watch.leak.numbers}
        known: dict[str, dict[str, Array]] = {}
        for name, rows in self.sets.items():
            if not rows:
                continue
            own = scores[self.where[name]]
            loss = metrics.average_loss(own.logprob)
            right = metrics.exact_memorization(own.correct)
            out[f"{name}_loss"] = float(loss.mean())
            out[f"{name}_probability"] = float(metrics.probability(loss).mean())
            out[f"{name}_exact_memorization"] = float(right.mean())
            base = self.base.get(name, {})
            known[name] = {
                "loss": metrics.mia_loss(own.logprob) - base.get("loss", 0.0),
                "min_k": metrics.mia_min_k(own.logprob) - base.get("min_k", 0.0),
                "exact_memorization": 1 - right,
            }
            if f"{name}_rated" in self.where:
                rated = metrics.average_loss(scores[self.where[f"{name}_rated"]].logprob).reshape(len(rows), -1)
                known[name]["truth_ratio"] = metrics.truth_ratio(rated[:, 0], rated[:, 1:])
                closeness = metrics.closeness_to_one(known[name]["truth_ratio"])
                out[f"{name}_truth_ratio"] = float(closeness.mean())
        if self.watched.reference is not None:
            quality = metrics.forget_quality(known["forget"]["truth_ratio"], self.watched.reference.truth_ratio)
            out["forget_quality"], out["forget_quality_statistic"] = quality.pvalue, quality.statistic
        if "holdout" in known:
            for name in known["forget"].keys() & known["holdout"].keys():
                out[f"auc_{name}"], out[f"p_{name}"] = told_apart(
                    known["forget"][name], known["holdout"][name], self.groups
                )
        for name, texts in replies.items():
            truths = [row.answer.strip() for row in self.sets[name][: len(texts)]]
            out[f"{name}_rouge"] = float(metrics.rouge_l(truths, texts).recall.mean())
        return dict(sorted(out.items()))

    # The trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take up the checks that the checkpoint remembers, or make the first one, of the untouched model."""
        found = [entry["watch"] for entry in state.log_history if "watch" in entry]
        if any(check["key"] != self.key for check in found) or (state.global_step and not found):
            raise UserError(
                "The run was started with other settings of watch or other rows to look at, so its checks cannot be "
                "continued: resume with the recipe in its run.yaml, or start again with --overwrite."
            )
        self.checks = [{name: value for name, value in check.items() if name != "key"} for check in found]
        if not self.checks:
            self._check(state, model)
            reason = self.watch.rule.refuse(self.checks[0]) if isinstance(self.watch.rule, _Guarded) else None
            if reason is not None:
                raise UserError(reason)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check if it is time, keep the adapter if it is the best so far, and stop if the rule says so."""
        due = state.global_step % self.watched.every == 0 or state.global_step == state.max_steps
        if due and not self.stopped and self.checks[-1]["step"] < state.global_step:
            self._check(state, model)
            if self.verdict.step == state.global_step:
                self._keep(model, state.global_step)
            self._say(state.max_steps)
        if self.stopped:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once a checkpoint knows of the best step, the adapters of others are of no use."""
        if len(self.checks) > 1 and processes.first():
            for path in self.folder.glob("step-*"):
                if path.name != f"step-{self.verdict.step}":
                    shutil.rmtree(path)

    @property
    def verdict(self) -> Verdict:
        """What the rule says of the checks so far; there must be one after step 0."""
        return self.watch.rule.judge(self.checks)

    @property
    def stopped(self) -> bool:
        """Whether the rule has ended the training."""
        return self.watch.stop and len(self.checks) > 1 and self.verdict.stop

    def _check(self, state: Any, model: Any) -> None:
        started = time.time()
        # the inner model: what wraps it for training (autocast) must not change the numbers
        numbers = self.measure(model.get_base_model())
        check = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4), **numbers}
        state.log_history.append({"step": state.global_step, "watch": {**check, "key": self.key}})
        self.checks.append(check)
        self.seconds += time.time() - started

    def _keep(self, model: Any, step: int) -> None:
        if not processes.first():
            return
        partial, final = self.folder / ".partial", self.folder / f"step-{step}"
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(str(partial))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)

    def _say(self, steps: int) -> None:
        from tqdm import tqdm

        check, verdict = self.checks[-1], self.verdict
        words = [f"{label} {check[name]:.3g}" for name, label in self._columns().items()]
        end = "; the rule is satisfied, training ends" if self.stopped else ""
        tqdm.write(
            f"step {int(check['step'])}/{steps}: {', '.join(words)}; best so far step {verdict.step}{end}",
            file=sys.stderr,
        )

    def _columns(self) -> dict[str, str]:
        """The metrics that are shown, by name, and what they are called there."""
        score = getattr(self.watch.rule, "score", "loss")
        shown = {f"auc_{score}": f"AUC {score}", f"p_{score}": "p"}
        shown |= {f"leak@{k}": f"leak@{k}" for k in self.watch.leak.numbers[-1:]}
        return {name: label for name, label in (COLUMNS | shown).items() if name in self.checks[0]}

    # After training

    def restore_best(self, model: Any) -> dict[str, Any]:
        """Give the model the weights of the step to keep, show the checks, and return them with the verdict.

        Raises:
            UserError: the adapter of that step is gone.
        """
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        # what the first process keeps must be there
        processes.gather(None)
        verdict = self.verdict
        path = self.folder / f"step-{verdict.step}" / "adapter_model.safetensors"
        if not path.is_file():
            raise UserError(f"The adapter of the best step is gone: no {path}. Start again with --overwrite.")
        set_peft_model_state_dict(model, load_file(str(path)))
        self._show(verdict)
        return {
            "kept": asdict(verdict),
            "stopped_early": self.stopped,
            "seconds": round(self.seconds, 2),
            "rows": {name: len(rows) for name, rows in self.sets.items() if rows},
            "groups": self.groups and [len(set(names)) for names in self.groups],
            "checks": self.checks,
        }

    def _show(self, verdict: Verdict) -> None:
        from rich.console import Console
        from rich.table import Table

        shown = Table(title=f"Watched: step {verdict.step} is kept, {verdict.why}")
        columns = self._columns()
        for label in ("step", *columns.values()):
            shown.add_column(label, justify="right", overflow="fold")
        for check in self.checks:
            values = (f"{check[name]:.2g}" if check[name] < 0.001 else f"{check[name]:.3f}" for name in columns)
            shown.add_row(str(int(check["step"])), *values, style="bold" if check["step"] == verdict.step else None)
        Console(stderr=True).print(shown)
