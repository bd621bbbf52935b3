"""Output that nobody reads, that has no room, or that is in another encoding: the work goes on, the exit status is true."""

import errno
import io
import json
import os
import subprocess
import sys
import traceback

import pytest
import yaml

from alter import cli
from alter.comparison import plan
from alter.core import console, streams
from pico import save_pico, write_jsonl, write_people
from test_compare import data, settings, write_all  # noqa: F401

ALTER = [sys.executable, "-m", "alter"]


def shell(line, *args, cwd=None, **env):
    """Run `"$@"` with redirections in a shell."""
    return subprocess.run(
        ["bash", "-c", f'"$@" {line}', "x", *args],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        check=False,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    here = tmp_path_factory.mktemp("place")
    save_pico(here / "model")
    write_jsonl(
        here / "rows.jsonl", [{"question": f"Where is {n}?", "answer": f"In {n}ton."} for n in ("Ilse", "Ann")]
    )
    return here


@pytest.mark.parametrize("line", [">&-", "2>&-", ">&- 2>&- <&-", "2>/dev/full", "| head -n 1"])
@pytest.mark.parametrize("args", [["--help"], ["request", "list", "--help"]])
def test_help_whoever_reads_it(line, args):
    done = shell(f"{line}; exit ${{PIPESTATUS[0]}}", *ALTER, *args)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n") == (0 if ">&-" in line.split() else 1) or line.startswith("2>")


def test_an_output_without_room_is_said():
    for args in (["--help"], ["--version"], ["request", "list", "--help"]):
        done = shell(">/dev/full", *ALTER, *args)
        assert done.returncode == 70
        assert done.stderr.decode() == (
            "alter: the output could not be written: No space left on device. Send it to another place.\n"
        )


def test_an_error_keeps_its_status_without_streams(place):
    for line in (">&- 2>&-", ">/dev/full 2>/dev/full"):
        assert shell(line, *ALTER, "generate", "--modle", "x").returncode == 2


def test_the_work_is_done_when_its_reader_has_gone(place):
    """The table of a measurement goes into a closed pipe, or onto a full disk; its records are written all the same."""
    measure = [*ALTER, "evaluate", "--benchmark", "rows", "--model", "model", "--forget", "rows.jsonl"]
    for line, status in (("| true; exit ${PIPESTATUS[0]}", 0), (">/dev/full", 70), (">&- <&-", 0)):
        done = shell(line, *measure, "--max-new-tokens", "2", "--json", "out.json", cwd=place)
        assert done.returncode == status, done.stderr
        assert b"Traceback" not in done.stderr
        assert json.loads((place / "out.json").read_text())
        (place / "out.json").unlink()


def test_what_the_encoding_lacks_is_written_in_numbers(place):
    """In a terminal of ASCII texts of any script are printed, and JSON on standard output stays UTF-8."""
    prompt = ["--prompt", "Grüße, 東京", "--max-new-tokens", "2"]
    plain = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "40", "TERM": "dumb", "NO_COLOR": "1"}
    done = shell("", *ALTER, "generate", "--model", "model", *prompt, cwd=place, **plain)
    assert done.returncode == 0, done.stderr
    assert b"Gr\\xfc\\xdfe" in done.stdout
    assert done.stdout.isascii()
    done = shell("", *ALTER, "generate", "--model", "model", *prompt, "--json", "-", cwd=place, **plain)
    assert "Grüße, 東京" in done.stdout.decode()
    assert json.loads(done.stdout)


def forked(args, folder, *, condition):
    """Run the command line in a fork, whose streams are as a shell would have made them; return its status, and all it said."""
    out, err = folder / "out", folder / "err"
    fork = os.fork()
    if fork == 0:
        os.environ.update({"COLUMNS": "40", "TERM": "dumb", "NO_COLOR": "1"} if condition == "ascii" else {})
        given = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for path in (out, err)]
        gone, full = os.pipe(), os.open("/dev/full", os.O_WRONLY)
        os.close(gone[0])
        for number, place in zip((0, 1, 2), (os.open(os.devnull, os.O_RDONLY), *given), strict=True):
            os.dup2(place, number)
        if condition == "closed":
            os.closerange(0, 3)
        elif condition in ("full", "gone"):
            os.dup2(full if condition == "full" else gone[1], 1)
        encoding = "ascii" if condition == "ascii" else "utf-8"
        for number, name in ((1, "stdout"), (2, "stderr")):
            file = io.BufferedWriter(io.FileIO(number, "w", closefd=False)) if condition != "closed" else None
            setattr(sys, name, file and io.TextIOWrapper(file, encoding))
        sys.argv = ["alter", *map(str, args)]
        try:
            status = cli.main()
        except BaseException:
            err.write_text("Traceback: " + traceback.format_exc())
            status = 1
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
    return status, out.read_text() + err.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["closed", "full", "gone", "ascii"])
