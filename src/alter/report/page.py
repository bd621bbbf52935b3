"""`alter report`: one HTML page about runs, for the engineer and for the person who asked for the erasure.

The page is one file that fetches nothing and runs no script; `alter.markup` escapes every text that it shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tyro
import yaml
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console

from alter.core.errors import UserError, nearest
from alter.core.files import folder_digest, from_json, write_atomic
from alter.core.provenance import commit, versions
from alter.core.records import Record, read_records
from alter.evaluation.rows import closing_of, others_named
from alter.evaluation.verdict import BROKEN, FIRM, broken, gives
from alter.metrics import CATALOGUE
from alter.reporting.markup import Html, document, grid, histogram, join, lines, marked, percent, tag
from alter.reporting.terminal import ARROWS, in_order, number

ROLES = ("original", "unlearned", "retrained")
"""What records call the three models; a name given with --name gets a column, and no part in the summary."""
SLACK = 0.05
"""How far above the retrained model's a ROUGE-L may lie and still count as forgotten."""
QUALITY = 0.05
"""Forget quality (a p-value) from which the model counts as not told apart from the retrained one."""
UTILITY = 0.97
"""Share of the original's utility below which the page calls the cost noticeable."""
RECOVERED = 0.05
"""Share of what was removed from which an attack counts, if its 95 % interval lies above zero."""
SAID = {
    "forget_rouge": ("Asked about what was to be forgotten", "true answers", "questions"),
    "knowmem_forget": ("Asked about what was to be forgotten", "true answers", "questions"),
    "verbmem": ("Given the beginning of a passage that was to be forgotten", "true continuations", "passages"),
    "book_rouge": ("Given the beginning of a passage that was to be forgotten", "true continuations", "passages"),
}
"""Metrics that say how much of the truth a model still says: the situation, what it is compared with, what is
counted."""
KEPT = {
    "model_utility": "the utility of the original model on everything else (nine figures in one)",
    "knowmem_retain": "the original model's agreement with the true answers about what was to be kept",
    "retain_rouge": "the original model's agreement with the true answers about what was to be kept",
    "retain_accuracy": "the original model's accuracy on the texts to keep",
}
"""Metrics that say what is left of the rest, best first, in words."""
SAMPLED = ("forget_rouge", "knowmem_forget", "verbmem", "book_bleu")
"""Metrics whose records hold what the models said."""
LONGEST = 1200
"""Characters of a text that the page shows; the differences are those of the part shown."""
EXPERTS = 40
"""Experts with a line of their own."""
ADAPTER = (
    "The forgetting is done by an adapter, a part added to the model. It does not remove knowledge from the base "
    "model: whoever holds the base weights holds the knowledge, and switching the adapter off brings back every answer."
)

WEIGHTS = (
    "All weights of the model were changed. Nothing keeps the forgotten apart from the rest, so it cannot be switched "
    "back on, nor taken back for one request alone. The base model, wherever it still lies, holds the knowledge."
)

Array = npt.NDArray[np.float64]


# Settings ------------------------------------------------------------------------------------------------------------


class Report(BaseModel):
    """Write one HTML page about one or several runs: figures, samples, curves, attacks, requests, provenance."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    runs: tyro.conf.Positional[list[str]] = Field(default_factory=list)
    """Folders of runs, as `alter unlearn` or `alter demo` wrote them."""
    out: str = "report.html"
    """The page."""
    records: list[str] = Field(default_factory=list)
    """Result files (--json). They go to the run whose adapter they measured and replace its records.json's figures."""
    attacks: list[str] = Field(default_factory=list)
    """Folders of attacks (`alter attack --out`)."""
    db: str | None = None
    """Database of erasure requests, as an SQLAlchemy URL."""
    request: list[str] = Field(default_factory=list)
    """Only these of its requests, each with its history; by default all. Whoever asked need not read of the others."""
    samples: int = Field(6, ge=0)
    """Questions to show with all answers. They quote what was to be forgotten; 0 leaves them out."""
    title: str | None = None
    """Heading of the page."""


