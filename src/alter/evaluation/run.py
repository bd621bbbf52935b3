"""The commands that report: `evaluate`, `aggregate` and `generate`, each a table on screen and records on request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field

from alter.core import UserError, console, processes
from alter.data import Example, encode_prompt, read_rows
from alter.evaluation.added import check_added, in_files, with_added
from alter.evaluation.base import Evaluation, overheard, say
from alter.evaluation.closing import closing_of, show_closing
from alter.evaluation.tofu.logs import Aggregate, aggregate
from alter.inference import generate
from alter.models import ModelSettings
from alter.rendering import table
from alter.settings import OutFile, Seed, TemperatureOrZero, Tokens, check_outputs, shown
from alter.storage import (
    VERSION,
    Cached,
    Record,
    cache_folder,
    code_digest,
    file_digest,
    recall,
    remember,
    stamped,
    to_json,
    versions,
    write_atomic,
    write_records,
)


def show_records(
    records_by_model: Mapping[str, Sequence[Record]],
    path: str | None,
    title: str | None = None,
    *,
    printed: bool = True,
) -> None:
    """Print the table of records if `printed`, and write all records to `path` if one is given."""
    if printed:
        console.show(table(records_by_model, title))
    if path is not None and processes.first():
        write_records(path, [record for records in records_by_model.values() for record in records])
        console.show(f"records: {shown(path)}", stderr=True)


UNKEYED = {"name", "json_path", "cache", "model", "adapter", "device", "batch_size", "batch_tokens"}
"""Settings that are no part of a cache key: they change no number, or stand in it by contents or by kind."""


def cache_key(settings: Evaluation, identity: Mapping[str, str | None], data: str | None) -> dict[str, Any] | None:
    """Return everything that decides the numbers of an evaluation; None if a part of it cannot be known.

    That is: the benchmark and its settings (all but `UNKEYED`), digests of weights, tokenizer, adapter (`identity`) and
    data, the kind of device, the version of the metrics, this package's code, and the versions of the libraries.
    """
    if data is None or "unknown" in identity.values():
        return None
    return {
        "benchmark": type(settings).__name__,
        "settings": settings.model_dump(mode="json", exclude=UNKEYED),
        **identity,
        "data": data,
        "device": settings.place(),
        "metrics_version": VERSION,
        "code": code_digest(),
        "versions": versions(),
    }


def evaluate(settings: Evaluation) -> list[Record]:
    """Run `alter evaluate`: check the data, load the model, measure, print, write.

    A result that was measured before under the same `cache_key` is used again, and said so on stderr; it keeps the
    provenance of its measurement, only the name of the model is the one asked for. Several processes (`alter.core.processes`)
    share the scoring and the generating, each with a replica of the model; the first prints and writes.

    Raises:
        UserError: see the benchmark's `data_digest` and `measure`, and `ModelSettings.load`.
    """
    check_outputs(settings)
    with processes.together("Start the same command again.", settings.device):
        records = measured(settings)
        title = f"{settings.title()}: {settings.adapter or settings.model}"
        by_model = {name: [r for r in records if r.model == name] for name in dict.fromkeys(r.model for r in records)}
        closed = closing_of(records)
        if closed is not None and processes.first():
            show_closing(closed)
        show_records(by_model, settings.json_path, title, printed=closed is None)
    return records


def measured(settings: Evaluation) -> list[Record]:
    """Return the records of an evaluation, from the cache where it has them; the caller is inside `processes.together`.

    Raises:
        UserError: see `evaluate`.
    """
    check_added()
    data = settings.data_digest()
    folder = cache_folder(settings.cache)
    identity = processes.from_first(lambda: settings.identity(folder))
    key = None if folder is None or not in_files(settings) else cache_key(settings, identity, data)
    found = processes.from_first(lambda: recall(folder, key) if folder is not None and key is not None else None)
    if found is None:
        model, tokenizer = settings.load()
        with overheard() as notes:
            records = with_added(settings, model, tokenizer, settings.measure(model, tokenizer))
        if not processes.from_first(lambda: _is_still(settings, identity, folder)):
            say(
                [
                    "The model's files changed while it was measured: these numbers may be of the old files or of the new ones."
                ]
            )
            identity, key = dict.fromkeys(identity, "unknown"), None
        records = stamped(
            records,
            settings=settings.model_dump(mode="json", exclude={"json_path", "cache"}),
            seed=settings.seed,
            **identity,
            data=data,
            device=settings.place(),
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        )
        if folder is not None and key is not None and processes.first():
            remember(folder, key, Cached(records, notes, settings.label))
    else:
        measured = found.records[0].provenance.get("measured") if found.records else None
        say([f"A result of {measured}, of the same model, data, settings and code; `cache` off measures again."])
        say(found.notes)
        records = [
            replace(record, model=settings.label) if record.model == found.subject else record
            for record in found.records
        ]
    return records


def _is_still(settings: Evaluation, identity: Mapping[str, str | None], memo: Path | None) -> bool:
    try:
        return settings.identity(memo) == identity
    except (UserError, OSError):
        return False


class AggregateLogs(Aggregate):
    """TOFU's numbers from per-item logs that somebody published."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    json_path: OutFile = None
    """File for the records."""


