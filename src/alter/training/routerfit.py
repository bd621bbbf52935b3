"""Settings of the router's fit (`alter.training.router`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from alter.settings import Count, Steps, Tokens


class RouterFit(BaseModel):
    """How the router learns which expert serves which token: one linear score per expert on hidden states.

    Text of unknown kinds counts as ordinary: a shipped sample of many kinds of text always joins the fit, and the level at
    which experts open is set on kinds of text that the fit has not seen.
    """

    model_config = ConfigDict(extra="forbid")

    method: Literal["discriminant", "logistic"] = Field(
        "discriminant",
        description="Fisher's discriminant in closed form, or a logistic regression, which steps, retain_weight, "
        "learning_rate and weight_decay are for.",
    )
    shrinkage: float = Field(
        0.05, gt=0, description="Discriminant: added to the covariance's diagonal, as a share of its mean."
    )
    steps: Steps = Field(1000, ge=1)
    retain_weight: float = Field(
        30.0,
        gt=0,
        description="How much worse it is to open an expert for a retain token than to miss a forget token.",
    )
    learning_rate: float = Field(0.03, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    max_tokens: Tokens = Field(150_000, ge=1, description="Tokens kept for the fit; drawn at random from all.")
    false_alarms: float | None = Field(
        0.01,
        gt=0,
        lt=0.5,
        description="Share of ordinary low-entropy tokens that may open a forget expert, at most; null leaves the level at "
        "which experts open as the scores have it.",
    )
    memories: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0.9, 0.97, 1.0],
        min_length=1,
        description="Values of adapter.router_memory that are tried where none is given, with method discriminant. The least "
        "one is taken that, of the wording which it catches worst, catches nearly as many forget tokens as the best: a short "
        "memory is not drowned by long texts.",
    )
    background: bool = Field(True, description="Let the shipped sample of ordinary text join the fit.")
    rewordings: Count = Field(
        3,
        ge=0,
        description="Other wordings of every forget row's question that join the fit, drawn from twelve by rule; of ordinary "
        "questions one.",
    )
