"""`alter finetune`: fits a causal language model to question-answer rows or to plain text.

It makes the models that unlearning is measured on: the one that has learned everything and its twin that never saw the
forget rows. It starts from an existing model or, with `architecture`, from random weights and a tokenizer trained on given
texts, and it writes a model folder whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from alter.core.errors import UserError
from alter.core.files import read_object, to_json, write_atomic
from alter.core.numbers import Seed
from alter.core.outputs import OutFolder
from alter.core.provenance import provenance
from alter.core.running import check_free, claim
from alter.data.batching import Collator, LengthBatches
from alter.data.encoding import TemplateArguments
from alter.training.corpora import training_rows
from alter.training.starting import add_dropout, divide_logits, set_attention_dropout, starting_model
from alter.training.trackers import ReportTo, check_trackers, trackers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHECKPOINTS = "checkpoints"
"""Folder inside the output folder that an interrupted run resumes from; gone once the model is there."""

RECIPE = "finetune.yaml"
"""The recipe as run, written beside the model."""

NUMBERS = "finetune.json"
"""What was measured during the run, written beside the model."""

TOFU_NOTICE = (
    "Trained on TOFU (Maini, Feng, Schwarzschild, Lipton and Kolter 2024, *TOFU: A Task of Fictitious Unlearning for "
    "LLMs*, arXiv:2401.06121, `locuslab/TOFU`), MIT licence, Copyright (c) 2024 Pratyush Maini and co-authors, "
    "locuslab. Its authors and their books are fictitious."
)


Decay = Annotated[float, Field(ge=0, lt=1)]


class Finetune(BaseModel, extra="forbid"):
    """Settings of one fine-tuning run."""

    model: str | None = Field(None, description="model folder or hub id to start from; or give architecture")
    architecture: dict[str, str | int | float | bool] = Field(
        {}, description="start from random weights: model_type (llama, ...) and sizes, as in the model's config.json"
    )
    vocabulary: int = Field(
        2048, gt=259, description="with architecture: size of the byte-level BPE tokenizer to train (3 special tokens)"
    )
    tokenizer_texts: list[str] = Field(
        [], description="with architecture: what the tokenizer is trained on; sources of rows and .txt files"
    )
    data: list[str] = Field([], description="sources of rows: builtin:full, rows.jsonl, folder:retain90, org/name")
    corpora: list[str] = Field([], description="plain text files, packed into blocks of max_length tokens")
    chat_template_kwargs: TemplateArguments = []
    out: OutFolder = Field(description="folder to write the model to")
    seed: Seed = Field(0, description="of weights, order and dropout")
    max_length: int = Field(512, ge=8, description="longest sequence in tokens; also the length of a packed block")
    epochs: float = Field(1.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(None, gt=0, description="stop after this many optimizer steps (overrides epochs)")
    batch_size: int = Field(32, ge=1, description="sequences a step and device")
    accumulate: int = Field(1, ge=1, description="batches whose gradients are averaged into one optimizer step")
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of AdamW")
    schedule: Literal["cosine", "linear", "constant"] = Field("linear", description="of the rate after the warm-up")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the rate rises from 0")
    weight_decay: float = Field(0.01, ge=0, description="decoupled, on matrices only")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over the vocabulary")
    prompt_weight: float = Field(
        0.0, ge=0, le=1, description="weight of prompt tokens in the loss; answer tokens have 1"
    )
    embedding_dropout: float = Field(0.0, ge=0, lt=1, description="of the token embeddings, in training only")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="of attention weights, in training only")
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
    lora_rank: int | None = Field(
        None,
        ge=1,
        description="freeze the weights and train a LoRA of this rank on every linear layer; out holds it alone",
    )
    lora_from: int | None = Field(
        None, ge=1, description="with lora_rank: only from this block on; those below run once for each row"
    )
    lora_alpha: float = Field(
        32.0, gt=0, description="with lora_rank: its products are multiplied by this over the rank"
    )
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="bf16: autocast over float32 weights; with lora_rank the frozen weights are bfloat16"
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field("bfloat16", description="of the saved weights")
    gradient_checkpointing: bool = Field(False, description="recompute activations to save memory")
    checkpoint_steps: int = Field(500, ge=1, description="write a checkpoint every so many steps")
    log_steps: int = Field(50, ge=1, description="report the loss every so many steps")
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
            raise ValueError("architecture and tokenizer_texts go together: a new model needs a tokenizer of its own")
        if self.lora_rank is not None and (self.architecture or self.temperature != 1):
            raise ValueError("lora_rank leaves the weights as they are: it needs model, and temperature at 1")
        if self.lora_from is not None and (
            self.lora_rank is None or self.embedding_dropout or self.attention_dropout or self.neftune
        ):
            raise ValueError("lora_from goes with lora_rank, and without dropout or noise in the blocks below it")
        if not self.data and not self.corpora:
            raise ValueError("give data (rows) or corpora (text files) to train on")
        if self.resume and self.overwrite:
            raise ValueError("resume continues and overwrite starts again; give one of them")
        return self


# ---------------------------------------------------------------------------------------------------------------------
# Output folder


def _comparable(settings: Finetune) -> dict[str, Any]:
    """Return the settings that training depends on; the others may change when a run is resumed."""
    free = {"resume", "overwrite", "log_steps", "checkpoint_steps", "report_to", "title", "temperature", "dtype"}
    return settings.model_dump(mode="json", exclude=free)


def _check_folder(settings: Finetune) -> Path | None:
    """Check the output folder and return the checkpoint to resume from, if any.

    Raises:
        UserError: it holds something and neither `resume` nor `overwrite` fits.
    """
    out = Path(settings.out)
    if out.is_file():
        raise UserError(f"{settings.out!r} is a file; give a folder to write the model to.")
    checkpoints = out / CHECKPOINTS
    check_free(checkpoints)
    present = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    ours = RECIPE in present or CHECKPOINTS in present
    if settings.resume:
        if not checkpoints.is_dir():
            state = "holds a finished run" if RECIPE in present else "holds no checkpoints"
            raise UserError(f"Nothing to resume: {settings.out!r} {state}; leave resume out.")
        before = read_object(checkpoints / "settings.json", "the settings of the run")
        changed = [name for name, value in _comparable(settings).items() if before.get(name) != value]
        if changed:
            raise UserError(
                f"The run in {settings.out!r} was started with other settings ({', '.join(changed)}); "
                "give the same ones to resume, or overwrite to start again."
            )
        return _last_checkpoint(checkpoints)
    if present and not settings.overwrite:
        advice = (
            "resume to continue it, overwrite to start again" if CHECKPOINTS in present else "overwrite to replace it"
        )
        if not ours:
            advice = "give another folder"
        raise UserError(f"{settings.out!r} is not empty ({', '.join(present[:5])}): {advice}.")
    if present and not ours:
        raise UserError(
            f"{settings.out!r} holds {', '.join(present[:5])} but no {RECIPE}: it is not a folder of an earlier run, "
            "so overwrite leaves it alone; give another folder."
        )
    return None


def _start_folder(settings: Finetune) -> None:
    """Make the output folder with nothing but the settings in `checkpoints/`; a finished model there stays."""
    checkpoints = Path(settings.out) / CHECKPOINTS
    if checkpoints.is_dir():
        shutil.rmtree(checkpoints)
    write_atomic(checkpoints / "settings.json", to_json(_comparable(settings)))
    claim(checkpoints)


def _last_checkpoint(checkpoints: Path) -> Path | None:
    """Return the newest complete checkpoint; the trainer's state is the last file written to one."""
    found = [path.parent for path in checkpoints.glob("checkpoint-*/trainer_state.json")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _finish(
    settings: Finetune, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, numbers: dict[str, Any]
) -> Path:
    """Write model, tokenizer, recipe, numbers and card beside the output folder, then put them in its place."""
    import torch
    import yaml

    out = Path(settings.out)
    fresh = out.with_name(f".{out.name}.new")
    old = out.with_name(f".{out.name}.old")
    for path in (fresh, old):
        if path.exists():
            shutil.rmtree(path)
    model.config.use_cache = True
    if settings.lora_rank is not None:
        from alter.training.lora import save_delta

        save_delta(model, fresh, str(settings.model), getattr(torch, settings.dtype))
    else:
        model.generation_config.bos_token_id = tokenizer.bos_token_id
        model.generation_config.eos_token_id = model.generation_config.eos_token_id or tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.to(getattr(torch, settings.dtype)).save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    recipe = settings.model_dump(mode="json", exclude_defaults=True, exclude={"resume", "overwrite"})
    write_atomic(fresh / RECIPE, yaml.safe_dump(recipe, sort_keys=False))
    write_atomic(fresh / NUMBERS, to_json(numbers))
    write_atomic(fresh / "README.md", _card(settings, numbers))
    if (out / "tensorboard").is_dir():
        os.replace(out / "tensorboard", fresh / "tensorboard")
    if out.exists():
        os.replace(out, old)
    os.replace(fresh, out)
    if old.exists():
        shutil.rmtree(old)
    print(f"model: {out}", file=sys.stderr)
    return out


def _card(settings: Finetune, numbers: dict[str, Any]) -> str:
    """Return the model card: command, seed, data and what was measured."""
    title = settings.title or Path(settings.out).name
    origin = (
        f"from `{settings.model}`" if settings.model else f"from random weights ({numbers['parameters']:,} parameters)"
    )
    sources = [f"`{source}`" for source in [*settings.data, *settings.corpora]]
    delta = settings.lora_rank is not None
    lines = [
        "---",
        f"library_name: {'peft' if delta else 'transformers'}",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {title}",
        "",
        f"{'A LoRA, f' if delta else 'F'}itted {origin} by `alter finetune {RECIPE}`, the recipe in this folder.",
        "",
        "| | |",
        "|---|---|",
        f"| data | {', '.join(sources)} |",
        f"| sequences | {numbers['sequences']:,} |",
        f"| optimizer steps, epochs | {numbers['steps']:,}, {numbers['epochs']:g} |",
        f"| training loss, mean of the last {numbers['loss_steps']} steps | {numbers['loss']:.4f} |",
        f"| seed | {settings.seed} |",
        f"| wall time{' since it was resumed' * numbers['resumed']} | {numbers['seconds']:.0f} s on {numbers['made_by']['machine']}, {numbers['device']} |",
        f"| weights | {settings.dtype}, safetensors |",
        "",
    ]
    if any(source.lower().startswith(("builtin:", "locuslab/tofu")) for source in settings.data):
        lines += [TOFU_NOTICE, ""]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Run


def weighted_mean(
    logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Return sum_t w_t l_t / sum_t w_t of `weighted_loss` for logits [n, V] of the tokens that have the targets [n]."""
    import torch

    loss = torch.nn.functional.cross_entropy(logits.float(), target, reduction="none", label_smoothing=label_smoothing)
    return (loss * weights).sum() / weights.sum()


def weighted_loss(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Return the mean next-token cross-entropy over labels, each counted by its weight.

    Computes sum_t w_t l_t / sum_t w_t with l_t = -sum_v q_v log p_v in float32, where q puts 1 - s on the label and s
    evenly on the vocabulary (Szegedy et al. 2016). The logits at position t predict label t + 1.

    Args:
        logits: shape (rows, tokens, vocabulary).
        labels: shape (rows, tokens); -100 where there is none.
        weights: shape (rows, tokens), 0 or more.
        label_smoothing: s.
    """
    target, weight = labels[:, 1:], weights[:, 1:]
    labelled = (target != -100) & (weight > 0)
    return weighted_mean(logits[:, :-1][labelled], target[labelled], weight[labelled], label_smoothing)


def _trainer(settings: Finetune, model: Any, rows: list[dict[str, Any]], pad_token_id: int) -> Any:
    import torch
    from transformers import Trainer, TrainingArguments

    step: Any = None
    if settings.lora_rank is not None:
        from alter.training.lora import Step

        if torch.cuda.is_available():
            model = model.to("cuda")
        step = Step(model, settings.lora_from, rows, settings.precision == "bf16")

    class LengthGroupedTrainer(Trainer):
        """The Trainer with our batches and our loss."""

        def get_train_dataloader(self) -> Any:
            batches = LengthBatches([len(row["input_ids"]) for row in rows], settings.batch_size, settings.seed, self)
            return torch.utils.data.DataLoader(
                rows,  # type: ignore[arg-type]  # a list is a map-style dataset
                batch_sampler=batches,
                collate_fn=Collator(pad_token_id, multiple_of=8),
                generator=torch.Generator(),
            )

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            inputs = dict(inputs)
            labels, weights, numbers = inputs.pop("labels"), inputs.pop("weights"), inputs.pop("number")
            if step is not None and not return_outputs:
                outputs, loss = None, step.loss(model, inputs, labels, weights, numbers, settings.label_smoothing)
            else:
                outputs = model(**inputs, use_cache=False)
                loss = weighted_loss(outputs.logits, labels, weights, settings.label_smoothing)
            if not torch.isfinite(loss):
                raise UserError(
                    f"The loss is {loss.item()} at step {self.state.global_step + 1}: training diverged. Lower "
                    f"learning_rate ({settings.learning_rate:g}), raise warmup, or use precision fp32."
                )
            return (loss, outputs) if return_outputs else loss

    arguments = TrainingArguments(
        output_dir=str(Path(settings.out) / CHECKPOINTS),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.max_grad_norm,
        neftune_noise_alpha=settings.neftune or None,
        bf16=settings.precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        save_steps=settings.checkpoint_steps,
        save_total_limit=1,
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,
        seed=settings.seed,
        report_to=[],
        remove_unused_columns=False,
    )
    trainer = LengthGroupedTrainer(model=model, args=arguments, train_dataset=rows)
    # the loss above is a mean per batch, so the trainer has to average it over accumulated batches
    trainer.model_accepts_loss_kwargs = False
    return trainer


def finetune(settings: Finetune) -> Path:
    """Fit a model as `settings` say and return its folder (model, tokenizer, recipe, numbers, card).

    Nothing but `checkpoints/` is in the folder until the run is finished; then the finished folder takes its place in
    one rename. A run that was interrupted continues with `resume` to the same weights as without the interruption.

    Raises:
        UserError: a source or model that is not there, an output folder in use, or a loss that is not finite.
    """
    import torch

    from alter.training.attention import attention_for_training

    check_trackers(settings.report_to)
    checkpoint = _check_folder(settings)
    started = time.monotonic()
    model, tokenizer = starting_model(settings)
    if settings.lora_rank is not None:
        from alter.training.lora import add_lora

        model = add_lora(model, settings.lora_rank, settings.lora_alpha, settings.lora_from, settings.precision)
    rows = [{**row, "number": number} for number, row in enumerate(training_rows(settings, tokenizer))]
    plain_attention = getattr(model.config, "attention_dropout", None)
    if settings.embedding_dropout:
        add_dropout(model, settings.embedding_dropout)
    if settings.attention_dropout:
        set_attention_dropout(model, settings.attention_dropout)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    assert tokenizer.pad_token_id is not None
    # only now, so that a mistake in the settings leaves nothing behind
    if checkpoint is None:
        _start_folder(settings)
    trainer = _trainer(settings, model, rows, tokenizer.pad_token_id)
    for callback in trackers(settings.report_to, Path(settings.out)):
        trainer.add_callback(callback)
    with attention_for_training():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if settings.attention_dropout:
        set_attention_dropout(model, plain_attention or 0.0)
    if settings.temperature != 1:
        divide_logits(model, settings.temperature)
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    numbers = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "sequences": len(rows),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "loss": losses[-1][1] if losses else trainer.state.log_history[-1]["train_loss"],
        "loss_steps": settings.log_steps if losses else trainer.state.global_step,
        "losses": losses,
        "seconds": time.monotonic() - started,
        "resumed": checkpoint is not None,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads",
        "made_by": provenance(),
    }
    return _finish(settings, model, tokenizer, numbers)
