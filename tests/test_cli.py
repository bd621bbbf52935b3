"""The command line, the recipes and the README as a user types them."""

import contextlib
import importlib
import json
import os
import re
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from alter import cli
from alter.commands import COMMANDS, COMMON, Command
from alter.comparison import executors, forks
from alter.comparison.plan import Compare, run_of
from alter.completion import options
from alter.core import console
from alter.core.errors import UserError
from alter.demo import RECIPE, Demo, free_folder
from alter.evaluation.book import BookEvaluation
from alter.forgetting.settings import Forget
from alter.metaevaluation.settings import MetaEvaluate
from alter.rendering.terminal import table
from alter.settings.flags import members_of, with_flags
from alter.settings.recipes import read_recipe
from alter.settings.validation import validated
from alter.storage.files import write_atomic
from alter.storage.records import Record, read_records, write_records
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
        ("adapter: 3", REQUIRED, "`adapter` is 3"),
        ("[1, 2]", REQUIRED, "holds list"),
        ("a: [", REQUIRED, "not YAML"),
        ("model: m\nmodel: n", REQUIRED, "line 2 gives 'model' a second time"),
        ("adapter: {r: 4, r: 8}", REQUIRED, "line 1 gives 'r' a second time"),
        ("1: x", REQUIRED, "line 1 has the key '1', which YAML reads as no text"),
        ("on: x", REQUIRED, "line 1 has the key 'on'"),
        ("[a, b]: x", REQUIRED, "a list or more"),
        ("? {a: b}\n: x", REQUIRED, "a list or more"),
        ("[" * 5000, REQUIRED, "nested too deep"),
        (f"seed: {'9' * 5000}", REQUIRED, "a value that cannot be read"),
        ("out: 2026-13-45", REQUIRED, "a value that cannot be read"),
        ("model: &a [*a]", REQUIRED, "holds itself"),
        ("&a {adapter: *a}", REQUIRED, "holds itself"),
        (
            "a: &a [1]\n"
            + "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else '*a'] * 9)}]\n" for i in range(9)),
            REQUIRED,
            "over 100000",
        ),
        ("epochs: .inf", REQUIRED, "`epochs` is inf; expected a finite number"),
        ("gamma: .nan", REQUIRED, "`gamma` is nan"),
        ("adapter: {alter_alpha: -.inf}", REQUIRED, "`adapter.alter_alpha` is -inf"),
        (f"seed: {2**64}", REQUIRED, "`seed` is 18446744073709551616; expected at most 1e+10"),
        ("method: [1]", REQUIRED, "`method` is [1]"),
        ("objective: {kind: [1]}", REQUIRED, "`objective.kind` is '[1]'"),
        ("objective: {kind: {a: b}}", REQUIRED, "`objective.kind` is"),
        ("adapter: {r: 0}", REQUIRED, "`adapter.r`: Input should be greater than or equal to 1 (got 0)"),
        ("objective: {kind: stopped_hinge, margin: 7}", REQUIRED, "objective.margin"),
        ("adapter: {target_modules: '('}", REQUIRED, "`adapter.target_modules`: '(' is no regular expression"),
        ("adapter: {target_modules: ['[']}", REQUIRED, "`adapter.target_modules`: '[' is no regular expression"),
    ],
)
def test_recipe_mistakes_name_the_setting(tmp_path, content, args, says):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(content)
    with pytest.raises(UserError, match=re.escape(says)):
        cli.parse("unlearn", Unlearn, [str(recipe), *args])