# What is reported ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """What a run's frozen.safetensors says of the tokens that it trained on, forget rows before retain rows.

    `entropy` [T], infinite at each row's first token; `gates` [T, N + 1]; `forget` of the T tokens belong to forget
    rows, or None where that is not known, and then `why` says so.
    """

    entropy: Array
    gates: Array
    forget: int | None
    why: str = ""

    def parts(self) -> dict[str, slice]:
        """Which tokens belong to which set."""
        if self.forget is None:
            return {"all rows": slice(None)}
        found = {"forget rows": slice(None, self.forget), "retain rows": slice(self.forget, None)}
        return {name: part for name, part in found.items() if len(self.entropy[part])}


@dataclass
class Run:
    """One run with all that was measured of it; `folder` is None if there are records alone.

    `kind` is what it wrote, an adapter or, where all weights were trained, a model; `digest` that folder's.
    """

    name: str
    folder: Path | None = None
    written: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    kind: Literal["adapter", "model"] = "adapter"
    digest: str | None = None
    tokens: Tokens | None = None
    records: list[Record] = field(default_factory=list)
    attacks: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def get(self, model: str, metric: str) -> Record | None:
        """The record of one model and metric that has a value, the strict one if there are several."""
        found = [r for r in self.records if (r.model, r.metric) == (model, metric) and r.value is not None]
        return min(found, key=lambda r: r.mode != "strict", default=None)

    def value(self, model: str, metric: str) -> float | None:
        """Its value, or None."""
        record = self.get(model, metric)
        return None if record is None else record.value


def _siblings(path: Path) -> list[str]:
    return [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []


def read_run(given: str) -> Run:
    """Read the folder of a run.

    Raises:
        UserError: it is none, the run did not end, or its files are broken or of another version.
    """
    folder = Path(given)
    if folder.is_file():
        raise UserError(f"{given} is a file, not the folder of a run; result files are given with --records.")
    if not folder.is_dir():
        raise UserError(f"No run at {given}.{nearest(given, _siblings(folder))}")
    if not (folder / "run.yaml").is_file():
        what = " It holds records of attacks: give it with --attacks." if any(folder.glob("none.*.json")) else ""
        raise UserError(f"{given} is no run: it has no run.yaml, which `alter unlearn` and `alter demo` write.{what}")
    try:
        written = (folder / "run.yaml").read_text()
        facts = from_json((folder / "run.json").read_text())
        settings, log = facts["settings"], facts["log"]
        needed = {name: facts[name] for name in ("domains", "experts", "router", "steps", "seconds", "provenance")}
        needed |= {name: facts["provenance"][name] for name in ("measured", "versions", "python", "machine")}
        wrong = not isinstance(settings, dict) or not isinstance(log, list) or not isinstance(needed["seconds"], dict)
    except FileNotFoundError:
        raise UserError(
            f"The run in {given} has not ended: it has no run.json. `alter unlearn {given}/run.yaml --resume` goes on."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{given}/run.json is broken or of another version ({what}): run it again.") from None
    if wrong:
        raise UserError(f"{given}/run.json is not what `alter unlearn` writes: run it again.")
    kind: Literal["adapter", "model"] = "adapter" if (folder / "adapter").is_dir() else "model"
    if not (folder / kind).is_dir():
        raise UserError(f"{given} has no adapter any more, so there is nothing to report about: run it again.")
    run = Run(folder.resolve().name, folder, written, settings, facts, kind, folder_digest(folder / kind))
    if facts["router"] and (folder / "frozen.safetensors").is_file():
        run.tokens = read_tokens(folder / "frozen.safetensors", settings)
    return run


def read_tokens(path: Path, settings: Mapping[str, Any]) -> Tokens:
    """Read entropies and gates from what `frozen.store` wrote.

    A run that has ended says there how many of the rows are forget rows. In what others left they are as many as the run used of its forget set (twice as many if
    its objective also trains on other answers), so that set is counted, if it is on this machine; a run that used no
    retain rows has no others.

    Raises:
        UserError: the file is broken, or the settings are of another version.
    """
    from safetensors import SafetensorError, safe_open

    from alter.training.settings import Unlearn, branch_needs

    try:
        with safe_open(str(path), "np") as file:
            entropy, gates, lengths = (file.get_tensor(name) for name in ("entropy", "gates", "entropy.count"))
            noted = int(file.get_tensor("forget_rows")) if "forget_rows" in file.keys() else None  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is broken ({error}): delete it, and the report goes without entropies.") from None
    try:
        run = Unlearn.model_validate(settings)
    except ValueError as error:
        raise UserError(f"{path.parent}/run.json: {' '.join(str(error).split())}") from None
    if noted is not None:
        return Tokens(entropy.astype(np.float64), gates.astype(np.float32), int(lengths[:noted].sum()))
    forget, alternative, retain = (needs.rows for needs in branch_needs(run))
    rows, why = (len(lengths), "") if not retain else _count(run.forget, run.epochs)
    if rows is not None and retain:
        rows *= forget + alternative
        if rows > len(lengths):
            rows, why = None, f"{run.forget} has more rows now than the run has seen"
    tokens = None if rows is None else int(lengths[:rows].sum())
    return Tokens(entropy.astype(np.float64), gates.astype(np.float32), tokens, why)


def _count(source: str, epochs: float) -> tuple[int | None, str]:
    """How many forget rows a run used, or why that is not known; nothing is fetched for it."""
    base = source.rpartition(":")[0]
    if not source.startswith("builtin:") and not Path(source).exists() and not (base and Path(base).exists()):
        return None, f"the forget set {source} is not on this machine"
    from alter.data.examples import load_examples

    try:
        total = len(load_examples(source))
    except UserError as error:
        return None, str(error).rstrip(".")
    # a run of less than one pass sees a part of the set
    return min(total, math.ceil(epochs * total)), ""


def owners(path: str, records: Sequence[Record], runs: Sequence[Run]) -> list[Run]:
    """Return the runs that records belong to: those whose adapter or model they measured; all if they measured none.

    Raises:
        UserError: they measured another adapter, or it cannot be told which of several.
    """
    if all(run.folder is None for run in runs):
        return list(runs)
    loaded = {str(r.provenance.get(kind)) for r in records for kind in ("adapter", "weights")}
    found = [run for run in runs if run.digest in loaded]
    adapters = sorted({str(r.provenance["adapter"]) for r in records if r.provenance.get("adapter")})
    if len(adapters) > 1:
        raise UserError(f"{path} holds figures of {len(adapters)} adapters: give a file for each.")
    if adapters and not found:
        known = ", ".join(f"{run.folder}: {run.digest}" for run in runs)
        raise UserError(
            f"{path} measured another adapter ({adapters[0]}) than that of the report ({known}): evaluate again, or "
            "leave it out."
        )
    if not found and len(runs) > 1 and any(r.model == "unlearned" for r in records):
        raise UserError(f"{path} does not say which adapter it measured: report on its run alone.")
    return found or list(runs)


def add_records(run: Run, path: str, records: Sequence[Record], *, replace: bool) -> None:
    """Give records to a run; a figure that it has already must be equal, unless it may be replaced.

    Raises:
        UserError: two files hold different figures of the same thing, or records that are no figures of an evaluation.
    """
    known = {(r.model, r.metric, r.mode): r for r in run.records}
    for record in records:
        if record.metric.startswith("attack_"):
            raise UserError(f"{path} holds records of attacks: give its folder with --attacks.")
        old = known.get((record.model, record.metric, record.mode))
        if old is not None and not replace and (old.value, old.n) != (record.value, record.n):
            raise UserError(
                f"{path} and a file before it hold different figures of {record.metric} of the model "
                f"{record.model!r} ({number(record)} and {number(old)}): give one of them, or name the models apart "
                "with `alter evaluate --name retrained`."
            )
        known[record.model, record.metric, record.mode] = record
    run.records = list(known.values())


def read(settings: Report) -> list[Run]:
    """Read runs, records and attacks, and bring them together.

    Raises:
        UserError: see `read_run`, `owners`, `add_records`, and `records.read_records`.
    """
    folders = {Path(given).resolve(): given for given in settings.runs}
    runs = [read_run(given) for given in folders.values()]
    for i, run in enumerate(runs):
        if sum(other.name == run.name for other in runs) > 1:
            runs[i].name = str(run.folder)
    if not runs and (settings.records or settings.attacks):
        runs = [Run(settings.title or "Results")]
    inside: dict[tuple[int, str, str], str] = {}
    for run in runs:
        own = run.folder / "records.json" if run.folder else None
        if own is not None and own.is_file():
            found = read_records(own)
            owners(str(own), found, [run])
            add_records(run, str(own), found, replace=False)
            inside |= {(id(run), r.model, r.metric): str(own) for r in found}
    given: dict[int, list[Record]] = {}
    for path in settings.records:
        found = read_records(path)
        for run in owners(path, found, runs):
            # among the files given, none replaces another
            check = Run(run.name, records=given.get(id(run), []))
            add_records(check, path, found, replace=False)
            given[id(run)] = check.records
            replaced = [r for r in found if (id(run), r.model, r.metric) in inside]
            if replaced:
                run.notes.append(f"{path} replaces {len(replaced)} figures of the run's own records.json.")
            add_records(run, path, found, replace=True)
    for folder in settings.attacks:
        path = str(Path(folder) / "records.json")
        if not Path(path).is_file():
            raise UserError(f"{folder} has no records.json; expected the --out folder of `alter attack`.")
        found = read_records(path)
        if not any(r.metric.startswith("attack_") for r in found):
            raise UserError(f"{path} holds no attacks; expected the --out folder of `alter attack`.")
        for run in owners(path, found, runs):
            run.attacks += found
    return runs


# Numbers -------------------------------------------------------------------------------------------------------------


def shares(values: npt.ArrayLike, edges: npt.ArrayLike) -> Array:
    """Return which share of the finite values lies in each bin, [bins]; the last bin holds its upper edge.

    Args:
        values: [n]; those that are not finite do not count.
        edges: rising borders, [bins + 1]; every finite value lies within.
    """
    given = np.asarray(values, dtype=np.float64)
    finite = given[np.isfinite(given)]
    counts, _ = np.histogram(finite, np.asarray(edges, dtype=np.float64))
    return counts / max(len(finite), 1)


def routed(gates: npt.ArrayLike) -> Array:
    """Return each expert's share of the tokens, [N + 1], which sums to 1.

    Args:
        gates: [T, N + 1] weights of the experts, not negative. A token that several experts serve counts for each by
            its part of the token's weight; one that none serves, a row of zeros, counts for none.
    """
    weight = np.asarray(gates, dtype=np.float64)
    total = weight.sum(axis=1, keepdims=True)
    parts = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    return parts.sum(axis=0) / max(int((total > 0).sum()), 1)


# Sections ------------------------------------------------------------------------------------------------------------

Verdict = Literal["yes", "partly", "no", "collapsed", "unknown"]
VERDICTS: dict[Verdict, str] = {
    "yes": "Yes, by these measures.",
    "partly": "It no longer says it, but it can be told apart from a model that never saw it.",
    "no": "No, not as a model that never saw it would have.",
    "collapsed": "No: it no longer says it, because it no longer answers in sentences.",
    "unknown": "That was not measured against a model that never saw it.",
}


def verdict(run: Run) -> Verdict:
    """Return whether a run made its model forget.

    "yes": in every figure of `SAID` that was measured, at most `SLACK` above the retrained model, and a forget quality
    of at least `QUALITY` where there is one; "partly" if only the forget quality is below; "unknown" without either, and
    where the original model is as near to the retrained one (`blind`). What `alter.evaluation.verdict` found of the same
    adapter, or counts of the replies themselves, can make it worse, never better: "no" if it found NOT FORGOTTEN,
    "collapsed" if `BROKEN` of the replies, beyond the original's, are broken or empty.
    """
    closed = closing_of(run.records)
    word = None if closed is None else closed["verdict"]["word"]
    if word == "not forgotten":
        return "no"
    counts, other = reply_counts(run, "unlearned"), reply_counts(run, "original")
    if word == "collapsed" or (
        counts is not None and counts.broken / counts.n >= BROKEN + (0.0 if other is None else other.broken / other.n)
    ):
        return "collapsed"
    if blind(run):
        return "unknown"
    pairs = [(run.value("unlearned", metric), run.value("retrained", metric)) for metric in SAID]
    silent = [mine <= other + SLACK for mine, other in pairs if mine is not None and other is not None]
    quality = run.value("unlearned", "forget_quality")
    if not silent and quality is None:
        return "unknown"
    if not all(silent):
        return "no"
    if quality is not None and quality < QUALITY:
        return "partly" if silent else "no"
    return "yes"


def blind(run: Run) -> list[str]:
    """The figures of `SAID` that cannot tell the original model from the retrained one: the two differ by `SLACK` or less."""
    found = []
    for metric in SAID:
        before, honest = run.value("original", metric), run.value("retrained", metric)
        if before is not None and honest is not None and before <= honest + SLACK:
            found.append(metric)
    return found


@dataclass(frozen=True)
class Counts:
    """Of `n` replies of a model `broken` are broken or empty; of the `asked` that can be judged `said` give the answer."""

    said: int
    asked: int
    broken: int
    n: int


def reply_counts(run: Run, model: str) -> Counts | None:
    """Count a model's replies about what was to be forgotten, where the records hold them or their counts."""
    said, unusable = run.get(model, "forget_said"), run.get(model, "forget_unusable")
    if said is not None and unusable is not None:
        given, bad = round((said.value or 0.0) * said.n), round((unusable.value or 0.0) * unusable.n)
        return Counts(given, said.n, bad, unusable.n)
    for metric in ("forget_rouge", "knowmem_forget"):
        record = run.get(model, metric)
        if record is not None and record.extra.get("generations"):
            replies = [str(reply) for reply in record.extra["generations"]]
            asked = [str(text) for text in record.extra.get("questions") or [""] * len(replies)]
            truths = [str(text) for text in record.extra["references"]]
            told = [gives(*row) for row in zip(asked, truths, replies, strict=True)]
            bad = sum(broken(reply) or not reply.strip() for reply in replies)
            return Counts(told.count(True), len(told) - told.count(None), bad, len(replies))
    return None


