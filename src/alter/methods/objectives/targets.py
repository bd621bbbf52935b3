"""Objectives with a target distribution computed from frozen models on the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from alter.methods.objectives.answers import learn_alternative
from alter.methods.objectives.base import Needs, Objective, Writing
from alter.methods.objectives.tokens import (
    Emitted,
    Labelled,
    divergence,
    mean_or_zero,
    place_in_row,
    soft_cross_entropy,
    true_and_runner_up,
    wide,
)
from alter.settings import Count, Tokens

if TYPE_CHECKING:
    from torch import Tensor


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
            value = value + self.hinge * torch.nn.functional.relu(true - other)
        return value


class Undial(Objective):
    """UNDIAL (Dong et al. 2024, arXiv:2402.10052): cross-entropy to softmax(z_base - beta onehot(y)), mean over tokens.

    Only labelled tokens count (the authors' code also pushes an unrelated token at every prompt position).
    """

    kind: Literal["undial"] = "undial"
    beta: float = Field(10.0, gt=0, description="Amount by which the true token's logit is lowered.")
    needs: ClassVar[Needs] = Needs(views=("base",))

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()

    def per_token(self, emitted: Emitted) -> Tensor:
        assert emitted.reference is not None
        return soft_cross_entropy(emitted.reference.lowered(emitted.labels, self.beta).logp, emitted)


class Duet(Objective):
    """DUET: the logits of a teacher that was told to forget, without being told (Zhong et al. 2026, arXiv:2601.21283).

    The teacher is the frozen base with `instruction` before the row. Sum over its `top` likeliest tokens v of
    Huber(z_v, z_teacher_v) on the logits themselves, mean over tokens; the same on forget and retain rows. The paper has
    questions alone and compares what the reply begins with (`first`). Rebuilt from a description: the instruction, K and
    Huber's delta of 1 are readings.
    """

    kind: Literal["duet"] = "duet"
    instruction: str = Field(
        "You know nothing about the following and say so; all else you answer as ever.",
        description="What the teacher is told before each row, in your words: name what is to be forgotten.",
    )
    top: Count = Field(20, ge=1, description="Tokens of the teacher that are imitated; at most reference_top_k.")
    first: bool = Field(
        False, description="Imitate at the first token of each answer alone, as the paper does; off: at all of them."
    )

    @property
    def needs(self) -> Needs:
        return Needs(views=("base", "instructed"), instruction=self.instruction)

    def target(self, views: Mapping[str, Tensor], along: Tensor) -> Tensor:
        """Return the teacher's logits [n, V] unchanged."""
        return views["instructed"]

    def __call__(self, tokens: Labelled) -> Tensor:
        if not self.first:
            return tokens.mean()
        assert tokens.row is not None
        return mean_or_zero(tokens.values[place_in_row(tokens.row) == 0])

    def per_token(self, emitted: Emitted) -> Tensor:
        assert emitted.reference is not None
        ids, teacher = emitted.reference.ids[:, : self.top].long(), emitted.reference.logp[:, : self.top]
        own = wide(emitted.logits.gather(-1, ids))
        return torch.nn.functional.huber_loss(own, teacher.to(own), reduction="none").sum(-1)


class PushPull(Duet):
    """Bidirectional logit distillation (arXiv:2604.15482): DUET's pull, and a push on the student's own.

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
        own = wide(emitted.logits.gather(-1, mine))
        same = mine[:, :, None] == kept[:, None, :]
        floor = teacher.amin(-1)[:, None, None].expand(same.shape[0], 1, 1)
        theirs = torch.where(same, teacher[:, None, :], floor).amax(-1)
        outside = ~same[:, :, : self.top].any(-1)
        return pull + self.push * (torch.nn.functional.relu(own - theirs.to(own)) * outside).sum(-1)


class Reinforced(Objective):
    """Away from what more training on the forget set would bring (WHP, Eldan and Russinovich 2023, arXiv:2310.02238).

    The target is v = z_base - alpha relu(z_reinforced - z_base) on the logits: with `hard` its likeliest token (WHP,
    without the dictionary of anchored terms), else softmax(v) (the teacher of E2URec, arXiv:2403.03536).
    """

    kind: Literal["reinforced"] = "reinforced"
    alpha: float = Field(5.0, gt=0, description="Weight of the step away from logits that reinforcement raises.")
    hard: bool = Field(True, description="Aim at the likeliest token alone.")
    needs: ClassVar[Needs] = Needs(views=("base", "reinforced"))

    def target(self, views: Mapping[str, Tensor], along: Tensor) -> Tensor:
        away = views["base"] - self.alpha * torch.nn.functional.relu(views["reinforced"] - views["base"])
        if not self.hard:
            return torch.log_softmax(away, dim=-1)
        return torch.full_like(away, -torch.inf).scatter(-1, away.argmax(-1, keepdim=True), 0.0)

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean()

    def per_token(self, emitted: Emitted) -> Tensor:
        assert emitted.reference is not None
        return soft_cross_entropy(emitted.reference.logp, emitted)


class Persona(Objective):
    """ELM (Gandikota et al. 2024, arXiv:2410.02760): away from an expert's words, towards a novice's.

    The target at the t-th of a row's n labelled tokens is softmax(log p - eta_t (log p_expert - log p_novice)) over its
    50 likeliest tokens, all from the frozen base at `temperature`, where eta_t rises evenly from 1 to `eta`; the loss is
    the mean cross-entropy to it plus `fluency` times that of a diversion: the row's prompt, a change of subject, and how
    the base goes on under the same tilt (weight `guidance`). The authors sample diversions, under personas who have not read
    the prompt; ours are the likeliest tokens after it.
    """

    kind: Literal["persona"] = "persona"
    eta: float = Field(1000.0, ge=1, description="Strength at the end of a row; it starts from 1.")
    temperature: float = Field(1.2, gt=0, description="Divides the base's logits.")
    top: Count = Field(50, ge=1, description="Tokens that the target keeps.")
    fluency: float = Field(1.0, ge=0, description="Weight of the diversion.")
    guidance: float = Field(3.0, ge=0, description="Strength of the tilt while the diversion is written.")
    new_tokens: Tokens = Field(100, ge=1, description="Length of the diversion.")
    concept: str = Field("the subject of this text", description="What the personas know all or nothing about.")

    @property
    def needs(self) -> Needs:
        writing = Writing(self.new_tokens, self.guidance, self.temperature)
        views = ("base", "expert", "novice")
        return Needs(views=views, alternative="diversion", writing=writing, concept=self.concept)

    def target(self, views: Mapping[str, Tensor], along: Tensor) -> Tensor:
        logp = {name: torch.log_softmax(view / self.temperature, dim=-1) for name, view in views.items()}
        eta = 1.0 + (self.eta - 1.0) * along.to(logp["base"])
        tilted = logp["base"] - eta[:, None] * (logp["expert"] - logp["novice"])
        kept = tilted.topk(min(self.top, tilted.shape[-1]), dim=-1)
        return torch.full_like(tilted, -torch.inf).scatter(-1, kept.indices, torch.log_softmax(kept.values, dim=-1))

    def __call__(self, tokens: Labelled) -> Tensor:
        return tokens.mean() + self.fluency * learn_alternative(tokens)

    def per_token(self, emitted: Emitted) -> Tensor:
        assert emitted.reference is not None
        return soft_cross_entropy(emitted.reference.logp, emitted)
