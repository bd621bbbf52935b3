"""What a training step minimises on forget and on retain rows: one final class per objective, tensors in, scalar out.

Each class is at once the settings of the objective (a pydantic model whose `kind` names it in a recipe) and the
function that computes it. `Forget` and `Retain` are the registries: the unions of what a recipe may name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """The k most likely tokens of a reference distribution at n positions; what is left over is one tail bucket.

    Attributes:
        ids: [n, k] long, distinct in each row.
        logp: [n, k] their log-probabilities; -inf fills unused places.
    """

    ids: Tensor
    logp: Tensor

    def without(self, labels: Tensor) -> Reference:
        """The same distributions with the label's probability removed and the rest renormalised.

        Args:
            labels: [n] long.

        Returns:
            A reference over the same ids. Where the label holds all the probability there is nothing to renormalise:
            such a row becomes all -inf, and `divergence` gives 0 for it.
        """
        logp = self.logp.masked_fill(self.ids == labels[:, None], -torch.inf)
        removed = (self.logp.exp() * (self.ids == labels[:, None])).sum(-1, keepdim=True)
        kept = (1 - removed).clamp_min(0.0)
        logp = torch.where(kept > 1e-6, logp - kept.clamp_min(1e-6).log(), torch.full_like(logp, -torch.inf))
        return Reference(self.ids, logp)


@dataclass(frozen=True)
class Labelled:
    """The labelled tokens of a batch, all rows concatenated: n tokens, vocabulary V.

    Attributes:
        logits: [n, V], the model's, of the distribution that should give each label.
        labels: [n] long, the true tokens.
        high: [n] bool, whether the token is a high-entropy (structural) one.
        reference: what the objective should compare with, or None unless it declared `needs_base`.
    """

    logits: Tensor
    labels: Tensor
    high: Tensor
    reference: Reference | None = None

    def select(self, mask: Tensor) -> Labelled:
        """The tokens where `mask` [n] is true."""
        reference = self.reference and Reference(self.reference.ids[mask], self.reference.logp[mask])
        return Labelled(self.logits[mask], self.labels[mask], self.high[mask], reference)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def mean_or_zero(values: Tensor) -> Tensor:
    """Mean of `values` [n]; for n = 0 a zero that still carries a graph (a batch without such tokens)."""
    return values.mean() if values.numel() else values.sum()


def true_and_runner_up(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of the label, and the largest probability of any other token.

    Args:
        logits: [n, V]; labels: [n] long.

    Returns:
        two [n] tensors in fp32 (fp64 for fp64 logits); on ties the runner-up is the first index that is not the label.
    """
    wide = _wide(logits)
    normaliser = wide.logsumexp(-1)
    label = wide.gather(-1, labels[:, None]).squeeze(-1)
    runner_up = wide.scatter(-1, labels[:, None], -torch.inf).argmax(-1, keepdim=True)
    other = wide.gather(-1, runner_up).squeeze(-1)
    return (label - normaliser).exp(), (other - normaliser).exp()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label in nats, [n], computed in fp32."""
    return F.cross_entropy(_wide(logits), labels, reduction="none")


def divergence(reference: Reference, logits: Tensor) -> Tensor:
    """KL(reference || model) at each position over the reference's k tokens and one bucket for all others.

    Merging the others into one bucket can only lower the divergence, and with k = V it is the exact one.

    Args:
        reference: n positions, k tokens each.
        logits: [n, V].

    Returns:
        [n] in nats, at least 0 up to rounding; 0 where the reference is all -inf.
    """
    logp = torch.log_softmax(_wide(logits), dim=-1).gather(-1, reference.ids)
    target = reference.logp.to(logp.dtype)
    known = torch.isfinite(target)
    p = target.exp()
    inside = torch.where(known, p * (target.masked_fill(~known, 0.0) - logp), torch.zeros_like(logp)).sum(-1)
    if reference.ids.shape[-1] == logits.shape[-1]:
        return inside
    tail = (1 - p.sum(-1)).clamp_min(0.0)
    # the model's own tail from its logits, not as 1 - sum: that would cancel where the tail is tiny
    rest = _wide(logits).scatter(-1, reference.ids, -torch.inf).logsumexp(-1) - _wide(logits).logsumexp(-1)
    outside = torch.where(tail > 1e-6, tail * (tail.clamp_min(1e-6).log() - rest), torch.zeros_like(tail))
    return torch.where(known.any(-1), inside + outside, torch.zeros_like(inside))


class _Objective(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    needs_base: ClassVar[bool] = False
    """Whether the trainer must supply the frozen base's own distributions as the reference."""


