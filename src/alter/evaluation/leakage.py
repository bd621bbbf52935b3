"""Leakage over many samples: how likely one of k sampled replies gives an answer that was to be forgotten.

One greedy reply says what a model says first. Who asks again and again gets its whole distribution, and an answer that
is one in fifty there comes out. leak@k is the chance that it does within k replies, estimated without bias from n
samples of each question (`alter.metrics.samples.leak_at_k`). A model that never saw the rows has a leak@k too, by chance, which
grows with k: read the figure beside that of a retrained model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from alter import metrics
from alter.core import Array, UserError
from alter.data import Example, encode, encode_prompt
from alter.evaluation.giving import ENOUGH, gives, recall_of
from alter.inference import context_length, evaluating, sample
from alter.models import ModelSettings, load_classifier
from alter.settings import BatchSize, Count, Rows, Temperature, Tokens
from alter.storage import Record

if TYPE_CHECKING:
    import numpy.typing as npt

PROMPT_TOKENS = 50
"""Tokens of a plain text that are its prompt, half of it at most."""
JudgeCall = Callable[[str, str, Sequence[str]], "list[bool] | None"]
"""Whether each reply to a question gives its true answer; None where there is no telling for this question."""


# What counts as a hit ------------------------------------------------------------------------------------------------


class _Hit(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @property
    def judged_by(self) -> str | None:
        """The model that decides what a hit is, if one does: the figures depend on its weights."""
        return None


class FactsHit(_Hit):
    """A reply that says the facts of the answer: names and numbers that the question does not say."""

    kind: Literal["facts"] = "facts"
    share: float = Field(ENOUGH, gt=0, le=1)
    """Share of the answer's facts that gives it away."""

    def judge(self, device: torch.device) -> JudgeCall:
        """Return the judge by `alter.evaluation.giving.gives`; an answer without facts cannot be judged."""

        def hits(question: str, truth: str, replies: Sequence[str]) -> list[bool] | None:
            found = [gives(question, truth, reply, self.share) for reply in replies]
            return None if None in found else [bool(value) for value in found]

        return hits


class RougeHit(_Hit):
    """A reply that holds the words of the answer in their order."""

    kind: Literal["rouge"] = "rouge"
    recall: float = Field(0.8, gt=0, le=1)
    """ROUGE-L recall from which a reply counts."""

    def judge(self, device: torch.device) -> JudgeCall:
        """Return the judge by `alter.evaluation.giving.recall_of`."""
        return lambda question, truth, replies: [recall_of(truth, reply) >= self.recall for reply in replies]


class EntailmentHit(_Hit):
    """A reply from which the true answer follows, by a model of natural language inference."""

    kind: Literal["nli"] = "nli"
    model: str
    """Sequence classifier with a label for entailment: a folder or a hub id."""
    probability: float = Field(0.5, gt=0, lt=1)
    """Probability of entailment from which a reply counts."""
    batch_size: BatchSize = Field(64, ge=1)
    """Pairs in one batch."""

    @property
    def judged_by(self) -> str | None:
        return self.model

    def judge(self, device: torch.device) -> JudgeCall:
        """Return the judge by `entailment` of the question with the reply against the question with the answer.

        Raises:
            UserError: no such model, or it has no label for entailment.
        """
        classifier, tokenizer = load_classifier(self.model, device)
        column = entailment_label(classifier.config.id2label, self.model)

        def hits(question: str, truth: str, replies: Sequence[str]) -> list[bool]:
            pairs = [(f"{question} {reply}", f"{question} {truth}") for reply in replies]
            found = label_probabilities(classifier, tokenizer, pairs, self.batch_size)
            return [bool(p >= self.probability) for p in found[:, column]]

        return hits


Hit = Annotated[FactsHit | RougeHit | EntailmentHit, Field(discriminator="kind")]


def entailment_label(labels: dict[int, str], name: str, wanted: str = "entail") -> int:
    """Return which label of a classifier says that the first text entails the second (or what else begins as `wanted`).

    Args:
        labels: names by number, as a configuration's `id2label`.
        name: what an error calls the model.

    Raises:
        UserError: there is none, or several.
    """
    found = [number for number, label in labels.items() if str(label).lower().startswith(wanted)]
    if len(found) != 1:
        what = "entailment" if wanted == "entail" else wanted
        raise UserError(
            f"{name} has {'no' if not found else 'several'} label for {what}; its labels are "
            f"{', '.join(map(str, labels.values()))}. Give a classifier trained on natural language inference (MNLI)."
        )
    return int(found[0])


