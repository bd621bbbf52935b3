"""Processes that tests start, forked from one that has imported everything: each costs milliseconds where an interpreter
of its own spends eight seconds on imports. What is tested about imports or the start itself uses `subprocess`.
"""

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch.multiprocessing as mp

PRELOADED = [
    "alter.cli",
    "alter.training.run",
    "alter.requests.commands",
    "alter.evaluation.run",
    "alter.comparison.run",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*PRELOADED, "peft", "transformers", "datasets"])


def _ready(environment):
    """What a new interpreter would have of its own."""
    os.environ.clear()
    os.environ |= environment
    torch.set_num_threads(1)
    gc.freeze()


def _ranked(rank, environment, function, arguments):
    _ready(environment)
    function(rank, *arguments)


def ranks(function, *arguments, processes):
    """Start `function(rank, ...)` in several processes; torch's own context, whose `join` raises what they raised."""
    given = (dict(os.environ), function, arguments)
    return mp.start_processes(_ranked, given, nprocs=processes, join=False, start_method="forkserver")


def _run(environment, folder, paths, shown, told, code, arguments):
    _ready(environment)
    os.chdir(folder)
    sys.path[:0] = paths
    for path, number in ((shown, 1), (told, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["alter", *arguments]
    status = 0
    try:
        exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else end.code is not None
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Child:
    """`python -c CODE`, or `alter ARGUMENTS` where no code is given; used like `subprocess.Popen`."""

    def __init__(
        self, *arguments, code="import sys; from alter.cli import main; sys.exit(main())", cwd=".", paths=(), env=()
    ):
        self._said = Path(tempfile.mkdtemp())
        given = ({**os.environ, **dict(env)}, str(cwd), [str(path) for path in paths])
        files = (str(self._said / "out"), str(self._said / "err"))
        self._process = CONTEXT.Process(target=_run, args=(*given, *files, code, [str(a) for a in arguments]))
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("alter", timeout)
        return self._process.exitcode

    def kill(self):
        self._process.kill()

    @property
    def stdout(self):
        return (self._said / "out").read_text()

    @property
    def stderr(self):
        return (self._said / "err").read_text()


def run(*arguments, **given):
    """The output of a child that must end well."""
    child = Child(*arguments, **given)
    assert child.wait() == 0, child.stdout[-2000:] + child.stderr[-3000:]
    return child.stdout
