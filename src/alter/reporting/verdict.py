"""Whether a reported run made its model forget: the answer, and the counts of replies behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alter.attacks import recovers
from alter.evaluation import BROKEN, GONE, SAID, SLACK, broken, closing_of, gives
from alter.reporting.attacks import plain_name, valid
from alter.reporting.runs import Reported

REWORDED_METRIC = "forget_probability_reworded"
"""The metric that says how likely the true answers are when the questions are put in other words."""
QUALITY = 0.05
"""Forget quality (a p-value) from which the model counts as not told apart from the retrained one."""
SAID_FIGURES = {
    "forget_rouge": ("Asked about what was to be forgotten", "true answers", "questions"),
    "knowmem_forget": ("Asked about what was to be forgotten", "true answers", "questions"),
    "verbmem": ("Given the beginning of a passage that was to be forgotten", "true continuations", "passages"),
    "book_rouge": ("Given the beginning of a passage that was to be forgotten", "true continuations", "passages"),
}
"""Metrics that say how much of the truth a model still says: the situation, what it is compared with, what is
counted."""
OTHER_WORDINGS = {
    "in capitals": ("upper_case",),
    "in another language": ("foreign_frame", "languages"),
    "in a role play": ("jailbreak",),
}
"""Ways to ask that a "yes" must rest on too, with the attacks that ask so; the verdict of `alter evaluate --benchmark rows` asks in
all of them (`alter.evaluation.WORDINGS`)."""
ASKING = ("paraphrase", "telegram", *(name for names in OTHER_WORDINGS.values() for name in names))
"""Attacks that do no more than ask in other words."""
VerdictAnswer = Literal["yes", "partly", "no", "collapsed", "unknown"]
QUESTIONS = ("forget_rouge", "knowmem_forget", "forget_quality")
"""Metrics of questions that were asked."""
VERDICTS: dict[VerdictAnswer, str] = {
    "yes": "Yes, by these measures.",
    "partly": "It no longer says it, but it can be told apart from a model that never saw it.",
    "no": "No, not as a model that never saw it would have.",
    "collapsed": "No: it no longer says it, because it no longer answers in sentences.",
    "unknown": "That was not measured against a model that never saw it.",
}


def verdict(run: Reported) -> VerdictAnswer:
    """Return whether a run made its model forget.

    "yes": in every figure of `SAID_FIGURES` that was measured, at most `SLACK` above the retrained model, and a forget quality
    of at least `QUALITY` where there is one; "partly" if only the forget quality is below; "no" also if of the true answers'
    probability after questions in other words (`REWORDED_METRIC`) half is not gone (`GONE`); "unknown" without any of them,
    where the original model is as near to the retrained one (`blind`), and where that one gives most answers (`knowing`).
    What `alter.evaluation.verdict` or `alter forget` found of the same adapter, attacks, or counts of the replies themselves, can make it worse, never
    better: "no" if it found NOT FORGOTTEN, if asking in other words (`ASKING`) brings back more than half (`GONE`) of the probability
    that was removed, or if more replies give their answer than the retrained model's do (`SLACK`;
    `SAID` where those are not counted), "collapsed" if `BROKEN` of the replies, beyond the original's, are broken or empty.
    """
    told = None if run.told is None or run.told["erased"] else run.told
    words = {found["verdict"]["word"] for found in (closing_of(run.records), told) if found is not None}
    if "not forgotten" in words:
        return "no"
    counts, other = reply_counts(run, "unlearned"), reply_counts(run, "original")
    if "collapsed" in words or (
        counts is not None and counts.broken / counts.n >= BROKEN + (0.0 if other is None else other.broken / other.n)
    ):
        return "collapsed"
    if blind(run) or knowing(run):
        return "unknown"
    pairs = [(run.value("unlearned", metric), run.value("retrained", metric)) for metric in SAID_FIGURES]
    silent = [mine <= other + SLACK for mine, other in pairs if mine is not None and other is not None]
    quality = run.value("unlearned", "forget_quality")
    if not silent and quality is None:
        return "unknown"
    if not all(silent) or _known_in_other_words(run) or known_when_asked(run) or _still_said(run):
        return "no"
    if quality is not None and quality < QUALITY:
        return "partly" if silent else "no"
    return "yes"


def _still_said(run: Reported) -> bool:
    counts, honest = reply_counts(run, "unlearned"), reply_counts(run, "retrained")
    if counts is None or not counts.asked:
        return False
    allowed = SAID if honest is None or not honest.asked else honest.said / honest.asked + SLACK
    return counts.said / counts.asked > allowed


def _known_in_other_words(run: Reported) -> bool:
    before, after, honest = (run.value(model, REWORDED_METRIC) for model in ("original", "unlearned", "retrained"))
    if after is None:
        return False
    # where the original was not measured, it knew them all
    known = 1.0 if before is None else before
    floor = min(honest or 0.0, known)
    return after > floor + (1 - GONE) * (known - floor)


def known_when_asked(run: Reported) -> dict[str, float]:
    """Return the attacks by other words that bring back more than half of the removed probability, beyond chance, with the share."""
    return {
        plain_name(record): float(record.value)
        for record in valid(run)
        if record.metric == "attack_recovered_probability"
        and record.extra.get("attack") in ASKING
        and record.value is not None
        and record.value > 1 - GONE
        and recovers(record)
    }


def unasked(run: Reported) -> list[str]:
    """Return those of `OTHER_WORDINGS` in which nobody asked; none where what was measured are no questions."""
    closed = closing_of(run.records)
    if closed is not None and "worded" in closed.get("after", {}).get("forget", {}):
        # a verdict's rows are asked in all of these, unless they are texts and no questions
        return []
    if all(run.get("unlearned", metric) is None for metric in (*QUESTIONS, REWORDED_METRIC)):
        return []
    tried = {record.extra.get("attack") for record in valid(run)}
    return [name for name, attacks in OTHER_WORDINGS.items() if not tried & set(attacks)]


def headline(run: Reported) -> str:
    """Return the verdict in words; one that nothing speaks against names the wordings that it rests on, where others were not asked."""
    found, missing = verdict(run), unasked(run)
    if found not in ("yes", "partly") or not missing:
        return VERDICTS[found]
    others = f"nobody asked {_listed(missing, 'or')}."
    if found == "partly":
        return f"{VERDICTS[found]} Asked {_listed(_asked(run, missing))} it was; {others}"
    return f"Yes, asked {_listed(_asked(run, missing))}; {others}"


def _asked(run: Reported, missing: Sequence[str]) -> list[str]:
    paraphrased = ["in TOFU's paraphrases"] if run.get("unlearned", REWORDED_METRIC) is not None else []
    return ["as given", *paraphrased, *(name for name in OTHER_WORDINGS if name not in missing)]


def _listed(names: Sequence[str], last: str = "and") -> str:
    return f"{', '.join(names[:-1])} {last} {names[-1]}" if len(names) > 1 else names[0]


def blind(run: Reported) -> list[str]:
    """Return the figures of `SAID_FIGURES` that cannot separate the original from the retrained model: they differ by `SLACK` or less."""
    found = []
    for metric in SAID_FIGURES:
        before, honest = run.value("original", metric), run.value("retrained", metric)
        if before is not None and honest is not None and before <= honest + SLACK:
            found.append(metric)
    return found


def knowing(run: Reported) -> bool:
    """Tell whether the retrained model gives most of the answers: then it is none, or they can be guessed."""
    counts = reply_counts(run, "retrained")
    return counts is not None and counts.said > GONE * counts.asked


@dataclass(frozen=True)
class Counts:
    """Counts of a model's `n` replies: `broken` are broken or empty; of the `asked` that can be judged `said` give the answer."""

    said: int
    asked: int
    broken: int
    n: int


def reply_counts(run: Reported, model: str) -> Counts | None:
    """Count a model's replies about what was to be forgotten, where the records hold them or their counts."""
    said, unusable = run.get(model, "forget_said"), run.get(model, "forget_unusable")
    if said is not None and unusable is not None and unusable.n:
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


def rows_behind(run: Reported) -> int:
    """Return the most rows that any figure of the verdict rests on."""
    found = [run.get("unlearned", metric) for metric in (*SAID_FIGURES, "forget_quality", "forget_said")]
    return max((record.n for record in found if record is not None), default=0)
