"""Plan once per forward pass which experts the layers compute, so that no layer synchronises with the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from alter.adapter.routing import Routing

COPY = 8
"""Cost of copying an expert's block of B, in tokens of a matmul with it."""

PAIR = 3
"""Cost of the product of one token with one expert by itself, in the same unit."""

PAIRS = 35
"""Fixed cost of launching such products, in the same unit."""

BATCHED = 1.5
"""Cost, while learning, of a product in a batched matmul where each row has experts of its own, in the same unit."""

SCATTER = 6
"""Cost of gathering a token from the batch and adding its result back, in the same unit."""

FEW_TOKENS = 64
"""Most tokens for which such products pay off where matmuls are very fast, that is, not on a CPU."""


@dataclass(eq=False)
class Products:
    """P products of a token with an expert, grouped by tokens; no other product is computed.

    Attributes:
        token: [P], places in the flattened batch.
        expert: [P].
        gate: [P].
        first: [tokens], where the pairs of each token begin.
    """

    token: Tensor
    expert: Tensor
    gate: Tensor
    first: Tensor
    _columns: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, gates: Tensor) -> Products:
        """Collect all pairs whose gate [..., N + 1] is open."""
        flat = gates.reshape(-1, gates.shape[-1])
        token, expert = flat.nonzero(as_tuple=True)
        count = torch.bincount(token, minlength=len(flat))
        return cls(token, expert, flat[token, expert], count.cumsum(0) - count)

    def product(self, z: Tensor, weight: Tensor) -> Tensor:
        """Return [tokens, out]: for each token the gated sum of its experts' B_e z, for z [..., r] and all B_e [out, (N + 1) r]."""
        r = z.shape[-1]
        if r not in self._columns:
            # shared by all layers of this rank
            places = torch.arange(r, device=z.device)
            self._columns[r] = (self.expert[:, None] * r + places).flatten(), self.first * r
        columns, first = self._columns[r]
        each = z.reshape(-1, r).index_select(0, self.token) * self.gate.to(z.dtype).unsqueeze(-1)
        return torch.nn.functional.embedding_bag(
            columns, weight.t(), first, mode="sum", per_sample_weights=each.flatten().to(weight.dtype)
        )


@dataclass(eq=False)
class Plan:
    """The computation of one adapter's update from its route; the result always equals that of all experts for all tokens.

    Attributes:
        shape: [B, T], or whatever leading shape the gates have; of a `rest` [E, m].
        experts: blocks of B that take part: None for all, a slice of neighbours, which are read in place, [K] indices, or
            [B, K] with every row's own; or `Products`, which hold the gates too.
        gates: [B, T, K], weights of those; None: there is one, and every token takes it with weight 1.
        expert_mask: [B, T, L] bool, which of those that learn do so from which token; None: all from all.
        shared_mask: [B, T, 1] bool, tokens that A learns from; None: all.
        closed: no token takes any expert, so that there is nothing to add.
        learns: the L neighbours among the K that learn from any token; None: all K. None of them only in a `rest`.
        tokens: [E m], the places in the flattened batch that a `rest` of shape [E, m] is for.
        rest: the plan for experts that few tokens take, which is to be added for those tokens.
    """

    shape: torch.Size
    experts: slice | Tensor | Products | None = None
    gates: Tensor | None = None
    expert_mask: Tensor | None = None
    shared_mask: Tensor | None = None
    closed: bool = False
    learns: slice | None = None
    tokens: Tensor | None = None
    rest: Plan | None = None
    _cast: dict[tuple[torch.device, torch.dtype], Tensor] = field(default_factory=dict)

    @classmethod
    def whole(cls, route: Routing) -> Plan:
        """Plan all experts for all tokens, whatever the gates are."""
        shared = None if route.shared_mask is None else route.shared_mask.unsqueeze(-1)
        return cls(route.gates.shape[:-1], None, route.gates, route.expert_mask, shared)

    def gates_like(self, z: Tensor) -> Tensor | None:
        """Return the gates on z's device in its precision, converted once for all layers."""
        gates = self.gates
        if gates is None or (gates.dtype == z.dtype and gates.device == z.device):
            return gates
        key = (z.device, z.dtype)
        if key not in self._cast:
            self._cast[key] = gates.to(z)
        return self._cast[key]


