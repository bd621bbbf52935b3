"""Was it forgotten? The verdict, from measures before and after, in words and with its reasons.

Two kinds of evidence are needed, and neither is enough alone: what the model says (replies that still give the answer,
ROUGE-L recall of words of any script) and how likely the true answers are to it. What counts as gone is taken from a
model that never saw the rows where there is one that can be trusted, and from absolute bounds where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from alter.core import Finding
from alter.evaluation.measures import Measures, mean_interval

Word = Literal["forgotten", "not forgotten", "collapsed", "unproven"]

SLACK = 0.05
"""How far above the reference recall and share of given answers may lie; a reference so near to `before` is refused."""
GONE = 0.5
"""Part of the probability of the true answers above the reference's (above 0 without one) that must be gone."""
SAID = 0.1
"""Share of replies that may still give their answer where no reference says how many do by chance."""
RECALL = 0.75
"""Part of the recall before that may be left where no reference says how much there is by chance."""
REPEATS = 0.15
"""Mean share of repeated four-word phrases within a reply, beyond that before (of these rows or of those to keep, whichever is
more), from which the model has collapsed."""
BROKEN = 0.2
"""Share of broken and empty replies, beyond those before, from which the model has collapsed."""
KEPT = 0.5
"""Share of the probability of the rows to keep, and of the answers to them, below which the model has collapsed."""
UNKNOWN = 0.05
"""Probability of the true answers below which a model that gives none of them has nothing to forget."""
LEAST = 5
"""Fewest answered rows for a proof."""
FIRM = 100
"""Answered rows from which a page may colour a verdict green."""
WORDINGS = ("capitals", "telegram", "German frame", "role play")
"""Wordings of `alter.data.rewording.MEASURED`, which no router is fitted with, that questions are asked again in."""
WORDED = 32
"""Most rows that are asked again."""


@dataclass(frozen=True)
class Verdict:
    """The verdict's word, its reasons in sentences, and why the reference was refused, or None.

    `wordings` are those in which the answers are still known, where that alone speaks against forgetting.
    """

    word: Word
    why: tuple[str, ...]
    reference: str | None = None
    refused: str | None = None
    wordings: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The word in capitals and its reasons."""
        return f"{self.word.upper()}. {' '.join(self.why)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON values."""
        return {**asdict(self), "why": list(self.why), "wordings": list(self.wordings)}


def distrust(reference: Measures, before: Measures, by: str) -> str | None:
    """Return why a model cannot serve as the reference: it knows the rows, or nearly as well as before, gives most answers, or
    no finite probabilities; or None.

    Args:
        reference: of the retrained model on the rows, or of the untouched model on rows of their kind never seen.
        before: of the untouched model on the rows.
        by: what the reference is called.
    """
    if not np.isfinite(reference.probability).all():
        return f"The {by} is no reference: it gives no finite probabilities."
    if reference.given > GONE * reference.asked:
        return (
            f"The {by} is no reference: it gives {reference.given} of {reference.asked} answers, so it knows the rows, or they "
            "can be guessed."
        )
    own, then = reference.summary(), before.summary()
    for name, what in (("probability", "probability of the true answers"), ("rouge", "ROUGE-L recall")):
        if own[name] is None or then[name] is None:
            continue
        if own[name] >= then[name] - SLACK:
            return (
                f"The {by} is no reference: its {what} is {own[name]:.3f}, {then[name]:.3f} before forgetting, so it "
                "knows the rows, or they were never known better."
            )
    return None


