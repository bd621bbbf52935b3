"""What a report is about: runs with their records and attacks, read from their folders."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from alter.core import Array, UserError, nearest
from alter.rendering import called, number
from alter.reporting.settings import Report
from alter.storage import Record, folder_digest, from_json, read_object, read_records

ROLES = ("original", "unlearned", "retrained")
"""What records call the three models; a name given with `alter evaluate --name` gets a column, and no part in the summary."""


@dataclass(frozen=True)
class TokenFigures:
    """What a run's frozen.safetensors holds of its training tokens, forget rows before retain rows.

    `entropy` [T], infinite at each row's first token; `gates` [T, N + 1]; `forget` of the T tokens belong to forget
    rows, or None where that is not known, and then `why` says so.
    """

    entropy: Array
    gates: Array
    forget: int | None
    why: str = ""

    def parts(self) -> dict[str, slice]:
        """Return which tokens belong to which set."""
        if self.forget is None:
            return {"all rows": slice(None)}
        found = {"forget rows": slice(None, self.forget), "retain rows": slice(self.forget, None)}
        return {name: part for name, part in found.items() if len(self.entropy[part])}


@dataclass
class Reported:
    """One run with all that was measured of it; `folder` is None if there are records alone.

    `kind` is what it wrote, an adapter or, where all weights were trained, a model; `digest` that folder's. `people` says
    whom numbered parts of the forget set are about; `told` is what `alter forget` found of these very weights.
    """

    name: str
    folder: Path | None = None
    written: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    kind: Literal["adapter", "model"] = "adapter"
    digest: str | None = None
    tokens: TokenFigures | None = None
    people: dict[str, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    attacks: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    told: dict[str, Any] | None = None

    def parts(self) -> list[str]:
        """Name the forget set's parts; a numbered part is named by whom it is about, where that is known."""
        names = [str(name) for name in self.facts.get("domains", [])]
        return [self.people.get(name, name) for name in names]

    def get(self, model: str, metric: str) -> Record | None:
        """Return the record of one model and metric that has a value, the strict one if there are several."""
        found = [r for r in self.records if (r.model, r.metric) == (model, metric) and r.value is not None]
        return min(found, key=lambda r: r.mode != "strict", default=None)

    def value(self, model: str, metric: str) -> float | None:
        """Return the record's value, or None."""
        record = self.get(model, metric)
        return None if record is None else record.value


