"""Pages of the site that are made from the sources: the index of methods, the list of commands, and the cost figure."""

from __future__ import annotations

import json
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from alter.cli import STATUSES
from alter.commands import COMMANDS
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


FINDINGS = """With status 3 what was asked for was done, measured and written down, and the finding is the last line:

| command | ends with 3 |
|---|---|
| `alter request run` | a request is NOT FORGOTTEN or COLLAPSED; it is not put in force |
| `alter request distill`, `export --form weights` | the weights have not forgotten, or utility is lost; nothing is changed, or made |
| `alter request verify` | something was altered, or has come back |
| `alter request revoke` | it is revoked, and another request has come back with it |
| `alter certificate --verify` | it was altered, or is another key's or another model's |
| `alter forget`, `alter distill` | the result is NOT FORGOTTEN or COLLAPSED; it stays in its folder |
| `alter unlearn --must-forget` | likewise. Without it `alter unlearn` ends with 0, since it also serves studies and rows that are too few for a verdict |

`evaluate`, `attack`, `compare`, `report` measure and promise nothing: they end with 0 whatever they find. UNPROVEN (too few rows) ends
with 0 as well, and is said.
"""


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
    lines += ["", "## Exit status", "", "| status | what it means |", "|---|---|"]
    lines += [f"| {number} | {meaning} |" for number, meaning in STATUSES.items()]
    lines += ["", FINDINGS]
    return "\n".join([*lines, ""])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site's files."""
    files.append(File.generated(config, "reference/methods.md", content=methods()))
    files.append(File.generated(config, "reference/commands.md", content=commands()))
    files.append(File.generated(config, "assets/results.png", abs_src_path=str(ROOT / "benchmarks" / "results.png")))
    return files
