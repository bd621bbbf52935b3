"""The plan of `alter compare`: every cell of the settings, laid out and checked before the first one runs.

A cell is one unlearning run and its evaluation, or with `continual` a chain of runs, each starting from the last one's
result. Its key is a digest of everything that determines its numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from alter.comparison.checks import ORIGINAL, RETRAINED, check_continual, check_parts, check_settings
from alter.comparison.code import distilling_digest, source_digest
from alter.comparison.distilling import DISTILL, Distillation, distillation_of, undistilled
from alter.comparison.division import (
    RETAIN_SPLITS,
    evaluation_rows,
    forget_rows,
    forget_set,
    forget_source,
    json_lines,
    retain_source,
)
from alter.comparison.settings import Compare
from alter.core import UserError, nearest
from alter.data import read_rows
from alter.methods import METHODS, overridden
from alter.models import ModelSettings
from alter.settings import refusal
from alter.storage import digest, write_atomic
from alter.storage.provenance import provenance
from alter.training import Unlearn, batches_of_step

CELL = 2
"""Version of `cells.work`: raise it when what a cell does changes, so that no older result is reused."""
RATES = ("learning_rate", "learning_rate_experts", "learning_rate_shared")
UNKEYED = {"out", "resume", "overwrite", "save_steps", "method"}
"""Settings of a run that change no number, or that enter the key by their contents (weights, rows) instead of their names."""


Setting = tuple[float, float]
"""A point of the grid: multiple of the learning rates, epochs."""
Chain = tuple[str, ...]
"""Splits that one cell forgets, in this order; one, but for a continual comparison."""


@dataclass(frozen=True)
class Cell:
    """One run or chain of runs and its evaluation, or (without setting) the evaluation of a given model.

    `key` is the digest of everything that determines the result; `spec` is the input of the cell's process.
    """

    name: str
    chain: Chain
    seed: int | None
    setting: Setting | None
    spec: dict[str, Any]
    key: str

    def __str__(self) -> str:
        place = f"{self.name} {' then '.join(self.chain)}"
        if self.setting is None:
            return place
        return f"{place} seed {self.seed}, rate {self.setting[0]:g}, {self.setting[1]:g} epochs"


def chains(settings: Compare) -> list[Chain]:
    """Return the chains of splits: each split alone, or all of them one after another (`continual`)."""
    return [tuple(settings.forgotten)] if settings.continual else [(split,) for split in settings.forgotten]


# What to run ---------------------------------------------------------------------------------------------------------


def run_of(
    settings: Compare, name: str, split: str, seed: int, setting: Setting, forget: tuple[str, int] | None = None
) -> Unlearn:
    """Return the settings of one cell's unlearning: the method's own, then `common`, then `settings` of the row, then the grid's.

    Args:
        forget: source of the forget rows and their number; by default the whole split.

    Raises:
        UserError: no such method, or settings that do not fit.
    """
    own = undistilled(settings.settings.get(name, {}))
    choices = [*METHODS, *settings.settings]
    if name not in choices:
        raise UserError(
            f"No method {name!r}; expected one of {', '.join(METHODS)}, or a name under `settings` in the recipe."
            f"{nearest(name, choices)}"
        )
    method = own.get("method", name if name in METHODS else None)
    if DISTILL in settings.common:
        raise UserError(
            f"`common` has {DISTILL!r}, but it holds settings of `alter unlearn` for all rows: give {DISTILL!r} to a row, under "
            "`settings`."
        )
    reserved = [
        key for key in (*settings.common, *own) if key in ("model", "forget", "retain", "out", "seed", "epochs")
    ]
    if reserved:
        raise UserError(
            f"{reserved[0]!r} is the comparison's own setting: leave it out of common and settings.{name}."
        )
    base = {} if method is None else METHODS[method].settings if method in METHODS else {"method": method}
    given = overridden(overridden(base, settings.common), own)
    source, count = forget or (forget_source(settings, split), len(forget_rows(settings, split)))
    rate, epochs = setting
    given |= {"model": settings.model, "forget": source, "retain": retain_source(settings, split), "out": "run"}
    given |= {"seed": seed, "epochs": epochs, "device": settings.device}
    try:
        run = Unlearn.model_validate(given)
        scaled = {key: getattr(run, key) * rate for key in RATES}
        rows = settings.least_steps * run.batch_size * batches_of_step(run, count)
        least = rows / count
        if math.ceil(least * count) > rows:
            least = math.nextafter(least, 0.0)  # rounding must not add a step for one row more
        return Unlearn.model_validate(run.model_dump() | scaled | {"epochs": max(epochs, least)})
    except ValidationError as error:
        raise UserError(f"Method {name}: {refusal(error, Unlearn)}") from None


@dataclass(frozen=True)
class Layout:
    """All cells: those of the given models by name and split, and the grid's by name and chain, setting, seed.

    `lay` gives the cells of one more setting by seed, which belong into `grid`.
    """

    models: dict[tuple[str, str], Cell]
    grid: dict[tuple[str, Chain], dict[Setting, dict[int, Cell]]]
    lay: Callable[[str, Chain, Setting], dict[int, Cell]]

    def searched(self, settings: Compare) -> list[Cell]:
        """Return the cells of the search: every setting with the search seeds, in an order in which all methods advance alike."""
        seeds = settings.seeds[: settings.search_seeds]
        points = itertools.product(itertools.product(settings.rates, settings.epochs), seeds)
        return [by[point][seed] for point, seed in points for by in self.grid.values()]


@dataclass(frozen=True)
class _Laid:
    """What the cells of one chain share.

    Attributes:
        facts: what decides their numbers besides model and settings.
        stages: what each stage's specification says of split and rows.
        sources: where each stage's forget rows are, and how many.
    """

    facts: dict[str, Any]
    stages: list[dict[str, Any]]
    sources: list[tuple[str, int]]


def lay_out(settings: Compare, out: Path) -> Layout:
    """Lay out every cell, and write the evaluation rows, and the new rows of each split, into `out`/rows.

    Raises:
        UserError: see `check_settings`, `run_of`, `check_continual`, `distillation_of` and `ModelSettings.identity`; a hub that
            does not answer; data that is missing; or two cells that are the same run.
    """
    check_settings(settings)
    settings = settings.model_copy(update={"device": settings.cells_on})
    facts = _facts(settings)
    weights = _weights(settings)
    models: dict[tuple[str, str], Cell] = {}
    laid = {chain: _lay_chain(settings, chain, out, facts, weights, models) for chain in chains(settings)}
    distilled = {(name, chain): _distillations(settings, name, chain) for chain in laid for name in settings.methods}
    seen: dict[str, Cell] = {}

    def lay(name: str, chain: Chain, setting: Setting) -> dict[int, Cell]:
        by: dict[int, Cell] = {}
        for seed in settings.seeds:
            cell = _cell(settings, name, chain, setting, seed, laid[chain], weights, distilled[name, chain])
            if cell.key in seen:
                raise UserError(f"Two cells are the same run: {seen[cell.key]}, and {cell}. Leave one of them out.")
            seen[cell.key] = by[seed] = cell
        return by

    grid: dict[tuple[str, Chain], dict[Setting, dict[int, Cell]]] = {}
    for chain in laid:
        for name in settings.methods:
            points = itertools.product(settings.rates, settings.epochs)
            grid[name, chain] = {setting: lay(name, chain, setting) for setting in points}
    return Layout(models, grid, lay)


def _facts(settings: Compare) -> dict[str, Any]:
    """Return what decides the numbers of every cell: code, versions, device.

    Raises:
        UserError: a device that is not there.
    """
    place = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    here = settings.executor == "local"
    if here:
        ModelSettings(model=settings.model, device=settings.device).place()
    return {
        "cell": CELL,
        "code": source_digest(),
        "versions": provenance()["versions"],
        "device": torch.cuda.get_device_name() if here and place == "cuda" else place,
        "limit": settings.limit,
        **({"survival": settings.survival.model_dump(exclude={"bound"})} if settings.survival.rows else {}),
    }


def _weights(settings: Compare) -> dict[str, str | None]:
    """Return digests of the models' weights, by name.

    Raises:
        UserError: no model of a name.
    """
    names = (settings.model, *settings.retrained.model_dump().values())
    weights = {name: ModelSettings(model=name).identity()["weights"] for name in names if name is not None}
    for name, content in weights.items():
        if content == "unknown":
            raise UserError(f"No model at {name}: no folder has this name, and the hub does not answer for it.")
    return weights


def _lay_chain(
    settings: Compare,
    chain: Chain,
    out: Path,
    facts: Mapping[str, Any],
    weights: Mapping[str, str | None],
    models: dict[tuple[str, str], Cell],
) -> _Laid:
    """Write the rows of a chain's splits into `out`/rows, and add the cells of the given models to `models`."""
    laid = _Laid(dict(facts), [], [])
    known: list[Any] = []
    for split in chain:
        rows = evaluation_rows(settings, split)
        fewest = min(len(own[forget_set(split)]) for own in rows.values())
        if settings.survival.rows >= fewest:
            raise UserError(
                f"`survival.rows` is {settings.survival.rows}, but a part of {split} has {fewest} forget rows, of which some must "
                f"be left to ask: give {fewest - 1} or less."
            )
        trained = {
            name: read_rows(source)
            for name, source in (
                (split, forget_source(settings, split)),
                (RETAIN_SPLITS.get(split, "retain"), retain_source(settings, split)),
            )
        }
        new = [row for row in forget_rows(settings, split) if row not in known]
        if not new:
            raise UserError(f"{split} adds no row to the splits before it: leave it out of splits.")
        known += new
        content = digest(rows, new)
        folder = out / "rows" / content
        for part, sets in rows.items():
            for name, own in sets.items():
                write_atomic(folder / part / f"{name}.json", json_lines(own), private=True)
        write_atomic(folder / "new.jsonl", json_lines(new), private=True)
        laid.stages.append({"split": split, "rows": f"rows/{content}"})
        about = {"split": split, "rows": digest(rows)}
        for name, model in ((ORIGINAL, settings.model), (RETRAINED, getattr(settings.retrained, split))):
            if model is not None:
                # asked with the template of the runs, or their figures would not be comparable
                template = settings.common.get("chat_template_kwargs")
                asked = {"template": list(template)} if template else {}
                key = digest(facts, about, {"model": weights[model]} | asked)
                spec = {**_told(settings), **asked, "name": name, "model": model, "stages": [laid.stages[-1]]}
                models[name, split] = Cell(name, (split,), None, None, spec, key)
        laid.facts[split] = [about, digest(trained, new)]
        # a first run takes the whole split, a later one what it has more than the one before
        whole = len(known) == len(new)
        laid.sources.append((forget_source(settings, split) if whole else f"rows/{content}/new.jsonl", len(new)))
    return laid


