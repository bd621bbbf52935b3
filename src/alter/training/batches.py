"""Encoded rows of a run, the order in which training visits them, and the batches made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alter.data import Collator, Encoded, Example
from alter.groundwork import frozen
from alter.methods import Reference
from alter.training.settings import BRANCHES


@dataclass(frozen=True)
class RunRows:
    """The encoded rows of a run: forget rows, each with its expert (counted from 1), and retain rows.

    `alternative` holds the forget rows rewritten as the objective asks, if it does, `examples` the forget
    rows before they were encoded; `paired` is how many pairs an epoch has, where that is not one for each forget row.
    """

    forget: list[Encoded]
    retain: list[Encoded]
    expert: list[int]
    alternative: list[Encoded] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    paired: int | None = None

    @property
    def epoch(self) -> int:
        """Number of pairs in an epoch."""
        return len(self.forget) if self.paired is None else self.paired

    def of(self, branch: str) -> list[Encoded]:
        """Return the rows of one of `BRANCHES`."""
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
    """Pair forget rows with retain rows, in training order; a function of its arguments alone.

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


@dataclass(frozen=True)
class TrainingRow:
    """One row of a step: its tokens, what the frozen base computed for them, and its expert (0: retention).

    `fills` marks a row that only pads a batch: it passes through the model without a loss. `trunk` [T, D]
    holds the cached output of the blocks below the adapter, if any.
    """

    encoded: Encoded
    known: frozen.FrozenRow
    expert: int
    fills: bool = False
    trunk: Tensor | None = None

    def filling(self) -> TrainingRow:
        """Return the row as filler: same tokens, but no label and no target."""
        known = self.known
        reference = known.reference and known.reference.at(slice(0))
        cut = {
            name: getattr(known, name)[:0]
            for name in ("base_logp", "hidden", "named")
            if getattr(known, name) is not None
        }
        labels = [-100] * len(self.encoded.labels)
        return TrainingRow(
            replace(self.encoded, labels=labels),
            replace(known, reference=reference, **cut),
            self.expert,
            True,
            self.trunk,
        )


Traced = dict[str, dict[int, frozen.FrozenRow]]
"""What the frozen base knows of the rows of each branch, by row number."""


@dataclass(frozen=True)
class Known:
    """What the frozen base computed for the rows of one branch of a batch.

    Attributes:
        reference: distributions at the branch's n labelled tokens, or None unless its objective declared `views`.
        base_logp: [n] log-probability of each label, or None unless declared.
        hidden: [m, D] hidden states of its m real tokens, or None unless declared.
        named: [m] bool, which of them are part of a name, or None unless declared.
    """

    reference: Reference | None = None
    base_logp: Tensor | None = None
    hidden: Tensor | None = None
    named: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[frozen.FrozenRow]) -> Known:
        """Concatenate the values of several rows."""

        def beside(parts: list[Any]) -> Any:
            return None if parts[0] is None else torch.cat(parts)

        references = [row.reference for row in rows]
        if references[0] is None:
            reference = None
        else:
            ids, logp = (torch.cat([getattr(part, name) for part in references]) for name in ("ids", "logp"))
            reference = Reference(ids.long(), logp.float())
        base_logp = beside([row.base_logp for row in rows])
        hidden, named = (beside([getattr(row, name) for row in rows]) for name in ("hidden", "named"))
        return cls(reference, None if base_logp is None else base_logp.float(), hidden, named)

    def map(self, change: Callable[[Tensor], Tensor]) -> Known:
        """Apply a function to every tensor."""
        reference = self.reference and Reference(change(self.reference.ids), change(self.reference.logp))
        others = (self.base_logp, self.hidden, self.named)
        return Known(reference, *(None if value is None else change(value) for value in others))


