"""The summary of a run in words: what was to be forgotten, whether it was, what it cost, what recovers it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from alter.evaluation import FIRM, WORDED, WORDINGS, closing_of, others_named
from alter.rendering import Html, called, duration, grid, join, number, percent, tag
from alter.reporting.attacks import brought_back
from alter.reporting.runs import ROLES, Reported
from alter.reporting.tables import by_model, sizes, with_interval
from alter.reporting.verdict import (
    QUALITY,
    REWORDED_METRIC,
    SAID_FIGURES,
    blind,
    headline,
    knowing,
    known_when_asked,
    reply_counts,
    rows_behind,
    unasked,
    verdict,
)
from alter.storage import Record

UTILITY = 0.97
"""Share of the original's utility below which the page calls the cost noticeable."""
LEFT_OF_THE_REST = {
    "model_utility": "the utility of the original model on everything else (nine figures in one)",
    "knowmem_retain": "the original model's agreement with the true answers about what was to be kept",
    "retain_rouge": "the original model's agreement with the true answers about what was to be kept",
    "retain_accuracy": "the original model's accuracy on the texts to keep",
}
"""Metrics that say what is left of the rest, best first, in words."""
ADAPTER = (
    "The forgetting is done by an adapter, a part added to the model. It does not remove knowledge from the base "
    "model: whoever holds the base weights holds the knowledge, and switching the adapter off brings back every answer."
)

ALL_WEIGHTS = (
    "All weights of the model were changed. Nothing keeps the forgotten apart from the rest, so it cannot be switched "
    "back on, nor taken back for one request alone. The base model, wherever it still lies, holds the knowledge."
)


def reworded(run: Reported) -> dict[str, Record]:
    """Return how likely the true answers are when asked in other words, by model: the best of the metrics that cost no attack.

    Of TOFU's paraphrases where these were asked, else of what the verdict asked (`alter.evaluation.WORDINGS`), `n` at most.
    """
    found = {role: record for role in ROLES if (record := run.get(role, REWORDED_METRIC)) is not None}
    closed = closing_of(run.records)
    if "unlearned" in found or closed is None:
        return found
    sides = {
        role: closed.get(when, {}).get("forget", {}) for role, when in (("original", "before"), ("unlearned", "after"))
    }
    # what stood in for a retrained model has no column here
    if closed["verdict"].get("reference") == "retrained model":
        sides["retrained"] = closed.get("reference") or {}
    return {
        role: Record(role, REWORDED_METRIC, side["worded"], min(WORDED, side.get("n", WORDED)))
        for role, side in sides.items()
        if side.get("worded") is not None
    }


def _asked_in_other_words(run: Reported) -> list[object]:
    found = reworded(run)
    if "unlearned" not in found:
        return []
    said = [f"a probability of {number(found['unlearned'])} by the unlearned model"]
    for role, words in (("original", "the original"), ("retrained", "a model that never saw them")):
        said += [f"{number(found[role])} by {words}"] if role in found else []
    listed = ", ".join(said[:-1]) + (" and " if len(said) > 1 else "") + said[-1]
    asked = f"{sizes([found[role] for role in ('unlearned', 'original', 'retrained') if role in found])} questions"
    if run.get("unlearned", REWORDED_METRIC) is None:
        asked = f"up to {asked}: {', '.join(WORDINGS)}"
    return [f"Asked in other words, the true answers are given {listed} (per token; {asked})."]


