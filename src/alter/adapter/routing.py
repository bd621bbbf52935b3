"""Which experts each token takes: computed once per token for the whole network, shared by all layers.

Convention: what belongs to token t comes from the step that *generated* it. The entropy of token t is that of the
distribution emitted at the previous real token, and the router reads the hidden state there. So a route is causal, is
known when the token enters the network, and during generation is a by-product of the step that chose the token.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from alter.entropy import entropy_from_logits
from alter.errors import UserError

if TYPE_CHECKING:
    from alter.adapter.config import AlterConfig
    from alter.adapter.layer import AlterLinear

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
    """What the frozen base knows about each token, see the convention at the top of this module.

    Attributes:
        entropy: [B, T] fp32, of the distribution that generated each token; +inf where nothing generated it (the first
            real token of a row) and on padding.
        features: [B, T, D], what the router reads for each token: the host layer's input at the previous real token;
            zeros where there is none. None if no adapter has a router on a layer.
        logits: [B, T, V] of the frozen base, *not* shifted: `logits[:, t]` predicts token t + 1.
    """

    entropy: Tensor
    features: Tensor | None
    logits: Tensor


# Pure functions: evidence -> gates


def previous_real(mask: Tensor, starts: Tensor | None = None) -> Tensor:
    """[B, T] index of the last real token before each real one in its row; -1 where there is none, and on padding.

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
    """values [B, T, ...] at the positions `previous` [B, T]; `fill` where it is -1."""
    index = previous.clamp(min=0)
    known = previous >= 0
    for _ in range(values.dim() - 2):
        index, known = index.unsqueeze(-1), known.unsqueeze(-1)
    return torch.where(known, values.gather(1, index.expand_as(values)), fill)


def accumulate(values: Tensor, evidence: Tensor, reset: Tensor, memory: float) -> Tensor:
    """Discounted sums over the past: s_t = memory * s_{t-1} + values_t where there is evidence, else s_{t-1}.

    Args:
        values: [B, T, D].
        evidence: [B, T] bool, tokens that contribute.
        reset: [B, T] bool, tokens before which everything is forgotten (their own evidence counts).
        memory: in [0, 1].

    Returns:
        [B, T, D + 1]: the sums, and in the last place the sum of the weights. O(log T) parallel steps.
    """
    total = torch.cat([values, torch.ones_like(values[..., :1])], -1)
    total = torch.where(evidence.unsqueeze(-1), total, 0.0)
    if memory == 0 or values.shape[1] == 1:
        return total
    keep = torch.where(evidence, memory, 1.0).to(total.dtype)
    keep = torch.where(reset, 0.0, keep).unsqueeze(-1)
    step = 1
    while step < total.shape[1]:
        # Hillis-Steele scan of the linear recurrence
        earlier = torch.cat([torch.zeros_like(total[:, :step]), total[:, :-step]], 1)
        total = total + keep * earlier
        keep = keep * torch.cat([torch.zeros_like(keep[:, :step]), keep[:, :-step]], 1)
        step *= 2
    return total


def pool(values: Tensor, evidence: Tensor, memory: float) -> Tensor:
    """Mean of each row's past and present values with weights memory^k, k tokens back; zeros before any evidence.

    Args:
        values: [B, T, D].
        evidence: [B, T], true where a token contributes; the others keep the mean they found.
        memory: in [0, 1]; 0 returns the values themselves, and zeros where there is no evidence.
    """
    known = evidence.bool()
    total = accumulate(values, known, torch.zeros_like(known), memory)
    return _normalise(total)[0]


