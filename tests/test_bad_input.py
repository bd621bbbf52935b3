"""Bad values at every option of every command, made from the settings themselves: a new option joins by itself.

Whatever an option is given, the command does it or says in one line why not, and exits with 2: no trace, no hang, nothing
half done. One value in turn for each option that is read; all of them for all with ALTER_BAD_INPUT=all.
"""

import contextlib
import importlib
import io
import math
import os
import shutil
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import pytest
import torch
from peft import get_peft_model
from pydantic import TypeAdapter, ValidationError

from alter import AlterConfig, cli
from alter.commands import COMMANDS
from alter.core.errors import UserError
from alter.plugins import BENCHMARKS
from alter.settings import flags
from alter.settings.outputs import Written, check_place
from alter.training.settings import Unlearn
from pico import pico, save_pico, write_jsonl

ALL = os.environ.get("ALTER_BAD_INPUT") == "all"
DB = ["--db", "sqlite:///r.db"]
MODEL = ["--model", "model"]
ADAPTER = ["--adapter", "adapter"]
TUNED = [*MODEL, *ADAPTER]
SHORT = ["--max-steps", "1"]
BASES = {
    "demo": [],
    "unlearn": [
        *MODEL,
        "--forget",
        "rows.jsonl",
        "--retain",
        "keep.jsonl",
        "--out",
        "new",
        "--closing-rows",
        "0",
        *SHORT,
    ],
    "forget": ["Ilse", *MODEL, "--out", "new"],
    "distill": [
        *TUNED,
        "--forget",
        "rows.jsonl",
        "--retain",
        "keep.jsonl",
        "--out",
        "new",
        "--closing-rows",
        "0",
        *SHORT,
    ],
    "export": [*TUNED, "--out", "new"],
    "evaluate tofu": [*MODEL, "--data", "folder"],
    "evaluate muse": [*MODEL, "--data", "folder"],
    "evaluate book": [
        *MODEL,
        "--book",
        "book.txt",
        "--prefix-tokens",
        "8",
        "--continuation-tokens",
        "8",
        "--limit",
        "1",
    ],
    "evaluate wmdp": [*MODEL, "--data", "folder"],
    "evaluate mmlu": [*MODEL, "--data", "folder"],
    "evaluate lm-eval": [*MODEL, "--tasks", "nothing"],
    "evaluate fluency": [*MODEL, "--prompts", "rows.jsonl", "--limit", "1", "--samples", "1", "--max-new-tokens", "2"],
    "evaluate rows": [*MODEL, "--forget", "rows.jsonl", "--limit", "1", "--max-new-tokens", "2"],
    "evaluate rwku": [*MODEL, "--data", "folder"],
    "evaluate lume": [*MODEL, "--data", "folder"],
    "evaluate knowundo": [*MODEL, "--data", "folder"],
    "meta-evaluate": [*MODEL, "--retrained", "model", "--out", "new", "--methods", "nothing"],
    "guard": [*MODEL, "--forget", "rows.jsonl", "--retain", "keep.jsonl", "--out", "new"],
    "chat": [*MODEL, "--max-tokens", "2"],
    # a documentation address, which no machine has: what is accepted ends there
    "serve": [*MODEL, "--host", "192.0.2.1"],
    "inspect": [*TUNED, "--host", "192.0.2.1"],
    "request init": ["--db", "sqlite:///new.db", *MODEL, "--retain", "keep.jsonl", "--folder", "new"],
    "request add": [*DB, "--subject", "Otto", "--data", "other.jsonl"],
    "request list": DB,
    "request show": ["1", *DB],
    "request run": ["7", *DB],
    "request verify": [*DB, "--chain-only"],
    "request revoke": ["7", *DB],
    "request purge": ["7", *DB],
    "request export": [*DB, "--out", "new"],
    "request distill": [*DB, "--final"],
    "certificate": ["7", *DB, "--key", "key", "--out", "new.json"],
    "muse-curve": [*MODEL, "--points", "1=adapter"],
    "aggregate": ["records.json"],
    "attack": [*TUNED, "--forget", "rows.jsonl", "--out", "new", "--attacks", "nothing"],
    "report": ["run", "--out", "new.html"],
    "generate": [*MODEL, "--prompt", "Hi", "--max-new-tokens", "2"],
    "judge": ["--file", "records.json"],
    "entropy": [*MODEL, "--text", "book.txt"],
    "compare": [*MODEL, "--out", "new", "--methods", "nothing"],
    "finetune": [*MODEL, "--data", "rows.jsonl", "--out", "new", *SHORT],
    "completion": ["bash"],
}
"""For each command the options with which it runs, or ends early, on what `place` holds."""


