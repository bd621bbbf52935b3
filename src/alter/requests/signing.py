"""JSON documents signed with Ed25519 (RFC 8032): keys in files, the exact bytes that are signed, and their check.

What is signed is the document without its `signature`, as JSON with sorted keys, no spaces, in UTF-8 (`canonical`). The
file itself has one allowed form (`signed_text`), so that no byte of it can change unnoticed, not even a space or a key
given twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alter.core import Finding, UserError
from alter.storage import finite, from_json, write_atomic

NEW_KEY = "`alter certificate --new-key FILE` makes one"


class Forged(Finding):
    """A signed document differs from what was signed."""


def canonical(content: Mapping[str, Any]) -> bytes:
    """Return the bytes of a JSON document to sign: keys sorted, no spaces, UTF-8; NaN and infinity are null."""
    text = json.dumps(
        finite(dict(content)), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def fingerprint(public: str) -> str:
    """Return the SHA-256 of a public key's 32 bytes, its first 16 hexadecimal digits, for comparison by eye."""
    return hashlib.sha256(bytes.fromhex(public)).hexdigest()[:16]


class Key:
    """A private Ed25519 key: `public` is its other half, 64 hexadecimal digits."""

    def __init__(self, private: Any) -> None:
        self._private = private
        self.public: str = private.public_key().public_bytes_raw().hex()

    def sign(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return the content with `key` (the public key) and `signature`, over everything else, in hexadecimal digits."""
        signed = {**content, "key": self.public}
        return {**signed, "signature": self._private.sign(canonical(signed)).hex()}


def new_key(path: str | os.PathLike[str]) -> Key:
    """Make a key: the private half in `path`, PEM, for its owner alone; the public half in `path.pub`, one line of hex.

    Raises:
        UserError: either file exists.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    file, public = Path(path).expanduser(), Path(f"{Path(path).expanduser()}.pub")
    for each in (file, public):
        if each.exists():
            raise UserError(f"{each} exists: a key that is written over can sign no more. Give another name.")
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomic(file, pem, private=True)
    key = Key(private)
    write_atomic(public, key.public + "\n")
    return key


def read_key(path: str | os.PathLike[str]) -> Key:
    """Read a private key.

    Raises:
        UserError: there is none, others than its owner can read it, or it is no Ed25519 key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    file = Path(path).expanduser()
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"No key can be read at {path} ({error.strerror}); {NEW_KEY}.") from None
    if os.name == "posix" and mode & 0o077:
        raise UserError(
            f"{path} can be read by others (mode {mode:04o}), who could sign in your name: make a new key, or, if nobody "
            f"else was ever on this machine, chmod 600 {shlex.quote(str(path))}"
        )
    try:
        private = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UserError(f"{path} holds no private key without a password ({error}); {NEW_KEY}.") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise UserError(f"{path} holds a key of another kind than Ed25519; {NEW_KEY}.")
    return Key(private)


def read_public(given: str) -> str:
    """Read a public key, 64 hexadecimal digits: given as such, or in a file as `new_key` writes it beside the private one.

    Raises:
        UserError: it is neither.
    """
    text = given.strip()
    path = Path(text).expanduser()
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        try:
            text = path.read_bytes()[:200].decode("ascii", "replace").strip()
        except OSError as error:
            raise UserError(
                f"{given!r} is no public key and no file with one ({error.strerror}): expected 64 digits 0-9, a-f, or the "
                "file ending in .pub."
            ) from None
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        hint = f"; the public half is {path}.pub" if Path(f"{path}.pub").is_file() else ""
        raise UserError(f"{given} holds no public key: expected one line of 64 digits 0-9, a-f{hint}.")
    return text.lower()


def check(content: Mapping[str, Any], what: str) -> str:
    """Check a document's signature by the key it names; returns that key.

    Args:
        content: with `key` and `signature`.
        what: how errors call it.

    Raises:
        Forged: it has no signature, or one that does not fit.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    public, signature = content.get("key"), content.get("signature")
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(str(public)))
        unsigned = {name: value for name, value in content.items() if name != "signature"}
        key.verify(bytes.fromhex(str(signature)), canonical(unsigned))
    except (ValueError, InvalidSignature):
        raise Forged(f"{what} was altered, or is not signed by the key that it names: do not rely on it.") from None
    return str(public)


def signed_text(content: Mapping[str, Any]) -> str:
    """Return the one text form of a signed document: sorted keys, one space per level, a newline at the end."""
    return json.dumps(dict(content), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read_exact(path: str | os.PathLike[str]) -> str:
    """Read a signed file without translating byte-order mark or line ends.

    Raises:
        UserError: it cannot be opened.
        Forged: it is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode()
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise Forged(f"{path} is not UTF-8 text, as it was signed: a byte of it was changed.") from None


def read_signed(text: str, what: str) -> dict[str, Any]:
    """Parse a document and check form and signature.

    Raises:
        UserError: it is no JSON object.
        Forged: it is not in the one form of `signed_text`, or its signature does not fit.
    """
    try:
        content = from_json(text)
    except ValueError as error:
        raise Forged(f"{what} is no JSON ({error}): it is cut off or was altered.") from None
    if not isinstance(content, dict):
        raise UserError(f"{what} is no signed document: expected a JSON object.")
    check(content, what)
    if signed_text(content) != text:
        raise Forged(f"{what} is not written as it was signed: a byte of it was changed.")
    return content
