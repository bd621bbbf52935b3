"""`alter muse-curve`: MUSE's last two criteria, scalability and sustainability, over models that forgot more and more."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import Field

from alter.core import UserError, console
from alter.evaluation.added import check_added, with_added
from alter.evaluation.muse import MuseEvaluation
from alter.rendering import table
from alter.settings import shown
from alter.storage import Record, cache_folder, stamped, write_records


@dataclass(frozen=True)
class CurvePoint:
    """One model of a curve: its label, the size or step that it stands for, and what to load."""

    label: str
    x: float
    model: str
    adapter: str | None


SUFFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}


class MuseCurve(MuseEvaluation):
    """MUSE's scalability (forget sets that grow) or sustainability (requests one after another): one column per model.

    The first column is `model` as it is; the models of `points` follow.
    """

    criterion: Literal["scalability", "sustainability"]
    """What the points are: sizes of the forget set (C5), or numbers of requests done so far (C6)."""
    points: list[str] = Field(min_length=1)
    """SIZE=PATH or STEP=PATH in ascending order, as in 1=runs/r1/adapter 2=runs/r2/adapter or 0.8M=runs/small: PATH is
    the folder of an adapter (put on `model`), of a model, a hub id of a model, or MODEL+ADAPTER."""

    def parsed(self) -> list[CurvePoint]:
        """Return the points, --model itself at 0 first.

        Raises:
            UserError: a point does not have the form, its number is not a number, or the numbers do not ascend.
        """
        found = [CurvePoint(self.label, 0.0, self.model, self.adapter)]
        for text in self.points:
            label, equals, target = text.partition("=")
            number = re.fullmatch(r"(\d+(?:\.\d+)?)([kKMG]?)", label)
            if not equals or not target or number is None:
                raise UserError(
                    f"`points` {text!r} is not of the form NUMBER=PATH, as in 2=runs/r2/adapter or 0.8M=runs/small."
                )
            x = float(number[1]) * SUFFIXES[number[2]]
            if x <= found[-1].x:
                raise UserError(
                    f"`points` {text!r} does not come after {found[-1].label!r}: give sizes or steps above 0 in "
                    "ascending order."
                )
            model, plus, adapter = target.partition("+")
            if Path(target).expanduser().exists():
                is_adapter = (Path(target).expanduser() / "adapter_config.json").is_file()
                model, adapter = (self.model, target) if is_adapter else (target, "")
            elif plus and not (model and adapter):
                raise UserError(f"`points` {text!r}: expected MODEL+ADAPTER, got an empty name on one side of the +.")
            found.append(CurvePoint(label, x, model, adapter or None))
        return found

    def at(self, point: CurvePoint) -> MuseEvaluation:
        """Return the evaluation settings of one point."""
        own = self.model_dump(exclude={"criterion", "points", "json_path", "name", "model", "adapter", "merged"})
        return MuseEvaluation(
            **own,
            name=point.label,
            model=point.model,
            adapter=point.adapter,
            merged=self.merged and point.adapter is not None,
        )


def muse_curve(settings: MuseCurve) -> list[Record]:
    """Run `alter muse-curve`: measure every point as `alter evaluate --benchmark muse` does, print one table, write.

    Every record says its point: `criterion`, `point` (the label), `x` (the number). The data, the reference and the
    folders of all points are checked before the first is measured.

    Raises:
        UserError: see `MuseCurve.parsed`, `MuseEvaluation.data_digest` and `measure`, and `load_model`.
    """
    if settings.json_path is not None and Path(settings.json_path).is_dir():
        raise UserError(f"`json_path` is {settings.json_path!r}, a folder: give the path of a file.")
    check_added()
    points = settings.parsed()
    data = settings.data_digest()
    memo = cache_folder(settings.cache)
    identities = [settings.at(point).identity(memo) for point in points]
    curve: dict[str, list[Record]] = {}
    for point, identity in zip(points, identities, strict=True):
        evaluation = settings.at(point)
        model, tokenizer = evaluation.load()
        records = with_added(evaluation, model, tokenizer, evaluation.measure(model, tokenizer))
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        del model
        place = {"criterion": settings.criterion, "point": point.label, "x": point.x}
        curve[point.label] = stamped(
            [replace(record, extra=record.extra | place) for record in records],
            settings=evaluation.model_dump(mode="json", exclude={"json_path", "cache"}),
            seed=settings.seed,
            **identity,
            data=data,
            device=settings.place(),
            dtype=dtype,
        )
    console.show(table(curve, f"{settings.title()}, {settings.criterion}: {settings.model}"))
    everything = [record for records in curve.values() for record in records]
    if settings.json_path is not None:
        write_records(settings.json_path, everything)
        console.show(f"records: {shown(settings.json_path)}", stderr=True)
    return everything
