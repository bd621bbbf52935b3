"""Sample answers: each model's replies to the same questions, with what comes from the truth marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from alter.rendering import Html, tag
from alter.reporting.quoting import notice, reply_shown, short
from alter.reporting.runs import Reported
from alter.reporting.tables import by_model

SAMPLED = ("forget_rouge", "knowmem_forget", "verbmem", "book_bleu")
"""Metrics whose records hold what the models said."""


@dataclass(frozen=True)
class Sample:
    """One question with the truth, and what each model said: its reply and how much of the truth is in it."""

    question: str
    truth: str
    replies: dict[str, tuple[str, float | None]]


def samples(run: Reported) -> tuple[str, list[Sample]]:
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


def evenly(total: int, count: int) -> list[int]:
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


def sample_answers(run: Reported, level: int, count: int) -> list[Html]:
    """Return the section that quotes answers: `count` evenly spread, then those that hold most of the truth.

    Args:
        run: the run, which has samples.
        level: of the section's headings.
        count: answers to show.
    """
    metric, found = samples(run)
    places = evenly(len(found), count)
    most = worst(found, max(1, count // 2), places)
    scale = 100.0 if metric == "book_bleu" else 1.0
    figure = "BLEU" if metric == "book_bleu" else "ROUGE-L"

    def card(sample: Sample) -> Html:
        parts = [tag("dt", "the truth"), tag("dd", short(sample.truth), dir="auto")]
        items = [tag("div", *parts, class_="truth")]
        for model, (reply, value) in sample.replies.items():
            known = value is not None and math.isfinite(value)
            score = f" · {figure} {value / scale:.2f}" if known and value is not None else ""
            name = f"{model} (reference)" if model == "retrained" else model
            said = reply_shown(sample.truth, reply, sample.question)
            head = tag("dt", name, tag("span", score, class_="soft"))
            items.append(tag("div", head, tag("dd", said, dir="auto")))
        title = tag(f"h{level + 1}", short(sample.question) or "A passage", dir="auto")
        return tag("div", title, tag("dl", *items, class_="replies"), class_="sample")

    intro = notice("This section quotes")
    shown = [intro, tag(f"h{level}", f"{len(places)} of {len(found)}, evenly spread")]
    shown += [card(found[i]) for i in places]
    if most:
        shown.append(tag(f"h{level}", "Where the unlearned model says most of the truth"))
        shown += [card(found[i]) for i in most]
    return shown
