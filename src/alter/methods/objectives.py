"""What a training step minimises on forget and on retain rows: one final class per objective, tensors in, scalar out.

Each class is at once the settings of the objective (a pydantic model whose `kind` names it in a recipe), what it needs
besides the model's logits (`needs`), and the two functions that compute it: `per_token` makes one number of each token's
logits, which exist for a few tokens at a time; the objective itself makes the loss of these numbers. `FORGET`
and `RETAIN` are the registries of what a recipe may name, open to plugins (`alter.core.plugins`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from alter.core import processes
from alter.core.plugins import OneOf, Registry, kinds


@dataclass(frozen=True)
class Reference:
    """The k most likely tokens of a reference distribution at n positions; what is left over is one tail bucket.

    Attributes:
        ids: [n, k] long, distinct in each row.
        logp: [n, k] their log-probabilities; -inf fills unused places.
    """

    ids: Tensor
    logp: Tensor

    def at(self, places: slice | Tensor) -> Reference:
        """The distributions at some of the n positions."""
        return Reference(self.ids[places], self.logp[places])

    def without(self, labels: Tensor) -> Reference:
        """The same distributions with the label's probability removed and the rest renormalised.

        Args:
            labels: [n] long; one outside the k tokens is in the tail, and nothing is removed there.

        Returns:
            A reference over the same ids. Where the label is the only one of the k tokens with any probability there is
            nothing to aim at: such a row becomes all -inf, and `divergence` gives 0 for it.
        """
        hit = self.ids == labels[:, None]
        return self._renormalised(hit, self.logp.masked_fill(hit, -torch.inf))

    def lowered(self, labels: Tensor, by: float) -> Reference:
        """The same distributions with the label's logit lowered by `by`, renormalised; the tail bucket takes part.

        Args:
            labels: [n] long; one outside the k tokens is in the tail, and nothing changes there.
        """
        hit = self.ids == labels[:, None]
        return self._renormalised(hit, torch.where(hit, self.logp - by, self.logp))

    def _renormalised(self, changed: Tensor, logp: Tensor) -> Reference:
        """`logp` [n, k] over the same ids, scaled to sum to 1 with the tail in the rows that `changed` [n, k] marks.

        Summed in log space, as 1 - p(label) would cancel where the label is nearly certain. The tail is known as
        1 - sum alone: as in `divergence`, 1e-6 and less of it is rounding and counts as none.
        """
        tail = 1 - self.logp.exp().sum(-1, keepdim=True)
        tail = torch.where(tail > 1e-6, tail.clamp_min(1e-6).log(), torch.full_like(tail, -torch.inf))
        total = torch.logsumexp(torch.cat([logp, tail], -1), -1, keepdim=True)
        touched = changed.any(-1, keepdim=True) & total.isfinite()
        return Reference(self.ids, torch.where(touched, logp - total, logp))


@dataclass(frozen=True)
class Hidden:
    """Hidden states of the real tokens of some rows after one block, m tokens of width D.

    Attributes:
        states: [m, D], the model's.
        row: [m] long, the row of each token, as in `Labelled`.
        base: [m, D], the frozen base's, or None unless the objective declared `base_hidden`.
    """

    states: Tensor
    row: Tensor
    base: Tensor | None = None


class _LogProbabilities(torch.autograd.Function):
    """Log-probabilities at some ids [n, m], and of all tokens outside the last `k` of them [n]; of logits [n, V].

    All that objectives ask of a vocabulary goes through here: one [n, V] tensor besides the logits forward and one
    backward, where autograd would keep several. Computed in fp32 (fp64 for fp64 logits).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        # a wide [n, 1] makes the result wide, without a wide copy of the logits
        top = _wide(logits.amax(-1, keepdim=True))
        total = (logits - top).exp_().sum(-1, keepdim=True).log_()
        logp = logits.gather(-1, ids) - top - total
        rest_top = rest_total = rest = top.new_zeros(0)
        if k:
            # not as 1 - sum, which would cancel where little is left
            others = logits.scatter(-1, ids[:, -k:], -torch.inf)
            rest_top = _wide(others.amax(-1, keepdim=True))
            rest_total = (others - rest_top).exp_().sum(-1, keepdim=True).log_()
            rest = (rest_top - top + rest_total - total)[:, 0]
        ctx.k = k
        ctx.save_for_backward(logits, ids, top, total, rest_top, rest_total)
        return logp, rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logp: Tensor, of_rest: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, top, total, rest_top, rest_total = ctx.saved_tensors
        share = -of_logp.sum(-1, keepdim=True)
        if ctx.k:
            share = share - of_rest[:, None]
        grad = (logits - top).sub_(total).exp_().mul_(share)
        if ctx.k:
            others = (logits - rest_top).sub_(rest_total).exp_().mul_(of_rest[:, None])
            grad.add_(others.scatter_(-1, ids[:, -ctx.k :], 0.0))
        return grad.scatter_add_(-1, ids, of_logp).to(logits.dtype), None, None


