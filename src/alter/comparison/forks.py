"""Fork processes from one that has imported their modules, which takes a new interpreter ten seconds."""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from alter.core import UserError

PRELOAD: tuple[str, ...] = ("alter.comparison.cell",)
"""Modules that are imported once."""
OWN_PATH = "import alter, sys; sys.path[0] or sys.path.pop(0)"
"""Begins a program of `python -c`, which puts the current folder first: no library is imported from there."""


class Forks:
    """A server that forks a process for each `start`; all end when this process does.

    Where a GPU is used an interpreter must be started instead: a CUDA driver that was asked anything does not outlive a fork.

    Args:
        locks: file descriptors that the processes hold open too.

    Raises:
        UserError: the modules cannot be imported.
    """

    def __init__(self, locks: Sequence[int] = ()) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        self._server = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"{OWN_PATH}; from alter.comparison.forks import serve_cells; serve_cells({PRELOAD!r})",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            pass_fds=tuple(locks),
        )
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._orders, self._answers = self._server.stdin, self._server.stdout
        self._codes: dict[int, int] = {}
        self._told = b""

    def start(self, arguments: Sequence[str], log: Path, where: str, environment: Mapping[str, str]) -> Fork:
        """Fork a process that acts as `python ARGUMENTS` would, with its output in `log`.

        Args:
            arguments: `-c`, a program, and what it finds in `sys.argv[1:]`.
            where: the folder to work in.
            environment: set on top of this process's own; `OMP_NUM_THREADS` is heeded, though torch is imported already.

        Raises:
            OSError: the system has no room for a process more.
        """
        given = {"arguments": list(arguments), "log": str(log), "where": where, "environment": dict(environment)}
        answer = self._ask(given)
        if "refused" in answer:
            raise OSError(answer["refused"], os.strerror(answer["refused"]))
        return Fork(self, answer["pid"])

    def kill(self, pid: int) -> None:
        """Kill a process, unless it has ended."""
        if self._server.poll() is None:
            self._ask({"kill": pid})

    def code(self, pid: int) -> int | None:
        """Exit status of a process, negative for a signal's number; None while it runs."""
        if pid in self._codes:
            return self._codes[pid]
        with suppress(UserError):
            while not self._answers.closed and select.select([self._answers], [], [], 0)[0]:
                self._listen()
            if not self._answers.closed:
                return self._codes.get(pid)
        # the processes end with their server
        return self._codes.get(pid, -signal.SIGKILL)

    @property
    def gone(self) -> bool:
        """Whether the server has ended, and with it all its processes."""
        return self._server.poll() is not None

    def close(self) -> None:
        """End the server, and with it the processes that still run."""
        with suppress(BrokenPipeError):
            self._orders.close()
        self._server.wait()
        self._answers.close()
        self._said.close()

    def _ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        with suppress(BrokenPipeError):
            self._orders.write(json.dumps(order).encode() + b"\n")
            self._orders.flush()
        while True:
            for answer in self._listen():
                if "code" not in answer:
                    return answer

    def _listen(self) -> list[dict[str, Any]]:
        """Read one message of the server, and record which processes have ended."""
        found = os.read(self._answers.fileno(), 65536)
        if not found:
            self._said.seek(0)
            lines = self._said.read().decode(errors="replace").strip().splitlines()
            raise UserError(f"The process that starts cells has ended{': ' if lines else '.'}{''.join(lines[-1:])}")
        *whole, self._told = (self._told + found).split(b"\n")
        said = [json.loads(line) for line in whole]
        self._codes |= {each["pid"]: each["code"] for each in said if "code" in each}
        return said


class Fork:
    """A process of `Forks`, used like `subprocess.Popen`."""

    def __init__(self, forks: Forks, pid: int) -> None:
        self._forks = forks
        self.pid = pid

    def poll(self) -> int | None:
        """Return its exit status, negative for a signal's number; None while it runs."""
        return self._forks.code(self.pid)

    def kill(self) -> None:
        """End it now."""
        self._forks.kill(self.pid)


def serve_cells(preload: Sequence[str]) -> None:
    """Read one JSON order a line from standard input and answer on standard output, until the other end closes.

    `{"arguments", "log", "where", "environment"}` forks a process and is answered with its `pid`, or with what the system has
    `refused` it for; `{"kill": pid}` ends one.
    `{"pid", "code"}` is sent unasked when a process ends.
    """
    # an interrupt is handled by the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # output of imported modules must not mix with answers
    answers = os.dup(1)
    os.dup2(2, 1)
    for name in preload:
        importlib.import_module(name)
    # freeze what is loaded: without this, garbage collection in each fork would copy it
    gc.collect()
    gc.freeze()
    # closes when this process ends, for whatever reason
    ends, held = os.pipe()
    running: set[int] = set()

    def say(**answer: Any) -> None:
        os.write(answers, json.dumps(answer).encode() + b"\n")

    while True:
        for pid in sorted(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                say(pid=pid, code=os.waitstatus_to_exitcode(status))
        if not select.select([0], [], [], 0.05 if running else None)[0]:
            continue
        line = sys.stdin.buffer.readline()
        if not line:
            break
        order = json.loads(line)
        if "kill" in order:
            if order["kill"] in running:
                os.kill(order["kill"], signal.SIGKILL)
            say(killed=order["kill"])
            continue
        try:
            pid = os.fork()
        except OSError as error:
            # a limit of processes or memory: those at work go on
            say(refused=error.errno)
            continue
        if pid == 0:
            os.close(held)
            os.close(answers)
            _become(order, ends)
        running.add(pid)
        say(pid=pid)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _become(order: Mapping[str, Any], stdin: int) -> NoReturn:
    """Run, in this process, what an interpreter with these arguments would."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for source, number in ((stdin, 0), (log, 1), (log, 2)):
            os.dup2(source, number)
        os.environ |= order["environment"]
        os.chdir(order["where"])
        threads = os.environ.get("OMP_NUM_THREADS", "")
        if "torch" in sys.modules and threads.isdigit() and int(threads):
            sys.modules["torch"].set_num_threads(int(threads))
        _, program, *rest = order["arguments"]
        sys.argv = ["-c", *rest]
        try:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
    except BaseException:  # as an interpreter prints whatever ends it
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
