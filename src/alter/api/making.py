"""Functions that make: an adapter, weights that no longer know, a guard, a fine-tuned model, a file of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alter.api.given import Sources, add_model, add_rows, add_sources, add_subject, as_library, settings_of
from alter.api.runs import Run

if TYPE_CHECKING:
    from alter.data import GivenRows
    from alter.distillation import Distill
    from alter.exporting import Export
    from alter.forgetting import Forget
    from alter.guarding import MakeGuard
    from alter.training import Finetune, Unlearn


def unlearn(
    model: Any = None,
    *,
    forget: GivenRows | None = None,
    retain: GivenRows | None = None,
    out: str | PathLike[str] | None = None,
    tokenizer: Any = None,
    settings: Unlearn | None = None,
    callbacks: Sequence[Any] = (),
    **keywords: Any,
) -> Run:
    """Make a model forget, as `alter unlearn` does.

    Args:
        model: folder, hub id, builtin:NAME, or a causal model of transformers in memory, without an adapter, which is copied and stays
            as it is.
        forget: the forget set.
        retain: the retain set; None: the untouched model's own answers to ordinary questions, and texts of its own.
        out: folder of the run.
        tokenizer: of a model in memory.
        settings: all settings in one object, which what else is given overrides.
        callbacks: transformers' TrainerCallback objects, called while it trains.
        keywords: further settings of `alter.training.settings.Unlearn`, such as `method="npo"`.

    Returns:
        the run, whose `adapter` (or `model`) is the result.

    Raises:
        UserError: bad settings or data, a folder in use, a loss that is not finite.
    """
    from alter.methods import with_default
    from alter.models import check_callbacks
    from alter.training import Unlearn as Kind
    from alter.training import unlearn as train

    check_callbacks(callbacks)
    with contextlib.ExitStack() as stack:
        add_model(keywords, model, tokenizer, stack)
        add_rows(keywords, stack, forget=forget, retain=retain)
        if out is not None:
            keywords["out"] = str(out)
        if settings is None:
            keywords = with_default(keywords)
        chosen = settings_of(Kind, settings, keywords)
        stack.enter_context(as_library())
        return Run.at(train(chosen, callbacks))


def distill(
    run: Any = None,
    *,
    out: str | PathLike[str] | None = None,
    settings: Distill | None = None,
    callbacks: Sequence[Any] = (),
    **keywords: Any,
) -> Run:
    """Make plain weights that say what an unlearned model says, as `alter distill` does.

    Args:
        run: a `Run` or its folder, the teacher; or leave it out and give `model=`, `adapter=`, `forget=` and `retain=`.
        out: folder of the new run.
        settings: all settings in one object, which what else is given overrides.
        callbacks: transformers' TrainerCallback objects, called while it trains.
        keywords: further settings of `alter.distillation.settings.Distill`, such as `form="lora"`.

    Returns:
        the new run, whose `model` (or `adapter`, a plain LoRA) is the result.

    Raises:
        UserError: bad settings, rows or models, a folder in use, too little disk, a divergence that is not finite.
    """
    from alter.distillation import Distill as Kind
    from alter.distillation import distill as train
    from alter.models import check_callbacks

    check_callbacks(callbacks)
    with contextlib.ExitStack() as stack:
        if run is not None:
            keywords["run"] = str(run.folder if isinstance(run, Run) else run)
        add_rows(keywords, stack, forget=keywords.get("forget"), retain=keywords.get("retain"))
        if out is not None:
            keywords["out"] = str(out)
        chosen = settings_of(Kind, settings, keywords)
        stack.enter_context(as_library())
        return Run.at(train(chosen, callbacks))


def forget(
    subject: str | None = None,
    *,
    model: Any = None,
    document: str | PathLike[str] | None = None,
    retain: GivenRows | None = None,
    out: str | PathLike[str] | None = None,
    tokenizer: Any = None,
    settings: Forget | None = None,
    **keywords: Any,
) -> Run:
    """Make a model forget a subject or a document, of rows that it writes itself, as `alter forget` does.

    Args:
        subject: name of what to forget, such as "Harry Potter"; or give `document`.
        model: as in `unlearn`.
        document: file of a text to forget.
        retain: further rows that must not change.
        out: folder of the run.
        tokenizer: of a model in memory.
        settings: all settings in one object, which what else is given overrides.
        keywords: further settings of `alter.forgetting.settings.Forget`, such as `erase=True`.

    Returns:
        the run, whose `verdict` says whether it was forgotten, and whose `erased` is that of the plain weights, if they were
        asked for. With `rows_only` the folder holds the rows alone: give the same again with `resume=True` to train on them.

    Raises:
        UserError: bad settings or input, a subject that the model does not know, a folder in use.
    """
    from alter.forgetting import Forget as Kind
    from alter.forgetting import forget as run

    with contextlib.ExitStack() as stack:
        add_model(keywords, model, tokenizer, stack)
        add_rows(keywords, stack, retain=retain)
        given = {"subject": subject, "document": document, "out": out}
        keywords |= {name: value for name, value in given.items() if value is not None}
        chosen = settings_of(Kind, settings, keywords)
        stack.enter_context(as_library())
        return Run(run(chosen))


def guard(
    model: Any = None,
    *,
    forget: GivenRows | None = None,
    retain: GivenRows | None = None,
    out: str | PathLike[str] | None = None,
    tokenizer: Any = None,
    settings: MakeGuard | None = None,
    **keywords: Any,
) -> Path:
    """Make a guard, which catches at inference what a model should not answer, as `alter guard` does.

    Args:
        model: as in `unlearn`; nothing is trained in it.
        forget: rows to forget, for all kinds but alu.
        retain: rows to keep.
        out: folder for the guard.
        tokenizer: of a model in memory.
        settings: all settings in one object, which what else is given overrides.
        keywords: further settings of `alter.guarding.settings.MakeGuard`, such as `guard={"kind": "neurons"}`.

    Returns:
        its folder, which `load`, `evaluate` and `attack` take as `adapter`.

    Raises:
        UserError: bad settings, rows or models, or a folder in use.
    """
    from alter.guarding import MakeGuard as Kind
    from alter.guarding import make_guard

    with contextlib.ExitStack() as stack:
        add_model(keywords, model, tokenizer, stack)
        add_rows(keywords, stack, forget=forget, retain=retain)
        if out is not None:
            keywords["out"] = out
        chosen = settings_of(Kind, settings, keywords)
        stack.enter_context(as_library())
        return make_guard(chosen)


def finetune(
    model: Any = None,
    *,
    data: Sources | None = None,
    out: str | PathLike[str] | None = None,
    tokenizer: Any = None,
    settings: Finetune | None = None,
    callbacks: Sequence[Any] = (),
    **keywords: Any,
) -> Path:
    """Train a model on rows or on texts, as `alter finetune` does.

    Args:
        model: as in `unlearn`; or leave it out and give `architecture=`.
        data: rows, or a list of sources of rows, of which each may be in memory.
        out: folder of the new model.
        tokenizer: of a model in memory.
        settings: all settings in one object, which what else is given overrides.
        callbacks: transformers' TrainerCallback objects, called while it trains.
        keywords: further settings of `alter.training.finetune.Finetune`, such as `epochs=3`.

    Returns:
        the folder of the new model; with `lora_rank` that of its LoRA.

    Raises:
        UserError: bad settings, rows or models, a folder in use, a loss that is not finite.
    """
    from alter.models import check_callbacks
    from alter.training import Finetune as Kind
    from alter.training.finetune import finetune as train

    check_callbacks(callbacks)
    with contextlib.ExitStack() as stack:
        add_model(keywords, model, tokenizer, stack)
        add_sources(keywords, stack, data=data, tokenizer_texts=keywords.get("tokenizer_texts"))
        if out is not None:
            keywords["out"] = out
        chosen = settings_of(Kind, settings, keywords)
        stack.enter_context(as_library())
        return train(chosen, callbacks)


def export(
    model: Any = None,
    *,
    out: str | PathLike[str] | None = None,
    tokenizer: Any = None,
    settings: Export | None = None,
    **keywords: Any,
) -> Path:
    """Write a model as a GGUF file, or an adapter as plain LoRAs, as `alter export` does.

    Args:
        model: a `Run`, or a model as in `evaluate`.
        out: the file, or the folder for the LoRAs.
        tokenizer: of a model in memory.
        settings: all settings in one object, which what else is given overrides.
        keywords: further settings of `alter.exporting.run.Export`, such as `form="loras"` and `type="q8_0"`; `calibrate` may be rows.

    Returns:
        what was written.

    Raises:
        UserError: bad settings or models, a form that cannot hold the model, or something that is there already.
    """
    from alter.exporting import Export as Kind
    from alter.exporting import export as write

    with contextlib.ExitStack() as stack:
        add_subject(keywords, model, tokenizer, settings, stack)
        add_sources(keywords, stack, calibrate=keywords.get("calibrate"))
        if out is not None:
            keywords["out"] = out
        chosen = settings_of(Kind, settings, keywords)
        stack.enter_context(as_library())
        return write(chosen)
