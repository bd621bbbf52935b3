"""The tensors that objectives read (logits, labelled tokens, references, hidden states) and the arithmetic they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from alter.core import processes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """The k most likely tokens of a reference distribution at n positions; what is left over is one tail bucket.

    Attributes:
        ids: [n, k] long, distinct in each row.
        logp: [n, k] their log-probabilities; -inf fills unused places.
    """

    ids: Tensor
    logp: Tensor

    def at(self, places: slice | Tensor) -> Reference:
        """Select the distributions at some of the n positions."""
        return Reference(self.ids[places], self.logp[places])

    def without(self, labels: Tensor) -> Reference:
        """Remove the label's probability and renormalise the rest.

        Args:
            labels: [n] long; one outside the k tokens is in the tail, and nothing is removed there.

        Returns:
            A reference over the same ids. Where the label is the only one of the k tokens with any probability there is
            nothing to aim at: such a row becomes all -inf, and `divergence` gives 0 for it.
        """
        hit = self.ids == labels[:, None]
        return self._renormalised(hit, self.logp.masked_fill(hit, -torch.inf))

    def lowered(self, labels: Tensor, by: float) -> Reference:
        """Lower the label's logit by `by` and renormalise; the tail bucket takes part.

        Args:
            labels: [n] long; one outside the k tokens is in the tail, and nothing changes there.
        """
        hit = self.ids == labels[:, None]
        return self._renormalised(hit, torch.where(hit, self.logp - by, self.logp))

    def _renormalised(self, changed: Tensor, logp: Tensor) -> Reference:
        """Scale `logp` [n, k] over the same ids to sum to 1 with the tail, in the rows that `changed` [n, k] marks.

        Summed in log space, as 1 - p(label) would cancel where the label is nearly certain. The tail is known as
        1 - sum alone: as in `divergence`, 1e-6 and less of it is rounding and counts as none.
        """
        tail = 1 - self.logp.exp().sum(-1, keepdim=True)
        tail = torch.where(tail > 1e-6, tail.clamp_min(1e-6).log(), torch.full_like(tail, -torch.inf))
        total = torch.logsumexp(torch.cat([logp, tail], -1), -1, keepdim=True)
        touched = changed.any(-1, keepdim=True) & total.isfinite()
        return Reference(self.ids, torch.where(touched, logp - total, logp))


@dataclass(frozen=True)
class Codes:
    """A frozen sparse autoencoder of hidden states, and the mean codes of names under the frozen base.

    Attributes:
        encode: gives the code [..., S] of states [..., D].
        unknown: [S], the mean code of invented names.
        known: [S], the mean code of names that the base must still know.
        scale: mean squared length of the codes of the names to forget.
    """

    encode: Callable[[Tensor], Tensor]
    unknown: Tensor
    known: Tensor
    scale: float


@dataclass(frozen=True)
class Hidden:
    """Hidden states of the real tokens of some rows after one block, m tokens of width D.

    Attributes:
        states: [m, D], the model's.
        row: [m] long, the row of each token, as in `Labelled`.
        base: [m, D], the frozen base's, or None unless the objective declared `base_hidden`; moved if it declared `redirected`.
        named: [m] bool, whether the token is part of a name (`codes`) or of a prompt (`redirected`), or None unless declared.
        codes: how such states are compared, or None unless declared.
    """

    states: Tensor
    row: Tensor
    base: Tensor | None = None
    named: Tensor | None = None
    codes: Codes | None = None


def log_probabilities(logits: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return log-probabilities at ids [n, m], and of all tokens outside the last `k` of them [n], of logits [n, V].

    See `alter.methods.objectives.gathered`, which is loaded here, as torch is by it.
    """
    from alter.methods.objectives.gathered import LogProbabilities

    found: tuple[Tensor, Tensor] = LogProbabilities.apply(logits, ids, k)
    return found


class Emitted:
    """The model's output at n labelled tokens, which `per_token` reads, in fp32 (fp64 for fp64 logits).

    Args:
        logits: [n, V], of the distribution that should give each label.
        labels: [n] long, the true tokens.
        reference: what the objective should compare with, or None unless it declared `views`.
        runner_up: look for the likeliest other token.

    Attributes:
        nll: [n] negative log-likelihood of each label in nats.
        other: [n] log-probability of the likeliest token that is not the label, the first of several; or None.
        known: [n, k] log-probabilities of the reference's tokens, or None.
        rest: [n] log-probability of all other tokens together; None without a reference, or where it has them all.
    """

    def __init__(
        self, logits: Tensor, labels: Tensor, reference: Reference | None = None, runner_up: bool = False
    ) -> None:
        self.logits, self.labels, self.reference = logits, labels, reference
        ids = [labels[:, None]]
        if runner_up:
            ids.append(logits.detach().scatter(-1, ids[0], -torch.inf).argmax(-1, keepdim=True))
        k = 0
        if reference is not None:
            ids.append(reference.ids)
            k = reference.ids.shape[-1]
        partial = k < logits.shape[-1]
        logp, rest = log_probabilities(logits, torch.cat(ids, -1), k if partial else 0)
        self.nll: Tensor = -logp[:, 0]
        self.other: Tensor | None = logp[:, 1] if runner_up else None
        self.known: Tensor | None = logp[:, -k:] if k else None
        self.rest: Tensor | None = rest if k and partial else None