def test_a_value_of_another_kind_in_a_recipe_is_one_line(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("epochs: [1, 2]\nbatch_size: many\nlearning_rate: {a: b}\ndomain_column: 3")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert cli.main(["unlearn", str(tmp_path / "r.yaml"), *REQUIRED]) == 2
    assert [str(warning.message) for warning in seen if issubclass(warning.category, UserWarning)] == []
    assert capsys.readouterr().err.count("\n") == 1


def test_recipes_in_other_encodings(tmp_path):
    recipe = tmp_path / "r.yaml"
    for encoding in ("utf-16", "utf-8-sig"):
        recipe.write_bytes("model: größe\nforget: f\nretain: r\nout: o\n".encode(encoding))
        assert cli.parse("unlearn", Unlearn, [str(recipe)]).model == "größe"
    for content, says in ((b"model: gr\xf6\xdfe", "not UTF-8"), (b"a: \x00", "holds bytes of zero")):
        recipe.write_bytes(content)
        with pytest.raises(UserError, match=says):
            cli.parse("unlearn", Unlearn, [str(recipe)])


def test_a_list_that_is_given_twice_keeps_both(tmp_path):
    base = ["--model", "m", "--book", "a.txt"]
    both = cli.parse("evaluate", BookEvaluation, [*base, "--retain", "b.txt", "--retain=c.txt", "d.txt"])
    assert both.retain == ["b.txt", "c.txt", "d.txt"]
    lora = [
        "--objective.no-only-low",
        "--adapter.kind",
        "lora",
        "--adapter.target-modules",
        "q_proj",
        "--seed",
        "3",
        "--adapter.target_modules",
        "k_proj",
    ]
    assert cli.parse("unlearn", Unlearn, [*REQUIRED, *lora]).adapter.target_modules == ["q_proj", "k_proj"]
    assert cli.parse("unlearn", Unlearn, [*REQUIRED, "--seed", "1", "--seed=2"]).seed == 2
    assert cli.parse("unlearn", Unlearn, [*REQUIRED, "--seed", "1", "--seed", "1"]).seed == 1


def test_json_on_standard_output(capfd):
    logs = ROOT / "data" / "tofu_logs"
    assert cli.main(["aggregate", str(logs / "llama2-7b_full.json"), "--json", "-"]) == 0
    out, err = capfd.readouterr()
    assert {row["metric"] for row in json.loads(out)} >= {"model_utility"}
    assert "TOFU from" in err
    assert "records: standard output" in err
    assert not Path("-").exists()


def test_help_shows_what_is_common_and_help_all_the_rest(capsys):
    def shown(*args):
        with contextlib.suppress(SystemExit):
            cli.main(list(args))
        return capsys.readouterr().out

    common, whole = shown("unlearn", "--help"), shown("unlearn", "--help-all")
    for option in ("--forget ", "--retain ", "--objective.kind ", "--adapter.kind ", "--epochs ", "inverted_hinge"):
        assert option in common
    for option in ("--max-grad-norm ", "--adapter.r ", "--watch.every-steps "):
        assert option not in common
        assert option in whole
    assert "--help-all" in common
    assert max(map(len, common.splitlines())) <= 80
    assert len(common.splitlines()) < len(whole.splitlines()) / 2
    # a name in the list that no option has would hide what it was for
    for command, names in COMMON.items():
        found = COMMANDS[command]
        model = getattr(importlib.import_module(found.module), found.settings)
        every = {flag.lstrip("-").replace("-", "_") for flag, _ in options(model)}
        assert set(names.split()) <= every


def test_what_nobody_foresaw_is_one_line_and_a_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def broken(error):
        def function(settings):
            raise error

        return function

    for error, says in (
        (KeyError("secret"), "an error that alter does not know: KeyError: 'secret'"),
        (OSError(28, "No space left on device"), "the system refused: OSError: [Errno 28] No space left on device"),
        (RecursionError(), "RecursionError. Its trace"),
    ):
        monkeypatch.setattr("alter.evaluation.run.aggregate_logs", broken(error))
        assert cli.main(["aggregate", "x.json"]) == 70
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
        (trace,) = tmp_path.iterdir()
        assert str(trace) in said
        assert "Traceback" in trace.read_text()
        assert trace.stat().st_mode & 0o777 == 0o600
        trace.unlink()


def test_arguments_that_are_no_text(capsys):
    assert cli.main(["evaluate", "--model", "a\udcffb"]) == 2
    assert "no text" in capsys.readouterr().err


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["lora", "none", "alter"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["kind", "r", "rank", "target_modules", "hinge"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given=st.dictionaries(st.sampled_from(sorted(Unlearn.model_fields)) | st.text(max_size=4), VALUES, max_size=3))
def test_no_recipe_gives_a_trace(tmp_path, capsys, given):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(given))
    # under pytest, tyro fails now and then where its cache holds True for 1
    with contextlib.suppress(UserError, SystemExit), mock.patch("random.random", return_value=1.0):
        cli.parse("unlearn", Unlearn, [str(recipe), *REQUIRED])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="abr:-[]{}&*!|>#'\"? \n1.", max_size=30))
