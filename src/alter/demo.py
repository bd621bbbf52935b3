"""`alter demo`: forget 20 authors with the model that comes with the package, and show what happened."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

from alter.core import cell, forked
from alter.rendering import FittedTable
from alter.settings import OutFile, OutFolder, Rows, Seed, check_outputs
from alter.storage import cache_folder, digest, stamped, write_records

if TYPE_CHECKING:
    from alter.evaluation import TofuResult

RECIPE = Path(__file__).parent / "recipes" / "tofu-mini.yaml"


class Demo(BaseModel):
    """Forget 20 of TOFU's 200 authors with the shipped model; compare before, after and retrained."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    out: OutFolder = "runs/demo"
    """Folder of the run; a number is appended if it is in use."""
    seed: Seed = 0
    """Seed of the unlearning run."""
    questions: Rows = Field(8, ge=0)
    """How many questions to show with the answers of all three models."""
    limit: Rows | None = Field(None, ge=1)
    """Evaluate only so many rows of each set, for a quick look."""
    json_path: OutFile = None
    """File for the records of all three models."""


def free_folder(wanted: str) -> Path:
    """Return the folder itself if it is free (missing or empty), else the first free one of FOLDER-2, FOLDER-3, ..."""
    number, path = 1, Path(wanted)
    while path.exists() and (not path.is_dir() or any(path.iterdir())):
        number += 1
        path = Path(f"{wanted}-{number}")
    return path


def answers_table(results: dict[str, TofuResult], count: int) -> FittedTable:
    """Return a table of forget-set questions, spread over its authors, with the true answer and each model's."""
    first = next(iter(results.values())).sets["forget"]
    assert first.questions is not None
    assert first.references is not None
    shown = FittedTable(title="Questions about the forgotten authors", show_lines=True)
    for column in ("question", "truth", *results):
        shown.add_column(column, ratio=1, overflow="fold")
    for i in range(0, first.n, max(1, first.n // max(count, 1)))[:count]:
        answers = [result.sets["forget"].generations for result in results.values()]
        row = (first.questions[i], first.references[i], *(a[i] if a is not None else "" for a in answers))
        shown.add_row(*map(cell, row))
    return shown


def demo(settings: Demo) -> Path:
    """Run the demo and return the run's folder.

    Raises:
        UserError: the records could not be written.
    """
    from alter.evaluation import show_records, tofu_metrics, tofu_metrics_beside_base
    from alter.models import ModelSettings
    from alter.training import Unlearn, unlearn

    check_outputs(settings)
    console = Console()
    out = free_folder(settings.out)
    run = Unlearn.model_validate({**yaml.safe_load(RECIPE.read_text()), "out": str(out), "seed": settings.seed})
    started = time.time()
    console.print(f"1/3 unlearning {run.forget} from {run.model} into {out}", markup=False, highlight=False)
    unlearn(run)
    unlearned = time.time() - started

    results: dict[str, TofuResult] = {}
    facts: dict[str, dict[str, Any]] = {}
    console.print("2/3 evaluating the retrained, the original and the unlearned model", highlight=False)
    split = run.forget.split(":")[-1]
    stood = {
        "retrained": ModelSettings(model="builtin:tofu-mini/retrained"),
        "original": ModelSettings(model=run.model),
        "unlearned": ModelSettings(model=run.model, adapter=str(out / "adapter")),
    }
    with forked.allowed():
        results["retrained"] = tofu_metrics(*stood["retrained"].load(), split, limit=settings.limit)
        # the original is the base of the unlearned one
        results["original"], results["unlearned"] = tofu_metrics_beside_base(
            *stood["unlearned"].load(), split, limit=settings.limit, reference=results["retrained"]
        )
    for name, chosen in stood.items():
        facts[name] = {
            "settings": chosen.model_dump(mode="json")
            | {"benchmark": "tofu", "split": split, "limit": settings.limit},
            **chosen.identity(cache_folder()),
            "data": digest({key: part.fingerprint for key, part in results[name].sets.items()}),
            "device": chosen.place(),
        }
    ordered = {name: results[name] for name in ("original", "unlearned", "retrained")}
    records = {
        name: stamped(result.records(name), seed=settings.seed, **facts[name]) for name, result in ordered.items()
    }
    console.print("3/3 what happened", highlight=False)
    if settings.questions:
        console.print(answers_table(ordered, settings.questions))
    write_records(out / "records.json", [record for rows in records.values() for record in rows])
    show_records(records, settings.json_path, f"TOFU {split}, {run.model}")
    console.print(
        f"Unlearning took {unlearned:.0f} s, all of it {time.time() - started:.0f} s. The run: {out} "
        f"(adapter/, run.yaml, run.json, records.json)",
        highlight=False,
        markup=False,
    )
    return out