def settings_of(name):
    command, _, benchmark = name.partition(" ") if name.startswith("evaluate ") else (name, "", "")
    owner, cls = BENCHMARKS[benchmark] if benchmark else (COMMANDS[command].module, COMMANDS[command].settings)
    return getattr(importlib.import_module(owner), cls)


def options_of(model, where=""):
    """The class that brings an option, its place in the settings, its field, and the kinds that it is one of."""
    for name, info in model.model_fields.items():
        members = flags.members_of(info)
        for kind, member in members.items():
            for owner, option, field, kinds in options_of(member, f"{where}{name}."):
                yield owner, option, field, [*([(f"{where}{name}.kind", kind)] if kind else []), *kinds]
        if not members:
            owner = next(cls for cls in reversed(model.__mro__) if name in getattr(cls, "model_fields", {}))
            yield owner, f"{where}{name}", info, []


def every_option():
    seen = set()
    for name in BASES:
        for owner, option, info, kinds in options_of(settings_of(name)):
            if (owner, option, str(kinds)) not in seen:
                seen.add((owner, option, str(kinds)))
                yield name, option, info, kinds


OPTIONS = list(every_option())


def has(annotation, *types):
    return annotation in types or any(has(inner, *types) for inner in get_args(annotation))


def is_choice(annotation):
    return get_origin(annotation) is Literal or any(map(is_choice, get_args(annotation)))


def test_every_command_is_swept():
    benchmarks = {f"evaluate {name}" for name in BENCHMARKS.known()}
    assert set(BASES) == (set(COMMANDS) - {"evaluate"}) | benchmarks


# Numbers and choices: settings alone ---------------------------------------------------------------------------------

SIGNED = {"entropy_threshold", "threshold"}
"""Numbers that may be below 0: entropies of some orders are. (Lists `k` and `steps` are checked as a whole.)"""


def refused(info, name, value):
    """Whether the settings refuse a value of a field, as the command line asks them to."""
    try:
        flags.check_numbers({name: value}, {name: info.default}, {name: value})
        TypeAdapter(Annotated[(info.annotation, *info.metadata, None)]).validate_python(value)
    except (UserError, ValidationError):
        return True
    return False


def test_every_number_has_bounds():
    numbers = [(name, option, info) for name, option, info, _ in OPTIONS if has(info.annotation, int, float)]
    assert len(numbers) > 150
    taken = []
    for command, option, info in numbers:
        several = has(info.annotation, list, tuple) or get_origin(info.annotation) in (list, tuple)
        name = option.rpartition(".")[2]
        wrong = [math.nan, math.inf, -math.inf, 2**70, int("9" * 30), 1e300, 1e-320, "²", "0x10", ""]
        for value in [*wrong, *([] if name in SIGNED or several else [-1])]:
            given = [value] * (2 if "tuple" in str(info.annotation) else 1) if several else value
            if isinstance(value, str) and has(info.annotation, str):
                continue
            taken += [] if refused(info, name, given) else [(command, option, value)]
    assert taken == []


