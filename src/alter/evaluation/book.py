"""A book to forget: does the model still go on with the text as it is printed? (Chen et al. 2026, its Harry Potter table.)

The paper says: 200-token prefixes, greedy completion against the true text, BLEU, ROUGE-L, and ASG, the gap of both to a
model retrained without the book. It gives no more than that; these are our readings, after FLAT (Wang et al. 2025,
arXiv:2410.11143), whose published evaluation uses the same prefixes:

* The book's tokens are cut into passages of 600, one after another: a prefix of 200 and its continuation of 400 (FLAT
  generates up to 600 tokens, the prefix included). What is left at the end, shorter than a passage, is not used.
* A prompt is the bare prefix after the tokenizer's own beginning token, without FLAT's "### Question:" around it; all
  new tokens count (FLAT drops the first one), and padding is masked (FLAT's is not).
* BLEU is sacrebleu's of each passage by itself, averaged, in points; ROUGE-L the recall with stemmer. An empty
  completion scores 0 in both. BLEU of all passages as one corpus, which is another number, stands beside it.
* ASG is the mean of the absolute gaps in BLEU and in ROUGE-L, in points; `signed` averages the gaps with their signs
  first, which is what reproduces the paper's table (nine of its eleven rows) and lets opposite gaps cancel.

One forward per passage gives the likelihood side, of the continuation's tokens after all the tokens before them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from alter import metrics
from alter.core import Array, UserError
from alter.data import Encoded
from alter.evaluation.base import Evaluation, say
from alter.evaluation.figures import Figures
from alter.evaluation.passages import Passage, cut, passages_fingerprint, read_book
from alter.inference import Scores, generate, score
from alter.models import shipped_model
from alter.settings import Tokens
from alter.storage import Record, digest, file_digest, folder_digest, read_records

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True)
class BookReference:
    """The retrained model's figures: BLEU and ROUGE-L in points, and its min-k AUC where there is a holdout."""

    source: str
    fingerprint: str
    bleu: float
    rouge: float
    min_k_auc: float | None = None


@dataclass
class BookResult:
    """Per-passage results of one model.

    Attributes:
        fingerprint: hash of the passages; results can be compared only if it is the same.
        passages, scores, generations: of the book, one entry per passage.
        holdout, retain: the same of texts never trained on and of texts to keep; nothing is generated for the latter.
    """

    fingerprint: str
    passages: list[Passage]
    scores: Scores
    generations: list[str]
    holdout: list[Passage] = field(default_factory=list)
    holdout_scores: Scores | None = None
    holdout_generations: list[str] = field(default_factory=list)
    retain_scores: Scores | None = None

    @property
    def bleu(self) -> Array:
        """BLEU of each passage, [n], in points."""
        return metrics.text.bleu([passage.reference for passage in self.passages], self.generations)

    @property
    def rouge(self) -> Array:
        """ROUGE-L recall of each passage, [n], in [0, 1]."""
        return metrics.text.rouge_l([passage.reference for passage in self.passages], self.generations).recall

    @property
    def min_k_auc(self) -> float | None:
        """Return how well min-k% separates the book from the holdout; None without a holdout."""
        if self.holdout_scores is None:
            return None
        return metrics.membership.auc(
            metrics.membership.min_k(self.scores.logprob), metrics.membership.min_k(self.holdout_scores.logprob)
        )

    def as_reference(self, source: str) -> BookReference:
        """Return the result as the reference of other models, if this model is the retrained one."""
        return BookReference(source, self.fingerprint, self.bleu.mean(), 100 * self.rouge.mean(), self.min_k_auc)


def _encoded(passage: Passage) -> Encoded:
    ignored = [-100] * len(passage.prompt)
    return Encoded(passage.prompt + passage.continuation, ignored + passage.continuation, len(ignored))


def _open(rows: Sequence[npt.ArrayLike]) -> list[npt.NDArray[Any]]:
    """Append one entry to each row: two metrics drop the last token, an answer's end, which a passage lacks."""
    return [np.append(row, True) for row in rows]


def _text_digest(path: str) -> str:
    return hashlib.sha256(read_book(path).encode()).hexdigest()[:12]