def rows_behind(run: Run) -> int:
    """The most rows that any figure of the verdict is of."""
    found = [run.get("unlearned", metric) for metric in (*SAID, "forget_quality", "forget_said")]
    return max((record.n for record in found if record is not None), default=0)


def _forgotten(run: Run) -> list[object]:
    found: list[object] = []
    counts, other = reply_counts(run, "unlearned"), reply_counts(run, "original")
    if counts is not None:
        was = (
            ""
            if other is None
            else f" (the original model: {other.said} of {other.asked}, {other.broken} of {other.n})"
        )
        found.append(
            f"{counts.said} of {counts.asked} answers still give the name or fact that was asked for; {counts.broken} of "
            f"{counts.n} are broken or empty{was}."
        )
    closed = closing_of(run.records)
    if closed is not None:
        found.append(f"Measured at the end: {closed['verdict']['word'].upper()}. {' '.join(closed['verdict']['why'])}")
        named = others_named(closed)
        if named is not None:
            found.append(named)
    for metric in blind(run):
        found.append(
            f"{metric} cannot tell the original model from the retrained one, with so few rows or such rows: it says "
            "nothing about forgetting."
        )
    for metric, (situation, truth, counted) in SAID.items():
        after = run.get("unlearned", metric)
        if after is None or after.value is None:
            continue
        before, honest = run.value("original", metric), run.value("retrained", metric)
        says = [f"the original model agreed with the {truth} by {percent(before)}"] if before is not None else []
        says.append(f"the unlearned model agrees with the {truth} by {percent(after.value)}")
        says += [f"a model that never saw them by {percent(honest)}"] if honest is not None else []
        listed = ", ".join(says[:-1]) + (" and " if len(says) > 1 else "") + says[-1]
        found.append(f"{situation}, {listed} (ROUGE-L over {after.n} {counted}).")
    quality = run.get("unlearned", "forget_quality")
    if quality is not None and quality.value is not None:
        told = "not told apart" if quality.value >= QUALITY else "told apart"
        found.append(
            f"By a statistical test on {quality.n} questions it is {told} from a model that was trained without the "
            f"data (forget quality: p = {number(quality)}; from {QUALITY} on it counts as not told apart)."
        )
    if not found:
        found.append("No figure says so.")
    return found


