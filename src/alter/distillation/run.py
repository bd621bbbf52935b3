"""`alter distill`: plain weights of the same architecture learn to say what the unlearned model says.

Removing an adapter brings back what the base knows. Here a student, with plain weights of its own, learns the unlearned
model's (the teacher's) whole distribution, on forget rows in several wordings, on kept rows and on general text. `noise`
damages the student before it learns, so that what it knew is not only covered up (Lee et al. 2025,
"Distillation robustifies unlearning").
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import TrainerCallback

from alter.core import forked, show, warn
from alter.data import Example, data_hash, for_others, row_hash, settings_for_others
from alter.distillation.checks import check_out, check_pair, check_room, check_teacher
from alter.distillation.closing import measure_distilled
from alter.distillation.naming import AtNames, check_named, first_feed_forwards, named_rows, trained_layers
from alter.distillation.noise import add_noise
from alter.distillation.protection import Protection, blocks_linears, measured_shares
from alter.distillation.rows import KINDS, Lesson, check_lengths, general_text, lesson, read_sets
from alter.distillation.settings import Distill, completed
from alter.distillation.teacher import Teacher
from alter.distillation.trainer import DistillTrainer, train_student
from alter.evaluation import closing_of, refuse_missed
from alter.inference import context_length
from alter.models import ModelSettings, is_form, load_model
from alter.storage import CLAIM_FILE, cache_folder, claim, digest, read_records, release, to_json, write_atomic
from alter.storage.provenance import provenance
from alter.training import check_finite, check_inputs, check_trackers, last_whole_checkpoint, make_folder, save_adapter
from alter.training.trackers import trackers

UNCOMPARED = {
    "out",
    "resume",
    "overwrite",
    "device",
    "closing_rows",
    "checkpoint_steps",
    "log_steps",
    "report_to",
    "run",
}
"""Settings that may differ when a run is resumed."""


def _keep(teacher: Teacher, taught: Lesson, numbers: Sequence[int]) -> bool:
    """Cache a teacher's states of some rows if they fit into half of the free memory; return whether they are cached."""
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
    """Distil an unlearned model into plain weights; return the run's folder.

    The teacher runs once if the inputs of its head fit into half of the free memory, else at every step. Each step compares the
    distributions over the whole vocabulary at every counted token, in chunks.

    Args:
        settings: see `Distill`.
        callbacks: transformers' callbacks, called while it trains.

    Returns:
        `out`: `model/` (form full) or `adapter/` (form lora, which PEFT loads without alter), `run.yaml`, `run.json` and,
        with `closing_rows`, `records.json`. While it trains `checkpoints/` let an interrupted run resume; at the end they
        are removed. A run that was broken off while it was measured is measured when it is resumed, and not trained again.

    Raises:
        UserError: bad settings, rows or models, a folder in use, too little disk, or a divergence that is not finite.
    """
    try:
        return _distill(settings, callbacks)
    finally:
        release(Path(settings.out))


def _distill(settings: Distill, callbacks: Sequence[TrainerCallback]) -> Path:
    started = time.time()
    check_trackers(settings.report_to)
    settings = completed(settings)
    found = read_sets(settings)
    if settings.names:
        check_named(found["forget"], settings.names, found["keep"], settings.other_names)
    out = check_out(settings)
    trained = settings.resume and (out / "run.json").exists()
    models = _models(settings)
    identities = {name: one.identity(cache_folder()) for name, one in models.items()}
    given = _inputs(settings, found, identities)
    if settings.resume:
        check_inputs(out, given)
    if trained and (not settings.closing_rows or (out / "records.json").exists()):
        _clean(out)
        show(f"{out} is finished: nothing is left to do.", stderr=True, markup=False)
        return out
    if trained:
        claim(out)
        teacher = models["teacher"].load()
    else:
        teacher = _train(settings, out, found, models, given, callbacks, started)
    _clean(out)
    if settings.closing_rows:
        measure_distilled(settings, out, found, teacher)
    return out


