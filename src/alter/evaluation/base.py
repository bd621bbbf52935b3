"""What every benchmark shares: the settings of one evaluation, and what it has to provide."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import Field

from alter.core import warn
from alter.models import ModelSettings
from alter.settings import BatchSize, OutFile, Rows, Seed, Tokens
from alter.storage import Record


class Evaluation(ModelSettings, ABC):
    """Settings of one evaluation; a benchmark adds its own and says how it measures a model in memory.

    `alter evaluate --benchmark NAME` finds the class by its name in `alter.plugins.BENCHMARKS`.
    """

    name: str | None = None
    """What the records call the model; "unlearned" with an adapter, else "original", unless this says otherwise."""
    batch_tokens: Tokens | None = Field(None, ge=1)
    """Padded tokens in one scoring batch; by default 16384, or 1024 on a CPU."""
    batch_size: BatchSize = Field(64, ge=1)
    """Prompts in one generation batch."""
    limit: Rows | None = Field(None, ge=1)
    """Only this many rows of each set, for a quick look."""
    seed: Seed = 0
    """Chooses the rows when there is a limit."""
    json_path: OutFile = None
    """File for the records."""
    cache: str | None = None
    """Folder that keeps results, or "off"; by default that of ALTER_CACHE, else ~/.cache/alter."""

    @property
    def label(self) -> str:
        """What the records call the model."""
        return self.name or ("unlearned" if self.adapter else "original")

    @abstractmethod
    def title(self) -> str:
        """Return the heading of the table, without the model."""

    @abstractmethod
    def data_digest(self) -> str | None:
        """Hash the contents of everything that is read beside the model, reference results and models included.

        None if the numbers also depend on what cannot be known by its contents (a judge behind a network): then the
        result is not cached.

        Raises:
            UserError: something is missing or not of the expected form: so it is found before a model is loaded.
        """

    @abstractmethod
    def measure(self, model: Any, tokenizer: Any) -> list[Record]:
        """Measure a loaded model and return its records, named `self.label`.

        Raises:
            UserError: data or reference results that do not fit, or what scoring and generating raise.
        """


def quick_look(limit: int) -> str:
    """Return the note that goes with figures of `limit` rows of each set."""
    return f"A quick look at {limit} rows of each set: not comparable with published figures."


_listeners: list[list[str]] = []


@contextlib.contextmanager
def overheard() -> Iterator[list[str]]:
    """Collect the notes printed inside the block, so that a cached result can print them again."""
    notes: list[str] = []
    _listeners.append(notes)
    try:
        yield notes
    finally:
        _listeners.pop()


def say(notes: Iterable[str]) -> None:
    """Print notes on stderr: what could not be computed, why, and which command helps."""
    for note in notes:
        warn(note)
        for listener in _listeners:
            listener.append(note)
