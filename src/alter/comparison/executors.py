"""Where the cells of `alter compare` run: processes of this machine, tasks of a Ray cluster, or jobs of Slurm.

Each cell has a process and a folder of its own everywhere. The machines of a cluster must see the comparison's folder at
the same path, have alter installed, and need nothing else of each other.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from alter.comparison.forks import OWN_PATH, Fork, Forks
from alter.comparison.settings import Compare, Ray, Slurm
from alter.core import UserError
from alter.storage import to_json, write_atomic

UNBOUNDED = sys.maxsize
"""A cluster has its own queue: all cells are submitted at once."""


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
        return f"killed by {signal.Signals(-code).name}"
    lines = (Path(folder) / "log.txt").read_text(errors="replace").strip().splitlines()
    return "" if code == 0 else lines[-1] if lines else f"exit status {code}"


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


class Executor(ABC):
    """Takes cells and runs them."""

    at_once: int
    """Most cells submitted at a time."""
    place: str
    """Where the cells run, in words."""

    @abstractmethod
    def start(self, folder: Path, parts: Sequence[str], lock: int) -> Task:
        """Submit the cell in `folder`; `lock` is the file descriptor of the comparison's lock."""

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
        self._free.remove(slot)
        process = self._fork(folder, parts, lock) if self._forking else self._launch(folder, parts, slot, lock)
        return _Process(process, str(folder), slot, self._free)

    @property
    def _forking(self) -> bool:
        # macOS's system libraries do not survive a fork either
        return not self._cards and sys.platform == "linux"

    def _fork(self, folder: Path, parts: Sequence[str], lock: int) -> Fork:
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


# Ray -----------------------------------------------------------------------------------------------------------------


