"""The documentation: its tutorials and examples run as they are printed, its pages are complete, its packaging files valid."""

import importlib
import json
import os
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

import children
from alter.commands import COMMANDS
from alter.plugins import BENCHMARKS
from alter.settings import flags_of
from pico import save_pico, write_jsonl

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)


def install(folder):
    """What `pip install -e .` does to be found: a distribution with the project's entry points, in the folder itself."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, named in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in named.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def run(code, folder):
    paths = [str(folder), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    env = {"PYTHONPATH": os.pathsep.join(paths), "ALTER_CACHE": "off"}
    return children.run(code=code, cwd=folder, paths=paths[:1], env=env)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "page",
    [
        # what the others do is tested on pico models too: test_compare, test_requests, test_plugins
        pytest.param(path, id=path.stem, marks=[pytest.mark.long] * (path.stem != "forget-rows"))
        for path in sorted((DOCS / "tutorials").glob("*.md"))
    ],
)
def test_a_tutorial_runs_as_it_is_printed(page, tmp_path):
    steps = []
    for language, title, content in BLOCK.findall(page.read_text()):
        if title:
            (tmp_path / title).write_text(content)
            if title == "pyproject.toml":
                install(tmp_path)
        elif language == "bash":
            steps += [f"assert main({shlex.split(line)[1:]!r}) == 0" for line in content.splitlines()]
        elif language == "python":
            steps.append(f"exec({content!r}, {{}})")
    # one process for the page: what is imported for the first command is there for the next
    assert len(run("\n".join(["from alter.cli import main", *steps]), tmp_path)) > 100


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs(script, tmp_path):
    assert run(script.read_text(), tmp_path)


def test_the_steps_of_the_reference_run(tmp_path):
    (code,) = [content for language, _, content in BLOCK.findall((DOCS / "reference" / "api.md").read_text())]
    said = run(code, tmp_path)
    assert "[-0.0" in said.splitlines()[-1]


def test_the_parts_of_the_how_to_run(tmp_path):
    parts = [found[1:] for found in BLOCK.findall((DOCS / "how-to" / "plugins.md").read_text()) if found[1]]
    for name, code in parts:
        (tmp_path / name).write_text(code)
    (name, counts) = (name for name, _ in parts)
    save_pico(tmp_path / "wide", max_position_embeddings=512)
    save_pico(tmp_path / "model", max_position_embeddings=256)
    write_jsonl(
        tmp_path / "gaps.jsonl", [{"question": f"Who is {n}?", "answer": f"{n} writes."} for n in ("Ada", "Bo")]
    )
    model = ["--plugin", name, "--model", "model", "--device", "cpu"]
    tofu = f"--plugin {counts} --model wide --device cpu --split forget01 --limit 1 --json tofu.json".split()
    commands = [
        ["evaluate", *tofu],
        ["evaluate", *model, "--benchmark", "gaps", "--rows", "gaps.jsonl", "--limit", "1", "--json", "gaps.json"],
        [
            "attack",
            *model,
            "--attacks",
            "plainly",
            "--forget",
            "gaps.jsonl",
            "--max-new-tokens",
            "2",
            "--out",
            "attacked",
        ],
    ]
    run("\n".join(["from alter.cli import main", *(f"assert main({each}) == 0" for each in commands)]), tmp_path)
    (record,) = json.loads((tmp_path / "gaps.json").read_text())
    assert (record["metric"], record["n"]) == ("gap_probability", 1)
    (counted,) = (
        each for each in json.loads((tmp_path / "tofu.json").read_text()) if each["metric"] == "forget_words"
    )
    assert counted["n"] == 1
    attacked = {each["extra"]["attack"] for each in json.loads((tmp_path / "attacked" / "records.json").read_text())}
    assert "plainly" in attacked


def test_every_page_names_commands_and_recipes_that_exist():
    groups = {name.split()[0] for name in COMMANDS}
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        text = page.read_text()
        for first in re.findall(r"^alter ([a-z][\w-]*)", text, re.MULTILINE):
            assert first in groups, f"{page.name}: alter {first}"
        for name in re.findall(r"recipes/[\w./-]+\.yaml", text):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def options_of(command):
    """Return the flags of a command, those of every benchmark and every kind of part among them."""
    found = COMMANDS[command]
    owners = [(found.module, found.settings), *(BENCHMARKS[name] for name in (BENCHMARKS if found.chooser else ()))]
    flags = {
        flag for module, name in owners for flag in flags_of(getattr(importlib.import_module(module), name)).values()
    }
    return {flag.replace("_", "-") for flag in flags} | {"--help", "--help-all", "--plugin"}


def test_every_command_of_a_block_has_the_options_that_it_is_given():
    known = {}
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for language, _, content in BLOCK.findall(page.read_text()):
            lines = content.replace("\\\n", " ").splitlines() if language in ("sh", "bash") else []
            for line in lines:
                words = shlex.split(line, comments=True)
                if words[:1] != ["alter"] or "--plugin" in words:
                    continue
                command = next(name for name in (" ".join(words[1:3]), words[1]) if name in COMMANDS)
                known.setdefault(command, options_of(command))
                for word in words:
                    flag = word.partition("=")[0].replace("_", "-").replace("no-", "")
                    assert not word.startswith("--") or flag in known[command], f"{page.name}: {line}"
    assert len(known) > 15


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


def test_the_citation_and_the_hooks_are_yaml():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["cff-version"] == "1.2.0"
    assert yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert {"name", "description", "body"} <= set(yaml.safe_load(form.read_text())) or form.name == "config.yml"
