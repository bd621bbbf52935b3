"""Objectives on the label's own probability: hinges, ascent and its weighted forms, NPO and its kin, and learning it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from alter.methods.objectives.base import Needs, Objective
from alter.methods.objectives.tokens import (
    Emitted,
    Labelled,
    log_probabilities,
    mean_or_zero,
    place_in_row,
    row_means,
    true_and_runner_up,
    wide,
)
from alter.settings import Count

if TYPE_CHECKING:
    from torch import Tensor


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
        return torch.nn.functional.relu(true - other + self.margin)


class GradientAscent(Objective):
    """Minus the cross-entropy of the true tokens (Jang et al. 2023, arXiv:2210.01504): unbounded, the baseline that breaks models."""

    kind: Literal["gradient_ascent"] = "gradient_ascent"
    only_low: bool = Field(False, description="Count low-entropy tokens only.")

    @property
    def needs(self) -> Needs:
        return Needs(entropy=self.only_low)

    def __call__(self, tokens: Labelled) -> Tensor:
        return -tokens.mean(self.only_low)


class CrossEntropyUnlearning(Objective):
    """CE-U (Yang 2025, arXiv:2503.01224): cross-entropy to the model's own distribution without the true token.

    -sum_v q_v log p_v, mean over tokens, where q = softmax(z) with z_y = -inf, without gradient: the target moves with the
    model, and no reference is needed. As log p_v = log q_v + log(1 - p_y) for all v != y, this is H(q) - log(1 - p_y), and
    its gradient that of -log(1 - p_y): never above 1 at a logit, and 1 at the label's where the model is certain of it.
    """

    kind: Literal["ceu"] = "ceu"
    ignore_first_n_answer_tokens: Count = Field(
        1, ge=0, description="Labelled tokens at the start of each row that do not count (a footnote of the paper)."
    )

    def __call__(self, tokens: Labelled) -> Tensor:
        assert tokens.row is not None
        return mean_or_zero(tokens.values[place_in_row(tokens.row) >= self.ignore_first_n_answer_tokens])

    def per_token(self, emitted: Emitted) -> Tensor:
        label = emitted.labels[:, None]
        _, others = log_probabilities(emitted.logits, label, 1)
        logq = torch.log_softmax(wide(emitted.logits.detach()).scatter(-1, label, -torch.inf), dim=-1)
        entropy: Tensor = torch.special.entr(logq.exp()).sum(-1)
        return entropy - others


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
    """Negative preference optimisation (Zhang et al. 2024, arXiv:2404.05868, Eq. 3).

    (2 / beta) mean over rows of softplus(-beta (NLL - NLL_base)), where NLL is the *sum* over the row's labelled tokens.
    """

    kind: Literal["npo"] = "npo"
    beta: float = Field(0.1, gt=0, description="Inverse temperature; towards 0 it is gradient ascent on row sums.")
    needs: ClassVar[Needs] = Needs(base_logp=True)

    def __call__(self, tokens: Labelled) -> Tensor:
        assert tokens.base_logp is not None
        change = tokens.row_sums(tokens.values + tokens.base_logp)
        return 2 / self.beta * mean_or_zero(torch.nn.functional.softplus(-self.beta * change))


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
        return -2 / self.beta * mean_or_zero(torch.nn.functional.logsigmoid(self.beta * (mean - self.delta)))


class Catnip(Objective):
    """CATNIP: NPO token by token against 1 - p, without a reference (arXiv:2602.02824).

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
            _, others = log_probabilities(emitted.logits, emitted.labels[:, None], 1)
        return 2 / self.beta * torch.nn.functional.softplus(self.beta * (-emitted.nll - others))


class FlattenLogits(Objective):
    """PDU's forget loss: mean over tokens of (max_v z_v - mean_v z_v)^2 (Entesari et al. 2025, arXiv:2506.05314).

    It is 0 where all tokens are equally likely, whatever the labels are; its gradient is that of the authors' code. The logits
    are those that give the labelled tokens (the authors' mask is one place further on: it has those that the labelled tokens
    give, and none of the prompt's last).
    """

    kind: Literal["flatten_logits"] = "flatten_logits"

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()

    def per_token(self, emitted: Emitted) -> Tensor:
        logits = wide(emitted.logits)
        return (logits.amax(-1) - logits.mean(-1)).square()


class Learn(Objective):
    """Cross-entropy of the forget rows' true tokens: learns them still better, for task arithmetic (`negate`) and ULD."""

    kind: Literal["learn"] = "learn"

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()


class NoForget(Objective):
    """Nothing on forget rows, which do not go through the model: fine-tuning on the retain set alone."""

    kind: Literal["none"] = "none"
    needs: ClassVar[Needs] = Needs(rows=False)

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.values.sum() * 0.0
