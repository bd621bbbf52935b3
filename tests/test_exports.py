"""Packages export what others use: no import goes past an `__init__`, no export is unused, and none costs an import."""

import ast
import functools
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "alter"
PACKAGES = sorted(path.parent.name for path in SOURCE.glob("*/__init__.py"))
FILES = sorted(SOURCE.rglob("*.py"))
REFERENCE = Path(__file__).parent.parent / "docs" / "reference" / "api.md"
EAGER = {"adapter", "metrics"}
"""`adapter` registers with PEFT when it is imported; `metrics` needs no more than numpy."""

DEEP = {
    "alter.storage.provenance.provenance",
    "alter.training.finetune.finetune",
    "alter.core.words.words",
    "alter.data.background.background",
    "alter.data.domains.domains",
    "alter.evaluation.told.told",
    "alter.evaluation.verdict.judge",
    "alter.groundwork.alternatives.alternatives",
    "alter.training.trackers.trackers",
}
"""Functions that a package cannot export: a module of it has their name, and Python binds the module there."""

FACES = {
    "alter.errors": {"Finding", "UserError"},
    "alter.scoring": {
        *("Scores", "context_length", "generate", "load_model", "score", "shipped_model", "stop_ids"),
    },
    "alter.serve": {"ChatAsked", "Engine", "Job", "Serve", "TextAsked", "application"},
}
"""Modules for users of the library, and what they may import from each: what is taken away here breaks their code."""
ROWS = {"Example", "check_overlap", "encode", "encode_prompt", "examples", "load_examples"}
"""What they may import from `alter.data`."""

PUBLIC = {"adapter.AlterLinear"}
"""Exports for users alone: the layer class of the PEFT method, beside its configuration and its tuner."""


def owner(path):
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def modules_of(package):
    return {
        path.stem for path in (SOURCE / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }


@functools.cache
def nodes(path):
    """All nodes of a file's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text())))


def foreign(path):
    """Each import in a file from another package: the package, the rest of the module's name, the name."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            named = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            named = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in named:
            root, _, rest = module.partition(".")
            package, _, deeper = rest.partition(".")
            if root == "alter" and package in PACKAGES and package != owner(path):
                yield package, deeper, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_import_goes_past_the_init_of_another_package(path):
    if path == SOURCE / "__init__.py":
        pytest.skip("says where its own exports are")
    past = {f"alter.{package}.{deeper}.{name}" for package, deeper, name in foreign(path) if deeper}
    assert past <= DEEP


def test_no_exception_is_out_of_date():
    past = {f"alter.{package}.{deeper}.{name}" for path in FILES for package, deeper, name in foreign(path) if deeper}
    assert past >= DEEP
    for name in DEEP:
        _, package, *_, last = name.split(".")
        assert last in modules_of(package)


@pytest.mark.parametrize("package", PACKAGES)
def test_exports_exist_and_another_package_uses_them(package):
    module = importlib.import_module(f"alter.{package}")
    exports = set(getattr(module, "__all__", ()))
    assert exports <= set(dir(module))
    assert all(getattr(module, name) is not None for name in exports)
    used = {name for path in FILES for taken, _, name in foreign(path) if taken == package}
    # read as attributes of the package
    used |= {
        node.attr
        for path in FILES
        if owner(path) != package
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == package
    } & (exports if package == "metrics" else set())
    assert exports - used == {name for place, name in (one.split(".") for one in PUBLIC) if place == package}


@pytest.mark.parametrize("package", sorted(set(PACKAGES) - EAGER))
def test_no_export_has_the_name_of_a_module(package):
    homes = importlib.import_module("alter.core").homes(f"alter.{package}")
    assert {name for name, home in homes.items() if name in modules_of(package)} == {
        name for name, home in homes.items() if home == f"alter.{package}.{name}"
    }


def test_what_users_import_has_the_name_of_no_module():
    import alter

    assert not set(alter.__all__) & modules_of("")


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("__init__.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_an_init_is_a_screenful(path):
    assert len(path.read_text().splitlines()) <= 70


def test_packages_import_none_of_their_modules_before_it_is_asked_for():
    lazy = sorted(f"alter.{package}" for package in set(PACKAGES) - EAGER)
    code = (
        # tests of this suite start with some of `alter.data` loaded
        "import alter, importlib, sys\nbefore = set(sys.modules)\n"
        f"for name in {lazy}: importlib.import_module(name)\n"
        f"print(*sorted(set(sys.modules) - before - set({lazy})))\n"
        "from alter.rendering import table\n"
        "print('alter.rendering.terminal' in sys.modules, 'alter.rendering.markup' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["", "True False"]


@pytest.mark.parametrize("face", FACES)
def test_a_public_module_has_what_the_reference_says(face):
    module = importlib.import_module(face)
    assert set(module.__all__) == FACES[face]
    named = [line for line in REFERENCE.read_text().splitlines() if line.startswith(f"| `{face}` |")]
    for name in FACES[face]:
        assert getattr(module, name).__doc__
        assert name in named[0] or name == "Scores"
        assert f"::: {face}.{name}\n" in REFERENCE.read_text() + "\n"


def test_rows_are_public():
    import alter.data
    from alter.data import examples

    assert set(alter.data.__all__) >= ROWS
    assert [row.answer for row in examples([{"question": "Who?", "answer": "Ilse."}])] == ["Ilse."]
    for name in ROWS:
        assert f"::: alter.data.{name}\n" in REFERENCE.read_text()


def test_public_modules_load_no_torch():
    code = f"import sys, alter.data, {', '.join(FACES)}; from alter.errors import UserError; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "False"


def test_names_that_are_no_export_are_refused():
    module = importlib.import_module("alter.data")
    with pytest.raises(AttributeError, match=r"'alter\.data' has no attribute 'encod'"):
        _ = module.encod
    with pytest.raises(ImportError, match="cannot import name 'encod'"):
        exec("from alter.data import encod")


def test_what_replaces_a_name_where_it_is_defined_is_what_is_exported(monkeypatch):
    import alter.data
    from alter.data import encoding

    before = alter.data.encode
    monkeypatch.setattr(encoding, "encode", "another")
    assert alter.data.encode == "another"
    monkeypatch.undo()
    assert alter.data.encode is before