def _siblings(path: Path) -> list[str]:
    return [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []


def read_reported(given: str) -> Reported:
    """Read the folder of a run.

    Raises:
        UserError: it is none, the run did not end, or its files are broken or of another version.
    """
    folder = Path(given)
    if folder.is_file():
        raise UserError(f"{given} is a file, not the folder of a run; result files are given with `records`.")
    if not folder.is_dir():
        raise UserError(f"No run at {given}.{nearest(given, _siblings(folder))}")
    if not (folder / "run.yaml").is_file():
        what = " It holds records of attacks: give it with `attacks`." if any(folder.glob("none.*.json")) else ""
        raise UserError(f"{given} is no run: it has no run.yaml, which `alter unlearn` and `alter demo` write.{what}")
    try:
        written = (folder / "run.yaml").read_text()
        facts = from_json((folder / "run.json").read_text())
        _refuse_distilled(given, facts)
        settings, log = facts["settings"], facts["log"]
        needed = {name: facts[name] for name in ("domains", "experts", "router", "steps", "seconds", "provenance")}
        needed |= {name: facts["provenance"][name] for name in ("measured", "versions", "python", "machine")}
        wrong = not isinstance(settings, dict) or not isinstance(log, list) or not isinstance(needed["seconds"], dict)
    except UserError:
        # a `ValueError` too: what it says is no word about a broken file
        raise
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
    run = Reported(folder.resolve().name, folder, written, settings, facts, kind, folder_digest(folder / kind))
    run.told = _told(folder, run.digest)
    if facts["router"] and (folder / "frozen.safetensors").is_file():
        run.tokens = read_tokens(folder / "frozen.safetensors", settings)
    return run


def _refuse_distilled(given: str, facts: Any) -> None:
    if isinstance(facts, dict) and "student" in (facts.get("settings") or {}):
        raise UserError(
            f"{given} was made by `alter distill`, of which a page shows the figures: give `records` {given}/records.json."
        )


def _told(folder: Path, weights: str | None) -> dict[str, Any] | None:
    """Return what `alter forget` measured of the weights that lie in its folder, `erased` where of those that it erased; else None.

    Raises:
        UserError: it is broken.
    """
    if not (folder / "forget.json").is_file() or not (folder / "report.json").is_file():
        return None
    found = read_object(folder / "report.json", "what alter forget found")
    if not isinstance(found.get("verdict"), dict):
        return None
    plain = folder / "erased" / "model"
    erased = found.get("weights") != weights and plain.is_dir() and found.get("weights") == folder_digest(plain)
    return {**found, "erased": erased} if erased or found.get("weights") == weights else None


def read_tokens(path: Path, settings: Mapping[str, Any]) -> TokenFigures:
    """Read entropies and gates from what `frozen.store` wrote.

    A run that has ended says there how many of the rows are forget rows. In what others left they are as many as the run used of its forget set (twice as many if
    its objective also trains on other answers), so that set is counted, if it is on this machine; a run that used no
    retain rows has no others.

    Raises:
        UserError: the file is broken, or the settings are of another version.
    """
    from safetensors import SafetensorError, safe_open

    from alter.training import Unlearn, branch_needs

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
        return TokenFigures(entropy.astype(np.float64), gates.astype(np.float32), int(lengths[:noted].sum()))
    forget, alternative, retain = (needs.rows for needs in branch_needs(run))
    rows, why = (len(lengths), "") if not retain else _count(run.forget, run.epochs)
    if rows is not None and retain:
        rows *= forget + alternative
        if rows > len(lengths):
            rows, why = None, f"{run.forget} has more rows now than the run has seen"
    tokens = None if rows is None else int(lengths[:rows].sum())
    return TokenFigures(entropy.astype(np.float64), gates.astype(np.float32), tokens, why)


def _count(source: str, epochs: float) -> tuple[int | None, str]:
    """Return how many forget rows a run used, or why that is not known; nothing is downloaded for it."""
    base = source.rpartition(":")[0]
    if not source.startswith("builtin:") and not Path(source).exists() and not (base and Path(base).exists()):
        return None, f"the forget set {source} is not on this machine"
    from alter.data import load_examples

    try:
        total = len(load_examples(source))
    except UserError as error:
        return None, str(error).rstrip(".")
    # a run of less than one pass sees a part of the set
    return min(total, math.ceil(epochs * total)), ""


def people_of(run: Reported) -> dict[str, str]:
    """Return whom the numbered parts of a run's forget set are about: the name that most of a part's questions hold.

    Empty where parts have names of their own or the rows are not on this machine; nothing is fetched for it.
    """
    names = [str(name) for name in run.facts.get("domains", [])]
    if not names or not all(name.isdecimal() for name in names) or _count(run.settings["forget"], 1)[0] is None:
        return {}
    from alter.data import load_examples
    from alter.evaluation import people

    questions: dict[str, list[str]] = {}
    for example in load_examples(run.settings["forget"]):
        part = str(example.row.get(run.settings.get("domain_column") or "author"))
        questions.setdefault(part, []).append(example.prompt or "")
    found = {}
    for part in (name for name in names if name in questions):
        every = Counter(name for question in questions[part] for name in people([question])).most_common(1)
        if every and every[0][1] * 4 >= len(questions[part]):
            # as it is written there: names are compared in small letters
            written = re.compile(r"\W+".join(map(re.escape, every[0][0])), re.IGNORECASE)
            found[part] = next((match[0] for q in questions[part] if (match := written.search(q))), part)
    return found


def owners(path: str, records: Sequence[Record], runs: Sequence[Reported]) -> list[Reported]:
    """Return the runs that records belong to: those whose adapter or model they measured; all if they measured none.

    Raises:
        UserError: they measured another adapter or model, or it cannot be told which of several.
    """
    if all(run.folder is None for run in runs):
        return list(runs)
    loaded = {str(r.provenance.get(kind)) for r in records for kind in ("adapter", "weights")}
    found = [run for run in runs if run.digest in loaded]
    adapters = sorted({str(r.provenance["adapter"]) for r in records if r.provenance.get("adapter")})
    if len(adapters) > 1:
        raise UserError(f"{path} holds figures of {len(adapters)} adapters: give a file for each.")
    if adapters and not found:
        here = ", ".join(f"{run.folder}: {run.digest}" for run in runs)
        raise UserError(
            f"{path} measured another adapter ({adapters[0]}) than that of the report ({here}): evaluate again, or "
            "leave it out."
        )
    known = {r.provenance.get("weights") for r in records if r.model == "unlearned"} - {None, "unknown"}
    if known and not found:
        raise UserError(
            f"{path} measured other weights ({', '.join(sorted(map(str, known)))}) than those of the report: evaluate again, or "
            "leave it out."
        )
    if not found and len(runs) > 1 and any(r.model == "unlearned" for r in records):
        raise UserError(f"{path} does not say which adapter it measured: report on its run alone.")
    return found or list(runs)


def check_rows(run: Reported, path: str, records: Sequence[Record]) -> None:
    """Refuse a verdict on other rows than those that a run was to forget: the page would state it of these.

    Raises:
        UserError: the rows are others.
    """
    from alter.evaluation import closing_of

    closed, asked = closing_of(records), (run.facts.get("data") or {}).get("forget")
    if closed is not None and asked is not None and closed.get("rows", asked) != asked:
        raise UserError(
            f"{path} holds a verdict on other rows than those that {run.name} was to forget ({run.settings.get('forget')}): evaluate these "
            "(`alter evaluate --benchmark rows --limit N` takes some of them), or leave it out."
        )


def check_original(run: Reported, path: str, records: Sequence[Record]) -> None:
    """Refuse figures of an "original" that is not the model under the run's adapter: `alter evaluate` calls so whatever has no `name`.

    Raises:
        UserError: it is another.
    """
    if run.kind != "adapter":
        return
    base = {r.provenance.get("weights") for r in run.records if r.provenance.get("adapter")} - {None, "unknown"}
    other = {r.provenance.get("weights") for r in records if r.model == "original"} - {None, "unknown"} - base
    if base and other:
        raise UserError(
            f"{path} calls a model 'original' that is not the one that {run.name} was trained on: evaluate it again under its own "
            "name, as `alter evaluate --name retrained` does, or leave it out."
        )


def add_records(run: Reported, path: str, records: Sequence[Record], *, replace: bool) -> None:
    """Give records to a run; a figure that it has already must be equal, unless it may be replaced.

    Raises:
        UserError: two files hold different figures of the same thing, or records that are no figures of an evaluation.
    """
    known = {(r.model, r.metric, r.mode): r for r in run.records}
    for record in records:
        if record.metric.startswith("attack_"):
            raise UserError(f"{path} holds records of attacks: give its folder with `attacks`.")
        old = known.get((record.model, record.metric, record.mode))
        if old is not None and not replace and (old.value, old.n) != (record.value, record.n):
            raise UserError(
                f"{path} and a file before it hold different figures of {record.metric} of the model "
                f"{record.model!r} ({number(record)} and {number(old)}): give one of them, or name the models apart "
                "with `alter evaluate --name retrained`."
            )
        known[record.model, record.metric, record.mode] = record
    run.records = list(known.values())


def read(settings: Report) -> list[Reported]:
    """Read runs, records and attacks, and bring them together.

    Raises:
        UserError: see `read_reported`, `owners`, `add_records`, and `records.read_records`.
    """
    folders = {Path(given).resolve(): given for given in settings.runs}
    runs = [read_reported(given) for given in folders.values()]
    for i, run in enumerate(runs):
        if sum(other.name == run.name for other in runs) > 1:
            runs[i].name = str(run.folder)
    if not runs and (settings.records or settings.attacks):
        runs = [Reported(settings.title or "Results")]
    for run in runs:
        run.people = people_of(run) if settings.samples and not settings.officer else {}
    inside: dict[tuple[int, str, str], str] = {}
    for run in runs:
        own = run.folder / "records.json" if run.folder else None
        if own is not None and own.is_file():
            found = read_records(own)
            owners(str(own), found, [run])
            check_rows(run, str(own), found)
            add_records(run, str(own), found, replace=False)
            inside |= {(id(run), r.model, r.metric): str(own) for r in found}
    given: dict[int, list[Record]] = {}
    for path in settings.records:
        found = read_records(path)
        for run in owners(path, found, runs):
            check_rows(run, path, found)
            check_original(run, path, found)
            # among the files given, none replaces another
            check = Reported(run.name, records=given.get(id(run), []))
            add_records(check, path, found, replace=False)
            given[id(run)] = check.records
            replaced = [r for r in found if (id(run), r.model, r.metric) in inside]
            if replaced:
                run.notes.append(f"{called(path)} replaces {len(replaced)} figures of the run's own records.json.")
            add_records(run, path, found, replace=True)
    for folder in settings.attacks:
        path = str(Path(folder) / "records.json")
        if not Path(path).is_file():
            raise UserError(f"{folder} has no records.json; expected the `out` folder of `alter attack`.")
        found = read_records(path)
        if not any(r.metric.startswith("attack_") for r in found):
            raise UserError(f"{path} holds no attacks; expected the `out` folder of `alter attack`.")
        for run in owners(path, found, runs):
            run.attacks += found
    return runs
