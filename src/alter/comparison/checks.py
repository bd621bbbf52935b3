"""What `alter compare` refuses before any cell is planned."""

from __future__ import annotations

from pydantic import ValidationError

from alter.comparison.settings import OWN, Compare
from alter.core import UserError, nearest
from alter.evaluation import added_to, check_added
from alter.methods import METHODS
from alter.plugins import is_found_elsewhere
from alter.settings import mistake
from alter.training import Unlearn

ORIGINAL, RETRAINED = "original", "retrained"
"""Rows of every table: the given models as they are."""


def check_continual(name: str, run: Unlearn) -> None:
    """Refuse a method whose result cannot be the start of a second run.

    Raises:
        UserError: its adapter can neither grow, be trained on, nor be merged, nor is it the model itself; or its settings
            do not go with `start_from`.
    """
    try:
        run.adapter.check_continues(run)
    except ValueError as error:
        raise UserError(f"Method {name} cannot start from its own result: {error}.") from None
    if run.adapter.result == "model" or run.adapter.merges:
        return
    try:
        Unlearn.model_validate(run.model_dump() | {"start_from": "the stage before"})
    except ValidationError as error:
        raise UserError(f"Method {name} cannot start from its own result: {mistake(error.errors()[0])}") from None


def check_parts(run: Unlearn) -> None:
    """Refuse parts that only this process knows: every cell has one of its own.

    Raises:
        UserError: names the part, and where to put it.
    """
    for name in ("adapter", "initializer", "objective", "retain_objective", "gradient"):
        part = getattr(run, name)
        if not is_found_elsewhere(type(part).__module__):
            raise _unknown_elsewhere(f"`{name}.kind` {part.kind}")


def _unknown_elsewhere(what: str) -> UserError:
    return UserError(
        f"{what} is registered in this process alone, and each cell of a comparison has one of its own: put it into a file, and "
        "name that in the environment's ALTER_PLUGINS (`alter compare --plugin FILE.py`)."
    )


def _check_added(settings: Compare) -> None:
    """Check the metrics that plugins added to what is measured.

    Raises:
        UserError: one is for a benchmark that does not exist, or only this process knows it.
    """
    check_added()
    for name, function in added_to(settings.benchmark).items():
        if not is_found_elsewhere(function.__module__):
            raise _unknown_elsewhere(f"The metric {name!r}")


def check_settings(settings: Compare) -> None:
    """Check the settings before any cell is planned.

    Raises:
        UserError: an empty or repeated list, a number that cannot be a rate or a length, more search seeds than seeds, or a metric that
            a cell would not know.
    """
    _check_own(settings)
    _check_added(settings)
    lists = {name: getattr(settings, name) for name in ("methods", "splits", "seeds", "rates", "epochs")}
    for name, values in lists.items():
        if not values:
            raise UserError(f"{name} is empty, so there is nothing to run: give at least one.")
        again = [value for i, value in enumerate(values) if value in values[:i]]
        if again:
            raise UserError(f"{name} has {again[0]!r} twice: two cells would be the same run. Give each value once.")
    sizes = [int(split.removeprefix("forget")) for split in settings.splits]
    if settings.continual and sizes != sorted(sizes):
        raise UserError(f"`splits` is {settings.splits}; a continual comparison takes them from small to large.")
    if settings.refine and len(settings.rates) < 2:
        raise UserError(
            f"refine is {settings.refine}, but rates has {settings.rates[0]:g} only, which says nothing about the step to "
            "the next: give two or more, or refine 0."
        )
    if settings.search_seeds is not None and settings.search_seeds > len(settings.seeds):
        raise UserError(f"`search_seeds` is {settings.search_seeds}, but there are {len(settings.seeds)} seeds.")
    names = [name for name in settings.methods if name in (ORIGINAL, RETRAINED)]
    if names:
        raise UserError(f"{names[0]!r} is a row of every table already: rename the method.")
    # a name that stands for itself may be left out of a run; any other must be a slip
    spare = [
        name
        for name, own in settings.settings.items()
        if name not in settings.methods and name not in METHODS and "method" not in own
    ]
    if spare:
        raise UserError(
            f"`settings` has {spare[0]!r}, which is not among the methods.{nearest(spare[0], settings.methods)}"
        )


def _check_own(settings: Compare) -> None:
    """Check what goes with rows of one's own, and what without.

    Raises:
        UserError: `forget` without `retain` or with a setting that is of TOFU's splits; a retrained model of what is not forgotten.
    """
    told = settings.retrained.model_dump(exclude_none=True)
    unused = [name for name in told if name not in settings.forgotten]
    if settings.forget is None:
        if OWN in told:
            raise UserError("`retrained.rows` is a model that never saw the rows of `forget`, which is not given.")
        return
    if settings.retain is None:
        raise UserError(f"`forget` is {settings.forget}, and rows of your own to keep are missing: give `retain`.")
    tofu = [name for name in ("splits", "data") if getattr(settings, name) != Compare.model_fields[name].default]
    if tofu or settings.continual:
        name = (tofu or ["continual"])[0]
        raise UserError(f"`forget` names rows of your own, and `{name}` is of TOFU's splits: leave one of them out.")
    if unused:
        raise UserError(
            f"`retrained.{unused[0]}` is of a split of TOFU; for the rows of `forget` give `retrained.rows`."
        )