def _check_listening(address: str) -> None:
    """Raise an OSError if nothing listens at a cluster's address: Ray itself would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


@dataclass
class _RayTask(Task):
    ray: Any
    reference: Any

    def ended(self) -> str | None:
        ready, _ = self.ray.wait([self.reference], timeout=0)
        if not ready:
            return None
        try:
            return str(self.ray.get(self.reference))
        except self.ray.exceptions.RayError as error:
            return " ".join(str(error).split())[:300]

    def stop(self) -> None:
        self.ray.cancel(self.reference, force=True)


class OnRay(Executor):
    """Tasks of a Ray cluster, which gives each its cores and GPUs, and starts it again elsewhere if a machine is lost."""

    def __init__(self, settings: Ray, workers: int | None) -> None:
        """Connect to the cluster.

        Raises:
            UserError: Ray is not installed, no cluster answers, or none of its machines can take a cell.
        """
        try:
            import ray
        except ImportError:
            raise UserError("executor ray needs Ray: pip install 'alter-unlearning[ray]'") from None
        try:
            _check_listening(settings.address)
            ray.init(
                address=settings.address, logging_level=logging.ERROR, log_to_driver=False, ignore_reinit_error=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"No Ray cluster answers at {settings.address!r} ({str(error).splitlines()[0]}): start one with "
                "`ray start --head`, or give its address as `ray.address`."
            ) from None
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(m.get("CPU", 0) >= settings.cpus and m.get("GPU", 0) >= settings.gpus for m in machines):
            has = "; ".join(f"{m.get('CPU', 0):g} CPUs, {m.get('GPU', 0):g} GPUs" for m in machines)
            ray.shutdown()
            raise UserError(
                f"No machine of the Ray cluster can take a cell of {settings.cpus} CPUs and {settings.gpus:g} GPUs "
                f"(`ray.cpus`, `ray.gpus`); it has {has}."
            )
        self._ray, self._threads = ray, settings.cpus
        self._attend = ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus, max_retries=settings.retries)(
            run_to_end
        )
        self.at_once = workers or UNBOUNDED
        self.place = f"on a Ray cluster of {len(machines)} machines"

    def start(self, folder: Path, parts: Sequence[str], lock: int) -> Task:
        """Hand the cell to the cluster; it ends with this process, as all tasks of a driver do."""
        arguments = command_line(folder, parts)
        return _RayTask(self._ray, self._attend.remote(str(folder), arguments, os.getcwd(), self._threads))

    def close(self) -> None:
        """Leave the cluster."""
        self._ray.shutdown()


# Slurm ---------------------------------------------------------------------------------------------------------------


def _is_queued(job: str) -> bool:
    """Tell whether a job is queued or running, by `squeue`: many clusters keep no accounting database, which `sacct` needs."""
    asked = subprocess.run(["squeue", "--noheader", "--jobs", job, "--format", "%T"], capture_output=True, text=True)
    # an unknown job is an error; so is a controller that does not answer, of which nothing follows
    return bool(asked.stdout.strip()) or (asked.returncode != 0 and "Invalid job id" not in asked.stderr)


@dataclass
class _SlurmTask(Task):
    job: Any
    asked: float = 0.0

    def ended(self) -> str | None:
        if not self.job.paths.result_pickle.is_file():
            # the controller serves all users: ask seldom
            if time.monotonic() < self.asked + 5:
                return None
            self.asked = time.monotonic()
            # look again: it may have been written while the queue was queried
            if _is_queued(self.job.job_id) or self.job.paths.result_pickle.is_file():
                return None
            return f"Slurm job {self.job.job_id} ended without a result: {self.job.paths.stderr}"
        try:
            return str(self.job.result())
        except Exception as error:  # what the job raised, as submitit gives it
            return " ".join(str(error).split())[-300:] or type(error).__name__

    def stop(self) -> None:
        self.job.cancel()


class OnSlurm(Executor):
    """Jobs of Slurm, one a cell, through submitit. They outlive this process: the same command finds them again."""

    CLUSTER: ClassVar[str] = "slurm"
    FILE: ClassVar[str] = "slurm.json"

    def __init__(self, settings: Slurm, workers: int | None) -> None:
        """Raises:
        UserError: submitit is not installed, or this machine has no `sbatch`.
        """
        try:
            import submitit
        except ImportError:
            raise UserError("executor slurm needs submitit: pip install 'alter-unlearning[slurm]'") from None
        if self.CLUSTER == "slurm" and shutil.which("sbatch") is None:
            raise UserError("executor slurm needs a machine that can submit jobs, but there is no `sbatch` here.")
        # it warns at every look at a cluster without accounts
        logging.getLogger("submitit").setLevel(logging.ERROR)
        self._submitit, self._settings = submitit, settings
        self.at_once = workers or UNBOUNDED
        self.place = "through Slurm"

    def _queue(self, folder: Path) -> Any:
        given = self._settings
        queue = self._submitit.AutoExecutor(folder=folder, cluster=self.CLUSTER)
        queue.update_parameters(
            name="alter", timeout_min=given.minutes, cpus_per_task=given.cpus, gpus_per_node=given.gpus
        )
        more = {"slurm_partition": given.partition, "mem_gb": given.memory_gb}
        queue.update_parameters(**{name: value for name, value in more.items() if value is not None})
        if given.options:
            queue.update_parameters(slurm_additional_parameters=given.options)
        return queue

    def start(self, folder: Path, parts: Sequence[str], lock: int) -> Task:
        """Submit the cell, unless a job that an earlier process submitted for it still waits or runs."""
        logs, note = folder.parent.parent / "slurm", folder / self.FILE
        if note.is_file():
            before = json.loads(note.read_text())
            if before["parts"] == list(parts) and _is_queued(before["job"]):
                return _SlurmTask(self._submitit.SlurmJob(folder=logs, job_id=before["job"]))
        queue = self._queue(logs)
        job = queue.submit(run_to_end, str(folder), command_line(folder, parts), os.getcwd(), self._settings.cpus)
        write_atomic(note, to_json({"job": job.job_id, "parts": list(parts)}))
        return _SlurmTask(job)

    def close(self) -> None:
        """Do nothing: jobs outlive this process."""


def executor_of(settings: Compare) -> Executor:
    """Return the executor that the settings name, ready for cells.

    Raises:
        UserError: see the executors; or device and GPUs of a cell contradict each other.
    """
    if settings.executor == "local":
        return Local(settings.workers, gpus(settings.device))
    wanted = settings.ray.gpus if settings.executor == "ray" else settings.slurm.gpus
    if (settings.device == "cuda" and not wanted) or (settings.device in ("cpu", "mps") and wanted):
        raise UserError(
            f"`device` is {settings.device!r}, but `{settings.executor}.gpus` is {wanted:g}: a cell on a GPU needs one, "
            "any other none."
        )
    return (
        OnRay(settings.ray, settings.workers)
        if settings.executor == "ray"
        else OnSlurm(settings.slurm, settings.workers)
    )
