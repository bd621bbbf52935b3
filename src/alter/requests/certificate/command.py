"""The settings of `alter certificate`, and the command: issue one, check one, or make a key."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import tyro
from pydantic import Field
from rich.console import Console

from alter.core import UserError, cell
from alter.requests.certificate.check import check_certificate, check_files
from alter.requests.certificate.display import show_certificate
from alter.requests.certificate.form import hashes, model_hashes
from alter.requests.database import Database
from alter.requests.records import parse_id
from alter.requests.signing import Forged, fingerprint, new_key, read_exact, read_key, read_public
from alter.settings import OutFile


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
            "Give exactly one task: alter certificate REQUEST --key FILE, alter certificate --verify FILE, or alter certificate "
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
    return _issue(settings, console)


def _issue(settings: Certificate, console: Console) -> dict[str, Any]:
    # checking needs none of this
    from alter.requests.certificate.finished import state_run
    from alter.requests.certificate.issue import Beside, issue_for_request, write_signed

    if settings.key is None:
        raise UserError(
            "A certificate is signed: give --key FILE, or ALTER_KEY; `alter certificate --new-key FILE` makes one."
        )
    key = read_key(settings.key)
    assert settings.what is not None
    beside = Beside(settings.shipped, settings.attacks)
    run = Path(settings.what)
    finished = (run / "run.json").is_file()
    if run.is_dir() and not finished:
        raise UserError(f"{run} is no finished run: it has no run.json.")
    number = None if finished else parse_id(settings.what)
    name, called = (run.name, run.resolve().name) if number is None else (f"R-{number:04d}", f"R-{number:04d}")
    out = Path(settings.out or f"certificate-{called}.json")
    if out.exists():
        raise UserError(f"{out} exists; give another --out.")
    if number is None:
        signed = write_signed(state_run(run, beside), key, out)
    else:
        signed = issue_for_request(settings, number, beside, key, out)
    show_certificate(signed, console)
    console.print(cell(f"Certificate of {name}, signed by key {fingerprint(key.public)}: {out}"))
    check = f"alter certificate --verify {shlex.quote(str(out))} --public-key {shlex.quote(f'{settings.key}.pub')}"
    console.print(cell(f"Check it with: {check}"))
    return signed


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
    show_certificate(content, console)
    console.print(cell(f"{path} is as it was signed by key {fingerprint(content['key'])} on {content['issued']}."))
    if trusted is None:
        console.print(cell("Whose key that is, it cannot say itself: compare it, or give --public-key.", "bold"))
    unseen = [name for name in ("model", "adapter") if getattr(settings, name) is None]
    if unseen and settings.shipped is None:
        console.print(
            cell(f"Not compared with the {' and the '.join(unseen)} at hand: give --{' and --'.join(unseen)}.")
        )
    return content
