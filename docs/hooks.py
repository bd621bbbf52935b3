"""Pages of the site that are made from the sources: the index of methods, the list of commands, and the cost figure."""

from __future__ import annotations

import json
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from alter.cli import COMMANDS
from alter.methods.presets import METHODS, published

ROOT = Path(__file__).parent.parent


def methods() -> str:
    """The page of all methods: name, title, source, and the settings that make it."""
    lines = [
        "# Methods",
        "",
        f"`alter unlearn --method NAME` takes any of these {len(METHODS)}; what else you give overrides its settings. "
        "The page is made from `alter.methods.presets` and from `published.yaml` beside it, which names the file and commit, "
        "or the paper, that each value is from. ECO, ALU, Neuron Adjust and Key Space Detection train "
        "nothing in the model: [`alter guard`](../how-to/guard.md) makes them. `seuf` is for mixtures of experts. `sae_guided` reads a "
        "sparse autoencoder that sae-lens saved (`--objective.sae FOLDER`), or trains a small one. `lunar` takes questions that your "
        "model declines (`--objective.questions`), or asks it of invented names.",
        "",
    ]
    told = published()
    for name, method in METHODS.items():
        shown = json.dumps(method.settings, indent=2) if method.settings else "{}"
        lines += [f"## `{name}`", "", f"{method.title}. Source: {method.source}.", "", "```json", shown, "```", ""]
        for heading, key in (
            ("Values from", "sources"),
            ("Published otherwise", "otherwise"),
            ("Left out", "left_out"),
        ):
            if told[name][key]:
                lines += [f"{heading}:", "", *(f"- {text}" for text in told[name][key]), ""]
    return "\n".join(lines)


def commands() -> str:
    """The page of all commands, one line each."""
    lines = [
        "# Command line",
        "",
        "`alter COMMAND [RECIPE.yaml] [--OPTION VALUE ...]`. A recipe gives options in YAML, and flags override it. "
        "`alter COMMAND --help` lists the options with their defaults, `--help-all` also those that few need.",
        "",
        "| command | what it does |",
        "|---|---|",
    ]
    lines += [f"| `alter {name}` | {command.help} |" for name, command in COMMANDS.items()]
    return "\n".join([*lines, ""])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site's files."""
    files.append(File.generated(config, "reference/methods.md", content=methods()))
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    files.append(File.generated(config, "assets/results.png", abs_src_path=str(ROOT / "benchmarks" / "results.png")))
    return files
