"""Output that nobody reads, that has no room, or that is in another encoding: the work goes on, the exit status is true."""

import errno
import json
import os
import subprocess
import sys

import pytest

from alter.core import console, streams
from pico import save_pico, write_jsonl

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
