"""The model card of a run's result."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from alter.data import settings_for_others
from alter.methods import presets
from alter.training.settings import Unlearn


def model_card(run: Unlearn, names: Sequence[str]) -> str:
    """Return the model card of a result: what it is, how to load it, how it was trained, and what it does not do.

    It goes where the weights go, and names no file of this machine: `run.yaml` does.
    """
    settings = yaml.safe_dump(settings_for_others(run.model_dump(mode="json")), sort_keys=False)
    title = None if run.method is None else presets.METHODS[run.method].title
    library, heading, text = run.adapter.card(run, title, names)
    return f"""---
library_name: {library}
base_model: {run.model}
tags: [alter, unlearning]
---

# {heading}

{text}

## Settings

```yaml
{settings}```
"""
