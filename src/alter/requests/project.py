"""What all requests of one database share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Project(BaseModel):
    """What all requests of one database share."""

    model_config = ConfigDict(extra="forbid")

    model: str
    retain: str
    folder: str
    holdout: str | None = None
    retrained: str | None = None
    recipe: dict[str, Any] = Field(default_factory=dict)
    retain_rows: int = 200
    answers: int = 100

    @property
    def root(self) -> Path:
        """The folder as a path."""
        return Path(self.folder)

    @property
    def template(self) -> list[str]:
        """Variables of the chat template, as the recipe gives them."""
        return list(self.recipe.get("chat_template_kwargs", []))

    @property
    def adapter(self) -> Path:
        """The link to the adapter in force."""
        return self.root / "adapter"
