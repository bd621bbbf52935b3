"""Faults on order: the n-th thing that a block does to files or to the database fails, or ends the process.

Opening a file to write, renaming, making a folder, deleting, linking are seen by an audit hook of Python; every write into
an open file and every flush to disk by the file itself; what safetensors and torch write in native code, and the
statements and transactions of the database, are wrapped. So points are counted, and the n-th of one run is the n-th of the
next.
"""

import builtins
import errno
import faulthandler
import io
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import peft.peft_model
import safetensors.torch
import sqlalchemy as sql
import torch
import transformers.modeling_utils
from sqlalchemy import event

from alter.requests.store import Store

KINDS = ("full", "broken", "truncated", "killed")
"""The disk is full; it cannot be read or written; half a file is written and the process ends; the process ends."""

FREEING = ("remove", "rmdir", "rmtree")
"""What a full disk still does."""
PATIENCE = 60
"""Seconds after which a fork ends as if killed: of a process with threads, it may wait for a lock that nobody holds any more."""
HALVED = ("open", "write", "native", "flush")
"""What can be done by half; elsewhere a truncation is a kill."""


def spread(states, few):
    """So many of the states, from the first to the last, at equal distances."""
    return states if len(states) <= few else [states[at * (len(states) - 1) // (few - 1)] for at in range(few)]


class Killed(BaseException):
    """Stands for SIGKILL: nothing that comes afterwards reaches the disk."""


def differs(kind, what):
    """Whether a kind of fault at a point is another than a kill there, or than nothing."""
    word = what.split()[0]
    return word not in FREEING if kind == "full" else word in HALVED if kind == "truncated" else True


class Plan:
    """Where to fail: at point `at` (0: nowhere), as `kind` says; `seen` lists the points that were passed."""

    def __init__(self, root, at=0, kind="full"):
        self.root, self.at, self.kind = os.path.realpath(root), at, kind
        self.seen, self.dead, self.resting = [], False, False

    def inside(self, path):
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        return isinstance(path, (str, os.PathLike)) and os.path.realpath(path).startswith(self.root)

    def point(self, what, path=""):
        """One thing that is about to be done; returns whether it is to be done by half."""
        if self.dead:
            raise Killed
        self.seen.append(f"{what} {os.path.relpath(path, self.root) if path else ''}".strip())
        if len(self.seen) != self.at or not differs(self.kind, what):
            return self.passed(what, path)
        return self.fail(what, path)

    def fail(self, what, path):
        if self.kind in ("full", "broken"):
            code = errno.ENOSPC if self.kind == "full" else errno.EIO
            raise OSError(code, os.strerror(code), path or None)
        self.dead = True
        if self.kind == "truncated" and what in HALVED:
            return True
        raise Killed

    def passed(self, what, path):
        """What is done at a point that does not fail."""
        return False

    def passed_half(self):
        """What is done where half of a write that does not fail is on the disk."""


class States(Plan):
    """All faults in one run: before each point the process is forked, and the fork fails there as a full and as a broken
    disk; `states` are what was on the disk in the end, and what a kill or a truncation there would have left.

    Attributes:
        states: by a folder's content, what led to it first, and where the folder was copied to.
    """

    def __init__(self, root, into):
        super().__init__(root)
        self.into, self.states, self.child = Path(into), {}, False

    def go(self, action):
        """Do what is to be broken off."""
        with faults(self.root, plan=self):
            try:
                action()
            except BaseException:
                if not self.child:
                    raise
            finally:
                if self.child:
                    os._exit(0)

    def distinct(self):
        """One state of those that differ in files with hidden names alone, one with such files if there is any."""
        found = {}
        for content, state in self.states.items():
            seen = tuple(each for each in content if "/." not in f"/{each[0]}")
            if seen not in found or len(content) > found[seen][0]:
                found[seen] = (len(content), state)
        return [state for _, state in found.values()]

    def passed(self, what, path):
        if self.child:
            return False
        self.resting = True
        try:
            before = self.keep(f"killed at {len(self.seen)}: {self.seen[-1]}")
            pins = pinned(self.root, self.into / "pins")
            for kind in ("full", "broken"):
                if differs(kind, what):
                    sys.stdout.flush()
                    sys.stderr.flush()
                    fork = os.fork()
                    if fork == 0:
                        faulthandler.dump_traceback_later(PATIENCE, exit=True)
                        self.child, self.resting, self.kind = True, False, kind
                        # it stands for the same process, which owns what it claimed
                        os.getpid = os.getppid
                        return self.fail(what, path)
                    os.waitpid(fork, 0)
                    self.keep(f"{kind} at {len(self.seen)}: {self.seen[-1]}")
                    restore(before, self.root, pins)
            if what == "open":
                made = Path(path)
                there = made.exists()
                made.touch()
                self.passed_half()
                self.resting = True
                if not there:
                    made.unlink()
        finally:
            if not self.child:
                self.resting = False
        return False

    def passed_half(self):
        if not self.child:
            self.resting = True
            self.keep(f"truncated at {len(self.seen)}: {self.seen[-1]}")
            self.resting = False

    def keep(self, fault):
        """Copy the folder, unless another fault has left the same; returns a copy of it."""
        found = picture(Path(self.root))
        if found not in self.states:
            copied = self.into / str(len(self.states))
            shutil.copytree(self.root, copied, symlinks=True)
            self.states[found] = (fault, copied)
        return self.states[found][1]


def picture(root):
    """A folder's files and what they hold."""
    found = []
    for path in sorted(root.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found.append((str(path.relative_to(root)), content))
    return tuple(found)


def pinned(root, into):
    """Second names for a folder's files, so that a file that is open stays the one that is written to."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    pins = {}
    for path in Path(root).rglob("*"):
        if path.is_file() and not path.is_symlink():
            pins[path] = into / str(len(pins))
            os.link(path, pins[path])
    return pins


def restore(kept, root, pins):
    """Make a folder what a copy of it is, of the very files that it had."""
    root = Path(root)
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not (kept / path.relative_to(root)).is_dir():
                path.rmdir()
        elif path not in pins or not path.samefile(pins[path]):
            path.unlink()
    for other in sorted(kept.rglob("*")):
        path = root / other.relative_to(kept)
        if other.is_symlink():
            if not path.is_symlink():
                path.symlink_to(os.readlink(other))
            continue
        if other.is_dir():
            path.mkdir(exist_ok=True)
        else:
            if not path.exists():
                os.link(pins[path], path)
            if path.read_bytes() != other.read_bytes():
                with open(path, "r+b") as file:
                    file.write(other.read_bytes())
                    file.truncate()
        path.chmod(other.stat().st_mode)


_plan = None
_hooked = False

WRITES = os.O_WRONLY | os.O_RDWR
CHANGES = {"os.rename": 1, "os.mkdir": 0, "os.symlink": 1, "os.remove": 0, "os.rmdir": 0, "os.truncate": 0}
CHANGES |= {"shutil.rmtree": 0}


def _hook(event_name, args):
    plan = _plan
    if plan is None or plan.resting:
        return
    if event_name == "open":
        path, _, flags = args
        # a folder or a file that is read is no write
        written = not isinstance(path, int) and (flags or 0) & WRITES and plan.inside(path)
        if written and plan.point("open", os.fsdecode(path)):
            plan.resting = True
            os.close(os.open(os.fsdecode(path), os.O_RDONLY | os.O_CREAT))
            raise Killed
    elif event_name in CHANGES:
        path = args[CHANGES[event_name]]
        if plan.inside(path):
            plan.point(event_name.rpartition(".")[2], os.fsdecode(path))


class _Raw(io.FileIO):
    """A file whose every write is a point."""

    def __init__(self, file, mode, closefd, path):
        super().__init__(file, mode, closefd)
        self.path, self.gone = path, None

    def write(self, data):
        plan = _plan
        if plan is None or plan.resting:
            return super().write(data)
        if plan.dead:
            # what a dead process holds in its buffers reaches no disk
            return len(data)
        if self.gone is not None:
            raise self.gone
        data = bytes(data)
        start = self.tell()
        try:
            half = plan.point("write", self.path)
        except OSError as error:
            self.gone = error
            self._from(start, data[: len(data) // 2])
            raise
        self._from(start, data[: len(data) // 2])
        if half:
            raise Killed
        plan.passed_half()
        super().write(data[len(data) // 2 :])
        return len(data)

    def _from(self, start, data):
        # forks share the place in a file; one that is appended to has none
        if "+" in self.mode or not self.mode.startswith("a"):
            self.seek(start)
        super().write(data)


def _opening(real):
    def opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None):
        plan = _plan
        path = file if not isinstance(file, int) else os.readlink(f"/proc/self/fd/{file}") if plan else ""
        writes = any(letter in mode for letter in "wax+")
        if plan is None or plan.resting or opener is not None or not writes or not plan.inside(path):
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _Raw(file, mode.replace("b", "").replace("t", ""), closefd, os.fspath(path))
        if buffering == 0:
            return raw
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)
        text.mode = mode
        return text

    return opened


def _flush(handle):
    """`os.fsync`: a point, and nothing else, as nothing is cut off from power here."""
    plan = _plan
    path = os.readlink(f"/proc/self/fd/{handle if isinstance(handle, int) else handle.fileno()}")
    if plan is None or plan.resting or not plan.inside(path):
        return
    if plan.point("flush", path):
        plan.resting = True
        if os.path.isfile(path):
            os.truncate(path, os.path.getsize(path) // 2)
        raise Killed


def _halved(real, position):
    def write(*args, **kwargs):
        path = args[position] if len(args) > position else kwargs.get("filename", kwargs.get("f"))
        plan = _plan
        if plan is None or not isinstance(path, (str, os.PathLike)) or not plan.inside(os.fspath(path)):
            return real(*args, **kwargs)
        half = plan.point("native", os.fspath(path))
        result = real(*args, **kwargs)
        whole = Path(path).read_bytes()
        plan.resting = True
        os.truncate(path, len(whole) // 2)
        if half:
            raise Killed
        plan.passed_half()
        plan.resting = True
        Path(path).write_bytes(whole)
        plan.resting = False
        return result

    return write


def _statement(connection, cursor, statement, *_):
    plan = _plan
    word = statement.split()[0].lower()
    if plan is not None and not plan.resting and word in ("insert", "update", "delete"):
        try:
            plan.point(word)
        except OSError as error:
            raise sql.exc.OperationalError(statement, {}, error) from None


def _transaction(real):
    @contextmanager
    def write(self, lock=True):
        plan = _plan
        try:
            plan.point("begin")
        except OSError as error:
            raise sql.exc.OperationalError("BEGIN", {}, error) from None
        with real(self, lock) as connection:
            yield connection
            try:
                plan.point("commit")
            except OSError as error:
                raise sql.exc.OperationalError("COMMIT", {}, error) from None
            if plan.dead:
                raise Killed

    return write


@contextmanager
def faults(root, at=0, kind="full", plan=None):
    """Within the block the `at`-th point fails as `kind` says, or a plan of one's own is followed; yields the plan."""
    global _plan, _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    plan = plan or Plan(root, at, kind)
    modules = [transformers.modeling_utils, peft.peft_model]
    changed = [
        (builtins, "open", _opening(builtins.open)),
        (io, "open", _opening(io.open)),
        (os, "fsync", _flush),
        (Store, "_write", _transaction(Store._write)),
        (safetensors.torch, "save_file", _halved(safetensors.torch.save_file, 1)),
        (torch, "save", _halved(torch.save, 1)),
        *((module, "safe_save_file", _halved(module.safe_save_file, 1)) for module in modules),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in changed]
    event.listen(sql.Engine, "before_cursor_execute", _statement)
    try:
        for owner, name, value in changed:
            setattr(owner, name, value)
        _plan = plan
        yield plan
    finally:
        _plan = None
        for owner, name, value in kept:
            setattr(owner, name, value)
        event.remove(sql.Engine, "before_cursor_execute", _statement)
