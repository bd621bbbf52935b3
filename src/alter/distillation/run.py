"""`alter distill`: plain weights of the same architecture learn to say what the unlearned model says.

An adapter hides what the base knows, and whoever takes it off has it again. Here the whole distribution of the unlearned
model (the teacher) is learned by weights of their own (the student), on forget rows in several wordings, on kept rows and
on general text; `noise` damages the student before it learns, so that what it knew is not only covered up (Lee et al. 2025,
"Distillation robustifies unlearning").
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.table import Table
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from alter.core.cache import cache_folder
from alter.core.console import cell, show, warn
from alter.core.errors import UserError
from alter.core.files import digest, to_json, write_atomic
from alter.core.provenance import provenance
from alter.core.records import Record, write_records
from alter.data.batching import Collator, LengthBatches
from alter.data.examples import Example
from alter.distillation.noise import add_noise
from alter.distillation.rows import KINDS, Lesson, lesson, read_rows, sample
from alter.distillation.settings import Distill, completed
from alter.distillation.teacher import Teacher, part
from alter.evaluation.rows import FIGURES, Answered, closing_facts, measure
from alter.evaluation.verdict import judge
from alter.logits.head import measuring
from alter.models.guards import is_form
from alter.models.loading import Subject, load_model
from alter.models.scoring import context_length
from alter.training.folder import (
    check_finite,
    check_inputs,
    last_whole_checkpoint,
    save_adapter,
    seal_checkpoint,
)
from alter.training.progress import Steps

# Folder and disk -----------------------------------------------------------------------------------------------------

UNCOMPARED = {"out", "resume", "overwrite", "device", "closing_rows", "checkpoint_steps", "log_steps", "run"}
"""Settings that may be others when a run goes on."""


def prepare(settings: Distill) -> Path:
    """Return the output folder, made if it is missing.

    Raises:
        UserError: it holds something and neither `resume` nor `overwrite` is set, it holds teacher or student, or there is
            nothing to resume.
    """
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"out is {settings.out!r}, which is a file; give a folder.")
    for name in ("run", "model", "adapter", "student"):
        value = getattr(settings, name)
        if value is not None and Path(value).exists() and Path(value).resolve().is_relative_to(out.resolve()):
            raise UserError(f"out is {settings.out!r}, which holds the {name} {value}: give another folder.")
    present = out.is_dir() and any(out.iterdir())
    if present and settings.overwrite:
        shutil.rmtree(out)
    elif present and not settings.resume:
        raise UserError(
            f"The output folder {settings.out} is not empty: add --resume to go on from its last checkpoint, --overwrite "
            "to delete it, or give another --out."
        )
    elif not present and settings.resume:
        raise UserError(f"Nothing to resume: {settings.out} is empty or missing. Leave --resume out to start.")
    out.mkdir(parents=True, exist_ok=True)
    return out


def check_disk(out: Path, student: torch.nn.Module, form: str) -> None:
    """Refuse to begin where the result and two checkpoints would not fit on the disk.

    Of full weights a checkpoint holds them and both moments of AdamW in float32; of a LoRA next to nothing.

    Raises:
        UserError: says how much is needed and how much is free.
    """
    weights = sum(weight.numel() for weight in student.parameters())
    # while a checkpoint is written the one before is still there
    needed = weights * 4 * (1 + 2 * 3) if form == "full" else 0
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{out} is on a disk with {free / 1e9:.1f} GB free, and weights with two checkpoints take {needed / 1e9:.1f} "
            "GB: make room, or give an --out on another disk."
        )


# Models --------------------------------------------------------------------------------------------------------------


def check_teacher(teacher: Any) -> None:
    """Refuse a teacher whose adapter is switched off: it would teach what was to be forgotten.

    Raises:
        UserError: it is.
    """
    layers = [module for module in teacher.modules() if isinstance(module, BaseTunerLayer)]
    if layers and all(layer.disable_adapters or not layer.active_adapters for layer in layers):
        raise UserError(
            "The teacher's adapter is detached (disable_adapter): it would teach what was to be forgotten. Switch it on."
        )


def check_pair(teacher: Any, vocabulary: Any, student: Any, own: Any, names: tuple[str | None, str | None]) -> None:
    """Refuse a student that cannot take the teacher's place.

    Args:
        teacher, vocabulary: model, as it is loaded, and tokenizer.
        student, own: the same of the student.
        names: what errors call them.

    Raises:
        UserError: another architecture, other sizes, or another vocabulary.
    """
    inner = teacher.get_base_model() if hasattr(teacher, "get_base_model") else teacher
    theirs, ours = inner.config.get_text_config(), student.config.get_text_config()
    fields = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    for field in fields:
        one, other = getattr(theirs, field, None), getattr(ours, field, None)
        if one != other:
            raise UserError(
                f"The student {names[1]} has {field} {other}, the teacher {names[0]} {one}: give a --student of the "
                "teacher's architecture, such as the model before unlearning."
            )
    if vocabulary.get_vocab() != own.get_vocab():
        raise UserError(
            f"The student {names[1]} has another vocabulary than the teacher {names[0]}, though of the same size: give a "
            "--student with the teacher's tokenizer."
        )


# Training ------------------------------------------------------------------------------------------------------------


class DistillTrainer(Trainer):
    """transformers' Trainer with our batches, and as loss the mean divergence at the tokens that count.

    Args:
        lesson: the rows.
        teachers: of forget rows, and of all others.
        settings: batch size, seed.
        pad_token_id: fills rows up.
        given: of the Trainer.
    """

    def __init__(
        self, lesson: Lesson, teachers: tuple[Teacher, Teacher], settings: Distill, pad_token_id: int, **given: Any
    ) -> None:
        super().__init__(train_dataset=lesson.rows, **given)
        # the loss is a mean of its batch, which the Trainer has to average over accumulated batches
        self.model_accepts_loss_kwargs = False
        self.lesson = lesson
        self.teachers = teachers
        self.settings = settings
        self.collate = Collator(pad_token_id, multiple_of=8)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def get_train_dataloader(self) -> Any:
        """Batches of rows of similar length, within each the forget rows first."""
        rows = self.lesson.rows
        batches = LengthBatches([len(row.ids) for row in rows], self.settings.batch_size, self.settings.seed, self)
        return torch.utils.data.DataLoader(
            range(len(rows)),  # type: ignore[arg-type]  # a range is a map-style dataset
            batch_sampler=batches,
            collate_fn=self._batch,
            generator=torch.Generator(),
        )

    def _batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        rows = [self.lesson.rows[i] for i in sorted(numbers, key=lambda i: self.lesson.rows[i].kind)]
        batch = self.collate(
            [
                {
                    "input_ids": row.ids,
                    "labels": row.ids,
                    "counted": row.counted,
                    "kind": row.kind,
                    "source": row.source,
                }
                for row in rows
            ]
        )
        width = batch["input_ids"].shape[1]
        ends = torch.tensor([len(row.ids) - 1 for row in rows])[:, None]
        place = torch.arange(width)[None]
        batch["positions"] = (place < ends) & (place >= ends - batch["counted"][:, None])
        return batch

    def _taught(self, teacher: Teacher, sources: Sequence[int], counted: Sequence[int], device: Any) -> Tensor:
        """The teacher's states for some rows, one after the other."""
        if teacher.kept is not None:
            return torch.cat([teacher.kept[i] for i in sources]).to(device)
        return torch.cat(teacher.states([self.lesson.teacher[i] for i in sources], counted))

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """The mean of KL(teacher || student) over the tokens that count.

        Raises:
            UserError: it is not finite.
        """
        counted, kinds, sources = (inputs[name].tolist() for name in ("counted", "kind", "source"))
        device = inputs["input_ids"].device
        parts = []
        with torch.autocast(device.type, enabled=False):
            for teacher, wanted in zip(self.teachers, (lambda kind: kind == 0, lambda kind: kind != 0), strict=True):
                chosen = [k for k, kind in enumerate(kinds) if wanted(kind)]
                if chosen:
                    states = self._taught(teacher, [sources[k] for k in chosen], [counted[k] for k in chosen], device)
                    parts.append(part(teacher, states))
        with measuring(model, inputs["positions"], parts):
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        apart = outputs.logits[:, 0]
        loss = apart.mean()
        if not torch.isfinite(loss):
            raise UserError(
                f"The divergence is {loss.item()} at step {self.state.global_step + 1}: training diverged. Lower "
                f"learning_rate ({self.settings.rate:g}), or use precision fp32."
            )
        self.seen.append((apart.detach().cpu(), torch.tensor(kinds).repeat_interleave(torch.tensor(counted))))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean divergence of each kind of row since the last report."""
        if "loss" in logs and self.seen:
            apart, kinds = (torch.cat(values) for values in zip(*self.seen, strict=True))
            found = {name: apart[kinds == k] for k, name in enumerate(KINDS)}
            logs = {**logs, **{name: float(values.mean()) for name, values in found.items() if len(values)}}
            self.seen = []
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        seal_checkpoint(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")


def _arguments(settings: Distill, out: Path, device: torch.device) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        bf16=settings.precision == "bf16",
        use_cpu=device.type == "cpu",
        save_steps=settings.checkpoint_steps,
        save_total_limit=1,
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        seed=settings.seed,
    )


def _keep(teacher: Teacher, taught: Lesson, numbers: Sequence[int]) -> bool:
    """Keep a teacher's states of some rows if half of the free memory holds them; whether they are kept."""
    counted = [taught.counted[i] for i in numbers]
    size = teacher.size(counted)
    if size is None or size > psutil.virtual_memory().available // 2:
        return False
    teacher.keep([taught.teacher[i] for i in numbers], counted)
    assert teacher.kept is not None
    at = dict(zip(numbers, teacher.kept, strict=True))
    empty = torch.empty(0)
    teacher.kept = [at.get(i, empty) for i in range(len(taught.teacher))]
    return True