LIMITS = {
    "unlearn": ["closing_rows", "watch.forget_rows", "watch.retain_rows", "watch.holdout_rows"],
    "evaluate rows": ["limit", "answers"],
    "entropy": ["limit"],
    "attack": ["rows", "probe_rows", "relearn.rows"],
}
"""Upper limits of what there is, tried together on each command: a thousand million of them is all, and costs nothing."""
SLICES = {
    *(
        "questions",
        "watch.leak.questions",
        "leak.questions",
        "survival.questions",
        "watch.replies",
        "initializer.rows",
    ),
    *("guard.rows", "attacker.rows", "max_passages", "examples", "samples", "judge.max_tokens", "max_waiting"),
    *("max_body_bytes", "survival.rows", "attacker_rows"),
}
"""Upper limits that end a slice, a budget or a queue."""
PLACES = {"adapter.from_layer", "adapter.target"}
"""Numbers of a block, looked up in the model."""


def counts():
    """Options that hold a whole number, with whether a thousand million of it is refused."""
    for name, option, info, kinds in OPTIONS:
        if has(info.annotation, int) and not has(info.annotation, bool, dict) and option not in PLACES:
            several = "list" in str(info.annotation)
            yield name, option, kinds, refused(info, option, [10**9] if several else 10**9)


def test_no_count_is_so_large_that_it_cannot_be_worked_with():
    taken = {(name, option) for name, option, _, no in counts() if not no and not option.endswith(("seed", "seeds"))}
    assert len(list(counts())) - len(taken) > 80
    assert {option for _, option in taken} == {option for own in LIMITS.values() for option in own} | SLICES
    for name, option, info, _ in OPTIONS:
        if option.rpartition(".")[2] in ("epochs", "passes", "warmup_epochs", "every_epoch"):
            several = "list" in str(info.annotation)
            assert refused(info, option, [1e9] if several else 1e9), (name, option)


@pytest.mark.parametrize("name", LIMITS)
def test_an_upper_limit_beyond_what_there_is_takes_all(run, place, name):
    command, base = name, BASES[name]
    if name == "unlearn":
        base = [part for part in base if part not in ("--closing-rows", "0")]
        base += ["--watch.every-steps", "1", "--watch.retain", "other.jsonl", "--watch.holdout", "other.jsonl"]
    if name == "attack":
        base = [*base[: base.index("--attacks")], "--attacks", "upper_case", "--max-new-tokens", "4"]
    if name.startswith("evaluate "):
        command, base = "evaluate", ["--benchmark", name.removeprefix("evaluate "), *base]
        base = [*base[: base.index("--limit")], *base[base.index("--limit") + 2 :]]
    huge = [f"--{option.replace('_', '-')}={10**9}" for option in LIMITS[name]]
    status, said = run([command, *base, *huge])
    shutil.rmtree(place / "new", ignore_errors=True)
    assert status == 0, said


def test_a_count_that_is_refused_says_the_nearest_that_is_not(run, place):
    for option, value, near in (("batch_size", 10**9, 4096), ("adapter.r", 10**9, 10_000), ("max_steps", 0, 1)):
        status, said = run(arguments("unlearn", option, str(value), Unlearn.model_fields[option.partition(".")[0]]))
        assert status == 2
        assert said.startswith(f"alter: --{option.replace('_', '-')}: ")
        assert f"(got {value}). Give {near} or " in said
        assert said.count("\n") == 1
        assert not (place / "new").exists()


