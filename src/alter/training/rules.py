"""Rules for which step of a watched run to keep and when to stop, and the statistical test behind one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from alter import metrics
from alter.core import UserError
from alter.settings import Count

if TYPE_CHECKING:
    import numpy.typing as npt

Check = Mapping[str, float]
"""What was measured at one step: `step`, `epoch` and one number per metric."""


@dataclass(frozen=True)
class Decision:
    """Which step a rule keeps, whether that step satisfies it, whether training may end, and the reason in words.

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

    def check_rows(self, forget: int, holdout: int, rated: bool) -> None:
        """Refuse rows that the rule cannot decide with.

        Args:
            forget, holdout: how many rows are watched.
            rated: whether all of them have paraphrased and perturbed answers.

        Raises:
            UserError: they are too few to resolve the margin, or lack the score's answers.
        """

    def refuse(self, start: Check) -> str | None:
        """Return why the rule is meaningless for a model that starts like this, or None."""
        return None


class KeepLast(_Rule):
    """Keep the last step and never stop early."""

    kind: Literal["none"] = "none"

    def judge(self, checks: Sequence[Check]) -> Decision:
        """Return the last of the checks."""
        return Decision(int(checks[-1]["step"]), True, False, "the last step: no rule was chosen")


class Guarded(_Rule, ABC):
    """Base of the rules that a broken model must not satisfy.

    A check is allowed if U >= (1 - utility_loss) U_0, with U the mean probability of the answers of retain rows that
    were not trained on, and U_0 that of the untouched model. If no check is allowed, the one of largest U is kept.
    """

    utility_loss: float = Field(0.05, ge=0, lt=1)
    """Share of the probability of unseen retain rows that may be lost."""
    patience: Count = Field(0, ge=0)
    """Stop after so many further checks without a better one."""

    def allows(self, check: Check, start: Check) -> bool:
        """Tell whether the check's utility is close enough to the untouched model's."""
        return check["retain_probability"] >= (1 - self.utility_loss) * start["retain_probability"]

    def _choice(self, checks: Sequence[Check], rank: Sequence[tuple[float, ...]], met: Sequence[bool]) -> Decision:
        """Keep the check of lowest rank, the earliest on a tie; the first check is the untouched model's."""
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
        return Decision(int(best["step"]), good, good and waited >= self.patience, why)

    @abstractmethod
    def _why(self, best: Check, good: bool) -> str:
        """Say in words why the kept check is the best one."""


class LikeRetrained(Guarded):
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

    def judge(self, checks: Sequence[Check]) -> Decision:
        """Return which of the checks to keep; the first one must be that of step 0."""
        rank = [(check["forget_quality_statistic"],) for check in checks[1:]]
        return self._choice(checks, rank, [check["forget_quality"] >= self.level for check in checks[1:]])

    def refuse(self, start: Check) -> str | None:
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


class LikeUnseen(Guarded):
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

    def judge(self, checks: Sequence[Check]) -> Decision:
        """Return which of the checks to keep; the first one must be that of step 0."""
        state = [self._state(check) for check in checks[1:]]
        rank = [
            (float(rest), abs(check[f"auc_{self.score}"] - 0.5)) for check, rest in zip(checks[1:], state, strict=True)
        ]
        return self._choice(checks, rank, [rest == 0 for rest in state])

    def _state(self, check: Check) -> int:
        """Return 0 for a satisfied check, 1 for an over-forgotten one, 2 for one that still knows the forget rows."""
        auc = check[f"auc_{self.score}"]
        if auc > 0.5 + self.margin or check[f"p_{self.score}"] < self.level:
            return 2
        return 1 if auc < 0.5 - self.margin else 0

    def check_rows(self, forget: int, holdout: int, rated: bool) -> None:
        if self.score == "truth_ratio" and not rated:
            raise UserError(
                "`watch.rule.score` truth_ratio needs paraphrased_answer and perturbed_answer in the rows of `watch.forget` "
                "and of `watch.holdout`. Take score loss, min_k or exact_memorization."
            )
        from scipy import stats

        needed = rows_needed(forget, self.margin, self.level)
        if needed is None or holdout < needed:
            n, m = forget, holdout
            widest = float(stats.norm.ppf(1 - self.level) * np.sqrt((n + m + 1) / (12 * n * m)))
            both = next(k for k in range(1, 10**9) if (rows_needed(k, self.margin, self.level) or k + 1) <= k)
            wanted = f"{both} of each" if needed is None else f"at least {needed} holdout rows"
            margin = f", or a margin of {np.ceil(100 * widest) / 100:.2f} or more" if widest < 0.49 else ""
            raise UserError(
                f"`watch.rule.margin` {self.margin} cannot be resolved with {n} forget and {m} holdout rows: it takes "
                f"{wanted} (`watch.forget_rows`, `watch.holdout_rows`){margin}."
            )

    def refuse(self, start: Check) -> str | None:
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
    """Return how many holdout rows resolve the margin beside `forget` rows, or None if no number does.

    With AUC 1/2 + 2 margin, the measured AUC must exceed 1/2 + margin with probability 1 - level: the standard error
    sqrt((n + m + 1) / (12 n m)) of the AUC must be at most margin / z, z the normal quantile of 1 - level.
    """
    from scipy import stats

    bound = (margin / stats.norm.ppf(1 - level)) ** 2
    rest = 12 * forget * bound - 1
    return None if rest <= 0 else int(np.ceil((forget + 1) / rest))


def told_apart(
    forget: npt.ArrayLike, holdout: npt.ArrayLike, groups: tuple[Sequence[str], Sequence[str]] | None = None
) -> tuple[float, float]:
    """Test whether forget rows are better known than holdout rows; return AUC and p-value.

    Args:
        forget, holdout: scores, larger for rows that are less known, [n] and [m].
        groups: to which group (author, request) each forget and each holdout row belongs: rows of a group resemble
            each other, so that there is less evidence than rows. None: all rows are independent.

    Returns:
        `metrics.membership.auc`, and the p-value of a one-sided test of AUC > 1/2. Without groups Mann-Whitney's (normal
        approximation with continuity and tie correction); with groups that of (AUC - 1/2) / s.e. under Student's t,
        with the standard error of clustered data (Obuchowski 1997, Biometrics 53:567, equal to DeLong's for groups of
        one) and as many degrees of freedom as there are groups, less two. 1/2 and 1 if all scores are equal.

    Raises:
        ValueError: either side is empty or holds NaN, or has rows of a single group.
    """
    from scipy import stats

    auc = metrics.membership.auc(forget, holdout)
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
