"""Token entropies (Shannon and Tsallis) and the threshold between high and low ones: tensors in, tensors out.

Convention of the whole package: the entropy of token t is that of the distribution that *generated* it, p(. | x_<t).
The functions here work on distributions; `shift` moves the entropy of a distribution to the token it generated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from alter.core import UserError

if TYPE_CHECKING:
    from torch import Tensor

PAPER_THRESHOLD = 1.2
"""Entropy that separates high from low tokens in the paper."""
CHUNK_BYTES = 96 * 2**20
"""Size of the fp32 logits that exist at a time: at a vocabulary of 128k, those of 196 tokens."""

CACHED_BYTES = 2**20
"""Size of the fp32 logits that a CPU keeps in its caches from one operation to the next."""
LARGE_VOCABULARY = 4096
"""Tokens from which on one exponential less is worth a few operations more."""
FROM_SUMS = 1.25
"""Order from which on an entropy is computed from two sums; towards 1 they would cancel."""


def chunk_rows(vocabulary: int) -> int:
    """Return how many distributions over `vocabulary` tokens to hold in fp32 at a time."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def _entropy_rows(logits: Tensor, q: float) -> Tensor:
    """Return the entropy of softmax(logits) [n, V] along the last axis, in fp32 (fp64 for fp64 input)."""
    # not by the number of rows: a token's entropy must not depend on what else is in its batch
    large = logits.shape[-1] >= LARGE_VOCABULARY and len(logits) > 0
    if large and q >= FROM_SUMS and not (logits.requires_grad and torch.is_grad_enabled()):
        at_once = max(1, CACHED_BYTES // (4 * logits.shape[-1])) if logits.device.type == "cpu" else len(logits)
        return torch.cat([_entropy_from_sums(part, q) for part in logits.split(at_once)])
    logp = torch.log_softmax(logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32), dim=-1)
    p = logp.exp()
    if q > 1.0:
        # p^q - p as p (e^x - 1) keeps full precision for peaked distributions and as q -> 1; of a token ruled out with a
        # logit of -inf it is 0
        return -(p * torch.expm1((q - 1.0) * logp)).sum(-1) / (q - 1.0)
    # 0 log 0 = 0
    logp = logp.masked_fill(logp == -math.inf, 0.0)
    if q == 1.0:
        return -(p * logp).sum(-1)
    # the same, but where e^x is large (a tiny p) it would overflow, and there nothing cancels
    exponent = (q - 1.0) * logp
    near = p * torch.expm1(exponent.clamp(max=1.0))
    far = torch.exp(q * logp) - p
    return -torch.where(exponent > 1.0, far, near).sum(-1) / (q - 1.0)


def _entropy_from_sums(logits: Tensor, q: float) -> Tensor:
    """Compute the same entropy from two sums over the vocabulary, with one pass of exponentials; no gradient, for q well above 1.

    With e_i = exp(l_i - max l) and the likeliest token left out of the sums E = sum e_i and E_q = sum e_i^q, Z = 1 + E and
    S_q = ((Z^(q-1) - 1) + (E Z^(q-1) - E_q)) / ((q - 1) Z^q): nothing cancels, however peaked the distribution is. A token ruled
    out with a logit of -inf counts 0.
    """
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    most, place = wide.max(-1, keepdim=True)
    rest = torch.sub(wide, most).exp_().scatter_(-1, place, 0.0)
    total = rest.sum(-1)
    powers = torch.linalg.vecdot(rest, rest.sqrt() if q == 1.5 else rest ** (q - 1.0))
    above = ((q - 1.0) * total.log1p()).expm1()
    entropy: Tensor = (above + total * (1.0 + above) - powers) / ((q - 1.0) * (1.0 + above) * (1.0 + total))
    return entropy


def check_order(q: float, name: str = "entropy_q") -> None:
    """Raise `UserError`, which names the setting `name`, unless `q` is a finite number above 0."""
    if not (isinstance(q, (int, float)) and math.isfinite(q) and q > 0):
        raise UserError(
            f"`{name}` is {q!r}; the Tsallis order must be a number above 0 "
            "(1 gives Shannon, 1.5 suits a threshold of 1.2)."
        )