def _train(
    settings: Distill,
    out: Path,
    found: dict[str, list[Example]],
    models: dict[str, ModelSettings],
    given: dict[str, Any],
    callbacks: Sequence[TrainerCallback],
    started: float,
) -> tuple[Any, Any]:
    """Train and save the student, then write `run.json`, which marks a run as trained; return the teacher and its tokenizer."""
    checkpoint = last_whole_checkpoint(out / "checkpoints") if settings.resume else None
    teacher, tokenizer, student = _load(settings, models["teacher"])
    check_room(out, student, settings.form)
    limit = settings.max_length or context_length(student)
    check_lengths(teacher, tokenizer, settings, found, limit)
    # after all checks, so that invalid settings neither leave nor delete files
    make_folder(settings, given)
    if not found["general"]:
        found["general"] = general_text(teacher, tokenizer, settings, found["forget"])
    taught = lesson(tokenizer, found, settings, limit)
    trained_on = named_rows(tokenizer, taught, settings.names, settings.other_names) if settings.names else taught
    teachers, kept = _teachers(settings, trained_on, (teacher, tokenizer), models["student"])
    prepared = time.time()
    layers = first_feed_forwards(student, settings.depth) if settings.names else blocks_linears(student)
    shares = _shares(settings, student, layers, taught, tokenizer.pad_token_id)
    model = _learner(settings, student, layers)
    heard = [*callbacks, *([Protection(model, shares)] if shares else []), *trackers(settings.report_to, out)]
    at_names = AtNames(trained_layers(model, layers)) if settings.names else None
    trainer = train_student(
        settings, out, model, trained_on, teachers, tokenizer.pad_token_id, heard, checkpoint, at_names
    )
    trained = time.time()
    _save(settings, out, model, tokenizer)
    facts = _facts(settings, found, taught, trainer) | {
        "teacher_passes": "once" if kept else "at every step",
        "seconds": {"prepare": round(prepared - started, 2), "train": round(trained - prepared, 2)},
        "models": {name: given[name] for name in models},
        "provenance": provenance(),
    }
    write_atomic(out / "run.json", to_json(facts))
    return teacher, tokenizer


