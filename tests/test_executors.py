"""Cells of `alter compare` on clusters: a Ray cluster of two nodes on this machine, one of which is lost; jobs of submitit."""

import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from alter.comparison import cell as cell_work
from alter.comparison import cells, clusters, plan
from alter.comparison.cells import CellJob, finished, hold, run_cells
from alter.comparison.clusters import OnRay, OnSlurm, executor_of
from alter.comparison.executors import Executor, Full, Task, run_to_end, why
from alter.comparison.settings import Compare, Ray, Slurm
from alter.core import UserError, passing
from alter.storage import take_lock, write_atomic

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
    monkeypatch.setattr(clusters, "command_line", lambda folder, parts: ["-S", "-c", SCRIPT, str(folder), *parts])
    monkeypatch.setattr(clusters.OnSlurm, "lag", 0.0)
    monkeypatch.setattr(clusters.OnRay, "lag", 0.0)
    for executor in (clusters.OnSlurm, clusters.OnRay):
        monkeypatch.setattr(executor, "pause", 0.02)


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
    monkeypatch.setattr(clusters._Queue, "holds", lambda _, job, since=0: job not in gone)
    executor = OnSlurm(Slurm(cpus=3), workers=1, minutes=2)
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
    assert clusters._SlurmTask(lost, clusters._Queue()).ended() is None
    gone.append("77")
    assert "Slurm job 77 ended without a result: " in clusters._SlurmTask(lost, clusters._Queue()).ended()
    lost.paths.stderr.write_text("srun: begins\nslurmstepd: error: Detected 1 oom_kill event\n")
    assert (
        "a result (slurmstepd: error: Detected 1 oom_kill event)"
        in clusters._SlurmTask(lost, clusters._Queue()).ended()
    )
    os.close(lock)


def test_one_look_at_the_queue_serves_all_cells(monkeypatch):
    asked, waiting = [], {"1", "2"}

    def squeue(command, **_):
        asked.append(command)
        return SimpleNamespace(returncode=0 if waiting else 1, stdout="".join(f"{job}\n" for job in waiting))

    monkeypatch.setattr(clusters.subprocess, "run", squeue)
    queue = clusters._Queue()
    assert [queue.holds(job) for job in ("1", "2", "3")] == [True, True, False]
    # what was submitted after the answer cannot be in it
    assert queue.holds("4", time.monotonic())
    assert [command[3] for command in asked] == [str(os.getuid())]
    # a colleague's job, of a folder that both work on
    assert queue.holds_earlier("2", 77)
    assert not queue.holds_earlier("5", 77)
    assert [command[3] for command in asked[1:]] == [",".join(sorted((str(os.getuid()), "77"), key=int))]
    # of a controller that does not answer nothing follows
    waiting.clear()
    queue._asked = -1e9
    assert queue.holds("3")


class Few(Executor):
    """Takes two cells at a time, though it is not asked how many; their results are seen a little later."""

    at_once, pause, lag, place = 9, 0.01, 5.0, "here"

    def __init__(self, most):
        self.most, self.running = most, []

    def start(self, folder, parts, lock):
        if len(self.running) == self.most:
            raise Full("no more of your jobs")
        self.running.append(folder)
        # whole or not at all, as a cell writes it: the comparison looks while it is written
        result = '{"status": "failed", "reason": ""}'
        threading.Timer(0.3, write_atomic, [folder / "cell.json", result]).start()
        return FewTask(self, folder)

    def close(self):
        pass


class FewTask(Task):
    def __init__(self, few, folder):
        self.few, self.folder = few, folder

    def ended(self):
        self.few.running.remove(self.folder)
        return ""

    def stop(self):
        raise AssertionError("a cell was cancelled")


def test_what_a_full_queue_does_not_take_waits_and_nothing_is_cancelled(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "AGAIN", 0.05)
    assert {c.key: why for c, why in run_cells(tmp_path, jobs_of(5), Few(2), 0)} == {f"key{i}": "" for i in range(5)}
    with pytest.raises(UserError, match="no more of your jobs"):
        list(run_cells(tmp_path / "none", jobs_of(2), Few(0), 0))