def test_no_text_breaks_the_reader_of_recipes(tmp_path, text):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with contextlib.suppress(UserError):
        assert isinstance(read_recipe(recipe), dict)


def test_unknown_names(tmp_path, capsys):
    assert cli.main(["unlern"]) == 2
    assert "Did you mean 'unlearn'" in capsys.readouterr().err
    (tmp_path / "tofu.yaml").write_text("")
    assert cli.main(["unlearn", str(tmp_path / "tofo.yaml")]) == 2
    assert "Did you mean 'tofu.yaml'" in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_parse_and_say_how_to_run_them(path):
    found = re.search(
        r"^# .*alter (unlearn|finetune|demo|meta-evaluate|evaluate|request|compare)", path.read_text(), re.MULTILINE
    )
    command = found.group(1)
    given = yaml.safe_load(path.read_text())
    if command == "finetune":
        Finetune.model_validate(given)
    elif command == "evaluate":
        module, settings = cli.choose([str(path)])
        getattr(importlib.import_module(module), settings).model_validate({"model": "m", **given})
    elif command == "meta-evaluate":
        settings = cli.parse("meta-evaluate", MetaEvaluate, [str(path)])
        assert settings.methods
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
        groups = {f"{name.split()[0]} " for name in COMMANDS if " " in name}
        assert {first, f"{first} {second}"} & {"COMMAND", *COMMANDS, *groups}, f"{first} {second}"
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


