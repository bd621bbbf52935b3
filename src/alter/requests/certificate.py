"""`alter certificate`: a signed statement of what was forgotten, with what, and what was measured; checked offline.

It names no subject and holds no row and no reply: data are named by their hashes. A certificate is of a request or of a
finished run, and signed with a key of who issues it (`alter.core.signing`). Who checks it needs the file, the public key
and, to see that it is about the model at hand, that model; no network, no database.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
from pydantic import Field
from rich.console import Console
from rich.table import Table

from alter.core.console import cell
from alter.core.errors import UserError
from alter.core.files import CONTENT, file_digest, write_atomic
from alter.core.outputs import OutFile
from alter.core.records import Record, read_records, read_run
from alter.core.signing import (
    Forged,
    Key,
    canonical,
    fingerprint,
    new_key,
    read_exact,
    read_key,
    read_public,
    read_signed,
    signed_text,
)
from alter.requests.database import Database
from alter.requests.project import Project
from alter.requests.records import HELD, Request, now, parse_id

FORM = "alter certificate"
VERSION = 1
"""Version of the contents; a newer one is refused."""

FIGURES = {
    "said": "said_interval",
    "probability": "probability_interval",
    "exact_memorization": None,
    "rouge": None,
    "broken": None,
    "empty": None,
}
"""What is stated of the rows, and where the evidence keeps its 95 % interval."""


class Certificate(Database):
    """Make a signed certificate of a request or a run, or check one offline."""

    what: tyro.conf.Positional[str | None] = None
    """A request's id (R-0007 or 7), or the folder of a finished run."""
    out: OutFile = None
    """File for the certificate; must not exist. By default certificate-R-0007.json."""
    shipped: str | None = None
    """Also name what is handed out by its hashes: a folder of weights or a GGUF file."""
    attacks: list[str] = Field(default_factory=list)
    """Records of attacks on this adapter or on what is shipped (`records.json` of `alter attack`)."""
    new_key: OutFile = None
    """Make a key: the private half in this file, for its owner alone, the public half beside it in FILE.pub."""
    verify: str | None = None
    """Certificate to check."""
    public_key: str | None = None
    """Public key that must have signed it: a file, or 64 hexadecimal digits."""
    model: str | None = None
    """Base model that it must be about: a folder, a GGUF file, hub id or builtin:NAME."""
    adapter: str | None = None
    """Folder of the adapter that it must be about."""


def certificate(settings: Certificate) -> dict[str, Any]:
    """Run `alter certificate`; returns the certificate, or the new public key.

    Raises:
        UserError: none or several of WHAT, --verify and --new-key; a request that is not in force, a database that was
            altered, no key, a key that others can read, or attacks on something else.
        Forged: the certificate was altered, is another key's, or about another model, adapter or shipped form.
    """
    chosen = [each for each in (settings.what, settings.verify, settings.new_key) if each is not None]
    if len(chosen) != 1:
        raise UserError(
            "Say one thing to do: alter certificate REQUEST --key FILE, alter certificate --verify FILE, or alter certificate "
            "--new-key FILE."
        )
    console = Console(soft_wrap=True)
    if settings.new_key is not None:
        key = new_key(settings.new_key)
        console.print(
            cell(
                f"Key {fingerprint(key.public)}: {settings.new_key} signs, keep it to yourself; give {settings.new_key}.pub "
                "to those who check."
            )
        )
        return {"key": key.public}
    if settings.verify is not None:
        return _verify(settings, console)
    if settings.key is None:
        raise UserError(
            "A certificate is signed: give --key FILE, or ALTER_KEY; `alter certificate --new-key FILE` makes one."
        )
    key = read_key(settings.key)
    assert settings.what is not None
    run = Path(settings.what)
    if (run / "run.json").is_file():
        name, content = run.name, _of_run(settings, run)
        default = f"certificate-{run.resolve().name}.json"
    elif run.is_dir():
        raise UserError(f"{run} is no finished run: it has no run.json.")
    else:
        number = parse_id(settings.what)
        name = f"R-{number:04d}"
        default = f"certificate-{name}.json"
    out = Path(settings.out or default)
    if out.exists():
        raise UserError(f"{out} exists; give another --out.")
    if (run / "run.json").is_file():
        signed = _write(content, key, out)
    else:
        signed = _of_request(settings, parse_id(settings.what), key, out)
    _show(signed, console)
    console.print(cell(f"Certificate of {name}, signed by key {fingerprint(key.public)}: {out}"))
    console.print(cell(f"Check it with: alter certificate --verify {out} --public-key {settings.key}.pub"))
    return signed


def _write(content: Mapping[str, Any], key: Key, out: Path) -> dict[str, Any]:
    # as JSON gives it back: keys of text, no NaN
    signed = key.sign(json.loads(canonical(content)))
    write_atomic(out, signed_text(signed))
    return signed


