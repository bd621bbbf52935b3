"""One unlearning run, read downwards: `unlearn(settings)` checks, prepares, trains and saves.

A method is a combination of parts: what is trained (`tuning`), where it starts (`initializers`), what it does on forget
and on retain rows (`objectives`). `methods` names the published combinations.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from alter.adapter.model import base_fingerprint
from alter.core import processes
from alter.core.console import show
from alter.core.errors import UserError
from alter.core.files import to_json, write_atomic
from alter.core.provenance import provenance
from alter.core.running import FILE as RUNNING
from alter.data.domains import domains
from alter.data.encoding import encode_all
from alter.data.examples import Example, check_overlap, load_examples
from alter.methods.adapters import (
    AlterAdapter,
    FullWeights,
    Lora,
    block_at,
    blocks,
    target_layers,
    target_names,
)
from alter.methods.alternatives import alternatives
from alter.methods.frozen import Depth
from alter.methods.initializers import Zero
from alter.methods.objectives import Uniform
from alter.models.guards import Former
from alter.models.loading import load_model
from alter.training.batches import PairCollator, Pairs, Rows, schedule
from alter.training.card import card
from alter.training.folder import (
    BASE,
    check_checkpoint,
    check_finite,
    check_folder,
    check_inputs,
    clean,
    inputs_of,
    last_whole_checkpoint,
    make_folder,
    save_adapter,
)
from alter.training.loss import Dual, FirstEpoch, UnlearnTrainer
from alter.training.preparation import add_adapter, form_of, frozen_views, penalty_of, start_of, trace_run
from alter.training.progress import Steps
from alter.training.settings import OPTIMIZERS, Unlearn, hidden_depth, lengthened, steps_of, warmup_of
from alter.training.watch import KEPT, Watcher, read_watched


def read_data(run: Unlearn) -> tuple[list[Example], list[Example], list[int], list[str]]:
    """Read and check the data before any model is loaded: both sets, their overlap, and the sub-domains."""
    forget = load_examples(run.forget, domain_column=run.domain_column)
    retain = load_examples(run.retain)
    check_overlap(forget, retain)
    if run.num_forget_experts == 1:
        return forget, retain, [0] * len(forget), ["all"]
    if run.domain_column is None and run.num_forget_experts is not None:
        index, names = domains(forget, n=run.num_forget_experts, seed=run.seed)
    else:
        index, names = domains(forget, seed=run.seed, max_domains=run.max_domains)
    if run.domain_column is None and not run.name_clusters:
        # what a cluster is named after are words of the data, which end up in cards and configurations
        names = [f"cluster {i}" for i in range(1, len(names) + 1)]
    if run.num_forget_experts is not None and run.num_forget_experts < len(names):
        raise UserError(
            f"num_forget_experts is {run.num_forget_experts}, but column {run.domain_column!r} names {len(names)} "
            f"sub-domains. Give at least {len(names)}, or leave domain_column out to cluster into fewer."
        )
    return forget, retain, index, names


def negate(weights: Mapping[str, Tensor], run: Unlearn, times: float) -> None:
    """Turn what was learned round: theta - times * (theta' - theta) (task arithmetic, Ilharco et al. 2023)."""
    with torch.no_grad():
        if not isinstance(run.adapter, FullWeights):
            for name, weight in weights.items():
                if ".lora_B." in name or ".alter_B." in name:
                    weight.mul_(-times)
            return
        model, _ = load_model(run.model, dtype="float32", device="cpu")
        before = dict(model.named_parameters(remove_duplicate=False))
        for name, weight in weights.items():
            if name in before:
                old = before[name].to(weight.device)
                weight.copy_(old - times * (weight - old))


def check_launch(run: Unlearn) -> None:
    """Refuse what several processes cannot do together.

    Raises:
        UserError: `batch_size` cannot be shared, or a sharded model is asked for with parts that need all of it.
    """
    if run.batch_size % processes.size():
        low = run.batch_size // processes.size() * processes.size()
        raise UserError(
            f"batch_size is {run.batch_size}, the rows of a step of all {processes.size()} processes together, and cannot be "
            f"shared evenly: give {low or processes.size()}{f' or {low + processes.size()}' if low else ''}."
        )
    if processes.launch() == "ddp":
        return
    for wrong, what in (
        (run.watch.on, "watch"),
        (run.quantization is not None, "quantization"),
        # transformers then loads every model in pieces, the untouched one as well
        (processes.launch() == "zero3" and run.negate is not None, "negate under DeepSpeed"),
        (not isinstance(run.initializer, Zero), f"initializer.kind {run.initializer.kind}"),
        (isinstance(run.adapter, Lora) and run.adapter.detector, "adapter.detector"),
    ):
        if wrong:
            raise UserError(
                f"{what} needs all of the model in each process: launch with DDP (recipes/accelerate/ddp.yaml)."
            )


def unlearn(run: Unlearn, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Make a model forget: train an adapter and save it to `run.out`/adapter, or its weights to `run.out`/model.

    Several processes (`alter.core.processes`) share every step's rows and the passes of the frozen base; `batch_size` is that of
    all of them, so that the losses are those of one process. `run.out` must be a folder that all of them see.

    Args:
        run: the settings; everything that can be checked without the model is checked before it is loaded.
        callbacks: transformers' callbacks, called while it trains.

    Returns:
        the run's folder: `adapter/` loads with `PeftModel.from_pretrained`, or `model/` (adapter.kind full) with
        `AutoModelForCausalLM.from_pretrained`; `run.yaml` repeats the run, `run.json` records what happened. While it
        trains, `inputs.json`, `frozen.safetensors`, `start.safetensors` (initialisers), `reinforced.safetensors` and
        `checkpoints/` let an interrupted run resume; they are for their owner alone, and rows can be read from them. At the
        end they are removed, but for each token's entropy and gates, unless `keep_working` is set.

    Raises:
        UserError: bad settings or data, a folder that is in use, a loss that is not finite, or a process that was lost.
    """
    checkpoints = "The last whole checkpoint stays in {}/checkpoints: start the same command with --resume."
    with processes.together(checkpoints.format(run.out), run.device):
        return _unlearn(run, callbacks)


def _unlearn(run: Unlearn, callbacks: Sequence[TrainerCallback]) -> Path:
    started = time.time()
    check_launch(run)
    former = None
    if run.start_from is not None and isinstance(run.adapter, Lora):
        former = Former.read(run.start_from)
        run.adapter.check_former(former)
    forget_examples, retain_examples, domain, names = read_data(run)
    run = lengthened(run, len(forget_examples))
    steps, alone = steps_of(run, len(forget_examples))
    of_step = run.batch_size * run.gradient_accumulation_steps
    watched = None
    if run.watch.on:
        watched, retain_examples = read_watched(
            run.watch,
            forget_examples,
            retain_examples,
            domain_column=run.domain_column,
            seed=run.seed,
            steps=steps,
            steps_per_epoch=len(forget_examples) / of_step,
        )
    out = processes.from_first(lambda: check_folder(run))
    given = inputs_of(run, forget_examples, retain_examples)
    if run.resume:
        processes.from_first(lambda: check_inputs(out, given))
        if (out / "run.json").exists() and not (out / "checkpoints").exists():
            show(f"{out} has ended: nothing is left to do.", stderr=True, markup=False)
            return out
    checkpoint = processes.from_first(lambda: last_whole_checkpoint(out / "checkpoints")) if run.resume else None
    if checkpoint is not None:
        check_checkpoint(checkpoint)

    torch.manual_seed(run.seed)
    full = isinstance(run.adapter, FullWeights)
    # small steps would be lost in the rounding of 16-bit weights
    dtype = "float32" if full and run.dtype == "auto" else run.dtype
    # a LoRA is trained on from its weights: all that is measured before sees the bare base
    grown = run.start_from if former is None else None
    base, tokenizer = load_model(run.model, grown, dtype, run.device, run.quantization)
    given[BASE] = base_fingerprint(base)
    if run.resume:
        processes.from_first(lambda: check_inputs(out, given))
    if isinstance(run.adapter, Lora):
        # names that the model does not have are refused before passes over it
        layers = list(run.adapter.layers(base))
        if former is not None:
            former.check(base, layers)
    elif isinstance(run.adapter, AlterAdapter) and grown is None and run.adapter.target_modules is not None:
        target_layers(base, target_names(base, run.adapter.target_modules), None)
    limit = run.max_length or getattr(base.config, "max_position_embeddings", None)
    forget, owner = encode_all(tokenizer, forget_examples, max_length=limit, label="forget")
    retain, _ = encode_all(tokenizer, retain_examples, max_length=limit, label="retain")
    if isinstance(run.retain_objective, Uniform) and run.retain_objective.prompts:
        retain = [dataclasses.replace(row, labels=list(row.input_ids)) for row in retain]
    forget_examples, domain = [forget_examples[i] for i in owner], [domain[i] for i in owner]
    steps, alone = steps_of(run, len(forget))
    other = alternatives(run.objective, tokenizer, base, forget_examples, forget, seed=run.seed, max_length=limit)
    # only now, so that a mistake in the settings leaves nothing behind, and deletes nothing
    processes.from_first(lambda: make_folder(run, given))
    views = frozen_views(base, tokenizer, run, forget, retain, out / "reinforced.safetensors")
    start, away = start_of(base, tokenizer, run, forget, retain, out / "start.safetensors")
    form = form_of(base, run, forget, tokenizer.pad_token_id, former)
    depth = None
    if run.objective.needs.hidden or run.retain_objective.needs.hidden:
        place, count = blocks(base)
        block, *behind = list(base.get_submodule(place))[block_at(hidden_depth(run), count) :]
        depth = Depth(block, tuple(behind))
    first = 1 if grown is None else base.peft_config["default"].num_forget_experts + 1
    if grown is not None and run.domain_column is None and not run.name_clusters:
        names = [f"cluster {first + i}" for i in range(len(names))]
    model = add_adapter(base, run, names, start, former)
    rows = Rows(forget, retain, [first + d for d in domain], other, forget_examples)
    watcher = None
    if watched is not None:
        device = next(base.parameters()).device
        watcher = Watcher(run.watch, watched, tokenizer, max_length=limit, folder=out / KEPT, device=device)
    order = schedule(
        [len(row.input_ids) for row in rows.forget],
        [len(row.input_ids) for row in rows.retain],
        # with max_steps the schedule would start again, and with it the steps without retain rows
        epochs=max(run.epochs, steps * of_step / len(rows.forget)) if alone and run.max_steps else run.epochs,
        batch=run.batch_size,
        seed=run.seed,
        alone=alone * of_step,
    )
    if run.experts_only:
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".alter_B." in name)
    traced, found = trace_run(model, tokenizer, run, rows, order, out / "frozen.safetensors", views, depth, limit)
    prepared = time.time()

    checkpoints = out / "checkpoints"
    checkpoints.mkdir(mode=0o700, exist_ok=True)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=run.batch_size // processes.size(),
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        num_train_epochs=1,
        max_steps=run.max_steps or -1,
        learning_rate=run.learning_rate_experts if isinstance(run.adapter, AlterAdapter) else run.learning_rate,
        lr_scheduler_type=run.lr_scheduler,
        warmup_steps=warmup_of(run, len(rows.forget), steps),
        max_grad_norm=run.max_grad_norm,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        gradient_checkpointing=run.gradient_checkpointing,
        bf16=run.bf16,
        optim=OPTIMIZERS[run.optimizer],
        use_cpu=next(base.parameters()).device.type == "cpu",
        save_strategy="steps",
        save_steps=run.save_steps,
        save_total_limit=2,
        logging_steps=10,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        seed=run.seed,
    )
    bar = Steps()
    trainer = UnlearnTrainer(
        run,
        found.get("entropy_threshold", math.inf),
        model.peft_config["default"].num_forget_experts + 1 if isinstance(run.adapter, AlterAdapter) else 0,
        depth,
        penalty_of(model, run, away, former),
        alone=alone,
        model=model,
        args=arguments,
        # of a short last batch each process must have a share
        train_dataset=Pairs(order, rows, traced, run.batch_size if processes.size() > 1 else 1),
        data_collator=PairCollator(tokenizer.pad_token_id),
        callbacks=[FirstEpoch(), Dual(), bar, *([watcher] if watcher else []), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        bar.close()
    seen = watcher and watcher.restore_best(model)
    weights = trainer.whole_weights()

    def finish() -> None:
        if run.negate is not None:
            negate(dict(model.named_parameters()) if weights is None else weights, run, run.negate)
        check_finite(
            {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
            if weights is None
            else weights,
            "learning_rate_experts" if isinstance(run.adapter, AlterAdapter) else "learning_rate",
        )
        kind = "model" if full else "adapter"
        save_adapter(model, out, card(run, names), kind, tokenizer if full else None, form, weights)
        write_atomic(
            out / "run.json",
            to_json(
                {
                    "settings": run.model_dump(),
                    "domains": names,
                    "experts": sorted(set(rows.expert)),
                    "router": found,
                    "steps": trainer.state.global_step,
                    # the second half of an initialised adapter is frozen
                    "trained_parameters": trained // (1 if start is None else 2),
                    "processes": processes.size(),
                    "seconds": {"prepare": round(prepared - started, 2), "train": round(time.time() - prepared, 2)},
                    "log": [entry for entry in trainer.state.log_history if "watch" not in entry],
                    "watch": seen,
                    "provenance": provenance(),
                }
            ),
        )

        (out / RUNNING).unlink(missing_ok=True)
        if not run.keep_working:
            forgetting = [name for name in ("forget", "alternative") if name in traced]
            clean(out, sum(len(traced[name]) for name in forgetting))

    processes.from_first(finish)
    return out
