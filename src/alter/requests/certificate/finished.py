"""Assemble what a certificate states of a finished run, and compare it with what lies in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alter.core import UserError
from alter.evaluation import LEAST, closing_of, mean_interval, unit_interval
from alter.models import ModelSettings
from alter.requests.certificate.form import FORM, VERSION, hashes, model_hashes
from alter.requests.certificate.issue import (
    Beside,
    attacks_of,
    identities,
    issued_by,
    limits,
    refuse_base,
    settings_of,
    shortened,
)
from alter.requests.records import now
from alter.storage import Record, folder_digest, read_object, read_records, read_run


def state_run(run: Path, beside: Beside) -> dict[str, Any]:
    """Return what a finished run states: the figures and the verdict of its last table (`records.json`), if it has one.

    Raises:
        UserError: the run holds no result, its figures are of other weights than those that lie there now or its verdict of other
            rows than those that it forgot, or attacks are on something else.
    """
    record = read_run(run)
    given, made = record["settings"], record.get("provenance")
    if not isinstance(made, Mapping) or "measured" not in made:
        raise UserError(
            f"{run / 'run.json'} does not say when and by what the run was made (`provenance`): it was changed, or is of a version "
            "before this one. Run it again to certify it."
        )
    result = next((run / kind for kind in ("adapter", "model") if (run / kind).is_dir()), None)
    if result is None:
        raise UserError(f"{run} holds neither adapter nor model: there is nothing to certify.")
    whole = result.name == "model"
    model, adapter = (str(result), None) if whole else (_base_of(given), str(result))
    measured = read_records(run / "records.json") if (run / "records.json").is_file() else []
    if measured:
        _check_measured(run, measured, model, adapter)
        _check_rows(run, measured, (record.get("data") or {}).get("forget"))
    found = (closing_of(measured) or {}).get("verdict") or _found_by_forget(run, result)
    # as the rows were when it ran, whatever the files hold now
    asked = record.get("data") or {}
    left_out = {"model", "adapter", "student", "run", "forget", "retain", "out", "start_from", "resume", "overwrite"}
    content: dict[str, Any] = {
        "form": FORM,
        "version": VERSION,
        "issued": now(),
        "asked": {
            "run": True,
            "received": made["measured"],
            "data": asked.get("forget"),
            "retain": asked.get("retain"),
        },
        "state": found["word"],
        "why": found["why"],
        "base": {"name": Path(_base_of(given)).name, "files": model_hashes(_base_of(given))},
        "result": {"files": hashes(result)},
        "shipped": beside.files(),
        "code": {"run": made, "certificate": issued_by()},
        "settings": settings_of({name: value for name, value in given.items() if name not in left_out}),
        "measured": {"figures": [_figure(each) for each in measured]},
        "attacks": attacks_of(
            beside.attacks,
            identities(beside, model, adapter),
            asked.get("forget"),
        ),
        "limits": limits(beside, adapter=not whole),
    }
    refuse_base(beside, content)
    return content


def _base_of(given: Mapping[str, Any]) -> str:
    """Return the model that a run began with: of a distillation the student, whose weights it changed."""
    return str(given.get("student") or given["model"])


def _found_by_forget(run: Path, result: Path) -> dict[str, Any]:
    """Return the verdict of `alter forget` on the weights that lie there, "not measured" where it has none on them.

    What it says of weights that it erased stands in the folder around theirs.

    Raises:
        UserError: it is broken, or says FORGOTTEN where as many probes are answered as before.
    """
    for folder in (run, run.resolve().parent):
        if not (folder / "forget.json").is_file() or not (folder / "report.json").is_file():
            continue
        told = read_object(folder / "report.json", "what alter forget found")
        if told.get("weights") != folder_digest(result) or not isinstance(told.get("verdict"), dict):
            continue
        asked = told["probes"]["all probes"]
        if told["verdict"]["word"] == "forgotten" and not asked["after"] < asked["before"]:
            raise UserError(
                f"{folder}/report.json says FORGOTTEN beside figures that do not ({asked['after']} of {asked['before']} probes answered): "
                "nothing is certified. Measure again."
            )
        found: dict[str, Any] = told["verdict"]
        return found
    return {"word": "not measured", "why": []}


def _check_measured(run: Path, records: Sequence[Record], model: str, adapter: str | None) -> None:
    """Compare what a run's figures were measured of with what lies there now.

    Raises:
        UserError: they are of other weights, or do not say of which.
    """
    here = ModelSettings(model=model, adapter=adapter).identity()
    for record in records:
        of = {name: record.provenance.get(name) for name in here}
        if "weights" not in record.provenance:
            raise UserError(
                f"{run}/records.json does not say which weights it measured, so nothing is certified: measure them with `alter "
                "evaluate`, or remove the file."
            )
        if of != here and "unknown" not in (*of.values(), *here.values()):
            raise UserError(
                f"{run}/records.json was measured of other weights than those that lie in {run} now ({record.model}: {of}, here "
                f"{here}): nothing is certified. Measure them again."
            )


def _check_rows(run: Path, records: Sequence[Record], asked: str | None) -> None:
    """Compare the rows that a verdict is about with those that the run was to forget, and its word with its figures.

    Raises:
        UserError: they are others, the verdict does not say which, or it says FORGOTTEN where nothing fell.
    """
    closed = closing_of(records)
    if closed is not None and (asked is None or closed.get("rows") != asked):
        raise UserError(
            f"{run}/records.json holds a verdict on other rows ({shortened({closed.get('rows')})}) than those that {run} was to "
            f"forget ({shortened({asked})}): nothing is certified. Measure the run's own rows with `alter evaluate --benchmark rows`."
        )
    if closed is not None and closed["verdict"]["word"] == "forgotten":
        then, now_ = (closed[when]["forget"] for when in ("before", "after"))
        if not (now_["n_said"] >= LEAST and now_["said"] < then["said"] and now_["probability"] < then["probability"]):
            raise UserError(
                f"{run}/records.json says FORGOTTEN beside figures that do not ({now_['said']} of {now_['n_said']} answers given, "
                f"{then['said']} before; probability {now_['probability']:.3f}, {then['probability']:.3f} before): nothing is certified. "
                "Measure again."
            )


def _figure(record: Record) -> dict[str, Any]:
    out: dict[str, Any] = {"model": record.model, "metric": record.metric, "value": record.value, "n": record.n}
    known = [value for value in record.per_item or [] if value is not None and value == value]
    if len(known) > 1 and all(-1 <= value <= 1 for value in known):
        out["interval"] = list(mean_interval(known) if min(known) < 0 else unit_interval(known))
    return out
