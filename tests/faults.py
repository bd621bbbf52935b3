"""Faults on order: the n-th thing that a block does to files or to the database fails, or ends the process.

Python's own calls are seen by an audit hook (opening a file to write, renaming, making a folder, deleting, linking, changing
a mode); what safetensors and torch write in native code, and transactions of the database, are wrapped. So points are
counted, and the n-th of one run is the n-th of the next.
"""

import errno
import os
import sys
from contextlib import contextmanager

import peft.peft_model
import safetensors.torch
import sqlalchemy as sql
import torch
import transformers.modeling_utils

from alter.requests.store import Store

KINDS = ("full", "broken", "truncated", "killed")
"""The disk is full; it cannot be read or written; half a file is written and the process ends; the process ends."""


class Killed(BaseException):
    """Stands for SIGKILL: nothing that comes afterwards reaches the disk."""


class Plan:
    """Where to fail: at point `at` (0: nowhere), as `kind` says; `seen` lists the points that were passed."""

    def __init__(self, root, at=0, kind="full"):
        self.root, self.at, self.kind = os.path.realpath(root), at, kind
        self.seen, self.dead, self.resting = [], False, False

    def inside(self, path):
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        return isinstance(path, str) and os.path.realpath(path).startswith(self.root)

    def point(self, what, path=""):
        """One thing that is about to be done; returns whether it is to be done by half."""
        if self.dead:
            raise Killed
        self.seen.append(f"{what} {os.path.relpath(path, self.root) if path else ''}".strip())
        if len(self.seen) != self.at:
            return False
        if self.kind == "full" and what in ("remove", "rmdir", "rmtree"):
            # a full disk still gives back
            return False
        if self.kind in ("full", "broken"):
            code = errno.ENOSPC if self.kind == "full" else errno.EIO
            raise OSError(code, os.strerror(code), path or None)
        self.dead = True
        if self.kind == "truncated":
            return True
        raise Killed


_plan = None
_hooked = False

WRITES = os.O_WRONLY | os.O_RDWR
CHANGES = {"os.rename": 1, "os.mkdir": 0, "os.symlink": 1, "os.remove": 0, "os.rmdir": 0, "os.truncate": 0}
CHANGES |= {"shutil.rmtree": 0}


def _hook(event, args):
    plan = _plan
    if plan is None or plan.resting:
        return
    if event == "open":
        path, _, flags = args
        # a folder or a file that is read is no write
        if isinstance(path, (str, bytes)) and (flags or 0) & WRITES and plan.inside(path) and plan.point("open", path):
            with open(os.open(os.fsdecode(path), os.O_RDONLY | os.O_CREAT), "rb"):
                pass
            raise Killed
    elif event in CHANGES:
        path = args[CHANGES[event]]
        if plan.inside(path) and plan.point(event.rpartition(".")[2], os.fsdecode(path)):
            raise Killed


def _halved(real, position):
    def write(*args, **kwargs):
        path = args[position] if len(args) > position else kwargs.get("filename", kwargs.get("f"))
        plan = _plan
        if plan is None or not isinstance(path, (str, os.PathLike)) or not plan.inside(os.fspath(path)):
            return real(*args, **kwargs)
        half = plan.point("native", os.fspath(path))
        result = real(*args, **kwargs)
        if half:
            plan.resting = True
            os.truncate(os.open(path, os.O_WRONLY), os.path.getsize(path) // 2)
            plan.resting = False
            raise Killed
        return result

    return write


@contextmanager
def faults(root, at=0, kind="full"):
    """Within the block the `at`-th point fails as `kind` says; yields the plan."""
    global _plan, _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    plan = Plan(root, at, kind)
    real_write = Store._write
    saves = [(safetensors.torch, "save_file", 1), (torch, "save", 1)]
    real = [getattr(owner, name) for owner, name, _ in saves]

    @contextmanager
    def write(self, lock=True):
        try:
            plan.point("begin")
        except OSError as error:
            raise sql.exc.OperationalError("BEGIN", {}, error) from None
        with real_write(self, lock) as connection:
            yield connection
            try:
                plan.point("commit")
            except OSError as error:
                raise sql.exc.OperationalError("COMMIT", {}, error) from None
            if plan.dead:
                raise Killed

    others = [transformers.modeling_utils, peft.peft_model]
    kept = [module.safe_save_file for module in others]
    try:
        Store._write = write
        for (owner, name, position), function in zip(saves, real, strict=True):
            setattr(owner, name, _halved(function, position))
        for module, function in zip(others, kept, strict=True):
            module.safe_save_file = _halved(function, 1)
        _plan = plan
        yield plan
    finally:
        _plan = None
        Store._write = real_write
        for (owner, name, _), function in zip(saves, real, strict=True):
            setattr(owner, name, function)
        for module, function in zip(others, kept, strict=True):
            module.safe_save_file = function