class InvertedHinge(_Objective):
    """The paper's forget loss (ALTER Eq. 8, from LoKU): mean over low-entropy tokens of 1 + p(y) - max_{v != y} p(v).

    It is linear in probabilities and does not stop once the true token has lost: the runner-up is driven on towards
    probability 1, so long runs end in confident, repeated tokens.
    """

    kind: Literal["inverted_hinge"] = "inverted_hinge"
    only_low: bool = Field(True, description="Count low-entropy tokens only, as the paper does.")

    def __call__(self, tokens: Labelled) -> Tensor:
        if self.only_low:
            tokens = tokens.select(~tokens.high)
        true, other = true_and_runner_up(tokens.logits, tokens.labels)
        return mean_or_zero(1 + true - other)


class StoppedHinge(_Objective):
    """Mean over low-entropy tokens of max(0, p(y) - max_{v != y} p(v) + margin): no push once another token leads.

    Not in the paper: a bounded form of its loss, zero (with zero gradient) as soon as the true token is off the top.
    """

    kind: Literal["stopped_hinge"] = "stopped_hinge"
    only_low: bool = Field(True, description="Count low-entropy tokens only.")
    margin: float = Field(0.0, ge=0.0, le=1.0, description="Probability by which another token must lead.")

    def __call__(self, tokens: Labelled) -> Tensor:
        if self.only_low:
            tokens = tokens.select(~tokens.high)
        true, other = true_and_runner_up(tokens.logits, tokens.labels)
        return mean_or_zero(F.relu(true - other + self.margin))


class GradientAscent(_Objective):
    """Minus the cross-entropy of the true tokens (methods.md 2.1): unbounded, the baseline that breaks models."""

    kind: Literal["gradient_ascent"] = "gradient_ascent"
    only_low: bool = Field(False, description="Count low-entropy tokens only.")

    def __call__(self, tokens: Labelled) -> Tensor:
        if self.only_low:
            tokens = tokens.select(~tokens.high)
        return -mean_or_zero(cross_entropy(tokens.logits, tokens.labels))


class WithoutTruth(_Objective):
    """KL to the frozen base's own distribution with the true token removed and renormalised, on low-entropy tokens.

    Not in the paper: a bounded target that leaves the base's other choices as they are. `hinge` adds that multiple of
    the stopped hinge max(0, p(y) - max_{v != y} p(v)), which speeds up tokens of which the base is nearly certain.
    """

    kind: Literal["without_truth"] = "without_truth"
    only_low: bool = Field(True, description="Count low-entropy tokens only.")
    hinge: float = Field(0.0, ge=0.0, description="Weight of the stopped hinge next to the divergence.")
    needs_base: ClassVar[bool] = True

    def __call__(self, tokens: Labelled) -> Tensor:
        assert tokens.reference is not None
        if self.only_low:
            tokens = tokens.select(~tokens.high)
        assert tokens.reference is not None
        loss = mean_or_zero(divergence(tokens.reference.without(tokens.labels), tokens.logits))
        if self.hinge:
            true, other = true_and_runner_up(tokens.logits, tokens.labels)
            loss = loss + self.hinge * mean_or_zero(F.relu(true - other))
        return loss


class CrossEntropy(_Objective):
    """Mean cross-entropy of the true tokens: the plain retain loss (ALTER Eq. 8, l_r)."""

    kind: Literal["cross_entropy"] = "cross_entropy"

    def __call__(self, tokens: Labelled) -> Tensor:
        return mean_or_zero(cross_entropy(tokens.logits, tokens.labels))


class KeepBase(_Objective):
    """Mean KL(base || model) on labelled tokens: retain rows keep the frozen base's own behaviour.

    The divergence is taken on real labelled tokens only, never on padding or prompts (methods.md 2.3).
    """

    kind: Literal["keep_base"] = "keep_base"
    needs_base: ClassVar[bool] = True

    def __call__(self, tokens: Labelled) -> Tensor:
        assert tokens.reference is not None
        return mean_or_zero(divergence(tokens.reference, tokens.logits))


Forget = Annotated[InvertedHinge | StoppedHinge | GradientAscent | WithoutTruth, Field(discriminator="kind")]
Retain = Annotated[CrossEntropy | KeepBase, Field(discriminator="kind")]
