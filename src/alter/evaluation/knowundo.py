"""KnowUnDo (Tian et al. 2024, arXiv:2407.01920): what is to be unlearned of a work or a person, and what must stay.

| figure | rows | how it is measured |
|---|---|---|
| `knowundo_unlearn_success` | unlearn, val | 1 - share of the answer's tokens that are the likeliest, teacher-forced |
| `knowundo_retention_success` | retention, val | that share |
| `knowundo_unlearn_perplexity`, `knowundo_retention_perplexity` | both | exp of the mean loss, a mean over rows |
| `kfr`, `krr` | both | knowledge forgetting and retention rate of greedy replies (ReLearn; `alter.evaluation.knowledge`) |
| `knowundo_unlearn_rouge`, `knowundo_retention_rouge` | both | ROUGE-L recall of these replies |

As in the authors' code, question and answer stand with an empty line between them, without a chat template, cut to 256
tokens, and the empty line is scored with the answer. Replies are asked for as everywhere here, with the chat template
where there is one. `--nli` takes contradictions into KFR and KRR, without which facts alone decide.

Layout: hub (`zjunlp/KnowUnDo`) or a folder: DOMAIN/unlearn and DOMAIN/retention (.json, .jsonl, .parquet) with one row that holds the
lists `train` and `val`, or DOMAIN/unlearn_val and DOMAIN/retention_val with the rows themselves. Columns: `text`, `labels`.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from alter import metrics
from alter.core import UserError
from alter.data import Encoded, Example, Row, encode_prompt, layout_rows
from alter.evaluation.base import say
from alter.evaluation.figures import Figures
from alter.evaluation.knowledge import Contradictions, rates
from alter.evaluation.questions import Prompts, Questions, RowsBySet
from alter.evaluation.replies import required, sampled
from alter.inference import generate, score
from alter.models import ModelSettings
from alter.settings import Tokens
from alter.storage import digest

HUB = "zjunlp/KnowUnDo"
COUNTED_TOKENS = 256
"""Tokens of question and answer that count, as in the authors' code."""
NEW_TOKENS = 256
PARTS = ("unlearn", "retention")


def encoded(tokenizer: Any, row: Row) -> Encoded:
    """Return question, empty line and answer, of which the line and the answer are labelled.

    Raises:
        UserError: the question alone is as long as what counts.
    """
    whole = list(tokenizer(f"{row['text']}\n\n{row['labels']}", add_special_tokens=True, verbose=False)["input_ids"])
    start = list(tokenizer(row["text"], add_special_tokens=True, verbose=False)["input_ids"])
    same = next((i for i, (a, b) in enumerate(zip(whole, start, strict=False)) if a != b), min(len(start), len(whole)))
    if same >= min(len(whole), COUNTED_TOKENS):
        raise UserError(
            f"The question {row['text'][:60]!r} has {same} tokens: nothing of its answer is within {COUNTED_TOKENS}."
        )
    return Encoded(whole[:COUNTED_TOKENS], [-100] * same + whole[same:COUNTED_TOKENS], same)


class KnowundoEvaluation(Questions):
    """Measure a model on KnowUnDo: unlearning and retention success, knowledge forgetting and retention rates."""

    benchmark: Literal["knowundo"] = "knowundo"
    """What to measure on."""
    domain: Literal["copyright", "privacy"] = "privacy"
    """Which of KnowUnDo's domains."""
    data: str = HUB
    """KnowUnDo's rows: a hub id, or a folder of its layout."""
    fold: Literal["val", "train"] = "val"
    """Which rows; the authors measure val."""
    nli: str | None = None
    """Sequence classifier with a label for contradiction, for KFR and KRR: a folder or a hub id."""
    max_new_tokens: Tokens = Field(NEW_TOKENS, ge=1)
    """Longest reply, in tokens."""

    def title(self) -> str:
        """Return the heading of the table."""
        return f"KnowUnDo, {self.domain}"

    def rows(self) -> RowsBySet:
        """Return the rows, unlearn and retention.

        Raises:
            UserError: a part is missing or has other columns.
        """
        found = {}
        for part in PARTS:
            name = f"{self.domain}/{part}"
            rows = layout_rows(self.data, self.domain, part, (name, f"{name}_{self.fold}"), "KnowUnDo")
            if self.fold in rows[0]:
                rows = [row for each in rows for row in each[self.fold]]
            elif "train" in rows[0] or "val" in rows[0]:
                raise UserError(f"{name} in {self.data} has no {self.fold}; it has {', '.join(rows[0])}.")
            found[part] = sampled(required(rows, ("text", "labels"), name, self.data), self.limit, self.seed)
        return found

    def data_digest(self) -> str | None:
        """Hash all rows, and of the NLI model."""
        judge = None if self.nli is None else ModelSettings(model=self.nli).identity()["weights"]
        return None if judge == "unknown" else digest(self.rows(), judge)

    def origin(self) -> dict[str, Any]:
        """Return benchmark, domain, data and fold, for the records."""
        return {"benchmark": "knowundo", "domain": self.domain, "data": self.data, "fold": self.fold}

    def prompts(self, tokenizer: Any, rows: RowsBySet) -> Prompts:
        """Return the questions, with the chat template where there is one."""
        return {
            part: [encode_prompt(tokenizer, Example(row["text"], row["labels"], "qa")) for row in own]
            for part, own in rows.items()
        }

    def longest_reply(self) -> int:
        """Return the setting."""
        return self.max_new_tokens

    def ask(self, model: Any, tokenizer: Any, rows: RowsBySet, prompts: Prompts, figures: Figures) -> None:
        """Add KnowUnDo's figures; see the module.

        Raises:
            UserError: an NLI model without a label for contradiction.
        """
        judge = None if self.nli is None else Contradictions(self.nli, next(model.parameters()).device)
        for part, own in rows.items():
            found = score(
                model, [encoded(tokenizer, row) for row in own], pad_token_id=tokenizer.pad_token_id,
                batch_tokens=self.batch_tokens, label=f"KnowUnDo: {part}",
            )  # fmt: skip
            right = np.array([float(np.mean(each)) for each in found.correct])
            right = 1 - right if part == "unlearn" else right
            figures.add(f"knowundo_{part}_success", right.mean(), len(own), right)
            losses = metrics.likelihood.average_loss(found.logprob)
            figures.add(f"knowundo_{part}_perplexity", np.exp(losses.mean()), len(own))
            questions, truths = [row["text"] for row in own], [row["labels"] for row in own]
            replies = generate(
                model, tokenizer, prompts[part], max_new_tokens=self.max_new_tokens, batch_size=self.batch_size,
                expected_lengths=[len(truth) for truth in truths], label=f"KnowUnDo: answering, {part}",
            )  # fmt: skip
            rouge = metrics.text.rouge_l(truths, replies).recall
            texts = {"questions": questions, "references": truths, "generations": replies}
            figures.add(f"knowundo_{part}_rouge", rouge.mean(), len(own), rouge, **texts)
            values = rates(questions, truths, replies, forget=part == "unlearn", contradictions=judge)
            told = int((~np.isnan(values)).sum())
            if told:
                figures.add(
                    "kfr" if part == "unlearn" else "krr", np.nanmean(values), told, values, nli=self.nli,
                    unknown=len(own) - told,
                )  # fmt: skip
            if told < len(own):
                say(
                    [
                        f"{part}: {len(own) - told} of {len(own)} answers say nothing that their question does not: left out."
                    ]
                )