# What is stated -------------------------------------------------------------------------------------------------------


def hashes(path: str | os.PathLike[str]) -> dict[str, str]:
    """SHA-256 of the file, or of each file of the folder that loading can read, by name; hidden folders are left out.

    Raises:
        UserError: there is no such file, or nothing to load in the folder.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return {root.name: file_digest(root)}
    inside = [file.relative_to(root) for file in sorted(root.rglob("*")) if file.suffix in CONTENT and file.is_file()]
    seen = [each for each in inside if not any(part.startswith(".") for part in each.parts[:-1])]
    found = {each.as_posix(): file_digest(root / each) for each in seen}
    if not found:
        raise UserError(f"{path} holds no model and no adapter to take the hash of.")
    return found


def model_hashes(name: str) -> dict[str, str]:
    """`hashes` of a model by name: a folder, a GGUF file, builtin:NAME, or a hub id as it lies in the local cache.

    Raises:
        UserError: there is no such model on this machine.
    """
    from alter.models.gguf import gguf_place
    from alter.models.loading import shipped_model

    local = shipped_model(name)
    place = gguf_place(local)
    if place is not None and place.path is not None:
        return hashes(place.path)
    if Path(local).expanduser().exists():
        return hashes(local)
    from huggingface_hub import hf_hub_download

    home, file = (local, "config.json") if place is None else (place.home, place.file)
    try:
        found = Path(hf_hub_download(home, file, local_files_only=True))
    except (OSError, ValueError):
        raise UserError(f"No model {name} on this machine to take the hash of: give a folder.") from None
    return hashes(found.parent if place is None else found)


def _settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"values": dict(settings), "sha256": hashlib.sha256(canonical(settings)).hexdigest()}


def _issued() -> dict[str, Any]:
    from alter.core.provenance import code_digest, versions

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


def _attacks(
    paths: Sequence[str], targets: Sequence[Mapping[str, str | None]], data: str | None
) -> list[dict[str, Any]]:
    """What attacks recovered, from their records.

    Args:
        paths: files of records.
        targets: identities (see `Subject.identity`) of what may have been attacked.
        data: hash of the rows that the attacks must have been after (`alter.data.examples.data_hash`).

    Raises:
        UserError: a file has no attacks, or they were made on something else or after other rows.
    """
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
                f"{path} holds attacks after other rows than those that were asked for ({_short(after)}, asked {_short({data})}): "
                "run `alter attack --forget` on the same rows, in the same order."
            )
        found += [_attack(record, data) for record in rows]
    return found


def _short(hashes: set[Any]) -> str:
    """Hashes as messages show them."""
    return ", ".join(sorted("not recorded" if each is None else str(each)[:12] for each in hashes))


def _attack(record: Record, data: str | None) -> dict[str, Any]:
    extra = record.extra
    named = ("attack", "needs", "step", "depth", "before", "after", "original", "retrained", "interval", "refused")
    return {
        "metric": record.metric.removeprefix("attack_recovered_"),
        "recovered": record.value,
        "n": record.n,
        "data": data,
        **{name: extra[name] for name in named if name in extra},
    }


def _identities(settings: Certificate, model: str, adapter: str | None) -> list[dict[str, str | None]]:
    if not settings.attacks:
        return []
    from alter.models.loading import Subject

    found = [Subject(model=model, adapter=adapter).identity()]
    if settings.shipped is not None:
        found.append(Subject(model=settings.shipped).identity())
    return found


def _of_request(settings: Certificate, number: int, key: Key, out: Path) -> dict[str, Any]:
    from alter.requests.checking import check_requests
    from alter.requests.versions import manifest

    store, project = settings.open()
    with store.lease(settings.who):
        request = store.get(number)
        if request.state not in HELD:
            raise UserError(
                f"{request.name} is {request.state}: there is nothing to certify. Only a request that is in force "
                f"({' or '.join(HELD)}) gets a certificate."
            )
        wrong = check_requests(store, project, behaviour=False).wrong
        if wrong:
            raise UserError("Nothing is certified, since not all is as it should be: " + " ".join(wrong))
        history = store.history()
        inside = manifest(project)
        if request.state == "distilled":
            content = _distilled_content(settings, request, inside, project)
        else:
            content = _request_content(settings, request, inside, project.model, project.adapter.resolve())
        content["history"] = {"head": history[-1].hash, "entries": len(history)}
        signed = _write(content, key, out)
        noted = {"certificate": hashlib.sha256(canonical(signed)).hexdigest(), "key": key.public}
        store.note(number, "certified", noted, settings.who)
    return signed


def _request_content(
    settings: Certificate, request: Request, inside: Mapping[str, Any], model: str, adapter: Path | None
) -> dict[str, Any]:
    """What is stated of a request that the adapter in force holds on `model`, or with None, `model` itself."""
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
        "shipped": None if settings.shipped is None else {"files": hashes(settings.shipped)},
        "code": {"run": run.get("provenance"), "certificate": _issued()},
        "settings": _settings(run.get("settings") or {}),
        "measured": {
            "at": after.get("measured"),
            "before": _measured(request.before),
            "after": _measured(after),
            "reference": _measured(after.get("reference")),
            "reference_by": (after.get("reference") or {}).get("by"),
            "utility_share": after.get("utility_share"),
        },
        "attacks": _attacks(
            settings.attacks,
            _identities(settings, model, None if adapter is None else str(adapter)),
            request.data_hash,
        ),
        "limits": _limits(settings, adapter=adapter is not None),
    }


def _distilled_content(
    settings: Certificate, request: Request, inside: Mapping[str, Any], project: Project
) -> dict[str, Any]:
    """What is stated of a distilled request: its base is the model before, its result are the weights in force."""
    run = dict(request.run or {})
    origin = run["distilled"]["origin"]
    return {
        **_request_content(settings, request, inside, project.model, None),
        "base": {"name": origin["name"], "files": origin["files"]},
        "result": {"base": (request.after or {})["base"], "in_force": project.base, "files": hashes(project.model)},
        "settings": _settings({"unlearn": run.get("settings") or {}, "distill": run["distilled"]["settings"]}),
    }


def _limits(settings: Certificate, *, adapter: bool) -> list[str]:
    """What the statement does not say; `adapter`: what was made is one, and so is what is shipped if it has its config."""
    found = [
        "It states what was measured on the rows and the attacks named here, and nothing of other wordings or attacks."
    ]
    if settings.shipped is not None:
        adapter = (Path(settings.shipped).expanduser() / "adapter_config.json").is_file()
    if adapter:
        found.append(
            "The result is an adapter: the base weights still know all of it, and whoever has them can leave it off."
        )
    if not settings.attacks:
        found.append("No attack was made.")
    return found


def _of_run(settings: Certificate, run: Path) -> dict[str, Any]:
    """What a finished run of `alter unlearn` states; its figures are those of its last table (`records.json`)."""
    record = read_run(run)
    given = record["settings"]
    result = next((run / kind for kind in ("adapter", "model") if (run / kind).is_dir()), None)
    if result is None:
        raise UserError(f"{run} holds neither adapter nor model: there is nothing to certify.")
    whole = result.name == "model"
    figures = []
    if (run / "records.json").is_file():
        figures = [_figure(each) for each in read_records(run / "records.json")]
    # as the rows were when it ran, whatever the files hold now
    asked = record.get("data") or {}
    left_out = {"model", "forget", "retain", "out", "start_from", "resume", "overwrite"}
    return {
        "form": FORM,
        "version": VERSION,
        "issued": now(),
        "asked": {
            "run": True,
            "received": record["provenance"]["measured"],
            "data": asked.get("forget"),
            "retain": asked.get("retain"),
        },
        "base": {"name": Path(given["model"]).name, "files": model_hashes(given["model"])},
        "result": {"files": hashes(result)},
        "shipped": None if settings.shipped is None else {"files": hashes(settings.shipped)},
        "code": {"run": record["provenance"], "certificate": _issued()},
        "settings": _settings({name: value for name, value in given.items() if name not in left_out}),
        "measured": {"figures": figures},
        "attacks": _attacks(
            settings.attacks,
            _identities(settings, str(result) if whole else given["model"], None if whole else str(result)),
            asked.get("forget"),
        ),
        "limits": _limits(settings, adapter=not whole),
    }


def _figure(record: Record) -> dict[str, Any]:
    from alter.evaluation.verdict import mean_interval, unit_interval

    out: dict[str, Any] = {"model": record.model, "metric": record.metric, "value": record.value, "n": record.n}
    known = [value for value in record.per_item or [] if value is not None and value == value]
    if len(known) > 1 and all(-1 <= value <= 1 for value in known):
        out["interval"] = list(mean_interval(known) if min(known) < 0 else unit_interval(known))
    return out


# Checking ------------------------------------------------------------------------------------------------------------


def _verify(settings: Certificate, console: Console) -> dict[str, Any]:
    assert settings.verify is not None
    path = settings.verify
    trusted = None if settings.public_key is None else read_public(settings.public_key)
    content = check_certificate(read_exact(path), path, trusted)
    for option, name, part in (
        ("--model", settings.model, "base"),
        ("--adapter", settings.adapter, "result"),
        ("--shipped", settings.shipped, "shipped"),
    ):
        if name is None:
            continue
        if content.get(part) is None:
            raise Forged(f"{path} names nothing that was shipped: {option} {name} is not what it is about.")
        check_files(
            content[part]["files"], model_hashes(name) if part == "base" else hashes(name), f"{option} {name}", path
        )
    _show(content, console)
    console.print(cell(f"{path} is as it was signed by key {fingerprint(content['key'])} on {content['issued']}."))
    if trusted is None:
        console.print(cell("Whose key that is, it cannot say itself: compare it, or give --public-key.", "bold"))
    unseen = [name for name in ("model", "adapter") if getattr(settings, name) is None]
    if unseen and settings.shipped is None:
        console.print(
            cell(f"Not compared with the {' and the '.join(unseen)} at hand: give --{' and --'.join(unseen)}.")
        )
    return content


def check_certificate(text: str, what: str, trusted: str | None = None) -> dict[str, Any]:
    """Parse a certificate and check its form, version and signature.

    Args:
        text: the file's whole text.
        what: how errors call it.
        trusted: public key that must have signed it, 64 hexadecimal digits; None: whichever it names.

    Raises:
        UserError: it is no certificate, or of a newer version.
        Forged: a byte of it was changed, or another key signed it.
    """
    # a newer version may be signed in another way: say that it is newer, not that it is forged
    try:
        version = json.loads(text).get("version")
    except (ValueError, AttributeError, RecursionError):
        version = VERSION
    if isinstance(version, int) and version > VERSION:
        raise UserError(
            f"{what} is of version {version}, this alter knows {VERSION}: update it with "
            '`pip install --upgrade "alter-unlearning"`.'
        )
    content = read_signed(text, what)
    if content.get("form") != FORM or content.get("version") != VERSION:
        raise UserError(f"{what} is signed, but it is no certificate of this version: expected form {FORM!r}.")
    if trusted is not None and content["key"] != trusted:
        raise Forged(
            f"{what} is signed by key {fingerprint(content['key'])}, not by {fingerprint(trusted)}, the one to trust: "
            "whoever has the other key made it."
        )
    return content


def check_files(stated: Mapping[str, str], found: Mapping[str, str], what: str, where: str) -> None:
    """Compare hashes of files.

    Raises:
        Forged: names a file that differs, is missing or is one too many.
    """
    if len(stated) == len(found) == 1 and list(stated.values()) == list(found.values()):
        return  # a single file may be called otherwise here
    differ = sorted(name for name in {*stated, *found} if stated.get(name) != found.get(name))
    if differ:
        name = differ[0]
        how = "is missing" if name not in found else "is one too many" if name not in stated else "is another"
        more = f" ({len(differ)} of {len({*stated, *found})} files differ)" if len(differ) > 1 else ""
        raise Forged(f"{what} is not what {where} is about: {name} {how}{more}.")


def _show(content: Mapping[str, Any], console: Console) -> None:
    asked = content["asked"]
    facts = Table(title=cell(f"Certificate of {asked.get('request', 'a run')}"), show_header=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    shown = {
        "asked": asked["received"],
        "state": content.get("state"),
        "why": " ".join(content.get("why") or []),
        "data (SHA-256)": asked["data"],
        "base": content["base"]["name"],
        "shipped": ", ".join((content.get("shipped") or {}).get("files", {})),
        "settings (SHA-256)": content["settings"]["sha256"],
        "head of the history": (content.get("history") or {}).get("head"),
        "limits": " ".join(content["limits"]),
    }
    for name, value in shown.items():
        if value:
            facts.add_row(name, cell(value))
    console.print(facts)
    measured = content["measured"]
    rows = Table(title="Measured, 95 % interval")
    if "figures" in measured:
        for column in ("model", "metric", "value", "n"):
            rows.add_column(column, justify="left" if column in ("model", "metric") else "right")
        for each in measured["figures"]:
            rows.add_row(*map(cell, (each["model"], each["metric"], _told(each), each["n"])))
    else:
        for column in ("", "before", "after", "reference"):
            rows.add_column(column, justify="right" if column else "left")
        for name in FIGURES:
            parts = [(measured[when] or {}).get(name) for when in ("before", "after", "reference")]
            if any(parts):
                rows.add_row(cell(name), *(cell(_told(part) if part else "") for part in parts))
    if rows.rows:
        console.print(rows)
    if content["attacks"]:
        attacked = Table(title="Recovered by attacks: 1 all, 0 no more than from the retrained model")
        for column in ("attack", "figure", "recovered", "the attacker needs"):
            attacked.add_column(column)
        for each in content["attacks"]:
            value = {"value": each["recovered"], "interval": each.get("interval")}
            attacked.add_row(*map(cell, (each["attack"], each["metric"], _told(value), each.get("needs", ""))))
        console.print(attacked)


def _told(each: Mapping[str, Any]) -> str:
    value, interval = each["value"], each.get("interval")
    if value is None:
        return "-"
    text = f"{value} of {each['n']}" if isinstance(value, int) else f"{value:.3f}"
    return text + (f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else "")
