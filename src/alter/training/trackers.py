"""Experiment trackers that receive a run's losses on request, besides its own log."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from alter.core import UserError

Tracker = Literal["tensorboard", "trackio", "wandb"]

ReportTo = Annotated[
    list[Tracker],
    Field(
        description="Trackers that get the losses, the run's settings as transformers has them and the model's "
        "configuration, no rows: tensorboard (files in out/tensorboard), trackio, wandb. None by default.",
    ),
]
"""A setting that `trackers` takes."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        UserError: names the package.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"`report_to` names {name}, which is not installed: pip install {name}")


def trackers(names: Sequence[str], out: Path) -> list[Any]:
    """Return transformers' callbacks for these trackers; TensorBoard's files go to `out`/tensorboard."""
    from transformers import integrations

    found: list[Any] = []
    for name in dict.fromkeys(names):
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            found.append(integrations.TensorBoardCallback(SummaryWriter(str(out / "tensorboard"))))
        else:
            found.append({"trackio": integrations.TrackioCallback, "wandb": integrations.WandbCallback}[name]())
    return found