def test_a_value_that_is_no_choice_names_those_there_are():
    choices = [(name, option, info) for name, option, info, _ in OPTIONS if is_choice(info.annotation)]
    assert len(choices) > 30
    for command, option, info in choices:
        if not has(info.annotation, str):
            for value in ("nothing of these", "", "²", 2**70):
                assert refused(info, option, value), (command, option, value)


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, an adapter, a request, and everything that a path can wrongly lead to."""
    here = tmp_path_factory.mktemp("place")
    save_pico(here / "model")
    config = AlterConfig(num_forget_experts=1, init_weights=False, task_type="CAUSAL_LM")
    get_peft_model(pico(), config).save_pretrained(here / "adapter")
    write_jsonl(
        here / "rows.jsonl", [{"question": f"Where is {n}?", "answer": f"In {n}ton."} for n in ("Ilse", "Ann")]
    )
    write_jsonl(here / "other.jsonl", [{"question": "Where is Otto?", "answer": "In Ottoton."}])
    write_jsonl(here / "keep.jsonl", [{"question": f"What is {i} plus one?", "answer": f"{i + 1}."} for i in range(4)])
    (here / "book.txt").write_text("\n\n".join(f"Paragraph {i} says that {i} is a number." for i in range(20)))
    (here / "folder").mkdir()
    (here / "empty").write_text("")
    (here / "half.json").write_text('{"a": [1, ')
    (here / "deep.json").write_text("[" * 100_000)
    (here / "scalar.json").write_text("3")
    (here / "surrogate.jsonl").write_text('{"question": "\\ud800", "answer": "x"}\n')
    (here / "utf16.yaml").write_bytes("model: m".encode("utf-16"))
    (here / "bytes.bin").write_bytes(bytes(range(256)))
    (here / "run").mkdir()
    (here / "run" / "run.json").write_text("[1]")
    (here / "run" / "run.yaml").write_text("model: m\n")
    (here / "records.json").write_text("[]")
    before = Path.cwd()
    os.chdir(here)
    try:
        assert cli.main(["request", "init", *DB, *MODEL, "--retain", "keep.jsonl", "--folder", "requests"]) == 0
        assert cli.main(["request", "add", *DB, "--subject", "Ilse", "--data", "rows.jsonl"]) == 0
        assert cli.main(["certificate", "--new-key", "key"]) == 0
    finally:
        os.chdir(before)
    return here


@pytest.fixture
def run(place, monkeypatch, capsys):
    """Runs a command in `place`; returns its exit status and what it said on stderr."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))

    def hang(*_):
        raise AssertionError("the command hangs")

    signal.signal(signal.SIGALRM, hang)

    def call(args):
        signal.alarm(60)
        try:
            status = cli.main(args)
        except SystemExit as error:
            status = error.code
        finally:
            signal.alarm(0)
        return status, capsys.readouterr().err

    return call


def arguments(name, option, value, info, kinds=()):
    """The command's arguments with the option's value in the place of its own."""
    command, base = name, list(BASES[name])
    if name.startswith("evaluate "):
        command, base = "evaluate", ["--benchmark", name.removeprefix("evaluate "), *base]
    flag = "--" + ".".join(map(flags.flag_of, option.split(".")))
    if flag in base:
        at = base.index(flag)
        del base[at : at + 2]
    if "Positional" in str(info.metadata):
        return [*command.split(), value, *base[bool(base and not base[0].startswith("-")) :]]
    return [*command.split(), *base, f"{flag}={value}", *(f"--{key.replace('_', '-')}={kind}" for key, kind in kinds)]


def marks(info):
    return [mark for mark in info.metadata if isinstance(mark, Written)]


OUTPUTS = [(name, option, info) for name, option, info, _ in OPTIONS if marks(info)]


def test_every_place_that_is_written_to_is_marked():
    named = {(n, o) for n, o, i, _ in OPTIONS if o in ("out", "json_path", "folder", "new_key")}
    assert named == {(name, option) for name, option, _ in OUTPUTS}


@pytest.mark.parametrize(("name", "option", "info"), OUTPUTS, ids=[f"{n} {o}" for n, o, _ in OUTPUTS])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(run, place, name, option, info):
    def seen():
        # SQLite comes and goes with its own
        return sorted(path for path in place.iterdir() if not path.name.startswith("r.db-"))

    there = seen()
    folder = marks(info)[0].folder
    wrong = ["", "book.txt/x", "x" * 5000, *{True: ["book.txt"], False: ["folder"], None: []}[folder]]
    wrong += ["/proc/none/x"] if sys.platform == "linux" else []
    # each costs the reading of the flags: one of them for each option in turn, all for the first
    at = [n for n, _, _ in OUTPUTS].index(name)
    for value in wrong if ALL or at == 0 else [wrong[at % len(wrong)]]:
        status, said = run(arguments(name, option, value, info))
        assert status == 2, (value, said)
        assert f"alter: --{flags.flag_of(option)} is " in said
        assert seen() == there