def test_write_atomic_keeps_links_and_devices(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to("target")
    write_atomic(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(pipe, "through")
    assert os.read(read, 99) == b"through"
    os.close(read)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target"]


def test_tables_show_names_as_they_are(capsys):
    table_of = table({"[red]m[/]": [Record("m", "forget_rouge", 0.5, 1)]}, "title [/] \x1b[2J")
    Console(width=120).print(table_of)
    printed = capsys.readouterr().out
    assert "[red]m[/]" in printed
    assert "title [/] \\x1b" in printed


def test_settings_that_a_message_names_become_flags():
    assert with_flags("`max_steps` is 0; lower `adapter.r` 8", Unlearn) == "--max-steps is 0; lower --adapter.r 8"
    assert with_flags("`objective.only_low=False`, `overwrite`", Unlearn) == "--objective.no-only-low, --overwrite"
    assert with_flags("`json_path`", BookEvaluation) == "--json"
    # of another command, a column, a group of settings, what is given by its place, and a whole command
    other = "`json_path` `question` `watch` `adapter.rr` `epochs=False` `alter export --merged`"
    assert with_flags(other, Unlearn) == other
    assert with_flags("`subject`, `document`", Forget) == "`subject`, --document"
    # what is a flag already is left alone
    assert with_flags(with_flags("`out`", Unlearn), Unlearn) == "--out"


def test_every_flag_that_a_message_can_name_is_one_of_the_command():
    for name, found in COMMANDS.items():
        if found.chooser is None:
            model = getattr(importlib.import_module(found.module), found.settings)
            taken = {flag for flag, _ in options(model)}
            named = {with_flags(f"`{setting}`", model) for setting in settings_of(model)}
            assert {flag for flag in named if flag.startswith("--")} == {f for f in taken if f.startswith("--")}, name


def settings_of(model, above=""):
    for name, info in model.model_fields.items():
        yield f"{above}{name}"
        for member in members_of(info).values():
            yield from settings_of(member, f"{above}{name}.")


def test_notes_and_help_name_flags(monkeypatch, capsys):
    def work(settings):
        console.warn("Lower `learning_rate`, see `prompt` and `alter chat --merged`.")
        console.show("The text says `learning_rate`.")
        raise UserError("`warmup` is too long.")

    monkeypatch.setattr(Command, "load", lambda self: work)
    given = ["finetune", "--model", "m", "--data", "d", "--out", "o"]
    assert cli.main(given) == 2
    shown = capsys.readouterr()
    assert (
        shown.err == "Lower --learning-rate, see `prompt` and `alter chat --merged`.\nalter: --warmup is too long.\n"
    )
    # a result may quote a text, whose words are no settings
    assert shown.out == "The text says `learning_rate`.\n"
    with pytest.raises(SystemExit):
        cli.main(["unlearn", "--help-all"])
    assert "Delete what --out holds." in " ".join(capsys.readouterr().out.replace("│", " ").split())
    console.warn("Lower `learning_rate`.")
    assert capsys.readouterr().err == "Lower `learning_rate`.\n"


def test_a_refusal_is_one_sentence():
    """Checks of ours come out of pydantic under its heading and with a second full stop."""
    given = {"model": "m", "forget": "f", "retain": "r", "out": "o", "objective": {"kind": "marign"}}
    with pytest.raises(UserError) as refused:
        validated(Unlearn, given, "r.yaml")
    said = str(refused.value)
    assert said.startswith("r.yaml: objective: kind is 'marign'; expected one of")
    assert not said.endswith(("..", "?."))
    with pytest.raises(UserError, match=r"`batch_size`: .* equal to 1 \(got 0\)\. Give 1 or more\.$"):
        cli.parse("unlearn", Unlearn, [*REQUIRED, "--batch-size", "0"])


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_of_other_libraries_are_for_terminals(monkeypatch, terminal):
    names = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    for name in (*names, "OMP_WAIT_POLICY"):
        # noted first, so that what is set is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: terminal))
    cli._set_up()
    assert [os.environ.get(name) for name in names] == ([None] * 2 if terminal else ["1"] * 2)


def test_what_others_wrote_cannot_move_the_cursor(capsys, tmp_path):
    """Errors and results name subjects, paths and replies, which may hold escapes."""
    path = f"{tmp_path}/a\x1b[31m\x07.jsonl"
    assert cli.main(["generate", "--model", path, "--prompt", "Hi"]) == 2
    said = capsys.readouterr().err
    assert "\\x1b[31m\\x07.jsonl" in said
    assert "\x1b" not in said
    console.show("a\x1b[2Jb")
    console.warn("c\x9bd\u202ee")
    shown = capsys.readouterr()
    assert shown.out == "a\\x1b[2Jb\n"
    assert shown.err == "c\\x9bd\\u202ee\n"
    # spaces and joiners of other scripts are no trick
    for text in ("東京\u3000都", "می\u200cخواهم", "10\u00a0km"):
        assert console.plain(text) == text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["-m", "alter", "unlearn", "--plugin", "part.py", "--help"], "part of the folder"),
        (["-c", f"{forks.OWN_PATH}; import json, random, math; print('libraries')"], "libraries"),
    ],
    ids=["command", "cell of a comparison"],
)
def test_no_file_of_the_current_folder_stands_in_for_a_library(tmp_path, line, said):
    for name in ("json", "random", "math", "argparse", "pydantic", "msvcrt"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} of the folder')")
    (tmp_path / "part.py").write_text("import json\nprint('part of the folder')\n")
    done = subprocess.run(
        [sys.executable, *line],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert executors.command_line(tmp_path, ["test"])[1].startswith(f"{forks.OWN_PATH};")