def judge(
    before: Measures,
    after: Measures,
    *,
    reference: Measures | None = None,
    by: str = "retrained model",
    kept: tuple[Measures, Measures] | None = None,
) -> Verdict:
    """Judge whether rows were forgotten.

    NOT FORGOTTEN if too many replies give their answer, the probability of the true answers has not fallen enough
    (`GONE`, and beyond chance, row by row; `GONE` also in other wordings of the questions, as far as the untouched model
    knows the answers there), or the recall lies above the reference's or has not fallen; COLLAPSED if
    nothing of that holds but replies are broken or empty, or the rows to keep are lost; UNPROVEN if nothing speaks
    against forgetting but too little for it: fewer than `LEAST` answered rows, answers never given before, or an
    untouched model without finite probabilities; and if the model had nothing to forget (`UNKNOWN`) and knows no more now; else FORGOTTEN.

    Args:
        before, after: of the rows to forget, the same ones.
        reference: of a model that never saw them, if there is one; refused where it knows them (`distrust`).
        by: what the reference is called.
        kept: before and after of rows to keep.

    Raises:
        ValueError: no rows, or different ones before and after.
    """
    if not before.probability.size or before.probability.shape != after.probability.shape:
        raise ValueError(f"verdict: {before.probability.size} rows before and {after.probability.size} after")
    then, now = before.summary(), after.summary()
    refused = None if reference is None else distrust(reference, before, by)
    trusted = reference if refused is None else None
    notes = () if refused is None else (refused,)
    named = by if trusted is not None else None
    if not np.isfinite(after.probability).all():
        why = "The model gives no finite probabilities any more."
        return Verdict("collapsed", (why, *notes), named, refused)
    if not np.isfinite(before.probability).all():
        why = "The untouched model gives no finite probabilities: there is nothing to compare with."
        return Verdict("unproven", (why, *notes), named, refused)
    zero = None if trusted is None else trusted.summary()

    likely, against = _by_probability(before, after, zero, by)
    spoken = _spoken(before, after, zero)
    against += _by_words(then, now, zero, spoken, by)
    left = still_known(before, after, trusted)
    reworded = [] if not left else [_told(left, before)]
    lost = collapse(before, after, kept)
    if against and _unknown(then) and _unknown(now):
        given = f"none of {then['n_said']} answers" if then["n_said"] else "no answers"
        nothing = f"The untouched model gives {given}: there is nothing to forget, which proves nothing."
        word: Word = "collapsed" if lost else "unproven"
        return Verdict(word, (*lost, nothing, f"{likely}.", *notes), named, refused)
    if against:
        return Verdict("not forgotten", (*against, *reworded, *lost, *notes), named, refused)
    if reworded:
        reasons = (*reworded, spoken, f"{likely}.", *lost, *notes)
        return Verdict("not forgotten", reasons, named, refused, tuple(left))
    if lost:
        return Verdict("collapsed", (*lost, f"{likely}.", *notes), named, refused)
    lacking = _lacking(then, now, zero)
    if lacking:
        return Verdict("unproven", (*lacking, f"{likely}.", *notes), named, refused)
    return Verdict("forgotten", (spoken, f"{likely}.", *_price(kept), *notes), named, refused)


def _by_probability(
    before: Measures, after: Measures, zero: Mapping[str, Any] | None, by: str
) -> tuple[str, list[str]]:
    """Judge by probability: describe how likely the true answers are, and return what speaks against forgetting."""
    then, now = before.summary(), after.summary()
    floor = 0.0 if zero is None else min(float(zero["probability"]), float(then["probability"]))
    bound = floor + (1 - GONE) * (float(then["probability"]) - floor)
    fall = mean_interval(before.probability - after.probability)
    low, high = now["probability_interval"]
    likely = (
        f"The true answers have probability {now['probability']:.3f} ({low:.2f} to {high:.2f}, n = {now['n']}), "
        f"{then['probability']:.3f} before"
    )
    if zero is not None:
        likely += f", {zero['probability']:.3f} by the {by}"
    if now["probability"] > bound:
        return likely, [f"{likely}: more than {bound:.3f}, so not half of it is gone."]
    if now["n"] > 1 and fall[0] <= 0:
        return likely, [f"{likely}: not lower beyond chance, row by row."]
    return likely, []


def still_known(before: Measures, after: Measures, reference: Measures | None) -> dict[str, tuple[float, float]]:
    """Return the wordings in which half of the true answers' probability is not gone, before and after, the worst first.

    A wording in which the untouched model has less than half of its probability as asked is passed over: there it hardly
    knows the answers itself.
    """
    left: dict[str, tuple[float, float]] = {}
    for name in before.worded.keys() & after.worded.keys():
        then, now = float(before.worded[name].mean()), float(after.worded[name].mean())
        if then < (1 - GONE) * float(before.probability.mean()):
            continue
        seen = None if reference is None else reference.worded.get(name)
        floor = 0.0 if seen is None else min(float(seen.mean()), then)
        if not now <= floor + (1 - GONE) * (then - floor):
            left[name] = (then, now)
    return dict(sorted(left.items(), key=lambda each: -each[1][1] / each[1][0]))


def _told(left: Mapping[str, tuple[float, float]], before: Measures) -> str:
    rows = len(before.worded[next(iter(left))])
    told = "; ".join(f"{name} {now:.3f}, {then:.3f} before" for name, (then, now) in left.items())
    return (
        f"Asked in other words ({rows} questions), the true answers keep more than half of their probability: {told}."
    )


