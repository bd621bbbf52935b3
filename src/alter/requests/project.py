"""What all requests of one database share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Project(BaseModel):
    """What all requests of one database share; `base` and `kept` are of the base in force (`alter.requests.bases`).

    A `folder` at or under that of a SQLite database is stored relative to it, so that both can be moved or copied together: a copy
    has adapters of its own.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    retain: str
    folder: str
    holdout: str | None = None
    retrained: str | None = None
    recipe: dict[str, Any] = Field(default_factory=dict)
    retain_rows: int = 200
    answers: int = 100
    distill_every: int | None = None
    distill: dict[str, Any] = Field(default_factory=dict)
    base: int = 0
    kept: float = 1.0

    @property
    def home(self) -> Path:
        """The folder as a path."""
        return Path(self.folder)

    @property
    def root(self) -> Path:
        """Folder of the adapters and runs of the base in force."""
        return self.base_folder(self.base)

    def base_folder(self, number: int) -> Path:
        """Return the folder of a base with its weights; for the first base, the project's folder itself."""
        return self.home / "bases" / f"{number:04d}" if number else self.home

    @property
    def template(self) -> list[str]:
        """Variables of the chat template, from the recipe."""
        return list(self.recipe.get("chat_template_kwargs", []))

    @property
    def adapter(self) -> Path:
        """The link to the adapter in force."""
        return self.root / "adapter"
