"""The command line, the recipes and the README as a user types them."""

import importlib
import json
import re
from pathlib import Path

import pytest
import yaml

from alter import cli
from alter.comparison.plan import Compare, run_of
from alter.core.errors import UserError
from alter.core.files import write_atomic
from alter.core.records import Record, read_records, write_records
from alter.demo import RECIPE, Demo, free_folder
from alter.training.finetune import Finetune
from alter.training.settings import Unlearn
from pico import save_pico

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
REQUIRED = ["--model", "m", "--forget", "f", "--retain", "r", "--out", "o"]


def test_flags_override_a_recipe_and_the_dump_reads_back(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: m\nforget: f\nretain: r\nadapter: {r: 4}\nobjective: {kind: stopped_hinge, margin: 0.2}\n"
    )
    run = cli.parse(
        "unlearn", Unlearn, [str(recipe), "--out", "o", "--adapter.alter-alpha", "3", "--objective.margin", "0.5"]
    )
    assert (run.adapter.r, run.adapter.alter_alpha, run.objective.margin, run.out) == (4, 3.0, 0.5, "o")
    assert (
        cli.parse("unlearn", Unlearn, [*REQUIRED, "--objective.kind", "without_truth"]).objective.kind
        == "without_truth"
    )
    assert cli.parse("unlearn", Unlearn, [*REQUIRED, "--lambda", "0.5"]).lambda_ == 0.5
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(run.model_dump()))
    assert cli.parse("unlearn", Unlearn, [str(again)]) == run


@pytest.mark.parametrize(
    ("content", "args", "says"),
    [
        ("modle: m", REQUIRED, "Did you mean 'model'"),
        ("adapter: {rr: 3}", REQUIRED, "'rr'"),
        ("objective: {kind: hinge}", REQUIRED, "inverted_hinge, stopped_hinge"),
        ("adapter: 3", REQUIRED, "adapter is 3"),
        ("[1, 2]", REQUIRED, "holds list"),
        ("a: [", REQUIRED, "not YAML"),
        ("adapter: {r: 0}", REQUIRED, "adapter.r: Input should be greater than or equal to 1 (got 0)"),
        ("objective: {kind: stopped_hinge, margin: 7}", REQUIRED, "objective.margin"),
    ],
)
def test_recipe_mistakes_name_the_setting(tmp_path, content, args, says):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(content)
    with pytest.raises(UserError, match=re.escape(says)):
        cli.parse("unlearn", Unlearn, [str(recipe), *args])


def test_unknown_names(tmp_path, capsys):
    assert cli.main(["unlern"]) == 2
    assert "Did you mean 'unlearn'" in capsys.readouterr().err
    (tmp_path / "tofu.yaml").write_text("")
    assert cli.main(["unlearn", str(tmp_path / "tofo.yaml")]) == 2
    assert "Did you mean 'tofu.yaml'" in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_parse_and_say_how_to_run_them(path):
    found = re.search(r"^# .*alter (unlearn|finetune|demo|evaluate|request|compare)", path.read_text(), re.MULTILINE)
    command = found.group(1)
    given = yaml.safe_load(path.read_text())
    if command == "finetune":
        Finetune.model_validate(given)
    elif command == "evaluate":
        module, settings = cli.choose([str(path)])
        getattr(importlib.import_module(module), settings).model_validate({"model": "m", **given})
    elif command == "compare":
        settings = cli.parse("compare", Compare, [str(path)])
        for name in settings.methods:
            run_of(settings, name, settings.splits[0], 0, (1.0, settings.epochs[0]))
    else:
        # what the requests of a database share leaves model and data to them
        decided = {"model": "m", "forget": "f", "retain": "r"} if command == "request" else {}
        Unlearn.model_validate({"out": "x", **decided, **given})


def test_readme_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        assert len(block.splitlines()) <= 25
        exec(compile(block, "README", "exec"), {})


def test_readme_names_only_files_and_commands_that_exist():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"(?:^|`)alter ([\w-]+)(?: ([a-z]+))?", text, re.MULTILINE)
    for first, second in commands:
        groups = {f"{name.split()[0]} " for name in cli.COMMANDS if " " in name}
        assert {first, f"{first} {second}"} & {"COMMAND", *cli.COMMANDS, *groups}, f"{first} {second}"
    assert len(commands) > 5
    for name in re.findall(r"recipes/[\w.-]+\.yaml", text):
        assert (ROOT / name).exists(), name


def test_aggregate_writes_the_published_figures(tmp_path):
    logs = ROOT / "data" / "tofu_logs"
    out = tmp_path / "records.json"
    line = ["aggregate", str(logs / "llama2-7b_full.json"), "--retain", str(logs / "llama2-7b_retain90.json")]
    assert cli.main([*line, "--json", str(out)]) == 0
    found = {row["metric"]: row for row in json.loads(out.read_text())}
    assert found["model_utility"]["value"] == pytest.approx(0.6226773637427152, abs=1e-9)
    assert found["forget_quality"]["value"] == pytest.approx(1.834066410994743e-21, rel=1e-9)
    assert {"model", "metric", "value", "n", "mode"} <= set(found["model_utility"])


def test_generate_and_evaluate_on_a_model(tmp_path, capsys):
    model = str(save_pico(tmp_path / "model", max_position_embeddings=512))
    assert (
        cli.main(
            [
                "generate",
                "--model",
                model,
                "--prompt",
                "Who?",
                "--max-new-tokens",
                "3",
                "--json",
                str(tmp_path / "a.json"),
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "a.json").read_text())[0]["prompt"] == "Who?"
    assert cli.main(["generate", "--model", model]) == 2
    assert "Nothing to answer" in capsys.readouterr().err


def test_demo_takes_a_free_folder(tmp_path):
    wanted = tmp_path / "demo"
    assert free_folder(str(wanted)) == wanted
    wanted.mkdir()
    assert free_folder(str(wanted)) == wanted
    (wanted / "x").touch()
    assert free_folder(str(wanted)) == tmp_path / "demo-2"
    Unlearn.model_validate({**yaml.safe_load(RECIPE.read_text()), "out": "x"})
    assert Demo().questions == 8


def test_records_round_trip_and_refuse_what_they_are_not(tmp_path):
    path = tmp_path / "deep" / "r.json"
    records = [Record("original", "model_utility", 0.5, 3), Record("x", "y", float("nan"), 0)]
    write_records(path, records)
    assert read_records(path)[0] == records[0]
    assert read_records(path)[1].value is None
    for content, says in (
        ("{", "not JSON"),
        ("{}", "does not hold"),
        ('[{"model": "a", "metric": "b", "version": 99}]', "version 99"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=says):
            read_records(path)
    with pytest.raises(UserError, match="No result file"):
        read_records(tmp_path / "none.json")


def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomic(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
