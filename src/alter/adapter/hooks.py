"""Hooks on an adapted model: route its tokens before a forward pass, and the next token after it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from alter.adapter.decoding import route_next
from alter.adapter.frozen import base_modules
from alter.adapter.generation import Session
from alter.adapter.inputs import SharedRows
from alter.adapter.plan import plan
from alter.adapter.routes import given_routes, keep_evidence, routes_of
from alter.adapter.state import ForwardState, Host, RoutingContext
from alter.core import UserError


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


def connect(model: nn.Module) -> RoutingContext:
    """Return the context of a model; one that has none gets it, with the hooks."""
    context: RoutingContext | None = model.__dict__.get("_alter_context")
    if context is None:
        context = RoutingContext()
        hooks = Hooks(context)
        model.__dict__["_alter_context"] = context
        model.register_forward_pre_hook(hooks.enter, with_kwargs=True)
        model.register_forward_hook(hooks.exit, always_call=True)
        if hasattr(type(model), "generate"):
            # not a bound method: those are pickled by their name, which no class of transformers has
            model.__dict__["generate"] = partial(_generate, model)
    return context


def disconnect(context: RoutingContext, model: nn.Module) -> None:
    """Undo `connect`: remove hooks, wrapped functions and attributes."""
    hooks: tuple[Any, ...] = (model._forward_pre_hooks, model._forward_hooks)
    for registered in hooks:
        for key, hook in list(registered.items()):
            if isinstance(owner := getattr(hook, "__self__", None), Hooks) and owner.context is context:
                del registered[key]
    flags: tuple[Any, ...] = (model._forward_pre_hooks_with_kwargs, model._forward_hooks_always_called)
    for attributes in flags:
        for key in list(attributes):
            if key not in model._forward_pre_hooks and key not in model._forward_hooks:
                del attributes[key]
    for module in model.modules():
        for name in CHECKPOINT_ATTRIBUTES:
            wrapped = module.__dict__.get(name)
            if isinstance(wrapped, CapturingCheckpoint) and wrapped.context is context:
                setattr(module, name, wrapped.function)
    if getattr(model.__dict__.get("generate"), "func", None) is _generate:
        del model.__dict__["generate"]
    model.__dict__.pop("_alter_context", None)


class Hooks:
    """The hooks on a model's forward pass, as bound methods, so that a copy of the model has its own."""

    def __init__(self, context: RoutingContext) -> None:
        self.context = context

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Route the tokens of the forward pass that is about to start."""
        try:
            self._check_alone(module)
            given, shared = kwargs.get("alter_routing"), kwargs.get("alter_rows")
            if "alter_routing" in kwargs or "alter_rows" in kwargs:
                kwargs = {name: value for name, value in kwargs.items() if name not in ("alter_routing", "alter_rows")}
            if given is not None:
                state = ForwardState(routing=given_routes(self.context, given))
            else:
                rows = None if shared is None else SharedRows(shared)
                state = routes_of(self.context, module, args, kwargs, rows)
        except BaseException:
            # the exit hook is called for failed passes too, and must not end somebody else's
            self.context.failed += 1
            raise
        if not torch.compiler.is_compiling():
            self._plan(module, state)
            if torch.is_grad_enabled():
                self._capture_checkpoints(module)
        state.previous, self.context.state = self.context.state, state
        return args, kwargs

    def exit(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """End a forward pass, and route the token that it generates."""
        if self.context.failed:
            self.context.failed -= 1
            return
        state = self.context.state
        if state is None:
            return
        self.context.state = state.previous
        if output is not None and state.trunk is not None:
            keep_evidence(state, output)
        if output is not None and state.continuation is not None:
            route_next(self.context, state, output)

    def _check_alone(self, module: nn.Module) -> None:
        if getattr(module, "_is_replica", False):
            raise UserError(
                "ALTER does not run under torch.nn.DataParallel, whose threads would share one set of routes. Use "
                "DistributedDataParallel (torchrun, accelerate), or one device."
            )
        if torch.compiler.is_compiling():
            return
        if self.context.state is None:
            self.context.thread = threading.get_ident()
        elif self.context.thread != threading.get_ident():
            raise UserError(
                "Two threads run a model with ALTER adapters at once, and would share one set of routes. Run one forward "
                "pass at a time, or give each thread its own copy of the model."
            )

    def _capture_checkpoints(self, module: nn.Module) -> None:
        for part in base_modules(module):
            for name in CHECKPOINT_ATTRIBUTES:
                function = part.__dict__.get(name)
                if function is not None and not isinstance(function, CapturingCheckpoint):
                    setattr(part, name, CapturingCheckpoint(function, self.context))

    def _plan(self, module: nn.Module, state: ForwardState) -> None:
        learning = torch.is_grad_enabled()
        pairs = not (learning or module.training)
        if state.trunk is not None:
            name, state.trunk.pairs = state.trunk.name, pairs
            if name not in state.silent:
                state.silent[name] = not learning and _retention_is_zero(self.context, module, name)
        for name, route in state.routing.items():
            # others can change until a layer reads them, see CapturingCheckpoint
            if not route.gates.requires_grad:
                if name not in state.silent:
                    state.silent[name] = not learning and _retention_is_zero(self.context, module, name)
                state.plans[name] = plan(route, learning=learning, pairs=pairs, silent=state.silent[name])


def _retention_is_zero(context: RoutingContext, module: nn.Module, name: str) -> bool:
    """Tell whether an adapter's retention expert is zero in all layers, so that its tokens get the base model's output."""

    def zero(layer: Host) -> Tensor | None:
        weight, r = layer.alter_B[name].weight, layer.alter_r[name]
        # one that is sharded or not loaded yet cannot be read here
        if type(weight) is not nn.Parameter or weight.is_meta or weight.shape[-1:] != (layer.alter_experts[name] * r,):
            return None
        return ~weight[:, :r].any()

    first = zero(context.anchors[name]) if name in context.anchors else None
    if first is None or not first:
        return False
    tuners = [part for part in base_modules(module) if isinstance(part, BaseTunerLayer)]
    every = [zero(part) for part in tuners if name in getattr(part, "alter_B", ())]
    return all(of is not None for of in every) and all(of.tolist() for of in every if of is not None)


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Wrap transformers' `generate` in a session that records every token's route."""
    context: RoutingContext = self._alter_context
    previous, context.session = context.session, Session()
    try:
        return type(self).generate(self, *args, **kwargs)
    finally:
        context.session = previous
