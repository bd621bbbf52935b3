"""Cells of `alter compare` on clusters: a Ray cluster of two nodes on this machine, one of which is lost; jobs of submitit."""

import json
import os
import sys
import threading
import time

import pytest

from alter.comparison import executors, plan
from alter.comparison.cells import CellJob, finished, hold, run_cells
from alter.comparison.executors import OnRay, OnSlurm, executor_of, run_to_end
from alter.comparison.settings import Compare, Ray, Slurm
from alter.core.errors import UserError

# does what a cell's process does: it ends when the other end of its standard input is gone
SCRIPT = """
import json, os, sys, threading, time
from pathlib import Path
folder = Path(sys.argv[1])
def watch():
    os.read(0, 1)
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
with open(folder.parent.parent / "ran.txt", "a") as file:
    file.write(f"{folder.name} {os.getpid()} {os.environ['OMP_NUM_THREADS']} {os.getcwd()}\\n")
while (folder.parent.parent / "wait").exists():
    time.sleep(0.02)
if (folder / "fail").exists():
    sys.exit("a bug")
for part in sys.argv[2:]:
    (folder / f"{part}-forget10.json").touch()
(folder / "cell.json").write_text(json.dumps({"status": "done", "all_seconds": 0.1}))
"""


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(executors, "command_line", lambda folder, parts: ["-S", "-c", SCRIPT, str(folder), *parts])


def jobs_of(count):
    cells = [plan.Cell(f"m{i}", ("forget10",), 0, (1.0, 1.0), {"i": i}, f"key{i}") for i in range(count)]
    return [CellJob(cell, ("validation",)) for cell in cells]


def ran(out):
    return (
        [line.split(maxsplit=3) for line in (out / "ran.txt").read_text().splitlines()]
        if (out / "ran.txt").exists()
        else []
    )


def wait_until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


def alive(pid):
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


def settings(tmp_path, **changes):
    return Compare(model="m", methods=["npo"], out=str(tmp_path), **changes)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_node_of_ray_is_lost_and_no_cell_is(tmp_path, monkeypatch, small):
    monkeypatch.setenv("RAY_DISABLE_MEMORY_MONITOR", "1")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    utils = pytest.importorskip("ray.cluster_utils", reason="ray is not installed")
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = utils.Cluster(initialize_head=True, head_node_args=node)
    try:
        second = cluster.add_node(**node)
        with pytest.raises(
            UserError, match=r"No machine .* cell of 2 CPUs and 0 GPUs .* it has 1 CPUs, 0 GPUs; 1 CPUs"
        ):
            OnRay(Ray(address=cluster.address), None)
        executor = OnRay(Ray(address=cluster.address, cpus=1), None)
        assert executor.place == "on a Ray cluster of 2 machines"
        jobs, lock = jobs_of(4), hold(tmp_path)
        (tmp_path / "wait").touch()
        (tmp_path / "cells" / "key3").mkdir(parents=True)
        (tmp_path / "cells" / "key3" / "fail").touch()
        handed = []
        start = OnRay.start
        monkeypatch.setattr(OnRay, "start", lambda self, *rest: handed.append(start(self, *rest)) or handed[-1])
        loop = run_cells(tmp_path, jobs, executor, lock)
        found = {}

        def first():
            cell, reason = next(loop)
            found[cell.key] = reason

        thread = threading.Thread(target=first)
        thread.start()
        # one on each node
        wait_until(lambda: len(ran(tmp_path)) == 2)
        before = ran(tmp_path)
        cluster.remove_node(second, allow_graceful=False)
        wait_until(lambda: sum(alive(line[1]) for line in before) == 1)
        (tmp_path / "wait").unlink()
        thread.join(90)
        found |= {cell.key: reason for cell, reason in loop}
        executor.close()
        os.close(lock)
    finally:
        cluster.shutdown()
    assert len(handed) == 4
    assert found == {"key0": "", "key1": "", "key2": "", "key3": "a bug"}
    assert all(finished(tmp_path, job.cell, job.parts) is not None for job in jobs[:3])
    # only what was lost with its node ran twice
    lost = next(line[0] for line in before if not alive(line[1]) and [x[0] for x in ran(tmp_path)].count(line[0]) == 2)
    assert sorted(line[0] for line in ran(tmp_path)) == sorted(["key0", "key1", "key2", "key3", lost])
    assert {tuple(line[2:]) for line in ran(tmp_path)} == {("1", os.getcwd())}


