"""What attacks recovered: in one sentence for the summary, and as the section with table and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence

from alter.attacks import RECOVERED, recovers
from alter.rendering import Html, decimal, finite, folded, grid, join, lines, percent, tag
from alter.reporting.quoting import notice, reply_shown, short
from alter.reporting.runs import Reported
from alter.settings import rounded
from alter.storage import Record

MEASURES = {"rouge": "ROUGE-L", "probability": "probability", "probe": "accuracy of the probe"}


ATTACK_NAMES = {
    "relearn": "training again on some of the rows",
    "relearn_lora": "training again on some of the rows, by a LoRA",
    "relearn_searched": "training again on some of the rows, at the rate found best",
    "benign": "training on unrelated text",
    "benign_lora": "training on unrelated text, by a LoRA",
    "quantize_8": "rounding the weights to 8 bits",
    "quantize_4": "rounding the weights to 4 bits",
    "prune_20": "cutting the smallest 20 % of the weights",
    "prune_50": "cutting the smallest 50 % of the weights",
    "wanda_20": "cutting the 20 % of the weights that matter least (Wanda)",
    "wanda_50": "cutting the 50 % of the weights that matter least (Wanda)",
    "paraphrase": "asking in other words",
    "telegram": "asking in a telegram's words",
    "reversed": "asking with the words in reverse order",
    "upper_case": "asking in capitals",
    "lower_case": "asking in small letters",
    "joined": "asking without spaces",
    "foreign_frame": "asking within a request in German",
    "languages": "asking in other languages",
    "jailbreak": "giving a reason to answer (jailbreaks)",
    "dialogue": "asking again over several turns",
    "hint": "telling the initials of the answer",
    "few_shot": "giving other forgotten rows as examples",
    "evolve": "searching for a prompt that works",
    "beginning": "beginning the reply with consent",
    "prefill": "beginning the reply with the truth",
    "sample": "drawing many replies and keeping the best",
    "soft_prompt": "training vectors before the answer",
    "strip": "taking the adapter off",
    "probe": "reading the answer out of hidden states",
    "lens": "reading the answer out of inner blocks, by the model's own head",
}
"""What attacks do, in plain words, by their names; one of a plugin is shown by its name."""


def plain_name(record: Record) -> str:
    """Name the attack of a record in plain words."""
    name = str(record.extra.get("attack"))
    return ATTACK_NAMES.get(name, name)


def figure_of(record: Record) -> str:
    """Name the figure that an attack's record holds, as the page shows it."""
    kind = record.metric.removeprefix("attack_recovered_")
    return MEASURES.get(kind, kind)


def recovered_records(run: Reported) -> list[Record]:
    """Return the records that say which share of what was removed an attack recovers."""
    return [r for r in run.attacks if r.metric.startswith("attack_recovered_")]


def no_tests(run: Reported) -> dict[str, list[str]]:
    """Return the attacks that are no valid test here, by why: no share can be given, or the attack learned nothing itself.

    An attack that brought something back is one, however badly it was trained.
    """
    found: dict[str, list[str]] = {}
    for record in recovered_records(run):
        if "refused" in record.extra:
            found.setdefault(str(record.extra["refused"]), []).append(f"{plain_name(record)} ({figure_of(record)})")
    works = {str(record.extra.get("attack")) for record in recovered_records(run) if recovers(record)}
    for name, why in _untrained(run).items():
        if name not in works:
            found.setdefault(why, []).append(ATTACK_NAMES.get(name, name))
    return found


def _untrained(run: Reported) -> dict[str, str]:
    """Return why training attacks did not learn their own rows, by name."""
    from alter.attacks import untrained

    return dict(note.split(" ", 1) for note in untrained(run.attacks))


def valid(run: Reported) -> list[Record]:
    """Return the records of `recovered_records` of attacks that are a valid test."""
    learned_nothing = _untrained(run)
    return [
        record
        for record in recovered_records(run)
        if record.value is not None and (record.extra.get("attack") not in learned_nothing or recovers(record))
    ]


def brought_back(run: Reported) -> str:
    """Describe in a sentence which attacks were tried and what they recover."""
    if not run.attacks:
        return "Nobody tried: no attack was run."
    found = valid(run)
    rest = sorted({name for names in no_tests(run).values() for name in names})
    told = f" No valid test here: {', '.join(rest)}." if rest else ""
    if not found:
        return f"Not known: no attack that was run is a valid test here; the attacks' section says why.{told}"
    tried = list(dict.fromkeys(map(plain_name, found)))
    listed = f"Tried: {', '.join(tried)}."
    strongest: dict[str, Record] = {}
    for record in found:
        name = plain_name(record)
        if recovers(record) and (name not in strongest or (record.value or 0) > (strongest[name].value or 0)):
            strongest[name] = record
    if not strongest:
        return f"{listed} None brought back {percent(RECOVERED)} or more of what was removed, beyond chance.{told}"
    parts = [
        f"{name} {percent(min(record.value or 0.0, 1.0))} ({figure_of(record)}; it needs {record.extra.get('needs')})"
        for name, record in strongest.items()
    ]
    others = " Others bring back nothing beyond chance." if len(strongest) < len(tried) else ""
    return f"{listed} Of what was removed, these bring back: {'; '.join(parts)}.{others}{told}"