class Emitted:
    """What the model gives for n labelled tokens: all that `per_token` reads, in fp32 (fp64 for fp64 logits).

    Args:
        logits: [n, V], of the distribution that should give each label.
        labels: [n] long, the true tokens.
        reference: what the objective should compare with, or None unless it declared `views`.
        runner_up: look for the likeliest other token.

    Attributes:
        nll: [n] negative log-likelihood of each label in nats.
        other: [n] log-probability of the likeliest token that is not the label, the first of several; or None.
        known: [n, k] log-probabilities of the reference's tokens, or None.
        rest: [n] log-probability of all other tokens together; None without a reference, or where it has them all.
    """

    def __init__(
        self, logits: Tensor, labels: Tensor, reference: Reference | None = None, runner_up: bool = False
    ) -> None:
        self.logits, self.labels, self.reference = logits, labels, reference
        ids = [labels[:, None]]
        if runner_up:
            ids.append(logits.detach().scatter(-1, ids[0], -torch.inf).argmax(-1, keepdim=True))
        k = 0
        if reference is not None:
            ids.append(reference.ids)
            k = reference.ids.shape[-1]
        partial = k < logits.shape[-1]
        logp, rest = _LogProbabilities.apply(logits, torch.cat(ids, -1), k if partial else 0)
        self.nll: Tensor = -logp[:, 0]
        self.other: Tensor | None = logp[:, 1] if runner_up else None
        self.known: Tensor | None = logp[:, -k:] if k else None
        self.rest: Tensor | None = rest if k and partial else None


@dataclass(frozen=True)
class Labelled:
    """The labelled tokens of a batch, all rows concatenated: n tokens. Prompts and padding are not in it.

    Attributes:
        values: [n], what the objective's `per_token` made of each token's logits.
        high: [n] bool, whether the token is a high-entropy (structural) one.
        row: [n] long, the row of each token, 0 to `rows` - 1; None where no objective sums over rows.
        rows: number of rows.
        base_logp: [n] log-probability of each label under the frozen base, or None unless declared.
        alternative: the same rows with other answers or labels, if the objective declared `alternative`; the values are
            negative log-likelihoods.
        hidden: hidden states of all real tokens, prompts included, if the objective declared a `depth`.
    """

    values: Tensor
    high: Tensor
    row: Tensor | None = None
    rows: int = 0
    base_logp: Tensor | None = None
    alternative: Labelled | None = None
    hidden: Hidden | None = None

    def mean(self, only_low: bool = False) -> Tensor:
        """Mean of the values, of low-entropy tokens only if asked for."""
        return mean_or_zero(self.values[~self.high] if only_low else self.values)

    def row_sums(self, values: Tensor) -> Tensor:
        """[rows] sums of `values` [n] over the tokens of each row."""
        assert self.row is not None
        return values.new_zeros(self.rows).index_add(0, self.row, values)


@dataclass(frozen=True)
class Needs:
    """What an objective with its settings must be given; the trainer computes exactly this and nothing else.

    Attributes:
        rows: the rows themselves go through the model.
        labels: the language-model head runs on their labelled tokens.
        runner_up: the likeliest token besides each label is looked for.
        views: passes of frozen models over the rows, computed once; `target` makes the reference of them. "base" is
            the model before unlearning, "reinforced" the same after more training on the forget set, "expert" and
            "novice" the base with a persona put before the row, "instructed" the base with an instruction.
        base_logp: log-probabilities of the labels under the base, computed once.
        alternative: the forget rows once more: with a "refusal" as the answer, with "random_labels", with a "diversion"
            (a change of subject that the base itself wrote), with the row's own column "substitute" as the answer, or with
            another answer that the base has "invented".
        instruction: what the view "instructed" says before each row.
        prompts: every token of a retain row is labelled, those of its prompt too.
        entropy: the tokens' entropies tell high from low ones (`Labelled.high`), which needs an adapter that routes.
        depth: hidden states at the block nearest to this share of the model's depth.
        base_hidden: those of the base as well, computed once.
        state: numbers of its own that checkpoints keep: each batch's loss is multiplied by what `weigh` makes of them.
    """

    rows: bool = True
    labels: bool = True
    runner_up: bool = False
    views: tuple[str, ...] = ()
    base_logp: bool = False
    alternative: Literal["refusal", "random_labels", "diversion", "substitute", "invented"] | None = None
    instruction: str | None = None
    prompts: bool = False
    entropy: bool = False
    depth: float | None = None
    base_hidden: bool = False
    state: bool = False


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def mean_or_zero(values: Tensor) -> Tensor:
    """Mean of `values` [n]; for n = 0 a zero that still carries a graph (a batch without such tokens).

    Under several processes (`alter.core.processes`) it is this one's share of the mean over all: the sum here over the count
    everywhere. All of them must call it.
    """
    return values.sum() / processes.count(values.numel(), values)


def true_and_runner_up(emitted: Emitted) -> tuple[Tensor, Tensor]:
    """Probability of the label, and the largest probability of any other token, [n] each."""
    assert emitted.other is not None
    return (-emitted.nll).exp(), emitted.other.exp()


