"""Distilled rows: where `settings` of a row hold `distill`, its unlearned model is distilled, and the plain weights are measured.

Teacher is what the row's method has unlearned, student the comparison's model as it was before; rows and seed are the cell's.
In a continual comparison every stage's model is distilled, and the next stage goes on from the undistilled one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from alter.comparison.division import forget_source
from alter.comparison.settings import Compare
from alter.core import UserError, nearest
from alter.distillation import Distill, check_named, read_sets
from alter.settings import refusal
from alter.storage import digest
from alter.training import Unlearn

DISTILL = "distill"
"""Name of these settings in those of a row."""
OWN = {
    *("run", "model", "adapter", "student", "forget", "retain", "out", "seed", "device", "chat_template_kwargs"),
    *("closing_rows", "resume", "overwrite"),
}
"""Settings of `alter distill` that the comparison gives."""
UNKEYED = (OWN - {"seed", "chat_template_kwargs"}) | {
    "neighbours",
    "general",
    "checkpoint_steps",
    "log_steps",
    "report_to",
}
"""Settings that change no number, or enter a cell's key by their contents in place of their names."""


def distilled_rows(settings: Compare) -> dict[str, Any]:
    """Return the `distill` of those rows that have one, by the row's name."""
    return {name: own[DISTILL] for name, own in settings.settings.items() if DISTILL in own}


def undistilled(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's settings without `distill`: those of `alter unlearn`."""
    return {key: value for key, value in own.items() if key != DISTILL}


@dataclass(frozen=True)
class Distillation:
    """How a stage of a row is distilled.

    Attributes:
        settings: those of `alter distill`; a cell sets teacher, folder and seed.
        content: digest of the rows and texts that they name.
    """

    settings: Distill
    content: str

    def told(self, seed: int) -> dict[str, Any]:
        """Return the settings as a cell's specification has them."""
        return self._at(seed).model_dump(mode="json")

    def decides(self, seed: int) -> dict[str, Any]:
        """Return what decides the numbers of the distilled weights, besides code, model and teacher."""
        return {**self._at(seed).model_dump(mode="json", exclude=UNKEYED), "content": self.content}

    def _at(self, seed: int) -> Distill:
        return self.settings.model_copy(update={"seed": seed})


def distillation_of(settings: Compare, name: str, split: str, run: Unlearn) -> Distillation | None:
    """Return how a row's model is distilled after it has forgotten a split; None for a row that is not.

    Args:
        run: settings of an unlearning of this row and split.

    Raises:
        UserError: settings that `alter distill` does not have or refuses, or that are the comparison's own; a source that
            cannot be read, holds what is to be forgotten, or has none of the names; or a teacher with a quantised base, which
            distilling does not load.
    """
    if name not in distilled_rows(settings):
        return None
    own = distilled_rows(settings)[name]
    where = f"settings.{name}.{DISTILL}"
    if not isinstance(own, Mapping):
        raise UserError(
            f"{where} is {own!r}; expected settings of `alter distill` by name, such as {{max_steps: 300}} ({{}} for its defaults)."
        )
    unknown = [key for key in own if key not in Distill.model_fields]
    if unknown:
        raise UserError(
            f"{where} has {unknown[0]!r}, which is no setting of `alter distill`.{nearest(str(unknown[0]), Distill.model_fields)}"
        )
    taken = sorted(OWN & own.keys())
    if taken:
        raise UserError(f"{taken[0]!r} is the comparison's own setting: leave it out of {where}.")
    if run.quantization is not None:
        raise UserError(
            f"Method {name} has `quantization` {run.quantization!r}, and `{DISTILL}` loads its teacher without: leave one of them "
            "out."
        )
    given = {
        "model": settings.model, "student": settings.model, "forget": forget_source(settings, split), "retain": run.retain,
        "out": "plain", "device": settings.device, "chat_template_kwargs": run.chat_template_kwargs, "closing_rows": 0,
    }  # fmt: skip
    try:
        wanted = Distill.model_validate({**own, **given})
    except ValidationError as error:
        raise UserError(f"Method {name}, {DISTILL}: {refusal(error, Distill)}") from None
    found = read_sets(wanted)
    if wanted.names:
        check_named(found["forget"], wanted.names, found["keep"], wanted.other_names)
    return Distillation(wanted, digest({kind: [row.row for row in rows] for kind, rows in found.items()}))


def distilled_rule(settings: Compare) -> list[str]:
    """Describe, in a line, the distilled rows of the table; none where there are none."""
    names = [name for name in settings.methods if name in distilled_rows(settings)]
    if not names:
        return []
    return [
        f"Distilled into plain weights once unlearned: {', '.join(names)}. All figures are of these weights, which the attacker "
        "trains; time, steps and memory are of both. The grid's rates multiply those of unlearning alone."
    ]
