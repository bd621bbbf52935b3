"""Shell completion: every command and option, in a script that its shell takes."""

import contextlib
import shutil
import subprocess

import pytest

from alter import cli
from alter.commands import COMMANDS
from alter.completion import parser
from alter.evaluation.rows import RowsEvaluation
from alter.settings.flags import flag_of
from alter.training.settings import Unlearn


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_name_every_command(shell, capsys, tmp_path):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in [*" ".join(COMMANDS).split(), "learning-rate-experts", "adapter.kind", "chain-only"]:
        assert word in script
    (tmp_path / "script").write_text(script)
    if shutil.which(shell):
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)


def test_bash_completes_options_and_choices(tmp_path):
    script = tmp_path / "alter.bash"
    with script.open("w") as file, contextlib.redirect_stdout(file):
        assert cli.main(["completion", "bash"]) == 0

    def completed(*words):
        line = f"source {script}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
        line += "$(complete -p alter | sed 's/.*-F \\([^ ]*\\).*/\\1/'); echo ${COMPREPLY[@]}"
        return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.split()

    assert completed("alter", "unl") == ["unlearn"]
    assert completed("alter", "unlearn", "--closing") == ["--closing-rows"]
    assert completed("alter", "request", "ver") == ["verify"]
    assert completed("alter", "unlearn", "--adapter.kind", "alt") == ["alter"]
    assert completed("alter", "attack", "--attacks", "upper") == ["upper_case"]


def test_options_are_those_of_the_command_line():
    commands = next(action for action in parser()._actions if action.choices and "unlearn" in action.choices)
    for command, model, args in (
        ("unlearn", Unlearn, ["--model", "m", "--forget", "f", "--retain", "r", "--out", "o"]),
        ("evaluate", RowsEvaluation, ["--model", "m", "--forget", "f"]),
    ):
        known = commands.choices[command]._option_string_actions
        parsed = cli.parse(command, model, args)
        for name in type(parsed).model_fields:
            flag = f"--{flag_of(name)}"
            assert any(each == flag or each.startswith(f"{flag}.") for each in known), flag