def _cost(run: Run) -> list[object]:
    found: list[object] = []
    for metric, words in KEPT.items():
        before, after = run.value("original", metric), run.value("unlearned", metric)
        if before and after is not None:
            share = after / before
            noticed = "nothing that is noticeable" if share >= UTILITY else "a noticeable loss"
            found.append(f"{percent(share)} of {words} is left: {noticed}.")
            break
    if not found:
        found.append("What is left of the model's other abilities was not measured against the original.")
    if run.facts:
        seconds = sum(float(value) for value in run.facts["seconds"].values())
        trained = run.facts.get("trained_parameters")
        weights = "" if trained is None else f", {trained:,} trained weights"
        found.append(f"The run took {_duration(seconds)}: {run.facts['steps']} steps{weights}.")
    return found


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _recovered(run: Run) -> list[Record]:
    return [r for r in run.attacks if r.metric.startswith("attack_recovered_")]


def _attacked(run: Run) -> str:
    if not run.attacks:
        return "Nobody tried: no attack was run."
    found = _recovered(run)
    tried = list(dict.fromkeys(str(r.extra.get("attack")) for r in found))
    listed = f"Tried: {', '.join(tried)}."
    if all(r.value is None for r in found):
        return f"{listed} How much they bring back cannot be said; the attacks' section says why."
    strongest: dict[str, Record] = {}
    for record in found:
        name = str(record.extra.get("attack"))
        if record.value is None or record.value < RECOVERED or (record.extra.get("interval") or [1.0])[0] <= 0:
            continue
        if name not in strongest or record.value > (strongest[name].value or 0.0):
            strongest[name] = record
    if not strongest:
        return f"{listed} None brought back {percent(RECOVERED)} or more of what was removed, beyond chance."
    parts = [
        f"{name} {percent(min(record.value or 0.0, 1.0))} ({_measure(record)}; it needs {record.extra.get('needs')})"
        for name, record in strongest.items()
    ]
    return (
        f"{listed} Of what was removed, these bring back: {'; '.join(parts)}. Others bring back nothing beyond chance."
    )


def summary(run: Run, level: int) -> list[Html]:
    """What was to be forgotten, whether it was, what it cost, whether it can be brought back, and the limits."""
    asked: list[object] = []
    if run.settings:
        names = [str(name) for name in run.facts["domains"]]
        listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        own = ", each with an expert of its own" if run.facts["router"] else ""
        parts = f" It has {len(names)} parts ({listed}){own}." if len(names) > 1 else ""
        asked.append(
            f"The model {run.settings['model']} was to forget {run.settings['forget']} and to keep "
            f"{run.settings['retain'] or 'what it says of itself of ordinary things (retain.jsonl)'}.{parts}"
        )
    else:
        asked.append("The records do not say; no run was given.")
    found = verdict(run)
    tone = {"yes": "good", "no": "bad", "partly": "bad", "collapsed": "bad"}.get(found)
    n = rows_behind(run)
    few = found == "yes" and n < FIRM
    did: list[object] = [tag("span", VERDICTS[found], class_=f"verdict {tone if tone and not few else ''}".strip())]
    if few:
        did.append(f"Only {n} rows stand behind this, fewer than {FIRM}: it is a first look, no proof.")
    did += _forgotten(run)
    limits: list[object] = [ADAPTER if run.kind == "adapter" else WEIGHTS]
    cut = sorted({r.provenance.get("settings", {}).get("limit") for r in run.records} - {None})
    if cut:
        limits.append(f"A quick look: only up to {max(cut)} rows of each set were measured, so the figures are rough.")
    if not any(r.model == "retrained" for r in run.records):
        limits.append("Without a retrained model there is no honest reference for how little a model can know.")
    seeds = sorted({r.provenance["seed"] for r in run.records if r.provenance.get("seed") is not None})
    if run.records:
        limits.append(
            f"One run{f' (seed {seeds[0]})' if len(seeds) == 1 else ''}: another seed gives somewhat other figures."
        )
    limits.append("Measures find what they look for. That nothing was found is evidence, not proof.")
    pairs: list[tuple[str, list[Any]]] = [
        ("What was to be forgotten?", asked),
        ("Did it forget?", did),
        ("What did it cost?", _cost(run)),
        ("Can it be brought back?", [_attacked(run)]),
        ("What can it not do?", [limits.pop(0)]),
    ]
    answers = tag("dl", *(join([tag("dt", q), tag("dd", join(a, " "))]) for q, a in pairs))
    return [
        tag("div", answers, class_="answers"),
        tag(f"h{level}", "What this does not say"),
        tag("ul", *(tag("li", limit) for limit in limits)),
    ]


def _counts(rows: Iterable[Record | None]) -> str:
    return " / ".join(dict.fromkeys(str(r.n) for r in rows if r is not None))


def figures(columns: Mapping[str, Sequence[Record]], *, label: str, reference: str | None = None) -> list[Html]:
    """A table of records for each mode: a row for each metric, a column for each model, the reference set off."""
    found = []
    modes = sorted({r.mode for rows in columns.values() for r in rows}, reverse=True)
    for mode in modes:
        own = {name: {r.metric: r for r in rows if r.mode == mode} for name, rows in columns.items()}
        own = {name: rows for name, rows in own.items() if rows}
        order = in_order(r for rows in own.values() for r in rows.values())
        names = [f"{name} (reference)" if name == reference else name for name in own]
        rows = []
        for metric, record in order.items():
            cells = [rows.get(metric) for rows in own.values()]
            meaning = CATALOGUE[metric].meaning if metric in CATALOGUE else ""
            shown = ["-" if cell is None else number(cell) for cell in cells]
            rows.append([f"{metric}\u00a0{ARROWS[record.higher_is_better]}".strip(), *shown, _counts(cells), meaning])
        place = list(own).index(reference) + 1 if reference in own else None
        caption = f"{mode} mode. ↑ ↓ point in the better direction; n: items that a figure is of; -: not measured."
        found.append(
            grid(
                ["metric", *names, "n", "what it says"], rows, label=f"{label}, {mode} mode", caption=caption,
                numbers=range(1, len(own) + 2), reference=place, wide=[len(own) + 2],
            )
        )  # fmt: skip
    return found


def by_model(run: Run) -> dict[str, list[Record]]:
    """Records by model: unlearned, which a narrow screen shows first, original, retrained, then those of other names."""
    names = list(dict.fromkeys(r.model for r in run.records))
    order = [role for role in ("unlearned", "original", "retrained") if role in names] + [
        name for name in names if name not in ROLES
    ]
    return {name: [r for r in run.records if r.model == name] for name in order}


def _figures(run: Run, level: int) -> list[Html]:
    notes = [tag("p", note, class_="small soft") for note in run.notes]
    said = "The retrained model never saw the data: it is what perfect forgetting would look like." * bool(
        any(r.model == "retrained" for r in run.records)
    )
    intro = [tag("p", said)] if said else []
    return [*intro, *figures(by_model(run), label="Figures", reference="retrained"), *notes]


