"""After training: negate the update if the method asks for it, save it with its card, and record the run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alter.core import processes
from alter.models import load_model
from alter.storage import to_json, write_atomic
from alter.storage.provenance import provenance
from alter.training.card import model_card
from alter.training.folder import clean
from alter.training.loss import UnlearnTrainer
from alter.training.preparation import Prepared
from alter.training.saving import check_finite, save_adapter
from alter.training.settings import Unlearn


def save_run(
    run: Unlearn,
    ready: Prepared,
    trainer: UnlearnTrainer,
    out: Path,
    started: float,
    prepared: float,
    asked: Mapping[str, str],
) -> None:
    """Write the result and `run.json`, on rank 0 alone.

    Args:
        run: the settings.
        ready: what was prepared; its model is trained now.
        trainer: has trained it.
        out: the run's folder.
        started, prepared: when the run began and when its preparation ended, in seconds.
        asked: hashes of the rows as they were given (`alter.data.rows.data_hash`).
    """
    seen = ready.watcher and ready.watcher.restore_best(ready.model)
    weights = trainer.whole_weights()

    def finish() -> None:
        model = ready.model
        if run.negate is not None:
            negate_update(run, dict(model.named_parameters()) if weights is None else weights, run.negate)
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        check_finite(trained if weights is None else weights, run.adapter.rate)
        kind = run.adapter.result
        tokenizer = ready.tokenizer if kind == "model" else None
        save_adapter(model, out, model_card(run, ready.names), kind, tokenizer, ready.form, weights)
        seconds = {"prepare": round(prepared - started, 2), "train": round(time.time() - prepared, 2)}
        write_atomic(out / "run.json", to_json({**record(run, ready, trainer, seconds, seen), "data": dict(asked)}))
        if not run.keep_working:
            forgetting = [name for name in ("forget", "alternative") if name in ready.traced]
            clean(out, sum(len(ready.traced[name]) for name in forgetting))

    processes.from_first(finish)


def record(
    run: Unlearn, ready: Prepared, trainer: UnlearnTrainer, seconds: Mapping[str, float], seen: Any
) -> dict[str, Any]:
    """Return the content of `run.json`: settings, sub-domains, the router's fit, cost, and the log."""
    return {
        "settings": run.model_dump(),
        "domains": ready.names,
        "experts": sorted(set(ready.rows.expert)),
        "router": ready.found,
        "steps": trainer.state.global_step,
        "trained_parameters": ready.trained,
        "processes": processes.size(),
        "seconds": dict(seconds),
        "log": [entry for entry in trainer.state.log_history if "watch" not in entry],
        "watch": seen,
        "provenance": provenance(),
    }


def negate_update(run: Unlearn, weights: Mapping[str, Tensor], times: float) -> None:
    """Negate the learned update in place (see `Adapter.negate`)."""

    def before() -> Mapping[str, Tensor]:
        model, _ = load_model(run.model, dtype="float32", device="cpu")
        return dict(model.named_parameters(remove_duplicate=False))

    with torch.no_grad():
        run.adapter.negate(weights, times, before)
