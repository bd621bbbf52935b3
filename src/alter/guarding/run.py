"""`alter guard`: make a guard and save it as a folder that every command takes as `--adapter`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from alter.core import UserError, show, warn
from alter.data import check_unread, for_others, load_examples
from alter.guarding.settings import MakeGuard
from alter.models import FORM_FILE, Form
from alter.storage import check_deletable, to_json, write_atomic
from alter.storage.provenance import provenance

CARD = """# A guard for {model}

It is to hold back {what} (`{kind}`){share}. It changes no weight: whoever has the model has the knowledge.

```python
import alter

model, tokenizer = alter.load({model!r}, "this folder")
```
"""


HALF = 0.5
"""A guard that recognises a smaller share of its own forget prompts says so loudly."""


def make_guard(run: MakeGuard) -> Path:
    """Run `alter guard`: make the guard, and write it to `run.out`, whole or not at all; returns the folder.

    Raises:
        UserError: the folder holds something and `overwrite` is not set, bad rows, a model that does not load, or what the
            guard's own maker raises.
    """
    out = Path(run.out)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not run.overwrite)):
        raise UserError(f"`out` {run.out} is there already: add `overwrite` to replace it, or give another folder.")
    check_deletable(out, (FORM_FILE,))
    check_unread(out, [("model", run.model), ("forget", run.forget), ("retain", run.retain)])
    forget, retain = ([] if rows is None else load_examples(rows) for rows in (run.forget, run.retain))
    write_guard(out, run.guard.make(run, forget, retain), run)
    show(f"guard: {out}; every command takes it as its `adapter`", stderr=True, markup=False, highlight=False)
    return out


def write_guard(out: Path, form: Form, run: MakeGuard) -> None:
    """Write a guard's folder atomically: a folder beside it, renamed."""
    settings, files = form
    caught = _caught(settings)
    if caught == 0:
        warn(
            "The guard recognises none of the forget prompts: it holds nothing back. Give more rows, or allow more "
            "`guard.false_alarms`."
        )
    elif caught is not None and caught < HALF:
        warn(
            f"The guard recognises {caught:.0%} of the forget prompts: all others are answered as before. Give more rows, allow more "
            "`guard.false_alarms`, or take another `guard.kind`."
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    made = {"settings": run.model_dump(mode="json"), "provenance": provenance()}
    write_atomic(partial / FORM_FILE, to_json({**settings, "made": made}))
    for name, tensors in files.items():
        write_atomic(partial / name, save({key: value.contiguous() for key, value in tensors.items()}))
    what = "what it was told to" if run.forget is None else f"what {for_others(run.forget)} say"
    share = "" if caught is None else f", and recognised {caught:.0%} of its prompts when it was made"
    worded = settings.get("measured", {}).get("caught")
    if worded:
        name = min(worded, key=lambda each: worded[each]["share"])
        share += (
            f"; asked in other wordings, least in {name}: {worded[name]['share']:.0%} of {worded[name]['prompts']}"
        )
    write_atomic(partial / "README.md", CARD.format(model=run.model, what=what, kind=run.guard.kind, share=share))
    if out.exists():
        shutil.rmtree(out)
    os.replace(partial, out)


def _caught(settings: Mapping[str, Any]) -> float | None:
    """Return the share of forget prompts that a guard recognised when it was made; None for a kind that does not look."""
    found = settings.get("cross_validation", {}).get("recognised", settings.get("inside", {}).get("forget"))
    return None if found is None else float(found)
