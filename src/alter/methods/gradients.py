"""Rules that edit the forget term's gradient before each step: against the retain gradient, or by the base's statistics.

Each final class is the settings of one rule (`kind` names it in a recipe) and its arithmetic on gradients by parameter.
With a rule other than `none` a step takes the gradients of the forget term and of all others apart, from one forward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, final

import torch
from pydantic import BaseModel, ConfigDict, Field

from alter.core import UserError, warn
from alter.plugins import OneOf, Registry, kinds
from alter.settings import Count

if TYPE_CHECKING:
    from torch import Tensor

    Gradients = Mapping[str, Tensor]


FEWEST = 0.05
"""Share of a layer's free directions below which a projection is reported to leave too little."""


class GradientPasses(Protocol):
    """Passes over the untouched base that a rule may ask for; each gives one tensor for every trained linear weight."""

    def input_covariances(self) -> dict[str, Tensor]:
        """Return [in, in] float64: mean outer product of a layer's inputs, over the retain rows' real tokens."""

    def elicited(self, r: int, scaling: float, learning_rate: float) -> dict[str, Tensor]:
        """Return [out, in]: gradient of ascent on the forget rows, summed over batches, under a LoRA that has learned them."""


class GradientRule(BaseModel, ABC):
    """A rule for gradients: what it measures before the first step, and how it combines each step's two gradients."""

    model_config = ConfigDict(extra="forbid")

    kind: str
    splits: ClassVar[bool] = True
    """Whether both gradients are taken apart."""
    measures: ClassVar[bool] = False
    """Whether passes over the untouched weights come before the first step."""

    def check(self, run: Any) -> None:
        """Refuse settings of a run (`alter.training.settings.Unlearn`) that do not go with this rule.

        Raises:
            ValueError: says which, and what to give.
        """
        if run.gradient_checkpointing:
            raise ValueError(
                f"`gradient.kind` {self.kind} takes two gradients of one forward, which `gradient_checkpointing` would repeat: "
                "leave it out"
            )
        if run.phase_one:
            raise ValueError(
                f"`gradient.kind` {self.kind} is about the forget term, which `phase_one` begins without: give 0"
            )
        if self.measures and run.adapter.kind != "full":
            raise ValueError(
                f"`gradient.kind` {self.kind} filters the gradients of the model's own weights: take `adapter.kind` full, not "
                f"{run.adapter.kind}"
            )

    def statistics(self, passes: GradientPasses, seed: int) -> dict[str, Tensor]:
        """Return the rule's statistics before the first step, by parameter."""
        return {}

    @abstractmethod
    def edit(
        self, forget: Gradients, rest: Gradients, known: Mapping[str, Tensor], state: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the gradient of a step, by parameter.

        Args:
            forget: of the forget term.
            rest: of all other terms.
            known: what `statistics` gave.
            state: what the rule keeps from step to step, which checkpoints save; changed in place.
        """

    def edited(
        self, forget: Gradients, rest: Gradients, known: Mapping[str, Tensor], state: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return what `edit` gives, checked.

        Raises:
            UserError: it leaves a parameter out, or gives a gradient of another shape.
        """
        made = self.edit(forget, rest, known, state)
        wrong = next((n for n, value in forget.items() if n not in made or made[n].shape != value.shape), None)
        if wrong is not None:
            given = f"one of shape {list(made[wrong].shape)}" if wrong in made else "none"
            raise UserError(
                f"The gradient rule {self.kind} gives {given} for {wrong}; expected one for every parameter of `forget`, here of "
                f"shape {list(forget[wrong].shape)}."
            )
        return made


@final
class Plain(GradientRule):
    """The gradient of the loss as it is."""

    kind: Literal["none"] = "none"
    splits: ClassVar[bool] = False

    def check(self, run: Any) -> None:
        """Accept all settings."""

    def edit(
        self, forget: Gradients, rest: Gradients, known: Mapping[str, Tensor], state: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {name: value + rest[name] for name, value in forget.items()}


@final
class Rectified(GradientRule):
    """GRU (arXiv:2503.09117): a gradient that would raise the retain loss loses its part along the retain gradient.

    m <- decay g_r + (1 - decay) m, with g_r the gradient of the retain term. Where <g, m> < 0, over all parameters together,
    g <- g - <g, m> / <m, m> m. g is the forget term's gradient, or with `joins` that of the whole loss.
    """

    kind: Literal["rectified"] = "rectified"
    decay: float = Field(0.8, gt=0, le=1, description="Weight of a step's retain gradient in the running mean.")
    joins: bool = Field(False, description="Train on the retain term as well; off: only project against its gradient.")

    def check(self, run: Any) -> None:
        super().check(run)
        if not run.retain_objective.needs.rows:
            raise ValueError(
                "`gradient.kind` rectified holds gradients against that of retain rows: `retain_objective.kind` must not be none"
            )

    def edit(
        self, forget: Gradients, rest: Gradients, known: Mapping[str, Tensor], state: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        for name, value in rest.items():
            state[name] = self.decay * value + (1 - self.decay) * state[name] if name in state else self.decay * value
        whole = {name: value + rest[name] if self.joins else value for name, value in forget.items()}
        along = torch.stack([(whole[name].double() * state[name].double()).sum() for name in whole]).sum()
        length = torch.stack([state[name].double().square().sum() for name in whole]).sum()
        if not along < 0:
            return dict(whole)
        return {name: value - (along / length).to(value.dtype) * state[name] for name, value in whole.items()}


@final
class NullSpace(GradientRule):
    """KUDA's projection (arXiv:2602.19275, rebuilt from a description): what the layers' inputs on retain rows hardly use.

    The forget gradient of each linear weight becomes G U U^T, with U [in, k] the eigenvectors of the inputs' mean outer
    product on retain rows whose eigenvalue is at most `relaxation` times the largest: a step then changes next to nothing
    of what the layer puts out for them. Other parameters' gradients stay. (Adam scales each number of a gradient, after
    which a step lies near that space alone: `optimizer` sgd keeps it within.)
    """

    kind: Literal["null_space"] = "null_space"
    relaxation: float = Field(
        1e-3, ge=0, lt=1, description="Share of the largest eigenvalue up to which a direction is free."
    )
    measures: ClassVar[bool] = True

    def statistics(self, passes: GradientPasses, seed: int) -> dict[str, Tensor]:
        free = {name: free_directions(found, self.relaxation) for name, found in passes.input_covariances().items()}
        still = [name for name, directions in free.items() if directions.shape[1] < FEWEST * len(directions)]
        if still:
            more = f", such as to {10 * max(self.relaxation, 1e-4):g}" if self.relaxation < 0.1 else ""
            warn(
                f"`gradient.relaxation` {self.relaxation:g} leaves {free[still[0]].shape[1]} of {len(free[still[0]])} directions of "
                f"{still[0]} free ({len(still)} of {len(free)} weights are like that): they hardly move. Raise it{more}."
            )
        return free

    def edit(
        self, forget: Gradients, rest: Gradients, known: Mapping[str, Tensor], state: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return {
            name: rest[name] + (value @ known[name] @ known[name].t() if name in known else value)
            for name, value in forget.items()
        }


@final
class Selective(GradientRule):
    """RepSelect (arXiv:2606.17168): one gradient of ascent, without its principal components, for every step.

    A LoRA learns the forget rows for one epoch (plain gradient descent) and is taken off again; under it the gradient of
    ascent is summed over the forget set. Of each weight's gradient the top directions on both sides are divided by their
    singular value, in units of the least one taken (`collapsed`). Steps apply this gradient, whatever the model has become.
    Weights that are not linear layers' do not move.
    """

    kind: Literal["selective"] = "selective"
    components: Count = Field(512, ge=1, description="Principal components that are collapsed; at most all.")
    r: Count = Field(8, ge=1, description="Rank of the LoRA.")
    scaling: float = Field(1.0, gt=0, description="alpha / r of the LoRA.")
    learning_rate: float = Field(0.01, gt=0, description="Learning rate of the LoRA.")
    measures: ClassVar[bool] = True

    def statistics(self, passes: GradientPasses, seed: int) -> dict[str, Tensor]:
        found = passes.elicited(self.r, self.scaling, self.learning_rate)
        whole = [name for name, gradient in found.items() if self.components >= min(gradient.shape)]
        if whole:
            rank = min(found[whole[0]].shape)
            warn(
                f"`gradient.components` {self.components} collapses all {rank} directions of {whole[0]} ({len(whole)} of {len(found)} "
                f"weights are like that): next to nothing is left of their gradient. Give fewer, such as {max(1, rank // 8)}."
            )
        return {name: collapsed(gradient, self.components, seed) for name, gradient in found.items()}

    def edit(
        self, forget: Gradients, rest: Gradients, known: Mapping[str, Tensor], state: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        still = {name: torch.zeros_like(value) for name, value in forget.items() if name not in known}
        return {name: rest[name] + (known[name] if name in known else still[name]) for name in forget}


GRADIENTS: Registry[type[GradientRule]] = Registry("gradient rule", kinds(Plain, Rectified, NullSpace, Selective))
"""Rules for gradients by kind."""
AnyGradient = Annotated[GradientRule, OneOf(GRADIENTS)]


def free_directions(covariance: Tensor, relaxation: float) -> Tensor:
    """Return the eigenvectors [in, k] (fp32) whose eigenvalue is at most `relaxation` times the largest."""
    values, vectors = torch.linalg.eigh(covariance)
    free: Tensor = vectors[:, values <= relaxation * values[-1]]
    return free.float()


def collapsed(gradient: Tensor, components: int, seed: int) -> Tensor:
    """Damp the top principal components of a gradient G [out, in], on both sides.

    G ~ U S V^T cut at `components`; G <- G - G V (1 - s / S) V^T, then the same with U on the left; s is the least singular
    value taken, and a component that is nothing but rounding is not.

    Args:
        gradient: [out, in].
        components: most of them.
        seed: of the randomised decomposition.
    """
    wide = gradient.float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # a few directions more than are taken make the randomised decomposition accurate (the authors have none)
        U, S, V = (part[..., :components] for part in torch.svd_lowrank(wide, q=min(components + 10, *wide.shape)))
    taken = max(wide.shape) * torch.finfo(S.dtype).eps * S[0] < S
    if not taken.any():
        return wide
    U, S, V = U[:, taken], S[taken], V[:, taken]
    less = 1 - S[-1] / S
    wide = wide - (wide @ V * less) @ V.t()
    return wide - U @ (less[:, None] * (U.t() @ wide))
