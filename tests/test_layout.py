"""The package's shape: which module may import which, and that the help stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "alter"

# a package may import those named
LAYERS = {
    "core": set(),
    "logits": {"core"},
    "metrics": {"core"},
    "data": {"core"},
    "rendering": {"core", "metrics"},
    "adapter": {"core", "logits"},
    "models": {"core", "data", "adapter"},
    "methods": {"core", "logits", "data", "adapter", "models"},
    "evaluation": {"core", "logits", "metrics", "data", "rendering", "adapter", "models", "methods"},
    "training": {"core", "logits", "metrics", "data", "adapter", "models", "methods", "evaluation"},
    "guarding": {"core", "data", "adapter", "models", "methods"},
    "forgetting": {"core", "metrics", "data", "models", "evaluation", "training", "distillation"},
    "distillation": {"core", "logits", "data", "models", "evaluation", "training"},
    "exporting": {"core", "data", "adapter", "models"},
    "attacks": {"core", "metrics", "data", "rendering", "models"},
    "comparison": {"core", "metrics", "data", "rendering", "models", "methods", "evaluation", "training", "attacks"},
    "metaevaluation": {
        "core",
        "metrics",
        "data",
        "rendering",
        "models",
        "methods",
        "evaluation",
        "training",
        "attacks",
        "comparison",
    },
    "requests": {
        "methods",
        "core",
        "data",
        "adapter",
        "models",
        "evaluation",
        "training",
        "distillation",
        "exporting",
    },
    "report": {"core", "metrics", "data", "rendering", "evaluation", "attacks", "requests", "training"},
    "serving": {"core", "logits", "data", "adapter", "models", "evaluation", "requests"},
    "demo": {"core", "evaluation", "models", "training"},
    "commands": {"core"},
    "cli": {"core", "commands"},
    "api": {"core", "distillation", "methods", "adapter", "models", "training", "evaluation", "attacks", "comparison"},
    "completion": {"cli", "commands", "core"},
    "__main__": {"cli"},
    "__init__": {"adapter", "api", "core"},
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
def test_source_is_python_3_10(path):
    ast.parse(path.read_text(), feature_version=(3, 10))


def module_of(path):
    return path.relative_to(SOURCE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    module = module_of(path)
    own = {name.split(".")[1] for name in imports(path) if name.startswith("alter.")}
    own = {name for name in own if name not in ("AlterConfig", "AlterModel", "AlterLinear")} - {module}
    assert own <= LAYERS[module]


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