def _learning(experts: list[int], movable: set[int]) -> slice:
    """Return the span, in `experts`, from the first to the last that some token may train."""
    places = [i for i, expert in enumerate(experts) if expert in movable]
    return slice(places[0], places[-1] + 1) if places else slice(0)


def _part(
    gates: Tensor,
    mask: Tensor | None,
    experts: list[int],
    movable: set[int],
    shared: Tensor | None,
    rest: Plan | None = None,
) -> Plan:
    """Plan these experts for all tokens of gates and mask [..., N + 1]."""
    # those that learn come first, where the order is free
    experts = sorted(experts, key=lambda e: (e not in movable, e))
    low, high = min(experts), max(experts) + 1
    chosen: slice | Tensor = slice(low, high)
    if len(experts) == high - low:
        experts = list(range(low, high))
    else:
        chosen = torch.tensor(experts, device=gates.device)
    learns = None if mask is None else _learning(experts, movable)
    return Plan(
        gates.shape[:-1],
        None if len(experts) == gates.shape[-1] else chosen,
        gates[..., chosen],
        None if mask is None else mask[..., chosen][..., learns],
        shared,
        learns=learns,
        rest=rest,
    )


def _own(
    gates: Tensor, mask: Tensor | None, opened: list[list[int]], may: list[set[int]], shared: Tensor | None
) -> Plan:
    """Plan for row b of gates and mask [B, T, N + 1] the experts `opened[b]`, of which `may[b]` can be trained."""
    if mask is not None:
        # those that the row may move come first
        opened = [
            [*(e for e in row if e in own), *(e for e in row if e not in own)]
            for row, own in zip(opened, may, strict=True)
        ]
    # experts that a row has not opened fill up the shorter lists: their gates are zero
    width = max(map(len, opened))
    lists = [[*row, *(e for e in range(gates.shape[-1]) if e not in row)][:width] for row in opened]
    index = torch.tensor(lists, device=gates.device)
    spread = index[:, None, :].expand(*gates.shape[:2], width)
    learns = None
    if mask is not None:
        # B has a gradient in any case
        learns = slice(max(1, *(sum(e in own for e in row) for row, own in zip(opened, may, strict=True))))
        mask = mask.gather(-1, spread)[..., learns]
    return Plan(gates.shape[:-1], index, gates.gather(-1, spread), mask, shared, learns=learns)


def _rare(gates: Tensor, union: list[int]) -> tuple[float, list[int]]:
    """Return the experts of `union` that are cheapest computed for their tokens alone (gates [n, N + 1]), and the total
    cost then.
    """
    counts, order = (gates[:, union] != 0).sum(0).cpu().sort()
    few = torch.arange(1, len(union))
    # the k rarest are one batched matmul, in which each has as many tokens as the most frequent of them
    costs = (len(union) - few) * (len(gates) + COPY) + few * ((BATCHED + SCATTER) * counts[:-1] + COPY)
    cost, k = costs.min(0)
    return float(cost), [union[i] for i in order[: int(k) + 1].tolist()]


def _left(gates: Tensor, mask: Tensor | None, rare: list[int], movable: set[int]) -> Plan:
    """Plan each expert of `rare`, E in all, for the at most m tokens of gates [n, N + 1] that open it: [E, m]."""
    given = gates[:, rare].t()
    opened = given != 0
    # shorter lists are filled up by other tokens, whose gates are zero
    tokens = (~opened).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(opened.sum(1).max())]
    learns = None if mask is None or movable & set(rare) else slice(0)
    return Plan(
        tokens.shape,
        torch.tensor(rare, device=gates.device)[:, None],
        given.gather(1, tokens).unsqueeze(-1),
        None if mask is None or learns else mask[:, rare].t().gather(1, tokens).unsqueeze(-1),
        learns=learns,
        tokens=tokens.flatten(),
    )


