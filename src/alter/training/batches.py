"""Rows of a run, the order in which they are trained on, and the batches that they become."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from alter.data.batching import Collator
from alter.data.encoding import Encoded
from alter.data.examples import Example
from alter.methods import frozen
from alter.methods.objectives import (
    Reference,
)
from alter.training.settings import BRANCHES


@dataclass(frozen=True)
class Rows:
    """The data of a run, encoded: forget rows with the expert of each (1 is the first), and retain rows.

    `alternative` holds the forget rows once more in the form that the objective asks for, if it does, `examples` the forget
    rows before they were encoded.
    """

    forget: list[Encoded]
    retain: list[Encoded]
    expert: list[int]
    alternative: list[Encoded] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    def of(self, branch: str) -> list[Encoded]:
        """The rows of one of `BRANCHES`."""
        return {"forget": self.forget, "alternative": self.alternative, "retain": self.retain}[branch]


Order = list[tuple[int, int | None]]
"""Forget row and retain row of every pair, in the order of training; None: no retain row."""


def schedule(
    forget_lengths: Sequence[int],
    retain_lengths: Sequence[int],
    *,
    epochs: float,
    batch: int,
    seed: int,
    alone: int = 0,
) -> Order:
    """Which forget row meets which retain row, in the order of training; a function of its arguments alone.

    Every epoch takes each forget row once. Retain rows are taken without replacement until all have been seen. Rows of
    similar length are brought together within groups of eight batches, which saves padding; of a small forget set within
    halves, so that batches differ from epoch to epoch. The first `alone` forget rows go without a retain row.
    """
    generator = np.random.default_rng(seed)
    total = math.ceil(epochs * len(forget_lengths))
    pairs: list[tuple[int, int]] = []
    pool: list[int] = []
    group_size = batch * min(8, math.ceil(len(forget_lengths) / (2 * batch)))
    while len(pairs) < total:
        begun = len(pairs)
        order = generator.permutation(len(forget_lengths))[: total - len(pairs)]
        while len(pool) < len(order):
            pool.extend(generator.permutation(len(retain_lengths)).tolist())
        drawn, pool = pool[: len(order)], pool[len(order) :]
        batches = []
        for start in range(0, len(order), group_size):
            f = sorted(order[start : start + group_size].tolist(), key=lambda i: forget_lengths[i])
            r = sorted(drawn[start : start + group_size], key=lambda i: retain_lengths[i])
            group = list(zip(f, r, strict=True))
            batches += [group[i : i + batch] for i in range(0, len(group), batch)]
        # a short batch stays last, so that every other step has the full size
        whole = [b for b in batches if len(b) == batch]
        rest = [b for b in batches if len(b) < batch]
        for i in generator.permutation(len(whole)):
            pairs += whole[i]
        pairs += [pair for b in rest for pair in b]
        # a retain row that is left out is still to be seen
        pool = [r for _, r in pairs[begun:alone]] + pool
    return [(f, None if i < alone else r) for i, (f, r) in enumerate(pairs)]


Traced = dict[str, dict[int, frozen.Row]]


class PairCollator:
    """Lay the rows of a step into one batch, forget rows first, with their routes and what the frozen base knows.

    An item holds a dict per branch that takes part: `encoded`, `row` (of the frozen base) and `expert`.
    """

    def __init__(self, pad_token_id: int) -> None:
        # few different shapes: the allocator can then give a step the memory of the last one
        self.collate = Collator(pad_token_id, multiple_of=16)

    def __call__(self, pairs: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, Any]:
        present = [name for name in BRANCHES if name in pairs[0]]
        items = [pair[name] for name in present for pair in pairs]
        batch: dict[str, Any] = self.collate(
            [{"input_ids": item["encoded"].input_ids, "labels": item["encoded"].labels} for item in items]
        )
        shape = batch["input_ids"].shape
        if items[0]["row"].gates is not None:
            batch["gates"] = torch.zeros(*shape, items[0]["row"].gates.shape[-1])
            # padding counts as high: it is never labelled and must not look like knowledge
            batch["entropy"] = torch.full(shape, torch.inf)
            for place, item in enumerate(items):
                length = len(item["row"].entropy)
                batch["gates"][place, :length] = item["row"].gates
                batch["entropy"][place, :length] = item["row"].entropy
        batch["expert"] = torch.tensor([item["expert"] for item in items])
        # a row that only fills up the batch belongs to no branch
        batch["branch"] = torch.tensor(
            [-1 if pair[name].get("fills") else BRANCHES.index(name) for name in present for pair in pairs]
        )
        for name in present:
            rows = [pair[name]["row"] for pair in pairs]
            if rows[0].reference is not None:
                batch[f"{name}_ids"] = torch.cat([row.reference.ids for row in rows]).long()
                batch[f"{name}_logp"] = torch.cat([row.reference.logp for row in rows]).float()
            if rows[0].base_logp is not None:
                batch[f"{name}_base_logp"] = torch.cat([row.base_logp for row in rows]).float()
            if rows[0].hidden is not None:
                batch[f"{name}_hidden"] = torch.cat([row.hidden for row in rows])
        return batch


class Pairs(torch.utils.data.Dataset):
    """The schedule as a dataset: item i is the i-th pair of a forget and a retain row, in the branches that are traced.

    A pair without a retain row has no such branch. The last items fill up a multiple of `whole`: pairs that go through the model and count for nothing.
    """

    def __init__(self, order: Order, rows: Rows, traced: Traced, whole: int = 1) -> None:
        self.order, self.rows, self.traced, self.whole = order, rows, traced, whole

    def __len__(self) -> int:
        return -(-len(self.order) // self.whole) * self.whole

    def __getitem__(self, i: int) -> dict[str, dict[str, Any]]:
        if i >= len(self.order):
            return {name: self._filling(item) for name, item in self[len(self.order) - 1].items()}
        f, r = self.order[i]
        chosen = {
            "forget": (f, self.rows.expert[f]),
            "alternative": (f, self.rows.expert[f]),
            "retain": (r, 0),
        }
        return {
            name: {"encoded": self.rows.of(name)[row], "row": self.traced[name][row], "expert": expert}
            for name, (row, expert) in chosen.items()
            if name in self.traced and row is not None
        }

    @staticmethod
    def _filling(item: dict[str, Any]) -> dict[str, Any]:
        """The same row without anything that is learned from."""
        row = item["row"]
        reference = row.reference and Reference(row.reference.ids[:0], row.reference.logp[:0])
        cut = {name: getattr(row, name)[:0] for name in ("base_logp", "hidden") if getattr(row, name) is not None}
        encoded = dataclasses.replace(item["encoded"], labels=[-100] * len(item["encoded"].labels))
        return {**item, "encoded": encoded, "row": dataclasses.replace(row, reference=reference, **cut), "fills": True}
