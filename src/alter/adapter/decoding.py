"""The routes of tokens that are generated: each is found by the step before, on a key-value cache or in a session without one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alter.adapter.generation import Continuation, DecodeState
from alter.adapter.inputs import output_logits
from alter.adapter.routing import Routing, next_gates
from alter.adapter.state import ForwardState, RoutingContext
from alter.core import UserError, cache_of
from alter.logits import entropy_from_logits


def decode(
    context: RoutingContext, decoding: DecodeState, names: list[str], mask: Tensor, observe: bool
) -> ForwardState:
    """Return the state of a pass that adds one token to a cache, with the route that the step before has found.

    Raises:
        UserError: the routes of the cache's tokens are not known, or the tokens are not one for each of its rows.
    """
    batch, length = mask.shape
    if decoding.stale is not None:
        raise UserError(
            f"ALTER lost track of these past_key_values: {decoding.stale}. Leave past_key_values out, so that the whole "
            "sequence is routed again; in generate(), do without assistant_model and prompt_lookup_num_tokens."
        )
    if length != 1:
        raise UserError(
            f"ALTER follows a cache one token at a time, but this forward pass adds {length} tokens to a non-empty one: "
            "the frozen base has not seen them. Leave past_key_values out, or, in generate(), do without "
            "prefill_chunk_size, assistant_model and prompt_lookup_num_tokens."
        )
    for name in names:
        if name not in decoding.gates:
            raise UserError(
                f"These past_key_values were filled while adapter {name!r} was not active; leave past_key_values out."
            )
        if len(decoding.gates[name]) != batch:
            raise UserError(
                f"These past_key_values hold routes for {len(decoding.gates[name])} rows, but the batch has {batch}: use "
                "the cache's own batch_repeat_interleave or batch_select_indices to change its rows."
            )
    state = ForwardState(
        routing={name: Routing(decoding.gates[name].unsqueeze(1)) for name in names},
        observe=observe,
        names=tuple(names),
        silent=dict(decoding.silent),
    )
    if observe:
        state.continuation = Continuation(mask, {name: decoding.past[name] for name in names})
    return state


def extend(context: RoutingContext, names: list[str], ids: Tensor | None, mask: Tensor, observe: bool) -> ForwardState:
    """Return the state of a pass over whole rows of a generation without a cache, each one token longer than before.

    Raises:
        UserError: a row is not one of the step before with one more token.
    """
    session = context.session
    assert session is not None
    if ids is None:
        raise UserError("ALTER generates without a cache from input_ids only; pass them, or use_cache=True.")
    rows = session.rows(ids, mask)
    routing, past = {}, {}
    for name in names:
        gates = torch.cat([session.gates[name][rows], session.next[name][rows].unsqueeze(1)], 1)
        routing[name] = Routing(gates)
        past[name] = session.past[name][rows]
    continuation = Continuation(mask, past, ids) if observe else None
    return ForwardState(routing=routing, observe=observe, names=tuple(names), continuation=continuation)


@torch.no_grad()
def route_next(context: RoutingContext, state: ForwardState, output: Any) -> None:
    """Route the token that a forward pass generates, and store its evidence on the cache in `output` or on the session."""
    going = state.continuation
    assert going is not None
    cache = cache_of(output)
    session = context.session if cache is None else None
    if cache is None and session is None:
        return
    logits = output_logits(output)
    if logits is None:
        return
    mask = going.mask[:, -1]
    gates: dict[str, Tensor] = {}
    past: dict[str, Tensor] = {}
    for name in state.names:
        config = context.configs[name]
        entropy = entropy_from_logits(logits[:, -1], config.entropy_q)
        if config.router == "entropy":
            raw = context.entropy_gate(name, entropy)
        else:
            raw = state.router_logits[name].to(entropy.device)
        gates[name], past[name] = next_gates(
            raw, entropy, mask.to(entropy.device), going.past[name].to(entropy.device), config
        )
    if cache is not None:
        decoding = DecodeState.attach(cache)
        decoding.gates, decoding.past, decoding.silent, decoding.stale = gates, past, state.silent, None
    elif session is not None and going.ids is not None:
        session.ids, session.mask = going.ids, going.mask
        session.gates = {name: state.routing[name].gates.detach() for name in state.names}
        session.next, session.past = gates, past
