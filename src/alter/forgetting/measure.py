"""Measure the model's answers to the probes before and after, and whether it still tells the subject from invented ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from alter import metrics
from alter.core import Array
from alter.data import Encoded, Row
from alter.evaluation import alone
from alter.forgetting.certainty import fact_row
from alter.forgetting.facts import fact_words, holds, named, place_of, swap
from alter.forgetting.probes import answered, question_of, swap_probe, text_of
from alter.inference import score

if TYPE_CHECKING:
    import numpy.typing as npt

LEVEL = 0.05
"""Below this p-value the model still tells the subject from an invented one."""
ANSWERS = ("before", "after", "invented")
"""Answers to the probes: the untouched model's, those after forgetting, and the untouched model's about an invented subject, which
are those of a model that knows nothing of it: a fluent model that has forgotten speaks like them."""
STILL = 0.1
"""Largest share of the probes' facts that may still be known of what is forgotten."""
DRAWS = 10_000
"""Random choices of the permutation test."""


@dataclass(frozen=True)
class AgainstZero:
    """Log-probabilities of the known facts on n probes, with the subject in them and with each of m invented ones.

    Attributes:
        real: [n] log-probability of the fact, the subject in the probe.
        invented: [n, m] the same with each invented name.
        auc: share of pairs of one probe in which the subject's fact is the likelier one; 1/2 if nothing is known.
        pvalue: of `permuted`.
        places: [n] which of the probes given were compared.
    """

    real: Array
    invented: Array
    auc: float
    pvalue: float
    places: tuple[int, ...]


def permuted(real: Array, invented: Array, seed: int = 0, draws: int = DRAWS) -> float:
    """Test by permutation whether the subject's facts are likelier than an invented subject's; return the p-value.

    If the model knows nothing of the subject, its name is one among m + 1 of which each could be the real one, in every
    probe anew. The statistic is the mean over the probes of log p(real) minus the mean of the other m; its distribution is
    drawn `draws` times. One-sided; (1 + number at least as large) / (1 + draws). Probes count as independent.

    Args:
        real: [n].
        invented: [n, m].
    """
    scores = np.concatenate([real[:, None], invented], axis=1)
    n, names = scores.shape
    # the difference to the mean of the others is a function of the chosen one
    gain = scores - (scores.sum(axis=1, keepdims=True) - scores) / (names - 1)
    chosen = np.random.default_rng(seed).integers(names, size=(draws, n))
    drawn = gain[np.arange(n), chosen].mean(axis=1)
    return float((1 + (drawn >= gain[:, 0].mean() - 1e-12).sum()) / (1 + draws))


def against_zero(
    model: Any,
    tokenizer: Any,
    probes: Sequence[Row],
    masks: Sequence[Mapping[str, str]],
    *,
    limit: int | None = None,
    progress: bool = True,
) -> AgainstZero | None:
    """Compare the probes with disguised ones; None if fewer than two can be compared.

    The fact of a probe is the first word wanted in the answer before; what stands before it in that answer (or in the
    probe's `start`) is given. Probes that hold the fact or none of the names to disguise are left out.

    Args:
        masks: what to put for what, one for each invented subject; a probe may have its own under `masks`.
        limit: most probes that are compared, the first ones.
    """
    rows: list[Encoded] = []
    used: list[int] = []
    for number, probe in enumerate(probes):
        given: str = probe.get("start") or probe["before"]
        own = probe.get("masks", masks)
        places = [(place_of(given, word), word) for word in probe["wanted"]]
        at, word = min(((a, w) for a, w in places if a >= 0), default=(-1, ""))
        if probe.get("start"):
            at, word = len(given), probe["wanted"][0]
        # a probe that a person wrote may have no masks
        told = text_of(probe)
        disguised = any(holds(told, old) for old in own[0]) if own else False
        if at < 0 or len(used) == limit or not disguised or holds(told, word):
            continue
        used.append(number)
        for mask in ({}, *own):
            start = swap(given[:at], {old: new for old, new in mask.items() if old != word})
            rows.append(fact_row(tokenizer, question_of(swap_probe(probe, mask)), start, word))
    if len(used) < 2:
        return None
    found = score(
        model, rows, pad_token_id=tokenizer.pad_token_id, progress=progress, label="against invented subjects"
    ).logprob
    each = np.array([row.sum() for row in found], dtype=np.float64).reshape(len(used), -1)
    real, others = each[:, 0], each[:, 1:]
    auc = float(np.mean((real[:, None] > others) + 0.5 * (real[:, None] == others)))
    return AgainstZero(real, others, auc, permuted(real, others), tuple(used))


def known_apart(zero: AgainstZero) -> npt.NDArray[np.bool_]:
    """Tell which facts [n] are at least twice as likely as with an invented subject: of the others the model knows nothing."""
    known: npt.NDArray[np.bool_] = zero.real > zero.invented.mean(axis=1) + math.log(2)
    return known


