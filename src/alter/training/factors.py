"""LoRA's factors before the first step: the initializer's start, and factors as the tensors of one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from alter.adapter import base_fingerprint
from alter.data import Encoded
from alter.groundwork import starting_factors
from alter.methods import Factors
from alter.storage import digest
from alter.training.folder import kept_tensors
from alter.training.settings import Unlearn


def flat(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Flatten the factors of each layer into the tensors `A.LAYER` and `B.LAYER`, on the CPU."""
    return {f"{side}.{name}": getattr(pair, side).cpu() for name, pair in factors.items() for side in "AB"}


def factors_of(tensors: Mapping[str, Tensor], device: Any = None) -> dict[str, Factors]:
    """Rebuild the factors of each layer from the tensors of `flat`; other tensors are ignored."""
    names = [name.removeprefix("A.") for name in tensors if name.startswith("A.")]
    return {name: Factors(tensors[f"A.{name}"].to(device), tensors[f"B.{name}"].to(device)) for name in names}


def start_of(
    base: Any, tokenizer: Any, run: Unlearn, forget: list[Encoded], retain: list[Encoded], cache: Path
) -> tuple[dict[str, Factors] | None, dict[str, Tensor]]:
    """Return each layer's initial LoRA factors, and the directions that the penalty keeps its B away from."""
    adapter: Any = run.adapter
    initializer = run.initializer
    if not initializer.gives_factors:
        return None, {}
    key = digest(
        base_fingerprint(base),
        run.model_dump(include={"adapter", "initializer", "batch_size", "seed"}),
        [[row.input_ids for row in part] for part in (forget, retain)],
    )
    count = initializer.retain_rows(len(forget))
    drawn = np.random.default_rng(run.seed).permutation(len(retain))[:count].tolist()

    def make() -> dict[str, Tensor]:
        start, away = starting_factors(
            base,
            adapter.layers(base),
            initializer,
            forget,
            [retain[i] for i in drawn],
            r=adapter.r,
            scaling=adapter.alpha / adapter.r,
            batch=run.batch_size,
            seed=run.seed,
            pad_token_id=tokenizer.pad_token_id,
        )
        return flat(start) | {f"P.{name}": value for name, value in away.items()}

    tensors = kept_tensors(cache, key, make)
    away = {name.removeprefix("P."): value for name, value in tensors.items() if name.startswith("P.")}
    return factors_of(tensors), away
