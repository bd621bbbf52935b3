"""The tuner that puts ALTER adapters on a model and reads entropies and router features from the frozen base."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alter.adapter.base import check_base
from alter.adapter.config import AlterConfig, NotMergeable
from alter.adapter.hooks import connect, disconnect
from alter.adapter.inputs import SharedRows
from alter.adapter.layer import AlterLinear
from alter.adapter.layers import TARGETS, adapted_layers, block_of, first_block, linear_layers, router_layer
from alter.adapter.routing import Routing, Trace
from alter.adapter.saved import placed_tensors, stored_tensors, without_wrappers
from alter.adapter.state import RoutingContext
from alter.adapter.tracing import gates_of, trace_base
from alter.core import UserError, nearest


class NoLayerFound(UserError, NoMatchingPeftModuleError):
    """No layer of the model matches the configuration's target_modules."""


def alter_of(model: Any) -> AlterModel | None:
    """Return the ALTER tuner of a loaded model; None where it has another adapter, or none."""
    tuner = getattr(model, "base_model", None)
    return tuner if isinstance(tuner, AlterModel) else None


class AlterModel(BaseTuner):
    """Puts ALTER adapters (arXiv:2603.01792) on a model: shared A, a retention expert and N forget experts per layer.

    Each token is routed to its experts once for the whole network; see `alter.adapter.routing`. A plain forward pass runs the
    frozen base first, to compute entropies and routes (with `AlterConfig.from_layer` one pass does both). A caller who knows the
    routes passes them as `model(..., alter_routing=Routing(...))` and saves that pass. Generation runs the frozen base once,
    on the prompt.

    Args:
        model (`torch.nn.Module`):
            The model to adapt.
        config ([`AlterConfig`]):
            The configuration of the adapter.
        adapter_name (`str`):
            Its name, `"default"` by default.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`):
            Create empty weights, to be loaded into.

    Returns:
        `torch.nn.Module`: the adapted model.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from alter import AlterConfig

        >>> base = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")
        >>> model = get_peft_model(base, AlterConfig(num_forget_experts=4, task_type="CAUSAL_LM"))
        ```

    **Attributes**:
        - **model** (`torch.nn.Module`) -- The model that is adapted.
        - **peft_config** (`dict[str, AlterConfig]`) -- The configuration of each adapter.
    """

    prefix: str = "alter_"
    tuner_layer_cls = AlterLinear
    target_module_mapping = TARGETS

    # Injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Create the layers of one adapter, its router and the hooks; see `BaseTuner.inject_adapter`.

        Raises:
            UserError: the adapter was made for another base model, no layer matches, a rank does not fit, or the
                router's layer is not among the adapted ones.
        """
        config: AlterConfig = self.peft_config[adapter_name]
        check_base(model, config, adapter_name)
        if config.from_layer is not None:
            config.__dict__["_first_block"] = first_block(model, config.from_layer)
        self._context = connect(model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._place_router(model, config, adapter_name)
        except NoMatchingPeftModuleError as error:
            self._roll_back(model, adapter_name)
            raise NoLayerFound(
                f"{error} The linear layers of this model are: {', '.join(linear_layers(model))}."
            ) from error
        except BaseException:
            self._roll_back(model, adapter_name)
            raise

    @staticmethod
    def _check_target_module_exists(peft_config: AlterConfig, key: str) -> bool | re.Match[str] | None:
        if peft_config.from_layer is not None:
            prefix, first = peft_config.__dict__["_first_block"]
            place = block_of(key)
            if place is None or place[0] != prefix or place[1] < first:
                return False
        found: bool | re.Match[str] | None = BaseTuner._check_target_module_exists(peft_config, key)
        return found

    def _prepare_adapter_config(self, peft_config: AlterConfig, model_config: dict[str, Any]) -> AlterConfig:
        if peft_config.target_modules is None:
            kind = model_config.get("model_type")
            if kind not in self.target_module_mapping:
                raise UserError(
                    "Please specify `target_modules` in `peft_config`: no default is known for model type "
                    f"{kind!r}. The linear layers of this model are: {', '.join(linear_layers(self.model))}."
                )
            peft_config.target_modules = set(self.target_module_mapping[kind])
        return peft_config

    def _create_and_replace(
        self,
        peft_config: AlterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
        if ".experts." in f".{current_key}" and peft_config.routed:
            raise UserError(
                f"Layer {current_key!r} belongs to a mixture-of-experts block and sees a part of the tokens only, while "
                f"`router` {peft_config.router!r} routes all of them. Add 'experts' layers to `exclude_modules`."
            )
        if isinstance(target, AlterLinear):
            # PEFT keeps the layers when the last adapter is deleted; their routing context goes
            target.context = self._context
            target.update_layer(adapter_name, peft_config)
            return
        inner = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        backend = None if isinstance(inner, (nn.Linear, Conv1D)) else resolve_quantization_backend(inner)
        if not isinstance(inner, (nn.Linear, Conv1D)) and (backend is None or backend.layer_type != "linear"):
            raise TypeError(
                f"Target module {target} is not supported. Currently, only `torch.nn.Linear` (optionally quantized) and "
                "`transformers.pytorch_utils.Conv1D` are supported."
            )
        layer = AlterLinear(
            target, adapter_name, peft_config, self._context, current_key, **get_quantization_kwargs(self.model)
        )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _place_router(self, model: nn.Module, config: AlterConfig, adapter_name: str) -> None:
        layers = adapted_layers(model, adapter_name)
        if not layers:
            # PEFT allows an adapter without layers, whose targets are given later
            return
        names = list(layers)
        host = router_layer(names, config)
        layer = layers[host]
        if config.routed:
            features = layer.in_features if config.router == "learned" else 1
            layer.add_router(adapter_name, features, config.probed)
            config.resolved(router_layer=host)
        self._context.anchors[adapter_name] = layer
        self._context.configs[adapter_name] = config

    def _roll_back(self, model: nn.Module, adapter_name: str) -> None:
        """Remove the layers that a failed injection has created, so that the model is unchanged."""
        for name, module in list(model.named_modules()):
            if not isinstance(module, AlterLinear):
                continue
            if adapter_name in module.alter_r:
                module.delete_adapter(adapter_name)
            if not module.alter_A:
                parent = model.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], module.base_layer)
        self._context.anchors.pop(adapter_name, None)
        self._context.configs.pop(adapter_name, None)
        self._detach_if_unused()

    def _detach_if_unused(self) -> None:
        if not self._context.anchors:
            disconnect(self._context, self.model)

    @property
    def _context(self) -> RoutingContext:
        return self.__dict__.get("_routing_context") or connect(self.model)

    @_context.setter
    def _context(self, context: RoutingContext) -> None:
        self.__dict__["_routing_context"] = context

    # What the frozen base tells

    def router_of(self, adapter_name: str | None = None) -> tuple[str, AlterLinear]:
        """Name and layer that hold the router of an adapter (the active one by default): `layer.alter_router[name]`.

        Raises:
            UserError: the adapter is unknown or has no router.
        """
        name = self._one_adapter(adapter_name)
        if not self.peft_config[name].routed:
            raise UserError(
                f"Adapter {name!r} has `router` {self.peft_config[name].router!r}: no router for the whole network."
            )
        layer = self._context.anchors[name]
        assert isinstance(layer, AlterLinear)
        return layer.layer_name, layer

    @property
    def router_host(self) -> tuple[str, AlterLinear]:
        """Return name and layer that hold the router of the active adapter."""
        return self.router_of()

    def _one_adapter(self, adapter_name: str | None) -> str:
        if adapter_name is None:
            names: list[str] = self.active_adapters
            if len(names) != 1:
                raise UserError(
                    f"{len(names)} adapters are active ({', '.join(names)}); give adapter_name to say which one is meant."
                )
            return names[0]
        if adapter_name not in self.peft_config:
            raise UserError(
                f"There is no adapter {adapter_name!r}; there are {', '.join(map(repr, self.peft_config))}."
                f"{nearest(adapter_name, self.peft_config)}"
            )
        return adapter_name

    @torch.no_grad()
    def trace(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        adapter_name: str | None = None,
    ) -> Trace:
        """Run the frozen base once and return the entropy and the router features of each token; see `Trace`.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 on real tokens; padding on either side.
            position_ids: [B, T], if they differ from the model's own; a 0 begins a new sequence within a row (packing).
            adapter_name: adapter whose entropy order and router layer count; the active one by default.

        Raises:
            UserError: the model has no language-model head, or the adapter is not known.
        """
        name = self._one_adapter(adapter_name)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        given = {key: value for key, value in inputs.items() if value is not None}
        return trace_base(self._context, self.model, name, self.peft_config[name], given)

    @torch.no_grad()
    def beside_base(
        self, input_ids: Tensor, position_ids: Tensor, places: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run tokens that rows share, each once, and return the logits [K, V] of the frozen base and of the adapted model.

        The frozen base's pass is the one that tells the routes.

        Args:
            input_ids, position_ids: [1, N].
            places: [R, T], which of the N tokens stands where in each row; -1 after a row's end.
            wanted: [K], tokens whose logits are returned.

        Raises:
            UserError: not one adapter is active, or it has no router for the whole network.
        """
        name = self._one_adapter(None)
        shared = SharedRows(places)
        inputs = {"input_ids": input_ids, "position_ids": position_ids}
        trace = trace_base(self._context, self.model, name, self.peft_config[name], inputs, shared)
        gates = shared.once(self.route(trace.entropy, trace.features, shared.mask))
        base = trace.logits(trace.states[0, wanted])
        adapted = self.model(
            **inputs, use_cache=False, logits_to_keep=wanted, alter_routing=Routing(gates.to(input_ids.device))
        )
        return base, adapted.logits[0]

    def route(
        self, entropy: Tensor, features: Tensor | None, mask: Tensor | None = None, adapter_name: str | None = None
    ) -> Tensor:
        """Compute the gates [B, T, N + 1] that a plain forward pass would give to the tokens traced by `trace`.

        Args:
            entropy: [B, T] from `trace`.
            features: [B, T, D] from `trace`; not read by router="entropy" and router="static".
            mask: [B, T], true on real tokens; None: all.
            adapter_name: the active adapter by default.
        """
        name = self._one_adapter(adapter_name)
        return gates_of(self._context, name, self.peft_config[name], entropy, features, mask)

    def resize_experts(self, adapter_name: str, num_forget_experts: int, domains: list[str] | None = None) -> None:
        """Append forget experts to an adapter, one for each further request; the existing ones stay bit-exact.

        New experts and their rows of the router start at zero: until these rows are fitted, a token whose other logits are all
        below 0 takes a new expert, which adds nothing. The parameters are replaced by larger ones: create the optimizer
        afterwards.

        Args:
            adapter_name: adapter to grow.
            num_forget_experts: the new number of forget experts, at least the old one.
            domains: names of all sub-domains, if the adapter names them.

        Raises:
            UserError: the number is smaller than before, or the names do not fit it.
        """
        name = self._one_adapter(adapter_name)
        config: AlterConfig = self.peft_config[name]
        if num_forget_experts < config.num_forget_experts:
            raise UserError(
                f"Adapter {name!r} has {config.num_forget_experts} forget experts and cannot shrink to "
                f"{num_forget_experts}; what an expert has forgotten would come back."
            )
        names = config.domains if domains is None else domains
        if names is not None and len(names) != num_forget_experts:
            raise UserError(
                f"domains names {len(names)} sub-domains for {num_forget_experts} forget experts; give one name per expert."
            )
        for layer in adapted_layers(self.model, name).values():
            if layer.merged:
                raise UserError("Adapters are merged into the base weights: call unmerge_adapter() first.")
            layer.resize(name, num_forget_experts + 1)
        config.num_forget_experts, config.domains = num_forget_experts, names

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT takes `adapter_names` out of a call, whether or not the method follows it
        if kwargs.get("adapter_names") is not None:
            raise UserError(
                "`adapter_names` gives each row of a batch its own adapter, which ALTER cannot do: all rows of a pass take the "
                "active ones. Give each adapter a batch of its own after set_adapter(), or inside disable_adapter()."
            )
        yield

    # Taking adapters off

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; with the last one the hooks go too."""
        super().delete_adapter(adapter_name)
        self._context.anchors.pop(adapter_name, None)
        self._context.configs.pop(adapter_name, None)
        self._detach_if_unused()

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for name in self.active_adapters:
            if name in self.peft_config and self.peft_config[name].router != "static":
                raise NotMergeable(name, self.peft_config[name].router)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        context = self._context
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)
        disconnect(context, model)
        return model

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Tell whether the adapter is one matrix per layer for all tokens, which is so for router="static" only."""
        return all(
            module.supports_lora_conversion(adapter_name)
            for module in self.modules()
            if isinstance(module, BaseTunerLayer)
        )

    # State dict

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: AlterConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        clean = without_wrappers(state_dict)
        return stored_tensors(model, clean, cls._get_learnable_bias_state_dict(model, clean, config))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AlterConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return placed_tensors(model, adapter_name, state_dict, cls._remove_adapter_name_from_key)
