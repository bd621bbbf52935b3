"""Claim a folder: a file in it names the process that works there, or is locked by it, so that no other deletes its work."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from alter.core import UserError, warn
from alter.storage.files import write_atomic

CLAIM_FILE = ".running"
"""File in a run's folder while a process works there."""


def claim(folder: Path) -> None:
    """Record that this process works in a folder."""
    import psutil

    own = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    write_atomic(folder / CLAIM_FILE, json.dumps(own), private=True)


def release(folder: Path) -> None:
    """Release this process's claim, if it has one: after an error another process can continue."""
    try:
        holder = json.loads((folder / CLAIM_FILE).read_text())
    except (OSError, ValueError):
        return
    if isinstance(holder, dict) and holder.get("host") == socket.gethostname() and holder.get("pid") == os.getpid():
        (folder / CLAIM_FILE).unlink(missing_ok=True)


def check_free(folder: Path) -> None:
    """Refuse a folder that another living process on this machine works in; a dead one's claim is void.

    Raises:
        UserError: names the process.
    """
    import psutil

    try:
        holder = json.loads((folder / CLAIM_FILE).read_text())
        host, pid, started = holder["host"], int(holder["pid"]), float(holder["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if host != socket.gethostname() or pid == os.getpid():
        return
    try:
        process = psutil.Process(pid)
        # a later process may have the same number
        alive = abs(process.create_time() - started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return
    if alive:
        raise UserError(f"Process {pid} is working in {folder}: wait until it is done, end it, or give another `out`.")


def take_lock(path: Path, patience: float) -> int:
    """Lock a file, which is made, for this process and those that inherit the descriptor; closing the descriptor unlocks it.

    Machines that share the file system see each other's locks where it has any: where it has none, that is said.

    Args:
        path: the file.
        patience: seconds to wait for another process to unlock it.

    Raises:
        BlockingIOError: another process still has it locked then.
    """
    # not on Windows, where all but comparisons may be used
    import fcntl

    end = time.monotonic() + patience
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
            continue
        except OSError as error:
            warn(
                f"{path.parent} cannot be locked ({error.strerror}): see to it yourself that one process works there at a time."
            )
            return lock
        # it may have been deleted by the one that had it
        if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
            return lock
        os.close(lock)


@contextmanager
def undone_if_refused(folder: Path) -> Iterator[None]:
    """Delete the folder if it was not there before the block and the block refuses what the user gave.

    Then nothing is left in the way of the corrected command.
    """
    there = folder.exists() or folder.is_symlink()
    try:
        yield
    except UserError:
        if not there and folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        raise


def check_deletable(folder: Path, marks: Sequence[str]) -> None:
    """Refuse to delete a folder that is not one of ours, so that a slip of the hand in `--out` costs nobody their files.

    Args:
        folder: what would be deleted, with all that it holds; one that is empty or missing is never refused.
        marks: names of files of which a folder of ours holds at least one (or the temporary file of one that was being written).

    Raises:
        UserError: it is the root, the home folder, the current folder or one that holds them, a link or a mount, or it holds
            something and none of the marks.
    """
    whole = folder.resolve()
    if not folder.is_dir() or not (held := sorted(entry.name for entry in folder.iterdir())):
        return
    if folder.is_symlink():
        raise UserError(f"{folder} is a link to {whole}: `overwrite` deletes no link; give `out` {whole}.")
    for name, place in (("the home folder", Path(os.path.expanduser("~"))), ("the current folder", Path.cwd())):
        if place.resolve().is_relative_to(whole):
            what = name if place.resolve() == whole else f"a folder that holds {name}"
            raise UserError(
                f"{folder} is {what}: `overwrite` would delete all of it. Give a folder of its own as `out`."
            )
    if os.path.ismount(whole):
        raise UserError(f"{folder} is a whole file system: `overwrite` would delete all of it. Give a folder in it.")
    if not any(name == mark or name.startswith(f".{mark}.") for name in held for mark in marks):
        raise UserError(
            f"{folder} holds {', '.join(held[:5])}{', …' if len(held) > 5 else ''} and no {' or '.join(marks)}: it is no folder "
            "of an earlier run, so `overwrite` leaves it alone. Give another `out`."
        )