def _by_words(
    then: Mapping[str, Any], now: Mapping[str, Any], zero: Mapping[str, Any] | None, spoken: str, by: str
) -> list[str]:
    """Judge by the replies' words: answers still given, and recall above the reference's or not fallen."""
    against: list[str] = []
    if now["n_said"]:
        share = now["said"] / now["n_said"]
        allowed = SAID if zero is None or not zero["n_said"] else zero["said"] / zero["n_said"] + SLACK
        if share > allowed:
            against.append(f"{spoken} At most {allowed:.0%} may.")
    if not now["n_answers"] or then["rouge"] is None:
        return against
    held = f"The replies hold {now['rouge']:.3f} of the answers' words"
    if zero is not None and zero["rouge"] is not None:
        if now["rouge"] > zero["rouge"] + SLACK:
            against.append(f"{held}, those of the {by} {zero['rouge']:.3f}.")
    elif now["rouge"] > (most := max(RECALL * then["rouge"], SLACK)):
        against.append(f"{held}, {then['rouge']:.3f} before: more than {most:.3f}.")
    return against


def _lacking(then: Mapping[str, Any], now: Mapping[str, Any], zero: Mapping[str, Any] | None) -> list[str]:
    """Return what a proof lacks where nothing speaks against forgetting."""
    lacking: list[str] = []
    if now["n_said"] < LEAST:
        lacking.append(
            f"Only {now['n_said']} replies say something of it, {LEAST} are needed: probability alone is no proof."
        )
    elif then["said"] / then["n_said"] <= (SAID if zero is None else 0.0) or then["said"] <= now["said"]:
        lacking.append(
            f"The model gave {then['said']} of {then['n_said']} answers before as well, so that it does not now proves "
            "nothing."
        )
    if now["n"] < LEAST:
        lacking.append(f"{now['n']} rows are too few.")
    return lacking


def _unknown(figures: Mapping[str, Any]) -> bool:
    """Tell whether a model knows nothing of the rows: no answer given, low recall, low probability."""
    recalled = figures["rouge"] is None or figures["rouge"] < GONE
    return not figures["said"] and recalled and figures["probability"] < UNKNOWN


def _spoken(before: Measures, after: Measures, zero: Mapping[str, Any] | None) -> str:
    then, now = before.summary(), after.summary()
    if not now["n_said"]:
        return "No reply says anything of it."
    low, high = now["said_interval"]
    told = f"{now['said']} of {now['n_said']} replies still give the answer ({low:.0%} to {high:.0%}), {then['said']} before"
    if zero is not None and zero["n_said"]:
        told += f", {zero['said']} of {zero['n_said']} by the reference"
    return f"{told}."


def collapse(before: Measures, after: Measures, kept: tuple[Measures, Measures] | None) -> list[str]:
    """Return in what a model has collapsed: broken or empty replies, replies that go round, rows to keep that are lost."""
    found = []
    # a model without a chat's turns goes round by habit: what it does on other rows is no harm on these
    habit = float(kept[0].repetition.mean()) if kept is not None and len(kept[0].recall) else 0.0
    for was, now, where in (
        (before, after, "about what was to be forgotten"),
        *(((*kept, "about what was to stay"),) if kept else ()),
    ):
        n = len(now.recall)
        if n and now.unusable / n >= BROKEN + was.unusable / max(len(was.recall), 1):
            found.append(f"{now.unusable} of {n} replies {where} are broken or empty, {was.unusable} before.")
        if n and len(was.recall) and now.repetition.mean() >= REPEATS + max(habit, float(was.repetition.mean())):
            found.append(
                f"The replies {where} go round: {now.repetition.mean():.0%} of their four-word phrases are said again, "
                f"{was.repetition.mean():.0%} before."
            )
    if kept is not None and kept[0].probability.size and kept[1].probability.size:
        was_, is_ = float(kept[0].probability.mean()), float(kept[1].probability.mean())
        if not is_ >= KEPT * was_:
            found.append(f"The answers to keep have probability {is_:.3f}, {was_:.3f} before.")
    if kept is not None and kept[0].given >= LEAST and kept[1].given < KEPT * kept[0].given:
        found.append(_lost(*kept))
    return found


def _lost(was: Measures, now: Measures) -> str:
    return f"Of the answers to keep {now.given} of {now.asked} are still given, {was.given} before."


def _price(kept: tuple[Measures, Measures] | None) -> list[str]:
    """Say what forgetting cost where it cost more answers to keep than `SLACK` of them."""
    if kept is None or kept[0].given - kept[1].given <= SLACK * kept[0].asked:
        return []
    return [_lost(*kept)]


def refuse_missed(verdict: Mapping[str, Any], out: Path) -> None:
    """End a command whose result has not forgotten: the result stays where it is, and the exit status says so.

    Args:
        verdict: its `word`, with the reasons under `why`.
        out: the run's folder.

    Raises:
        Finding: the word is "not forgotten" or "collapsed".
    """
    if verdict["word"] in ("not forgotten", "collapsed"):
        raise Finding(
            f"{verdict['word'].upper()}: what lies in {out} is not what was asked for. {' '.join(verdict['why'])}"
        )
