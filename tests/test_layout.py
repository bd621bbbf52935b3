"""The package's shape: which module may import which, and that the help stays light."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "alter"

BASE = {"core", "storage", "settings"}

# a package may import those named, all of which stand above it
LAYERS = {
    "core": set(),
    "commands": set(),
    "errors": {"core"},
    "logits": {"core"},
    "metrics": {"core"},
    "plugins": {"core"},
    "adapter": {"core", "logits"},
    "storage": {"core", "plugins"},
    "data": {"core", "storage"},
    "settings": {"core", "plugins", "storage"},
    "inference": {"core", "data"},
    "cli": {"core", "commands", "plugins", "settings"},
    "completion": {"commands", "plugins", "settings"},
    "rendering": BASE | {"metrics"},
    "models": {"core", "logits", "plugins", "adapter", "storage", "data", "inference"},
    "__main__": {"cli"},
    "scoring": {"core", "inference", "models"},
    "attacks": BASE | {"metrics", "plugins", "data", "inference", "rendering", "models"},
    "evaluation": BASE | {"logits", "metrics", "plugins", "data", "inference", "rendering", "models"},
    "exporting": BASE | {"adapter", "data", "inference", "models"},
    "methods": {"core", "logits", "plugins", "adapter", "data", "settings", "models"},
    "groundwork": BASE | {"logits", "adapter", "data", "inference", "models", "methods"},
    "guarding": BASE | {"metrics", "plugins", "adapter", "data", "inference", "models", "methods"},
    "training": BASE
    | {
        "logits",
        "metrics",
        "adapter",
        "data",
        "inference",
        "rendering",
        "models",
        "evaluation",
        "methods",
        "groundwork",
    },
    "comparison": BASE
    | {
        "metrics",
        "plugins",
        "data",
        "inference",
        "rendering",
        "models",
        "attacks",
        "evaluation",
        "methods",
        "training",
        "distillation",
    },
    "demo": BASE | {"rendering", "models", "evaluation", "training"},
    "distillation": BASE | {"logits", "data", "inference", "rendering", "models", "evaluation", "training"},
    "metaevaluation": BASE
    | {"metrics", "data", "inference", "rendering", "models", "attacks", "evaluation", "training", "comparison"},
    "api": BASE
    | {
        "plugins",
        "data",
        "adapter",
        "models",
        "attacks",
        "evaluation",
        "methods",
        "training",
        "comparison",
        "distillation",
        "exporting",
        "forgetting",
        "guarding",
        "metaevaluation",
        "reporting",
    },
    "forgetting": BASE
    | {"adapter", "metrics", "data", "inference", "rendering", "models", "evaluation", "training", "distillation"},
    "requests": BASE
    | {
        "adapter",
        "attacks",
        "data",
        "rendering",
        "models",
        "evaluation",
        "exporting",
        "methods",
        "training",
        "distillation",
    },
    "__init__": {"core", "adapter", "api"},
    "reporting": BASE | {"metrics", "data", "rendering", "attacks", "evaluation", "training", "requests"},
    "serving": BASE | {"logits", "adapter", "data", "inference", "models", "evaluation", "requests"},
    "serve": {"core", "serving"},
}


def imports(path):
    """Names that a file imports, at any depth of the code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "alter":
                yield from (f"alter.{name.name}" for name in node.names)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_source_is_python_3_11(path):
    ast.parse(path.read_text(), feature_version=(3, 11))