def distill(settings: Distill, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Make plain weights that say what an unlearned model says; return the run's folder.

    Teacher passes are made once where half of the free memory holds what its head reads (else at every step), and each
    step compares all of the vocabulary at every token that counts, chunk by chunk.

    Args:
        settings: see `Distill`.
        callbacks: transformers' callbacks, called while it trains.

    Returns:
        `out`: `model/` (form full) or `adapter/` (form lora, which PEFT loads without alter), `run.yaml`, `run.json` and,
        with `closing_rows`, `records.json`. While it trains `checkpoints/` let an interrupted run resume; at the end they
        are removed.

    Raises:
        UserError: bad settings, rows or models, a folder in use, too little disk, or a divergence that is not finite.
    """
    started = time.time()
    settings = completed(settings)
    found = read_rows(settings)
    out = prepare(settings)
    if (out / "run.json").exists() and not (out / "checkpoints").exists():
        show(f"{out} has ended: nothing is left to do.", stderr=True, markup=False)
        return out
    assert settings.model is not None
    assert settings.student is not None
    common: dict[str, Any] = {"device": settings.device, "chat_template_kwargs": settings.chat_template_kwargs}
    subjects = {
        "teacher": Subject(model=settings.model, adapter=settings.adapter, **common),
        "student": Subject(model=settings.student, **common),
    }
    identities = {name: subject.identity(cache_folder()) for name, subject in subjects.items()}
    given = {
        **{f"{name} rows": digest([row.row for row in rows]) for name, rows in found.items()},
        **identities,
        **settings.model_dump(mode="json", exclude=UNCOMPARED | {"model", "adapter", "student"}),
    }
    if settings.resume:
        check_inputs(out, given)
    checkpoint = last_whole_checkpoint(out / "checkpoints") if settings.resume else None

    teacher, tokenizer = subjects["teacher"].load()
    check_teacher(teacher)
    student, own = load_model(
        settings.student, None, "float32", settings.device, template=settings.chat_template_kwargs
    )
    check_pair(teacher, tokenizer, student, own, (settings.adapter or settings.model, settings.student))
    check_disk(out, student, settings.form)
    write_atomic(
        out / "run.yaml", yaml.safe_dump(settings.model_dump(exclude={"resume", "overwrite"}), sort_keys=False)
    )
    if checkpoint is None:
        write_atomic(out / "inputs.json", to_json(given))

    if not found["general"]:
        found["general"] = sample(teacher, tokenizer, settings, found["forget"])
    taught = lesson(tokenizer, found, settings, settings.max_length or context_length(student))
    one_head = settings.adapter is None or not is_form(settings.adapter)
    first = Teacher(teacher, tokenizer.pad_token_id, one_head=one_head)
    second = first
    if settings.keep == "student":
        second = Teacher(subjects["student"].load()[0], tokenizer.pad_token_id)
    forgetting = sorted({row.source for row in taught.rows if row.kind == 0})
    keeping = sorted({row.source for row in taught.rows if row.kind})
    if second is first:
        kept = _keep(first, taught, range(len(taught.teacher)))
    else:
        kept = _keep(first, taught, forgetting) and _keep(second, taught, keeping)
    if not kept:
        warn("What the teacher's head reads does not fit into memory: its passes are made at every step.")
    prepared = time.time()

    torch.manual_seed(settings.seed)
    if settings.form == "full":
        add_noise(student, settings.noise, settings.seed)
        model: Any = student
    else:
        rank = settings.lora_rank
        model = get_peft_model(
            student, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        model.active_peft_config.base_model_name_or_path = settings.student
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()
    bar = Steps()
    trainer = DistillTrainer(
        taught,
        (first, second),
        settings,
        tokenizer.pad_token_id,
        model=model,
        args=_arguments(settings, out, next(student.parameters()).device),
        callbacks=[bar, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        bar.close()
    trained = time.time()
    _save(settings, out, model, tokenizer)
    facts = {
        "settings": settings.model_dump(mode="json"),
        "kind": "distilled",
        "rows": {name: sum(row.kind == k for row in taught.rows) for k, name in enumerate(KINDS)},
        "teacher_passes": "once" if kept else "at every step",
        "steps": trainer.state.global_step,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": {"prepare": round(prepared - started, 2), "train": round(trained - prepared, 2)},
        "log": trainer.state.log_history,
        "models": identities,
        "provenance": provenance(),
    }
    write_atomic(out / "run.json", to_json(facts))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    if settings.closing_rows:
        closing(settings, out, found, (teacher, tokenizer))
    return out


def _save(settings: Distill, out: Path, model: Any, tokenizer: Any) -> None:
    check_finite({name: weight for name, weight in model.named_parameters() if weight.requires_grad}, "learning_rate")
    assert settings.student is not None
    if settings.form == "lora":
        save_adapter(model, out, _card(settings, "peft"), "adapter")
        return
    dtype = _saved_dtype(settings)
    model.config.use_cache = True
    save_adapter(model.to(dtype), out, _card(settings, "transformers"), "model", tokenizer)


def _saved_dtype(settings: Distill) -> torch.dtype:
    """The number format that was asked for, or the student's own."""
    from transformers import AutoConfig

    from alter.models.loading import shipped_model

    name = settings.dtype
    if name != "auto":
        return getattr(torch, name)
    assert settings.student is not None
    try:
        found = AutoConfig.from_pretrained(shipped_model(settings.student)).dtype
    except (OSError, ValueError):
        # a model in memory or a GGUF file has no configuration of its own to read
        return torch.float32
    return found if isinstance(found, torch.dtype) else torch.float32


def _card(settings: Distill, library: str) -> str:
    """The result's model card."""
    said = yaml.safe_dump(settings.model_dump(mode="json", exclude={"resume", "overwrite"}), sort_keys=False)
    what = (
        "These are plain weights: nothing can be taken off. `AutoModelForCausalLM.from_pretrained` loads them."
        if settings.form == "full"
        else f"A plain LoRA on {settings.student}: PEFT loads it, and alter is not needed. Whoever leaves it out has the base."
    )
    return f"""---
library_name: {library}
base_model: {settings.student}
tags: [unlearning]
---

# {settings.student}, distilled from its unlearned model

Made by `alter distill`: the student learned the whole distribution of the model that had forgotten {settings.forget}. {what}

## Settings

```yaml
{said}```
"""


# Closing -------------------------------------------------------------------------------------------------------------


def closing(settings: Distill, out: Path, found: dict[str, list[Example]], teacher: tuple[Any, Any]) -> dict[str, Any]:
    """Load the result as anyone would, measure it beside the student before and the teacher; print, write `records.json`.

    The records hold figures alone, no text.

    Args:
        settings: the completed settings; `closing_rows` of each set are scored and answered.
        out: the run's folder.
        found: rows `forget` and `keep`.
        teacher: model and tokenizer.

    Returns:
        what `alter.evaluation.rows.closing_facts` gives, with the teacher's figures under `teacher`.

    Raises:
        UserError: the result does not load or its weights are not finite.
    """
    assert settings.student is not None
    full = settings.form == "full"
    common: dict[str, Any] = {"device": settings.device, "template": settings.chat_template_kwargs}
    after = load_model(str(out / "model"), **common) if full else None
    before = load_model(settings.student, **common)
    sets = {
        "forget": _drawn(found["forget"], settings.closing_rows, settings.seed),
        "retain": _drawn(found["keep"], settings.closing_rows, settings.seed),
    }
    measured: dict[str, dict[str, Answered]] = {}

    def look(name: str, pair: tuple[Any, Any]) -> None:
        measured[name] = {
            part: measure(*pair, rows, seed=settings.seed, max_new_tokens=100, label=f"{name}, {part}")
            for part, rows in sets.items()
        }

    look("before", before)
    look("teacher", teacher)
    if after is None:
        after = load_model(settings.student, str(out / "adapter"), **common)
    look("after", after)
    kept = (measured["before"]["retain"].measures, measured["after"]["retain"].measures)
    verdict = judge(measured["before"]["forget"].measures, measured["after"]["forget"].measures, kept=kept)
    facts = closing_facts(verdict, measured["before"], measured["after"], None, False)
    facts["teacher"] = {name: answered.summary() for name, answered in measured["teacher"].items()}
    records = [
        Record(
            {"before": "original", "after": "distilled"}.get(model, model),
            f"{part}_{name}",
            None if value is None else float(value),
            len(sets[part]),
            extra={"closing": facts} if (model, part, name) == ("after", "forget", "probability") else {},
        )
        for model, parts in measured.items()
        for part, answered in parts.items()
        for name, value in answered.summary().items()
        if name in ("probability", "rouge")
    ]
    write_records(out / "records.json", records)
    show(_table(facts), highlight=False)
    show(
        f"\n{facts['verdict']['word'].upper()}.\n" + "\n".join(facts["verdict"]["why"]), highlight=False, markup=False
    )
    return facts


def _drawn(rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    return [rows[i] for i in sorted(order.tolist())]


def _table(facts: dict[str, Any]) -> Table:
    table = Table(title="Before, the teacher, and the distilled")
    for column in ("", "before", "teacher", "distilled"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for name_of, title in (("forget", "to forget"), ("retain", "to keep")):
        three = [facts[model].get(name_of) for model in ("before", "teacher", "after")]
        table.add_row(cell(f"{title} ({three[0]['n']} rows, {three[0]['n_answers']} answered)", "bold"))
        for name, meaning in FIGURES.items():
            figures = [figure.get(name) for figure in three]
            shown = [
                "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
                for value in figures
            ]
            table.add_row(f"  {meaning}", *shown)
    return table


__all__ = ["Distill", "distill"]
