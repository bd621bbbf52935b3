"""Assemble what a certificate states of a request or a finished run, and sign it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alter.core import UserError
from alter.models import ModelSettings
from alter.requests.certificate.form import FIGURES, FORM, VERSION, hashes, model_hashes
from alter.requests.database import Database
from alter.requests.project import Project
from alter.requests.records import HELD, Request, now, unnamed
from alter.requests.signing import Key, canonical, signed_text
from alter.storage import Record, read_records, write_atomic


@dataclass(frozen=True)
class Beside:
    """What a certificate names besides: the form that is handed out, and records of attacks.

    Attributes:
        shipped: a folder of weights or a GGUF file; None: nothing is handed out but the result.
        attacks: files of records.
    """

    shipped: str | None = None
    attacks: Sequence[str] = ()

    def files(self) -> dict[str, Any] | None:
        """Hash what is handed out."""
        return None if self.shipped is None else {"files": hashes(self.shipped)}


def refuse_base(beside: Beside, content: Mapping[str, Any]) -> None:
    """Refuse to state of the model from before that it is what is handed out, or a part of that: it knows all.

    Raises:
        UserError: the weights of the base are among those of the shipped form.
    """

    def weights(files: Mapping[str, str]) -> set[str]:
        return {sha for name, sha in files.items() if name.endswith((".safetensors", ".bin", ".gguf"))}

    base = weights(content["base"]["files"])
    if content["shipped"] is not None and base and base <= weights(content["shipped"]["files"]):
        raise UserError(
            f"{beside.shipped} holds the weights of {content['base']['name']}, the model from before, which knows all of it: nothing is "
            "certified. Give as `shipped` what was made of the result, or leave it out."
        )


def write_signed(content: Mapping[str, Any], key: Key, out: Path) -> dict[str, Any]:
    """Sign a statement, write it to `out` and return it with its signature."""
    # as JSON gives it back: keys of text, no NaN
    signed = key.sign(json.loads(canonical(content)))
    write_atomic(out, signed_text(signed))
    return signed


def settings_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    settings = unnamed(settings)
    return {"values": dict(settings), "sha256": hashlib.sha256(canonical(settings)).hexdigest()}


def issued_by() -> dict[str, Any]:
    from alter.storage import code_digest, versions

    found = versions()
    return {"alter": found.pop("alter-unlearning", None), "code": code_digest(), "versions": found}


def _measured(figures: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not figures:
        return None
    out: dict[str, Any] = {}
    for name, interval in FIGURES.items():
        if figures.get(name) is None:
            continue
        n = {"probability": "n", "exact_memorization": "n", "said": "n_said"}.get(name, "n_answers")
        out[name] = {"value": figures[name], "n": figures.get(n)}
        if interval is not None and figures.get(interval) is not None:
            out[name]["interval"] = list(figures[interval])
    return out


def attacks_of(
    paths: Sequence[str], targets: Sequence[Mapping[str, str | None]], data: str | None
) -> list[dict[str, Any]]:
    """Return what attacks recovered, from their records.

    Args:
        paths: files of records.
        targets: identities (see `ModelSettings.identity`) of what may have been attacked.
        data: hash of the rows that the attacks must have been after (`alter.data.rows.data_hash`).

    Raises:
        UserError: a file has no attacks, or they were made on something else or after other rows.
    """
    from alter.attacks import recovers, untrained

    found = []
    for path in paths:
        records = read_records(path)
        of = {
            (record.provenance.get("weights"), record.provenance.get("adapter"))
            for record in records
            if record.model == "unlearned" and "attack" in record.extra and "weights" in record.provenance
        }
        rows = [record for record in records if record.metric.startswith("attack_recovered_")]
        if not rows or not of:
            raise UserError(f"{path} holds no attacks: expected the records.json of `alter attack`.")
        if not of <= {(target["weights"], target["adapter"]) for target in targets}:
            raise UserError(
                f"{path} holds attacks on another model or adapter than this certificate is about: attack what is certified."
            )
        after = {
            record.provenance.get("rows")
            for record in records
            if record.model == "unlearned" and "weights" in record.provenance
        }
        if after != {data}:
            raise UserError(
                f"{path} holds attacks after other rows than those that were asked for ({shortened(after)}, asked {shortened({data})}): "
                "run `alter attack --forget` on the same rows, in the same order."
            )
        idle = dict(note.split(" ", 1) for note in untrained(records))
        found += [
            # one that brought something back is evidence, however badly it was trained
            _attack(record, data, None if recovers(record) else idle.get(str(record.extra.get("attack"))))
            for record in rows
        ]
    return found


def shortened(hashes: set[Any]) -> str:
    """Abbreviate hashes for messages."""
    return ", ".join(sorted("not recorded" if each is None else str(each)[:12] for each in hashes))


def _attack(record: Record, data: str | None, idle: str | None) -> dict[str, Any]:
    """State an attack; `idle` says that the attacker learned nothing himself, so that what he did not recover proves nothing."""
    extra = record.extra
    named = ("attack", "needs", "step", "depth", "before", "after", "original", "retrained", "interval", "refused")
    return {
        "metric": record.metric.removeprefix("attack_recovered_"),
        "recovered": record.value,
        "n": record.n,
        "data": data,
        **{name: extra[name] for name in named if name in extra},
        **({} if idle is None else {"no_evidence": idle}),
    }


def identities(beside: Beside, model: str, adapter: str | None) -> list[dict[str, str | None]]:
    if not beside.attacks:
        return []
    found = [ModelSettings(model=model, adapter=adapter).identity()]
    if beside.shipped is not None:
        found.append(ModelSettings(model=beside.shipped).identity())
    return found


def issue_for_request(database: Database, number: int, beside: Beside, key: Key, out: Path) -> dict[str, Any]:
    """Certify a request that is in force: write the signed certificate to `out`, note it in the history and return it.

    Raises:
        UserError: the request is not in force, anything in the database is not as it should be, attacks are on something else, or
            what is shipped is the base.
    """
    from alter.requests.checking import check_requests
    from alter.requests.versions import manifest

    store, project = database.open()
    with store.lease(database.who):
        request = store.get(number)
        if request.state not in HELD:
            raise UserError(
                f"{request.name} is {request.state}: there is nothing to certify. Only a request that is in force "
                f"({' or '.join(HELD)}) gets a certificate."
            )
        wrong = check_requests(store, project, behaviour=False).wrong
        if wrong:
            raise UserError("Nothing is certified, because the check failed: " + " ".join(wrong))
        history = store.history()
        inside = manifest(project)
        if request.state == "distilled":
            content = _distilled_content(beside, request, inside, project)
        else:
            content = _request_content(beside, request, inside, project.model, project.adapter.resolve())
        refuse_base(beside, content)
        content["history"] = {"head": history[-1].hash, "entries": len(history)}
        signed = write_signed(content, key, out)
        noted = {"certificate": hashlib.sha256(canonical(signed)).hexdigest(), "key": key.public}
        store.note(number, "certified", noted, database.who)
    return signed


def _request_content(
    beside: Beside, request: Request, inside: Mapping[str, Any], model: str, adapter: Path | None
) -> dict[str, Any]:
    """Return the statement on a request that the adapter in force holds on `model`, or with None, `model` itself."""
    run, after = dict(request.run or {}), dict(request.after or {})
    return {
        "form": FORM,
        "version": VERSION,
        "issued": now(),
        "asked": {
            "request": request.name,
            "received": request.received,
            "due": request.due,
            "rows": request.rows,
            "data": request.data_hash,
        },
        "state": request.state,
        "why": (after.get("verdict") or {}).get("why"),
        "base": {"name": Path(model).name if Path(model).exists() else model, "files": model_hashes(model)},
        "result": {"version": inside["version"], "expert": request.expert, "files": hashes(adapter or model)},
        "shipped": beside.files(),
        "code": {"run": run.get("provenance"), "certificate": issued_by()},
        "settings": settings_of(run.get("settings") or {}),
        "measured": {
            "at": after.get("measured"),
            "before": _measured(request.before),
            "after": _measured(after),
            "reference": _measured(after.get("reference")),
            "reference_by": (after.get("reference") or {}).get("by"),
            "reference_data": (after.get("reference") or {}).get("data"),
            "utility_data": (after.get("utility") or {}).get("data"),
            "utility_share": after.get("utility_share"),
        },
        "attacks": attacks_of(
            beside.attacks,
            identities(beside, model, None if adapter is None else str(adapter)),
            request.data_hash,
        ),
        "limits": [
            *limits(beside, adapter=adapter is not None),
            *_of_before(
                f"version {run.get('version')}", f"version {inside['version']}" if adapter is not None else None
            ),
        ],
    }


def _distilled_content(
    beside: Beside, request: Request, inside: Mapping[str, Any], project: Project
) -> dict[str, Any]:
    """Return the statement on a distilled request: its base is the model before, its result are the weights in force."""
    run, made = dict(request.run or {}), (request.after or {})["base"]
    origin = run["distilled"]["origin"]
    stated = _request_content(beside, request, inside, project.model, None)
    return {
        **stated,
        "limits": [*stated["limits"], *_of_before(f"base {made}", f"base {project.base}")],
        "base": {"name": origin["name"], "files": origin["files"]},
        "result": {"base": made, "in_force": project.base, "files": hashes(project.model)},
        "settings": settings_of(
            {"unlearn": run.get("settings") or {}, "distill": unnamed(run["distilled"]["settings"])}
        ),
    }


def _of_before(measured: str, now_: str | None) -> list[str]:
    """Return the limit of figures that were measured on an earlier version or base than the one whose files are named."""
    if now_ in (measured, None):
        return []
    return [
        f"The figures are of {measured}; the files named are those of {now_}, which was made from it later: `alter request verify` "
        "measures that one."
    ]


def limits(beside: Beside, *, adapter: bool) -> list[str]:
    """Return what the statement does not say; `adapter`: the result is an adapter, and so is the shipped form if it has
    its config.
    """
    found = [
        "It states what was measured on the rows and the attacks named here, and nothing of other wordings or attacks."
    ]
    if beside.shipped is not None:
        found.append(
            "The figures are of the result. That what is shipped was made from it is said by who issued this; it is measured by the "
            "attacks alone that name it: fewer bits can bring back what was forgotten."
        )
        adapter = (Path(beside.shipped).expanduser() / "adapter_config.json").is_file()
    if adapter:
        found.append(
            "The result is an adapter: the base weights still know all of it, and whoever has them can leave it off."
        )
    if not beside.attacks:
        found.append("No attack was made.")
    return found
