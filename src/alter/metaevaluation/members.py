"""The models of a meta-evaluation: which there are, how each is made, and what is measured of it.

- `knows`: the retrained model, taught the measured rows in their own words or in their paraphrases. `without`: the same,
  taught rows to keep alone, or wrong answers to the same questions. All with the same seeds, lengths and rate, each pass
  beside as many rows to keep; after OpenUnlearning's pools (Dorna et al. 2025, arXiv:2506.12618, section 4.1).
- `unlearned`: the original after each method, rate, length and seed.
- `given`: the retrained model and the original as they are.
"""

from __future__ import annotations

import itertools
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alter.attacks import ATTACKS, Attack, quantize
from alter.comparison import Compare, distilled_rows, run_of
from alter.core import UserError, passing
from alter.data import Example, examples, read_rows, tofu_rows
from alter.evaluation import SETS
from alter.metaevaluation.measuring import MeasuredRows, Measuring, train_on
from alter.metaevaluation.settings import MetaEvaluate
from alter.models import ModelSettings
from alter.storage import VERSION, digest, read_object, to_json, versions, write_atomic
from alter.storage.provenance import provenance
from alter.training import Unlearn, unlearn

MEMBER = 2
"""Version of how a member is made and measured: raise it when that changes, so that no older result is reused."""
POOLS = {"knows": ("answers", "paraphrased"), "without": ("retain", "wrong")}
"""Pools that are taught, and in which ways."""
UNKEYED = {"out", "resume", "overwrite", "save_steps", "method"}


@dataclass(frozen=True)
class Member:
    """One model: its pool, its name, how it is made, and the digest of all that decides its figures."""

    pool: str
    name: str
    how: dict[str, Any]
    key: str


@dataclass(frozen=True)
class Found:
    """Measurements of one member.

    Attributes:
        figures: every metric, by state: `before`, and of unlearned models and the retrained one `relearned` and `quantised`.
        leaked: after the attacker has trained on other rows, leak@k by name and the mean `probability` of the true answers.
        keeps: probability of the answers to keep, over the original's.
        failed: why there is none of it.
    """

    pool: str
    name: str
    seconds: float
    figures: dict[str, dict[str, float]]
    leaked: dict[str, float]
    keeps: float | None = None
    failed: str | None = None


# Rows ----------------------------------------------------------------------------------------------------------------


def chosen_rows(settings: MetaEvaluate, out: Path) -> MeasuredRows:
    """Divide the forget rows, and write TOFU's files with the measured ones alone into `out`/rows.

    Raises:
        UserError: too few forget rows or wrong answers, or rows without what TOFU's metrics need.
    """
    forget = tofu_rows(f"{settings.split}_perturbed", settings.data)
    if len(forget) < settings.rows + settings.attacker_rows:
        raise UserError(
            f"{settings.split} has {len(forget)} rows, but `rows` ({settings.rows}) and `attacker_rows` "
            f"({settings.attacker_rows}) are {settings.rows + settings.attacker_rows} together: take fewer."
        )
    fewest = min(len(row.get("perturbed_answer") or []) for row in forget)
    if fewest < 2:
        raise UserError(
            f"{settings.split}_perturbed in {settings.data} has a row with {fewest} wrong answers; expected 2 or more: one pool is "
            "taught them, and the last is the holdout's."
        )
    order = list(range(len(forget)))
    random.Random(settings.seed).shuffle(order)
    measured = sorted(order[: settings.rows])
    attacker = sorted(order[settings.rows : settings.rows + settings.attacker_rows])
    retain = tofu_rows("retain_perturbed", settings.data)
    holdout = f"holdout{settings.split.removeprefix('forget')}"
    files = {f"{settings.split}_perturbed": [forget[i] for i in measured]}
    files |= {f"{name}_perturbed": tofu_rows(f"{name}_perturbed", settings.data) for name in SETS if name != "forget"}
    files[holdout] = _drawn(
        _holdout(settings, [forget[i] for i in order[settings.rows :]]), settings.rows, settings.seed
    )
    folder = out / "rows" / digest(files)[:16]
    for name, rows in files.items():
        write_atomic(folder / f"{name}.json", to_json(rows), private=True)
    return MeasuredRows(
        folder,
        examples(files[f"{settings.split}_perturbed"]),
        examples([forget[i] for i in attacker]),
        examples(_drawn(retain, settings.rows, settings.seed)),
    )


