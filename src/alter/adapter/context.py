"""The forward passes of an adapted model: before one starts its tokens are routed, and its layers read the routes here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from alter.adapter.generation import Continuation, DecodeState, Session
from alter.adapter.inputs import (
    frozen_inputs,
    model_logits,
    output_cache,
    output_logits,
    parameter_names,
    sequence_starts,
    token_mask,
)
from alter.adapter.plan import Plan, plan
from alter.adapter.routing import (
    INFINITE,
    UNKNOWN_ENTROPY,
    Routing,
    expert_gates,
    next_gates,
    previous_real,
    route_tokens,
    take_previous,
)
from alter.core.errors import UserError
from alter.logits.entropy import entropy_from_logits

if TYPE_CHECKING:
    from alter.adapter.config import AlterConfig
    from alter.adapter.layer import AlterLinear


@dataclass(eq=False)
class ForwardState:
    """What the layers of one forward pass share.

    Attributes:
        routing: route per adapter name.
        frozen: the layers are to be the base layers; only the host reads its input.
        observe: the host reads its input at the last position, for the next token's route.
        grad: the router's own output takes part in the graph, although the frozen pass does not.
        host: layer whose whole input is to be kept in `features`.
        plans: what the layers make of the routes.
        silent: adapters whose retention expert is known to be zero, or not to be.
    """

    routing: dict[str, Routing] = field(default_factory=dict)
    frozen: bool = False
    observe: bool = False
    grad: bool = False
    host: Any = None
    features: Tensor | None = None
    names: tuple[str, ...] = ()
    router_logits: dict[str, Tensor] = field(default_factory=dict)
    continuation: Continuation | None = None
    previous: ForwardState | None = None
    plans: dict[str, Plan] = field(default_factory=dict)
    silent: dict[str, bool] = field(default_factory=dict)

    def plan_of(self, name: str) -> Plan:
        """How the layers are to work out the update of one adapter."""
        # the number of open experts differs from pass to pass, which a compiled graph could not follow
        found = None if torch.compiler.is_compiling() else self.plans.get(name)
        return Plan.whole(self.routing[name]) if found is None else found

    def read_host(self, layer: AlterLinear, x: Tensor) -> None:
        """Keep what the routers on this layer say about its input at every position."""
        if self.host is layer:
            self.features = x.detach()
        self._read(layer, x, self.grad)

    def read_host_last(self, layer: AlterLinear, x: Tensor) -> None:
        """Keep what the routers on this layer say about its input at the last position."""
        self._read(layer, x[:, -1], False)

    def _read(self, layer: AlterLinear, x: Tensor, grad: bool) -> None:
        # inside the host's own forward, where FSDP has gathered its weights
        with torch.set_grad_enabled(grad):
            for name in self.names:
                if name in layer.alter_router and layer.alter_mode[name] == "learned":
                    router = layer.alter_router[name]
                    self.router_logits[name] = router(x.detach().to(router.weight.dtype))


class CapturingCheckpoint:
    """A checkpoint function whose recomputation sees the routes of its own forward pass, not those of the latest one."""

    def __init__(self, function: Callable[..., Any], context: RoutingContext) -> None:
        self.function = function
        self.context = context

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        context, state = self.context, self.context.state
        # gates that the router is to learn from are arguments: reentrant checkpointing cuts the graph at closures
        learned = [] if state is None else [n for n, r in state.routing.items() if r.gates.requires_grad]
        gates = [] if state is None else [state.routing[name].gates for name in learned]

        def with_state(*inputs: Any, **options: Any) -> Any:
            own = state
            if learned and state is not None:
                inputs, given = inputs[: -len(learned)], inputs[-len(learned) :]
                routes = {n: replace(state.routing[n], gates=g) for n, g in zip(learned, given, strict=True)}
                own = replace(state, routing={**state.routing, **routes})
            current, context.state = context.state, own
            try:
                return function(*inputs, **options)
            finally:
                context.state = current

        return self.function(with_state, *args, *gates, **kwargs)


CHECKPOINT_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")
"""Where transformers and torch's checkpoint wrapper keep the function that runs a block again in the backward pass."""


