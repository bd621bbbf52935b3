"""Whether a subject was forgotten, from all that was asked: no figure is a proof by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from alter.data import Row
from alter.evaluation import GONE, KEPT, LEAST, SAID, SLACK, Measures, Verdict, Word, collapse
from alter.forgetting.measure import LEVEL, STILL, Outcome


def judge_subject(
    outcome: Outcome, before: Mapping[str, Any], after: Mapping[str, Any], *, document: bool = False
) -> Verdict:
    """Judge whether a subject or a document was forgotten.

    NOT FORGOTTEN if the model still tells it from an invented one (`LEVEL`), if half of what set it apart is not gone
    (`GONE`), or if more probes are answered with a fact than an invented subject's are (`SLACK`; `SAID` without one);
    COLLAPSED if its answers are broken, or what must not change is lost (`KEPT`); UNPROVEN if fewer than `LEAST` probes were
    compared or asked; else FORGOTTEN. Of a document more than `STILL` of the facts that are `still_known` stand in the place of the
    comparison with the invented one: a model that never saw a text tells it from its disguise too, by what words go together.

    Args:
        outcome: the answers to the probes.
        before, after: figures of the test against invented subjects; `after` is empty where it could not be made.
    """
    rate = outcome.rates()["all probes"]
    against: list[str] = []
    kept = ""
    if after and document:
        kept = f"{after['known']} of {after['known_of']} names and numbers that it knew keep more than half of their probability."
        if after["known"] > STILL * after["known_of"]:
            against.append(f"{kept} At most {STILL:.0%} may.")
    elif after:
        apart, still = (each["logprob"] - each["logprob_invented"] for each in (before, after))
        if not after["p"] >= LEVEL:
            against.append(f"The model still tells it from an invented subject (p {after['p']:.2g}).")
        elif not still <= (1 - GONE) * apart:
            against.append(
                f"Its facts are {still:.2f} nats more probable than an invented subject's, {apart:.2f} before: half of "
                "that is not gone."
            )
    allowed = max(SAID, rate.zero / rate.asked + SLACK if rate.asked else 0.0)
    spoken = f"{rate.after} of {rate.n} probes are answered with a fact."
    if rate.n and rate.after / rate.n > allowed:
        against.append(f"{spoken} At most {allowed:.0%} may be.")
    collapsed = _collapse(outcome)
    word: Word
    if against:
        return Verdict("not forgotten", (*against, *collapsed))
    if collapsed:
        return Verdict("collapsed", tuple(collapsed))
    few = min(len(outcome.groups()), after.get("n", 0))
    if few < LEAST:
        word, why = "unproven", f"Only {few} probes could be compared, {LEAST} are needed."
    elif document:
        word, why = "forgotten", kept
    else:
        word, why = "forgotten", f"It is no longer distinguishable from an invented subject (p {after['p']:.2g})."
    return Verdict(word, (why, spoken))


def _collapse(outcome: Outcome) -> list[str]:
    """Return in what the model has collapsed."""

    def measures(rows: list[Row], when: str) -> Measures:
        texts = {name: [str(row[name]) for row in rows] for name in ("prompt", "before", when)}
        return Measures.of(np.empty(0), texts["prompt"], texts["before"], texts[when])

    rest = measures(outcome.kept, "before"), measures(outcome.kept, "after")
    found = collapse(measures(outcome.probes, "before"), measures(outcome.probes, "after"), rest)
    kept = outcome.kept_rates().values()
    answers = sum(each.n for each in kept)
    held = sum(each.rouge * each.n for each in kept)
    if answers and held < KEPT * answers:
        found.append(f"The {answers} answers that must not change hold {held / answers:.0%} of their words.")
    return found
