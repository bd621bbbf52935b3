"""Where the adapter goes: the blocks that causal tracing finds, or the expert that forget rows are routed to."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from alter.adapter import base_fingerprint
from alter.core import show
from alter.groundwork import recovered
from alter.methods import attributed, blocks
from alter.storage import digest
from alter.training.codes import at_autoencoder, reading_at
from alter.training.folder import TRACED, kept_tensors
from alter.training.loaded import Loaded
from alter.training.settings import Unlearn

TRACED_ROWS = 16
"""Forget rows that causal tracing looks at."""


def placed(run: Unlearn, loaded: Loaded, out: Path) -> Unlearn:
    """Return the settings with the blocks found by causal tracing (`adapter.traced`), or with the forget rows' expert.

    Raises:
        UserError: nothing can be traced.
    """
    run = at_autoencoder(run, loaded.base)
    if run.adapter.expert_to_find:
        return _on_expert(run, loaded, out)
    window = run.adapter.blocks_to_trace
    if window is None:
        return run
    rows = loaded.forget[:TRACED_ROWS]
    key = digest(base_fingerprint(loaded.base), window, run.seed, [[row.input_ids, row.labels] for row in rows])

    def trace() -> dict[str, Tensor]:
        found = recovered(loaded.base, rows, window, seed=run.seed, pad_token_id=loaded.tokenizer.pad_token_id)
        return {"recovered": torch.tensor(found, dtype=torch.float64)}

    found = kept_tensors(out / TRACED, key, trace)["recovered"]
    _, count = blocks(loaded.base)
    first = int(found.argmax())
    show(f"Causal tracing: blocks {first} to {first + window - 1} of {count} carry the answers.", stderr=True)
    span = (first / count, (first + window) / count)
    adapter = run.adapter.model_copy(update={"depth": span, "traced": None})
    return reading_at(run.model_copy(update={"adapter": adapter}), first + window - 1, count)


def _on_expert(run: Unlearn, loaded: Loaded, out: Path) -> Unlearn:
    key = digest(base_fingerprint(loaded.base), [row.input_ids for row in loaded.forget])

    def look() -> dict[str, Tensor]:
        found = attributed(loaded.base, loaded.forget, pad_token_id=loaded.tokenizer.pad_token_id)
        return {str(block): scores for block, scores in found.items()}

    scores = kept_tensors(out / TRACED, key, look)
    block, expert = max(
        ((int(block), int(value.argmax())) for block, value in scores.items()),
        key=lambda place: (float(scores[str(place[0])][place[1]]), -place[0]),
    )
    share = float(scores[str(block)][expert])
    show(f"Of all experts, expert {expert} of block {block} gets most of the forget rows: {share:.0%}.", stderr=True)
    adapter = run.adapter.model_copy(update={"target": (block, expert)})
    return run.model_copy(update={"adapter": adapter})
