"""`alter finetune`: fits a causal language model to question-answer rows or to plain text.

It makes the models that unlearning is measured on: the one that has learned everything and its twin that never saw the
forget rows. It starts from an existing model or, with `architecture`, from random weights and a tokenizer trained on given
texts, and it writes a model folder whole or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from alter.core import UserError
from alter.data import TemplateArguments
from alter.settings import BatchSize, Count, OutFolder, Passes, Seed, Steps, Tokens
from alter.storage.provenance import provenance
from alter.training.corpora import training_rows
from alter.training.finetuned import CHECKPOINTS, check_contents, finish, resumed_from, start_folder
from alter.training.starting import add_dropout, divide_logits, set_attention_dropout, starting_model
from alter.training.trackers import ReportTo, check_trackers, trackers

if TYPE_CHECKING:
    from transformers import Trainer

Decay = Annotated[float, Field(ge=0, lt=1)]


class Finetune(BaseModel, extra="forbid"):
    """Settings of one fine-tuning run."""

    model: str | None = Field(None, description="model folder or hub id to start from; or give architecture")
    architecture: dict[str, str | int | float | bool] = Field(
        {}, description="start from random weights: model_type (llama, ...) and sizes, as in the model's config.json"
    )
    vocabulary: Tokens = Field(
        2048, gt=259, description="with architecture: size of the byte-level BPE tokenizer to train (3 special tokens)"
    )
    tokenizer_texts: list[str] = Field(
        [], description="with architecture: what the tokenizer is trained on; sources of rows and .txt files"
    )
    data: list[str] = Field([], description="sources of rows: builtin:full, rows.jsonl, folder:retain90, org/name")
    corpora: list[str] = Field([], description="plain text files, packed into blocks of max_length tokens")
    chat_template_kwargs: TemplateArguments = []
    out: OutFolder = Field(description="folder to write the model to")
    seed: Seed = Field(0, description="seed of weights, order and dropout")
    max_length: Tokens = Field(512, ge=8, description="longest sequence in tokens; also the length of a packed block")
    epochs: Passes = Field(1.0, gt=0, description="passes over the data")
    max_steps: Steps | None = Field(None, gt=0, description="stop after this many optimizer steps (overrides epochs)")
    batch_size: BatchSize = Field(32, ge=1, description="sequences a step and device")
    accumulate: Count = Field(1, ge=1, description="batches whose gradients are averaged into one optimizer step")
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of AdamW")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "linear", description="learning-rate schedule after the warm-up"
    )
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the rate rises from 0")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay, on matrices only")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="betas of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over the vocabulary")
    prompt_weight: float = Field(
        0.0, ge=0, le=1, description="weight of prompt tokens in the loss; answer tokens have 1"
    )
    embedding_dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the token embeddings, in training only")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="dropout of attention weights, in training only")
    neftune: float = Field(0.0, ge=0, description="NEFTune's alpha: uniform noise on embeddings (Jain et al. 2024)")
    copy_blocks: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the packed blocks whose second half repeats the first, to practise copying",
    )
    temperature: float = Field(
        1.0, gt=0, description="divides the logits of the saved model (folded into its last norm); greedy output stays"
    )
    lora_rank: Count | None = Field(
        None,
        ge=1,
        description="freeze the weights and train a LoRA of this rank on every linear layer; out holds it alone",
    )
    lora_from: Count | None = Field(
        None, ge=1, description="with lora_rank: only from this block on; those below run once for each row"
    )
    lora_alpha: float = Field(
        32.0, gt=0, description="with lora_rank: its products are multiplied by this over the rank"
    )
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="bf16: autocast over float32 weights; with lora_rank the frozen weights are bfloat16"
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "bfloat16", description="number format of the saved weights"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations to save memory")
    checkpoint_steps: Steps = Field(500, ge=1, description="write a checkpoint every so many steps")
    log_steps: Steps = Field(50, ge=1, description="report the loss every so many steps")
    report_to: ReportTo = []
    title: str | None = Field(None, description="heading of the model card; otherwise the output folder's name")
    resume: bool = Field(False, description="continue from the last checkpoint in out")
    overwrite: bool = Field(False, description="replace a model that an earlier run left in out")

    @model_validator(mode="after")
    def _check(self) -> Finetune:
        if (self.model is None) == (not self.architecture):
            raise ValueError(
                "give one of model (to start from a model) and architecture (to start from random weights)"
            )
        if bool(self.architecture) != bool(self.tokenizer_texts):
            raise ValueError(
                "`architecture` and `tokenizer_texts` go together: a new model needs a tokenizer of its own"
            )
        if self.lora_rank is not None and (self.architecture or self.temperature != 1):
            raise ValueError("`lora_rank` leaves the weights as they are: it needs `model`, and `temperature` at 1")
        if self.lora_from is not None and (
            self.lora_rank is None or self.embedding_dropout or self.attention_dropout or self.neftune
        ):
            raise ValueError("`lora_from` goes with `lora_rank`, and without dropout or noise in the blocks below it")
        if not self.data and not self.corpora:
            raise ValueError("give data (rows) or corpora (text files) to train on")
        if self.resume and self.overwrite:
            raise ValueError("`resume` continues and `overwrite` starts again; give one of them")
        return self


def finetune(settings: Finetune, callbacks: Sequence[Any] = ()) -> Path:
    """Fit a model as `settings` say and return its folder (model, tokenizer, recipe, numbers, card).

    Nothing but `checkpoints/` is in the folder until the run is finished; then the finished folder takes its place in
    one rename. A run that was interrupted continues with `resume` to the same weights as without the interruption.

    Args:
        settings: of the run.
        callbacks: transformers' TrainerCallback objects, called while it trains.

    Raises:
        UserError: a source or model that is not there, an output folder in use, or a loss that is not finite.
    """
    import torch
    from transformers import PrinterCallback

    from alter.adapter import base_fingerprint
    from alter.storage import digest
    from alter.training import progress
    from alter.training.attention import attention_for_training
    from alter.training.fitting import trainer_of

    check_trackers(settings.report_to)
    checkpoint = resumed_from(settings)
    started = time.monotonic()
    model, tokenizer = starting_model(settings)
    contents = {"weights": None if settings.architecture else base_fingerprint(model)}
    if settings.lora_rank is not None:
        from alter.training.lora import add_lora

        model = add_lora(model, settings.lora_rank, settings.lora_alpha, settings.lora_from, settings.precision)
    rows = [{**row, "number": number} for number, row in enumerate(training_rows(settings, tokenizer))]
    _check_fit(settings, model, tokenizer, rows)
    contents["rows"] = digest([digest(row["input_ids"], row["weights"]) for row in rows])
    if settings.resume:
        check_contents(settings, contents)
    plain_attention = getattr(model.config, "attention_dropout", None)
    if settings.embedding_dropout:
        add_dropout(model, settings.embedding_dropout)
    if settings.attention_dropout:
        set_attention_dropout(model, settings.attention_dropout)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    assert tokenizer.pad_token_id is not None
    # after all checks, so that invalid settings leave no files
    if checkpoint is None:
        start_folder(settings, contents)
    trainer = trainer_of(settings, model, rows, tokenizer.pad_token_id, Path(settings.out) / CHECKPOINTS)
    bar = progress.Steps()
    for callback in [bar, *trackers(settings.report_to, Path(settings.out)), *callbacks]:
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)
    try:
        with attention_for_training():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        bar.close()
    if settings.attention_dropout:
        set_attention_dropout(model, plain_attention or 0.0)
    if settings.temperature != 1:
        divide_logits(model, settings.temperature)
    numbers = _numbers(settings, trainer, rows) | {
        "seconds": time.monotonic() - started,
        "resumed": checkpoint is not None,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads",
        "made_by": provenance(),
    }
    return finish(settings, model, tokenizer, numbers)


def _check_fit(settings: Finetune, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    """Refuse rows that the model has no positions or no embeddings for.

    Raises:
        UserError: names the first one.
    """
    from torch import nn

    from alter.inference import check_embedded, context_length

    context, tokens = context_length(model), model.get_input_embeddings()
    # rotary positions have no end
    tables = (part for part in model.modules() if isinstance(part, nn.Embedding) and part is not tokens)
    if context is not None and not any(table.num_embeddings >= context for table in tables):
        context = None
    for row in rows:
        ids, name = row["input_ids"], f"Row {row['number']}"
        if context is not None and len(ids) > context:
            raise UserError(
                f"{name} has {len(ids)} tokens, and the model has {context} positions: give `max_length` {context} "
                f"({settings.max_length}), so that longer rows become several."
            )
        check_embedded(model, ids, name, tokenizer)


def _numbers(settings: Finetune, trainer: Trainer, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what was trained, on how much data, and the losses."""
    log = trainer.state.log_history
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    parameters = list(trainer.model.parameters())
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "sequences": len(rows),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "loss": losses[-1][1] if losses else log[-1]["train_loss"],
        "loss_steps": settings.log_steps if losses else trainer.state.global_step,
        "losses": losses,
    }
