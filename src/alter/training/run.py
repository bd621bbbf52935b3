"""One unlearning run, read downwards: `unlearn(settings)` checks, reads, prepares, trains and saves.

A method is a combination of parts: what is trained (`alter.methods.adapters`), where it starts (`initializers`), what it
does on forget and on retain rows (`objectives`). `alter.methods.presets` names the published combinations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PrinterCallback, TrainerCallback

from alter.adapter import base_fingerprint
from alter.core import processes, show
from alter.data import data_hash, row_hash
from alter.storage import digest, release
from alter.training.attention import attention_for_training
from alter.training.batches import PairCollator
from alter.training.data import by_meaning, read_data, set_aside
from alter.training.folder import (
    BASE,
    SUB_DOMAINS,
    check_checkpoint,
    check_folder,
    check_inputs,
    has_ended,
    inputs_of,
    last_whole_checkpoint,
    make_folder,
    undone_if_refused,
)
from alter.training.loaded import encode_rows, load_for_run
from alter.training.localization import placed
from alter.training.loss import OwnState, UnlearnTrainer, training_arguments
from alter.training.own import OWN, own_or_written, write_rows
from alter.training.preparation import Prepared, prepare
from alter.training.progress import Steps
from alter.training.result import save_run
from alter.training.sampler import pass_length
from alter.training.settings import Unlearn, check_launch, lengthened
from alter.training.trackers import check_trackers, trackers


def unlearn(run: Unlearn, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Make a model forget: train an adapter and save it to `run.out`/adapter, or its weights to `run.out`/model.

    Several processes (`alter.core.processes`) share every step's rows and the passes of the frozen base; `batch_size` is that of
    all of them, so that the losses are those of one process. `run.out` must be a folder that all of them see.

    Args:
        run: the settings; everything that can be checked without the model is checked before it is loaded.
        callbacks: transformers' callbacks, called while it trains.

    Returns:
        the run's folder: `adapter/` loads with `PeftModel.from_pretrained`, or `model/` (adapter.kind full) with
        `AutoModelForCausalLM.from_pretrained`; `run.yaml` repeats the run, `run.json` records what happened. For what lies in
        it meanwhile see `alter.training.folder`.

    Raises:
        UserError: bad settings or data, a folder that is in use, a loss that is not finite, or a process that was lost.
    """
    checkpoints = "The last whole checkpoint stays in {}/checkpoints: start the same run with `resume`."
    try:
        with processes.together(checkpoints.format(run.out), run.device):
            return _unlearn(run, callbacks)
    finally:
        release(Path(run.out))


def read_by(run: Unlearn) -> list[tuple[str, str | None]]:
    """Return what a run reads, with the settings that name it."""
    return [(name, getattr(run, name)) for name in ("model", "forget", "retain", "start_from")]


def _unlearn(run: Unlearn, callbacks: Sequence[TrainerCallback]) -> Path:
    started = time.time()
    check_launch(run)
    check_trackers(run.report_to)
    former = run.adapter.former(run.start_from)
    data = read_data(run)
    asked = {name: data_hash(list(map(row_hash, getattr(data, name)))) for name in ("forget", "retain")}
    run = lengthened(run, pass_length(run.sampler, data.forget, data.retain))
    data = set_aside(run, data)
    out = processes.from_first(lambda: check_folder(run, read_by(run)))
    inputs = inputs_of(run, data.forget, data.retain)
    checkpoint = None
    if run.resume:
        processes.from_first(lambda: check_inputs(out, inputs))
        if has_ended(out):
            show(f"{out} is finished: nothing is left to do.", stderr=True, markup=False)
            return out
        checkpoint = processes.from_first(lambda: last_whole_checkpoint(out / "checkpoints"))
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    torch.manual_seed(run.seed)
    base, tokenizer = load_for_run(run)
    inputs[BASE] = base_fingerprint(base)
    data = by_meaning(run, data, base, tokenizer)
    inputs[SUB_DOMAINS] = digest(data.domain)
    if run.resume:
        processes.from_first(lambda: check_inputs(out, inputs))
    own = out / OWN
    if run.retain is None:
        data = replace(data, retain=own_or_written(own, run.resume, base, tokenizer, data.forget, run.seed))
        asked["retain"] = data_hash(list(map(row_hash, data.retain)))
    loaded = encode_rows(run, data, base, tokenizer, former)
    # after all checks, so that invalid settings neither leave nor delete files
    processes.from_first(lambda: make_folder(run, inputs))
    if run.retain is None:
        processes.from_first(lambda: write_rows(own, data.retain))
    run = placed(run, loaded, out)
    with undone_if_refused(run, out):
        ready = prepare(run, data, loaded, out)
    prepared = time.time()
    trainer = train(run, ready, out, checkpoint, callbacks)
    save_run(run, ready, trainer, out, started, prepared, asked)
    return out


def train(
    run: Unlearn, ready: Prepared, out: Path, checkpoint: Path | None, callbacks: Sequence[TrainerCallback]
) -> UnlearnTrainer:
    """Train what was prepared, from a checkpoint if there is one; return the trainer, which holds the log."""
    checkpoints = out / "checkpoints"
    checkpoints.mkdir(mode=0o700, exist_ok=True)
    bar = Steps()
    sent = trackers(run.report_to, out) if processes.first() else []
    trainer = UnlearnTrainer(
        run,
        ready.found.get("entropy_threshold", math.inf),
        run.adapter.routed_experts(ready.model),
        ready.depth,
        ready.penalty,
        alone=ready.alone,
        trunk=None if ready.kept is None else ready.kept.trunk,
        measured=ready.measured,
        codes=ready.codes,
        model=ready.model,
        args=training_arguments(run, ready.model, ready.rows.epoch, checkpoints),
        train_dataset=ready.dataset(run.batch_size if processes.size() > 1 else 1),
        data_collator=PairCollator(ready.tokenizer.pad_token_id),
        callbacks=[OwnState(), bar, *([ready.watcher] if ready.watcher else []), *sent, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        with attention_for_training():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        bar.close()
    return trainer
