"""The interface of objectives: settings, what a run must provide (`Needs`), a number per token, and the loss."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict

from alter.core import UserError, nearest, warn
from alter.methods.objectives.tokens import Emitted, Labelled

if TYPE_CHECKING:
    from torch import Tensor


VIEWS = ("base", "reinforced", "expert", "novice", "instructed")
"""Passes of frozen models that an objective may ask for."""
ALTERNATIVES = ("refusal", "random_labels", "diversion", "substitute", "invented")
"""Other forms of the forget rows that an objective may ask for."""


@dataclass(frozen=True)
class Writing:
    """How the base writes the rows that replace the forget rows.

    Attributes:
        new_tokens: most tokens of a row.
        guidance: ELM's tilt: how far to go from an expert's words to a novice's.
        temperature: divides the logits.
    """

    new_tokens: int
    guidance: float = 0.0
    temperature: float = 1.0


@dataclass(frozen=True)
class Needs:
    """What a run must provide for an objective and its settings; the trainer computes exactly this.

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
        writing: how the base writes a "diversion" or an "invented" answer.
        instruction: what the view "instructed" says before each row.
        concept: what the personas of the views "expert" and "novice" know all or nothing about.
        prompts: every token of a retain row is labelled, those of its prompt too.
        asked: which tokens of forget rows stand in their row's prompt as well.
        entropy: the tokens' entropies tell high from low ones (`Labelled.high`), which needs an adapter that routes.
        depth: hidden states at the block nearest to this share of the model's depth.
        base_hidden: those of the base as well, computed once.
        redirected: the base's hidden states of forget rows are moved to where it cannot answer, and prompts' tokens are marked;
            for subclasses of `Redirect`, whose settings say how.
        codes: a sparse autoencoder of these states, the mean codes of names, and which tokens of a row are part of one; for
            subclasses of `UnknownCode`, whose settings say how.
        state: numbers of its own that checkpoints keep: each batch's loss is multiplied by what `weigh` makes of them.
    """

    rows: bool = True
    labels: bool = True
    runner_up: bool = False
    views: tuple[str, ...] = ()
    base_logp: bool = False
    alternative: Literal["refusal", "random_labels", "diversion", "substitute", "invented"] | None = None
    writing: Writing | None = None
    instruction: str | None = None
    concept: str | None = None
    prompts: bool = False
    asked: bool = False
    entropy: bool = False
    depth: float | None = None
    base_hidden: bool = False
    redirected: bool = False
    codes: bool = False
    state: bool = False

    def __post_init__(self) -> None:
        """Refuse what no run can provide, where the objective is written and not where it is first missed.

        Raises:
            UserError: an unknown view or alternative, a depth that is no share, or a view without what it says.
        """
        asked = [("view", view, VIEWS) for view in self.views]
        if self.alternative is not None:
            asked.append(("alternative", self.alternative, ALTERNATIVES))
        for what, name, able in asked:
            if name not in able:
                raise UserError(
                    f"`Needs`: no {what} {name!r}; expected one of {', '.join(able)}.{nearest(name, able)}"
                )
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise UserError(f"`Needs`: depth is {self.depth}; expected a share of the model's depth, from 0 to 1.")
        if "instructed" in self.views and self.instruction is None:
            raise UserError(
                "`Needs`: the view 'instructed' goes with an `instruction`; give what it says before each row."
            )


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
        """What a run must provide: a constant (`needs: ClassVar[Needs] = Needs(...)`) where its settings change nothing."""
        return Needs()

    @abstractmethod
    def __call__(self, tokens: Labelled) -> Tensor:
        """Return the loss, a scalar, of a batch's labelled tokens, whose values are those of `per_token`."""

    def target(self, views: Mapping[str, Tensor], along: Tensor) -> Tensor:
        """Return the reference's log-probabilities [n, V].

        Args:
            views: the logits [n, V] of each view.
            along: [n], how far each token is along its row's labelled ones: 0 the first, 1 the last.
        """
        return torch.log_softmax(views["base"], dim=-1)

    def per_token(self, emitted: Emitted) -> Tensor:
        """Return [n], one number for each token: its negative log-likelihood, unless the objective says otherwise."""
        return emitted.nll

    def values_of(self, emitted: Emitted) -> Tensor:
        """Return what `per_token` gives, checked.

        Raises:
            UserError: it is not one number for each token.
        """
        values = self.per_token(emitted)
        if not isinstance(values, torch.Tensor) or values.shape != emitted.nll.shape:
            raise UserError(
                f"`per_token` of the objective {self.kind} gives {_shown(values)}; expected one number for each token, a tensor of "
                f"shape {list(emitted.nll.shape)}, as `emitted.nll` is."
            )
        return values

    def loss_of(self, tokens: Labelled) -> Tensor:
        """Return the loss, checked; one that nothing can be learned from is said once.

        Raises:
            UserError: it is not one number.
        """
        loss = self(tokens)
        if not isinstance(loss, torch.Tensor) or loss.shape:
            raise UserError(
                f"The objective {self.kind} gives {_shown(loss)}; expected its loss, a tensor of one number, such as "
                "`mean_or_zero(tokens.values)` makes."
            )
        if tokens.values.requires_grad and not loss.requires_grad:
            _without_gradient(self.kind)
        return loss

    def weigh(self, loss: float, epochs: float, state: dict[str, float]) -> float:
        """Return the factor of a batch's loss, for a retain objective that keeps state.

        Args:
            loss: of all processes together.
            epochs: passes over the forget set before this step.
            state: the objective's own numbers so far, empty at first; changed in place.
        """
        return 1.0


@functools.cache
def _without_gradient(kind: str) -> None:
    warn(
        f"The loss of the objective {kind} has no gradient, so that nothing is learned from it: it does not depend on what the model "
        "gives, or was detached from it."
    )


def _shown(given: object) -> str:
    return f"a tensor of shape {list(given.shape)}" if isinstance(given, torch.Tensor) else f"{given!r:.80}"
