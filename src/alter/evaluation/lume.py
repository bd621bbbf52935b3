"""LUME (Ramakrishna et al. 2025, arXiv:2502.15097; SemEval-2025 task 4): three tasks, completions and questions.

| figure | rows | how it is measured |
|---|---|---|
| `lume_forget_regurgitation`, `lume_retain_regurgitation` | completions (`id` ...sc0) | ROUGE-L recall of the true continuation |
| `lume_forget_knowledge`, `lume_retain_knowledge` | questions (`id` ...qa0) | share of replies that are the answer, but for case and white space at the ends |
| `lume_task_aggregate` | all | harmonic mean over tasks of all four, those of forget as 1 minus the value |
| `lume_mia` | member, nonmember | AUC of telling members by their loss: 0.5 is right |
| `lume_score` | | mean of the aggregate, 1 - 2 |AUC - 0.5| and MMLU's accuracy (`--mmlu`) |

As in the task's own script: the input is read as it is, without a chat template; replies are greedy, of at most 256
tokens; ROUGE with the Porter stemmer. A harmonic mean with a zero is zero.

Layout: hub (gated; splits forget_validation and retain_validation, or `--fold train`), or a folder with forget and retain (or
FOLD/forget, data/forget_FOLD-*.parquet) as .json, .jsonl or .parquet, and for membership member and nonmember (also in
mia_data). Columns: `id`, `input`, `output`, `task`; `document` of the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import harmonic_mean
from typing import Any, Literal

import numpy as np
from pydantic import Field

from alter import metrics
from alter.core import UserError
from alter.data import layout_rows
from alter.evaluation.base import say
from alter.evaluation.figures import Figures
from alter.evaluation.questions import Prompts, Questions, RowsBySet
from alter.evaluation.replies import by_group, open_ids, required, sampled, text_losses
from alter.inference import generate
from alter.settings import Tokens
from alter.storage import digest

HUB = "llmunlearningsemeval2025organization/semeval25-unlearning-dataset-public"
NEW_TOKENS = 256
KIND = re.compile(r"(sc|qa).$")
"""What an id ends with: completion or question, and a number."""
TASK_NAMES = {"sc": "regurgitation", "qa": "knowledge"}


class LumeEvaluation(Questions):
    """Measure a model on LUME (SemEval-2025 task 4): regurgitation, knowledge, membership, and the task's score."""

    benchmark: Literal["lume"] = "lume"
    """What to measure on."""
    data: str = HUB
    """LUME's rows: a hub id, or a folder of its layout."""
    fold: Literal["validation", "train"] = "validation"
    """Which fold of forget and retain."""
    membership: bool = True
    """Measure membership, if the folder has member and nonmember texts."""
    mmlu: float | None = Field(None, ge=0, le=1)
    """The model's accuracy on MMLU (`alter evaluate --benchmark mmlu`): with membership it gives the task's score."""
    max_new_tokens: Tokens = Field(NEW_TOKENS, ge=1)
    """Longest reply, in tokens."""

    def title(self) -> str:
        """Return the heading of the table."""
        return f"LUME, {self.fold}"

    def rows(self) -> RowsBySet:
        """Return the rows: forget, retain, and member and nonmember where there are some.

        Raises:
            UserError: a part is missing, or has other columns or ids.
        """
        found: RowsBySet = {}
        for name in ("forget", "retain"):
            split = f"{name}_{self.fold}"
            stems = (f"{self.fold}/{name}", f"data/{split}", split, name)
            rows = required(
                layout_rows(self.data, None, split, stems, "LUME"), ("id", "input", "output", "task"), name, self.data
            )
            for i, row in enumerate(rows):
                if KIND.search(row["id"]) is None:
                    raise UserError(
                        f"Row {i} of {name} in {self.data} has the id {row['id']!r}; expected one that ends in sc or qa and "
                        "a digit, which tells completions from questions."
                    )
            found[name] = sampled(rows, self.limit, self.seed)
        if self.membership:
            try:
                for name in ("member", "nonmember"):
                    places = (name, f"mia_data/{name}")
                    own = required(
                        layout_rows(self.data, "mia_data", name, places, "LUME"), ("document",), name, self.data
                    )
                    found[name] = sampled(own, self.limit, self.seed)
            except UserError as error:
                say([f"No membership: {error} (`membership=False` leaves it out.)"])
                found.pop("member", None)
        return found

    def data_digest(self) -> str | None:
        """Hash all rows."""
        return digest(self.rows())

    def origin(self) -> dict[str, Any]:
        """Return benchmark, data and fold, for the records."""
        return {"benchmark": "lume", "data": self.data, "fold": self.fold}

    def prompts(self, tokenizer: Any, rows: RowsBySet) -> Prompts:
        """Return the inputs of forget and retain as they are."""
        return {name: [open_ids(tokenizer, row["input"]) for row in rows[name]] for name in ("forget", "retain")}

    def longest_reply(self) -> int:
        """Return the setting."""
        return self.max_new_tokens

    def ask(self, model: Any, tokenizer: Any, rows: RowsBySet, prompts: Prompts, figures: Figures) -> None:
        """Add LUME's figures; see the module."""
        terms: list[float] = []
        for name, ids in prompts.items():
            own = rows[name]
            replies = generate(
                model, tokenizer, ids, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size,
                label=f"LUME: {name}",
            )  # fmt: skip
            for kind, what in TASK_NAMES.items():
                chosen = [i for i, row in enumerate(own) if row["id"][:-1].endswith(kind)]
                if not chosen:
                    say([f"{name} has no rows of {what} (ids that end in {kind} and a digit)."])
                    continue
                references, said = [own[i]["output"] for i in chosen], [replies[i] for i in chosen]
                if kind == "sc":
                    values = metrics.text.rouge_l(references, said).recall
                else:
                    values = np.array([float(same(a, b)) for a, b in zip(references, said, strict=True)])
                tasks = by_group([own[i]["task"] for i in chosen], values)
                terms += [1 - value if name == "forget" else value for value in tasks.values()]
                figures.add(
                    f"lume_{name}_{what}", values.mean(), len(chosen), values, by_task=tasks, references=references,
                    generations=said,
                )  # fmt: skip
        aggregate = harmonic_mean(terms)
        figures.add("lume_task_aggregate", aggregate, len(rows["forget"]) + len(rows["retain"]), terms=terms)
        if "member" in rows:
            self._membership(model, tokenizer, rows, figures, aggregate, len(terms))

    def _membership(
        self,
        model: Any,
        tokenizer: Any,
        rows: Mapping[str, Sequence[Mapping[str, Any]]],
        figures: Figures,
        aggregate: float,
        count: int,
    ) -> None:
        """Add the membership AUC of members' and nonmembers' losses and, if MMLU's accuracy is given, LUME's score."""
        losses = {}
        for name in ("member", "nonmember"):
            losses[name], cut = text_losses(
                self, model, tokenizer, [row["document"] for row in rows[name]], f"LUME: {name}"
            )
            if cut:
                say([f"{name}: {cut} of {len(rows[name])} texts were cut to the model's context."])
        auc = metrics.membership.auc(losses["member"], losses["nonmember"])
        scores = {name: each.tolist() for name, each in losses.items()}
        sizes = [len(each) for each in losses.values()]
        figures.add("lume_mia", auc, sum(sizes), scores=scores, interval=metrics.samples.auc_interval(auc, *sizes))
        if self.mmlu is None:
            say(
                ["No lume_score: it takes MMLU's accuracy (as `mmlu`; `alter evaluate --benchmark mmlu` measures it)."]
            )
        else:
            parts = [aggregate, 1 - 2 * abs(auc - 0.5), self.mmlu]
            figures.add("lume_score", np.mean(parts), count, parts=parts)


def same(truth: str, reply: str) -> bool:
    """Tell whether a reply equals the answer, except for case and white space at the ends."""
    return truth.strip().lower() == reply.strip().lower()
