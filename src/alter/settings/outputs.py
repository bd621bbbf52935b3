"""Output paths of a command: collected from its settings and tried before the work, so that no result is lost."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from alter.core import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel


@dataclass(frozen=True)
class Written:
    """Marks a setting that names a place to write to: a file, a folder, or (None) either of them."""

    folder: bool | None = False


OutFile = Annotated[str | None, Written()]
"""A setting: the file that results go to; "-" is standard output on the command line."""
OutFolder = Annotated[str, Written(folder=True)]
"""A setting: the folder that results go to."""


_standard: ContextVar[str | None] = ContextVar("standard", default=None)


@contextmanager
def as_standard_output(path: str) -> Iterator[None]:
    """Inside the block, `shown` calls this file standard output: its content goes there when the work is done."""
    token = _standard.set(path)
    try:
        yield
    finally:
        _standard.reset(token)


def shown(path: str) -> str:
    """Return the place of the results as the user gave it."""
    return "standard output" if path == _standard.get() else path


def check_outputs(settings: BaseModel) -> None:
    """Refuse settings whose output could not be written (see `check_place`) or is a file that they read; nothing is created.

    Raises:
        UserError: names the setting and the place.
    """
    for name, info in type(settings).model_fields.items():
        value = getattr(settings, name)
        for mark in info.metadata:
            if isinstance(mark, Written) and isinstance(value, str):
                check_place(value, name, mark.folder)
                _check_apart(value, name, settings)


def _check_apart(path: str, setting: str, settings: BaseModel) -> None:
    """Refuse a file for results that another setting names: what is read would be replaced.

    Raises:
        UserError: names both settings.
    """
    place = os.path.realpath(path)
    if not os.path.isfile(place):
        return
    for name, value in _texts(settings):
        # rows.csv@answer=Antwort[:100] + others.jsonl
        for part in value.split(" + ") if name != setting else ():
            for read in (part, re.split(r"@|\[", part)[0].strip()):
                if read and os.path.realpath(os.path.expanduser(read)) == place:
                    raise UserError(
                        f"`{setting}` is {path!r}, which `{name}` reads: it would be replaced. Give another file."
                    )


def _texts(settings: BaseModel, within: str = "") -> Iterator[tuple[str, str]]:
    """Yield each setting that is a text or a list of texts, by its whole name."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if hasattr(type(value), "model_fields"):
            yield from _texts(value, f"{within}{name}.")
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, str) and "\0" not in each:
                yield f"{within}{name}", each


def check_place(path: str, setting: str, folder: bool | None = False) -> None:
    """Refuse a path where a file or a folder could not be written at the end of the work.

    Args:
        path: the place; a file that exists would be replaced, a device or pipe written into.
        setting: name of the setting that gives it, for the message.
        folder: whether a folder, a file or (None) either is to be written.

    Raises:
        UserError: it is empty or too long a name, the other of file and folder, or lies where nothing can be written.
    """
    what = {True: "folder", False: "file", None: "file or folder"}[folder]
    shown = path if len(path) < 80 else f"{path[:60]}…"
    said = f"`{setting}` is {shown!r}"
    if not path.strip() or "\0" in path:
        raise UserError(f"{said}; give the path of a {what}.")
    try:
        place = Path(os.path.realpath(path))
        exists = _exists(place)
        if exists and folder is True and not place.is_dir():
            raise UserError(f"{said}, which is a file; give a folder.")
        if exists and folder is False and place.is_dir():
            raise UserError(f"{said}, which is a folder; give a file.")
        if exists and not place.is_dir() and not place.is_file():
            return
        above = place if exists and place.is_dir() else place.parent
        while not _exists(above):
            above = above.parent
        # permissions do not say it all: a file system may be read-only, or take no files (/proc)
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(f"{said}, which cannot be written ({error.strerror}); give another {what}.") from None


def _exists(place: Path) -> bool:
    """Tell whether a file or folder exists; a name that no file can have (too long, a file as its parent) raises `OSError`."""
    try:
        os.stat(place)
    except FileNotFoundError:
        return False
    return True
