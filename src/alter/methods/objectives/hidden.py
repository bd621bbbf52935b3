"""Objectives on hidden states after one block: RMU's two terms, KUDA's deviation, LUNAR, and names moved in a sparse code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from alter.methods.objectives.base import Needs, Objective
from alter.methods.objectives.tokens import Labelled, mean_or_zero, row_means, wide
from alter.settings import Count, Seed, Steps

if TYPE_CHECKING:
    from torch import Tensor


class Misdirect(Objective):
    """RMU (Li et al. 2024, arXiv:2403.03218): hidden states of forget rows are driven to c u.

    u is uniform in [0, 1]^D scaled to length 1, one for the run. The squared distance is averaged over the width, over
    the row's real tokens, then over the rows (the authors average over a batch's padding too).
    """

    kind: Literal["misdirect"] = "misdirect"
    c: float = Field(6.5, gt=0, description="Length of the vector that hidden states are driven to.")
    depth: float = Field(7.5 / 32, ge=0, le=1, description="Which block: the one nearest this share of the depth.")
    seed: Seed = Field(0, description="Seed of the direction u.")

    @property
    def needs(self) -> Needs:
        return Needs(labels=False, depth=self.depth)

    def direction(self, width: int) -> Tensor:
        """Return [D] fp32: the random direction, of length 1, all of its entries positive."""
        u = torch.rand(width, generator=torch.Generator().manual_seed(self.seed))
        length: Tensor = u.norm()
        return u / length

    def __call__(self, tokens: Labelled) -> Tensor:
        assert tokens.hidden is not None
        states = wide(tokens.hidden.states)
        aim = self.c * self.direction(states.shape[-1]).to(states)
        return mean_or_zero(row_means((states - aim).square().mean(-1), tokens.hidden.row, tokens.rows))


class Deviate(Objective):
    """KUDA's deviation (arXiv:2602.19275, rebuilt from a description): hidden states of forget rows turn from the base's.

    1 + cos(h, h_base + noise |h_base| u), averaged over the row's real tokens, then over the rows; u is a random direction of
    length 1, one for the run. Without it the cosine would start at its maximum, where it has no gradient (ours).
    """

    kind: Literal["deviate"] = "deviate"
    depth: float = Field(7.5 / 32, ge=0, le=1, description="Which block: the one nearest this share of the depth.")
    noise: float = Field(
        0.1, ge=0, description="Length of the random part of the base's states, as a share of theirs."
    )
    seed: Seed = Field(0, description="Seed of the direction u.")

    @property
    def needs(self) -> Needs:
        return Needs(labels=False, depth=self.depth, base_hidden=True)

    def direction(self, width: int) -> Tensor:
        """Return [D] fp32: the random direction, of length 1."""
        u = torch.randn(width, generator=torch.Generator().manual_seed(self.seed))
        length: Tensor = u.norm()
        return u / length

    def __call__(self, tokens: Labelled) -> Tensor:
        assert tokens.hidden is not None
        assert tokens.hidden.base is not None
        states = wide(tokens.hidden.states)
        base = tokens.hidden.base.to(states)
        away = base + self.noise * base.norm(dim=-1, keepdim=True) * self.direction(states.shape[-1]).to(states)
        alike = 1 + torch.nn.functional.cosine_similarity(states, away, dim=-1)
        return mean_or_zero(row_means(alike, tokens.hidden.row, tokens.rows))


class UnknownCode(Objective):
    """SAE-guided unlearning (arXiv:2509.15631, rebuilt from a description): names look like names that the model does not know.

    s is the code that a frozen sparse autoencoder makes of a token's hidden state, u the base's mean code of invented names and
    k that of names to keep, over c, the base's mean |s|^2 on the names to forget:

        L = mean over rows of the mean over a row's name tokens of (|s - u|^2 - away |s - k|^2) / c

    With `away` below 1 it is bounded: it is least at s = (u - away k) / (1 - away). The description leaves open block, weights
    and autoencoder. Ours are: names are the words with a capital in the questions (`names` gives others), and a row without any
    counts whole; the unknown ones are the forget rows' questions with every name replaced by one that was made up, the known
    ones those of the retain rows; the autoencoder is read from `sae`, or a TopK one is trained on the states of these rows.
    """

    kind: Literal["unknown_code"] = "unknown_code"
    names: list[str] = Field(
        default_factory=list,
        description="Names to make unknown, as the questions write them; by default their words with a capital.",
    )
    depth: float = Field(0.5, ge=0, le=1, description="Which block: the one nearest this share of the depth.")
    away: float = Field(0.1, ge=0, lt=1, description="Weight of the distance from names to keep, below 1.")
    sae: str | None = Field(
        None,
        description="Folder of a sparse autoencoder of a block's output as sae-lens saves it, which names that block; by default "
        "one is trained.",
    )
    sae_width: Count = Field(4, ge=1, description="Its features, in widths of the model, where it is trained.")
    sae_active: Count = Field(16, ge=1, description="Features of a state that are active, where it is trained.")
    sae_steps: Steps = Field(500, ge=1, description="Steps of its training.")

    @property
    def needs(self) -> Needs:
        return Needs(labels=False, depth=self.depth, codes=True)

    def __call__(self, tokens: Labelled) -> Tensor:
        hidden = tokens.hidden
        assert hidden is not None
        assert hidden.named is not None
        assert hidden.codes is not None
        code = hidden.codes.encode(wide(hidden.states[hidden.named]))
        near, far = ((code - mean.to(code)).square().sum(-1) for mean in (hidden.codes.unknown, hidden.codes.known))
        return mean_or_zero(
            row_means((near - self.away * far) / hidden.codes.scale, hidden.row[hidden.named], tokens.rows)
        )


class Redirect(Objective):
    """LUNAR (Shen et al. 2025, arXiv:2502.07218, and its code): hidden states of forget prompts go where the base cannot answer.

    r is the base's mean hidden state at the last token of prompts that it cannot answer, less that of the forget rows' prompts:

        L = mean over rows of the mean over a row's prompt tokens of |h - (h_base + coefficient r)|^2 / D

    The prompts that it cannot answer are `questions`, or the forget rows' own with every name replaced by one that was made up
    (ours: the authors have lists of harmful and of unverifiable questions). A row of raw text counts whole. The authors train
    one layer's down-projection alone, on one mean over the tokens of both sets.
    """

    kind: Literal["redirect"] = "redirect"
    coefficient: float = Field(2.0, gt=0, description="How many times r the states move.")
    depth: float = Field(22.5 / 32, ge=0, le=1, description="Which block: the one nearest this share of the depth.")
    questions: list[str] = Field(
        default_factory=list,
        description="Questions that the model declines to answer; by default the forget rows' own about invented names.",
    )
    names: list[str] = Field(
        default_factory=list,
        description="Names that are replaced, as the questions write them; by default their words with a capital.",
    )

    @property
    def needs(self) -> Needs:
        return Needs(labels=False, depth=self.depth, base_hidden=True, redirected=True)

    def moved(self, states: Tensor, r: Tensor) -> Tensor:
        """Return the target [T, D] of the base's states; r is [D]."""
        return (wide(states) + self.coefficient * r.to(wide(states))).to(states.dtype)

    def __call__(self, tokens: Labelled) -> Tensor:
        hidden = tokens.hidden
        assert hidden is not None
        assert hidden.base is not None
        assert hidden.named is not None
        states = wide(hidden.states[hidden.named])
        distance = (states - hidden.base[hidden.named].to(states)).square().mean(-1)
        return mean_or_zero(row_means(distance, hidden.row[hidden.named], tokens.rows))


class KeepHidden(Objective):
    """Hidden states of retain rows stay where the frozen base has them (RMU's second term, arXiv:2403.03218).

    The squared distance is averaged over the width, over the row's real tokens, then over the rows, as in `Misdirect`.
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
