"""Fluency: does the model still speak? What it says after prompts, read by the untouched model and by a judge.

* **Perplexity of the replies under a reference model**, low where they are fluent. ELM (Gandikota et al. 2024) reports
  it as reverse perplexity; which model reads there is not settled, ours is the untouched one by default: the same base
  with the adapter off. Endless repetition is easy to predict and has a *low* perplexity: read it with distinct-n and
  repetition, and next to the original and the retrained model on the same prompts.
* **distinct-n** (n = 1, 2, 3), **repetition** (4-grams), **length** in words and the share of **empty** replies.
* **A judge's grades**, Flu-mean and Flu-var of the ALTER paper, on request; see `alter.judge`.

An empty reply (no text after white space and special tokens are taken off) counts in the share of empty ones and as a
length of 0; it has no perplexity, no n-grams and no repetition, and `n` of those figures says how many rows were left;
the judge's grade of it is 1. A reply of fewer than four words has no repetition, one that does not fit into the
reference model's context together with its prompt no perplexity; a figure with no row at all has no value.

Replies are sampled as in OBLIVIATE (Xu et al. 2025, arXiv:2505.04416: T = 0.7, top-p = 0.9, 100 tokens), five for each
prompt: our reading of the ALTER paper's "average of 5 responses".
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field

from alter import metrics
from alter.core import Array, UserError, pieces, processes
from alter.data import (
    IGNORE,
    Encoded,
    Example,
    encode,
    encode_prompt,
    read_rows,
    set_template_arguments,
    turns_of,
)
from alter.evaluation.base import Evaluation, say
from alter.evaluation.figures import Figures
from alter.evaluation.judge import Grades, Judge, judge_replies
from alter.evaluation.judged import judge_records
from alter.inference import check_prompts, generate, score
from alter.models import ModelSettings, load_model
from alter.settings import Count, TemperatureOrZero, Tokens
from alter.storage import Record, digest

if TYPE_CHECKING:
    import numpy.typing as npt

PROMPT_COLUMNS = ("question", "prompt", "messages", "text")
"""Columns that hold a prompt, in the order they are looked for; of `text` the first tokens are the prompt."""


class FluencyEvaluation(Evaluation):
    """Does the model still speak? Perplexity under a reference model, distinct-n, repetition, and a judge on request."""

    benchmark: Literal["fluency"] = "fluency"
    """The benchmark: fluency."""
    prompts: str = "builtin:forget10"
    """Rows with question, prompt, messages or text: a file, builtin:SPLIT, or a hub id with :SPLIT."""
    reference_model: str | None = None
    """Model that reads the replies; by default the untouched one: `model` without the adapter."""
    samples: Count = Field(5, ge=1)
    """Replies to each prompt."""
    temperature: TemperatureOrZero = 0.7
    """Sampling temperature; 0 decodes greedily, then `samples` must be 1."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Share of the probability that sampling keeps."""
    max_new_tokens: Tokens = Field(100, ge=1)
    """Longest reply, in tokens."""
    prefix_tokens: Tokens = Field(50, ge=1)
    """Of a plain text, so many tokens are the prompt that the model continues."""
    judge: Judge = Field(default_factory=Judge)
    """A language model that grades the replies; needs `judge.url` and `judge.model`."""

    def title(self) -> str:
        return f"Fluency on {self.prompts}"

    def data_digest(self) -> str | None:
        if self.temperature == 0 and self.samples > 1:
            raise UserError(
                f"`samples` {self.samples} at `temperature` 0 would be {self.samples} times the same reply: "
                "give `samples` 1, or a temperature above 0."
            )
        self.judge.check()
        # the size of a batch decides which random numbers a reply is drawn with
        rows = digest(prompt_rows(self.prompts, self.limit, self.seed), self.batch_size)
        if self.reference_model is None:
            # `merged` reads with the base, whose weights are in the key as the model's own
            return None if self.judge.wanted else rows
        identity = ModelSettings(model=self.reference_model).identity()
        return None if self.judge.wanted or "unknown" in identity.values() else digest(rows, identity)

    def measure(self, model: Any, tokenizer: Any) -> list[Record]:
        result = fluency(self, model, tokenizer)
        told = {"benchmark": "fluency", "prompts": self.prompts}
        records = result.records(self.label, told)
        if self.judge.wanted:
            grades = self._grades(result)
            if grades is not None:
                records += judge_records(self.label, self.judge, grades, result.prompts, told)
        return records

    def _grades(self, result: FluencyResult) -> Grades | None:
        """Return the judge's grades, or None with a note: a judge that cannot be used costs only its own figures."""
        try:
            pairs = list(zip(result.prompts, result.replies, strict=True))
            grades = processes.from_first(lambda: judge_replies(self.judge, pairs))
        except UserError as error:
            keep = (
                f"`alter judge --file {self.json_path}`"
                if self.json_path
                else "`alter judge`, after a run with `json_path`,"
            )
            say([f"No grades: {error} The rest is reported; {keep} grades the same replies later."])
            return None
        say(grades.note())
        return grades