@dataclass(frozen=True)
class Batch:
    """The rows of a step, branch after branch: B rows of T tokens.

    Attributes:
        input_ids, attention_mask, labels: [B, T] long.
        expert: [B] long, the only expert that each row may move; 0 is the retention expert.
        branch: [B] long, places in `BRANCHES`; -1 for a row that only pads the batch.
        forget, alternative, retain: what the base knows of the rows of each branch; None where the branch has none.
        gates: [B, T, experts], or None unless the adapter routes.
        entropy: [B, T] of the step that generated each token, likewise; +inf for padding.
        trunk: [B, T, D] that the blocks below the adapter put out, zeros for padding; None where they are to run.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    expert: Tensor
    branch: Tensor
    forget: Known | None = None
    alternative: Known | None = None
    retain: Known | None = None
    gates: Tensor | None = None
    entropy: Tensor | None = None
    trunk: Tensor | None = None

    def known(self, branch: str) -> Known:
        """Return the frozen base's values for the rows of one of `BRANCHES`."""
        found: Known | None = getattr(self, branch)
        return Known() if found is None else found

    def to(self, device: Any, non_blocking: bool = False) -> Batch:
        """Move all tensors to a device; accelerate calls this on every batch."""

        def move(value: Any) -> Any:
            if isinstance(value, Known):
                return value.map(move)
            return value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value

        return Batch(**{field.name: move(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True)
class Places:
    """Positions of a batch's n labelled tokens, of the branches whose objective reads the head.

    Attributes:
        positions: [B, T] bool, the position before each token: its distribution gives the token.
        truth: [n] long, the tokens.
        high: [n] bool, whether each has high entropy: that of the step that generated it.
        branch: [n] long, places in `BRANCHES`.
        counts: tokens of each branch; they come branch after branch.
    """

    positions: Tensor
    truth: Tensor
    high: Tensor
    branch: Tensor
    counts: list[int]

    @classmethod
    def of(cls, batch: Batch, high: Tensor, wanted: Sequence[bool]) -> Places:
        """Return the places in a batch with high-entropy tokens [B, T], for the branches asked for."""
        asked = torch.tensor(wanted, device=batch.labels.device)
        positions = frozen.labelled(batch.labels) & asked[batch.branch][:, None]
        truth, of_high = (values[:, 1:][positions[:, :-1]] for values in (batch.labels, high))
        branch = batch.branch[:, None].expand_as(positions)[positions]
        return cls(positions, truth, of_high, branch, torch.bincount(branch, minlength=len(BRANCHES)).tolist())

    def asked(self, batch: Batch) -> Tensor:
        """Tell which tokens [n] stand in their row's prompt as well."""
        row = torch.arange(len(batch.labels), device=batch.labels.device)[:, None].expand_as(batch.labels)
        prompt = batch.attention_mask.bool() & (batch.labels < 0)
        # a number for each token of each row
        said = row * batch.input_ids.max() + row + batch.input_ids
        own = said[:, 1:][self.positions[:, :-1]]
        return torch.isin(own, said[prompt])

    def truth_of(self, branch: str) -> Tensor:
        """Return the labels of a branch, and those of the branches after it."""
        return self.truth[sum(self.counts[: BRANCHES.index(branch)]) :]


class PairCollator:
    """Collate the pairs of a step into one `Batch`.

    transformers' Trainer is given a dict: `batch`, beside it the `input_ids` and `labels` that it counts itself.
    """

    def __init__(self, pad_token_id: int) -> None:
        # few different shapes: the allocator can then give a step the memory of the last one
        self.collate = Collator(pad_token_id, multiple_of=16)

    def __call__(self, pairs: Sequence[Mapping[str, TrainingRow]]) -> dict[str, Any]:
        """Return the batch of some pairs; all pairs must have the same branches."""
        present = [name for name in BRANCHES if name in pairs[0]]
        items = [pair[name] for name in present for pair in pairs]
        tokens = self.collate([{"input_ids": i.encoded.input_ids, "labels": i.encoded.labels} for i in items])
        gates, entropy = self._routes(items, *tokens["input_ids"].shape)
        batch = Batch(
            tokens["input_ids"],
            tokens["attention_mask"],
            tokens["labels"],
            torch.tensor([item.expert for item in items]),
            torch.tensor([-1 if pair[name].fills else BRANCHES.index(name) for name in present for pair in pairs]),
            gates=gates,
            entropy=entropy,
            trunk=self._trunk(items, tokens["input_ids"].shape[1]),
            **{name: Known.of([pair[name].known for pair in pairs]) for name in present},
        )
        return {"input_ids": batch.input_ids, "labels": batch.labels, "batch": batch}

    @staticmethod
    def _trunk(items: Sequence[TrainingRow], width: int) -> Tensor | None:
        """Return the cached states [rows, width, D] below the adapter, or None if they are not cached."""
        if items[0].trunk is None:
            return None
        states = items[0].trunk.new_zeros(len(items), width, items[0].trunk.shape[-1])
        for place, item in enumerate(items):
            assert item.trunk is not None
            states[place, : len(item.trunk)] = item.trunk
        return states

    @staticmethod
    def _routes(items: Sequence[TrainingRow], rows: int, width: int) -> tuple[Tensor | None, Tensor | None]:
        """Return gates [rows, width, experts] and entropies [rows, width], or None for an adapter that does not route."""
        if items[0].known.gates is None:
            return None, None
        gates = torch.zeros(rows, width, items[0].known.gates.shape[-1])
        # padding counts as high: it is never labelled and must not look like knowledge
        entropy = torch.full((rows, width), torch.inf)
        for place, item in enumerate(items):
            assert item.known.entropy is not None
            assert item.known.gates is not None
            length = len(item.known.entropy)
            gates[place, :length] = item.known.gates
            entropy[place, :length] = item.known.entropy
        return gates, entropy


class Pairs(torch.utils.data.Dataset[dict[str, TrainingRow]]):
    """The schedule as a dataset: item i is the i-th pair of a forget and a retain row, in the branches that are traced.

    A pair without a retain row has no such branch. The last pairs fill up a multiple of `whole` and count for nothing.
    `trunk` gives the states of a row of a branch below the adapter, where they are kept.
    """

    def __init__(
        self,
        order: Order,
        rows: RunRows,
        traced: Traced,
        whole: int = 1,
        trunk: Callable[[str, int], Tensor] | None = None,
    ) -> None:
        self.order, self.rows, self.traced, self.whole, self.trunk = order, rows, traced, whole, trunk

    def __len__(self) -> int:
        return -(-len(self.order) // self.whole) * self.whole

    def __getitem__(self, i: int) -> dict[str, TrainingRow]:
        if i >= len(self.order):
            return {name: item.filling() for name, item in self[len(self.order) - 1].items()}
        f, r = self.order[i]
        chosen = {"forget": (f, self.rows.expert[f]), "alternative": (f, self.rows.expert[f]), "retain": (r, 0)}
        return {
            name: TrainingRow(
                self.rows.of(name)[row],
                self.traced[name][row],
                expert,
                trunk=None if self.trunk is None else self.trunk(name, row),
            )
            for name, (row, expert) in chosen.items()
            if name in self.traced and row is not None
        }