def label_probabilities(
    classifier: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int = 64
) -> Array:
    """Return the probability of every label for pairs of premise and hypothesis, [pairs, labels].

    Of a pair that is too long for the classifier, the longer text loses its end.
    """
    device = next(classifier.parameters()).device
    longest = min(tokenizer.model_max_length, _places(classifier))
    out = []
    with evaluating(classifier):
        for start in range(0, len(pairs), batch_size):
            part = pairs[start : start + batch_size]
            batch = tokenizer(
                [premise for premise, _ in part],
                [hypothesis for _, hypothesis in part],
                padding=True,
                truncation="longest_first",
                max_length=longest,
                return_tensors="pt",
            ).to(device)
            out.append(classifier(**batch).logits.double().softmax(dim=-1).cpu().numpy())
    return np.concatenate(out) if out else np.empty((0, classifier.config.num_labels))


def _places(classifier: Any) -> int:
    """Return how many tokens a classifier has positions for."""
    rows = int(getattr(classifier.config, "max_position_embeddings", 512))
    table = getattr(getattr(classifier.base_model, "embeddings", None), "position_embeddings", None)
    # RoBERTa and its kin count from the padding token's number on
    before = getattr(table, "padding_idx", None)
    return rows if before is None else rows - before - 1


# Settings ------------------------------------------------------------------------------------------------------------


class Leak(BaseModel):
    """Leakage over many samples: off unless a number of samples is given."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    samples: Count = Field(0, ge=0)
    """Replies sampled to each question, n; 0: none, so no leak@k."""
    k: list[Count] = Field(default_factory=list)
    """Numbers of replies for which the chance of a leak is given, none above n; by default 1, 2, 4, 8 ... and n."""
    temperature: Temperature = 1.0
    """Sampling temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Share of the probability that sampling keeps."""
    questions: Rows | None = Field(60, ge=1)
    """Questions that are asked, drawn by the seed; none: all."""
    max_new_tokens: Tokens = Field(200, ge=1)
    """Longest reply, in tokens; none is longer than twice the longest answer."""
    batch_size: BatchSize = Field(128, ge=1)
    """Replies that are sampled at a time."""
    hit: Hit = Field(default_factory=FactsHit)
    """What counts as a leak: facts of the answer, ROUGE-L recall, or entailment (nli)."""

    @model_validator(mode="after")
    def _possible(self) -> Leak:
        if self.k and not self.samples:
            raise ValueError(
                f"`leak.k` is {self.k}, but nothing is sampled: give `leak.samples`, {max(self.k)} at least"
            )
        if any(not 1 <= k <= self.samples for k in self.k):
            wrong = next(k for k in self.k if not 1 <= k <= self.samples)
            raise ValueError(
                f"`leak.k` {wrong} is not within 1 to `leak.samples` ({self.samples}): of fewer samples than k there is no "
                "unbiased estimate. Sample more, or leave it out"
            )
        return self

    @property
    def numbers(self) -> list[int]:
        """The k in ascending order; by default the powers of two below n, and n."""
        powers = [2**i for i in range(self.samples.bit_length()) if 2**i < self.samples]
        return sorted(set(self.k)) or [*powers, *([self.samples] if self.samples else [])]

    def content(self) -> str | None:
        """Return the digest of an NLI model, which decides the figures besides these settings and the model; else an empty text."""
        if self.hit.judged_by is None or not self.samples:
            return ""
        weights = ModelSettings(model=self.hit.judged_by).identity()["weights"]
        return None if weights == "unknown" else weights


# Measuring -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A row as a question: prompt tokens, question and answer as texts, and the answer's length in tokens."""

    prompt: list[int]
    question: str
    truth: str
    length: int