def _forgotten(run: Reported) -> list[object]:
    found = _asked_in_other_words(run)
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
    if run.told is not None:
        asked = run.told["probes"]["all probes"]
        if run.told["erased"]:
            found.append("These are figures of the plain weights in its folder `erased`, and not of the adapter:")
        found.append(
            f"Of the {asked['before']} probes that the original model answered with a fact, {asked['after']} still are. Measured at the end, by "
            f"these: {run.told['verdict']['word'].upper()}. {' '.join(run.told['verdict']['why'])}"
        )
    for name, share in known_when_asked(run).items():
        found.append(f"By {name}, {percent(share)} of the probability that was removed comes back.")
    for metric in blind(run):
        found.append(
            f"{metric} cannot tell the original model from the retrained one, with so few rows or such rows: it says "
            "nothing about forgetting."
        )
    if knowing(run):
        found.append(
            "The retrained model gives most of the answers itself: it has seen them, or they can be guessed, so that it says "
            "nothing about forgetting."
        )
    for metric, (situation, truth, counted) in SAID_FIGURES.items():
        after = run.get("unlearned", metric)
        if after is None or after.value is None:
            continue
        before, honest = run.value("original", metric), run.value("retrained", metric)
        says = [f"the original model agreed with the {truth} by {percent(before)}"] if before is not None else []
        says.append(f"the unlearned model agrees with the {truth} by {percent(after.value)}")
        says += [f"a model that never saw them by {percent(honest)}"] if honest is not None else []
        listed = ", ".join(says[:-1]) + (" and " if len(says) > 1 else "") + says[-1]
        of = sizes([r for role in ROLES if (r := run.get(role, metric)) is not None])
        found.append(f"{situation}, {listed} (ROUGE-L over {of} {counted}).")
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


def asking(run: Reported) -> tuple[str, str, str]:
    """Return commands, ready for a shell: what asks the run's own rows in every wording, what attacks it, and the report's."""
    folder = "RUN" if run.folder is None else str(run.folder)
    quoted = shlex.quote
    model, forget = (quoted(str(run.settings.get(name, name.upper()))) for name in ("model", "forget"))
    retain = quoted(str(run.settings.get("retain", "RETAIN") or f"{folder}/retain.jsonl"))
    which, before = f" --model {model} --adapter {quoted(f'{folder}/adapter')}", ""
    if run.kind == "model":
        which, before = f" --model {quoted(f'{folder}/model')}", f" --before {model}"
    honest = next((r.provenance.get("settings", {}).get("model") for r in run.records if r.model == "retrained"), None)
    reference = f" --retrained {quoted(honest)}" if honest else ""
    ask = (
        f"alter evaluate --benchmark rows{which}{before} --forget {forget} --retain {retain}{reference} --name unlearned "
        "--json asked.json"
    )
    attack = f"alter attack{which} --forget {forget}{reference or ' --retrained RETRAINED'} --out attacks"
    return ask, attack, f"alter report {quoted(folder)}"


def _asking(run: Reported) -> list[object]:
    """Name the commands that ask in the other wordings, and that put what they find on the page."""
    ask, _, page = asking(run)
    return [
        join([tag("code", ask), ", then ", tag("code", f"{page} --records asked.json"), ", asks in these words too."])
    ]


def _cost(run: Reported) -> list[object]:
    found: list[object] = []
    for metric, words in LEFT_OF_THE_REST.items():
        before, after = run.value("original", metric), run.value("unlearned", metric)
        if before and after is not None:
            share = after / before
            noticed = "nothing that is noticeable" if share >= UTILITY else "a noticeable loss"
            of = sizes([run.get(model, metric) for model in ("unlearned", "original")])
            found.append(f"{percent(share)} of {words} is left (n = {of}): {noticed}.")
            break
    if not found and run.told is not None:
        found += [told_of_kept(form, kept) for form, kept in run.told["kept"].items()]
    if not found:
        found.append("What is left of the model's other abilities was not measured against the original.")
    if run.facts:
        seconds = sum(float(value) for value in run.facts["seconds"].values())
        trained = run.facts.get("trained_parameters")
        weights = "" if trained is None else f", {trained:,} trained weights"
        found.append(f"The run took {duration(seconds)}: {run.facts['steps']} steps{weights}.")
    return found


def told_of_kept(form: str, kept: Mapping[str, Any]) -> str:
    """Say what is left of answers that were to stay, as `alter forget` counts them."""
    said = f", {kept['said']} of {kept['named']} still say the name that they said first" if kept["named"] else ""
    return f"Of {kept['n']} answers of the kind “{form}” {kept['same']} are the same{said}."


COUNTED = {
    REWORDED_METRIC: "probability of the true answers, asked in other words",
    "forget_probability": "probability of the true answers",
    "forget_rouge": "ROUGE-L: share of the true answers that is said",
    "retain_rouge": "the same of what was to stay",
    "model_utility": "utility",
}
"""Figures of the officer's table, in words."""