def prompt_rows(source: str, limit: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Return `limit` rows drawn by `seed`, in order, or all; only the column of `PROMPT_COLUMNS` that holds the prompt.

    Raises:
        UserError: no such source, no such column, or a row without a prompt.
    """
    rows = read_rows(source)
    column = next((name for name in PROMPT_COLUMNS if name in rows[0]), None)
    if column is None:
        raise UserError(f"{source} has the columns {', '.join(rows[0])}; a prompt is in {', '.join(PROMPT_COLUMNS)}.")
    for number, row in enumerate(rows):
        value = row.get(column)
        given = bool(value) if column == "messages" else bool(str(value or "").strip())
        if not given or not isinstance(value, list if column == "messages" else str):
            raise UserError(f"Row {number} of {source} has no {column!r}: give it one, or take the row out.")
    if limit is not None and limit < len(rows):
        chosen = np.random.default_rng(seed).choice(len(rows), size=limit, replace=False)
        rows = [rows[i] for i in sorted(chosen)]
    return [{column: row[column]} for row in rows]


def _example(row: Mapping[str, Any], reply: str, number: int) -> Example:
    """Return a row and a reply to it as an example; replies to plain text are encoded by `_text_pair`."""
    if "messages" in row:
        turns = turns_of(row["messages"], f"Row {number}")
        if turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        users = [turn["content"] for turn in turns if turn["role"] == "user"]
        if not users:
            raise UserError(f"Row {number} has no user turn before the answer.")
        messages = tuple(turns)
        return Example(users[-1], reply, "messages", messages, index=number)
    if "question" in row:
        return Example(row["question"], reply, "qa", index=number)
    return Example(row["prompt"], reply, "completion", index=number)


def _without_end(tokenizer: Any, ids: list[int]) -> list[int]:
    """Drop the end token that some tokenizers add: a text to be continued must stay open."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _text(tokenizer: Any, text: str) -> list[int]:
    return _without_end(tokenizer, list(tokenizer(text, verbose=False)["input_ids"]))


def _beginning(tokenizer: Any, text: str, tokens: int) -> str:
    """Return whole words of a text's first tokens, so that a reply begins with a word."""
    ids = _text(tokenizer, text)
    if len(ids) <= tokens:
        return text.rstrip()
    start = str(tokenizer.decode(ids[:tokens], skip_special_tokens=True))
    words = re.sub(r"\S+$", "", start).rstrip()
    return words or start


def _labelled(ids: list[int], start: int) -> Encoded:
    return Encoded(ids, [IGNORE] * start + ids[start:], start)


def after_prompt(tokenizer: Any, row: Mapping[str, Any], prompt: str, reply: str, number: int) -> Encoded:
    """Encode prompt and reply as the reader sees them, the tokens of the reply labelled, its end not."""
    if "text" in row:
        gap = "" if prompt[-1:].isspace() or reply[:1].isspace() else " "
        start, whole = _text(tokenizer, prompt), _text(tokenizer, f"{prompt}{gap}{reply}")
        common = next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), len(start))
        return _labelled(whole, min(common, len(whole)))
    encoded = encode(tokenizer, _example(row, reply, number))
    # whether a reply of full length would have ended there says nothing about its text
    return Encoded(encoded.input_ids[:-1], encoded.labels[:-1], encoded.prompt_length)


def alone(tokenizer: Any, reply: str) -> Encoded:
    """Encode a reply by itself; its first token is scored only where the tokenizer puts one before every text."""
    return _labelled(_text(tokenizer, reply), 1)


@dataclass
class FluencyResult:
    """Replies, n = prompts x samples rows in the order of the prompts, and the reference model's scores of them.

    Attributes:
        prompts, replies: [n] texts.
        reference: who read the replies.
        given, by_itself: [n] log-probabilities of the reply's tokens after the prompt and without it; empty where the
            reply is empty, or does not fit into the reference model's context.
        too_long: replies that did not fit.
        samples: replies to each prompt.
    """

    prompts: list[str]
    replies: list[str]
    reference: str
    given: list[npt.NDArray[np.float32]]
    by_itself: list[npt.NDArray[np.float32]]
    too_long: int
    samples: int

    def records(self, name: str, extra: dict[str, Any]) -> list[Record]:
        """Return the figures; see the module for what counts where. The texts are with `fluency_distinct_1`.

        Intervals are over prompts: replies to one and the same are alike.
        """

        def between(values: Array) -> tuple[float, float] | None:
            return metrics.samples.grouped_interval(values, self.prompts)

        figures = Figures(name, extra)
        add = figures.add
        read = {"reference": self.reference, "too_long": self.too_long}
        for metric, rows in (("fluency_perplexity", self.given), ("fluency_perplexity_alone", self.by_itself)):
            each = np.array([metrics.likelihood.perplexity([row]) if row.size else np.nan for row in rows])
            n, tokens = int((~np.isnan(each)).sum()), int(sum(row.size for row in rows))
            add(metric, metrics.likelihood.perplexity(rows) if tokens else None, n, each, tokens=tokens, **read)
            if metric == "fluency_perplexity":
                middle = float(np.nanmedian(each)) if n else None
                add("fluency_perplexity_median", middle, n, each, tokens=tokens, **read)
        words = np.array([len(pieces(reply)) for reply in self.replies])
        for n in (1, 2, 3):
            counted = int((words >= n).sum())
            texts: dict[str, Any] = (
                {"questions": self.prompts, "generations": self.replies, "samples": self.samples} if n == 1 else {}
            )
            value = metrics.text.distinct_n(self.replies, n) if counted else None
            add(f"fluency_distinct_{n}", value, counted, **texts)
        long = words >= 4
        repeats = np.where(long, metrics.text.repetition(self.replies), np.nan)
        mean = float(repeats[long].mean()) if long.any() else None
        add("fluency_repetition", mean, int(long.sum()), repeats, interval=between(repeats))
        add("fluency_length", float(words.mean()), len(words), words, interval=between(words))
        empty = words == 0
        add("fluency_empty", float(empty.mean()), len(words), empty, interval=between(empty))
        return figures.records