def entropy_from_logits(logits: Tensor, q: float = 1.0, *, rows: int | None = None) -> Tensor:
    """Compute the Tsallis entropy S_q of softmax(logits) (ALTER, Eq. 5; q = 1 is Shannon's, Eq. 3, in nats).

    Args:
        logits: [..., V], any floating dtype; -inf rules a token out.
        q: order, above 0. The limit q -> 1 is taken exactly and smoothly.
        rows: distributions handled at a time, by default as many as `chunk_rows` says; only those are held in fp32.

    Returns:
        [...] in fp32 (fp64 for fp64 logits), between 0 and `max_entropy(q, V)`.

    Raises:
        UserError: q is not above 0.
    """
    check_order(q)
    flat = logits.reshape(-1, logits.shape[-1])
    rows = rows or chunk_rows(logits.shape[-1])
    if flat.shape[0] <= rows:
        return _entropy_rows(flat, q).reshape(logits.shape[:-1])
    return torch.cat([_entropy_rows(chunk, q) for chunk in flat.split(rows)]).reshape(logits.shape[:-1])


def entropy_from_hidden(hidden: Tensor, head: Callable[[Tensor], Tensor], q: float = 1.0, *, rows: int) -> Tensor:
    """Compute the Tsallis entropy S_q of softmax(head(hidden)), with the head applied to `rows` rows at a time.

    Args:
        hidden: [..., D], what the language-model head reads.
        head: maps [n, D] to logits [n, V].
        q: order, above 0.
        rows: rows that go through the head at a time (see `chunk_rows`), so that no [..., V] tensor is ever held.

    Returns:
        [...] in fp32.

    Raises:
        UserError: q is not above 0.
    """
    check_order(q)
    flat = hidden.reshape(-1, hidden.shape[-1])
    parts = [_entropy_rows(head(chunk), q) for chunk in flat.split(rows)] if len(flat) else [flat.new_zeros(0)]
    return torch.cat(parts).reshape(hidden.shape[:-1])


def shift(entropy: Tensor, mask: Tensor | None = None) -> Tensor:
    """Move the entropy of the distribution emitted at position t to the token at t + 1, which it generated.

    Args:
        entropy: [B, T] of the distributions emitted at each position.
        mask: [B, T], true on real tokens; None if all are.

    Returns:
        [B, T]: entropy of the distribution that generated each token; +inf for the first real token of a row (nothing
        generated it, and it carries no knowledge) and for padding.
    """
    shifted = torch.full_like(entropy, math.inf)
    shifted[:, 1:] = entropy[:, :-1]
    if mask is not None:
        real = mask.bool()
        known = real.clone()
        known[:, 1:] &= real[:, :-1]
        known[:, :1] = False
        shifted = shifted.masked_fill(~known, math.inf)
    return shifted


def max_entropy(q: float, vocab_size: int) -> float:
    """Return the largest S_q over `vocab_size` outcomes, that of the uniform distribution: (1 - V^(1-q)) / (q - 1)."""
    check_order(q)
    if q == 1.0:
        return math.log(vocab_size)
    return -math.expm1((1.0 - q) * math.log(vocab_size)) / (q - 1.0)


def check_threshold(q: float, threshold: float, vocab_size: int | None) -> None:
    """Check that some token can be above `threshold` and some below, for this order and vocabulary.

    Raises:
        UserError: the threshold is not positive, or at or above the largest entropy that exists.
    """
    check_order(q)
    if not (math.isfinite(threshold) and threshold > 0):
        raise UserError(f"`entropy_threshold` is {threshold!r}; it must be above 0, since entropies are.")
    # without a vocabulary the bound is that of an infinite one
    bound = max_entropy(q, vocab_size) if vocab_size else (1.0 / (q - 1.0) if q > 1.0 else math.inf)
    if threshold >= bound:
        size = f"a vocabulary of {vocab_size}" if vocab_size else "any vocabulary"
        raise UserError(
            f"`entropy_threshold` {threshold:g} is never reached: with `entropy_q` {q:g} and {size} entropies end at "
            f"{bound:.4g}. Give a lower threshold, a lower `entropy_q`, or `entropy_quantile` instead."
        )


def threshold_from_quantile(entropies: Tensor, quantile: float) -> float:
    """Return the threshold above which a share of `1 - quantile` of the given (finite) entropies lies.

    Args:
        entropies: any shape; infinite values (first tokens, padding) are left out.
        quantile: strictly between 0 and 1; 0.7 makes the top 30 % of tokens high.

    Raises:
        UserError: the quantile is outside (0, 1), or no finite entropy is given.
    """
    if not 0.0 < quantile < 1.0:
        raise UserError(
            f"`entropy_quantile` is {quantile!r}; it must lie between 0 and 1 (0.7 makes the top 30 % high)."
        )
    finite = entropies[torch.isfinite(entropies)].flatten().double()
    if finite.numel() == 0:
        raise UserError(
            "No token has an entropy to take a quantile of: the data set is empty or all rows have one token."
        )
    ordered = finite.sort().values
    position = quantile * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    value = ordered[low] + (position - low) * (ordered[high] - ordered[low])
    # a threshold of zero would make every token high
    return max(float(value), 1e-6)
