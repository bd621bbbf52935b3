"""The teacher's distributions: head inputs at the counted tokens, cached or recomputed, and the divergence from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alter.core import progress
from alter.data import Collator, batches_by_length
from alter.inference import evaluating
from alter.logits import Head, Part

BATCH_TOKENS = 4096
"""Padded tokens in one of the teacher's passes."""


def kl_of_logits(teacher: Tensor, student: Tensor) -> Tensor:
    """Return KL(teacher || student) = sum_v p_v (log p_v - log q_v) in nats, in float32, from logits [n, V] of both: [n]."""
    log_p, log_q = torch.log_softmax(teacher.float(), -1), torch.log_softmax(student.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class Teacher:
    """A model whose distribution at chosen tokens is the target.

    What its head reads there, [n, D], determines the distribution, and is cached in memory where it fits: then each row
    passes through the teacher once. Of a model without one head (an inference form of two networks) the logits
    themselves are computed anew for every batch.

    Args:
        model: the teacher, in eval mode.
        pad_token_id: fills rows up.
        one_head: whether its logits are what its head makes of hidden states.
    """

    def __init__(self, model: Any, pad_token_id: int, *, one_head: bool = True) -> None:
        self.model = model
        self.collate = Collator(pad_token_id)
        self.head = Head(model) if one_head else None
        self.kept: list[Tensor] | None = None

    @torch.no_grad()
    def states(self, rows: Sequence[list[int]], counted: Sequence[int]) -> list[Tensor]:
        """Compute the head's inputs that predict the last `counted` tokens of each row: [counted, D] each ([counted, V] logits)."""
        device = next(self.model.parameters()).device
        batch = self.collate([{"input_ids": ids, "labels": ids} for ids in rows])
        positions = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        for k, (ids, count) in enumerate(zip(rows, counted, strict=True)):
            positions[k, len(ids) - 1 - count : len(ids) - 1] = True
        given = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        place = positions.to(device)
        with evaluating(self.model):
            if self.head is None:
                found = self.model(**given, use_cache=False).logits[place]
            else:
                with self.head.listening() as read:
                    self.model(**given, use_cache=False)
                found = read.pop()[place]
        return list(found.split(list(counted)))

    def size(self, counted: Sequence[int]) -> int | None:
        """Return the bytes that caching the states of all rows takes; None where there are none to cache."""
        if self.head is None:
            return None
        weight: Tensor = self.head.head.weight
        return sum(counted) * weight.shape[-1] * weight.element_size()

    def keep(self, rows: Sequence[list[int]], counted: Sequence[int]) -> None:
        """Run all rows through the teacher once, and cache the states on the CPU."""
        batches = batches_by_length([len(row) for row in rows], BATCH_TOKENS)
        found: dict[int, Tensor] = {}
        for batch in progress(batches, total=len(batches), label="teacher"):
            made = self.states([rows[i] for i in batch], [counted[i] for i in batch])
            # a view would keep the whole batch alive
            found |= {i: state.cpu().clone() for i, state in zip(batch, made, strict=True)}
        self.kept = [found[i] for i in range(len(rows))]

    def logits(self, states: Tensor) -> Tensor:
        """Return logits [n, V] of states [n, D] from `states`, in the teacher's dtype."""
        if self.head is None:
            return states
        with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
            return self.head.logits(states)


def part(teacher: Teacher, states: Tensor) -> Part:
    """Return the part that `alter.logits.head.measuring` applies to the student's logits: the divergence at n tokens, [n, 1]."""
    return Part(len(states), lambda logits, at: kl_of_logits(teacher.logits(states[at]), logits)[:, None])
