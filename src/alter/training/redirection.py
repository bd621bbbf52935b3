"""LUNAR's redirection: the direction towards what the base cannot answer, and the moved targets (`Needs.redirected`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alter.adapter import base_fingerprint
from alter.data import Encoded, Example
from alter.groundwork import FrozenRow, ignorance
from alter.logits import Depth
from alter.storage import digest
from alter.training.folder import kept_tensors
from alter.training.settings import Unlearn


def shift_of(
    run: Unlearn,
    base: Any,
    tokenizer: Any,
    forget: Sequence[Example],
    depth: Depth | None,
    limit: int | None,
    cache: Path,
) -> Tensor | None:
    """Return the direction [D] towards what the base cannot answer, for a `Redirect` objective; kept in `cache`."""
    objective: Any = run.objective
    if not objective.needs.redirected:
        return None
    assert depth is not None
    prompts = [[row.prompt, row.answer] for row in forget]
    key = digest(base_fingerprint(base), objective.model_dump(), run.seed, limit, prompts)

    def direction() -> dict[str, Tensor]:
        return {"shift": ignorance(base, tokenizer, objective, depth, forget, seed=run.seed, max_length=limit)}

    return kept_tensors(cache, key, direction)["shift"]


def redirect(
    rows: Mapping[int, FrozenRow],
    encoded: Sequence[Encoded],
    examples: Sequence[Example],
    objective: Any,
    shift: Tensor,
) -> None:
    """Shift the target states of forget rows along `shift`, and mark their prompts; in place."""
    for i, row in rows.items():
        assert row.hidden is not None
        row.hidden = objective.moved(row.hidden, shift)
        shown = len(row.hidden) if examples[i].prompt is None else encoded[i].prompt_length
        row.named = torch.arange(len(row.hidden)) < shown
