"""Executors of several machines: cells as tasks of a Ray cluster, or as jobs of Slurm.

The machines must see the comparison's folder at the same path, have alter installed, and need nothing else of each other.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from alter.comparison.executors import Executor, Full, Local, Task, command_line, gpus, run_to_end
from alter.comparison.settings import Compare, Ray, Slurm
from alter.core import UserError
from alter.storage import to_json, write_atomic

UNBOUNDED = sys.maxsize
"""A cluster has its own queue: all cells are submitted at once."""
MINUTES = 240
"""Time limit of a job, unless `minutes` gives another."""
WARNED = 10
"""Seconds before its time limit in which a job says why it ends; Slurm sends the signal up to a minute earlier."""
LAG = 60.0
"""Seconds until this machine surely sees a file of another: NFS believes for so long that there is none."""


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

    pause = 0.5
    lag = LAG

    def __init__(self, settings: Ray, workers: int | None) -> None:
        """Connect to the cluster.

        Raises:
            UserError: Ray is not installed, no cluster answers, or none of its machines can take a cell.
        """
        try:
            import ray
        except ImportError:
            raise UserError("executor ray needs Ray: pip install 'alter-unlearning[ray]'") from None
        # a session of whoever calls the API is not ours to end
        self._own = not ray.is_initialized()
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
        self._ray, self._threads = ray, settings.cpus
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(m.get("CPU", 0) >= settings.cpus and m.get("GPU", 0) >= settings.gpus for m in machines):
            has = "; ".join(f"{m.get('CPU', 0):g} CPUs, {m.get('GPU', 0):g} GPUs" for m in machines)
            self.close()
            raise UserError(
                f"No machine of the Ray cluster can take a cell of {settings.cpus} CPUs and {settings.gpus:g} GPUs "
                f"(`ray.cpus`, `ray.gpus`); it has {has}."
            )
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
        if self._own:
            self._ray.shutdown()


# Slurm ---------------------------------------------------------------------------------------------------------------


class _Queue:
    """The jobs that wait or run, by one `squeue` for all cells (many clusters keep no accounting database, which `sacct` needs)."""

    SECONDS: ClassVar[float] = 5.0
    """The controller serves all users: it is asked so seldom."""

    def __init__(self) -> None:
        self._users = {os.getuid()}
        self._asked = -math.inf
        self._jobs: set[str] | None = None

    def holds(self, job: str, since: float = -math.inf) -> bool:
        """Tell whether a job waits or runs, or may: it is newer than the last answer, or the controller gives none.

        Args:
            job: its number.
            since: when it was submitted, on `time.monotonic`.
        """
        now = time.monotonic()
        if now >= self._asked + self.SECONDS:
            users = ",".join(map(str, sorted(self._users)))
            # by user: of numbers, one that has ended would be an error
            asked = subprocess.run(
                ["squeue", "--noheader", "--user", users, "--format", "%A"], capture_output=True, text=True
            )
            self._asked = now
            self._jobs = None if asked.returncode else set(asked.stdout.split())
        return self._jobs is None or self._asked <= since or job in self._jobs

    def holds_earlier(self, job: str, user: int) -> bool:
        """Tell whether a job waits or runs that an earlier process of that user submitted."""
        if user not in self._users:
            self._users.add(user)
            self._asked = -math.inf
        return self.holds(job)


@dataclass
class _SlurmTask(Task):
    job: Any
    queue: _Queue
    since: float = -math.inf

    def ended(self) -> str | None:
        result = self.job.paths.result_pickle
        if not result.is_file():
            # look again: it may have been written while the queue was asked
            if self.queue.holds(self.job.job_id, self.since) or result.is_file():
                return None
            log = self.job.paths.stderr
            lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
            return f"Slurm job {self.job.job_id} ended without a result{f' ({lines[-1]})' if lines else ''}: {log}"
        try:
            return str(self.job.result())
        except Exception as error:  # what the job raised, as submitit gives it
            return " ".join(str(error).split())[-300:] or type(error).__name__

    def stop(self) -> None:
        self.job.cancel(check=False)


class OnSlurm(Executor):
    """Jobs of Slurm, one a cell, through submitit. They outlive this process: the same command finds them again."""

    pause = 0.5
    lag = LAG
    CLUSTER: ClassVar[str] = "slurm"
    FILE: ClassVar[str] = "slurm.json"

    def __init__(self, settings: Slurm, workers: int | None, minutes: int | None = None) -> None:
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
        self._submitit, self._settings, self._jobs = submitit, settings, _Queue()
        self._minutes = MINUTES if minutes is None else minutes
        self.at_once = workers or UNBOUNDED
        self.place = "through Slurm"

    def _queue(self, folder: Path) -> Any:
        given = self._settings
        queue = self._submitit.AutoExecutor(folder=folder, cluster=self.CLUSTER)
        queue.update_parameters(
            name="alter",
            timeout_min=self._minutes,
            cpus_per_task=given.cpus,
            gpus_per_node=given.gpus,
            slurm_signal_delay_s=WARNED,
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
            if before["parts"] == list(parts) and self._jobs.holds_earlier(before["job"], note.stat().st_uid):
                return _SlurmTask(self._submitit.SlurmJob(folder=logs, job_id=before["job"]), self._jobs)
        queue = self._queue(logs)
        try:
            job = queue.submit(run_to_end, str(folder), command_line(folder, parts), os.getcwd(), self._settings.cpus)
        except self._submitit.core.utils.FailedJobError as error:
            raise Full(
                f"Slurm does not take a cell ({' '.join(str(error).split())[-300:]}): `slurm.partition`, `slurm.options` and the "
                "other settings of `slurm` say what is asked for, `workers` how many cells are submitted at a time."
            ) from None
        since = time.monotonic()
        write_atomic(note, to_json({"job": job.job_id, "parts": list(parts)}))
        return _SlurmTask(job, self._jobs, since)

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
        else OnSlurm(settings.slurm, settings.workers, settings.minutes)
    )
