"""`--overwrite` deletes folders that a run of ours made, and no other: a slip of the hand in `--out` costs nobody their files."""

from pathlib import Path

import pytest

from alter import cli
from alter.core.errors import UserError
from alter.data.sources import local_parts
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


@pytest.mark.parametrize(
    ("forget", "retain"),
    [
        ("run/rows.jsonl", "kept.jsonl"),
        ("rows.jsonl", "run/rows.jsonl[:2]"),
        ("rows.jsonl", "kept.jsonl + ./run/../run/rows.jsonl@question=question,answer=answer"),
        ("run/*.jsonl", "kept.jsonl"),
    ],
)
def test_rows_in_the_folder_that_is_to_be_deleted(home, capsys, forget, retain):
    run = home / "project" / "run"
    run.mkdir()
    (run / "inputs.json").write_text("{}")
    rows = [{"question": f"Who is sculptor {i}?", "answer": "A sculptor."} for i in range(2)]
    write_jsonl(run / "rows.jsonl", rows)
    before = tree(home)
    given = [
        "--model",
        "model",
        "--forget",
        forget,
        "--retain",
        retain,
        "--out",
        "run",
        "--overwrite",
        "--max-steps",
        "1",
    ]
    assert cli.main(["unlearn", *given]) == 2
    assert "`--overwrite` would delete" in capsys.readouterr().err.replace("--overwrite", "`--overwrite`", 1)
    assert tree(home) == before


def test_the_document_that_is_to_be_forgotten_is_not_deleted(home, capsys):
    run = home / "project" / "run"
    run.mkdir()
    (run / "forget.json").write_text("{}")
    (run / "letter.md").write_text("Dear Marta Nilsson of Bergen. " * 20)
    given = ["--document", "run/letter.md", "--model", "model", "--out", "run", "--overwrite"]
    assert cli.main(["forget", *given]) == 2
    assert "letter.md, which --document names: give another --out" in " ".join(capsys.readouterr().err.split())
    assert (run / "letter.md").is_file()


def test_other_commands_delete_no_rows_either(home, capsys):
    run = home / "project" / "run"
    run.mkdir()
    for mark in ("finetune.yaml", "inference.json"):
        (run / mark).write_text("{}")
    write_jsonl(run / "rows.jsonl", [{"question": "Who?", "answer": "A sculptor."}])
    (run / "book.txt").write_text("It was a dark night.")
    before = tree(home)
    at = ["--model", "model", "--out", "run", "--overwrite"]
    for command, read in (
        (["finetune", "--data", "kept.jsonl", "run/rows.jsonl[:1]", *at], "run/rows.jsonl"),
        (["finetune", "--corpora", "kept.txt", "run/book.txt", *at], "run/book.txt"),
        (["finetune", "--data", "kept.jsonl", *at, "--model", "run"], "run"),
        (
            ["guard", "--guard.kind", "eco", "--forget", "run/rows.jsonl", "--retain", "kept.jsonl", *at],
            "run/rows.jsonl",
        ),
    ):
        assert cli.main(command) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert f"would delete {read}, which" in told
    assert tree(home) == before


def test_the_local_parts_of_a_source(home):
    assert local_parts("builtin:forget10[:20]") == []
    assert local_parts("locuslab/TOFU:forget10 + nowhere.jsonl") == []
    assert local_parts("rows.jsonl[:3] + kept.jsonl@text=answer") == [Path("rows.jsonl"), Path("kept.jsonl")]
    assert local_parts("~/project/rows.jsonl") == [home / "project" / "rows.jsonl"]
    assert local_parts("model/*.json") == [Path("model")]
    # a file whose own name holds the sign wins
    Path("a + b.jsonl").write_text("")
    assert local_parts("a + b.jsonl") == [Path("a + b.jsonl")]