def still_known(zero: AgainstZero, before: Array) -> tuple[int, int]:
    """Count the facts that are still `known_apart` and keep more than half of their probability; and of how many.

    A mean over many facts that are gone hides a few that are not.

    Args:
        zero: the comparison now.
        before: [n] log-probability of the same facts before training; NaN of those that were not known then.
    """
    kept = (zero.real > before + math.log(0.5)) & known_apart(zero)
    return int(kept.sum()), int(np.isfinite(before).sum())


@dataclass(frozen=True)
class KeptRate:
    """Of n answers that must not change: how many are the same to the letter; of those `named` that give a name which the
    prompt does not hold, how many still give the first one (`said`); and the mean ROUGE-L recall of the answer before."""

    n: int
    same: int
    named: int
    said: int
    rouge: float


def first_name(probe: Row) -> str | None:
    """Return the first proper name of the earlier answer that is not in the prompt, or None."""
    there = named(probe["before"])
    return next(
        (w for w in fact_words(probe["before"]) if w in there and len(w) > 2 and not holds(text_of(probe), w)), None
    )


@dataclass(frozen=True)
class Rate:
    """Of n probes that were answered with a fact, how many still are (`after`); of `asked` of them, asked of an invented
    subject, how many are answered with it (`zero`)."""

    n: int
    after: int
    asked: int
    zero: int


@dataclass(frozen=True)
class Outcome:
    """Answers to the probes after the run, aligned with the probes."""

    probes: list[Row]
    kept: list[Row]

    def groups(self) -> dict[tuple[str, object], list[Row]]:
        """Return the probes by form and group; one without a group is its own."""
        groups: dict[tuple[str, object], list[Row]] = {}
        for number, probe in enumerate(self.probes):
            groups.setdefault((probe["form"], probe.get("group", number)), []).append(probe)
        return groups

    def rates(self) -> dict[str, Rate]:
        """Count probes still answered with a fact, by form and in all; a group of probes is one, answered if each is.

        What was not answered before, as most of a document that is to be continued, would make what still is a smaller share.
        """
        groups = {key: group for key, group in self.groups().items() if all(answered(p["before"], p) for p in group)}
        out: dict[str, Rate] = {}
        for form in [*dict.fromkeys(probe["form"] for probe in self.probes), "all probes"]:
            chosen = [group for (kind, _), group in groups.items() if form in (kind, "all probes")]
            asked = [group for group in chosen if all("zero" in p for p in group)]
            out[form] = Rate(
                len(chosen),
                sum(all(answered(p["after"], p) for p in group) for group in chosen),
                len(asked),
                sum(all(p["zero"] for p in group) for group in asked),
            )
        return out

    def naming(self, names: Sequence[str]) -> tuple[int, int]:
        """Count, before and after, the answers that hold one of the names where the question does not."""

        def count(key: str) -> int:
            return sum(any(holds(p[key], n) and not holds(text_of(p), n) for n in names) for p in self.probes)

        return count("before"), count("after")

    def kept_rates(self) -> dict[str, KeptRate]:
        """Return the rates for answers about neighbours and to general requests, by form."""
        out = {}
        for form in dict.fromkeys(probe["form"] for probe in self.kept):
            chosen = [p for p in self.kept if p["form"] == form]
            recall = metrics.text.rouge_l([p["before"] for p in chosen], [p["after"] for p in chosen]).recall
            first = [(p, first_name(p)) for p in chosen]
            out[form] = KeptRate(
                len(chosen),
                sum(p["after"] == p["before"] for p in chosen),
                sum(name is not None for _, name in first),
                sum(name is not None and holds(p["after"], name) for p, name in first),
                float(np.mean(recall)),
            )
        return out

    def read_by(self, base: Any, tokenizer: Any) -> dict[str, float]:
        """Return the perplexity of `ANSWERS` under the untouched model, without the prompts.

        Answers of one token say nothing and are left out; not a number where no other is left.
        """

        def perplexity(key: str) -> float:
            rows = [row for p in self.probes if key in p and len((row := alone(tokenizer, p[key])).input_ids) > 1]
            if not rows:
                return float("nan")
            found = score(base, rows, pad_token_id=tokenizer.pad_token_id, label="fluency")
            return float(metrics.likelihood.perplexity(found.logprob))

        return {key: perplexity(key) for key in ANSWERS}

    def distinct(self) -> dict[str, float]:
        """Return distinct-2 of `ANSWERS`; NaN where there are none."""
        said = {key: [p[key] for p in self.probes if key in p] for key in ANSWERS}
        return {
            key: float(metrics.text.distinct_n(texts, 2)) if texts else float("nan") for key, texts in said.items()
        }