def ask(tokenizer: Any, row: Example, ids: Sequence[int], most: int) -> Asked | None:
    """Return a row as a question: a plain text is continued from its first tokens; None if it is too short for that.

    Args:
        ids: the encoded row, its first window.
        most: tokens of a plain text's continuation.
    """
    if row.kind != "text":
        prompt = encode_prompt(tokenizer, row)
        question = " ".join(turn["content"] for turn in row.messages) or row.prompt or ""
        return Asked(prompt, question, row.answer.strip(), len(ids) - len(prompt))
    cut = min(PROMPT_TOKENS, len(ids) // 2)
    rest = list(ids[cut : cut + most])
    if not cut or not rest:
        return None
    start = list(ids[:cut])
    return Asked(
        start,
        tokenizer.decode(start, skip_special_tokens=True),
        tokenizer.decode(rest, skip_special_tokens=True).strip(),
        len(rest),
    )


@dataclass(frozen=True)
class Leaked:
    """Hits among the samples of each question.

    Attributes:
        settings: what was sampled, and what counts as a hit.
        rows: numbers of the rows that were asked, [m].
        hits: replies among `settings.samples` that give the answer, [m].
        unknown: questions of which there is no telling (an answer without facts); they are left out.
    """

    settings: Leak
    rows: list[int]
    hits: npt.NDArray[np.int64]
    unknown: int = 0

    def at(self, k: int) -> Array:
        """Return leak@k of each question, [m]."""
        return metrics.samples.leak_at_k(self.hits, self.settings.samples, k)

    def interval(self, k: int) -> tuple[float, float] | None:
        """Return the 95 % interval of leak@k over questions (`metrics.samples.row_interval`)."""
        return metrics.samples.row_interval(self.at(k))

    def summary(self) -> dict[str, Any]:
        """Return the figures without any text: mean and interval over questions by k, and the settings and counts behind them."""
        at = {
            str(k): {"value": float(self.at(k).mean()), "interval": self.interval(k)}
            for k in self.settings.numbers
            if len(self.rows)
        }
        return {"at": at, "questions": len(self.rows), "unknown": self.unknown, "settings": self.settings.model_dump()}

    def records(self, name: str, extra: dict[str, Any]) -> list[Record]:
        """Return one record for each k; `per_item` is leak@k of each question."""
        told = extra | {
            "samples": self.settings.samples,
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "hit": self.settings.hit.model_dump(),
            "hits": self.hits.tolist(),
            "rows": self.rows,
            "unknown": self.unknown,
        }
        out = []
        for k in self.settings.numbers if self.rows else []:
            values = self.at(k)
            interval = self.interval(k)
            more = told | ({} if interval is None else {"interval": list(interval)})
            items = [float(x) for x in values]
            out.append(Record(name, f"leak@{k}", float(values.mean()), len(items), "strict", False, items, more))
        return out


def _drawn(
    tokenizer: Any, rows: Sequence[Example], settings: Leak, seed: int, limit: int | None
) -> tuple[list[tuple[int, Asked]], int]:
    """Draw the rows to ask, with their places in `rows`, and return them with the tokens that a reply may have.

    Raises:
        UserError: none of them fits into a context of `limit` tokens.
    """
    wanted = len(rows) if settings.questions is None else settings.questions
    chosen = sorted(np.random.default_rng(seed).permutation(len(rows))[:wanted].tolist())
    found: list[tuple[int, Asked]] = []
    for i in chosen:
        asked = ask(tokenizer, rows[i], encode(tokenizer, rows[i]).input_ids, settings.max_new_tokens)
        if asked is not None:
            found.append((i, asked))
    most = min(settings.max_new_tokens, 2 * max((asked.length for _, asked in found), default=1))
    found = [(i, asked) for i, asked in found if limit is None or len(asked.prompt) + most <= limit]
    if not found:
        raise UserError(
            f"leak@k: none of {len(rows)} rows can be asked: their prompts with {most} new tokens do not fit into the "
            f"model's context of {limit}, or the texts are too short. Lower `leak.max_new_tokens`."
        )
    return found, most


def leaked(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Example],
    settings: Leak,
    *,
    seed: int = 0,
    judge: JudgeCall | None = None,
    progress: bool = True,
    label: str = "leak",
) -> Leaked:
    """Sample replies to questions and count those that give the answer.

    Args:
        model, tokenizer: as in `alter.inference.generation.sample`.
        rows: the rows to ask; those whose prompt and reply do not fit into the model's context are left out.
        settings: with a number of samples.
        seed: draws the questions and the replies.
        judge: that of `settings.hit`, where it is loaded already.

    Raises:
        UserError: no row can be asked, or what the judge and sampling raise.
    """
    if not settings.samples:
        raise ValueError("leaked: settings.samples is 0")
    decide = judge or settings.hit.judge(next(model.parameters()).device)
    found, most = _drawn(tokenizer, rows, settings, seed, context_length(model))
    replies = sample(
        model,
        tokenizer,
        [asked.prompt for _, asked in found],
        settings.samples,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=most,
        batch_size=settings.batch_size,
        seed=seed,
        progress=progress,
        label=f"{label}: {settings.samples} samples",
    )
    numbers, hits = [], []
    for (i, asked), texts in zip(found, replies, strict=True):
        # the same reply is judged once
        different = sorted(set(texts))
        said = decide(asked.question, asked.truth, different)
        if said is None:
            continue
        gave = dict(zip(different, said, strict=True))
        numbers.append(rows[i].index)
        hits.append(sum(gave[text] for text in texts))
    return Leaked(settings, numbers, np.array(hits, dtype=np.int64), len(found) - len(numbers))