def _clean(out: Path) -> None:
    """Delete what only training needs, and the hidden temporary files of a killed write."""
    for path in [out / "checkpoints", *(path for path in out.glob(".*") if path.name != CLAIM_FILE)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@forked.allowed()
def command(settings: Distill) -> Path:
    """Run `alter distill`: distil, and show what is next, which inside another command is another thing.

    Raises:
        UserError: see `distill`.
        Finding: the weights have not forgotten, or have collapsed.
    """
    out = distill(settings)
    whole = completed(settings)
    closed = closing_of(read_records(out / "records.json")) if (out / "records.json").is_file() else None

    def at(name: str) -> str:
        return shlex.quote(f"{out}{name}")

    original, forget = shlex.quote(str(whole.student)), shlex.quote(str(whole.forget))
    commands = [
        f"alter attack --model {at('/model')} --original {original} --forget {forget} --out {at('/attacks')}",
        f"alter export --model {at('/model')} --out {shlex.quote(f'{out.name}-q8_0.gguf')}",
    ]
    word = None if closed is None else closed["verdict"]["word"]
    if word == "collapsed":
        commands = [f"alter distill {at('/run.yaml')} --out {at('-2')} --learning-rate {whole.rate / 3:g}"]
    if word == "not forgotten":
        # what still knows is not for handing out
        again = f"alter distill {at('/run.yaml')} --out {at('-2')} --epochs {2 * whole.epochs:g}"
        if whole.max_steps:
            again = f"alter distill {at('/run.yaml')} --out {at('-2')} --max-steps {2 * whole.max_steps}"
        commands = [again]
    if settings.form == "full":
        show("\nNext:\n" + "\n".join(f"  {each}" for each in commands), highlight=False, markup=False)
    if closed is not None:
        refuse_missed(closed["verdict"], out)
    return out


def _models(settings: Distill) -> dict[str, ModelSettings]:
    """Return teacher and student as models to load."""
    assert settings.model is not None
    assert settings.student is not None
    common: dict[str, Any] = {"device": settings.device, "chat_template_kwargs": settings.chat_template_kwargs}
    return {
        "teacher": ModelSettings(model=settings.model, adapter=settings.adapter, **common),
        "student": ModelSettings(model=settings.student, **common),
    }


def _load(settings: Distill, chosen: ModelSettings) -> tuple[Any, Any, Any]:
    """Load teacher, its tokenizer and student, and check that they are compatible.

    Raises:
        UserError: see `check_teacher` and `check_pair`.
    """
    assert settings.student is not None
    teacher, tokenizer = chosen.load()
    check_teacher(teacher)
    student, own = load_model(
        settings.student, None, "float32", settings.device, template=settings.chat_template_kwargs
    )
    check_pair(teacher, tokenizer, student, own, (settings.adapter or settings.model, settings.student))
    return teacher, tokenizer, student


def _facts(
    settings: Distill, found: dict[str, list[Example]], taught: Lesson, trainer: DistillTrainer
) -> dict[str, Any]:
    """Return what `run.json` records of rows and training."""
    return {
        "settings": settings.model_dump(mode="json"),
        "kind": "distilled",
        "rows": {name: sum(row.kind == k for row in taught.rows) for k, name in enumerate(KINDS)},
        "steps": trainer.state.global_step,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "log": trainer.state.log_history,
        "data": {
            name: data_hash(list(map(row_hash, found[part])))
            for name, part in (("forget", "forget"), ("retain", "keep"))
        },
    }


def _inputs(settings: Distill, found: dict[str, list[Example]], identities: dict[str, Any]) -> dict[str, Any]:
    """Return what must be unchanged when a run is resumed: rows, models and settings."""
    return {
        **{f"{name} rows": digest([row.row for row in rows]) for name, rows in found.items()},
        **identities,
        **settings.model_dump(mode="json", exclude=UNCOMPARED | {"model", "adapter", "student"}),
    }


def _teachers(
    settings: Distill, taught: Lesson, teacher: tuple[Any, Any], student: ModelSettings
) -> tuple[tuple[Teacher, Teacher], bool]:
    """Return the teachers of forget rows and of all other rows, and whether their states are cached."""
    model, tokenizer = teacher
    one_head = settings.adapter is None or not is_form(settings.adapter)
    first = Teacher(model, tokenizer.pad_token_id, one_head=one_head)
    forgetting, keeping = (
        sorted({row.source for row in taught.rows if bool(row.kind) == rest}) for rest in (False, True)
    )
    second = first
    # with `names` alone, rows to keep are in the moments only
    if keeping and settings.keep == "student":
        second = Teacher(student.load()[0], tokenizer.pad_token_id)
        kept = _keep(first, taught, forgetting) and _keep(second, taught, keeping)
    else:
        kept = _keep(first, taught, sorted([*forgetting, *keeping]))
    if not kept:
        warn("The teacher's states do not fit into memory: the teacher runs at every step.")
    return (first, second), kept


def _shares(
    settings: Distill, student: Any, layers: dict[str, Any], taught: Lesson, pad_token_id: int
) -> dict[str, Tensor]:
    """Return which share of a step each layer may take (`alter.distillation.protection`); nothing without `leeway`."""
    if settings.leeway is None:
        return {}
    rows = [taught.teacher[i] for i in sorted({row.source for row in taught.rows if row.kind})]
    return measured_shares(student, layers, rows, settings.leeway, pad_token_id)


def _learner(settings: Distill, student: Any, layers: dict[str, Any]) -> Any:
    """Return the model to train: the student with noise added to all its weights, or a LoRA on it; with `names`, on `layers`."""
    torch.manual_seed(settings.seed)
    if settings.form == "full":
        add_noise(student, settings.noise, settings.seed)
        model: Any = student
        if settings.names:
            chosen = {id(layer.weight) for layer in layers.values()}
            for parameter in student.parameters():
                parameter.requires_grad_(id(parameter) in chosen)
    else:
        rank = settings.lora_rank
        places = list(layers) if settings.names else "all-linear"
        model = get_peft_model(
            student, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=places, task_type="CAUSAL_LM")
        )
        model.active_peft_config.base_model_name_or_path = settings.student
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


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
    """Return the dtype to save in: the one asked for, or the student's own."""
    from transformers import AutoConfig

    from alter.models import shipped_model

    name = settings.dtype
    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    assert settings.student is not None
    try:
        found = AutoConfig.from_pretrained(shipped_model(settings.student)).dtype
    except (OSError, ValueError):
        # a model in memory or a GGUF file has no config.json
        return torch.float32
    return found if isinstance(found, torch.dtype) else torch.float32


def _card(settings: Distill, library: str) -> str:
    """Return the result's model card, which names no file of this machine, nor the names that were erased."""
    # a teacher of plain weights lies in a folder of its own, as an adapter does
    hidden = {"model"} if settings.model != settings.student else set[str]()
    said = yaml.safe_dump(settings_for_others(settings.model_dump(mode="json", exclude=hidden)), sort_keys=False)
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

Made by `alter distill`: the student learned the whole distribution of the model that was to forget {for_others(str(settings.forget))}. {what}

## Settings

```yaml
{said}```
"""


__all__ = ["Distill", "distill"]
