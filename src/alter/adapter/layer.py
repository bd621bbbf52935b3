"""The adapted linear layer: W0 x + s (B_r + sum_d g_d B_fd) A x, with gradient isolation inside its leaf modules."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alter.adapter.config import NotMergeable
from alter.adapter.masked import MaskedLinear
from alter.adapter.plan import Plan
from alter.adapter.state import ForwardState, RoutingContext
from alter.core import UserError

if TYPE_CHECKING:
    from alter.adapter.config import AlterConfig


class AlterLinear(nn.Module, BaseTunerLayer):
    """A linear layer (also transformers' Conv1D and quantised ones) with ALTER adapters, each under its own name.

    Per adapter: `alter_A.<name>` maps in -> r and is shared by all experts; `alter_B.<name>` has one weight
    [out, (N + 1) * r], whose columns `d * r : (d + 1) * r` are expert d: the retention expert for d = 0, forget expert d
    for d = 1..N (this is the checkpoint format). One layer of the network, the host, holds `alter_router.<name>`, which maps
    the router's features to N + 1 logits; with router="dense" every layer has its own, on its own input (HydraLoRA).
    """

    if TYPE_CHECKING:
        # PEFT is untyped
        def __getattr__(self, name: str) -> Any: ...

    # ModuleDicts by adapter name, of MaskedLinear, MaskedLinear and nn.Linear
    alter_A: Any
    alter_B: Any
    alter_router: Any
    alter_dropout: Any
    base_layer: Callable[..., Tensor]

    adapter_layer_names: tuple[str, ...] = ("alter_A", "alter_B", "alter_router", "alter_probe")
    other_param_names: tuple[str, ...] = (
        "alter_r",
        "alter_alpha",
        "scaling",
        "alter_dropout",
        "alter_experts",
        "alter_mode",
        "alter_bound",
        "alter_retains",
    )

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: AlterConfig,
        context: RoutingContext,
        layer_name: str,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        inner = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(
            inner, get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.fan_in_fan_out = isinstance(inner, Conv1D)
        self.in_features, self.out_features = _get_in_out_features(inner)
        self.layer_name = layer_name
        self.context = context
        self.alter_A = nn.ModuleDict({})
        self.alter_B = nn.ModuleDict({})
        self.alter_router = nn.ModuleDict({})
        self.alter_probe = nn.ModuleDict({})
        self.alter_dropout = nn.ModuleDict({})
        self.alter_r: dict[str, int] = {}
        self.alter_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.alter_experts: dict[str, int] = {}
        self.alter_mode: dict[str, str] = {}
        self.alter_bound: dict[str, tuple[str, float, float] | None] = {}
        self.alter_retains: dict[str, bool] = {}
        self.hosts = False
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: AlterConfig) -> None:
        """Create the weights of one adapter.

        Raises:
            UserError: the rank does not fit the layer.
        """
        r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), self.layer_name), config.r)
        alpha = config.alpha_pattern.get(
            get_pattern_key(config.alpha_pattern.keys(), self.layer_name), config.alter_alpha
        )
        limit = min(self.in_features, self.out_features)
        if r > limit:
            raise UserError(
                f"Rank {r} is larger than layer {self.layer_name!r} allows ({self.in_features} -> {self.out_features}): "
                f"give `r` of at most {limit}, or set `rank_pattern` for this layer, or exclude it with `exclude_modules`."
            )
        experts = config.num_forget_experts + 1
        self.alter_r[adapter_name] = r
        self.alter_alpha[adapter_name] = alpha
        self.scaling[adapter_name] = alpha / r
        self.alter_experts[adapter_name] = experts
        self.alter_mode[adapter_name] = config.router
        self.alter_retains[adapter_name] = config.retention_expert
        self.alter_bound[adapter_name] = (
            None if config.bound is None else (config.bound, config.bound_frequency, config.bound_gain)
        )
        self.alter_dropout[adapter_name] = (
            nn.Dropout(config.alter_dropout) if config.alter_dropout > 0 else nn.Identity()
        )
        self.alter_A[adapter_name] = MaskedLinear(self.in_features, r)
        self.alter_B[adapter_name] = MaskedLinear(experts * r, self.out_features)
        nn.init.kaiming_uniform_(self.alter_A[adapter_name].weight, a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(self.alter_B[adapter_name].weight)
        else:
            nn.init.kaiming_uniform_(self.alter_B[adapter_name].weight, a=math.sqrt(5))
        if config.router == "dense":
            self.alter_router[adapter_name] = nn.Linear(self.in_features, experts, bias=False)
            nn.init.kaiming_uniform_(self.alter_router[adapter_name].weight, a=math.sqrt(5))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def train(self, mode: bool = True) -> AlterLinear:
        """Switch the mode; in eval mode B is stored expert by expert, so that each expert is contiguous in memory."""
        super().train(mode)
        for B in self.alter_B.values():
            B.lay_out(by_expert=not mode)
        return self

    def add_router(self, adapter_name: str, features: int, probed: bool = False) -> None:
        """Create the adapter's router on this layer, its host: `features` values in, one logit per expert out.

        With `probed` also create a linear probe of the same features, initialised to zero: the logit that the next token has a
        high entropy.
        """
        like = self.alter_A[adapter_name].weight
        router = nn.Linear(features, self.alter_experts[adapter_name], device=like.device, dtype=like.dtype)
        if like.device.type != "meta":
            nn.init.normal_(router.weight, std=0.02)
            nn.init.zeros_(router.bias)
        router.requires_grad_(like.requires_grad)
        self.hosts = True
        self.alter_router[adapter_name] = router
        if probed:
            probe = nn.Linear(features, 1, device=like.device, dtype=like.dtype)
            if like.device.type != "meta":
                nn.init.zeros_(probe.weight)
                nn.init.zeros_(probe.bias)
            # fitted in closed form, never by a training step
            self.alter_probe[adapter_name] = probe.requires_grad_(False)
            frozen: dict[str, tuple[str, ...]] = getattr(self, "frozen_peft_weight_names", {})
            self.frozen_peft_weight_names = {**frozen, adapter_name: ("alter_probe",)}

    def takes_part(self, name: str) -> bool:
        """Tell whether the layer holds this adapter, active and not merged."""
        return name in self.alter_A and name in self.active_adapters and not self.disable_adapters and not self.merged

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x [..., in] to [..., out]: the base layer plus the update of every active adapter, gated per token."""
        state: ForwardState | None = self.context.state
        if state is not None and state.frozen:
            if self.hosts or state.host is self:
                state.read_host(self, x)
            return self._frozen(x, *args, **kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        if self.hosts and state is not None and state.trunk is not None and state.trunk.host is self:
            state.route_trunk(self, x)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if self.hosts and state is not None and state.observe:
            state.read_host_last(self, x)
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.alter_r:
                result = self._updated(name, x, result, state)
        return result if result.dtype == dtype else result.to(dtype)

    def _frozen(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            raise UserError(
                f"Layer {self.layer_name!r} holds merged adapters ({', '.join(self.merged_adapters)}), so the frozen base "
                "that another adapter's router reads is gone: call unmerge_adapter() first."
            )
        return self.base_layer(x, *args, **kwargs)

    def _updated(self, name: str, x: Tensor, result: Tensor, state: ForwardState | None) -> Tensor:
        """Add one adapter's update of x [..., in] to `result` [..., out]."""
        plan = self._plan(name, x, state)
        if plan is not None:
            if plan.closed:
                return result
            if x.dim() <= len(plan.shape):
                # a layer that is called once per row of the batch
                x = x.unflatten(0, plan.shape)
        A, B = self.alter_A[name], self.alter_B[name]
        if torch.is_grad_enabled() and not (self.training or torch.compiler.is_compiling()):
            B.columns_once_trained()
        dropout = self.alter_dropout[name] if self.training else None
        if isinstance(dropout, nn.Dropout) or not torch.is_autocast_enabled(x.device.type):
            # autocast would cast it back
            x = self._cast_input_dtype(x, A.weight.dtype)
        if dropout is not None:
            x = dropout(x)
        scale, r = self.scaling[name], self.alter_r[name]
        if plan is not None:
            z = A(x, plan.shared_mask)
            rest = None
            if plan.rest is not None and plan.rest.tokens is not None:
                few = z.flatten(0, -2).index_select(0, plan.rest.tokens.to(z.device))
                few = few.view(*plan.rest.shape, r)
                rest = plan.rest, self._gated(few, plan.rest)
            updated: Tensor = B(
                self._gated(z, plan), plan.expert_mask, plan.experts, r, result, scale, plan.learns, rest
            )
            return updated
        if self.alter_bound[name] is not None:
            return result + F.linear(x, self._bounded(name))
        z = A(x)
        if self.alter_mode[name] == "dense":
            gates = torch.softmax(self.alter_router[name](x).float(), dim=-1).to(z.dtype)
        else:
            gates = self._always_open(name, z)
        updated = B((z.unsqueeze(-2) * gates.unsqueeze(-1)).flatten(-2), base=result, scale=scale)
        return updated

    @staticmethod
    def _gated(z: Tensor, plan: Plan) -> Tensor:
        """Scale z [..., r] by the gate of each expert of the plan: [..., K r]."""
        gates = plan.gates_like(z)
        return z if gates is None else (z.unsqueeze(-2) * gates.unsqueeze(-1)).flatten(-2)

    def _bounded(self, name: str) -> Tensor:
        """Return phi(frequency * s (sum_e B_e) A) / gain as one matrix [out, in], computed by the modules, where FSDP
        gathers them.
        """
        A = self.alter_A[name]
        eye = torch.eye(self.in_features, device=A.weight.device, dtype=A.weight.dtype)
        z = A(eye) * self.scaling[name]
        gated = z.unsqueeze(-2) * self._always_open(name, z).unsqueeze(-1)
        return self._squash(name, self.alter_B[name](gated.flatten(-2)).t())

    def _always_open(self, name: str, like: Tensor) -> Tensor:
        """Return a static adapter's gates [experts]: all 1, but 0 for a disabled retention expert."""
        gates = torch.ones(self.alter_experts[name], device=like.device, dtype=like.dtype)
        gates[0] = float(self.alter_retains[name])
        return gates

    def _squash(self, name: str, delta: Tensor) -> Tensor:
        bound = self.alter_bound[name]
        if bound is None:
            return delta
        kind, frequency, gain = bound
        return (torch.sin if kind == "sine" else torch.tanh)(frequency * delta) / gain

    def _plan(self, name: str, x: Tensor, state: ForwardState | None) -> Plan | None:
        """Return the plan for one adapter's update of x, or None for an adapter without a router."""
        if state is None or name not in state.routing:
            if self.alter_mode[name] in ("static", "dense"):
                return None
            if state is not None and state.trunk is not None:
                raise UserError(
                    f"Layer {self.layer_name!r} runs before {state.trunk.host.layer_name!r}, whose input the router of "
                    f"adapter {name!r} reads. With `from_layer` the first adapted layer to run holds the router: give "
                    f"`router_layer` {self.layer_name!r}."
                )
            raise UserError(
                f"Layer {self.layer_name!r} was called without a route for adapter {name!r}: ALTER routes each token once "
                "for the whole network. Call the whole model that holds the adapter, not a part of it."
            )
        plan = state.plan_of(name)
        shape, given = x.shape[:-1], plan.shape
        if shape != given and not (len(shape) == 1 and len(given) == 2 and shape[0] == given[0] * given[1]):
            raise UserError(
                f"Layer {self.layer_name!r} sees tokens in shape {list(shape)}, but routes exist for {list(given)}: it does "
                "not see every token of the batch in order. Leave it out with `exclude_modules`, or use `router` 'static'."
            )
        return plan

    def resize(self, adapter_name: str, experts: int) -> None:
        """Grow to `experts` experts: append zero columns to B and zero rows to the router; the others stay bit-exact."""
        old = self.alter_B[adapter_name]
        r, previous = self.alter_r[adapter_name], self.alter_experts[adapter_name]
        new = MaskedLinear(experts * r, self.out_features, device=old.weight.device, dtype=old.weight.dtype)
        with torch.no_grad():
            new.weight.zero_()
            new.weight[:, : previous * r] = old.weight
        new.requires_grad_(old.weight.requires_grad)
        self.alter_B[adapter_name] = new
        self.alter_experts[adapter_name] = experts
        if adapter_name in self.alter_router:
            gate = self.alter_router[adapter_name]
            bias = gate.bias is not None
            wider = nn.Linear(gate.in_features, experts, bias, device=gate.weight.device, dtype=gate.weight.dtype)
            with torch.no_grad():
                for new_row, old_row in zip(wider.parameters(), gate.parameters(), strict=True):
                    new_row.zero_()
                    new_row[:previous] = old_row
            wider.requires_grad_(gate.weight.requires_grad)
            self.alter_router[adapter_name] = wider

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Compute a static adapter's update in the base weight's layout: s (sum_e B_e) A, or its bounded form.

        Raises:
            NotMergeable: the adapter routes per token, so no single matrix equals it.
        """
        if self.alter_mode[adapter] != "static":
            raise NotMergeable(adapter, self.alter_mode[adapter])
        A, B = self.alter_A[adapter].weight, self.alter_B[adapter].weight
        dtype = A.dtype
        if A.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            A, B = A.float(), B.float()
        experts = B.unflatten(-1, (self.alter_experts[adapter], -1))
        summed = (experts * self._always_open(adapter, B)[:, None]).sum(-2)
        delta = self._squash(adapter, (summed @ A) * self.scaling[adapter])
        return (delta.t() if self.fan_in_fan_out else delta).to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of static adapters to the base weight.

        Args:
            safe_merge: check for NaNs before anything is changed.
            adapter_names: adapters to merge; all active ones by default.

        Raises:
            NotMergeable: an adapter routes per token.
            ValueError: the merged weight has NaNs or infinities (with `safe_merge`).
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.alter_A:
                continue
            delta = self.get_delta_weight(name)
            weight = self.get_base_weight()
            dtype = weight.dtype
            if safe_merge:
                weight = weight.clone()
            weight = weight + delta.to(weight.device)
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self.set_base_weight(weight.to(dtype))
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract the merged updates from the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.alter_A:
                weight = self.get_base_weight()
                self.set_base_weight((weight - self.get_delta_weight(name).to(weight.device)).to(weight.dtype))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell whether the adapter is one matrix for all tokens, which is so for router="static" only."""
        return self.alter_mode.get(adapter_name, "static") == "static"

    def __repr__(self) -> str:
        return "alter." + super().__repr__()

    def extra_repr(self) -> str:
        return str(quantization_extra_repr(self))
