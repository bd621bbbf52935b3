"""The routes of a forward pass: given by the caller, found by the frozen base, or remembered by a generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alter.adapter.decoding import decode, extend
from alter.adapter.frozen import read_frozen, run_frozen
from alter.adapter.generation import Continuation, DecodeState
from alter.adapter.inputs import (
    SharedRows,
    cached_tokens,
    frozen_inputs,
    model_logits,
    parameter_names,
    sequence_starts,
    token_mask,
)
from alter.adapter.routing import (
    INFINITE,
    UNKNOWN_ENTROPY,
    History,
    Routing,
    entropy_sides,
    expert_gates,
    previous_real,
    route_tokens,
    take_previous,
)
from alter.adapter.state import ForwardState, OwnRoutes, RoutingContext
from alter.core import UserError, cache_given, cache_of
from alter.logits import chunk_rows, entropy_from_logits

UNKNOWN_CACHE = (
    "These past_key_values come from a forward pass without the active ALTER adapter, so the routes of their tokens are "
    "unknown. Leave past_key_values out, or fill them with the adapter switched on."
)


def given_routes(context: RoutingContext, given: Routing | Mapping[str, Routing]) -> dict[str, Routing]:
    """Return the caller's route of each adapter, after checking that no active one lacks its own.

    Raises:
        UserError: an active adapter has no route, or one is no `Routing` or of another number of experts.
    """
    names = context.active()
    routing = dict(given) if isinstance(given, Mapping) else dict.fromkeys(names, given)
    missing = [name for name in context.routed() if name not in routing]
    if missing:
        raise UserError(
            f"alter_routing holds no route for the active adapter {missing[0]!r}; it names "
            f"{', '.join(map(repr, routing)) or 'none'}. Give one Routing per active adapter."
        )
    for name, route in routing.items():
        if not isinstance(route, Routing):
            raise UserError(
                f"alter_routing for adapter {name!r} is a {type(route).__name__}; expected an "
                "alter.adapter.routing.Routing, or a mapping from adapter names to them."
            )
        experts = context.anchors[name].alter_experts[name] if name in context.anchors else route.gates.shape[-1]
        if route.gates.shape[-1] != experts:
            raise UserError(
                f"The routing given for adapter {name!r} has {route.gates.shape[-1]} experts per token; the adapter has "
                f"{experts} (the retention expert and {experts - 1} forget experts)."
            )
    return routing


def routes_of(
    context: RoutingContext,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shared: SharedRows | None = None,
) -> ForwardState:
    """Return the state of a forward pass with the routes of all its tokens: remembered, or found by the frozen base.

    Args:
        context: of the model.
        module: the model.
        args, kwargs: of the pass.
        shared: the rows, if its tokens are those of several, each once.

    Raises:
        UserError: the routes of cached tokens are unknown, or the model's tokens cannot be routed.
    """
    names = context.routed()
    inputs = _named(module, args, kwargs)
    cache = cache_given(inputs)
    decoding = None if cache is None else DecodeState.of(cache)
    if not names:
        if decoding is not None:
            decoding.stale = "it went through a forward pass with the adapter switched off"
        return ForwardState()
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(module, PreTrainedModel) or not isinstance(tokens, Tensor):
        return _route_each(context, module, args, kwargs, names)
    if "write_index" in inputs:
        raise UserError(
            "ALTER cannot follow continuous batching (generate_batch), which packs tokens of several requests into one "
            "row. Use generate() on padded batches, or router='static'."
        )
    if getattr(module.config, "is_encoder_decoder", False):
        raise UserError(
            f"router={context.configs[names[0]].router!r} needs a decoder-only model: in an encoder-decoder model "
            f"({type(module).__name__}) the layers of encoder and decoder see different tokens. Use router='static'."
        )
    batch, length = tokens.shape[:2]
    history = None if decoding is None else decoding.history
    cached = 0 if cache is None else cached_tokens(cache, history.length if history else 0)
    if _routes_itself(context, module, names) and not (decoding is not None and decoding.gates):
        mask = token_mask(inputs.get("attention_mask"), batch, length, tokens.device, cached)
        return _trunk(context, names[0], inputs, mask, decoding, cached, shared)
    mask = token_mask(inputs.get("attention_mask"), batch, length, tokens.device)
    observe = not isinstance(inputs.get("logits_to_keep"), Tensor)
    if decoding is not None and decoding.gates:
        return decode(context, decoding, names, mask, observe)
    if cached > 0:
        raise UserError(UNKNOWN_CACHE)
    ids = inputs.get("input_ids")
    if context.session is not None and cache is None and context.session.ids is not None:
        return extend(context, names, ids, mask, observe)
    return _prompt(context, module, inputs, names, ids, mask, observe, shared)


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    return {**dict(zip(parameter_names(module), args, strict=False)), **kwargs}


def _routes_itself(context: RoutingContext, module: nn.Module, names: list[str]) -> bool:
    """Tell whether a pass can route its own tokens: nothing below the router's layer differs from the base.

    While training the base may have dropout, and gradients for the router come from a pass of the frozen base alone.
    """
    if module.training or context.active() != names or len(names) != 1 or not context.configs[names[0]].one_pass:
        return False
    return not (torch.is_grad_enabled() and context.anchors[names[0]].alter_router[names[0]].weight.requires_grad)


def _trunk(
    context: RoutingContext,
    name: str,
    inputs: dict[str, Any],
    mask: Tensor,
    decoding: DecodeState | None,
    cached: int,
    shared: SharedRows | None,
) -> ForwardState:
    """Return the state of a pass that routes its own tokens, with the evidence of those in the cache."""
    past = None if decoding is None else decoding.history
    if decoding is not None and decoding.stale is not None:
        raise UserError(
            f"ALTER lost track of these past_key_values: {decoding.stale}. Leave past_key_values out, so that the whole "
            "sequence is routed again."
        )
    if (past is None and cached > 0) or (past is not None and past.name != name):
        raise UserError(UNKNOWN_CACHE)
    if past is not None and (past.rows, past.length) != (len(mask), cached):
        raise UserError(
            f"These past_key_values hold {cached} tokens for {len(mask)} rows, but ALTER knows the routes of "
            f"{past.length} tokens of {past.rows} rows: use the cache's own crop, batch_repeat_interleave or "
            "batch_select_indices to change it."
        )
    starts = None
    if shared is None:
        starts = sequence_starts(inputs, mask)
    else:
        mask = shared.mask
    starts = torch.zeros_like(mask) if starts is None else starts
    trunk = OwnRoutes(name, context.anchors[name], context.configs[name], mask, starts, past, shared=shared)
    return ForwardState(trunk=trunk, names=(name,), silent={} if decoding is None else dict(decoding.silent))


def keep_evidence(state: ForwardState, output: Any) -> None:
    """Store the evidence of a pass that routed its own tokens on the cache in its output."""
    cache, trunk = cache_of(output), state.trunk
    if cache is None or trunk is None or trunk.own is None:
        return
    decoding = DecodeState.attach(cache)
    history = History(trunk.name) if trunk.past is None else trunk.past
    decoding.history, decoding.silent, decoding.stale = history.then(trunk.own), state.silent, None


def _prompt(
    context: RoutingContext,
    module: PreTrainedModel,
    inputs: dict[str, Any],
    names: list[str],
    ids: Tensor | None,
    mask: Tensor,
    observe: bool,
    shared: SharedRows | None,
) -> ForwardState:
    """Route whole rows by one pass of the frozen base without gradients."""
    frozen = ForwardState(frozen=True, grad=torch.is_grad_enabled(), names=tuple(names))
    orders = {context.configs[name].entropy_q for name in names}
    emitted = _emitted_entropies(context, module, inputs, frozen, mask, orders)
    if frozen.grad:
        _check_sharding(context, names)
    starts = sequence_starts(inputs, mask)
    if shared is not None:
        # what the base says of each token, in row order
        mask, starts = shared.mask, None
        emitted = {q: shared.spread(values) for q, values in emitted.items()}
        for read in (frozen.router_logits, frozen.probe_logits):
            read.update({name: shared.spread(values) for name, values in read.items()})
    previous = previous_real(mask, starts)
    routing, past = {}, {}
    for name in names:
        config = context.configs[name]
        entropy = _token_entropy(emitted.get(config.entropy_q), previous)
        raw = _router_logits(context, name, frozen, entropy, previous)
        if config.probed:
            # as a pass that routes its own tokens does
            own = previous.to(entropy.device)
            entropy = entropy_sides(
                take_previous(frozen.probe_logits[name][..., 0].to(own.device), own, 0.0), own >= 0
            )
        gates, last = route_tokens(raw, entropy, mask.to(entropy.device), config)
        routing[name], past[name] = Routing(gates if shared is None else shared.once(gates)), last.detach()
    observe = observe and bool(emitted) and shared is None
    continuation = Continuation(mask, past, ids) if observe else None
    return ForwardState(routing=routing, observe=observe, names=tuple(names), continuation=continuation)


def _check_sharding(context: RoutingContext, names: list[str]) -> None:
    """Refuse a trainable router under FSDP2: its gradient would be lost in a pass without hooks on its block."""
    for name in names:
        router = context.anchors[name].alter_router[name]
        sharded = type(router.weight).__name__ == "DTensor" and not hasattr(router, "unshard")
        if sharded and router.weight.requires_grad:
            raise UserError(
                f"The router of adapter {name!r} trains inside an FSDP unit that is not its own, where its gradient would "
                "be lost. Wrap it with fully_shard() too (PEFT's own wrapping policy does), or freeze it with "
                "requires_grad_(False) and pass alter_routing."
            )


def _emitted_entropies(
    context: RoutingContext,
    module: PreTrainedModel,
    inputs: dict[str, Any],
    frozen: ForwardState,
    mask: Tensor,
    orders: set[float],
) -> dict[float, Tensor]:
    """Run the frozen base; return the entropies [B, T] of its distributions by order, empty if it emits none.

    The logits of a long batch never exist at once: the head takes so many positions at a time as `chunk_rows` says.
    """
    given = frozen_inputs(module, inputs)
    at_once = (
        chunk_rows(module.config.get_text_config().vocab_size) if module.get_output_embeddings() is not None else 0
    )
    if mask.numel() <= at_once or not at_once or module.get_decoder() is module:
        logits = model_logits(module, run_frozen(context, module, (), given, frozen))
        return {} if logits is None else {q: entropy_from_logits(logits, q) for q in orders}
    states, logits_of = read_frozen(context, module, given, frozen)
    real = mask.to(states.device)
    emitted = {q: torch.zeros(mask.shape, device=states.device) for q in orders}
    for chunk in real.nonzero().split(at_once):
        row, column = chunk.unbind(1)
        logits = logits_of(states[row, column])
        for q in orders:
            emitted[q][row, column] = entropy_from_logits(logits, q).to(emitted[q])
    return emitted


def _token_entropy(emitted: Tensor | None, previous: Tensor) -> Tensor:
    """Shift the entropies [B, T] of emitted distributions to the tokens they generated; +inf where nothing did."""
    if emitted is None:
        unknown = torch.full(previous.shape, UNKNOWN_ENTROPY, device=previous.device)
        return torch.where(previous >= 0, unknown, INFINITE)
    return take_previous(emitted, previous.to(emitted.device), INFINITE)


def _router_logits(
    context: RoutingContext, name: str, frozen: ForwardState, entropy: Tensor, previous: Tensor
) -> Tensor:
    if context.configs[name].router == "entropy":
        return context.entropy_gate(name, entropy)
    raw = frozen.router_logits.get(name)
    if raw is None or raw.shape[:2] != entropy.shape:
        layer = context.anchors[name].layer_name
        seen = "nothing" if raw is None else f"shape {list(raw.shape[:2])}"
        raise UserError(
            f"The router of adapter {name!r} reads layer {layer!r}, which saw {seen} for tokens of shape "
            f"{list(entropy.shape)}. Choose another `router_layer`, whose input holds every token in order."
        )
    return take_previous(raw, previous.to(raw.device), 0.0).to(entropy.device)


def _route_each(
    context: RoutingContext, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]
) -> ForwardState:
    """Route each row of the host's input by itself, as a high-entropy one, in models without tokens in a row."""
    frozen = ForwardState(frozen=True, grad=torch.is_grad_enabled(), names=tuple(names))
    if isinstance(module, PreTrainedModel):
        args, kwargs = (), frozen_inputs(module, _named(module, args, kwargs))
    run_frozen(context, module, args, kwargs, frozen)
    routing = {}
    for name in names:
        config = context.configs[name]
        raw = frozen.router_logits.get(name)
        if raw is None:
            raise UserError(
                f"router={config.router!r} of adapter {name!r} finds nothing to read in {type(module).__name__}: "
                + (
                    "it reads token entropies, which only language models have."
                    if config.router == "entropy"
                    else f"layer {context.anchors[name].layer_name!r} did not run."
                )
                + " Use router='learned' on a layer that runs, or router='static'."
            )
        high = torch.ones(raw.shape[:-1], dtype=torch.bool, device=raw.device)
        routing[name] = Routing(expert_gates(raw, high, config))
    return ForwardState(routing=routing)