def base_modules(module: nn.Module) -> Iterator[nn.Module]:
    """All submodules but the inside of tuner layers, whose adapters are not part of the base model."""
    yield module
    for name, child in module._modules.items():
        if child is not None and (name == "base_layer" or not isinstance(module, BaseTunerLayer)):
            yield from base_modules(child)


class RoutingContext:
    """Computes the routes of a model's forward passes and holds them for its layers.

    A plain object, shared by all layers of the model and hooked to its forward pass: no parameters, nothing to save.
    """

    def __init__(self) -> None:
        self.state: ForwardState | None = None
        self.session: Session | None = None
        self.anchors: dict[str, AlterLinear] = {}
        self.configs: dict[str, AlterConfig] = {}
        self.failed = 0
        self.thread = 0

    # attaching to a model

    @classmethod
    def of(cls, model: nn.Module) -> RoutingContext:
        """The context of a model; made and hooked up if it has none."""
        context = model.__dict__.get("_alter_context")
        if context is None:
            context = cls()
            model.__dict__["_alter_context"] = context
            model.register_forward_pre_hook(context.enter, with_kwargs=True)
            model.register_forward_hook(context.exit, always_call=True)
            if hasattr(type(model), "generate"):
                model.__dict__["generate"] = MethodType(_generate, model)
        return context

    def detach(self, model: nn.Module) -> None:
        """Leave a model as it was before: no hooks, no wrapped functions, no attributes."""
        hooks: tuple[Any, ...] = (model._forward_pre_hooks, model._forward_hooks)
        for registered in hooks:
            for key, hook in list(registered.items()):
                if getattr(hook, "__self__", None) is self:
                    del registered[key]
        flags: tuple[Any, ...] = (model._forward_pre_hooks_with_kwargs, model._forward_hooks_always_called)
        for attributes in flags:
            for key in list(attributes):
                if key not in model._forward_pre_hooks and key not in model._forward_hooks:
                    del attributes[key]
        for module in model.modules():
            for name in CHECKPOINT_ATTRIBUTES:
                wrapped = module.__dict__.get(name)
                if isinstance(wrapped, CapturingCheckpoint) and wrapped.context is self:
                    setattr(module, name, wrapped.function)
        if getattr(model.__dict__.get("generate"), "__func__", None) is _generate:
            del model.__dict__["generate"]
        model.__dict__.pop("_alter_context", None)

    def active(self) -> list[str]:
        """Names of the adapters that are switched on."""
        return [
            name
            for name, layer in self.anchors.items()
            if name in layer.alter_A
            and name in layer.active_adapters
            and not layer.disable_adapters
            and not layer.merged
        ]

    def routed(self) -> list[str]:
        """Names of the active adapters whose experts are opened by a router."""
        return [name for name in self.active() if self.configs[name].routed]

    # hooks

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Route the tokens of the forward pass that is about to start."""
        try:
            self._check_alone(module)
            given = kwargs.get("alter_routing")
            if "alter_routing" in kwargs:
                kwargs = {name: value for name, value in kwargs.items() if name != "alter_routing"}
            if given is not None:
                state = ForwardState(routing=self._given(given))
            else:
                state = self._route(module, args, kwargs)
        except BaseException:
            # the exit hook is called for failed passes too, and must not end somebody else's
            self.failed += 1
            raise
        if not torch.compiler.is_compiling():
            self._plan(module, state)
            if torch.is_grad_enabled():
                self._capture_checkpoints(module)
        state.previous, self.state = self.state, state
        return args, kwargs

    def exit(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """End a forward pass, and route the token that it generates."""
        if self.failed:
            self.failed -= 1
            return
        state = self.state
        if state is None:
            return
        self.state = state.previous
        if output is not None and state.continuation is not None:
            self._continue(state, output)

    def _check_alone(self, module: nn.Module) -> None:
        if getattr(module, "_is_replica", False):
            raise UserError(
                "ALTER does not run under torch.nn.DataParallel, whose threads would share one set of routes. Use "
                "DistributedDataParallel (torchrun, accelerate), or one device."
            )
        if torch.compiler.is_compiling():
            return
        if self.state is None:
            self.thread = threading.get_ident()
        elif self.thread != threading.get_ident():
            raise UserError(
                "Two threads run a model with ALTER adapters at once, and would share one set of routes. Run one forward "
                "pass at a time, or give each thread its own copy of the model."
            )

    def _capture_checkpoints(self, module: nn.Module) -> None:
        for part in base_modules(module):
            for name in CHECKPOINT_ATTRIBUTES:
                function = part.__dict__.get(name)
                if function is not None and not isinstance(function, CapturingCheckpoint):
                    setattr(part, name, CapturingCheckpoint(function, self))

    def _plan(self, module: nn.Module, state: ForwardState) -> None:
        learning = torch.is_grad_enabled()
        pairs = not (learning or module.training)
        for name, route in state.routing.items():
            # others can change until a layer reads them, see CapturingCheckpoint
            if not route.gates.requires_grad:
                if name not in state.silent:
                    state.silent[name] = not learning and self._retention_is_zero(module, name)
                state.plans[name] = plan(route, learning=learning, pairs=pairs, silent=state.silent[name])

    def _retention_is_zero(self, module: nn.Module, name: str) -> bool:
        """Whether an adapter's retention expert adds nothing in any layer, so that its tokens are the base model's."""

        def zero(layer: AlterLinear) -> Tensor | None:
            weight, r = layer.alter_B[name].weight, layer.alter_r[name]
            # one that is sharded or not loaded yet cannot be read here
            if (
                type(weight) is not nn.Parameter
                or weight.is_meta
                or weight.shape[-1:] != (layer.alter_experts[name] * r,)
            ):
                return None
            return ~weight[:, :r].any()

        first = zero(self.anchors[name]) if name in self.anchors else None
        if first is None or not first:
            return False
        tuners = [part for part in base_modules(module) if isinstance(part, BaseTunerLayer)]
        every = [zero(part) for part in tuners if name in getattr(part, "alter_B", ())]
        return all(of is not None for of in every) and all(of.tolist() for of in every if of is not None)

    # routes

    def _given(self, given: Routing | Mapping[str, Routing]) -> dict[str, Routing]:
        names = self.active()
        routing = dict(given) if isinstance(given, Mapping) else dict.fromkeys(names, given)
        missing = [name for name in self.routed() if name not in routing]
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
            experts = self.anchors[name].alter_experts[name] if name in self.anchors else route.gates.shape[-1]
            if route.gates.shape[-1] != experts:
                raise UserError(
                    f"The routing given for adapter {name!r} has {route.gates.shape[-1]} experts per token; the adapter has "
                    f"{experts} (the retention expert and {experts - 1} forget experts)."
                )
        return routing

    def _route(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardState:
        names = self.routed()
        inputs = self._named(module, args, kwargs)
        cache = next((v for k in ("past_key_values", "cache_params") if (v := inputs.get(k)) is not None), None)
        decoding = None if cache is None else DecodeState.of(cache)
        if not names:
            if decoding is not None:
                decoding.stale = "it went through a forward pass with the adapter switched off"
            return ForwardState()
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(module, PreTrainedModel) or not isinstance(tokens, Tensor):
            return self._route_each(module, args, kwargs, names)
        if "write_index" in inputs:
            raise UserError(
                "ALTER cannot follow continuous batching (generate_batch), which packs tokens of several requests into one "
                "row. Use generate() on padded batches, or router='static'."
            )
        if getattr(module.config, "is_encoder_decoder", False):
            raise UserError(
                f"router={self.configs[names[0]].router!r} needs a decoder-only model: in an encoder-decoder model "
                f"({type(module).__name__}) the layers of encoder and decoder see different tokens. Use router='static'."
            )
        batch, length = tokens.shape[:2]
        mask = token_mask(inputs.get("attention_mask"), batch, length, tokens.device)
        observe = not isinstance(inputs.get("logits_to_keep"), Tensor)
        if decoding is not None and decoding.gates:
            return self._decode(decoding, names, mask, observe)
        if cache is not None and int(cache.get_seq_length()) > 0:
            raise UserError(
                "These past_key_values come from a forward pass without the active ALTER adapter, so the routes of their "
                "tokens are unknown. Leave past_key_values out, or fill them with the adapter switched on."
            )
        ids = inputs.get("input_ids")
        if self.session is not None and cache is None and self.session.ids is not None:
            return self._extend(names, ids, mask, observe)
        return self._prompt(module, inputs, names, ids, mask, observe)

    def _named(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if not args:
            return kwargs
        return {**dict(zip(parameter_names(module), args, strict=False)), **kwargs}

    def _decode(self, decoding: DecodeState, names: list[str], mask: Tensor, observe: bool) -> ForwardState:
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

    def _extend(self, names: list[str], ids: Tensor | None, mask: Tensor, observe: bool) -> ForwardState:
        session = self.session
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

    def _prompt(
        self,
        module: nn.Module,
        inputs: dict[str, Any],
        names: list[str],
        ids: Tensor | None,
        mask: Tensor,
        observe: bool,
    ) -> ForwardState:
        """Route whole rows by what the frozen base says about them, in one pass without gradients."""
        frozen = ForwardState(frozen=True, grad=torch.is_grad_enabled(), names=tuple(names))
        output = self.run_frozen(module, (), frozen_inputs(module, inputs), frozen)
        if frozen.grad:
            self._check_sharding(names)
        logits = model_logits(module, output)
        previous = previous_real(mask, sequence_starts(inputs, mask))
        routing, past = {}, {}
        for name in names:
            config = self.configs[name]
            entropy = self.token_entropy(logits, previous, config)
            raw = self._router_logits(name, frozen, entropy, previous)
            gates, last = route_tokens(raw, entropy, mask.to(entropy.device), config)
            routing[name], past[name] = Routing(gates), last.detach()
        observe = observe and logits is not None
        continuation = Continuation(mask, past, ids) if observe else None
        return ForwardState(routing=routing, observe=observe, names=tuple(names), continuation=continuation)

    def _check_sharding(self, names: list[str]) -> None:
        """Refuse a router whose gradient FSDP2 would drop: it was read in a pass that leaves no hooks on its block."""
        for name in names:
            router = self.anchors[name].alter_router[name]
            sharded = type(router.weight).__name__ == "DTensor" and not hasattr(router, "unshard")
            if sharded and router.weight.requires_grad:
                raise UserError(
                    f"The router of adapter {name!r} trains inside an FSDP unit that is not its own, where its gradient would "
                    "be lost. Wrap it with fully_shard() too (PEFT's own wrapping policy does), or freeze it with "
                    "requires_grad_(False) and pass alter_routing."
                )

    def token_entropy(self, logits: Tensor | None, previous: Tensor, config: AlterConfig) -> Tensor:
        """[B, T] entropy of each token from the logits [B, T, V] at every position; +inf where nothing generated it."""
        if logits is None:
            unknown = torch.full(previous.shape, UNKNOWN_ENTROPY, device=previous.device)
            return torch.where(previous >= 0, unknown, INFINITE)
        entropy = entropy_from_logits(logits, config.entropy_q)
        return take_previous(entropy, previous.to(entropy.device), INFINITE)

    def _router_logits(self, name: str, frozen: ForwardState, entropy: Tensor, previous: Tensor) -> Tensor:
        if self.configs[name].router == "entropy":
            return self.entropy_router(name, entropy)
        raw = frozen.router_logits.get(name)
        if raw is None or raw.shape[:2] != entropy.shape:
            layer = self.anchors[name].layer_name
            seen = "nothing" if raw is None else f"shape {list(raw.shape[:2])}"
            raise UserError(
                f"The router of adapter {name!r} reads layer {layer!r}, which saw {seen} for tokens of shape "
                f"{list(entropy.shape)}. Choose another router_layer, whose input holds every token in order."
            )
        return take_previous(raw, previous.to(raw.device), 0.0).to(entropy.device)

    def entropy_router(self, name: str, entropy: Tensor) -> Tensor:
        """W_g S_q + b [..., N + 1] of the literal gate (Eq. 7), for entropies [...]; tokens without one count as 0."""
        router = self.anchors[name].alter_router[name]
        finite = torch.where(entropy.abs() < UNKNOWN_ENTROPY, entropy, 0.0)
        return router(finite.unsqueeze(-1).to(device=router.weight.device, dtype=router.weight.dtype)).to(
            entropy.device
        )

    def _route_each(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]
    ) -> ForwardState:
        """Models without tokens in a row: each row of the host's input is routed by itself, as a high-entropy one."""
        frozen = ForwardState(frozen=True, grad=torch.is_grad_enabled(), names=tuple(names))
        if isinstance(module, PreTrainedModel):
            args, kwargs = (), frozen_inputs(module, self._named(module, args, kwargs))
        self.run_frozen(module, args, kwargs, frozen)
        routing = {}
        for name in names:
            config = self.configs[name]
            raw = frozen.router_logits.get(name)
            if raw is None:
                raise UserError(
                    f"router={config.router!r} of adapter {name!r} finds nothing to read in {type(module).__name__}: "
                    + (
                        "it reads token entropies, which only language models have."
                        if config.router == "entropy"
                        else f"layer {self.anchors[name].layer_name!r} did not run."
                    )
                    + " Use router='learned' on a layer that runs, or router='static'."
                )
            high = torch.ones(raw.shape[:-1], dtype=torch.bool, device=raw.device)
            routing[name] = Routing(expert_gates(raw, high, config))
        return ForwardState(routing=routing)

    # the frozen base

    @contextmanager
    def frozen_base(self, module: nn.Module, state: ForwardState) -> Iterator[None]:
        """Within the block the model is as before any adapter: no gradients, no dropout, no trained copies of modules.

        Flips flags only; `requires_grad` and the adapters' own switches stay as they are.
        """
        parts = list(base_modules(module))
        training = [part for part in parts if part.training]
        trained = [part for part in parts if isinstance(part, AuxiliaryTrainingWrapper) and not part.disable_adapters]
        previous, self.state = self.state, state
        try:
            for part in training:
                part.__dict__["training"] = False
            for part in trained:
                part.__dict__["_disable_adapters"] = True
            with torch.no_grad():
                yield
        finally:
            for part in training:
                part.__dict__["training"] = True
            for part in trained:
                part.__dict__["_disable_adapters"] = False
            self.state = previous

    def run_frozen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], state: ForwardState) -> Any:
        """Run the base model as it was before any adapter."""
        with self.frozen_base(module, state):
            return module.forward(*args, **kwargs)

    # the token that comes next

    @torch.no_grad()
    def _continue(self, state: ForwardState, output: Any) -> None:
        going = state.continuation
        assert going is not None
        cache = output_cache(output)
        session = self.session if cache is None else None
        if cache is None and session is None:
            return
        logits = output_logits(output)
        if logits is None:
            return
        mask = going.mask[:, -1]
        gates: dict[str, Tensor] = {}
        past: dict[str, Tensor] = {}
        for name in state.names:
            config = self.configs[name]
            entropy = entropy_from_logits(logits[:, -1], config.entropy_q)
            if config.router == "entropy":
                raw = self.entropy_router(name, entropy)
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


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' `generate`, remembering every token's route while it runs."""
    context: RoutingContext = self._alter_context
    previous, context.session = context.session, Session()
    try:
        return type(self).generate(self, *args, **kwargs)
    finally:
        context.session = previous
