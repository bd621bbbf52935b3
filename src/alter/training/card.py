"""The model card of a run's result."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from alter.methods import presets
from alter.training.settings import Unlearn


def model_card(run: Unlearn, names: Sequence[str]) -> str:
    """Return the model card of a result: what it is, how to load it, how it was trained, and what it does not do."""
    settings = yaml.safe_dump(run.model_dump(mode="json", exclude={"resume", "overwrite"}), sort_keys=False)
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
