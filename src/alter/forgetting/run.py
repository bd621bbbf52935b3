"""`alter forget`: from a subject or a document to an adapter, or to weights that no longer know, and what changed."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from alter.core import forked, give_back, is_silent, warn
from alter.data import Example, check_overlap, load_examples, rows_about
from alter.distillation import Distill, distill
from alter.evaluation import ordinary_loss, refuse_missed
from alter.evaluation import ordinary_sentence as told_of_ordinary
from alter.forgetting.documents import Document, read_document
from alter.forgetting.folder import (
    ERASED,
    FILES,
    SAID_FOLDER,
    output_folder,
    zero_figures,
)
from alter.forgetting.making import identity_of, loaded, material_of
from alter.forgetting.material import Material
from alter.forgetting.measure import Outcome, against_zero
from alter.forgetting.names import names_of
from alter.forgetting.probes import answered, question_of
from alter.forgetting.report import print_line, print_outcome
from alter.forgetting.retention import kept_rows
from alter.forgetting.settings import DOCUMENT, TRAINING, Forget
from alter.forgetting.speaker import Speaker, read_jsonl, write_jsonl
from alter.forgetting.stopping import UntilZero
from alter.models import load_model
from alter.storage import folder_digest, read_object, to_json, undone_if_refused, write_atomic
from alter.training import Unlearn, unlearn

ERASING_CHECKS = 4
"""Checks in a pass of the erasing over the forget rows, before whose end it does not stop."""
CHECKS = 1
"""Checks in a pass over the forget rows."""
PASSES = 4
"""Passes over the rows about a subject before training may end: after two, other questions and answers that begin otherwise still
come to the facts."""
DOCUMENT_PASSES = 2
"""The same over a document, whose rows are asked for as they were learned."""


def command(settings: Forget) -> Path:
    """Run `alter forget`: `forget`, which says what to type next, and the verdict as an exit status.

    Raises:
        UserError: see `forget`.
        Finding: it was not forgotten, or the answers have collapsed.
    """
    with forked.allowed():
        out = forget(settings)
    if not settings.rows_only:
        refuse_missed(read_object(out / "report.json", "what alter forget wrote")["verdict"], out)
    return out


def forget(settings: Forget) -> Path:
    """Make rows, train, measure, and print what changed.

    The folder holds, as JSON lines that `alter unlearn` reads, `forget.jsonl`, `retain.jsonl` and `invented.jsonl`; the
    probes with the answers before and after in `probes.jsonl` and `kept.jsonl`; `facts.jsonl`; and what `alter unlearn`
    writes (`adapter/`, run.yaml, run.json). With `erase` also what `alter distill` writes, in `erased/`, and the answers after
    are those of the weights there.

    Returns:
        the run's folder.

    Raises:
        UserError: bad settings or input, a subject that the model does not know, or what `unlearn` refuses.
    """
    console = Console(quiet=is_silent())
    started = time.time()
    out = output_folder(settings)
    retain = kept_rows(settings.retain)
    document = None if settings.document is None else read_document(settings.document, settings.max_passages)
    if settings.retain is not None:
        _check_kept(settings, load_examples(settings.retain), document)
    name = settings.subject if settings.subject is not None else Path(str(settings.document)).name
    with undone_if_refused(out):
        material, tokenizer = material_of(settings, console, out, name, document, retain)
    known = sum(answered(probe["before"], probe) for probe in material.probes)
    facts = ", ".join(str(row["word"]) for row in material.facts[:12])
    # of a document these are its own words, known or not
    what = "What the model knows" if document is None else "What the document is asked for"
    print_line(
        console,
        f"{what}: {facts}. {len(material.forget)} rows to forget, {len(material.retain)} to keep, "
        f"{len(material.probes)} probes, of which it answers {known} ({time.time() - started:.0f} s).",
    )
    if settings.rows_only:
        print_line(console, f"The rows lie in {out}. Read and edit them, then give the same command with `resume`.")
        return out
    rows_done = time.time()
    print_line(console, "2/3 training")
    # a run that has ended compares what it began with, and does no more
    _train(settings, out, tokenizer, material)
    give_back()
    trained = time.time()
    if settings.erase:
        print_line(console, "2/3 plain weights learn to say what the model with the adapter says")
        _erase(settings, out, tokenizer, material)
        give_back()
    erased = time.time()
    print_line(console, "3/3 the probes again" + (", asked of the erased weights" if settings.erase else ""))
    figures = _measured(settings, console, out, name, material)
    figures["seconds"] = {
        "rows": round(rows_done - started, 1),
        "train": round(trained - rows_done, 1),
        **({"erase": round(erased - trained, 1)} if settings.erase else {}),
        "measure": round(time.time() - erased, 1),
    }
    # whose figures these are, for a page about one of them
    figures["weights"] = folder_digest(out / ERASED / "model" if settings.erase else out / "adapter")
    write_atomic(out / "report.json", to_json(figures))
    took = {"rows": "rows", "train": "training", "erase": "erasing", "measure": "measuring"}
    parts = ", ".join(f"{took[part]} {seconds:.0f}" for part, seconds in figures["seconds"].items())
    print_line(console, f"All of it took {time.time() - started:.0f} s ({parts}).")
    if not console.quiet:
        print_line(console, _next(settings, out))
    return out


def _check_kept(settings: Forget, kept: Sequence[Example], document: Document | None) -> None:
    """Refuse rows to keep that are in the document; say which of them name the subject.

    Raises:
        UserError: rows are in both.
    """
    if document is not None:
        # training refuses it too, when the rows are made; of a text the whole: what letters have in common (a footer) may stand in both
        whole = Example(None, " ".join(document.passages), "text", place=str(settings.document))
        check_overlap([*document.exchanges, whole], kept)
        return
    named = rows_about(str(settings.subject), kept)
    if named:
        warn(
            f"{len(named)} of the rows of `retain` name {settings.subject} (first {named[0].name}): they would keep what is to be forgotten. Take "
            "them out, unless they are about another one of that name."
        )


def _next(settings: Forget, out: Path) -> str:
    """Return the commands to suggest next."""

    def at(*parts: str) -> str:
        return shlex.quote(str(out.joinpath(*parts)))

    model = shlex.quote(settings.model)
    if settings.erase:
        plain = at(ERASED, "model")
        return (
            f"Next:\n  alter chat --model {plain}\n  alter attack --model {plain} --original {model} --forget "
            f"{at('forget.jsonl')} --out {at('attacks')}\n  alter export --model {plain} --out {shlex.quote(f'{out.name}-q8_0.gguf')}"
        )
    adapter = at("adapter")
    return (
        f"Next:\n  alter report {shlex.quote(str(out))}\n  alter inspect --model {model} --adapter {adapter}\n"
        f"  alter chat --model {model} --adapter {adapter}\n"
        f"  edit {at('forget.jsonl')} and {at('retain.jsonl')}, then `alter unlearn {at('run.yaml')} --out ANOTHER`"
    )


def _train(settings: Forget, out: Path, tokenizer: Any, material: Material) -> None:
    """Train on the rows until the probes no longer tell the subject from an invented one."""
    run = training(settings, out)
    one_pass = math.ceil(len(material.forget) / (run.batch_size * run.gradient_accumulation_steps))
    every = max(1, round(one_pass / CHECKS))
    passes = PASSES if settings.document is None else DOCUMENT_PASSES
    unlearn(
        run,
        callbacks=[
            UntilZero(
                tokenizer,
                material.probes,
                out / "checks.jsonl",
                every,
                passes * one_pass,
                document=settings.document is not None,
                **_asked(settings, material),
            )
        ],
    )


def _asked(settings: Forget, material: Material) -> dict[str, Any]:
    """Return what `UntilZero` asks before it ends: the questions about the subject that are trained on, and its names."""
    if settings.subject is None:
        return {}
    about = [
        str(row["question"]) for row in material.forget if row.get("about") == settings.subject and "question" in row
    ]
    return {"questions": [*dict.fromkeys(about)], "names": names_of(settings.subject, material.facts)}


def _erase(settings: Forget, out: Path, tokenizer: Any, material: Material) -> None:
    """Distil the adapter into plain weights, until the probes no longer tell the subject from an invented one."""
    student = erasing(settings, out, material)
    one_pass = math.ceil(len(material.forget) * (1 + student.rewordings) / student.batch_size)
    every = max(1, one_pass // ERASING_CHECKS)
    distill(
        student,
        [
            UntilZero(
                tokenizer,
                material.probes,
                out / ERASED / "checks.jsonl",
                every,
                one_pass,
                document=settings.document is not None,
                **_asked(settings, material),
            )
        ],
    )


def _measured(settings: Forget, console: Console, out: Path, name: str, material: Material) -> dict[str, Any]:
    """Answer the probes with the result, print what changed, and return the figures."""
    model, tokenizer = _result(settings, out)
    outcome, after = _again(model, tokenizer, out, settings, material)
    before = read_object(out / "zero.json", "what alter forget wrote")["before"]
    names = [str(row["word"]) for row in material.facts if row.get("name")]
    base = loaded(settings)[0] if settings.erase else None
    with nullcontext() if base is not None else model.disable_adapter():
        perplexity = outcome.read_by(model if base is None else base, tokenizer)
    figures = print_outcome(
        console,
        name,
        outcome,
        names,
        before,
        after,
        settings.examples,
        perplexity,
        settings.document is not None,
        _ended(out / ERASED if settings.erase else out),
    )
    figures["ordinary_loss"] = ordinary_loss(model, tokenizer, load_examples(str(out / FILES["forget"])), base)
    print_line(console, told_of_ordinary(figures["ordinary_loss"]))
    return figures


def _ended(out: Path) -> bool:
    """Tell whether a check ended the training in a folder, before its last pass."""
    checks = read_jsonl(out / "checks.jsonl") if (out / "checks.jsonl").is_file() else []
    return bool(checks and checks[-1].get("done"))


def training(settings: Forget, out: Path) -> Unlearn:
    """Return the settings of the run that trains on the rows of `out`."""
    document = dict(DOCUMENT) if settings.document is not None else {}
    if settings.epochs < TRAINING["epochs"]:
        # who asks for fewer passes gets no more
        document.pop("least_steps", None)
    return Unlearn.model_validate(
        {
            **TRAINING,
            **document,
            "model": settings.model,
            "forget": str(out / "forget.jsonl"),
            "retain": str(out / "retain.jsonl"),
            "out": str(out),
            "epochs": settings.epochs,
            "learning_rate_experts": settings.learning_rate,
            "dtype": settings.dtype,
            "seed": settings.seed,
            "device": settings.device,
            "chat_template_kwargs": settings.chat_template_kwargs,
            "report_to": settings.report_to,
            "resume": True,
        }
    )


def erasing(settings: Forget, out: Path, material: Material) -> Distill:
    """Return the settings that distil `out`'s adapter, resuming an interrupted distillation.

    Of a subject only what is computed where it or a name of its own stands is changed; a document has no names.
    """
    begun = (out / ERASED / "inputs.json").is_file()
    return Distill(
        model=settings.model,
        adapter=str(out / "adapter"),
        forget=str(out / FILES["forget"]),
        retain=str(out / FILES["retain"]),
        out=str(out / ERASED),
        closing_rows=0,
        seed=settings.seed,
        device=settings.device,
        chat_template_kwargs=settings.chat_template_kwargs,
        resume=begun,
        overwrite=not begun,
        names=[] if settings.subject is None else names_of(settings.subject, material.facts),
        epochs=settings.erasing.epochs or (3.0 if settings.subject is None else 1.5),
        **settings.erasing.model_dump(exclude={"epochs"}),
    )


def _result(settings: Forget, out: Path) -> tuple[Any, Any]:
    """Load the result: the model with the adapter, or the erased weights."""
    if not settings.erase:
        return loaded(settings, str(out / "adapter"))
    plain = str(out / ERASED / "model")
    return load_model(plain, None, settings.dtype, settings.device, template=settings.chat_template_kwargs)


def _again(
    model: Any, tokenizer: Any, out: Path, settings: Forget, material: Material
) -> tuple[Outcome, dict[str, Any]]:
    speaker = Speaker(
        model,
        tokenizer,
        out / SAID_FOLDER / (ERASED if settings.erase else "after"),
        tokens=settings.answer_tokens,
        batch=settings.batch_size,
        seed=settings.seed,
        identity=identity_of(settings, str(out / ERASED / "model"))
        if settings.erase
        else identity_of(settings, settings.model, str(out / "adapter")),
    )
    for rows, label in ((material.probes, "probes"), (material.kept_probes, "probes of what is kept")):
        answers = speaker.say(label, [question_of(row) for row in rows])
        for row, answer in zip(rows, answers, strict=True):
            row["after"] = answer
    write_jsonl(out / FILES["probes"], material.probes)
    write_jsonl(out / FILES["kept_probes"], material.kept_probes)
    zero = against_zero(model, tokenizer, material.probes, [])
    return Outcome(material.probes, material.kept_probes), {} if zero is None else zero_figures(zero, material.probes)