def _normalise(total: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and whether there is any evidence, from what `accumulate` returns."""
    weight = total[..., -1:]
    return total[..., :-1] / weight.clamp(min=torch.finfo(total.dtype).tiny), weight[..., 0] > 0


def expert_gates(router_logits: Tensor, high: Tensor, config: AlterConfig, evidence: Tensor | None = None) -> Tensor:
    """Weight of every expert for every token (Eqs. 7 and 9).

    High-entropy tokens (none of them without `entropy_gate`) take the retention expert with weight 1, and the `top_k` forget experts with the weights that a
    softmax over all N + 1 experts at `temperature_high` gives them. Low-entropy tokens take their best expert alone
    (temperature `temperature_low`); the gradient is that of the softmax. Tokens without evidence take the retention
    expert alone.

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
    open_share = torch.softmax(logits / config.temperature_high, dim=-1)
    forget = open_share[..., 1:]
    if config.top_k < forget.shape[-1]:
        chosen = forget.topk(config.top_k, dim=-1).indices
        forget = forget * torch.zeros_like(forget).scatter(-1, chosen, 1.0)
    several = torch.cat([torch.ones_like(open_share[..., :1]), forget], -1)
    soft = torch.softmax(logits / config.temperature_low, dim=-1)
    best = torch.zeros_like(soft).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    # exactly one-hot in the forward pass, since soft - soft is exactly 0
    single = best + (soft - soft.detach())
    gates = torch.where(high.unsqueeze(-1), several, single)
    if evidence is not None:
        gates = torch.where(evidence.unsqueeze(-1), gates, retention_alone(gates))
    if config.retention_expert:
        return gates
    return torch.cat([torch.zeros_like(gates[..., :1]), gates[..., 1:]], -1)


def retention_alone(like: Tensor) -> Tensor:
    """Gates of the shape of `like` [..., N + 1] that open the retention expert only."""
    alone = torch.zeros_like(like)
    alone[..., 0] = 1.0
    return alone


def route_tokens(router_logits: Tensor, entropy: Tensor, mask: Tensor, config: AlterConfig) -> tuple[Tensor, Tensor]:
    """Gates of whole rows from each token's own evidence.

    Args:
        router_logits: [B, T, N + 1], from the step that generated each token.
        entropy: [B, T], likewise; +inf where nothing generated the token.
        mask: [B, T] bool, true on real tokens.
        config: of the adapter.

    Returns:
        gates [B, T, N + 1], and the accumulated evidence after the last token [B, N + 2] for `next_gates`.
    """
    evidence = mask & (entropy != INFINITE)
    logits = router_logits if router_logits.dtype == torch.float64 else router_logits.float()
    total = accumulate(logits, evidence, mask & ~evidence, config.router_memory)
    mean, known = _normalise(total)
    return expert_gates(mean, entropy > config.threshold, config, known & evidence), total[:, -1]


def next_gates(
    router_logits: Tensor, entropy: Tensor, mask: Tensor, past: Tensor, config: AlterConfig
) -> tuple[Tensor, Tensor]:
    """One step of `route_tokens`: gates of the token that a position generates.

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
    return expert_gates(mean, entropy > config.threshold, config, known), total


# State of one forward pass


@dataclass(eq=False)
class Continuation:
    """What the end of a forward pass needs to route the token that comes next."""

    mask: Tensor
    past: dict[str, Tensor]
    ids: Tensor | None = None


@dataclass(eq=False)
class ForwardState:
    """What the layers of one forward pass share.

    Attributes:
        routing: route per adapter name.
        frozen: the layers are to be the base layers; only the host reads its input.
        observe: the host reads its input at the last position, for the next token's route.
        grad: the router's own output takes part in the graph, although the frozen pass does not.
        host: layer whose whole input is to be kept in `features`.
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
    narrow: dict[str, tuple[Routing, Tensor]] = field(default_factory=dict)

    def leave_out_closed(self) -> None:
        """Let the layers work with the experts that some token of this pass opens: the others add exactly nothing.

        Only where no gradient flows to the gates: a closed gate can have one.
        """
        for name, route in self.routing.items():
            if route.gates.requires_grad:
                continue
            opened = (route.gates != 0).flatten(0, -2).any(0).nonzero().squeeze(-1)
            if len(opened) < route.gates.shape[-1]:
                mask = None if route.expert_mask is None else route.expert_mask[..., opened]
                self.narrow[name] = Routing(route.gates[..., opened], mask, route.shared_mask), opened

    def narrowed(self, name: str) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Gates and masks of one adapter, and the experts that they are of: None stands for all."""
        route, opened = self.narrow.get(name, (self.routing[name], None))
        return route.gates, route.expert_mask, route.shared_mask, opened

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


# Generation: the state rides on the key-value cache, or on the session of one `generate` call


class DecodeState:
    """Routes of the tokens that come next, one row per row of the cache it rides on."""

    MIRRORED = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop", "reset")

    def __init__(self) -> None:
        self.gates: dict[str, Tensor] = {}
        self.past: dict[str, Tensor] = {}
        self.stale: str | None = None

    @classmethod
    def of(cls, cache: Any) -> DecodeState | None:
        """The state of a cache, or None if no ALTER forward pass has left one."""
        return getattr(cache, "_alter_state", None)

    @classmethod
    def attach(cls, cache: Any) -> DecodeState:
        """Put a state on a cache, and make the cache's batch operations act on it as well."""
        state = cls.of(cache)
        if state is None:
            state = cls()
            cache._alter_state = state
            for name in cls.MIRRORED:
                if hasattr(type(cache), name):
                    setattr(cache, name, MethodType(_MIRRORS[name], cache))
        return state

    def apply(self, operation: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor t by operation(t)."""
        for tensors in (self.gates, self.past):
            for name, value in tensors.items():
                tensors[name] = operation(value)

    def mirror(self, method: str, argument: Any) -> None:
        """Do to the routes what a method of the cache has done to the keys and values."""
        if method == "reset":
            self.gates, self.past, self.stale = {}, {}, None
        elif method == "crop":
            if int(argument) != 0:
                self.stale = "tokens were cropped from its end"
        elif method == "batch_repeat_interleave":
            self.apply(lambda t: t.repeat_interleave(argument, dim=0))
        elif isinstance(argument, Tensor):
            self.apply(lambda t: t[argument.to(t.device)])
        else:
            self.apply(lambda t: t[argument])


def _mirror(method: str) -> Callable[..., Any]:
    def mirrored(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = getattr(type(self), method)(self, *args, **kwargs)
        values = [*args, *kwargs.values()]
        self._alter_state.mirror(method, values[0] if values else None)
        return result

    mirrored.__name__ = method
    return mirrored


_MIRRORS = {name: _mirror(name) for name in DecodeState.MIRRORED}


@dataclass
class Session:
    """History of one `generate` call without a key-value cache: every token's gates, and those of the next token."""

    ids: Tensor | None = None
    mask: Tensor | None = None
    gates: dict[str, Tensor] = field(default_factory=dict)
    next: dict[str, Tensor] = field(default_factory=dict)
    past: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def _keys(ids: Tensor, mask: Tensor) -> list[bytes]:
        table = torch.stack([ids, mask.to(ids.dtype)], 1).cpu().numpy()
        return [row.tobytes() for row in table]

    def rows(self, ids: Tensor, mask: Tensor) -> Tensor:
        """For each row of `ids` [B, T + 1], the row of the history that it extends by one token.

        Raises:
            UserError: a row extends none.
        """
        assert self.ids is not None
        assert self.mask is not None
        known = {key: row for row, key in reversed(list(enumerate(self._keys(self.ids, self.mask))))}
        found = [known.get(key) for key in self._keys(ids[:, :-1], mask[:, :-1])]
        if None in found:
            raise UserError(
                "ALTER cannot follow this way of generating: a row of the batch is not a row of the previous step with one "
                "more token. Greedy search, sampling and beam search work; assisted and contrastive decoding do not."
            )
        return torch.tensor(found, device=ids.device)


@lru_cache(maxsize=64)
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def _parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a module's forward method."""
    return _names(type(module).forward)


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
            # the number of open experts differs from pass to pass, which a compiled graph could not follow
            state.leave_out_closed()
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
        return {**dict(zip(_parameters(module), args, strict=False)), **kwargs}

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

    def run_frozen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], state: ForwardState) -> Any:
        """Run the base model as it was before any adapter: no gradients, no dropout, no trained copies of modules.

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
                return module.forward(*args, **kwargs)
        finally:
            for part in training:
                part.__dict__["training"] = True
            for part in trained:
                part.__dict__["_disable_adapters"] = False
            self.state = previous

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
            decoding.gates, decoding.past, decoding.stale = gates, past, None
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


# Reading a model's inputs and outputs


def token_mask(attention_mask: Any, batch: int, length: int, device: torch.device) -> Tensor:
    """[batch, length] bool, true on real tokens, from any attention mask that transformers passes to a model.

    A mask with more columns than there are tokens covers cached ones too; the tokens are its last columns. A 4-D mask
    belongs to a fresh cache (or to one new token): a token is real if it may attend to itself.

    Raises:
        UserError: the mask has another form.
    """
    if isinstance(attention_mask, Mapping):
        attention_mask = next((value for value in attention_mask.values() if value is not None), None)
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -length:].bool().to(device)
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
        if length == 1:
            return torch.ones(batch, 1, dtype=torch.bool, device=device)
        own = attention_mask[:, 0].diagonal(dim1=-2, dim2=-1)[:, :length]
        real = own if own.dtype == torch.bool else own == 0
        return real.expand(batch, length).to(device)
    raise UserError(
        f"ALTER cannot tell padding from tokens in an attention_mask of type {type(attention_mask).__name__}"
        + (f" with {attention_mask.dim()} dimensions" if isinstance(attention_mask, Tensor) else "")
        + "; give a 2-D one, [batch, tokens] with 1 on real tokens."
    )


def sequence_starts(inputs: Mapping[str, Any], mask: Tensor) -> Tensor | None:
    """[B, T] bool, tokens at position 0, where several sequences are packed into a row; None without position_ids."""
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] != mask.shape[1]:
        return None
    return (positions == 0).expand_as(mask).to(mask.device)


NOT_FOR_FROZEN = frozenset(
    {
        "alter_routing",
        "labels",
        "past_key_values",
        "cache_params",
        "logits_to_keep",
        "num_logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_cache",
        "cache_position",
    }
)


def frozen_inputs(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a transformers model for a pass over the whole rows: no labels, no cache, all logits."""
    kwargs = {name: value for name, value in inputs.items() if name not in NOT_FOR_FROZEN}
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if isinstance(tokens, Tensor):
        length = tokens.shape[1]

        def cut(mask: Any) -> Any:
            # a mask made for a static cache has a column for every slot
            return mask[..., :length, :length] if isinstance(mask, Tensor) and mask.dim() == 4 else mask

        mask = kwargs.get("attention_mask")
        if mask is not None:
            kwargs["attention_mask"] = (
                {name: cut(value) for name, value in mask.items()} if isinstance(mask, Mapping) else cut(mask)
            )
    if "use_cache" in inputs or "use_cache" in _parameters(module):
        kwargs["use_cache"] = False
    if "return_dict" in inputs or "return_dict" in _parameters(module):
        kwargs["return_dict"] = True
    return kwargs


def output_logits(output: Any) -> Tensor | None:
    """The logits [B, T, V] of a model's output, in whatever form it comes; None if there are none."""
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple):
        logits = next((part for part in output if isinstance(part, Tensor) and part.dim() == 3), None)
    return logits if isinstance(logits, Tensor) and logits.dim() == 3 else None


def output_cache(output: Any) -> Any:
    """The key-value cache in a model's output, or None."""
    for name in ("past_key_values", "cache_params"):
        cache = getattr(output, name, None)
        if cache is not None:
            return cache
    if isinstance(output, tuple):
        return next((part for part in output if isinstance(part, Cache)), None)
    return None


def model_logits(module: nn.Module, output: Any) -> Tensor | None:
    """Next-token logits in the output of a model that has a language-model head, else None."""
    if not isinstance(module, PreTrainedModel) or module.get_output_embeddings() is None:
        return None
    return output_logits(output)
