"""`--help` comes at once: reading a command's flags imports nothing that computes."""

import subprocess
import sys

import pytest

from alter.cli import STATUSES, main
from alter.commands import COMMANDS
from alter.errors import Finding, UserError
from alter.plugins import BENCHMARKS

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
    with pytest.raises(SystemExit) as ended:
        main([*words, "--not-a-flag", "1"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "--not-a-flag" in told
    assert "does not know" not in told
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help-all"])
    assert not ended.value.code
    assert ("0.25 0.5" if where == "a recipe" else "0.6875 0.71875") in capsys.readouterr().out
