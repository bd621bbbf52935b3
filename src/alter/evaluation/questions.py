"""Benchmarks of questions: every prompt is built and checked before the first reply is generated."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from alter.data import Row, ensure_pad_token
from alter.evaluation.base import Evaluation, quick_look, say
from alter.evaluation.figures import Figures
from alter.inference import check_prompts
from alter.storage import Record

RowsBySet = dict[str, list[Row]]
"""Rows of each set, by its name."""
Prompts = dict[str, list[list[int]]]
"""Token ids of the prompts to reply to, by the set that they are of."""


class Questions(Evaluation):
    """Settings of a benchmark that asks questions; a subclass provides its rows, prompts and figures."""

    @abstractmethod
    def rows(self) -> RowsBySet:
        """Return the rows of each set.

        Raises:
            UserError: a set is missing or has other columns.
        """

    @abstractmethod
    def origin(self) -> dict[str, Any]:
        """Return the source of the rows, for every record."""

    @abstractmethod
    def prompts(self, tokenizer: Any, rows: RowsBySet) -> Prompts:
        """Return the prompts of the sets to ask, in row order."""

    @abstractmethod
    def longest_reply(self) -> int:
        """Return the largest number of tokens of a reply."""

    @abstractmethod
    def ask(self, model: Any, tokenizer: Any, rows: RowsBySet, prompts: Prompts, figures: Figures) -> None:
        """Generate the replies and add the figures."""

    def measure(self, model: Any, tokenizer: Any) -> list[Record]:
        """Return the benchmark's figures.

        Raises:
            UserError: data that do not fit, a prompt that exceeds the model's context, or what `ask` raises.
        """
        rows = self.rows()
        ensure_pad_token(tokenizer)
        if self.limit is not None:
            say([quick_look(self.limit)])
        figures = Figures(self.label, self.origin())
        prompts = self.prompts(tokenizer, rows)
        for name, ids in prompts.items():
            check_prompts(model, ids, self.longest_reply(), _called(name, ids))
        self.ask(model, tokenizer, rows, prompts, figures)
        return figures.records


def _called(name: str, ids: Sequence[Any]) -> list[str]:
    return [f"Row {i} of {name}" for i in range(len(ids))]