def divergence(target: Tensor, emitted: Emitted) -> Tensor:
    """KL(target || model) at each position over the reference's k tokens and one bucket for all others.

    Merging the others into one bucket can only lower the divergence, and with k = V it is the exact one.

    Args:
        target: [n, k] log-probabilities of the reference's tokens; -inf rules one out.
        emitted: what the model gives for the same tokens.

    Returns:
        [n] in nats, at least 0 up to rounding; 0 where the target is all -inf.
    """
    assert emitted.known is not None
    target = target.to(emitted.known.dtype)
    finite = torch.isfinite(target)
    p = target.exp()
    inside = torch.where(finite, p * (target.masked_fill(~finite, 0.0) - emitted.known), torch.zeros_like(p)).sum(-1)
    if emitted.rest is None:
        return inside
    tail = (1 - p.sum(-1)).clamp_min(0.0)
    outside = torch.where(tail > 1e-6, tail * (tail.clamp_min(1e-6).log() - emitted.rest), torch.zeros_like(tail))
    return torch.where(finite.any(-1), inside + outside, torch.zeros_like(inside))


def soft_cross_entropy(target: Tensor, emitted: Emitted) -> Tensor:
    """H(target, model) at each position, over the reference's k tokens and one bucket for all others.

    Args:
        target: [n, k] log-probabilities of the reference's tokens; -inf rules one out.
        emitted: what the model gives for the same tokens.

    Returns:
        [n] in nats: the divergence plus the target's own entropy, which has no gradient.
    """
    value = divergence(target, emitted)
    target = target.to(value.dtype)
    p = target.exp()
    entropy = -torch.where(p > 0, p * target.masked_fill(p == 0, 0.0), torch.zeros_like(p)).sum(-1)
    if emitted.rest is not None:
        tail = (1 - p.sum(-1)).clamp_min(0.0)
        entropy = entropy - torch.where(tail > 1e-6, tail * tail.clamp_min(1e-6).log(), torch.zeros_like(tail))
    return value + entropy