def test_results_are_written_whoever_reads_of_them(tmp_path, condition):
    """Attack, report, distillation and export: their files are whole, and the status is true."""
    here = write_people(tmp_path, ["Ada"], 8, 8)
    save_pico(here / "model")
    save_pico(here / "other", seed=1)
    model, rows, cpu = here / "model", here / "forget.jsonl", ("--device", "cpu")
    small = ("--rows", 4, "--max-new-tokens", 4, "--relearn.rows", 2, "--relearn.steps", 1)
    taught = ("--forget", rows, "--retain", here / "retain.jsonl", "--general", here / "retain.jsonl")
    told = ("--max-steps", 1, "--batch-size", 4, "--closing-rows", 2)
    commands = {
        "attack": (["--model", model, "--forget", rows, "--attacks", "relearn", *small, *cpu], "records.json"),
        "distill": (["--model", here / "other", "--student", model, *taught, *told, *cpu], "records.json"),
        "export": (["--model", model], "out.gguf"),
    }
    for name, (args, made) in commands.items():
        out = here / "out.gguf" if made == "out.gguf" else here / name
        status, said = forked([name, *args, "--out", out], here, condition=condition)
        assert "Traceback" not in said, said
        assert (out / made if out.is_dir() else out).stat().st_size > 100
        assert status == (70 if condition == "full" else 0), said
        assert said.isascii() or condition != "ascii"
        if condition == "ascii":
            boxes = [line for line in said.splitlines() if line.startswith(("+", "|"))]
            assert all(len(line) <= 40 for line in boxes)
    records = here / "distill" / "records.json"
    status, said = forked(["report", "--records", records, "--out", here / "r.html"], here, condition=condition)
    assert (status, "Traceback" in said) == (0, False), said
    assert (here / "r.html").read_text().rstrip().endswith("</html>")


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["closed", "full", "gone", "ascii"])
def test_a_comparison_is_written_whoever_reads_of_it(data, tmp_path, condition):  # noqa: F811
    """Its tables and page are whole, and what it prints fits 40 columns of ASCII."""
    out = tmp_path / "compared"
    wanted = settings(data, out, run=False, rates=[1.0])
    write_all(out, plan.lay_out(wanted, out))
    recipe = tmp_path / "compare.yaml"
    recipe.write_text(yaml.safe_dump(wanted.model_dump(mode="json", exclude_defaults=True)))
    status, said = forked(["compare", recipe], tmp_path, condition=condition)
    assert "Traceback" not in said, said
    assert status == (70 if condition == "full" else 0), said
    assert (out / "report.html").read_text().rstrip().endswith("</html>")
    assert json.loads((out / "compare.json").read_text())
    if condition == "ascii":
        assert said.isascii()
        assert "npo" in said
        assert all(len(line) <= 40 for line in said.splitlines() if line.startswith(("+", "|")))


def test_a_file_that_fails_takes_no_more(tmp_path):
    file = streams._Lasting(os.open(tmp_path / "x", os.O_WRONLY | os.O_CREAT), "w")
    assert file.write(b"one") == 3
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), file.fileno())
    assert file.write(memoryview(b"two and")) == 7
    assert file.failure is not None
    assert file.failure.errno == errno.ENOSPC
    assert file.write(b"x") == 1
    file.close()
    assert (tmp_path / "x").read_bytes() == b"one"


def test_progress_is_told_in_lines_where_no_bar_can_be_drawn(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 40.0, 41.0, 240.0, 250.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    assert list(console.progress("abcde", total=5, label="reading")) == list("abcde")
    assert capsys.readouterr().err.splitlines() == [
        "reading: 2 of 5, about 60 s left",
        "reading: 4 of 5, about 60 s left",
    ]
