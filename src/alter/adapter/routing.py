"""Which experts each token takes: computed once per token for the whole network, shared by all layers.

Convention: what belongs to token t comes from the step that *generated* it. The entropy of token t is that of the
distribution emitted at the previous real token, and the router reads the hidden state there. So a route is causal, is
known when the token enters the network, and during generation is a by-product of the step that chose the token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from alter.adapter.config import AlterConfig

INFINITE = float("inf")
UNKNOWN_ENTROPY = torch.finfo(torch.float32).max
"""Stands for the entropy of a token of a model without a vocabulary: finite, and above every threshold."""


@dataclass
class Routing:
    """The route of every token, as a caller gives it: `model(..., alter_routing=Routing(...))`.

    Attributes:
        gates: [B, T, N + 1], weight of each expert (0 is the retention expert, d forget expert d).
        expert_mask: [B, T, N + 1] bool, which experts learn from which token; None: all from all.
        shared_mask: [B, T] bool, tokens that the shared matrix A learns from; None: all.
    """

    gates: Tensor
    expert_mask: Tensor | None = None
    shared_mask: Tensor | None = None


@dataclass
class Trace:
    """The frozen base's values for each token; see the convention at the top of this module.

    Attributes:
        entropy: [B, T] fp32, of the distribution that generated each token; +inf where nothing generated it (the first
            real token of a row) and on padding.
        features: [B, T, D], what the router reads for each token: the host layer's input at the previous real token;
            zeros where there is none. None if no adapter has a router on a layer.
        states: [B, T, D], what the frozen base's head reads, *not* shifted: `states[:, t]` predicts token t + 1.
        logits: makes the frozen base's logits [n, V] of some states [n, D].
    """

    entropy: Tensor
    features: Tensor | None
    states: Tensor
    logits: Callable[[Tensor], Tensor]


# Pure functions: evidence -> gates


def previous_real(mask: Tensor, starts: Tensor | None = None) -> Tensor:
    """Return the index [B, T] of the last real token before each real one in its row; -1 where there is none, and on padding.

    Args:
        mask: [B, T] bool, true on real tokens.
        starts: [B, T] bool, tokens that begin a new sequence within a row (packed rows); they have no predecessor.
    """
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last = torch.where(mask, positions, -1).cummax(dim=1).values
    previous = torch.cat([last.new_full((len(last), 1), -1), last[:, :-1]], dim=1)
    known = mask if starts is None else mask & ~starts
    return torch.where(known, previous, -1)


def take_previous(values: Tensor, previous: Tensor, fill: float) -> Tensor:
    """Gather values [B, T, ...] at the positions `previous` [B, T]; `fill` where it is -1."""
    index = previous.clamp(min=0)
    known = previous >= 0
    for _ in range(values.dim() - 2):
        index, known = index.unsqueeze(-1), known.unsqueeze(-1)
    return torch.where(known, values.gather(1, index.expand_as(values)), fill)


def accumulate(
    values: Tensor, evidence: Tensor, reset: Tensor, memory: float, initial: Tensor | None = None
) -> Tensor:
    """Compute discounted sums over the past: s_t = memory * s_{t-1} + values_t where there is evidence, else s_{t-1}.

    Args:
        values: [B, T, D].
        evidence: [B, T] bool, tokens that contribute.
        reset: [B, T] bool, tokens before which everything is forgotten (their own evidence counts).
        memory: in [0, 1].
        initial: [B, D + 1], the sums before the first token; zeros by default.

    Returns:
        [B, T, D + 1]: the sums, and in the last place the sum of the weights. O(log T) parallel steps.
    """
    total = torch.cat([values, torch.ones_like(values[..., :1])], -1)
    total = torch.where(evidence.unsqueeze(-1), total, 0.0)
    if initial is None and (memory == 0 or values.shape[1] == 1):
        return total
    keep = torch.where(evidence, memory, 1.0).to(total.dtype)
    keep = torch.where(reset, 0.0, keep).unsqueeze(-1)
    step = 1
    while step < total.shape[1]:
        # Hillis-Steele scan of the linear recurrence
        earlier = torch.cat([torch.zeros_like(total[:, :step]), total[:, :-step]], 1)
        total = total + keep * earlier
        keep = keep * torch.cat([torch.ones_like(keep[:, :step]), keep[:, :-step]], 1)
        step *= 2
    return total if initial is None else total + keep * initial.unsqueeze(1)


def pool(values: Tensor, evidence: Tensor, memory: float) -> Tensor:
    """Average each row's past and present values with weights memory^k, k tokens back; zeros before any evidence.

    Args:
        values: [B, T, D].
        evidence: [B, T], true where a token contributes; the others keep the mean they found.
        memory: in [0, 1]; 0 returns the values themselves, and zeros where there is no evidence.
    """
    known = evidence.bool()
    total = accumulate(values, known, torch.zeros_like(known), memory)
    return _normalise(total)[0]


def exact(logits: Tensor) -> Tensor:
    """Return router logits in a precision in which sums do not depend on their order: tokens may come at once, in
    chunks or one by one.
    """
    return logits.float() if logits.device.type == "mps" else logits.double()


def _of_gates(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _normalise(total: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and whether there is any evidence, from the result of `accumulate`."""
    weight = total[..., -1:]
    return total[..., :-1] / weight.clamp(min=torch.finfo(total.dtype).tiny), weight[..., 0] > 0


