"""Where the cells of `alter compare` run: what every executor does, and the processes of this machine.

Each cell has a process and a folder of its own everywhere; `clusters` has the executors of several machines.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alter.comparison.forks import OWN_PATH, Fork, Forks
from alter.core import UserError

CAUSES: dict[int, str] = {
    signal.SIGKILL: ", as happens where memory runs out",
    signal.SIGUSR2: ", as Slurm does near the time limit (`minutes`)",
    signal.SIGALRM: ": it took longer than `minutes`",
}
"""What sends these signals, as a rule."""


def command_line(folder: Path, parts: Sequence[str]) -> list[str]:
    """Return the interpreter's arguments that run the cell in `folder`."""
    arguments = f"{str(folder)!r}, {' '.join(parts)!r}"
    program = f"from alter.comparison.cell import cell_process; sys.exit(cell_process({arguments}))"
    return ["-c", f"{OWN_PATH}; {program}"]


def thread_limits(threads: int) -> dict[str, str]:
    """Return environment variables that limit a process to so many threads."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def start_cell(
    folder: str, arguments: Sequence[str], where: str, threads: int, card: str | None = None, locks: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """Start a cell's process, which ends when this one does; its output goes to `log.txt`.

    Args:
        where: the folder to work in, since settings may name files relative to it.
        card: the only GPU that it sees; all that this process sees if None.
        locks: file descriptors that it holds open too.
    """
    given = thread_limits(threads)
    if card is not None:
        given["CUDA_VISIBLE_DEVICES"] = card
    with open(Path(folder) / "log.txt", "wb") as log:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=where,
            env={**os.environ, **given},
            pass_fds=tuple(locks),
        )


def why(folder: str, code: int) -> str:
    """Explain an exit status with the log's last line; "" if the process succeeded."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}{CAUSES.get(-code, '')}"
    if code == 0:
        return ""
    log = Path(folder) / "log.txt"
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1] if lines else f"exit status {code}"


def run_to_end(folder: str, arguments: Sequence[str], where: str, threads: int) -> str:
    """On a machine of a cluster: run a cell's process to completion, and return what `why` says."""
    for path in (folder, where):
        if not Path(path).is_dir():
            return f"{os.uname().nodename} does not see {path}: all machines must share the comparison's folder"
    process = start_cell(folder, arguments, where, threads)
    try:
        code = process.wait()
    finally:
        process.kill()
    return why(folder, code)


class Task(ABC):
    """A submitted cell."""

    @abstractmethod
    def ended(self) -> str | None:
        """Return None while it is queued or runs; then "", or why it failed."""

    @abstractmethod
    def stop(self) -> None:
        """End it now."""


class Full(UserError):
    """No further cell is taken now; one more may be once others have ended."""


class Executor(ABC):
    """Takes cells and runs them."""

    at_once: int
    """Most cells submitted at a time."""
    pause: float = 0.05
    """Seconds between two looks at what has ended."""
    lag: float = 0.0
    """Seconds until a file that a cell has written is surely seen here."""
    place: str
    """Where the cells run, in words."""

    @abstractmethod
    def start(self, folder: Path, parts: Sequence[str], lock: int) -> Task:
        """Submit the cell in `folder`; `lock` is the file descriptor of the comparison's lock.

        Raises:
            Full: it cannot be taken, for now or at all.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the connection to the machines."""


# This machine --------------------------------------------------------------------------------------------------------


def gpus(device: str | None) -> list[str]:
    """Return the visible GPUs' names as CUDA_VISIBLE_DEVICES takes them; none if another device is asked for."""
    import torch

    if device not in (None, "cuda"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # "-1" is how people hide all of them
    names = [name for name in visible.split(",") if name and not name.startswith("-")] if visible else []
    return names or [str(i) for i in range(torch.cuda.device_count())]


def share_of_threads(workers: int) -> int:
    """Return the threads of each of so many processes: a share of OMP_NUM_THREADS if that is set, else of this process's cores."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    total = int(given) if given.isdigit() and int(given) else len(os.sched_getaffinity(0))
    return max(1, total // workers)


@dataclass
class _Process(Task):
    process: subprocess.Popen[bytes] | Fork
    folder: str
    slot: int
    free: list[int]

    def ended(self) -> str | None:
        code = self.process.poll()
        if code is None:
            return None
        if isinstance(self.process, subprocess.Popen) and self.process.stdin is not None:
            self.process.stdin.close()
        self.free.append(self.slot)
        return why(self.folder, code)

    def stop(self) -> None:
        self.process.kill()
        while self.process.poll() is None:
            time.sleep(0.01)


class Local(Executor):
    """Processes of this machine, which share its threads and take its GPUs in turn."""

    def __init__(self, workers: int | None, cards: Sequence[str]) -> None:
        self.at_once = workers or len(cards) or max(1, len(os.sched_getaffinity(0)) // 2)
        self.place = f"{self.at_once} at a time"
        self._cards = cards
        self._free = list(range(self.at_once))
        self._forks: Forks | None = None

    def start(self, folder: Path, parts: Sequence[str], lock: int) -> Task:
        """Start a process; the lock lasts until the last of them is gone, so that no cell is worked on twice at once."""
        slot = min(self._free)
        try:
            process = self._fork(folder, parts, lock) if self._forking else self._launch(folder, parts, slot, lock)
        except OSError as error:
            raise Full(f"No process for a cell ({error.strerror}): give fewer `workers`.") from error
        self._free.remove(slot)
        return _Process(process, str(folder), slot, self._free)

    @property
    def _forking(self) -> bool:
        # macOS's system libraries do not survive a fork either
        return not self._cards and sys.platform == "linux"

    def _fork(self, folder: Path, parts: Sequence[str], lock: int) -> Fork:
        if self._forks is not None and self._forks.gone:
            # memory ran out: its cells have ended with it, the others go on
            self.close()
        if self._forks is None:
            self._forks = Forks([lock])
        environment = thread_limits(share_of_threads(self.at_once))
        return self._forks.start(command_line(folder, parts), folder / "log.txt", os.getcwd(), environment)

    def _launch(self, folder: Path, parts: Sequence[str], slot: int, lock: int) -> subprocess.Popen[bytes]:
        threads = share_of_threads(self.at_once)
        card = self._cards[slot % len(self._cards)] if self._cards else None
        return start_cell(str(folder), command_line(folder, parts), os.getcwd(), threads, card, [lock])

    def close(self) -> None:
        """End the process that others are forked from."""
        if self._forks is not None:
            self._forks.close()
            self._forks = None