def aggregate_logs(settings: AggregateLogs) -> list[Record]:
    """Run `alter aggregate`: read the logs, print the figures, write the records.

    Raises:
        UserError: see `aggregate`.
    """
    check_outputs(settings)
    records = stamped(
        aggregate(settings.log, settings.retain, mode=settings.mode, name=settings.name),
        settings=settings.model_dump(mode="json", exclude={"json_path"}),
        data=[file_digest(path) for path in (settings.log, settings.retain) if path is not None],
    )
    show_records({records[0].model: records}, settings.json_path, f"TOFU from {Path(settings.log).name}")
    return records


class Generate(ModelSettings):
    """Answer prompts with a model and an adapter, routing active."""

    prompt: list[str] = Field(default_factory=list)
    """Questions, as many as you like."""
    file: str | None = None
    """JSON or JSONL file with a column "question" or "prompt", instead of `prompt`."""
    max_new_tokens: Tokens = Field(200, ge=1)
    """Longest answer, in tokens."""
    temperature: TemperatureOrZero = 0.0
    """0 decodes greedily; above it answers are sampled."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Share of the probability that sampling keeps."""
    seed: Seed = 0
    """Seed of the sampling."""
    json_path: OutFile = None
    """File for the answers: a list of {"prompt", "answer"}."""


def answer_prompts(settings: Generate) -> list[str]:
    """Run `alter generate`: print, and with --json write, one answer per prompt; several processes share the prompts.

    Raises:
        UserError: no prompt, rows without a question, or what `ModelSettings.load` raises.
    """
    with processes.together("Start the same command again.", settings.device):
        return _generate(settings)


def _generate(settings: Generate) -> list[str]:
    check_outputs(settings)
    prompts = list(settings.prompt)
    if settings.file is not None:
        for number, row in enumerate(read_rows(settings.file)):
            text = row.get("question", row.get("prompt"))
            if not text:
                raise UserError(
                    f"Row {number} of {settings.file} has neither question nor prompt; it has {', '.join(row)}."
                )
            prompts.append(str(text))
    if not prompts:
        raise UserError('Nothing to answer: give `prompt` "..." or `file` rows.jsonl.')
    model, tokenizer = settings.load()
    torch.manual_seed(settings.seed)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p}
        if settings.temperature > 0
        else {}
    )
    ids = [encode_prompt(tokenizer, Example(prompt=text, answer="", kind="qa")) for text in prompts]
    answers = generate(model, tokenizer, ids, max_new_tokens=settings.max_new_tokens, **sampling)

    for text, answer in zip(prompts, answers, strict=True):
        console.show(text, style="dim", markup=False, highlight=False)
        console.show(answer, markup=False, highlight=False)
    if settings.json_path is not None and processes.first():
        pairs = [{"prompt": text, "answer": answer} for text, answer in zip(prompts, answers, strict=True)]
        write_atomic(settings.json_path, to_json(pairs))
    return answers
