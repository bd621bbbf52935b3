"""Objectives on retain rows: cross-entropy, plain or weighted as training goes, and staying with the frozen base."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from alter.methods.objectives.base import Needs, Objective
from alter.methods.objectives.tokens import Emitted, Labelled, divergence, soft_cross_entropy, wide
from alter.settings import Passes

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropy(Objective):
    """Mean cross-entropy of the true tokens: the plain retain loss (ALTER Eq. 8, l_r)."""

    kind: Literal["cross_entropy"] = "cross_entropy"

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()


class KeepBase(Objective):
    """Mean KL(base || model) on labelled tokens: retain rows keep the frozen base's own behaviour.

    The divergence is taken on real labelled tokens only, never on padding or prompts (KL-min of TOFU, Maini et al. 2024, arXiv:2401.06121).
    """

    kind: Literal["keep_base"] = "keep_base"
    needs: ClassVar[Needs] = Needs(views=("base",))

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()

    def per_token(self, emitted: Emitted) -> Tensor:
        assert emitted.reference is not None
        return divergence(emitted.reference.logp, emitted)


class KeepBaseAnswers(Objective):
    """Mean cross-entropy of the token that the frozen base finds likeliest (the retain term of ELM, arXiv:2410.02760)."""

    kind: Literal["keep_base_answers"] = "keep_base_answers"
    needs: ClassVar[Needs] = Needs(views=("base",))

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()

    def per_token(self, emitted: Emitted) -> Tensor:
        assert emitted.reference is not None
        assert emitted.known is not None
        return -emitted.known.gather(-1, emitted.reference.logp.argmax(-1, keepdim=True))[:, 0]


class Distil(Objective):
    """Cross-entropy of the true tokens plus that of the frozen base's distribution (E2URec, Wang et al. 2024, arXiv:2403.03536)."""

    kind: Literal["distil"] = "distil"
    needs: ClassVar[Needs] = Needs(views=("base",))

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()

    def per_token(self, emitted: Emitted) -> Tensor:
        assert emitted.reference is not None
        return emitted.nll + soft_cross_entropy(emitted.reference.logp, emitted)


class Uniform(Objective):
    """Mean KL(uniform || model) over a row's tokens: the model is to know nothing about them (ULD, Ji et al. 2024, arXiv:2406.08607)."""

    kind: Literal["uniform"] = "uniform"
    prompts: bool = Field(True, description="Count the tokens of prompts too, as ULD's code does; off: answers alone.")

    @property
    def needs(self) -> Needs:
        return Needs(prompts=self.prompts)

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()

    def per_token(self, emitted: Emitted) -> Tensor:
        logp = torch.log_softmax(wide(emitted.logits), dim=-1)
        return -logp.mean(-1) - math.log(logp.shape[-1])


class Adaptive(Objective):
    """Cross-entropy with a weight that grows where retain rows get worse (team SHA256, SemEval-2025 task 4).

    The weight is 1.2 in the first epoch, and afterwards `multiplier` of how far the loss lies above that epoch's mean.
    (The authors' code divides that mean by the batch size once too often; ours does not.)
    """

    kind: Literal["adaptive"] = "adaptive"
    needs: ClassVar[Needs] = Needs(state=True)

    def weigh(self, loss: float, epochs: float, state: dict[str, float]) -> float:
        """Return the `multiplier`; `state` holds sum and number of the first epoch's losses."""
        if epochs < 1:
            state |= {"total": state.get("total", 0.0) + loss, "count": state.get("count", 0) + 1}
            return self.multiplier(0.0)
        return self.multiplier(loss - state.get("total", 0.0) / max(state.get("count", 0), 1))

    @staticmethod
    def multiplier(rise: float) -> float:
        """Return clip(round(0.3 * 6^rise + 0.8, 1), 1.2, 2.3); `rise` is in nats."""
        if rise <= 0:
            return 1.2
        steep: float = 6.0 ** min(rise, 2.0)
        return min(max(round(0.3 * steep + 0.8, 1), 1.2), 2.3)

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()


class Constrained(Objective):
    """PDU's retain term: cross-entropy with the weight of a constraint, loss <= `epsilon` (arXiv:2506.05314, section 4).

    The weight starts at `start` and, once `warmup_epochs` are over, changes after every step by `step` times (loss -
    epsilon), never below 0: dual ascent.
    """

    kind: Literal["constrained"] = "constrained"
    epsilon: float = Field(
        0.3, ge=0, description="Largest retain loss allowed, in nats: a little above the base's own."
    )
    start: float = Field(100.0, ge=0, description="The first weight.")
    step: float = Field(5.0, ge=0, description="Step size of the dual ascent.")
    warmup_epochs: Passes = Field(5.0, ge=0, description="Passes over the forget set before the weight changes.")
    needs: ClassVar[Needs] = Needs(state=True)

    def weigh(self, loss: float, epochs: float, state: dict[str, float]) -> float:
        """Return the constraint's weight, which `state` holds; after the warm-up the next batch's follows from this one's loss."""
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
