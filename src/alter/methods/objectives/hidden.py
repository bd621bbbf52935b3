"""Objectives on hidden states after one block: RMU's two terms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from alter.methods.objectives.base import Needs, Objective
from alter.methods.objectives.tokens import Labelled, mean_or_zero, row_means, wide

if TYPE_CHECKING:
    from torch import Tensor


class Misdirect(Objective):
    """RMU (Li et al. 2024, arXiv:2403.03218): hidden states of forget rows are driven to c u.

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
        states = wide(tokens.hidden.states)
        aim = self.c * self.direction(states.shape[-1]).to(states)
        return mean_or_zero(row_means((states - aim).square().mean(-1), tokens.hidden.row, tokens.rows))


class KeepHidden(Objective):
    """Hidden states of retain rows stay where the frozen base has them (RMU's second term, arXiv:2403.03218).

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
        states = wide(tokens.hidden.states)
        distance = (states - tokens.hidden.base.to(states)).square().mean(-1)
        return mean_or_zero(row_means(distance, tokens.hidden.row, tokens.rows))
