"""RWKU (Jin et al. 2024, arXiv:2406.10890): real people, asked about in three ways, their neighbours, and membership.

| figure | rows | how it is measured |
|---|---|---|
| `rwku_forget_fb` | forget_level1 | a blank is filled in |
| `rwku_forget_qa` | forget_level2 | a question is answered |
| `rwku_forget_aa` | forget_level3 | an adversarial question is answered (nine types, by type in the record) |
| `rwku_forget` | | mean of the three |
| `rwku_neighbor_fb`, `_qa`, `rwku_neighbor` | neighbor_level1, 2 | as above, of people beside them |
| `rwku_mia_forget`, `rwku_mia_retain` | mia_forget, mia_retain | mean loss per token of texts about the people, and of others |

Every reply is greedy, of at most 30 tokens, and ends with its line; the figure is the mean ROUGE-L recall of the answer's
words, without stemming. The question stands in the user's turn after a line that says what to do, and the reply begins
with "Answer:". Two differences from the authors' code: the system turn is the one that is put everywhere here, and ROUGE
is rouge-score's, not the package rouge's, which joins sentences. General ability is MMLU's (`--benchmark mmlu`); BBH,
TruthfulQA, TriviaQA and AlpacaEval are lm-evaluation-harness' (`--benchmark lm-eval`).

Layout: hub (`jinzhuoran/RWKU`), FOLDER/CONFIGURATION/test.json (.jsonl, .parquet), or FOLDER/CONFIGURATION.json as the authors' script
writes them for each person (there forget_mia and retain_mia). Columns: `query`, `answer`, `subject`, `level`, and `type` in
forget_level3; `text` and `subject` of the texts.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from pydantic import Field

from alter import metrics
from alter.core import UserError, nearest
from alter.data import Example, Row, encode_prompt, layout_rows
from alter.evaluation.figures import Figures
from alter.evaluation.questions import Prompts, Questions, RowsBySet
from alter.evaluation.replies import CutReplies, by_group, open_ids, required, sampled, text_losses
from alter.inference import generate
from alter.storage import digest

HUB = "jinzhuoran/RWKU"
NEW_TOKENS = 30
PROBES = {
    "forget_fb": "forget_level1",
    "forget_qa": "forget_level2",
    "forget_aa": "forget_level3",
    "neighbor_fb": "neighbor_level1",
    "neighbor_qa": "neighbor_level2",
}
"""Figures and the configurations that they are of."""
TEXTS = {"mia_forget": "forget_mia", "mia_retain": "retain_mia"}
"""Configurations of texts, and what their files are called for a single person."""
RwkuPart = Literal["forget", "neighbor", "mia"]
BLANK = "Please complete the blank in the following question.\n"
BRIEF = "Please briefly answer the following question.\n"


def prompt(row: Row, figure: str) -> tuple[str, str]:
    """Return the user's turn of a probe, and RWKU's words with which the reply begins."""
    query, kind = str(row["query"]), row.get("type")
    if figure.endswith("_fb"):
        return f"{BLANK}Question: {query}\n", "Answer:"
    if figure.endswith("_aa") and kind == "affirmative suffix":
        return f"{BRIEF}Question: {query}", ""
    if figure.endswith("_aa") and kind == "incontext learning":
        return f"{BRIEF}{query}\n", "Answer:"
    return f"{BRIEF}Question: {query}\n", "Answer:"


def prompt_ids(tokenizer: Any, row: Row, figure: str) -> list[int]:
    """Return the tokens of a probe, with the beginning of the reply."""
    asked, beginning = prompt(row, figure)
    if not tokenizer.chat_template:
        return open_ids(tokenizer, f"{asked}{beginning}")
    ids = encode_prompt(tokenizer, Example(asked, "x", "qa"))
    return [*ids, *tokenizer(beginning, add_special_tokens=False)["input_ids"]] if beginning else ids


class RwkuEvaluation(Questions):
    """Measure a model on RWKU: forgetting of people, their neighbours, and membership."""

    benchmark: Literal["rwku"] = "rwku"
    """What to measure on."""
    data: str = HUB
    """RWKU's rows: a hub id, or a folder of its layout."""
    parts: list[RwkuPart] = Field(default_factory=lambda: list(get_args(RwkuPart)), min_length=1)
    """What to measure: forget, neighbor, mia."""
    targets: list[str] = Field(default_factory=list)
    """The people that were to be forgotten, by name; by default all in the rows."""

    def title(self) -> str:
        """Return the heading of the table."""
        who = f" ({', '.join(self.targets)})" if self.targets else ""
        return f"RWKU{who}"

    def rows(self) -> RowsBySet:
        """Return the rows by figure.

        Raises:
            UserError: a configuration is missing, has other columns, or holds nobody of the targets.
        """
        found: RowsBySet = {}
        for figure, name in PROBES.items():
            if figure.split("_")[0] in self.parts:
                columns = ("query", "answer", "subject", *(("type",) if figure == "forget_aa" else ()))
                rows = layout_rows(self.data, name, "test", (f"{name}/test", name), "RWKU")
                found[figure] = self._chosen(required(rows, columns, name, self.data), name)
        if "mia" in self.parts:
            for name, alias in TEXTS.items():
                rows = layout_rows(self.data, name, "test", (f"{name}/test", name, alias), "RWKU")
                columns = ("text", "subject") if name == "mia_forget" and self.targets else ("text",)
                kept = required(rows, columns, name, self.data)
                # the others' texts are of nobody's
                found[name] = self._chosen(kept, name) if name == "mia_forget" else kept
        return {figure: sampled(rows, self.limit, self.seed) for figure, rows in found.items()}

    def _chosen(self, rows: list[Row], name: str) -> list[Row]:
        if not self.targets:
            return rows
        people = sorted({str(row["subject"]) for row in rows})
        for target in self.targets:
            if target not in people:
                raise UserError(
                    f"{name} in {self.data} has no rows about {target!r}.{nearest(target, people)} It has {len(people)} "
                    f"people, such as {', '.join(people[:5])}."
                )
        return [row for row in rows if row["subject"] in self.targets]

    def data_digest(self) -> str | None:
        """Hash all rows."""
        return digest(self.rows())

    def origin(self) -> dict[str, Any]:
        """Return benchmark, data and people, for the records."""
        return {"benchmark": "rwku", "data": self.data, "targets": self.targets}

    def prompts(self, tokenizer: Any, rows: RowsBySet) -> Prompts:
        """Return RWKU's prompts of the probes, by figure."""
        return {
            figure: [prompt_ids(tokenizer, row, figure) for row in rows[figure]] for figure in PROBES if figure in rows
        }

    def longest_reply(self) -> int:
        """Return the largest number of tokens of a reply, as in RWKU's code."""
        return NEW_TOKENS

    def ask(self, model: Any, tokenizer: Any, rows: RowsBySet, prompts: Prompts, figures: Figures) -> None:
        """Add RWKU's figures; see the module."""
        for part in ("forget", "neighbor"):
            means = []
            for figure in (name for name in prompts if name.startswith(part)):
                own = rows[figure]
                replies = generate(
                    model, CutReplies(tokenizer, ("\n",)), prompts[figure], max_new_tokens=NEW_TOKENS,
                    batch_size=self.batch_size, label=f"RWKU: {figure}",
                )  # fmt: skip
                references = [str(row["answer"]) for row in own]
                values = metrics.text.rouge_l(references, replies, stem=False).recall
                extra: dict[str, Any] = {
                    "questions": [row["query"] for row in own], "references": references, "generations": replies,
                }  # fmt: skip
                if figure == "forget_aa":
                    extra["by_type"] = by_group([str(row["type"]) for row in own], values)
                figures.add(f"rwku_{figure}", values.mean(), len(own), values, **extra)
                means.append(float(values.mean()))
            if means:
                figures.add(f"rwku_{part}", np.mean(means), sum(len(rows[f]) for f in prompts if f.startswith(part)))
        for name in TEXTS:
            if name in rows:
                losses, cut = text_losses(self, model, tokenizer, [row["text"] for row in rows[name]], f"RWKU: {name}")
                figures.add(f"rwku_{name}", losses.mean(), len(losses), losses, cut=cut)
