"""State that the layers of an adapted model share: the current forward pass's routes, and what generation keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from alter.adapter.generation import Continuation, Session
from alter.adapter.inputs import SharedRows
from alter.adapter.plan import Plan, plan
from alter.adapter.routing import UNKNOWN_ENTROPY, History, Routing, Running, continue_routes
from alter.core import UserError

if TYPE_CHECKING:
    from alter.adapter.config import AlterConfig


class Host(Protocol):
    """What routing reads of an adapted layer (`alter.adapter.layer.AlterLinear`), especially of one that holds a router."""

    alter_A: Any
    alter_B: Any
    alter_router: Any
    alter_probe: Any
    alter_r: dict[str, int]
    alter_experts: dict[str, int]
    alter_mode: dict[str, str]
    layer_name: str

    def takes_part(self, name: str) -> bool:
        """Tell whether the layer holds this adapter, switched on and not merged."""
        ...


@dataclass(eq=False)
class OwnRoutes:
    """Inputs of a pass that routes its own tokens, once the untouched blocks have run (see `AlterConfig.one_pass`).

    Attributes:
        name: of the adapter.
        host: layer that holds its router, the first adapted one to run.
        config: of the adapter.
        mask: [B, T] bool, true on real tokens.
        starts: [B, T] bool, tokens that begin a new sequence within a row.
        past: of the tokens in the cache.
        own: of the pass's own, once the host has run.
        pairs: see `alter.adapter.plan.plan`.
        shared: the rows, if the pass has the tokens that they share once; `mask` and `starts` are then those of the rows.
    """

    name: str
    host: Host
    config: AlterConfig
    mask: Tensor
    starts: Tensor
    past: History | None = None
    own: Running | None = None
    pairs: bool = False
    shared: SharedRows | None = None


@dataclass(eq=False)
class ForwardState:
    """State that the layers share during one forward pass.

    Attributes:
        routing: route per adapter name.
        frozen: layers run without their experts; the host only records its input.
        observe: the host records its input at the last position, for the next token's route.
        grad: record gradients for the router's output, though not for the rest of the frozen pass.
        host: layer whose input is stored, whole, in `features`.
        plans: by adapter, how the layers compute the routed update.
        silent: by adapter, whether its retention expert is zero in all layers, where that has been checked.
        probe_logits: the probes' output for the host's input, like `router_logits`.
        trunk: set in a pass that routes its own tokens (`AlterConfig.from_layer`).
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
    probe_logits: dict[str, Tensor] = field(default_factory=dict)
    trunk: OwnRoutes | None = None

    def plan_of(self, name: str) -> Plan:
        """Return how the layers compute one adapter's update, planned once per pass."""
        # the number of open experts changes from pass to pass: a graph of torch.compile runs all of them
        found = None if torch.compiler.is_compiling() else self.plans.get(name)
        return Plan.whole(self.routing[name]) if found is None else found

    def read_host(self, layer: Host, x: Tensor) -> None:
        """Store the routers' logits for this layer's input at every position."""
        if self.host is layer:
            self.features = x.detach()
        self._read(layer, x, self.grad)

    def read_host_last(self, layer: Host, x: Tensor) -> None:
        """Store the routers' logits for this layer's input at the last position."""
        self._read(layer, x[:, -1], False)

    def _read(self, layer: Host, x: Tensor, grad: bool) -> None:
        # inside the host's own forward, where FSDP has gathered its weights
        with torch.set_grad_enabled(grad):
            for name in self.names:
                if name in layer.alter_router and layer.alter_mode[name] == "learned":
                    router = layer.alter_router[name]
                    self.router_logits[name] = router(x.detach().to(router.weight.dtype))
                    if name in layer.alter_probe:
                        self.probe_logits[name] = layer.alter_probe[name](x.detach().to(router.weight.dtype))

    @torch.no_grad()
    def route_trunk(self, layer: Host, x: Tensor) -> None:
        """Route the pass's tokens by the input x [B, T, D] of the router's layer.

        Raises:
            UserError: the layer does not see every token in order.
        """
        trunk = self.trunk
        assert trunk is not None
        name = trunk.name
        rows = trunk.shared
        if x.shape[:-1] != trunk.mask.shape if rows is None else x.dim() != 3:
            raise UserError(
                f"The router of adapter {name!r} reads layer {layer.layer_name!r}, which saw shape {list(x.shape[:-1])} for "
                f"tokens of shape {list(trunk.mask.shape)}. Leave from_layer out for this model."
            )
        router = layer.alter_router[name]
        seen = x.detach().to(router.weight.dtype)
        evidence = router(seen)
        if trunk.config.probed:
            evidence = torch.cat([evidence, layer.alter_probe[name](seen)], -1)
        if evidence.dtype != torch.float64:
            evidence = evidence.float()
        if rows is not None:
            evidence = rows.spread(evidence)
        mask, starts = trunk.mask.to(x.device), trunk.starts.to(x.device)
        past = None if trunk.past is None else trunk.past.last
        gates, trunk.own = continue_routes(evidence, mask, starts, past, trunk.config)
        self.routing[name] = Routing(gates if rows is None else rows.once(gates))
        if not torch.compiler.is_compiling():
            self.plans[name] = plan(
                self.routing[name], learning=torch.is_grad_enabled(), pairs=trunk.pairs, silent=self.silent[name]
            )


class RoutingContext:
    """State that all layers of a model share: a plain object without parameters, so it is in no state dict.

    Attributes:
        state: of the forward pass that runs; None between passes.
        session: of the `generate` call that runs.
        anchors: by adapter name, the layer that holds its router.
        configs: by adapter name.
        failed: passes that raised before their own state was set.
        thread: that runs the present pass.
    """

    def __init__(self) -> None:
        self.state: ForwardState | None = None
        self.session: Session | None = None
        self.anchors: dict[str, Host] = {}
        self.configs: dict[str, AlterConfig] = {}
        self.failed = 0
        self.thread = 0

    def active(self) -> list[str]:
        """Return the names of the adapters that are switched on."""
        return [name for name, layer in self.anchors.items() if layer.takes_part(name)]

    def routed(self) -> list[str]:
        """Return the names of the active adapters whose experts are opened by a router."""
        return [name for name in self.active() if self.configs[name].routed]

    def entropy_gate(self, name: str, entropy: Tensor) -> Tensor:
        """Return W_g S_q + b [..., N + 1] of the literal gate (Eq. 7), for entropies [...]; tokens without one count as 0."""
        router = self.anchors[name].alter_router[name]
        finite = torch.where(entropy.abs() < UNKNOWN_ENTROPY, entropy, 0.0)
        gate: Tensor = router(finite.unsqueeze(-1).to(device=router.weight.device, dtype=router.weight.dtype))
        return gate.to(entropy.device)