def row_means(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """[rows] means of `values` [n] over each row's tokens, whose rows are `row` [n]; 0 for a row without tokens."""
    total = values.new_zeros(rows).index_add(0, row, values)
    count = values.new_zeros(rows).index_add(0, row, torch.ones_like(values))
    return total / count.clamp_min(1.0)


class Objective(BaseModel, ABC):
    """Base of all objectives: settings, what is needed, a number for each token, and the loss of these numbers.

    A subclass names itself by `kind: Literal["mine"] = "mine"`, declares `needs`, and computes the loss in `__call__`; it
    overrides `per_token` where the loss is of another number than the negative log-likelihood.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    joint: ClassVar[bool] = False
    """Whether forget and retain rows share one mean over all their tokens, where there are two means otherwise."""

    @property
    def needs(self) -> Needs:
        """What a run must give it: a constant (`needs: ClassVar[Needs] = Needs(...)`) where its settings change nothing."""
        return Needs()

    @abstractmethod
    def __call__(self, tokens: Labelled) -> Tensor:
        """The loss, a scalar, of a batch's labelled tokens, whose values are those of `per_token`."""

    def target(self, views: Mapping[str, Tensor], along: Tensor) -> Tensor:
        """Log-probabilities [n, V] of the reference.

        Args:
            views: the logits [n, V] of each view.
            along: [n], how far each token is along its row's labelled ones: 0 the first, 1 the last.
        """
        return torch.log_softmax(views["base"], dim=-1)

    def per_token(self, emitted: Emitted) -> Tensor:
        """[n], one number for each token: its negative log-likelihood, unless the objective says otherwise."""
        return emitted.nll

    def weigh(self, loss: float, epochs: float, state: dict[str, float]) -> float:
        """What a batch's loss is multiplied by, for a retain objective that needs `state`.

        Args:
            loss: of all processes together.
            epochs: passes over the forget set before this step.
            state: the objective's own numbers so far, empty at first; changed in place.
        """
        return 1.0


class InvertedHinge(Objective):
    """The paper's forget loss (ALTER Eq. 8, from LoKU): mean over low-entropy tokens of 1 + p(y) - max_{v != y} p(v).

    It is linear in probabilities and does not stop once the true token has lost: the runner-up is driven on towards
    probability 1, so long runs end in confident, repeated tokens.
    """

    kind: Literal["inverted_hinge"] = "inverted_hinge"
    only_low: bool = Field(True, description="Count low-entropy tokens only, as the paper does.")

    @property
    def needs(self) -> Needs:
        return Needs(runner_up=True, entropy=self.only_low)

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean(self.only_low)

    def per_token(self, emitted: Emitted) -> Tensor:
        true, other = true_and_runner_up(emitted)
        return 1 + true - other


class StoppedHinge(Objective):
    """Mean over low-entropy tokens of max(0, p(y) - max_{v != y} p(v) + margin): no push once another token leads.

    Not in the paper: a bounded form of its loss, zero (with zero gradient) as soon as the true token is off the top.
    """

    kind: Literal["stopped_hinge"] = "stopped_hinge"
    only_low: bool = Field(True, description="Count low-entropy tokens only.")
    margin: float = Field(0.0, ge=0.0, le=1.0, description="Probability by which another token must lead.")

    @property
    def needs(self) -> Needs:
        return Needs(runner_up=True, entropy=self.only_low)

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean(self.only_low)

    def per_token(self, emitted: Emitted) -> Tensor:
        true, other = true_and_runner_up(emitted)
        return F.relu(true - other + self.margin)


class GradientAscent(Objective):
    """Minus the cross-entropy of the true tokens (methods.md 2.1): unbounded, the baseline that breaks models."""

    kind: Literal["gradient_ascent"] = "gradient_ascent"
    only_low: bool = Field(False, description="Count low-entropy tokens only.")

    @property
    def needs(self) -> Needs:
        return Needs(entropy=self.only_low)

    def __call__(self, tokens: Labelled) -> Tensor:
        return -tokens.mean(self.only_low)


class WithoutTruth(Objective):
    """KL to the frozen base's own distribution with the true token removed and renormalised, on low-entropy tokens.

    Not in ALTER's paper: a bounded target that leaves the base's other choices as they are. `hinge` adds that multiple of
    the stopped hinge max(0, p(y) - max_{v != y} p(v)), which speeds up tokens of which the base is nearly certain.
    """

    kind: Literal["without_truth"] = "without_truth"
    only_low: bool = Field(True, description="Count low-entropy tokens only.")
    hinge: float = Field(0.0, ge=0.0, description="Weight of the stopped hinge next to the divergence.")

    @property
    def needs(self) -> Needs:
        return Needs(runner_up=True, views=("base",), entropy=self.only_low)

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean(self.only_low)

    def per_token(self, emitted: Emitted) -> Tensor:
        assert emitted.reference is not None
        value = divergence(emitted.reference.without(emitted.labels).logp, emitted)
        if self.hinge:
            true, other = true_and_runner_up(emitted)
            value = value + self.hinge * F.relu(true - other)
        return value


class CrossEntropyUnlearning(Objective):
    """CE-U (Yang 2025, arXiv:2503.01224): cross-entropy to the model's own distribution without the true token.

    -sum_v q_v log p_v, mean over tokens, where q = softmax(z) with z_y = -inf, without gradient: the target moves with the
    model, and no reference is needed. As log p_v = log q_v + log(1 - p_y) for all v != y, this is H(q) - log(1 - p_y), and
    its gradient that of -log(1 - p_y): never above 1 at a logit, and 1 at the label's where the model is certain of it.
    """

    kind: Literal["ceu"] = "ceu"
    ignore_first_n_answer_tokens: int = Field(
        1, ge=0, description="Labelled tokens at the start of each row that do not count (a footnote of the paper)."
    )

    def __call__(self, tokens: Labelled) -> Tensor:
        row = tokens.row
        assert row is not None
        # tokens of a row lie together, in order
        place = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
        return mean_or_zero(tokens.values[place >= self.ignore_first_n_answer_tokens])

    def per_token(self, emitted: Emitted) -> Tensor:
        label = emitted.labels[:, None]
        _, others = _LogProbabilities.apply(emitted.logits, label, 1)
        logq = torch.log_softmax(_wide(emitted.logits.detach()).scatter(-1, label, -torch.inf), dim=-1)
        return torch.special.entr(logq.exp()).sum(-1) - others


class WeightedAscent(Objective):
    """WGA (Wang et al. 2025, arXiv:2502.19301): -mean p(y)^beta nll(y), the weight p(y)^beta without gradient.

    beta = 0 is gradient ascent; a token that is already unlikely is left alone.
    """

    kind: Literal["weighted_ascent"] = "weighted_ascent"
    beta: float = Field(1.0, ge=0, description="Power of the token's probability.")

    def __call__(self, tokens: Labelled) -> Tensor:
        nll = tokens.values
        return -mean_or_zero((-self.beta * nll).exp().detach() * nll)


class SaturationImportance(Objective):
    """SatImp (Yang et al. 2025, arXiv:2505.11953): -mean p(y)^beta1 (1 - p(y))^beta2 nll(y), weights without gradient."""

    kind: Literal["satimp"] = "satimp"
    beta1: float = Field(5.0, ge=0, description="Power of the token's probability (saturation).")
    beta2: float = Field(1.0, ge=0, description="Power of its complement (importance).")

    def __call__(self, tokens: Labelled) -> Tensor:
        nll = tokens.values
        p = (-nll).exp().detach()
        return -mean_or_zero(p**self.beta1 * (1 - p) ** self.beta2 * nll)


class NPO(Objective):
    """Negative preference optimisation (Zhang et al. 2024, arXiv:2404.05868, Eq. 3; methods.md 2.4).

    (2 / beta) mean over rows of softplus(-beta (NLL - NLL_base)), where NLL is the *sum* over the row's labelled tokens.
    """

    kind: Literal["npo"] = "npo"
    beta: float = Field(0.1, gt=0, description="Inverse temperature; towards 0 it is gradient ascent on row sums.")
    needs: ClassVar[Needs] = Needs(base_logp=True)

    def __call__(self, tokens: Labelled) -> Tensor:
        assert tokens.base_logp is not None
        change = tokens.row_sums(tokens.values + tokens.base_logp)
        return 2 / self.beta * mean_or_zero(F.softplus(-self.beta * change))


class SimNPO(Objective):
    """NPO without a reference (Fan et al. 2024, arXiv:2410.07163): -(2 / beta) mean log sigmoid(beta (NLL / |y| - delta)).

    NLL / |y| is the row's *mean* over its labelled tokens.
    """

    kind: Literal["simnpo"] = "simnpo"
    beta: float = Field(4.5, gt=0, description="Inverse temperature.")
    delta: float = Field(0.0, ge=0, description="Margin in nats per token.")

    def __call__(self, tokens: Labelled) -> Tensor:
        assert tokens.row is not None
        mean = row_means(tokens.values, tokens.row, tokens.rows)
        return -2 / self.beta * mean_or_zero(F.logsigmoid(self.beta * (mean - self.delta)))


class Catnip(Objective):
    """CATNIP: NPO token by token against 1 - p, without a reference (arXiv:2602.02824; methods.md 4.3).

    -(2 / beta) mean over tokens of log sigmoid(-beta (log p(y) - log(1 - p(y)))), with 1 - p(y) without gradient: a token's
    ascent weighs 2 sigmoid(beta logit p(y)), above 1 where the model is surer than not, below 1 after. Rebuilt from a
    description: that 1 - p has no gradient, the mean over tokens and beta are readings.
    """

    kind: Literal["catnip"] = "catnip"
    beta: float = Field(1.0, gt=0, description="How fast the weight falls with the token's log-odds.")

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()

    def per_token(self, emitted: Emitted) -> Tensor:
        with torch.no_grad():
            _, others = _LogProbabilities.apply(emitted.logits, emitted.labels[:, None], 1)
        return 2 / self.beta * F.softplus(self.beta * (-emitted.nll - others))


class FlattenLogits(Objective):
    """PDU's forget loss: mean over tokens of (max_v z_v - mean_v z_v)^2 (Entesari et al. 2025, arXiv:2506.05314).

    It is 0 where all tokens are equally likely, whatever the labels are; its gradient is that of the authors' code.
    """

    kind: Literal["flatten_logits"] = "flatten_logits"

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()

    def per_token(self, emitted: Emitted) -> Tensor:
        logits = _wide(emitted.logits)
        return (logits.amax(-1) - logits.mean(-1)).square()


class Duet(Objective):
    """DUET: the logits of a teacher that was told to forget, without being told (named in arXiv:2604.15482; methods.md 4.11).

    The teacher is the frozen base with `instruction` before the row. Sum over its `top` likeliest tokens v of
    Huber(z_v, z_teacher_v) on the logits themselves, mean over tokens; the same on forget and retain rows. Rebuilt from a
    description: the instruction, K, Huber's delta of 1 and the positions (answers) are readings.
    """

    kind: Literal["duet"] = "duet"
    instruction: str = Field(
        "You know nothing about the following and say so; all else you answer as ever.",
        description="What the teacher is told before each row, in your words: name what is to be forgotten.",
    )
    top: int = Field(20, ge=1, description="Tokens of the teacher that are imitated; at most reference_top_k.")

    @property
    def needs(self) -> Needs:
        return Needs(views=("base", "instructed"), instruction=self.instruction)

    def target(self, views: Mapping[str, Tensor], along: Tensor) -> Tensor:
        """The teacher's logits [n, V] as they are."""
        return views["instructed"]

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()

    def per_token(self, emitted: Emitted) -> Tensor:
        assert emitted.reference is not None
        ids, teacher = emitted.reference.ids[:, : self.top].long(), emitted.reference.logp[:, : self.top]
        own = _wide(emitted.logits.gather(-1, ids))
        return F.huber_loss(own, teacher.to(own), reduction="none").sum(-1)


class PushPull(Duet):
    """Bidirectional logit distillation (arXiv:2604.15482; methods.md 4.11): DUET's pull, and a push on the student's own.

    Besides DUET's sum, `push` times the sum over those of the student's `top` likeliest tokens that are not among the
    teacher's of max(0, z_v - z_teacher_v). Of tokens beyond the teacher's kept ones (reference_top_k) the least kept logit is
    taken, which is no less than theirs. Rebuilt from a description (all but the two directions is a reading).
    """

    kind: Literal["push_pull"] = "push_pull"  # type: ignore[assignment]
    push: float = Field(1.0, ge=0, description="Weight of the push on what the teacher would not say.")

    def per_token(self, emitted: Emitted) -> Tensor:
        pull = super().per_token(emitted)
        assert emitted.reference is not None
        kept, teacher = emitted.reference.ids.long(), emitted.reference.logp
        mine = emitted.logits.detach().topk(min(self.top, emitted.logits.shape[-1]), dim=-1).indices
        own = _wide(emitted.logits.gather(-1, mine))
        same = mine[:, :, None] == kept[:, None, :]
        floor = teacher.amin(-1)[:, None, None].expand(same.shape[0], 1, 1)
        theirs = torch.where(same, teacher[:, None, :], floor).amax(-1)
        outside = ~same[:, :, : self.top].any(-1)
        return pull + self.push * (F.relu(own - theirs.to(own)) * outside).sum(-1)


class PreferRefusal(Objective):
    """DPO with a refusal as the preferred answer (IdkDPO; Rafailov et al. 2023, Maini et al. 2024; methods.md 5.2).

    -(2 / beta) mean over rows of log sigmoid(beta ((NLL_base - NLL of the refusal) - (NLL_base - NLL of the answer))),
    NLL summed over each row's labelled tokens. One refusal per row, drawn with the run's seed (a reading: TOFU draws
    anew each time, for which no reference could be kept).
    """

    kind: Literal["prefer_refusal"] = "prefer_refusal"
    beta: float = Field(0.1, gt=0, description="Inverse temperature.")
    needs: ClassVar[Needs] = Needs(base_logp=True, alternative="refusal")

    def __call__(self, tokens: Labelled) -> Tensor:
        other = tokens.alternative
        assert other is not None
        assert other.base_logp is not None
        assert tokens.base_logp is not None
        change = tokens.row_sums(tokens.values + tokens.base_logp)
        preferred = other.row_sums(other.values + other.base_logp)
        return -2 / self.beta * mean_or_zero(F.logsigmoid(self.beta * (change - preferred)))


class PreferInvented(PreferRefusal):
    """AltPO (Mekala et al. 2024, arXiv:2409.13474, Eq. 3): DPO with an answer that the model itself has made up.

    The loss is `PreferRefusal`'s; instead of a refusal, the preferred answer is another plausible one: the row's own column
    `substitute`, else what the base samples when it is asked to change all facts (`alter.methods.invented`). One for each
    row (the authors draw five and pass over each of them).
    """

    kind: Literal["prefer_invented"] = "prefer_invented"  # type: ignore[assignment]
    new_tokens: int = Field(200, ge=1, description="Longest answer that is made up.")
    needs: ClassVar[Needs] = Needs(base_logp=True, alternative="invented")


def _learn_alternative(tokens: Labelled) -> Tensor:
    """Mean cross-entropy of what stands in place of the forget rows' answers."""
    assert tokens.alternative is not None
    return tokens.alternative.mean()


class Refuse(Objective):
    """Cross-entropy of a refusal in place of each forget row's answer (IDK, Maini et al. 2024; O3's wrong answers).

    Refusals and retain rows are one batch with one mean over tokens (methods.md 5.2), so a refusal, which is short, weighs
    less than an answer.
    """

    kind: Literal["refuse"] = "refuse"
    joint: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(rows=False, alternative="refusal")

    def __call__(self, tokens: Labelled) -> Tensor:
        return _learn_alternative(tokens)


class Substitute(Objective):
    """Cross-entropy of the answer in the row's column `substitute`, and a stopped hinge on the answer itself.

    Mean negative log-likelihood of the substitute + `hinge` times the mean over low-entropy tokens of the row's own answer
    of max(0, p(y) - max_{v != y} p(v)). `alter forget` writes rows with that column: what the model says of an invented
    subject.
    """

    kind: Literal["substitute"] = "substitute"
    hinge: float = Field(1.0, ge=0.0, description="Weight of the stopped hinge on the answer itself.")
    only_low: bool = Field(True, description="Count low-entropy tokens of the answer only.")

    @property
    def needs(self) -> Needs:
        return Needs(runner_up=True, alternative="substitute", entropy=self.only_low)

    def __call__(self, tokens: Labelled) -> Tensor:
        return _learn_alternative(tokens) + self.hinge * tokens.mean(self.only_low)

    def per_token(self, emitted: Emitted) -> Tensor:
        true, other = true_and_runner_up(emitted)
        return F.relu(true - other)


class RandomLabels(Objective):
    """Cross-entropy of labels drawn uniformly from the vocabulary, once for the run (Yao et al. 2024, methods.md 2.6).

    The context stays the true text, and special tokens keep their own label.
    """

    kind: Literal["random_labels"] = "random_labels"
    needs: ClassVar[Needs] = Needs(rows=False, alternative="random_labels")

    def __call__(self, tokens: Labelled) -> Tensor:
        return _learn_alternative(tokens)


class Undial(Objective):
    """UNDIAL (Dong et al. 2024, arXiv:2402.10052): cross-entropy to softmax(z_base - beta onehot(y)), mean over tokens.

    Only labelled tokens count (the authors' code also pushes an unrelated token at every prompt position).
    """

    kind: Literal["undial"] = "undial"
    beta: float = Field(10.0, gt=0, description="What the true token's logit is lowered by.")
    needs: ClassVar[Needs] = Needs(views=("base",))

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()

    def per_token(self, emitted: Emitted) -> Tensor:
        assert emitted.reference is not None
        return soft_cross_entropy(emitted.reference.lowered(emitted.labels, self.beta).logp, emitted)


class Learn(Objective):
    """Cross-entropy of the forget rows' true tokens: learns them still better, for task arithmetic (`negate`) and ULD."""

    kind: Literal["learn"] = "learn"

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()


class Reinforced(Objective):
    """Away from what more training on the forget set would bring (WHP, Eldan and Russinovich 2023, arXiv:2310.02238).

    The target is v = z_base - alpha relu(z_reinforced - z_base) on the logits: with `hard` its likeliest token (WHP,
    without the dictionary of anchored terms), else softmax(v) (the teacher of E2URec, methods.md 3.6).
    """

    kind: Literal["reinforced"] = "reinforced"
    alpha: float = Field(5.0, gt=0, description="How far to go away from what rises.")
    hard: bool = Field(True, description="Aim at the likeliest token alone.")
    needs: ClassVar[Needs] = Needs(views=("base", "reinforced"))

    def target(self, views: Mapping[str, Tensor], along: Tensor) -> Tensor:
        away = views["base"] - self.alpha * F.relu(views["reinforced"] - views["base"])
        if not self.hard:
            return torch.log_softmax(away, dim=-1)
        return torch.full_like(away, -torch.inf).scatter(-1, away.argmax(-1, keepdim=True), 0.0)

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()

    def per_token(self, emitted: Emitted) -> Tensor:
        assert emitted.reference is not None
        return soft_cross_entropy(emitted.reference.logp, emitted)


class Persona(Objective):
    """ELM (Gandikota et al. 2024, arXiv:2410.02760; methods.md 2.8): away from an expert's words, towards a novice's.

    The target at the t-th of a row's n labelled tokens is softmax(log p - eta_t (log p_expert - log p_novice)) over its
    50 likeliest tokens, all from the frozen base at `temperature`, where eta_t rises evenly from 1 to `eta`; the loss is
    the mean cross-entropy to it plus `fluency` times that of a diversion: the row's prompt, a change of subject, and how
    the base goes on under the same tilt (weight `guidance`).
    """

    kind: Literal["persona"] = "persona"
    eta: float = Field(1000.0, ge=1, description="Strength at the end of a row; it starts from 1.")
    temperature: float = Field(1.2, gt=0, description="Divides the base's logits.")
    top: int = Field(50, ge=1, description="Tokens that the target keeps.")
    fluency: float = Field(1.0, ge=0, description="Weight of the diversion.")
    guidance: float = Field(3.0, ge=0, description="Strength of the tilt while the diversion is written.")
    new_tokens: int = Field(100, ge=1, description="Length of the diversion.")
    concept: str = Field("the subject of this text", description="What the personas know all or nothing about.")
    needs: ClassVar[Needs] = Needs(views=("base", "expert", "novice"), alternative="diversion")

    def target(self, views: Mapping[str, Tensor], along: Tensor) -> Tensor:
        logp = {name: torch.log_softmax(view / self.temperature, dim=-1) for name, view in views.items()}
        eta = 1.0 + (self.eta - 1.0) * along.to(logp["base"])
        tilted = logp["base"] - eta[:, None] * (logp["expert"] - logp["novice"])
        kept = tilted.topk(min(self.top, tilted.shape[-1]), dim=-1)
        return torch.full_like(tilted, -torch.inf).scatter(-1, kept.indices, torch.log_softmax(kept.values, dim=-1))

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean() + self.fluency * _learn_alternative(tokens)

    def per_token(self, emitted: Emitted) -> Tensor:
        assert emitted.reference is not None
        return soft_cross_entropy(emitted.reference.logp, emitted)


class Misdirect(Objective):
    """RMU (Li et al. 2024, arXiv:2403.03218; methods.md 2.7): hidden states of forget rows are driven to c u.

    u is uniform in [0, 1]^D scaled to length 1, one for the run. The squared distance is averaged over the width, over
    the row's real tokens, then over the rows.
    """

    kind: Literal["misdirect"] = "misdirect"
    c: float = Field(6.5, gt=0, description="Length of the vector that hidden states are driven to.")
    depth: float = Field(7.5 / 32, ge=0, le=1, description="Which block: the one nearest this share of the depth.")
    seed: int = Field(0, description="Of the direction u.")

    @property
    def needs(self) -> Needs:
        return Needs(labels=False, depth=self.depth)

    def direction(self, width: int) -> Tensor:
        """[D] fp32: the random direction, of length 1, all of its entries positive."""
        u = torch.rand(width, generator=torch.Generator().manual_seed(self.seed))
        return u / u.norm()

    def __call__(self, tokens: Labelled) -> Tensor:
        assert tokens.hidden is not None
        states = _wide(tokens.hidden.states)
        aim = self.c * self.direction(states.shape[-1]).to(states)
        return mean_or_zero(row_means((states - aim).square().mean(-1), tokens.hidden.row, tokens.rows))


class NoForget(Objective):
    """Nothing on forget rows, which do not go through the model: fine-tuning on the retain set alone."""

    kind: Literal["none"] = "none"
    needs: ClassVar[Needs] = Needs(rows=False)

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.values.sum() * 0.0


class CrossEntropy(Objective):
    """Mean cross-entropy of the true tokens: the plain retain loss (ALTER Eq. 8, l_r)."""

    kind: Literal["cross_entropy"] = "cross_entropy"

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()


class KeepBase(Objective):
    """Mean KL(base || model) on labelled tokens: retain rows keep the frozen base's own behaviour.

    The divergence is taken on real labelled tokens only, never on padding or prompts (methods.md 2.3).
    """

    kind: Literal["keep_base"] = "keep_base"
    needs: ClassVar[Needs] = Needs(views=("base",))

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()

    def per_token(self, emitted: Emitted) -> Tensor:
        assert emitted.reference is not None
        return divergence(emitted.reference.logp, emitted)


class KeepBaseAnswers(Objective):
    """Mean cross-entropy of the token that the frozen base finds likeliest (ELM's retain term, methods.md 2.8)."""

    kind: Literal["keep_base_answers"] = "keep_base_answers"
    needs: ClassVar[Needs] = Needs(views=("base",))

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()

    def per_token(self, emitted: Emitted) -> Tensor:
        assert emitted.reference is not None
        assert emitted.known is not None
        return -emitted.known.gather(-1, emitted.reference.logp.argmax(-1, keepdim=True))[:, 0]


class Distil(Objective):
    """Cross-entropy of the true tokens plus that of the frozen base's distribution (E2URec, methods.md 3.6)."""

    kind: Literal["distil"] = "distil"
    needs: ClassVar[Needs] = Needs(views=("base",))

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()

    def per_token(self, emitted: Emitted) -> Tensor:
        assert emitted.reference is not None
        return emitted.nll + soft_cross_entropy(emitted.reference.logp, emitted)


class Uniform(Objective):
    """Mean KL(uniform || model) over a row's tokens: the model is to know nothing about them (ULD, methods.md 4.2)."""

    kind: Literal["uniform"] = "uniform"
    prompts: bool = Field(True, description="Count the tokens of prompts too, as ULD's code does; off: answers alone.")

    @property
    def needs(self) -> Needs:
        return Needs(prompts=self.prompts)

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()

    def per_token(self, emitted: Emitted) -> Tensor:
        logp = torch.log_softmax(_wide(emitted.logits), dim=-1)
        return -logp.mean(-1) - math.log(logp.shape[-1])


class KeepHidden(Objective):
    """Hidden states of retain rows stay where the frozen base has them (RMU's second term, methods.md 2.7).

    The squared distance is averaged over the width, over the row's real tokens, then over the rows.
    """

    kind: Literal["keep_hidden"] = "keep_hidden"
    depth: float = Field(7.5 / 32, ge=0, le=1, description="Which block: the one nearest this share of the depth.")

    @property
    def needs(self) -> Needs:
        return Needs(labels=False, depth=self.depth, base_hidden=True)

    def __call__(self, tokens: Labelled) -> Tensor:
        assert tokens.hidden is not None
        assert tokens.hidden.base is not None
        states = _wide(tokens.hidden.states)
        distance = (states - tokens.hidden.base.to(states)).square().mean(-1)
        return mean_or_zero(row_means(distance, tokens.hidden.row, tokens.rows))


class Adaptive(Objective):
    """Cross-entropy with a weight that grows where retain rows get worse (SHA256, SemEval-2025 task 4; methods.md 3.8).

    The weight is 1.2 in the first epoch, and afterwards `multiplier` of how far the loss lies above that epoch's mean.
    (The authors' code divides that mean by the batch size once too often; ours does not.)
    """

    kind: Literal["adaptive"] = "adaptive"
    needs: ClassVar[Needs] = Needs(state=True)

    def weigh(self, loss: float, epochs: float, state: dict[str, float]) -> float:
        """The `multiplier`; `state` holds sum and number of the first epoch's losses."""
        if epochs < 1:
            state |= {"total": state.get("total", 0.0) + loss, "count": state.get("count", 0) + 1}
            return self.multiplier(0.0)
        return self.multiplier(loss - state.get("total", 0.0) / max(state.get("count", 0), 1))

    @staticmethod
    def multiplier(rise: float) -> float:
        """clip(round(0.3 * 6^rise + 0.8, 1), 1.2, 2.3); `rise` is in nats."""
        if rise <= 0:
            return 1.2
        return min(max(round(0.3 * 6.0 ** min(rise, 2.0) + 0.8, 1), 1.2), 2.3)

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()


class Constrained(Objective):
    """PDU's retain term: cross-entropy with the weight of a constraint, loss <= `epsilon` (arXiv:2506.05314, section 4).

    The weight starts at `start` and, once `warmup_epochs` are over, changes after every step by `step` times (loss -
    epsilon), never below 0: dual ascent.
    """

    kind: Literal["constrained"] = "constrained"
    epsilon: float = Field(
        0.3, ge=0, description="What the retain loss may be, in nats: a little above the base's own."
    )
    start: float = Field(100.0, ge=0, description="The first weight.")
    step: float = Field(5.0, ge=0, description="Step size of the dual ascent.")
    warmup_epochs: float = Field(5.0, ge=0, description="Passes over the forget set before the weight changes.")
    needs: ClassVar[Needs] = Needs(state=True)

    def weigh(self, loss: float, epochs: float, state: dict[str, float]) -> float:
        """The constraint's weight, which `state` holds; after the warm-up the next batch's follows from this one's loss."""
        weight = state.get("weight", self.start)
        state["weight"] = (
            max(0.0, weight + self.step * (loss - self.epsilon)) if epochs >= self.warmup_epochs else weight
        )
        return weight

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()


class NoRetain(Objective):
    """Nothing on retain rows, which do not go through the model."""

    kind: Literal["none"] = "none"
    needs: ClassVar[Needs] = Needs(rows=False)

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.values.sum() * 0.0


FORGET: Registry[type[Objective]] = Registry(
    "objective",
    kinds(
        InvertedHinge,
        StoppedHinge,
        GradientAscent,
        WithoutTruth,
        CrossEntropyUnlearning,
        WeightedAscent,
        SaturationImportance,
        NPO,
        SimNPO,
        Catnip,
        FlattenLogits,
        Duet,
        PushPull,
        PreferRefusal,
        PreferInvented,
        Refuse,
        Substitute,
        RandomLabels,
        Undial,
        Learn,
        Reinforced,
        Persona,
        Misdirect,
        NoForget,
    ),
)
"""Objectives on forget rows by kind."""
RETAIN: Registry[type[Objective]] = Registry(
    "retain objective",
    kinds(
        CrossEntropy,
        KeepBase,
        KeepBaseAnswers,
        KeepHidden,
        Distil,
        Uniform,
        Adaptive,
        Constrained,
        Duet,
        PushPull,
        NoRetain,
    ),
)
"""Objectives on retain rows by kind."""
Forget = Annotated[Objective, OneOf(FORGET)]
Retain = Annotated[Objective, OneOf(RETAIN)]