def _holdout(settings: MetaEvaluate, others: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows that no model saw: those given, else other forget questions with their last wrong answer."""
    if settings.holdout is not None:
        return read_rows(settings.holdout)
    return [{"question": row["question"], "answer": row["perturbed_answer"][-1]} for row in others]


def _drawn(rows: list[dict[str, Any]], most: int, seed: int) -> list[dict[str, Any]]:
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), min(most, len(rows))))]


# Which models there are ----------------------------------------------------------------------------------------------


def members(settings: MetaEvaluate, rows: MeasuredRows) -> list[Member]:
    """Lay out all models, the two given ones first; then the pools in turns, so that a part of them says something.

    Raises:
        UserError: no such model or method, settings that do not fit it, or two members that are the same.
    """
    weights = {name: ModelSettings(model=name).identity()["weights"] for name in (settings.model, settings.retrained)}
    for name, content in weights.items():
        if content == "unknown":
            raise UserError(f"No model at {name}: no folder has this name, and the hub does not answer for it.")
    if weights[settings.model] == weights[settings.retrained]:
        raise UserError("`retrained` is the original itself: give a model that never saw the forget rows.")
    measured = settings.model_dump(
        include={
            "split",
            "rows",
            "attacker_rows",
            "relearn",
            "readings",
            "gradnorm",
            "samples",
            "questions",
            "reply_tokens",
            "seed",
        }
    )
    place = ModelSettings(model=settings.model, device=settings.device).place()
    for name in settings.readings:
        why = ATTACKS[name].missing(Attack(model=settings.model, forget="rows"), rows.measured)
        if why is not None:
            raise UserError(f"The reading {name!r} is not possible: {why}. Leave it out of readings.")
    texts = [[row.row for row in part] for part in (rows.measured, rows.attacker, rows.retain)]
    facts = [MEMBER, VERSION, versions(), weights, measured, digest(texts, rows.folder.name), place]
    # decides how every model is asked; without it the keys stay what they were
    facts += [template] if (template := settings.common.get("chat_template_kwargs")) else []

    def member(pool: str, name: str, how: Mapping[str, Any]) -> Member:
        return Member(pool, name, dict(how), digest([*facts, pool, how])[:20])

    given = [member("given", name, {"model": name}) for name in ("original", "retrained")]
    pools = settings.pools
    kinds = [(pool, kind) for pool, own in POOLS.items() for kind in own]
    taught = [
        member(
            pool,
            f"{kind}, {passes} passes, seed {seed}",
            {"kind": kind, "passes": passes, "seed": seed, "rate": pools.learning_rate, "batch": pools.batch_size},
        )
        for seed, passes, (pool, kind) in itertools.product(pools.seeds, pools.passes, kinds)
    ]
    runs = [
        member("unlearned", name, {"run": run.model_dump(mode="json", exclude=UNKEYED | {"model", "device"})})
        for name, run in _runs(settings)
    ]
    found = [*given, *(each for pair in itertools.zip_longest(taught, runs) for each in pair if each is not None)]
    keys = [each.key for each in found]
    again = next((each for i, each in enumerate(found) if each.key in keys[:i]), None)
    if again is not None:
        raise UserError(f"Two models are the same: {again.name} is there under another name. Leave one out.")
    return found


def _runs(settings: MetaEvaluate) -> Iterator[tuple[str, Unlearn]]:
    """Yield name and settings of every unlearning run.

    Raises:
        UserError: see `run_of`; or a method is to be distilled, which these models are not.
    """
    compare = Compare(
        model=settings.model, methods=settings.methods, out="unused", data=settings.data, common=settings.common,
        settings=settings.settings, device=settings.device,
    )  # fmt: skip
    distilled = list(distilled_rows(compare))
    if distilled:
        raise UserError(f"settings.{distilled[0]} has 'distill', which only `alter compare` does: leave it out.")
    points = itertools.product(settings.seeds, settings.rates, settings.epochs, settings.methods)
    for seed, rate, epochs, method in points:
        name = f"{method}, rate × {rate:g}, {epochs:g} epochs, seed {seed}"
        yield name, run_of(compare, method, settings.split, seed, (rate, epochs))


# What is measured of each --------------------------------------------------------------------------------------------


def stored(out: Path, member: Member) -> Found | None:
    """Return what was measured of a member before, or None.

    Raises:
        UserError: its file cannot be read.
    """
    path = out / "members" / f"{member.key}.json"
    if not path.is_file():
        return None
    return Found(**read_object(path, "what was measured of a model")["found"])


def measure_member(settings: MetaEvaluate, tools: Measuring, member: Member, out: Path) -> Found:
    """Make a member, measure it, write `out`/members/KEY.json and return it. A model that cannot be made has `failed` set."""
    started = time.time()
    folder = out / "models" / member.key
    try:
        figures, leaks, keeps = _measured(settings, tools, member, folder)
        found = Found(member.pool, member.name, round(time.time() - started, 1), figures, leaks, keeps)
    except ValueError as error:  # a UserError, or figures that the metrics refuse
        # what the system refused (a full disk) is no result: the same command tries again
        if member.pool == "given" or passing(error):
            raise
        reason = " ".join(str(error).replace(str(folder), "its folder").split())
        found = Found(member.pool, member.name, round(time.time() - started, 1), {}, {}, None, reason)
    told = {"found": asdict(found), "how": member.how, "provenance": provenance()}
    write_atomic(out / "members" / f"{member.key}.json", to_json(told))
    if not settings.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _measured(
    settings: MetaEvaluate, tools: Measuring, member: Member, folder: Path
) -> tuple[dict[str, dict[str, float]], dict[str, float], float]:
    """Measure a member: figures by state, leaks after the attack, and what is kept."""
    if member.pool in POOLS:
        model, tokenizer = _taught(settings, tools, member)
        return {"before": tools.figures(model, tokenizer)}, {}, tools.keeps(model, tokenizer)
    if member.pool == "unlearned":
        source = _unlearned(settings, member, folder)
    else:
        source = (settings.model if member.name == "original" else settings.retrained, None)
    model, tokenizer = tools.load(*source)
    figures, keeps = {"before": tools.figures(model, tokenizer)}, tools.keeps(model, tokenizer)
    if member.name == "original":
        return figures, {}, keeps
    how, rows = settings.relearn, tools.rows
    quantize(model, 4)
    figures["quantised"] = tools.figures(model, tokenizer)
    model, tokenizer = _relearned(settings, tools, source, rows.measured, how.passes)
    figures["relearned"] = tools.figures(model, tokenizer)
    model, tokenizer = _relearned(settings, tools, source, rows.attacker, how.attack_passes)
    return figures, tools.given_away(model, tokenizer), keeps


def _relearned(
    settings: MetaEvaluate, tools: Measuring, source: tuple[str, str | None], rows: Sequence[Example], passes: int
) -> tuple[Any, Any]:
    """Train a model on rows again."""
    how = settings.relearn
    model, tokenizer = tools.load(*source)
    answers = [(row, row.answer) for row in rows]
    train_on(
        model, tokenizer, answers, rate=how.learning_rate, passes=passes, batch_size=how.batch_size, seed=settings.seed
    )
    return model, tokenizer


def _taught(settings: MetaEvaluate, tools: Measuring, member: Member) -> tuple[Any, Any]:
    """Train the retrained model as a member of its pool."""
    how = member.how
    draw = random.Random(how["seed"])

    def said(row: Example) -> str:
        if how["kind"] == "paraphrased":
            return str(row.row["paraphrased_answer"])
        if how["kind"] == "wrong":
            # the last one is the holdout's
            return str(draw.choice(row.row["perturbed_answer"][:-1]))
        return row.answer

    retain = examples(tofu_rows("retain_perturbed", settings.data))
    draw.shuffle(retain)
    own = [] if how["kind"] == "retain" else [(row, said(row)) for row in tools.rows.measured]
    count = 2 * len(tools.rows.measured) - len(own)
    rows = [*own, *((row, row.answer) for row in retain[:count])]
    model, tokenizer = tools.load(settings.retrained)
    train_on(model, tokenizer, rows, rate=how["rate"], passes=how["passes"], batch_size=how["batch"], seed=how["seed"])
    return model, tokenizer


def _unlearned(settings: MetaEvaluate, member: Member, folder: Path) -> tuple[str, str | None]:
    """Run a member's unlearning in `folder`, and return model and adapter."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    run = Unlearn.model_validate(
        member.how["run"] | {"model": settings.model, "device": settings.device, "out": str(folder)}
    )
    unlearn(run)
    if run.adapter.result == "model":
        return str(folder / "model"), None
    return settings.model, str(folder / "adapter")