class BookEvaluation(Evaluation):
    """Measure how much of a book a model still reproduces; print the table and, with `json_path`, write the records."""

    benchmark: Literal["book"] = "book"
    """What to measure on."""
    book: str
    """The book to forget: a plain text file."""
    holdout: str | None = None
    """A text of the same kind that was never trained on: what not knowing looks like. Gives mia_min_k."""
    retain: list[str] = Field(default_factory=list)
    """Texts that must be kept: their perplexity and next-token accuracy."""
    prefix_tokens: Tokens = Field(200, ge=1)
    """Tokens of each passage that are the prompt."""
    continuation_tokens: Tokens = Field(400, ge=1)
    """Tokens after the prompt: the longest completion, and the length of the true text."""
    signed: bool = False
    """Compute ASG from signed gaps, which can cancel, as in the paper's table; by default from absolute gaps."""
    retain_records: str | None = None
    """The model retrained without the book: its result file (`json_path`) or folder. Gives ASG."""

    def title(self) -> str:
        """Return the heading of the table."""
        return f"Book {Path(self.book).stem}"

    def data_digest(self) -> str:
        """Hash all texts and of the retrained model or its results."""
        texts = [self.book, *([] if self.holdout is None else [self.holdout]), *self.retain]
        digests = [_text_digest(path) for path in texts]
        for i, found in enumerate(digests):
            if found in digests[:i]:
                raise UserError(
                    f"{texts[i]} and {texts[digests.index(found)]} are the same text: book, holdout and retain must "
                    "be different ones."
                )
        return digest(digests, self._reference_digest())

    def _reference_digest(self) -> str | None:
        source = self.retain_records
        if source is None:
            return None
        if self._is_model(source):
            return folder_digest(shipped_model(source))
        self._from_records(source)
        return file_digest(source)

    def _is_model(self, source: str) -> bool:
        return source.startswith("builtin:") or Path(source).expanduser().is_dir()

    def _command(self) -> str:
        command = f"alter evaluate --model RETRAINED --benchmark book --book {self.book}"
        if self.holdout is not None:
            command += f" --holdout {self.holdout}"
        for name in ("prefix_tokens", "continuation_tokens", "limit", "seed"):
            if getattr(self, name) != type(self).model_fields[name].default:
                command += f" --{name.replace('_', '-')} {getattr(self, name)}"
        return f"`{command} --json retrained.json`"

    def measure(self, model: Any, tokenizer: Any) -> list[Record]:
        """Return the figures of the table; report on stderr what could not be computed, with the remedy."""
        reference = None
        if self.retain_records is not None:
            reference = self._reference(self.retain_records)
        result = self.result(model, tokenizer)
        if reference is not None and reference.fingerprint != result.fingerprint:
            raise UserError(
                f"{reference.source} was measured on other passages of {self.book} than this run (its tokenizer, "
                "`prefix_tokens`, `continuation_tokens`, `limit` or `seed` differ): make it again with "
                f"{self._command()}."
            )
        return self._records(result, reference)

    def result(self, model: Any, tokenizer: Any, *, only_book: bool = False) -> BookResult:
        """Score and continue the passages; with `only_book`, skip what a reference does not need.

        Raises:
            UserError: a text is shorter than a passage, a passage does not fit into the model's context, or what
                `score` and `generate` raise.
        """
        sets = {"book": [self.book], "holdout": [] if self.holdout is None else [self.holdout]}
        sets["retain"] = [] if only_book else self.retain
        cuts = {name: [p for path in paths for p in self._passages(tokenizer, path)] for name, paths in sets.items()}
        size = max(len(passage.prompt + passage.continuation) for passage in cuts["book"])
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and size > context:
            raise UserError(
                f"A passage has {size} tokens ({self.prefix_tokens} + {self.continuation_tokens} and what the tokenizer "
                f"puts before them), the model's context is {context}: set `prefix_tokens` and `continuation_tokens` "
                "lower, and make the retrained model's results with the same."
            )
        everything = [passage for passages in cuts.values() for passage in passages]
        scores = score(
            model,
            [_encoded(passage) for passage in everything],
            pad_token_id=tokenizer.pad_token_id,
            batch_tokens=self.batch_tokens,
            label="book: scoring passages",
        )
        bounds = np.cumsum([0, *map(len, cuts.values())])
        parts = {name: scores[slice(*bounds[i : i + 2])] for i, name in enumerate(cuts)}
        told = cuts["book"] + ([] if only_book else cuts["holdout"])
        said = generate(
            model,
            tokenizer,
            [passage.prompt for passage in told],
            max_new_tokens=self.continuation_tokens,
            batch_size=self.batch_size,
            label="book: continuing passages",
        )
        n = len(cuts["book"])
        return BookResult(
            passages_fingerprint(cuts["book"]),
            cuts["book"],
            parts["book"],
            said[:n],
            cuts["holdout"],
            parts["holdout"] if cuts["holdout"] else None,
            said[n:],
            parts["retain"] if cuts["retain"] else None,
        )

    def _passages(self, tokenizer: Any, path: str) -> list[Passage]:
        found = cut(tokenizer, read_book(path), self.prefix_tokens, self.continuation_tokens, path)
        if self.limit is None or self.limit >= len(found):
            return found
        chosen = np.random.default_rng(self.seed).choice(len(found), size=self.limit, replace=False)
        return [found[i] for i in sorted(chosen)]

    def _reference(self, source: str) -> BookReference:
        if not self._is_model(source):
            return self._from_records(source)
        retrained, tokenizer = self.alike(source).load()
        return self.result(retrained, tokenizer, only_book=True).as_reference(source)

    def _from_records(self, source: str) -> BookReference:
        """Return the reference in a retrained model's result file.

        Raises:
            UserError: it is not of this benchmark, of several models, or of another book.
        """
        records = read_records(source)
        found = {name: [r for r in records if r.metric == name] for name in ("book_bleu", "book_rouge", "mia_min_k")}
        bleu, rouge = found["book_bleu"], found["book_rouge"]
        if len(bleu) != 1 or len(rouge) != 1:
            models = sorted({record.model for record in records})
            raise UserError(
                f"{source} holds {len(bleu)} records of book_bleu and {len(rouge)} of book_rouge; expected one each, "
                f"of the retrained model alone (models there: {', '.join(models) or 'none'}): make it with "
                f"{self._command()}."
            )
        if bleu[0].value is None or rouge[0].value is None:
            raise UserError(f"{source} has no value of book_bleu or book_rouge: make it again with {self._command()}.")
        if bleu[0].extra.get("text") != _text_digest(self.book):
            raise UserError(
                f"{source} was measured on another book ({bleu[0].extra.get('book')}), this run is on {self.book}: make "
                f"the retrained model's results with {self._command()}."
            )
        aucs = [r.value for r in found["mia_min_k"] if r.extra.get("holdout_text") == self._holdout_digest()]
        return BookReference(
            source, bleu[0].extra["fingerprint"], bleu[0].value, 100 * rouge[0].value, aucs[0] if aucs else None
        )

    def _holdout_digest(self) -> str | None:
        return None if self.holdout is None else _text_digest(self.holdout)

    def _records(self, result: BookResult, reference: BookReference | None) -> list[Record]:
        base = {
            "benchmark": "book",
            "book": self.book,
            "text": _text_digest(self.book),
            "fingerprint": result.fingerprint,
            "prefix_tokens": self.prefix_tokens,
            "continuation_tokens": self.continuation_tokens,
        }
        figures = Figures(self.label, base)
        notes = self._add_said(figures, result, reference)
        _add_scored(figures, result)
        empty = sum(not text for text in result.generations)
        if empty:
            notes.append(f"{empty} of {len(result.passages)} completions are empty; they count 0 in BLEU and ROUGE-L.")
        if result.holdout_scores is not None:
            notes += self._add_holdout(figures, result, reference)
        if result.retain_scores is not None:
            kept = metrics.memorisation.exact_memorization(_open(result.retain_scores.correct))
            perplexity = metrics.likelihood.perplexity(result.retain_scores.logprob)
            figures.add("retain_perplexity", perplexity, len(kept), retain=self.retain)
            figures.add("retain_accuracy", kept.mean(), len(kept), kept, retain=self.retain)
        say(notes)
        return figures.records

    def _add_said(self, figures: Figures, result: BookResult, reference: BookReference | None) -> list[str]:
        """Add BLEU, ROUGE-L and, with a reference, ASG of the completions; return notes."""
        bleu, rouge, n = result.bleu, result.rouge, len(result.passages)
        references = [passage.reference for passage in result.passages]
        texts = {
            "prefixes": [passage.prefix for passage in result.passages],
            "references": references,
            "generations": result.generations,
        }
        figures.add("book_bleu", bleu.mean(), n, bleu, **texts)
        figures.add("book_corpus_bleu", metrics.text.corpus_bleu(references, result.generations), n)
        figures.add("book_rouge", rouge.mean(), n, rouge)
        if reference is None:
            return [
                "No book_asg: it compares with a model that never read the book. Make its results once with "
                f"{self._command()}, then give `retain_records` retrained.json."
            ]
        mine, other = (bleu.mean(), 100 * rouge.mean()), (reference.bleu, reference.rouge)
        figures.add(
            "book_asg_signed" if self.signed else "book_asg",
            metrics.text.asg(mine, other, signed=self.signed),
            n,
            gaps={"bleu": mine[0] - other[0], "rouge": mine[1] - other[1]},
            reference={"source": reference.source, "bleu": other[0], "rouge": other[1]},
        )
        return []

    def _add_holdout(self, figures: Figures, result: BookResult, reference: BookReference | None) -> list[str]:
        """Add the holdout's figures and the AUC that tells it from the book; return notes."""
        assert result.holdout_scores is not None
        held = [passage.reference for passage in result.holdout]
        n, both = len(held), len(held) + len(result.passages)
        extra = {"holdout": self.holdout, "holdout_text": self._holdout_digest()}
        bleu = metrics.text.bleu(held, result.holdout_generations)
        rouge = metrics.text.rouge_l(held, result.holdout_generations).recall
        figures.add("holdout_bleu", bleu.mean(), n, bleu, **extra, generations=result.holdout_generations)
        figures.add("holdout_rouge", rouge.mean(), n, rouge, **extra)
        loss = metrics.likelihood.average_loss(result.holdout_scores.logprob)
        perplexity = metrics.likelihood.perplexity(result.holdout_scores.logprob)
        figures.add("holdout_perplexity", perplexity, n, np.exp(loss), **extra)
        auc = result.min_k_auc
        assert auc is not None
        between = metrics.samples.auc_interval(auc, len(result.passages), n)
        figures.add("mia_min_k", auc, both, **extra, interval=between)
        if reference is None:
            return []
        if reference.min_k_auc is None:
            return [f"No privleak: {reference.source} has no mia_min_k with this holdout; make it again."]
        if reference.min_k_auc == 1:
            return ["No privleak: the retrained model tells book and holdout apart as well (mia_min_k 1)."]
        value, *ends = (metrics.membership.privleak(each, reference.min_k_auc) for each in (auc, *between))
        figures.add("privleak", value, n, **extra, reference_auc=reference.min_k_auc, interval=sorted(ends))
        return []


def _add_scored(figures: Figures, result: BookResult) -> None:
    """Add perplexity, memorisation and the diversity of the completions."""
    n = len(result.passages)
    correct = _open(result.scores.correct)
    memorized, strength = (
        metrics.memorisation.exact_memorization(correct),
        metrics.memorisation.extraction_strength(correct),
    )
    perplexity, loss = (
        metrics.likelihood.perplexity(result.scores.logprob),
        metrics.likelihood.average_loss(result.scores.logprob),
    )
    figures.add("book_perplexity", perplexity, n, np.exp(loss))
    figures.add("book_exact_memorization", memorized.mean(), n, memorized)
    figures.add("book_extraction_strength", strength.mean(), n, strength)
    figures.add("book_distinct_2", metrics.text.distinct_n(result.generations, 2), n)
    repeats = metrics.text.repetition(result.generations)
    figures.add("book_repetition", repeats.mean(), n, repeats)
