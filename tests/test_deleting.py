"""`--overwrite` deletes folders that a run of ours made, and no other: a slip of the hand in `--out` costs nobody their files."""

from pathlib import Path

import pytest

from alter import cli
from alter.core.errors import UserError
from alter.storage.running import check_deletable
from pico import byte_tokenizer, pico, write_jsonl


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home with a project in it, in which the command is given; real folders are only looked at by the check itself."""
    project = tmp_path / "home" / "project"
    project.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(project)
    write_jsonl(
        project / "rows.jsonl",
        [{"question": f"Who is painter {i}?", "answer": "A painter of ships."} for i in range(2)],
    )
    write_jsonl(project / "kept.jsonl", [{"question": f"What is {i}?", "answer": "It."} for i in range(2)])
    pico(1).save_pretrained(project / "model")
    byte_tokenizer().save_pretrained(project / "model")
    return tmp_path / "home"


def tree(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


def test_what_is_never_deleted_whatever_it_holds(home, tmp_path):
    for folder in (home, home / "project", tmp_path):
        (folder / "inputs.json").write_text("{}")
        with pytest.raises(UserError, match=r"(home|current) folder.*Give a folder of its own"):
            check_deletable(folder, ["inputs.json"])
    # the check deletes nothing, so that the root may be asked about
    with pytest.raises(UserError, match="holds the home folder"):
        check_deletable(Path("/"), ["proc"])
    with pytest.raises(UserError, match="whole file system"):
        check_deletable(Path("/proc"), ["1"])
    run = home / "run"
    run.mkdir()
    (run / "inputs.json").write_text("{}")
    (home / "link").symlink_to(run)
    with pytest.raises(UserError, match="is a link to"):
        check_deletable(home / "link", ["inputs.json"])
    check_deletable(run, ["inputs.json"])


def test_only_what_holds_a_mark_is_deleted(home):
    folder = home / "photos"
    check_deletable(folder, ["inputs.json"])
    folder.mkdir()
    check_deletable(folder, ["inputs.json"])
    for i in range(7):
        (folder / f"{i}.jpg").write_text("x")
    with pytest.raises(
        UserError, match=r"holds 0\.jpg, .*4\.jpg, … and no inputs.json: it is no folder of an earlier run"
    ):
        check_deletable(folder, ["inputs.json"])
    # a kill while the mark was written
    (folder / ".inputs.json.abc").write_text("{")
    check_deletable(folder, ["inputs.json"])


@pytest.mark.parametrize(
    "command",
    [
        [
            "unlearn",
            "--model",
            "model",
            "--forget",
            "rows.jsonl",
            "--retain",
            "kept.jsonl",
            "--num-forget-experts",
            "1",
        ],
        ["forget", "Harry Potter", "--model", "model"],
        ["distill", "--model", "model", "--forget", "rows.jsonl", "--retain", "kept.jsonl", "--noise.alpha", "0.1"],
        ["finetune", "--model", "model", "--data", "rows.jsonl"],
        ["guard", "--model", "model", "--guard.kind", "eco", "--forget", "rows.jsonl", "--retain", "kept.jsonl"],
    ],
    ids=lambda words: words[0],
)
def test_no_command_overwrites_what_is_not_its_own(home, capsys, command):
    (home / "photos" / "checkpoints").mkdir(parents=True)
    (home / "photos" / "0.jpg").write_text("x")
    before = tree(home)
    for out in ("../photos", "..", "."):
        assert cli.main([*command, "--out", out, "--overwrite"]) == 2
        said = capsys.readouterr().err
        assert any(
            words in said
            for words in ("no folder of an earlier run", "current folder", "home folder", "which holds the")
        ), said
        assert tree(home) == before