def expert_gates(router_logits: Tensor, high: Tensor, config: AlterConfig, evidence: Tensor | None = None) -> Tensor:
    """Compute the weight of every expert for every token (Eqs. 7 and 9).

    High-entropy tokens (none of them without `entropy_gate`) take the retention expert with weight 1, and the `top_k` forget
    experts with the weights that a softmax over all N + 1 experts at `temperature_high` gives them. Low-entropy tokens
    take their best expert alone (temperature `temperature_low`); the gradient is that of the softmax. Tokens without
    evidence take the retention expert alone.

    Args:
        router_logits: [..., N + 1], expert 0 is the retention expert.
        high: [...] bool.
        config: gives temperatures, `top_k`, and what is switched off (`entropy_gate`, `retention_expert`).
        evidence: [...] bool; None: all tokens have some.

    Returns:
        [..., N + 1] in fp32 (fp64 for fp64 logits).
    """
    logits = router_logits if router_logits.dtype == torch.float64 else router_logits.float()
    if not config.entropy_gate:
        high = torch.zeros_like(high)
    best = logits.argmax(-1)
    if evidence is not None:
        high, best = high & evidence, best * evidence
    open_share = torch.softmax(logits / config.temperature_high, dim=-1)
    forget = open_share[..., 1:]
    if config.top_k < forget.shape[-1]:
        chosen = forget.topk(config.top_k, dim=-1).indices
        forget = forget * torch.zeros_like(forget).scatter(-1, chosen, 1.0)
    several = torch.cat([torch.ones_like(open_share[..., :1]), forget], -1)
    single = torch.zeros_like(open_share).scatter(-1, best.unsqueeze(-1), 1.0)
    if logits.requires_grad:
        soft = torch.softmax(logits / config.temperature_low, dim=-1)
        if evidence is not None:
            soft = soft * evidence.unsqueeze(-1)
        # exactly one-hot in the forward pass, since soft - soft is exactly 0
        single = single + (soft - soft.detach())
    gates = torch.where(high.unsqueeze(-1), several, single)
    if config.retention_expert:
        return gates
    return torch.cat([torch.zeros_like(gates[..., :1]), gates[..., 1:]], -1)


def route_tokens(router_logits: Tensor, entropy: Tensor, mask: Tensor, config: AlterConfig) -> tuple[Tensor, Tensor]:
    """Compute gates of whole rows from each token's own evidence.

    Args:
        router_logits: [B, T, N + 1], from the step that generated each token.
        entropy: [B, T], likewise; +inf where nothing generated the token.
        mask: [B, T] bool, true on real tokens.
        config: of the adapter.

    Returns:
        gates [B, T, N + 1], and the accumulated evidence after the last token [B, N + 2] for `next_gates`.
    """
    evidence = mask & (entropy != INFINITE)
    total = accumulate(exact(router_logits), evidence, mask & ~evidence, config.router_memory)
    mean, known = _normalise(total)
    gates = expert_gates(mean.to(_of_gates(router_logits)), entropy > config.threshold, config, known & evidence)
    return gates, total[:, -1]


def entropy_sides(probe: Tensor, known: Tensor) -> Tensor:
    """Return stand-ins [B, T] for entropies, on the side of every threshold that a probe predicts.

    Args:
        probe: [B, T] logit that the token's entropy is above the threshold.
        known: [B, T] bool, tokens that something generated.

    Returns:
        `UNKNOWN_ENTROPY` where the logit is above 0, else 0; +inf where nothing generated the token.
    """
    side = torch.where(probe > 0, UNKNOWN_ENTROPY, 0.0)
    return torch.where(known, side, INFINITE)