@pytest.mark.timeout(120)
def test_jobs_are_submitted_found_again_and_tell_why(tmp_path, monkeypatch, small):
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    monkeypatch.setattr(OnSlurm, "CLUSTER", "local")
    jobs, lock = jobs_of(2), hold(tmp_path)
    (tmp_path / "cells" / "key1").mkdir(parents=True)
    (tmp_path / "cells" / "key1" / "fail").touch()
    gone = []
    monkeypatch.setattr(executors, "_is_queued", lambda job: job not in gone)
    executor = OnSlurm(Slurm(cpus=3, minutes=2), workers=1)
    assert {cell.key: why for cell, why in run_cells(tmp_path, jobs, executor, lock)} == {"key0": "", "key1": "a bug"}
    assert [line[0] for line in ran(tmp_path)] == ["key0", "key1"]
    assert {line[2] for line in ran(tmp_path)} == {"3"}
    # a job that an earlier process submitted is waited for, not submitted again
    (tmp_path / "cells" / "key1" / "fail").unlink()
    note = json.loads((tmp_path / "cells" / "key1" / "slurm.json").read_text())
    monkeypatch.setattr(submitit, "SlurmJob", lambda folder, job_id: submitit.LocalJob(folder=folder, job_id=job_id))
    assert [why for _, why in run_cells(tmp_path, jobs, executor, lock)] == ["a bug"]
    assert len(ran(tmp_path)) == 2
    # other parts are another job, and so is what is no longer queued
    assert [why for _, why in run_cells(tmp_path, [CellJob(jobs[1].cell, ("test",))], executor, lock)] == [""]
    assert len(ran(tmp_path)) == 3
    note = json.loads((tmp_path / "cells" / "key1" / "slurm.json").read_text())
    assert note["parts"] == ["test"]
    gone.append(note["job"])
    assert [why for _, why in run_cells(tmp_path, jobs, executor, lock)] == [""]
    assert len(ran(tmp_path)) == 4
    # one that ended without a word
    lost = submitit.LocalJob(folder=tmp_path / "slurm", job_id="77")
    assert executors._SlurmTask(lost).ended() is None
    gone.append("77")
    assert "Slurm job 77 ended without a result" in executors._SlurmTask(lost).ended()
    os.close(lock)


def test_a_machine_that_does_not_share_the_folder_says_so(tmp_path):
    assert "all machines must share the comparison's folder" in run_to_end(
        str(tmp_path / "no"), ["-c", ""], os.getcwd(), 1
    )


def test_what_cannot_be_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no `sbatch` here"):
        executor_of(settings(tmp_path, executor="slurm"))
    with pytest.raises(UserError, match=r"`device` is 'cuda', but `slurm.gpus` is 0"):
        executor_of(settings(tmp_path, executor="slurm", device="cuda"))
    with pytest.raises(UserError, match=r"`device` is 'cpu', but `ray.gpus` is 0.5"):
        executor_of(settings(tmp_path, executor="ray", device="cpu", ray=Ray(gpus=0.5)))
    pytest.importorskip("ray", reason="ray is not installed")
    with pytest.raises(UserError, match=r"No Ray cluster answers at '127.0.0.1:1' .*refused"):
        executor_of(settings(tmp_path, executor="ray", ray=Ray(address="127.0.0.1:1")))
    for name, extra in (("ray", "ray"), ("submitit", "slurm")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=rf"alter-unlearning\[{extra}\]"):
            executor_of(settings(tmp_path, executor=extra))
