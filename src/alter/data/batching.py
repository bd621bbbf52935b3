"""Pad token sequences to batches, and group rows of similar length."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from alter.core import UserError
from alter.data.encoding import IGNORE


class Collator:
    """Pads rows to a batch.

    Each row is a dict with `input_ids`, `labels` and any further per-token lists of the same length (routing weights,
    entropies) or single numbers. Ids are padded with `pad_token_id`, labels with -100, other lists with 0; lists of
    floats become float32, lists of ints int64. `attention_mask` is built from the lengths, so that a padding token
    which is also the end-of-sequence token stays visible inside a row. Padding is on `side` ("right" or "left"), up to
    a multiple of `multiple_of` tokens: fewer shapes, less memory in caches that are kept for each.
    """

    def __init__(self, pad_token_id: int, side: str = "right", multiple_of: int = 1) -> None:
        if side not in ("left", "right"):
            raise UserError(f"Padding side {side!r} is unknown; expected 'left' or 'right'.")
        self.pad_token_id = pad_token_id
        self.side = side
        self.multiple_of = multiple_of

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return tensors of shape (rows, longest row, rounded up), plus one of shape (rows,) for each column of single numbers."""
        lengths = [len(row["input_ids"]) for row in rows]
        longest = -(-max(lengths) // self.multiple_of) * self.multiple_of
        batch: dict[str, torch.Tensor] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if not isinstance(values[0], Sequence):
                batch[name] = torch.tensor(values)
                continue
            for value, length in zip(values, lengths, strict=True):
                if len(value) != length:
                    raise ValueError(f"{name!r} has {len(value)} entries for {length} tokens")
            whole = all(isinstance(item, int) for value in values for item in value)
            fill = {"input_ids": self.pad_token_id, "labels": IGNORE}.get(name, 0)
            padded = torch.full((len(rows), longest), fill, dtype=torch.int64 if whole else torch.float32)
            for number, value in enumerate(values):
                padded[number, self._slots(len(value), longest)] = torch.tensor(value, dtype=padded.dtype)
            batch[name] = padded
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for number, length in enumerate(lengths):
            mask[number, self._slots(length, longest)] = 1
        batch["attention_mask"] = mask
        return batch

    def _slots(self, length: int, longest: int) -> slice:
        return slice(0, length) if self.side == "right" else slice(longest - length, longest)


def batches_by_length(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Group row numbers, longest rows first, so that rows x longest length stays within `tokens` (or is one row's)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    for index in order:
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


class LengthBatches:
    """Batches of rows of similar length; their order is a function of seed and epoch.

    The rows are shuffled, stretches of 50 batches sorted by length, and the batches shuffled again: little padding, and
    the same number of batches in every epoch. With a Trainer, the epoch is the Trainer's.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, trainer: Any = None) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.trainer = trainer

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        if self.trainer is not None:
            # a whole number at the start of an epoch, and when resuming within one its number rounded down
            self.epoch = int((self.trainer.state.epoch or 0) + 1e-9)
        draw = random.Random(f"{self.seed}/{self.epoch}")
        order = list(range(len(self.lengths)))
        draw.shuffle(order)
        stretch = 50 * self.batch_size
        rows: list[int] = []
        for start in range(0, len(order), stretch):
            rows += sorted(order[start : start + stretch], key=lambda row: self.lengths[row])
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        draw.shuffle(batches)
        yield from batches