DISTRIBUTIONS = {"google": "protobuf", "pydantic-core": "pydantic", "sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Of imported packages, what brings them where it is called otherwise."""


def test_what_is_imported_is_declared():
    project = tomllib.loads((SOURCE.parent.parent / "pyproject.toml").read_text())["project"]
    extras = [needs for extra, needs in project["optional-dependencies"].items() if extra not in ("docs", "dev")]
    declared = {re.match(r"[\w-]+", need)[0] for needs in [project["dependencies"], *extras] for need in needs}
    roots = {name.split(".")[0] for path in SOURCE.rglob("*.py") for name in imports(path)}
    names = {root.replace("_", "-") for root in roots - sys.stdlib_module_names - {"alter", "_typeshed"}}
    assert {DISTRIBUTIONS.get(name, name) for name in names} <= declared


def module_of(path):
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def packages_of(path):
    """Other packages and modules of this one that a file imports from."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("alter.")} - {module_of(path)}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    module = module_of(path)
    assert packages_of(path) <= LAYERS[module]


def test_the_table_goes_one_way_and_is_no_wider_than_the_imports():
    graphlib.TopologicalSorter(LAYERS).prepare()
    found = {module: set() for module in LAYERS}
    for path in SOURCE.rglob("*.py"):
        found[module_of(path)] |= packages_of(path)
    assert found == LAYERS


@pytest.mark.parametrize("module", ["logits/entropy", "methods/initializers", "methods/objectives", "metrics"])
def test_mathematics_knows_no_framework(module):
    place = SOURCE / module
    files = [place.with_suffix(".py")] if not place.is_dir() else sorted(place.glob("*.py"))
    roots = {name.split(".")[0] for file in files for name in imports(file)}
    assert not roots & {"transformers", "peft", "datasets", "accelerate"}


def test_help_loads_no_torch():
    code = "import sys; from alter.cli import main; main(['--help']); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.rstrip().endswith("False")
    for command in ("demo", "unlearn", "evaluate", "aggregate", "generate", "finetune"):
        assert f"\n  {command} " in shown


def test_import_alter_is_enough_for_peft():
    code = "import alter, peft; print(peft.PeftType('ALTER').value, peft.get_peft_config({'peft_type': 'ALTER'}).r)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["ALTER", "8"]
    code = "import peft, alter; print(peft.PeftType('ALTER').value)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "ALTER"
    )


@pytest.mark.parametrize("action", ["list", "show", "add", "run"])
def test_requests_help_loads_no_torch(action):
    code = (
        "import contextlib, sys; from alter.cli import main\n"
        f"with contextlib.suppress(SystemExit): main(['request', '{action}', '--help'])\n"
        "print(sorted({'torch', 'transformers', 'peft', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.rstrip().endswith("[]")


def test_listing_requests_loads_no_torch(tmp_path):
    code = (
        "import sys; from alter.cli import main; from alter.requests.store import Store\n"
        "Store.create('sqlite:///r.db', {'model': 'm', 'retain': 'r', 'folder': '.'})\n"
        "status = main(['request', 'list', '--db', 'sqlite:///r.db'])\n"
        "print(status, sorted({'torch', 'transformers', 'peft', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    assert shown.rstrip().endswith("0 []")


COMMAND_LINE = {"cli", "completion", "settings/flags", "plugins", "requests/certificate/command"}
"""Modules that only the command line reaches (of `plugins`, what reads --plugin): their messages may name flags."""
STYLE_SHEETS = {"serving/markup"}
"""Modules that hold CSS, where --name is a variable."""
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*")
QUOTED = re.compile(r"`[\w{][^`]* [^`]*`")
"""A whole command in backticks, such as `alter export --merged`."""


def flags_in_messages(source):
    """Flags that the text constants of a module name outside whole commands, each with its line.

    Not messages: docstrings (but those of settings, which are their help), the arguments of another process, what a text is
    compared with, and a text that is a command, or its end.
    """
    tree = ast.parse(source)
    skipped = set()
    for node in ast.walk(tree):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Compare) or called in ("subprocess.run", "git"):
            skipped.update(map(id, ast.walk(node)))
        # within an f-string the parts are joined, below
        if isinstance(node, ast.JoinedStr):
            skipped.update(id(part) for part in node.values if isinstance(part, ast.Constant))
        if isinstance(node, (ast.Module, ast.FunctionDef)):
            skipped.update(id(each.value) for each in node.body if isinstance(each, ast.Expr))
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        for line in QUOTED.sub("", text).splitlines():
            if not line.lstrip().startswith("alter ") and not line.startswith((" --", "{} --")):
                yield from (f"{node.lineno}: {flag}" for flag in FLAG.findall(line))


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_messages_name_settings_not_flags(path):
    if str(path.relative_to(SOURCE).with_suffix("")) not in COMMAND_LINE | STYLE_SHEETS:
        assert list(flags_in_messages(path.read_text())) == []


def test_a_flag_in_a_message_is_found():
    told = 'raise UserError(f"{out} exists: give another --out, or `alter report --out PAGE`.")\n'
    assert list(flags_in_messages(told)) == ["1: --out"]
    assert list(flags_in_messages(told.replace("--out,", "`out`,"))) == []
    split = 'text = (\n    "give it with `--retrained` "\n    "or --adapter.r 4"\n)\n'
    assert list(flags_in_messages(split)) == ["2: --retrained", "2: --adapter.r"]
    assert list(flags_in_messages('command = f"alter chat --model {m}"\ncommand += f" --dtype {d}"\n')) == []


def test_every_module_of_the_command_line_names_flags():
    for name in COMMAND_LINE:
        assert list(flags_in_messages((SOURCE / name).with_suffix(".py").read_text())), name