def _distillations(settings: Compare, name: str, chain: Chain) -> list[Distillation]:
    """Return how a row's model is distilled after each split of a chain; nothing for a row that is not.

    Raises:
        UserError: see `run_of` and `distillation_of`.
    """
    setting = (settings.rates[0], settings.epochs[0])
    runs = {split: run_of(settings, name, split, settings.seeds[0], setting) for split in chain}
    found = (distillation_of(settings, name, split, run) for split, run in runs.items())
    return [each for each in found if each is not None]


def _told(settings: Compare) -> dict[str, Any]:
    """Return the part of a specification that all cells share."""
    told: dict[str, Any] = {"limit": settings.limit, "device": settings.device, "original": settings.model}
    told |= {} if settings.minutes is None else {"minutes": settings.minutes}
    column = settings.common.get("domain_column") if settings.forget is not None else None
    told |= {} if column is None else {"domain_column": column}
    return told | ({"survival": settings.survival.model_dump()} if settings.survival.rows else {})


def _cell(
    settings: Compare,
    name: str,
    chain: Chain,
    setting: Setting,
    seed: int,
    laid: _Laid,
    weights: Mapping[str, str | None],
    distilled: Sequence[Distillation],
) -> Cell:
    """Lay out the cell of one method, chain, setting and seed; `distilled` has what is distilled after each split, or nothing."""
    runs = [
        run_of(settings, name, split, seed, setting, source) for split, source in zip(chain, laid.sources, strict=True)
    ]
    check_parts(runs[0])
    if len(chain) > 1:
        check_continual(name, runs[0])
    # a preset that the settings contain already must not name the cell
    decides = [run.model_dump(mode="json", exclude=UNKEYED | {"model", "device"}) for run in runs]
    about: dict[str, Any] = {"model": weights[settings.model], "runs": decides}
    ran = [{**stage, "run": run.model_dump(mode="json")} for stage, run in zip(laid.stages, runs, strict=True)]
    if distilled:
        about |= {"distill": [each.decides(seed) for each in distilled], "distill_code": distilling_digest()}
        ran = [{**stage, "distill": each.told(seed)} for stage, each in zip(ran, distilled, strict=True)]
    key = digest(laid.facts, about)
    spec = {**_told(settings), "name": name, "model": settings.model, "stages": ran, "keep": settings.keep}
    return Cell(name, chain, seed, setting, spec, key)
