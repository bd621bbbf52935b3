"""A finished run on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from alter.core import UserError
from alter.storage import read_object, read_records, read_run


@dataclass(frozen=True)
class Run:
    """A finished unlearning run: a folder, as `alter unlearn`, `alter forget` or `alter distill` leaves it.

    Attributes:
        folder: the run's folder.
    """

    folder: Path

    @classmethod
    def at(cls, folder: str | PathLike[str]) -> Run:
        """Return the run in a folder.

        Raises:
            UserError: the folder holds no finished run.
        """
        path = Path(folder)
        if not (path / "run.json").is_file():
            raise UserError(
                f"{folder} is no finished run: run.json is missing. Expected the out folder of an unlearn run."
            )
        return cls(path)

    @cached_property
    def record(self) -> dict[str, Any]:
        """What `run.json` says: settings, router, steps, seconds, losses, provenance."""
        return read_run(self.folder)

    @property
    def base(self) -> str:
        """Name of the model that the run started from."""
        return str(self.record["settings"]["model"])

    @property
    def adapter(self) -> Path | None:
        """Folder of the trained adapter; None if the run changed the model's own weights."""
        path = self.folder / "adapter"
        return path if path.is_dir() else None

    @property
    def model(self) -> str:
        """The model to load: the base that the adapter goes on, or the changed weights."""
        path = self.folder / "model"
        return str(path) if path.is_dir() else self.base

    @property
    def template(self) -> list[str]:
        """Variables of the chat template that the run's rows were written with, each NAME=VALUE."""
        return list(self.record["settings"].get("chat_template_kwargs") or [])

    @property
    def erased(self) -> Run | None:
        """The run of plain weights that `alter.forget(..., erase=True)` made of this one; None where it made none."""
        path = self.folder / "erased"
        return Run(path) if (path / "run.json").is_file() else None

    @property
    def verdict(self) -> dict[str, Any] | None:
        """Whether it was forgotten, as the run found at its end; None where it compared nothing.

        `word` is "forgotten", "not forgotten", "collapsed" or "unproven", `why` the sentences behind it. Of a run that was
        `erased` it is of the plain weights.

        Raises:
            UserError: the file that holds it is broken.
        """
        from alter.evaluation import closing_of

        told = self.folder / "report.json"
        if (self.folder / "forget.json").is_file():
            return read_object(told, "what alter forget wrote").get("verdict") if told.is_file() else None
        records = self.folder / "records.json"
        closed = closing_of(read_records(records)) if records.is_file() else None
        return None if closed is None else closed["verdict"]
