"""`--help` comes at once: reading a command's flags imports nothing that computes."""

import importlib
import subprocess
import sys

import pytest
import tyro
from pydantic import BaseModel

from alter.attacks import ATTACKS
from alter.attacks.settings import OWN
from alter.cli import STATUSES, main
from alter.commands import COMMANDS
from alter.core.deferral import deferred
from alter.errors import Finding, UserError
from alter.plugins import BENCHMARKS
from alter.settings.flags import with_defaults
from alter.settings.unknown import refuse_unknown

COMPUTES = ("torch._C", "numpy._core", "transformers.utils", "peft.utils", "pandas", "scipy.stats", "nltk", "sklearn")
READ = [
    # first, as tyro makes rules of its own for what is imported when it is used first
    ["evaluate", "--help"],
    *([*name.split(), "--help"] for name in COMMANDS),
    *(["evaluate", "--benchmark", name, "--help"] for name in BENCHMARKS.known()),
]


@pytest.fixture(scope="module")
def loaded():
    """What each command's help has imported of what computes, by its words."""
    code = (
        "import contextlib, io, sys\nfrom alter.cli import main\n"
        f"for words in {READ!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit): main(words)\n"
        "    assert 'usage: alter' in said.getvalue(), words\n"
        f"    print(' '.join(words), *(name for name in {COMPUTES!r} if name in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(READ)
    return {" ".join(words): line.removeprefix(" ".join(words)) for words, line in zip(READ, lines, strict=True)}


@pytest.mark.parametrize("words", [" ".join(words) for words in READ])
def test_help_imports_nothing_that_computes(loaded, words):
    assert not loaded[words].strip()


def test_common_options_are_read_without_the_checker_of_types():
    """tyro imports typeguard, and with it asyncio, for lists that have a default; options that are not shown have no turn."""
    code = "import sys\nfrom alter.cli import main\ntry: main(['unlearn', '--help'])\nexcept SystemExit: print('typeguard' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_help_text_is_the_same_whatever_else_is_given(capsys):
    shown = []
    for words in (["unlearn"], ["unlearn", "--batch-size", "3", "--weight-decay", "x"], ["unlearn", "--not-a-flag"]):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--help"])
        assert not ended.value.code
        shown.append(capsys.readouterr().out)
    assert len(set(shown)) == 1


def test_the_help_of_attack_names_every_attack(capsys):
    with pytest.raises(SystemExit):
        main(["attack", "--help"])
    said = capsys.readouterr().out
    assert list(ATTACKS) == OWN.split()
    assert all(name in said for name in ATTACKS)


def test_flags_that_are_refused_cost_no_import(tmp_path):
    code = (
        "import sys; from alter.cli import main; status = main(['compare', '--model', 'm', '--methods', 'npo', '--out', 'o',"
        " '--refine', '-1']); print(status, 'torch._C' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["2", "False"], done.stderr


def test_what_was_put_off_is_loaded_when_the_command_goes_on():
    code = (
        "import sys; from alter.core.deferral import deferred\n"
        "with deferred():\n    import numpy\n    early = 'numpy._core' in sys.modules\n"
        "print(early, 'numpy._core' in sys.modules, type(numpy).__name__)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["False", "True", "module"]


@pytest.mark.parametrize(
    "words", [["forget"], ["distill"], ["request", "run"], ["request", "verify"], ["request", "distill"]]
)
def test_commands_that_promise_forgetting_say_their_status(words, capsys):
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    assert "status 3" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_every_status_is_in_the_help(capsys):
    assert main(["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for number, meaning in STATUSES.items():
        assert f"{number}: {meaning}" in said
    assert UserError("x").status in STATUSES
    assert Finding("x").status == 3


@pytest.mark.parametrize("where", ["a preset", "a recipe"])
def test_a_list_for_a_pair_is_shown_and_a_mistyped_flag_beside_it_refused(where, tmp_path, capsys):
    """`--method lunar` gives `adapter.depth` a pair: its help, and the message for a wrong flag, ended in tyro's assertion."""
    recipe = tmp_path / "pair.yaml"
    recipe.write_text("adapter: {kind: full, depth: [0.25, 0.5]}\n")
    words = ["unlearn", *(["--method", "lunar"] if where == "a preset" else [str(recipe)])]
    assert main([*words, "--not-a-flag", "1"]) == 2
    told = capsys.readouterr().err
    assert "has no option --not-a-flag" in told
    assert "does not know" not in told
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help-all"])
    assert not ended.value.code
    assert ("0.25 0.5" if where == "a recipe" else "0.6875 0.71875") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("forget Ada --bf16", "`alter forget` has no option --bf16: give --dtype bfloat16."),
        ("forget Ada --fp16", "`alter forget` has no option --fp16: give --dtype float16."),
        ("unlearn --fp16", "`alter unlearn` has no option --fp16: give --dtype float16."),
        ("distill --bf16", "`alter distill` has no option --bf16: give --precision bf16."),
        ("unlearn --precision=bf16", "`alter unlearn` has no option --precision: give --bf16."),
        ("unlearn --precision fp32", "`alter unlearn` has no option --precision: give --no-bf16."),
        ("forget --precision bf16", "`alter forget` has no option --precision: give --dtype bfloat16."),
        ("unlearn --batchsize 3", "--batchsize. Did you mean --batch-size? `alter unlearn --help-all` lists all."),
        ("unlearn --entropy_threshold 1.2", "--entropy-threshold. Did you mean --adapter.entropy-threshold?"),
        ("compare --benchmark x", "--benchmark. It is an option of `alter evaluate` and `alter muse-curve`."),
        (
            "evaluate --forget x",
            "It is an option of `alter evaluate --benchmark rows`, `alter unlearn`, `alter guard` and ",
        ),
        ("forget --subject Ada", "`alter forget` has no option --subject: give 'Ada' without it, before the options."),
        ("forget --zzz", "alter: `alter forget` has no option --zzz. `alter forget --help-all` lists all.\n"),
        ("unlearn --method graddiff --adapter.r 8", "--adapter.r as it is: --adapter.kind is full; alter, lora,"),
        ("unlearn --watch.leak.hit.model x", "--watch.leak.hit.kind is facts; nli has it. Give that kind"),
    ],
)
def test_a_flag_that_another_command_has_is_named_with_what_says_the_same(words, says, capsys):
    assert main(words.split()) == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1


def test_a_command_without_a_number_format_is_told_its_own_switch():
    """No command of this version has a switch and no `dtype`; one of tomorrow may."""

    class Switched(BaseModel):
        bf16: bool = False

    with deferred():
        default = with_defaults(Switched, {}, "", {})
    for value, fix in (("bfloat16", "`bf16`"), ("float32", "`bf16=False`")):
        with pytest.raises(UserError, match=f"`alter x` has no option --dtype: give {fix}"):
            refuse_unknown("x", ["--dtype", value], Switched, default, dict)
    # of a value that says nothing alike nothing is guessed
    with pytest.raises(UserError, match=r"no option --dtype\. `alter x --help-all` lists all"):
        refuse_unknown("x", ["--dtype", "auto"], Switched, default, dict)


def test_no_flag_that_a_command_has_is_refused():
    accepted = 0
    with deferred():
        for name, each in COMMANDS.items():
            owners = [(each.module, each.settings)] if each.chooser is None else [BENCHMARKS[b] for b in BENCHMARKS]
            for module, settings in owners:
                model = getattr(importlib.import_module(module), settings)
                default = with_defaults(model, {}, "", {})
                with pytest.warns(DeprecationWarning, match="get_parser"):
                    parser = tyro.extras.get_parser(type(default), default=default)
                flags = [flag for flag in parser._option_string_actions if flag.startswith("--")]
                refuse_unknown(name, [flag for flag in flags if flag != "--help"], model, default, dict)
                accepted += len(flags)
    assert accepted > 900


def test_a_flag_that_is_not_there_costs_no_import(tmp_path):
    code = (
        "import sys; from alter.cli import main\n"
        "print(main(['forget', 'Ada', '--bf16']), main(['compare', '--benchmark', 'x']), 'torch._C' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["2", "2", "False"], done.stderr