def _opened(rows: Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """Return the experts that each row of gates [B, T, N + 1] opens, [B, ?], and each row's lowest and highest gates,
    [2 B, N + 1].
    """
    # plain lists, since a decoding step is too short for anything that must be looked up first
    least, most = (extreme.tolist() for extreme in rows.aminmax(dim=1))
    opened = [
        [e for e, (lowest, highest) in enumerate(zip(*row, strict=True)) if lowest != 0 or highest != 0]
        for row in zip(least, most, strict=True)
    ]
    return opened, [*least, *most]


def plan(route: Routing, *, learning: bool, pairs: bool = False, silent: bool = False) -> Plan:
    """Choose the cheapest of six ways to skip experts that no token opens, whose output is exactly zero.

    One expert or several neighbours are read where they lie; experts that are far apart are copied together; rows that
    each take experts of their own get a copy of theirs; experts that few tokens take are left to those tokens; or every
    token goes through its own experts one by one. So the cost depends on how many experts tokens take, and not on how many
    there are; and only experts that some token may move are learned. The gates come to the host once, or twice to learn.

    Args:
        route: of a forward pass, with gates [..., N + 1].
        learning: gradients are recorded; the weights then take part even where no token opens an expert.
        pairs: tokens may go through their experts one by one, for which each B is to lie in memory expert by expert.
        silent: the retention expert is zero in all layers and can be left out as well.
    """
    gates = route.gates
    if gates.requires_grad or not gates.numel():
        # a closed gate can have a gradient
        return Plan.whole(route)
    if silent:
        gates = torch.cat([torch.zeros_like(gates[..., :1]), gates[..., 1:]], -1)
    rows = gates if gates.dim() == 3 else gates.reshape(1, -1, gates.shape[-1])
    batch, length = rows.shape[:2]
    opened, extremes = _opened(rows)
    union = sorted(set[int]().union(*opened))
    if not union:
        if not learning:
            return Plan(gates.shape[:-1], closed=True)
        union, opened = [0], [[0]] * batch
    low, high = union[0], union[-1] + 1
    tokens = batch * length + 1
    own = max(map(len, opened))
    near = (high - low) * tokens
    several = len(union) * (tokens + COPY)
    each = own * (tokens * (BATCHED if learning else 1) + COPY * batch) if batch > 1 else several
    if pairs and (gates.device.type == "cpu" or tokens <= FEW_TOKENS):
        singly = PAIRS + PAIR * (sum(map(len, opened)) if length == 1 else int((rows != 0).sum()))
        if singly < min(near, several, each):
            return Plan(gates.shape[:-1], Products.of(gates))
    shared = None if route.shared_mask is None else route.shared_mask.unsqueeze(-1)
    mask = route.expert_mask
    moves = [] if mask is None else mask.reshape(rows.shape).any(1).tolist()
    may = [{e for e, moved in enumerate(row) if moved} for row in moves]
    # B has a gradient in any case
    movable = set[int]().union(*may) & set(union) or {low}
    if learning and len(union) > 1:
        flat = gates.flatten(0, -2)
        cost, rare = _rare(flat, union)
        if cost < min(near, several, each):
            often = [e for e in union if e not in rare]
            rest = _left(flat, None if mask is None else mask.flatten(0, -2), rare, movable)
            return _part(gates, mask, often, movable & set(often) or {often[0]}, shared, rest)
    if near <= min(several, each):
        found = _part(gates, mask, list(range(low, high)), movable, shared)
        if len(union) == 1 and all(row[low] == 1 for row in extremes):
            found.gates = None
        return found
    if several <= each:
        return _part(gates, mask, union, movable, shared)
    return _own(gates, mask, opened, may, shared)