def evidence(run: Reported) -> list[Html]:
    """Return the officer's view of the figures: counts, a few means, and what was measured when."""
    models = [name for name in by_model(run) if name in ROLES]
    counts = [reply_counts(run, name) for name in models]
    rows: list[list[object]] = []
    if any(counts):
        rows.append(
            ["replies that give the answer", *("-" if c is None else f"{c.said} of {c.asked}" for c in counts)]
        )
        rows.append(["broken or empty replies", *("-" if c is None else f"{c.broken} of {c.n}" for c in counts)])
    for metric, words in COUNTED.items():
        given = reworded(run) if metric == REWORDED_METRIC else {}
        values = [given.get(name) or run.get(name, metric) for name in models]
        if any(value is not None for value in values):
            most = "up to " if metric == REWORDED_METRIC and run.get("unlearned", metric) is None else ""
            rows.append(
                [f"{words} (n = {most}{sizes(values)})", *("-" if v is None else with_interval(v) for v in values)]
            )
    shown = [grid(["", *models], rows, label="Evidence", numbers=range(1, len(models) + 1))] if rows else []
    if run.told is not None:
        asked, kept = run.told["probes"]["all probes"], run.told["kept"].values()
        counted = [
            ["probes answered with a fact", asked["before"], asked["after"]],
            ["names first said in answers that were to stay", *(sum(k[c] for k in kept) for c in ("named", "said"))],
            ["the same answers among those", *[sum(k["n"] for k in kept), sum(k["same"] for k in kept)]],
        ]
        after = "plain weights (erased)" if run.told["erased"] else "unlearned"
        shown.append(grid(["", "original", after], counted, label="Probes", numbers=(1, 2)))
    measured = sorted({str(r.provenance["measured"]) for r in run.records if r.provenance.get("measured")})
    facts = [f"{run.kind} {run.digest}"] if run.digest else []
    facts += [f"measured {measured[0]}" + (f" to {measured[-1]}" if len(measured) > 1 else "")] if measured else []
    return [*shown, tag("p", "; ".join(facts), class_="small soft")] if facts else shown


def summary_section(run: Reported, level: int, *, commands: bool = True) -> list[Html]:
    """Return the summary: what was to be forgotten, whether it was, what it cost, what recovers it, and the limits.

    Args:
        run: the run.
        level: of the headings.
        commands: name the commands that measure what is missing, which hold paths of this machine.
    """
    asked: list[object] = []
    if run.settings:
        names = run.parts()
        listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        own = ", each with an expert of its own" if run.facts["router"] else ""
        parts = f" What was to be forgotten has {len(names)} parts ({listed}){own}." if len(names) > 1 else ""
        asked.append(
            f"The model {called(run.settings['model'])} was to forget {called(run.settings['forget'])} and to keep "
            f"{called(run.settings['retain'] or '') or 'what it says of itself of ordinary things (retain.jsonl)'}.{parts}"
        )
    else:
        asked.append("The records do not say; no run was given.")
    found = verdict(run)
    tone = {"yes": "good", "no": "bad", "partly": "bad", "collapsed": "bad"}.get(found)
    n = rows_behind(run)
    few = found == "yes" and n < FIRM
    missing = unasked(run) if found in ("yes", "partly") else []
    # green is for what rests on enough rows and on the other wordings too
    plain = few or (found == "yes" and missing)
    did: list[object] = [tag("span", headline(run), class_=f"verdict {tone if tone and not plain else ''}".strip())]
    if missing and commands:
        did += _asking(run)
    if few:
        did.append(f"Only {n} rows stand behind this, fewer than {FIRM}: it is a first look, no proof.")
    did += _forgotten(run)
    limits: list[object] = [ADAPTER if run.kind == "adapter" else ALL_WEIGHTS]
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
        ("Can it be brought back?", [brought_back(run)]),
        ("What can it not do?", [limits.pop(0)]),
    ]
    answers = tag("dl", *(join([tag("dt", q), tag("dd", join(a, " "))]) for q, a in pairs))
    return [
        tag("div", answers, class_="answers"),
        tag(f"h{level}", "What this does not say"),
        tag("ul", *(tag("li", limit) for limit in limits)),
    ]