def fluency(settings: FluencyEvaluation, model: Any, tokenizer: Any) -> FluencyResult:
    """Sample the model's replies, then score them with the reference model.

    Raises:
        UserError: prompts that do not fit into the model's context, or a reference model that cannot be loaded; both
            before anything is generated.
    """
    rows = prompt_rows(settings.prompts, settings.limit, settings.seed)
    prompts, ids = [], []
    for number, row in enumerate(rows):
        if "text" in row:
            prompts.append(_beginning(tokenizer, row["text"], settings.prefix_tokens))
            ids.append(_text(tokenizer, prompts[-1]))
        else:
            example = _example(row, "a", number)
            ids.append(encode_prompt(tokenizer, example))
            prompts.append(str(example.prompt))
    names = [f"Prompt {number} of {settings.prompts}" for number in range(len(rows))]
    check_prompts(model, ids, settings.max_new_tokens, names)
    reader, reader_tokenizer, reference, off = _reader(settings, model, tokenizer)

    sampling: dict[str, Any] = {}
    if settings.temperature > 0:
        sampling = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    torch.manual_seed(settings.seed)
    order = [i for i in range(len(rows)) for _ in range(settings.samples)]
    replies = generate(
        model,
        tokenizer,
        [ids[i] for i in order],
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        **sampling,
    )
    given = [
        after_prompt(reader_tokenizer, rows[i], prompts[i], reply, i) if reply else None
        for i, reply in zip(order, replies, strict=True)
    ]
    by_itself = [alone(reader_tokenizer, reply) if reply else None for reply in replies]
    context = getattr(reader.config.get_text_config(), "max_position_embeddings", None)
    too_long = sum(row is not None and context is not None and len(row.input_ids) > context for row in given)
    if too_long:
        say(
            [
                f"{too_long} of {len(replies)} replies do not fit into the context of {reference} with their prompt: they have no perplexity."
            ]
        )
    settings_of = {"pad_token_id": reader_tokenizer.pad_token_id, "batch_tokens": settings.batch_tokens}
    with off:
        found = [_logprob(reader, encoded, context, settings_of) for encoded in (given, by_itself)]
    return FluencyResult(
        [prompts[i] for i in order], replies, reference, found[0], found[1], too_long, settings.samples
    )


def _reader(settings: FluencyEvaluation, model: Any, tokenizer: Any) -> tuple[Any, Any, str, Any]:
    """Return the reference model, its tokenizer, its name, and the context in which it is the untouched model."""
    if settings.reference_model is not None:
        reader, own = load_model(
            settings.reference_model, None, settings.dtype, settings.device, settings.quantization
        )
        # asked as the model was, as far as the reader's template asks for the same
        template = str(own.chat_template or "")
        names = set(re.findall(r"[A-Za-z_]\w*", template))
        set_template_arguments(own, [x for x in settings.chat_template_kwargs if x.partition("=")[0] in names])
        return reader, own, settings.reference_model, contextlib.nullcontext()
    if settings.adapter is None:
        say(
            [
                f"{settings.model} reads its own replies, which says something only of an untouched model: "
                "if it was changed, give `reference_model`."
            ]
        )
        return model, tokenizer, f"{settings.model} (itself)", contextlib.nullcontext()
    name = f"{settings.model} without the adapter"
    if settings.merged:
        reader, own = settings.alike(settings.model).load()
        return reader, own, name, contextlib.nullcontext()
    return model, tokenizer, name, model.disable_adapter()


def _logprob(
    reader: Any, encoded: Sequence[Encoded | None], context: int | None, settings: dict[str, Any]
) -> list[npt.NDArray[np.float32]]:
    """Return the log-probabilities of the labelled tokens of each row; none where there is nothing to score or no room for it."""
    found: list[npt.NDArray[np.float32]] = [np.empty(0, dtype=np.float32)] * len(encoded)
    kept = [
        i
        for i, row in enumerate(encoded)
        if row is not None
        and any(label != IGNORE for label in row.labels[1:])
        and (context is None or len(row.input_ids) <= context)
    ]
    rows = [row for i in kept if (row := encoded[i]) is not None]
    for i, values in zip(kept, score(reader, rows, label="reading", **settings).logprob, strict=True):
        found[i] = values
    return found
