"""The frozen base's view of tokens outside a forward pass: their entropies, router features, and gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alter.adapter.config import AlterConfig
from alter.adapter.frozen import read_frozen
from alter.adapter.inputs import SharedRows, frozen_inputs, sequence_starts, token_mask
from alter.adapter.routing import INFINITE, Trace, entropy_sides, previous_real, route_tokens, take_previous
from alter.adapter.state import ForwardState, RoutingContext
from alter.core import UserError
from alter.logits import chunk_rows, entropy_from_hidden


def trace_base(
    context: RoutingContext,
    model: nn.Module,
    name: str,
    config: AlterConfig,
    inputs: dict[str, Tensor],
    shared: SharedRows | None = None,
) -> Trace:
    """Run the frozen base once; see `AlterModel.trace`.

    Args:
        context: of the adapted model.
        model: the adapted model.
        name: adapter whose router layer is read.
        config: of that adapter.
        inputs: `input_ids` and, where given, `attention_mask` and `position_ids`, all [B, T].
        shared: the rows, if the tokens are those of several, each once; entropy and features are then of the rows.

    Raises:
        UserError: the model has no language-model head.
    """
    host = context.anchors[name] if config.router == "learned" else None
    state = ForwardState(frozen=True, host=host)
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise UserError(f"{type(model).__name__} gives no next-token logits, so its tokens have no entropy.")
    states, logits = read_frozen(context, model, frozen_inputs(model, inputs), state)
    rows, length = inputs["input_ids"].shape
    mask = token_mask(inputs.get("attention_mask"), rows, length, states.device)
    if shared is None:
        previous = previous_real(mask, sequence_starts(inputs, mask))
    else:
        previous = previous_real(shared.mask)
    features = state.features
    if features is not None:
        features = features if shared is None else shared.spread(features)
        features = take_previous(features, previous.to(features.device), 0.0)
    at_once = chunk_rows(model.config.get_text_config().vocab_size)
    emitted = torch.zeros(mask.shape, device=states.device)
    emitted[mask] = entropy_from_hidden(states[mask], logits, config.entropy_q, rows=at_once).to(emitted)
    emitted = emitted if shared is None else shared.spread(emitted)
    entropy = take_previous(emitted, previous.to(states.device), INFINITE)
    return Trace(entropy, features, states, logits)


def gates_of(
    context: RoutingContext,
    name: str,
    config: AlterConfig,
    entropy: Tensor,
    features: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Compute the gates [B, T, N + 1] of traced tokens; see `AlterModel.route`.

    Raises:
        UserError: the adapter weighs its experts in every layer, or routes by features and none are given.
    """
    real = torch.ones_like(entropy, dtype=torch.bool) if mask is None else mask.bool()
    if config.router == "dense":
        raise UserError("router='dense' weighs the experts in every layer: there is no route for the whole network.")
    if config.router == "static":
        return torch.ones(*entropy.shape, config.num_forget_experts + 1, device=entropy.device)
    if config.router == "entropy":
        raw = context.entropy_gate(name, entropy)
    else:
        if features is None:
            raise UserError("router='learned' routes by features; pass those that trace() returned.")
        anchor: Any = context.anchors[name]
        router = anchor.alter_router[name]
        raw = router(features.to(device=router.weight.device, dtype=router.weight.dtype)).to(entropy.device)
        if config.probed:
            probe = anchor.alter_probe[name]
            side = probe(features.to(device=probe.weight.device, dtype=probe.weight.dtype))[..., 0]
            entropy = entropy_sides(side.to(entropy.device), entropy != INFINITE)
    # a token with a predecessor has a finite entropy; see Trace
    raw = torch.where((entropy != INFINITE).unsqueeze(-1), raw, 0.0)
    return route_tokens(raw, entropy, real, config)[0]