def attacks(run: Reported, level: int, count: int) -> list[Html]:
    """Return the section: what each attack recovers, an example reply to each, curves, and what is no valid test.

    Args:
        run: the run, which was attacked.
        level: of the section's headings.
        count: 0 quotes no reply.
    """
    rows = []
    for record in valid(run):
        extra = record.extra
        assert record.value is not None
        share = rounded(record.value, ".2f") + _bracketed(extra.get("interval"))
        step = "".join(f", {key} {extra[key]}" for key in ("step", "depth", "variant") if extra.get(key) is not None)
        values = [_value(record, key) for key in ("after", "before", "retrained", "original")]
        rows.append([plain_name(record), share, *values, record.n, f"{figure_of(record)}{step}", extra.get("needs")])
    caption = (
        "recovered: 1 is all that unlearning removed, 0 no more than the same attack gets out of the retrained model; "
        "in brackets the 95 % interval over the n rows. under attack, before: the unlearned model. Of several steps, depths or variants, the one that is "
        "best for the attacker."
    )
    head = [
        "attack",
        "recovered",
        "under attack",
        "before",
        "retrained",
        "original",
        "n",
        "figure",
        "the attacker needs",
    ]
    shown: list[Html] = []
    if rows:
        shown = [grid(head, rows, label="Attacks", numbers=range(1, 7), wide=[8], caption=caption, reference=4)]
    names = dict.fromkeys(str(r.extra.get("attack")) for r in valid(run))
    examples = [(name, *best) for name in names if (best := _best(run, name)) is not None]
    if count and examples:
        quotes = [notice("These replies hold", asked=all(question for _, question, *_ in examples))]
        quotes += [_example(level, *each) for each in examples]
        shown.append(folded("The reply to each attack that holds most of the truth", quotes))
    plots = []
    for record in valid(run):
        points = [point for point in record.extra.get("curve", []) if "step" in point]
        if len(points) < 2:
            continue
        series = {
            name: [(p["step"], p[key]) for p in points if finite(p.get(key))]
            for name, key in (("unlearned", "after"), ("retrained", "retrained"), ("original", "original"))
        }
        known = {name: values for name, values in series.items() if values}
        if not known:
            continue
        name = f"{plain_name(record)}: {figure_of(record)}"
        ends = ", ".join(f"{model} {values[-1][1]:.2f}" for model, values in known.items())
        plots.append(
            lines(
                known, across="steps of the attack", up_to=1.0, caption=f"{name} on rows the attacker did not have",
                alt=f"Line chart of {name} over the steps of the attack. At its end: {ends}.",
            )
        )  # fmt: skip
    shown += [tag("div", *plots, class_="plots")] if plots else []
    kept = {str(record.extra.get("attack")) for record in valid(run)}
    notes = [f"{ATTACK_NAMES.get(name, name)} {why}" for name, why in _untrained(run).items() if name in kept]
    shown += [tag("p", f"{note[0].upper()}{note[1:]}", class_="small") for note in notes]
    none = no_tests(run)
    if none:
        shown.append(tag(f"h{level}", "No valid test here"))
        shown.append(tag("ul", *(tag("li", f"{', '.join(names)}: {why}") for why, names in none.items())))
    return shown


def _value(record: Record, key: str) -> Html:
    """Return one of the figures behind a recovered share, and its 95 % interval where the record holds it."""
    ends = _bracketed((record.extra.get("intervals") or {}).get(key))
    shown = decimal(record.extra.get(key))
    return join([shown, tag("span", ends, class_="soft small")]) if ends else join([shown])


def _bracketed(ends: Sequence[float | None] | None) -> str:
    """Format an interval; empty for none, or where what was measured was not finite, which JSON holds as null."""
    known = [end for end in ends or () if end is not None]
    return f" [{', '.join(rounded(end, '.2f') for end in known)}]" if len(known) == 2 else ""


def _best(run: Reported, name: str) -> tuple[str, str, str] | None:
    """Return the question, the truth and the reply to an attack that holds most of it, or None where the records hold no replies."""
    best: tuple[float, str, str, str] | None = None
    for record in run.attacks:
        extra = record.extra
        if record.metric != "attack_rouge" or record.model != "unlearned" or extra.get("attack") != name:
            continue
        # what the attacker was trained on comes back best of all, and is no finding
        if extra.get("part") == "relearned":
            continue
        replies, truths = extra.get("replies") or [], extra.get("references") or []
        asked = extra.get("questions") or [""] * len(replies)
        for score, question, truth, reply in zip(record.per_item or [], asked, truths, replies, strict=False):
            if score is not None and math.isfinite(score) and (best is None or score > best[0]):
                best = (score, str(question), str(truth), str(reply))
    return None if best is None else best[1:]


def _example(level: int, name: str, question: str, truth: str, reply: str) -> Html:
    """Show the reply to an attack beside the truth."""
    said = reply_shown(truth, reply, question)
    parts = [("the question", short(question))] if question else []
    parts.append(("the truth", short(truth)))
    shown = [tag("div", tag("dt", what), tag("dd", told, dir="auto"), class_="truth") for what, told in parts]
    shown.append(tag("div", tag("dt", "unlearned, under attack"), tag("dd", said, dir="auto")))
    title = tag(f"h{level}", ATTACK_NAMES.get(name, name))
    return tag("div", title, tag("dl", *shown, class_="replies"), class_="sample")