def test_places_that_can_be_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    for path, folder in (("there", True), ("a/b/c", True), ("a/b.json", False), ("file", False), ("file", None)):
        check_place(str(tmp_path / path), "out", folder)
    check_place(os.devnull, "json")
    for path, folder in (("there", False), ("file", True), ("file/x", None)):
        with pytest.raises(UserError, match=r"^`out` is "):
            check_place(str(tmp_path / path), "out", folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "there"]


def test_a_file_that_is_read_is_not_replaced_by_the_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"question": "Who?", "answer": "Ada."}])
    (tmp_path / "link.json").symlink_to(rows)
    before = rows.read_bytes()
    asked = ["evaluate", "--benchmark", "rows", "--model", "no", "--json"]
    for out, forget, retain, names in (
        ("rows.jsonl", f"{rows}[:1]", "x", "--forget"),
        ("link.json", "x", "./y.jsonl + ./rows.jsonl@question=question,answer=answer", "--retain"),
    ):
        assert cli.main([*asked, out, "--forget", forget, "--retain", retain]) == 2
        assert f"--json is '{out}', which {names} reads: it would be replaced." in capsys.readouterr().err
    assert (
        cli.main(["judge", "--file", str(rows), "--json", str(rows), "--judge.url", "http://h", "--judge.model", "m"])
        == 2
    )
    assert "reads: it would be replaced" in capsys.readouterr().err
    assert rows.read_bytes() == before


LONG = {
    "unlearn instruction",
    "evaluate lm-eval tasks",
    "inspect db",
    "inspect forget",
    "forget keep",
    "forget key_variable",
}
"""Options that take any text, so that a whole run comes of it, or whose libraries take seconds to import."""
LATER = {"evaluate rwku", "evaluate lume", "evaluate knowundo", "meta-evaluate", "guard"}
"""Commands of which what is read is swept with ALTER_BAD_INPUT=all only."""
BAD = [
    "missing.jsonl",
    "book.txt/x",
    "folder",
    "empty",
    "half.json",
    "deep.json",
    "scalar.json",
    "surrogate.jsonl",
    "utf16.yaml",
    "bytes.bin",
    "",
    "x" * 5000,
    "[/]",
    "²",
    "~nobody/x",
    "builtin:nothing",
    "postgresql://user:secret@127.0.0.1:1/none",
]
TEXTS = [
    (name, option, info, kinds)
    for name, option, info, kinds in OPTIONS
    if has(info.annotation, str) and not is_choice(info.annotation) and not marks(info) and "Fixed" not in str(info)
    if not option.endswith("kind")
    and (ALL or (f"{name} {option.rpartition('.')[2]}" not in LONG and name not in LATER))
]
CASES = [
    (*text, value)
    for number, text in enumerate(TEXTS)
    for place, value in enumerate(BAD)
    if ALL or place == (5 * number) % len(BAD)
]


