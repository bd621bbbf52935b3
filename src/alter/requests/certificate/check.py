"""Check a certificate offline: its form, its signature, and the hashes of the files at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from alter.core import UserError
from alter.requests.certificate.form import FORM, VERSION
from alter.requests.signing import Forged, fingerprint, read_signed


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