@dataclass(frozen=True)
class Sample:
    """One question with the truth, and what each model said: its reply and how much of the truth is in it."""

    question: str
    truth: str
    replies: dict[str, tuple[str, float | None]]


def samples(run: Run) -> tuple[str, list[Sample]]:
    """Return the metric that the samples belong to, and all questions that every model answered; "" if none."""
    for metric in SAMPLED:
        own = [r for rows in by_model(run).values() for r in rows if r.metric == metric and "generations" in r.extra]
        own = [r for r in own if not any(o.model == r.model and o.mode > r.mode for o in own)]
        if not own:
            continue
        tables = []
        for record in own:
            replies = record.extra["generations"]
            truths = record.extra["references"]
            asked = record.extra.get("questions") or record.extra.get("prefixes") or [""] * len(replies)
            scores = record.per_item or [math.nan] * len(replies)
            rows = zip(asked, truths, replies, scores, strict=True)
            tables.append({(q, t): (str(reply), value) for q, t, reply, value in rows})
        shared = [key for key in tables[0] if all(key in table for table in tables)]
        found = [
            Sample(str(q), str(t), {r.model: table[q, t] for r, table in zip(own, tables, strict=True)})
            for q, t in shared
        ]
        if found:
            return metric, found
    return "", []


def spread(total: int, count: int) -> list[int]:
    """Return up to `count` places out of `total`, evenly spread from the first on."""
    return [] if count == 0 else list(range(0, total, max(1, total // count)))[:count]


def worst(found: Sequence[Sample], count: int, taken: Sequence[int]) -> list[int]:
    """Return the places of the unlearned model's replies that hold most of the truth, without those in `taken`."""
    scored = [
        (i, sample.replies["unlearned"][1] or 0.0)
        for i, sample in enumerate(found)
        if i not in taken and "unlearned" in sample.replies
    ]
    known = [(i, value) for i, value in scored if math.isfinite(value) and value > 0]
    return [i for i, _ in sorted(known, key=lambda item: (-item[1], item[0]))[:count]]


def _short(whole: str) -> str:
    return whole if len(whole) <= LONGEST else whole[:LONGEST] + " … (cut)"


def _samples(run: Run, level: int, count: int) -> list[Html]:
    metric, found = samples(run)
    evenly = spread(len(found), count)
    most = worst(found, max(1, count // 2), evenly)
    scale = 100.0 if metric == "book_bleu" else 1.0
    figure = "BLEU" if metric == "book_bleu" else "ROUGE-L"

    def card(sample: Sample) -> Html:
        parts = [tag("dt", "the truth"), tag("dd", _short(sample.truth), dir="auto")]
        items = [tag("div", *parts, class_="truth")]
        for model, (reply, value) in sample.replies.items():
            known = value is not None and math.isfinite(value)
            score = f" · {figure} {value / scale:.2f}" if known and value is not None else ""
            name = f"{model} (reference)" if model == "retrained" else model
            said = marked(_short(sample.truth), _short(reply)) if reply.strip() else tag("em", "(no answer)")
            head = tag("dt", name, tag("span", score, class_="soft"))
            items.append(tag("div", head, tag("dd", said, dir="auto")))
        title = tag(f"h{level + 1}", _short(sample.question) or "A passage", dir="auto")
        return tag("div", title, tag("dl", *items, class_="replies"), class_="sample")

    intro = tag(
        "p",
        "This section quotes what was to be forgotten: handle the page like the data itself (",
        tag("code", "--samples 0", class_="flag"),
        " leaves it out). ",
        tag("mark", "Underlined words"),
        " are not in the true answer, or not in its order; all other words are.",
    )
    shown = [intro, tag(f"h{level}", f"{len(evenly)} of {len(found)}, evenly spread")]
    shown += [card(found[i]) for i in evenly]
    if most:
        shown.append(tag(f"h{level}", "Where the unlearned model says most of the truth"))
        shown += [card(found[i]) for i in most]
    return shown


MEASURES = {"rouge": "ROUGE-L", "probability": "probability", "probe": "accuracy of the probe"}


def _measure(record: Record) -> str:
    kind = record.metric.removeprefix("attack_recovered_")
    return MEASURES.get(kind, kind)


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _attacks(run: Run, level: int) -> list[Html]:
    from alter.attacks.run import untrained

    rows = []
    refused: dict[str, list[str]] = {}
    for record in _recovered(run):
        extra, share = record.extra, "-"
        if record.value is not None:
            share = f"{record.value:.2f}"
            share += " [{:.2f}, {:.2f}]".format(*extra["interval"]) if extra.get("interval") else ""
        step = "".join(f", {key} {extra[key]}" for key in ("step", "depth") if extra.get(key) is not None)
        values = [_decimal(extra.get(key)) for key in ("original", "before", "after", "retrained")]
        rows.append([extra.get("attack"), extra.get("needs"), f"{_measure(record)}{step}", *values, share])
        if "refused" in extra:
            refused.setdefault(extra["refused"], []).append(f"{extra.get('attack')} ({_measure(record)})")
    caption = (
        "recovered: 1 is all that unlearning removed, 0 no more than the same attack gets out of the retrained model; "
        "in brackets the 95 % interval. Of several steps or depths, the one that is best for the attacker."
    )
    head = ["attack", "the attacker needs", "figure", "original", "before", "after", "retrained", "recovered"]
    shown = [grid(head, rows, label="Attacks", numbers=(3, 4, 5, 6, 7), wide=[1], caption=caption, reference=6)]
    plots = []
    for record in _recovered(run):
        points = [point for point in record.extra.get("curve", []) if "step" in point]
        if len(points) < 2:
            continue
        series = {
            name: [(p["step"], p[key]) for p in points if p.get(key) is not None]
            for name, key in (("unlearned", "after"), ("retrained", "retrained"), ("original", "original"))
        }
        known = {name: values for name, values in series.items() if values}
        name = f"{record.extra['attack']}: {_measure(record)}"
        ends = ", ".join(f"{model} {values[-1][1]:.2f}" for model, values in known.items())
        plots.append(
            lines(
                known, across="steps of the attack", up_to=1.0, caption=f"{name} on rows the attacker did not have",
                alt=f"Line chart of {name} over the steps of the attack. At its end: {ends}.",
            )
        )  # fmt: skip
    shown += [tag("div", *plots, class_="plots")] if plots else []
    notes = [f"No recovered fraction for {', '.join(where)}: {why}" for why, where in refused.items()]
    return [*shown, *(tag("p", note, class_="small") for note in [*notes, *untrained(run.attacks)])]


BINS = 40


def _entropies(run: Run, level: int) -> list[Html]:
    tokens = run.tokens
    assert tokens is not None
    threshold = float(run.facts["router"]["entropy_threshold"])
    parts = {name: tokens.entropy[part] for name, part in tokens.parts().items()}
    finite = {name: values[np.isfinite(values)] for name, values in parts.items()}
    top = max(float(values.max()) for values in finite.values() if len(values))
    edges = np.linspace(0.0, max(top, threshold) * 1.0001, BINS + 1)
    low = {name: float((values <= threshold).mean()) for name, values in finite.items()}
    said = ", ".join(f"{percent(share)} of the tokens of the {name}" for name, share in low.items())
    q = run.settings.get("adapter", {}).get("entropy_q")
    drawn = histogram(
        edges, {name: shares(values, edges) for name, values in finite.items()}, threshold=threshold,
        across=f"entropy of the token (Tsallis, q = {q})", caption="Share of the tokens in a bin (logarithmic)",
        alt=f"Histogram of the token entropies. At or below the threshold of {threshold:.3g}: {said}.",
    )  # fmt: skip
    rows = [
        [name, f"{len(parts[name]):,}", percent(low[name]), percent(1 - low[name]), len(parts[name]) - len(values)]
        for name, values in finite.items()
    ]
    table = grid(
        ["tokens of", "tokens", "low", "high", "first tokens"], rows, numbers=(1, 2, 3, 4), label="Token entropies",
        caption="Nothing generated the first token of a row, so it has no entropy and is not in the shares; the "
        "router treats it as high.",
    )  # fmt: skip
    words = (
        "The entropy of a token is how unsure the untouched model was when it came to it. Low ones carry knowledge (a "
        "name, a date) and take one expert; those above the threshold are structure and may take several."
    )
    return [tag("p", words), *_unknown_split(tokens), drawn, table]


def _unknown_split(tokens: Tokens) -> list[Html]:
    if not tokens.why:
        return []
    return [tag("p", f"Forget and retain rows are shown together: {tokens.why}.", class_="small")]


def _routing(run: Run, level: int) -> list[Html]:
    tokens = run.tokens
    assert tokens is not None
    found = {name: routed(tokens.gates[part]) for name, part in tokens.parts().items()}
    served = dict(zip(run.facts["experts"], run.facts["domains"], strict=False))
    count = tokens.gates.shape[1]
    first = next(iter(found.values()))
    order = sorted(range(1, count), key=lambda i: (-first[i], i))
    shown = [0, *sorted(order[:EXPERTS])]
    rest = sorted(order[EXPERTS:])
    widest = max(float(max(values[0], values[1:].sum())) for values in found.values()) or 1.0

    def cell(share: float, style: str) -> Html:
        bar = tag("span", class_=f"bar {style}", style=f"width:{100 * share / widest:.1f}%")
        return tag("span", tag("span", bar, class_="track", aria_hidden="true"), percent(share), class_="share")

    def name(expert: int) -> str:
        if expert == 0:
            return "retention expert"
        return f"{expert}: {served[expert]}" if expert in served else f"{expert} (of an earlier run, or spare)"

    rows = [[name(i), *(cell(float(v[i]), "ab"[p]) for p, v in enumerate(found.values()))] for i in shown]
    if rest:
        parts = [cell(float(values[rest].sum()), "ab"[p]) for p, values in enumerate(found.values())]
        rows.append([f"{len(rest)} other experts", *parts])
    rows.append(["all forget experts", *(cell(float(v[1:].sum()), "ab"[p]) for p, v in enumerate(found.values()))])
    words = (
        "Each token takes one or more experts. Ordinary text should take the retention expert, text of the forget set "
        "the forget experts. A token that several experts serve counts for each by its part."
    )
    table = grid(["expert", *found], rows, label="Routing shares", numbers=range(1, len(found) + 1))
    return [tag("p", words), *_unknown_split(tokens), table]


TERMS = {
    "loss": "weighted sum of the terms, mean since the entry before",
    "forget": "forget objective of the batch, see Settings",
    "retain": "retain objective of the batch, see Settings",
    "structure": "cross-entropy on high-entropy tokens",
}
WATCHED = {
    "probability": "probability of the answers",
    "exact_memorization": "exact memorisation: next tokens predicted right",
    "rouge": "ROUGE-L recall of the replies",
    "truth_ratio": "truth ratio, 1: wrong answers are as likely as the right one",
}


def _training(run: Run, level: int) -> list[Html]:
    plots = []
    for term, meaning in TERMS.items():
        points = [(float(e["step"]), float(e[term])) for e in run.facts["log"] if e.get(term) is not None]
        if len(points) > 1:
            alt = f"Line chart of {term}: {points[0][1]:.3g} at step {points[0][0]:g}, {points[-1][1]:.3g} at the end."
            plots.append(lines({term: points}, alt=alt, caption=meaning, across="step"))
    shown = [tag("div", *plots, class_="plots")]
    watch = run.facts.get("watch")
    if watch:
        checks, kept = watch["checks"], watch["kept"]
        why = f"Step {kept['step']} was kept: {kept['why']}."
        shown += [tag(f"h{level}", "Watched while it trained"), tag("p", why)]
        drawn = []
        for metric, meaning in WATCHED.items():
            series = {
                name: [(float(c["step"]), float(c[f"{name}_{metric}"])) for c in checks if f"{name}_{metric}" in c]
                for name in ("forget", "retain", "holdout")
            }
            series = {name: points for name, points in series.items() if len(points) > 1}
            if series:
                ends = ", ".join(f"{name} {points[-1][1]:.2f}" for name, points in series.items())
                alt = f"Line chart of the {meaning} by step. At the last check: {ends}."
                at = (float(kept["step"]), "kept")
                drawn.append(lines(series, alt=alt, caption=meaning, across="step", up_to=1.0, at=at))
        quality = [
            (float(c["step"]), float(c["forget_quality"])) for c in checks if c.get("forget_quality") is not None
        ]
        if len(quality) > 1:
            alt = f"Line chart of the forget quality by step. At the last check: {quality[-1][1]:.3g}."
            at = (float(kept["step"]), "kept")
            drawn.append(lines({"forget quality": quality}, alt=alt, caption="forget quality", across="step", at=at))
        shown.append(tag("div", *drawn, class_="plots"))
    return shown


def _settings(run: Run, level: int) -> list[Html]:
    words = tag("p", "The file run.yaml; ", tag("code", "alter unlearn run.yaml --out NEW"), " repeats the run.")
    return [words, tag("div", tag("pre", run.written, class_="two"), class_="box", tabindex="0", role="region",
                       aria_label="Settings of the run")]  # fmt: skip


def _provenance(run: Run, level: int) -> list[Html]:
    shown: list[Html] = []
    own = run.facts.get("provenance")
    if own:
        libraries = ", ".join(f"{name} {version}" for name, version in own["versions"].items())
        facts = [
            ("trained", own["measured"]),
            ("alter", f"{own['alter']}, commit {own['commit'] or 'unknown'}"),
            ("Python", own["python"]),
            ("machine", own["machine"]),
            ("libraries", libraries),
            (f"{run.kind} (digest)", run.digest),
        ]
        shown.append(grid(["run", ""], facts, label="Provenance of the run", wide=[1]))
    seen: dict[str, tuple[Record, int]] = {}
    for record in [*run.records, *run.attacks]:
        if record.provenance:
            keys = ("weights", "adapter", "data", "device", "dtype", "seed", "measured", "commit")
            key = json.dumps([record.model, [record.provenance.get(name) for name in keys]])
            seen[key] = (record, seen[key][1] + 1 if key in seen else 1)
    if seen:
        head = ["model", "figures", "measured", "alter", "weights", "adapter", "data", "device", "seed"]
        rows = []
        for record, count in seen.values():
            made = record.provenance
            version = f"{made.get('alter')}, {made.get('commit') or 'commit unknown'}"
            cells = [made.get(name) for name in ("weights", "adapter", "data", "device", "seed")]
            shown_cells = ["-" if cell is None else str(cell) for cell in cells]
            rows.append([record.model, count, made.get("measured"), version, *shown_cells])
        caption = "Digests of the contents; + after a commit: its code was changed."
        shown.append(grid(head, rows, label="Provenance of the figures", numbers=[1], caption=caption))
        asked = {
            yaml.safe_dump({k: v for k, v in made["settings"].items() if v is not None}, sort_keys=False)
            for made in (record.provenance for record, _ in seen.values())
            if isinstance(made.get("settings"), dict)
        }
        if asked:
            shown.append(tag(f"h{level}", "How it was measured"))
            box = {"class_": "box", "tabindex": "0", "role": "region", "aria_label": "Settings of the measurements"}
            shown.append(tag("div", tag("pre", "\n".join(sorted(asked)), class_="two"), **box))
    return shown


def sections(run: Run, level: int, count: int) -> tuple[dict[str, list[Html]], list[Html]]:
    """Return a run's sections by title, and for each that has no data a line that says which command makes them.

    Args:
        run: the run.
        level: of the headings within a section.
        count: questions to show as samples.
    """
    folder = "RUN" if run.folder is None else str(run.folder)
    model = str(run.settings.get("model", "MODEL"))
    forget = str(run.settings.get("forget", "FORGET"))
    which = f"--model {folder}/model" if run.kind == "model" else f"--model {model} --adapter {folder}/adapter"
    evaluate = f"alter evaluate {which} --name unlearned --json unlearned.json"
    trained = "alter unlearn RECIPE.yaml --out RUN"
    answered = bool(samples(run)[1])
    found: dict[str, list[Html]] = {"Summary": summary(run, level)}
    missing: list[Html] = []
    plan = (
        ("Figures", bool(run.records), lambda: _figures(run, level), evaluate, "--records unlearned.json"),
        (
            "Sample answers",
            answered and count > 0,
            lambda: _samples(run, level, count),
            f"alter report {folder}" if answered else evaluate,
            "--samples 6" if answered else "--records unlearned.json",
        ),
        (
            "Attacks",
            bool(_recovered(run)),
            lambda: _attacks(run, level),
            f"alter attack {which} --forget {forget} --retrained RETRAINED --out attacks",
            "--attacks attacks",
        ),
        ("Token entropies", run.tokens is not None, lambda: _entropies(run, level), trained, "RUN"),
        ("Routing", run.tokens is not None, lambda: _routing(run, level), trained, "RUN"),
        ("Training", bool(_logged(run)), lambda: _training(run, level), trained, "RUN"),
        ("Settings", bool(run.written), lambda: _settings(run, level), trained, "RUN"),
        (
            "Provenance",
            bool(run.facts) or any(r.provenance for r in run.records + run.attacks),
            lambda: _provenance(run, level),
            evaluate,
            "--records unlearned.json",
        ),
    )
    for title, there, make, command, option in plan:
        if there:
            found[title] = make()
        elif run.facts and not run.facts["router"] and title in ("Token entropies", "Routing"):
            missing.append(tag("li", f"{title}: this run has no router."))
        else:
            where = tag("code", command), ", then ", tag("code", option)
            missing.append(tag("li", f"{title}: ", *where, ", would show them."))
    return found, missing


def _logged(run: Run) -> list[Any]:
    logged = [entry for entry in run.facts.get("log", []) if entry.get("loss") is not None]
    return logged if len(logged) > 1 else []


def comparison(runs: Sequence[Run]) -> list[Html]:
    """Several runs side by side: the unlearned models, beside the original and the retrained ones."""
    columns: dict[str, list[Record]] = {}

    def shared(role: str) -> None:
        own = {run.name: [r for r in run.records if r.model == role] for run in runs}
        own = {name: rows for name, rows in own.items() if rows}
        values = {json.dumps(sorted([r.metric, r.mode, str(r.value), r.n] for r in rows)) for rows in own.values()}
        if len(values) == 1:
            columns[role] = next(iter(own.values()))
        else:
            columns.update({f"{role} of {name}": rows for name, rows in own.items()})

    shared("original")
    for run in runs:
        columns[run.name] = [r for r in run.records if r.model == "unlearned"]
    shared("retrained")
    facts = [
        [
            run.name,
            run.settings["model"],
            run.settings["forget"],
            VERDICTS[verdict(run)],
            run.facts["steps"],
            _duration(sum(float(value) for value in run.facts["seconds"].values())),
        ]
        for run in runs
    ]
    head = ["run", "model", "to forget", "did it forget?", "steps", "took"]
    shown = [grid(head, facts, label="The runs", numbers=[4], wide=[3])]
    return shown + figures(columns, label="Figures of all runs", reference="retrained")


# Erasure requests ----------------------------------------------------------------------------------------------------


def requests(url: str, names: Sequence[str]) -> list[Html]:
    """What a database of erasure requests holds: each request's state and evidence, and whether its history is whole.

    Args:
        url: of the database.
        names: the requests to show, each with its history; all if there are none.

    Raises:
        UserError: no such database or request.
    """
    from alter.requests import work
    from alter.requests.store import Store, parse_id

    store = Store.open(url)
    project = work.Project.model_validate(store.project())
    chosen = [store.get(number) for number in dict.fromkeys(map(parse_id, names))] if names else store.requests()
    if project.root.is_dir():
        _, wrong, _ = work.verify(store, project, behaviour=False)
        checked = "History and adapter were checked when this page was made"
    else:
        wrong = store.check_chain()
        checked = f"The adapter's folder {project.root} is not here, so only the history itself was checked"
    # that nothing was altered does not say that anything was forgotten: no colour for it
    good = tag("span", "Unchanged since it was recorded.", class_="verdict")
    bad = tag("span", "Not as it should be.", class_="verdict bad")
    shown = [
        tag(
            "p",
            bad if wrong else good,
            f" {checked}: ",
            " ".join(wrong) if wrong else "nothing was altered. Whether a request was forgotten is in its own line.",
            " ",
        ),
        tag(
            "p",
            "Head of the hash chain: ",
            tag("code", store.head()),
            ". Written down elsewhere, it fixes all before it.",
        ),
    ]
    history = store.history()
    checks = [entry for entry in history if entry.what == "verified"]
    if checks:
        last = checks[-1]
        result = " ".join(last.details.get("wrong", [])) or "nothing had come back since it was recorded."
        shown.append(tag("p", f"The model was last measured again on {last.at} by {last.who}: {result}"))
    else:
        shown.append(
            tag("p", "The model was not measured again since; ", tag("code", "alter request verify"), " does it.")
        )
    rows = []
    reasons: list[Html] = []
    for request in chosen:
        before, after = request.before or {}, request.after or {}
        reference = after.get("reference") or {}
        share = after.get("utility_share")
        bad_replies = f"{after['broken'] + after['empty']} of {after['n_answers']}" if after.get("n_answers") else "-"
        rows.append(
            [
                f"{request.name}: {request.subject or '(purged)'}",
                tag("span", request.state.upper() if after else request.state, class_=_tone(request)),
                request.received[:10],
                request.due or "-",
                request.rows,
                *(f"{part['said']} of {part['n_said']}" if part.get("n_said") else "-" for part in (before, after)),
                bad_replies,
                *(_decimal(part.get("probability")) for part in (before, after, reference)),
                "-" if share is None else percent(share),
                tag("code", request.data_hash[:16]),
            ]
        )
        if after.get("verdict"):
            few = after.get("n_answers") is not None and after["n_answers"] < FIRM
            small = f" Only {after['n_answers']} answers stand behind this: a first look, no proof." if few else ""
            reasons.append(tag("li", f"{request.name}: {' '.join(after['verdict']['why'])}{small}"))
    head = [
        "request",
        "state",
        "received",
        "due",
        "rows",
        "still said before",
        "after",
        "broken or empty",
        "probability before",
        "after",
        "reference",
        "utility",
        "data",
    ]
    caption = (
        "still said: replies that give the answer. probability: of the true answers, per token; the reference never saw "
        "the data. utility: share of the untouched model's. data: beginning of the SHA-256 of the rows."
    )
    label = "Erasure requests"
    left = len(store.requests()) - len(chosen)
    if not rows:
        return [
            *shown,
            tag("p", "The database holds no request yet: ", tag("code", "alter request add"), " adds one."),
        ]
    shown.append(grid(head, rows, label=label, numbers=range(4, 12), caption=caption, reference=10))
    limits = (
        ADAPTER,
        "Asked were the questions of the data, in their own words. Other wordings, other languages, longer talks and "
        "attacks were not tested here: `alter attack` tries some.",
        f"Of fewer than {FIRM} answers nothing is coloured: the intervals in the reasons say how little they prove.",
    )
    box = tag("div", tag("ul", *(tag("li", limit) for limit in limits), *reasons), class_="answers")
    shown.append(box)
    if left:
        shown.append(tag("p", f"{left} other requests are left out.", class_="small soft"))
    for request in chosen if names else ():
        entries = [entry for entry in history if entry.request == request.id]
        lines_ = [[entry.at, entry.what, entry.who, tag("code", entry.hash[:16])] for entry in entries]
        shown.append(tag("h3", f"History of {request.name}"))
        shown.append(grid(["when", "what", "who", "hash"], lines_, label=f"History of {request.name}"))
    return shown


def _tone(request: Any) -> str:
    """The colour of a state: green only for what was found forgotten by enough answers, and trusts no old figure."""
    if request.state in ("not forgotten", "collapsed", "failed"):
        return "verdict bad"
    firm = (request.after or {}).get("n_answers", 0) >= FIRM
    return "verdict good" if request.state == "forgotten" and firm else "verdict"


# The page ------------------------------------------------------------------------------------------------------------


def compose(
    runs: Sequence[Run], *, count: int = 6, title: str | None = None, asked: Sequence[Html] | None = None
) -> str:
    """Return the page.

    Args:
        runs: read and brought together by `read`.
        count: questions to show as samples.
        title: heading.
        asked: the section on erasure requests, if there is one.
    """
    heading = title or "Unlearning report"
    parts: list[Html] = []
    links: list[tuple[str, str]] = []

    def section(name: str, identity: str, content: Sequence[Html], class_: str | None = None) -> None:
        links.append((name, identity))
        parts.append(tag("section", tag("h2", name, id=identity), *content, class_=class_))

    def left_out(missing: Sequence[Html]) -> list[Html]:
        return [tag("ul", *missing, class_="small")] if missing else []

    if len(runs) == 1:
        found, missing = sections(runs[0], 3, count)
        for i, (name, content) in enumerate(found.items()):
            section(name, f"s{i}", content)
        if missing:
            section("Left out for want of data", "left-out", left_out(missing))
    elif runs:
        section("Comparison", "comparison", comparison(runs))
        for i, run in enumerate(runs):
            found, missing = sections(run, 4, count)
            content = [join([tag("h3", name), *inner]) for name, inner in found.items()]
            if missing:
                content.append(join([tag("h3", "Left out for want of data"), *left_out(missing)]))
            section(run.name, f"run{i}", content, "run")
    if asked is not None:
        section("Erasure requests", "requests", asked)
    about = runs[0].settings if len(runs) == 1 else {}
    subject = f"{about['forget']}, forgotten by {about['model']}" if about else ", ".join(run.name for run in runs)
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    top = tag(
        "header",
        tag("h1", heading),
        tag("p", f"{subject}. " if subject else "", f"Made on {made}.", class_="soft"),
        tag(
            "nav", tag("ul", *(tag("li", tag("a", name, href=f"#{to}")) for name, to in links)), aria_label="Sections"
        ),
    )
    version = versions().get("alter-unlearning", "unknown")
    foot = tag(
        "footer", f"Written by alter {version}, commit {commit() or 'unknown'}. Method: ALTER, arXiv:2603.01792."
    )
    body = join([top, tag("main", *parts), foot], "\n")
    return document(heading, body)


def report(settings: Report) -> Path:
    """Run `alter report`: read what is there, write the page.

    Raises:
        UserError: nothing to report, an output that cannot be written, or what `read` and `requests` raise.
    """
    if not (settings.runs or settings.records or settings.attacks or settings.db):
        raise UserError("Nothing to report: give the folder of a run, --records FILE, --attacks FOLDER or --db URL.")
    if settings.request and settings.db is None:
        raise UserError("--request chooses from a database of requests: give --db as well.")
    out = Path(settings.out)
    if out.is_dir() or out.resolve().parent.is_file():
        raise UserError(f"--out is {settings.out!r}, which cannot be written: give the path of a file.")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(
            f"--out is {settings.out!r}; expected a name ending in .html. A browser prints the page to PDF."
        )
    runs = read(settings)
    asked = None if settings.db is None else requests(settings.db, settings.request)
    page = compose(runs, count=settings.samples, title=settings.title, asked=asked)
    write_atomic(out, page)
    Console(stderr=True, soft_wrap=True).print(
        f"report: {out}, {len(page.encode()) / 1000:.0f} kB", markup=False, highlight=False
    )
    return out