@dataclass(frozen=True)
class Labelled:
    """The labelled tokens of a batch, all rows concatenated: n tokens. Prompts and padding are not in it.

    Attributes:
        values: [n], what the objective's `per_token` made of each token's logits.
        high: [n] bool, whether the token is a high-entropy (structural) one.
        row: [n] long, the row of each token, 0 to `rows` - 1. A run always gives it; None in tests alone.
        rows: number of rows.
        base_logp: [n] log-probability of each label under the frozen base, or None unless declared.
        alternative: the same rows with other answers or labels, if the objective declared `alternative`; the values are
            negative log-likelihoods.
        hidden: hidden states of all real tokens, prompts included, if the objective declared a `depth`.
        asked: [n] bool, whether the token stands in its row's prompt as well; of forget rows, if the objective declared it.
    """

    values: Tensor
    high: Tensor
    row: Tensor | None = None
    rows: int = 0
    base_logp: Tensor | None = None
    alternative: Labelled | None = None
    hidden: Hidden | None = None
    asked: Tensor | None = None

    def mean(self, only_low: bool = False) -> Tensor:
        """Return the mean of the values, over low-entropy tokens only if asked for."""
        return mean_or_zero(self.values[~self.high] if only_low else self.values)

    def row_sums(self, values: Tensor) -> Tensor:
        """Sum `values` [n] over the tokens of each row, [rows]."""
        assert self.row is not None
        return values.new_zeros(self.rows).index_add(0, self.row, values)


def wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def mean_or_zero(values: Tensor) -> Tensor:
    """Average `values` [n]; for n = 0 return a zero that still carries a graph (a batch without such tokens).

    Under several processes (`alter.core.processes`) it is this one's share of the mean over all: the sum here over the count
    everywhere. All of them must call it.
    """
    return values.sum() / processes.count(values.numel(), values)


def row_means(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Average `values` [n] over the tokens of each row, [rows]; 0 for a row without tokens."""
    total = values.new_zeros(rows).index_add(0, row, values)
    count = values.new_zeros(rows).index_add(0, row, torch.ones_like(values))
    return total / count.clamp_min(1.0)


def place_in_row(row: Tensor) -> Tensor:
    """Return [n], the number of each labelled token in its row, from 0; tokens of a row lie together, in order."""
    return torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)


def true_and_runner_up(emitted: Emitted) -> tuple[Tensor, Tensor]:
    """Return the probability of the label, and the largest probability of any other token, [n] each."""
    assert emitted.other is not None
    return (-emitted.nll).exp(), emitted.other.exp()


def divergence(target: Tensor, emitted: Emitted) -> Tensor:
    """Compute KL(target || model) at each position over the reference's k tokens and one bucket for all others.

    Merging the others into one bucket can only lower the divergence, and with k = V it is the exact one.

    Args:
        target: [n, k] log-probabilities of the reference's tokens; -inf rules one out.
        emitted: what the model gives for the same tokens.

    Returns:
        [n] in nats, at least 0 up to rounding; 0 where the target is all -inf.
    """
    assert emitted.known is not None
    target = target.to(emitted.known.dtype)
    finite = torch.isfinite(target)
    p = target.exp()
    inside = torch.where(finite, p * (target.masked_fill(~finite, 0.0) - emitted.known), torch.zeros_like(p)).sum(-1)
    if emitted.rest is None:
        return inside
    tail = (1 - p.sum(-1)).clamp_min(0.0)
    outside = torch.where(tail > 1e-6, tail * (tail.clamp_min(1e-6).log() - emitted.rest), torch.zeros_like(tail))
    return torch.where(finite.any(-1), inside + outside, torch.zeros_like(inside))


def soft_cross_entropy(target: Tensor, emitted: Emitted) -> Tensor:
    """Compute H(target, model) at each position, over the reference's k tokens and one bucket for all others.

    Args:
        target: [n, k] log-probabilities of the reference's tokens; -inf rules one out.
        emitted: what the model gives for the same tokens.

    Returns:
        [n] in nats: the divergence plus the target's own entropy, which has no gradient.
    """
    value = divergence(target, emitted)
    target = target.to(value.dtype)
    p = target.exp()
    entropy = -torch.where(p > 0, p * target.masked_fill(p == 0, 0.0), torch.zeros_like(p)).sum(-1)
    if emitted.rest is not None:
        tail = (1 - p.sum(-1)).clamp_min(0.0)
        entropy = entropy - torch.where(tail > 1e-6, tail * tail.clamp_min(1e-6).log(), torch.zeros_like(tail))
    return value + entropy