@dataclass(eq=False)
class Running:
    """The routing evidence after each of T tokens of a row that routed themselves.

    Attributes:
        total: [B, T, N + 2] accumulated evidence of the sequence, see `accumulate`.
        last: [B, T, N + 1] router logits read at the last real token; with a probe its logit comes last.
        seen: [B, T] bool, whether there is one.
    """

    total: Tensor
    last: Tensor
    seen: Tensor

    def map(self, operation: Callable[[Tensor], Tensor]) -> Running:
        """Apply an operation to every tensor."""
        return Running(operation(self.total), operation(self.last), operation(self.seen))


def continue_routes(
    evidence: Tensor, mask: Tensor, starts: Tensor, past: Running | None, config: AlterConfig
) -> tuple[Tensor, Running]:
    """Route T further tokens of each row; equals `route_tokens` on the whole row however the tokens are split into calls.

    Args:
        evidence: [B, T, N + 1] router logits read *at* each token, for the one after it; with a probe its logit comes last.
        mask: [B, T] bool, true on real tokens.
        starts: [B, T] bool, tokens that begin a new sequence within a row.
        past: after the token before, T = 1; None: there is none.
        config: of the adapter.

    Returns:
        gates [B, T, N + 1], and what is known after each token.
    """
    if past is None:
        before = Running(
            exact(evidence).new_zeros(len(mask), 1, evidence.shape[-1] + (0 if config.probed else 1)),
            torch.zeros_like(evidence[:, :1]),
            torch.zeros_like(mask[:, :1]),
        )
    else:
        before = past.map(lambda t: t.to(evidence.device))
    if mask.shape[1] == 1:
        # a decoding step is too short for more operations than it needs
        read, real = before.last, before.seen
        last, seen = torch.where(mask.unsqueeze(-1), evidence, read), real | mask
    else:
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        index = torch.where(mask, places, 0).cummax(dim=1).values
        index = torch.cat([torch.zeros_like(index[:, :1]), index], 1)
        every = torch.cat([before.last, evidence], 1)
        every = every.gather(1, index.unsqueeze(-1).expand_as(every))
        reals = before.seen | (index > 0)
        read, last, real, seen = every[:, :-1], every[:, 1:], reals[:, :-1], reals[:, 1:]
    known = mask & real & ~starts
    raw, high = (read[..., :-1], read[..., -1] > 0) if config.probed else (read, torch.zeros_like(known))
    total = accumulate(exact(raw), known, mask & ~known, config.router_memory, before.total[:, 0])
    mean, some = _normalise(total)
    return expert_gates(mean.to(_of_gates(raw)), high, config, known & some), Running(total, last, seen)


class History:
    """The routing evidence after every token of the rows in a cache; appending a token costs the same after however many.

    Args:
        name: of the adapter.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.length = 0
        # of each pass, in order
        self._parts: list[Running] = []

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self._parts[-1].seen) if self._parts else 0

    @property
    def last(self) -> Running | None:
        """After the last token; None before there is one."""
        return self._parts[-1].map(lambda t: t[:, -1:]) if self._parts else None

    def then(self, new: Running) -> History:
        """Return this history with further tokens appended; the old one must not be used again."""
        self._parts.append(new)
        self.length += new.seen.shape[1]
        return self

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens alone."""
        while self._parts and self.length - (own := self._parts[-1].seen.shape[1]) >= length:
            self._parts.pop()
            self.length -= own
        if self.length > length:
            left = self._parts[-1].seen.shape[1] - (self.length - length)
            self._parts[-1] = self._parts[-1].map(lambda t: t[:, :left])
            self.length = length

    def apply(self, operation: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor t [rows, tokens, ...] by operation(t)."""
        if self._parts:
            columns = zip(*((part.total, part.last, part.seen) for part in self._parts), strict=True)
            self._parts = [Running(*(operation(torch.cat(column, 1)) for column in columns))]


def next_gates(
    router_logits: Tensor, entropy: Tensor, mask: Tensor, past: Tensor, config: AlterConfig
) -> tuple[Tensor, Tensor]:
    """Run one step of `route_tokens`: gates of the token that a position generates.

    Args:
        router_logits: [B, N + 1] read at the position.
        entropy: [B] of the distribution emitted there.
        mask: [B] bool, false where the position is padding and says nothing.
        past: [B, N + 2] accumulated evidence so far.
        config: of the adapter.

    Returns:
        gates [B, N + 1] and the accumulated evidence [B, N + 2].
    """
    logits = router_logits.to(past.dtype)
    new = config.router_memory * past + torch.cat([logits, torch.ones_like(logits[:, :1])], -1)
    total = torch.where(mask.unsqueeze(-1), new, past)
    mean, known = _normalise(total)
    return expert_gates(mean.to(_of_gates(router_logits)), entropy > config.threshold, config, known), total