@pytest.mark.parametrize(
    ("name", "option", "info", "kinds", "value"), CASES, ids=[f"{n} {o} {v[:12]!r}" for n, o, _, _, v in CASES]
)
def test_whatever_is_read_is_taken_or_refused_in_one_line(run, place, name, option, info, kinds, value):
    status, said = run(arguments(name, option, value, info, kinds))
    left = [path for made in place.glob("new*") for path in [made, *made.rglob("*")] if path.is_file()]
    for made in place.glob("new*"):
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    assert status in (0, 1, 2, 3), said
    assert "Traceback" not in said
    assert "secret" not in said or option != "db"
    # the corrected command must not find a folder in use; these go on in theirs
    assert status == 0 or not left or name in ("compare", "forget", "meta-evaluate"), left


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("unlearn", "--adapter.r=33", "Rank 33 is larger than layer"),
        ("unlearn", "--adapter.target-modules=(", "'(' is no regular expression"),
        ("unlearn", "--device=meta", "No device 'meta'"),
        ("unlearn", "--device=cpu:9", "the last one here is cpu:0"),
        *([] if torch.backends.mps.is_available() else [("generate", "--device=mps", "there is no MPS here")]),
        ("guard", "--guard.dims=33", "--guard.dims is 33, but an embedding of model has 32 dimensions"),
        ("attack", "--retrained=missing", "No retrained model at missing"),
        ("meta-evaluate", "--rates=nan", "--rates is nan"),
        ("compare", "--data=missing", "No folder of TOFU files at 'missing'"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(run, place, monkeypatch, name, given, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = BASES[name]
    if name == "attack":
        base = [*base[: base.index("--attacks")], "--attacks", "upper_case"]
    status, said = run([name, *base, given])
    assert status == 2, said
    assert says in said
    assert not (place / "new").exists()


def test_a_database_of_another_program_is_left_as_it_is(run, place):
    with contextlib.closing(sqlite3.connect(place / "theirs.db")) as connection:
        connection.execute("CREATE TABLE things (name TEXT)")
        connection.commit()
    (place / "nothing.db").write_bytes(b"")
    before = {file.name: file.read_bytes() for file in place.glob("*.db")}
    for file in ("theirs.db", "nothing.db"):
        status, said = run(["request", "list", "--db", f"sqlite:///{file}"])
        assert status == 2
        assert "holds no erasure requests" in said
    assert {file.name: file.read_bytes() for file in place.glob("*.db")} == before
    assert not list(place.glob("theirs.db-*"))
    assert not list(place.glob("nothing.db-*"))


BROKEN = {
    "config.json": ["", '{"a": ', "[1]", "3", "[" * 100_000],
    "generation_config.json": ['{"a": ', "[1]", "[" * 100_000],
    "tokenizer_config.json": ['{"a": ', "[1]", "[" * 100_000],
    "tokenizer.json": ["", "{}", "[1]", '{"version": "1.0", ', "[" * 100_000],
}


@pytest.mark.parametrize("file", BROKEN)
def test_a_model_with_a_broken_file_is_refused_in_one_line(run, place, tmp_path, file):
    save_pico(tmp_path / "model")
    whole = (tmp_path / "model" / file).read_bytes() if (tmp_path / "model" / file).exists() else b"{}"
    for content in [*BROKEN[file], whole[: len(whole) // 2].decode(errors="replace")]:
        (tmp_path / "model" / file).write_text(content)
        status, said = run(["generate", "--model", str(tmp_path / "model"), "--prompt", "Hi", "--max-new-tokens", "1"])
        assert status == 2, (content[:20], said[-300:])
        assert str(tmp_path) in said


@pytest.mark.parametrize("name", ["model/model.safetensors", "adapter/adapter_model.safetensors"])
def test_weights_that_are_cut_off_are_refused_in_one_line(run, place, tmp_path, name):
    for folder in ("model", "adapter"):
        shutil.copytree(place / folder, tmp_path / folder)
    data = (tmp_path / name).read_bytes()
    for length in (0, 4, 40, len(data) // 2, len(data) - 1):
        (tmp_path / name).write_bytes(data[:length])
        paths = ["--model", str(tmp_path / "model"), "--adapter", str(tmp_path / "adapter")]
        status, said = run(["generate", *paths, "--prompt", "Hi", "--max-new-tokens", "1"])
        assert status == 2, (length, said[-300:])


def test_the_system_s_own_trouble_keeps_its_trace(monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "/somewhere")

    def hidden(*_):
        try:
            full()
        finally:
            raise RuntimeError("unexpected pos 8384 vs 8278")  # as torch.save does

    def unsaid(*_):
        try:
            raise RuntimeError("basic_ios::clear: iostream error")
        finally:
            hidden()

    monkeypatch.setattr(cli, "_run", unsaid)
    assert cli.main(["list"]) == 70
    assert capsys.readouterr().err.startswith("alter: the system refused: OSError: [Errno 28]")

    def nothing_more(*_):
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(cli, "_run", nothing_more)
    assert cli.main(["list"]) == 70
    assert "the system refused: OSError: [Errno 5] a file could not be written" in capsys.readouterr().err
    for fails in (full, hidden):
        monkeypatch.setattr(cli, "_run", fails)
        assert cli.main(["list"]) == 70
        said = capsys.readouterr().err
        assert said.startswith("alter: the system refused: OSError: [Errno 28] No space left on device")
        assert "Its trace is" in said