def test_slurm_s_refusal_is_told(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit", reason="submitit is not installed")
    monkeypatch.setattr(OnSlurm, "CLUSTER", "local")

    def refuse(*_, **__):
        raise submitit.core.utils.FailedJobError("sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: no")

    monkeypatch.setattr(submitit.AutoExecutor, "submit", refuse)
    (tmp_path / "cells" / "k").mkdir(parents=True)
    with pytest.raises(Full, match=r"does not take a cell \(sbatch: error: QOSMaxSubmit.*`workers`"):
        OnSlurm(Slurm(), None).start(tmp_path / "cells" / "k", ["test"], 0)


def test_slurm_warns_a_cell_near_its_time_limit_and_not_as_it_begins(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is not installed")
    for name in ("sbatch", "srun"):
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "k").mkdir()
    queue = OnSlurm(Slurm(partition="p"), None, 2)._queue(tmp_path / "k")
    told = queue._executor._make_submission_file_text("command", "1")
    # submitit's 90 seconds, and up to 60 that Slurm is early, would leave nothing of two minutes
    assert "#SBATCH --signal=USR2@10\n" in told
    assert "#SBATCH --time=2\n" in told
    assert OnSlurm(Slurm(), None)._queue(tmp_path / "k")._executor.parameters["time"] == 240
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        Compare(model="m", methods=["npo"], out="o", minutes=1)


def test_a_cell_that_hangs_is_ended_at_its_time_limit(tmp_path, monkeypatch):
    """By the system, whatever hangs; without a limit nothing ends it."""
    monkeypatch.setattr(cell_work, "die_with_parent", lambda: None)
    monkeypatch.setattr(cell_work, "work", lambda *_: time.sleep(2))
    codes = []
    for told in ({"minutes": 0.005}, {}):
        (tmp_path / "spec.json").write_text(json.dumps(told))
        pid = os.fork()
        if pid == 0:
            os._exit(cell_work.cell_process(str(tmp_path), "validation"))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    assert codes == [-signal.SIGALRM, 0]
    assert why(str(tmp_path), codes[0]) == "killed by SIGALRM: it took longer than `minutes`"


def test_cells_are_told_their_time_limit_which_decides_no_number(tmp_path):
    given = {"model": "m", "methods": ["npo"], "out": "o"}
    assert "minutes" not in plan._told(Compare(**given))
    assert plan._told(Compare(**given, minutes=30))["minutes"] == 30


def test_a_session_of_ray_that_was_there_before_stays(monkeypatch):
    calls = []
    ray = SimpleNamespace(
        is_initialized=lambda: bool(calls),
        init=lambda **_: None,
        shutdown=lambda: calls.append("shutdown"),
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}],
        remote=lambda **_: lambda work: work,
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    OnRay(Ray(), None).close()
    assert calls == ["shutdown"]
    # as in a notebook whose cells use Ray themselves
    OnRay(Ray(), None).close()
    assert calls == ["shutdown"]


def test_parts_of_several_gpus_are_refused():
    with pytest.raises(ValueError, match=r"`ray.gpus` is 1.5.*whole number, or a part of one"):
        Ray(gpus=1.5)
    assert [Ray(gpus=n).gpus for n in (0, 0.25, 1, 2)] == [0, 0.25, 1, 2]


def test_cells_run_on_what_the_cluster_gives_them_not_on_what_this_machine_has(tmp_path, monkeypatch):
    """A machine that jobs are submitted from seldom has a GPU."""
    monkeypatch.setattr(plan, "source_digest", lambda: "")

    def place(**changes):
        given = settings(tmp_path, **changes)
        return given.cells_on, plan._facts(given.model_copy(update={"device": given.cells_on}))["device"]

    assert place(executor="slurm", slurm=Slurm(gpus=1), device="cuda") == ("cuda", "cuda")
    assert place(executor="slurm", slurm=Slurm(gpus=1)) == ("cuda", "cuda")
    assert place(executor="ray", ray=Ray(gpus=0.5)) == ("cuda", "cuda")
    assert place(executor="ray") == place(executor="slurm") == ("cpu", "cpu")
    assert place()[0] is None
    # what one machine lacks is no result of the cell
    with pytest.raises(UserError) as refused:
        place(device="mps")
    assert passing(refused.value)


def test_a_cell_is_worked_on_by_one_process(tmp_path, monkeypatch, capsys):
    """A job of Slurm goes on when the comparison that submitted it is gone, and another begins without Slurm."""
    monkeypatch.setattr(cell_work, "die_with_parent", lambda: None)
    monkeypatch.setattr(cell_work, "PATIENCE", 0.2)
    (tmp_path / "spec.json").write_text("{}")
    worked = []
    monkeypatch.setattr(cell_work, "work", lambda folder, parts: worked.append(parts))
    other = take_lock(tmp_path / ".lock", 0)
    assert cell_work.cell_process(str(tmp_path), "test") == 1
    assert not worked
    assert "another process works on this cell" in capsys.readouterr().err
    os.close(other)
    assert cell_work.cell_process(str(tmp_path), "test") == 0
    assert worked == [["test"]]


def test_a_lock_is_of_the_file_that_is_there(tmp_path, monkeypatch, capsys):
    first = take_lock(tmp_path / "out" / ".lock", 0)
    threading.Timer(0.3, lambda: (shutil.rmtree(tmp_path / "out"), os.close(first))).start()
    # who waited has not locked what was deleted meanwhile
    second = take_lock(tmp_path / "out" / ".lock", 20)
    with pytest.raises(BlockingIOError):
        take_lock(tmp_path / "out" / ".lock", 0)
    os.close(second)

    def none(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    # as Lustre has it, if it was mounted without
    monkeypatch.setattr("fcntl.flock", none)
    os.close(hold(tmp_path, patience=5))
    assert "cannot be locked (Function not implemented)" in " ".join(capsys.readouterr().err.split())


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
