"""Settings of a base that is trained further on the forget set (`alter.groundwork.probes`)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from alter.settings import Count


class Reinforcement(BaseModel):
    """More training on the forget set, for objectives that aim away from its result; with LoRA of rank 16, alpha 32."""

    model_config = ConfigDict(extra="forbid")

    epochs: Count = Field(1, ge=1, description="Passes over the forget set.")
    learning_rate: float = Field(1e-4, gt=0)
