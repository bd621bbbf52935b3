"""Claim a folder: a file in it names the process that works there, so that no other deletes its work."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from alter.core.errors import UserError
from alter.core.files import write_atomic

FILE = ".running"
"""File in a run's folder, while it is made."""


def claim(folder: Path) -> None:
    """Write down that this process is working in a folder."""
    import psutil

    own = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    write_atomic(folder / FILE, json.dumps(own), private=True)


def release(folder: Path) -> None:
    """Give up this process's claim, if it has one: after an error another process can continue."""
    try:
        holder = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return
    if isinstance(holder, dict) and holder.get("host") == socket.gethostname() and holder.get("pid") == os.getpid():
        (folder / FILE).unlink(missing_ok=True)


def check_free(folder: Path) -> None:
    """Refuse a folder that another living process on this machine is working in; a dead one's claim is void.

    Raises:
        UserError: names the process.
    """
    import psutil

    try:
        holder = json.loads((folder / FILE).read_text())
        host, pid, started = holder["host"], int(holder["pid"]), float(holder["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if host != socket.gethostname() or pid == os.getpid():
        return
    try:
        process = psutil.Process(pid)
        # a process that got the same number later is another one
        alive = abs(process.create_time() - started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return
    if alive:
        raise UserError(f"Process {pid} is working in {folder}: wait until it is done, end it, or give another --out.")
