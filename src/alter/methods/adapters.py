"""What of a model is trained: ALTER's adapter, LoRA, asymmetric or bounded LoRA, an assistant, or its own weights.

Each class is the settings of one choice (`kind` names it in a recipe) and how it is put on a model. `Adapter` is the
registry. Everything but `FullWeights` is a PEFT adapter; an assistant, and LoRA with a detector, act through
`alter.models.guards`, all others load with `PeftModel.from_pretrained`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from peft import LoraConfig, PeftType, PromptLearningConfig, get_peft_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from torch import nn
from transformers.pytorch_utils import Conv1D

from alter.adapter import AlterConfig
from alter.adapter.model import TARGETS, base_fingerprint, linear_layers
from alter.core.errors import UserError, nearest
from alter.methods.initializers import Factors, residual_pair
from alter.models.guards import Former, first_blocks


def _one_pattern(given: Any) -> Any:
    """A list of one, as the command line makes of a flag, is a text where it cannot be a name: all-linear, or a pattern."""
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], str):
        return given if re.fullmatch(r"[\w.]+", given[0]) else given[0]
    return given


Targets = Annotated[list[str] | str | None, BeforeValidator(_one_pattern)]
"""Which linear layers: endings of their names, one regular expression for whole names, or "all-linear"."""

_DEFAULT: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(AlterConfig)}


def blocks(model: nn.Module) -> tuple[str, int]:
    """Name of a model's list of blocks (`model.layers`) and how many there are.

    Raises:
        UserError: no parameter lies in a numbered block.
    """
    found: dict[str, set[int]] = {}
    for name, _ in model.named_parameters():
        match = re.match(r"(.*?)\.(\d+)\.", name)
        if match:
            found.setdefault(match[1], set()).add(int(match[2]))
    if not found:
        raise UserError(f"{type(model).__name__} has no numbered blocks, so a share of its depth means nothing.")
    name = max(found, key=lambda key: len(found[key]))
    return name, len(found[name])


def block_at(depth: float, count: int) -> int:
    """The block of `count` whose middle is nearest to a share of the depth: 7.5 / 32 is block 7 of 32, 1 of 6."""
    return min(range(count), key=lambda i: (abs((i + 0.5) / count - depth), i))


def blocks_within(span: tuple[float, float], count: int) -> list[int]:
    """Blocks of `count` whose middle lies within two shares of the depth; at least the one nearest to their mean."""
    inside = [i for i in range(count) if span[0] <= (i + 0.5) / count <= span[1]]
    return inside or [block_at(sum(span) / 2, count)]


def target_names(model: Any, given: Sequence[str] | str | None) -> list[str] | str:
    """Names of the linear layers to adapt: those given, or all of the blocks' for a known architecture.

    "all-linear" stands for all linear layers in numbered blocks of any architecture.

    Raises:
        UserError: nothing is given and the architecture is not known.
    """
    if given == "all-linear":
        inside = f"{blocks(model)[0]}."
        linear = (name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
        return sorted({name.rpartition(".")[2] for name in linear if name.startswith(inside)})
    if given is not None:
        return given if isinstance(given, str) else list(given)
    kind = model.config.model_type
    if kind not in TARGETS:
        raise UserError(
            f"adapter.target_modules is not given, and no default is known for model type {kind!r}."
            f"{nearest(kind, TARGETS)} The linear layers of this model are: {', '.join(linear_layers(model))}."
        )
    return TARGETS[kind]


def target_layers(model: nn.Module, names: Sequence[str] | str, chosen: Sequence[int] | None) -> dict[str, nn.Linear]:
    """The linear layers that a LoRA adapter with these settings goes on, by name.

    Raises:
        UserError: there is none.
    """
    found = {}
    for name, module in model.named_modules():
        ending = bool(re.fullmatch(names, name)) if isinstance(names, str) else name.rpartition(".")[2] in names
        number = re.search(r"\.(\d+)\.", f".{name}.")
        if (
            isinstance(module, (nn.Linear, Conv1D))
            and ending
            and (chosen is None or (number and int(number[1]) in chosen))
        ):
            found[name] = module
    if not found:
        raise UserError(f"No linear layer is named {names!r}; there are: {', '.join(linear_layers(model))}.")
    return found


class _Adapter(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AlterAdapter(_Adapter):
    """The paper's adapter; defaults and meanings are `AlterConfig`'s."""

    kind: Literal["alter"] = "alter"
    r: int = Field(_DEFAULT["r"], ge=1, description="Rank of A and of every expert.")
    alter_alpha: float = Field(_DEFAULT["alter_alpha"], gt=0, description="The update is scaled by alter_alpha / r.")
    alter_dropout: float = Field(_DEFAULT["alter_dropout"], ge=0, lt=1, description="Dropout on the input of A.")
    target_modules: Targets = Field(
        _DEFAULT["target_modules"], description="Linear layers to adapt; all of the blocks' by default."
    )
    router: Literal["learned", "entropy", "static"] = Field(
        _DEFAULT["router"], description="Hidden states choose the expert, the entropy alone does, or all are open."
    )
    router_memory: float = Field(
        _DEFAULT["router_memory"],
        ge=0,
        le=1,
        description="How much of the text so far the router's evidence keeps; unless it is given, the router's fit chooses "
        "(`router_fit.memories`).",
    )
    from_layer: int | float | None = Field(
        _DEFAULT["from_layer"],
        description="First block with experts: its number, or a share of the depth. The blocks below stay the base, so that "
        "one pass routes and answers; all blocks by default.",
    )
    entropy_source: Literal["probe", "exact"] = Field(
        _DEFAULT["entropy_source"],
        description="With from_layer: a probe fitted with the router tells high tokens from low ones, or the exact entropy, "
        "at a second pass over prompts.",
    )
    entropy_q: float = Field(
        _DEFAULT["entropy_q"], description="Tsallis order of the token entropies, above 0; 1 is Shannon's."
    )
    entropy_threshold: float | None = Field(None, description="Entropy above which a token is high (1.2 by default).")
    entropy_quantile: float | None = Field(
        None, gt=0, lt=1, description="Set the threshold so that this share of the retain tokens is low."
    )
    temperature_high: float = Field(_DEFAULT["temperature_high"], gt=0, description="Of gates on high-entropy tokens.")
    temperature_low: float = Field(_DEFAULT["temperature_low"], gt=0, description="Of gates on low-entropy tokens.")
    top_k: int = Field(_DEFAULT["top_k"], ge=1, description="Forget experts fused on a high-entropy token.")
    entropy_gate: bool = Field(
        _DEFAULT["entropy_gate"],
        description="Entropy decides between one expert and several; off: always the best one.",
    )
    retention_expert: bool = Field(
        _DEFAULT["retention_expert"], description="Ordinary text takes a retention expert; off: the bare base."
    )
    isolation: bool = Field(
        True,
        description="Each expert learns from its own rows alone, and A from high-entropy tokens; off: all from all.",
    )

    def attach(self, model: Any, names: Sequence[str], experts: int) -> Any:
        """Put an adapter for the sub-domains `names` on a loaded model, with at least that many forget experts."""
        config = AlterConfig(
            **self.model_dump(exclude={"kind", "isolation"}),
            num_forget_experts=experts,
            domains=list(names) if len(names) == experts else None,
            task_type="CAUSAL_LM",
        )
        config.base_fingerprint = base_fingerprint(model)
        return get_peft_model(model, config)


class Lora(_Adapter):
    """Plain LoRA of PEFT (Hu et al. 2021): A Kaiming-uniform, B zero, or as the run's `initializer` says."""

    kind: Literal["lora"] = "lora"
    r: int = Field(8, ge=1, description="Rank.")
    alpha: float = Field(16, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of A.")
    target_modules: Targets = Field(None, description="Linear layers to adapt; all of the blocks' by default.")
    depth: tuple[float, float] | None = Field(
        None, description="Adapt the blocks between two shares of the depth only, such as 0.125 0.25."
    )
    orthogonality: float = Field(
        0.1,
        ge=0,
        description="With start_from: weight of the penalty that keeps A orthogonal to earlier requests' (O3).",
    )
    detector: bool = Field(
        False,
        description="Scale the update for each input by a detector, fitted on forget rows, of what is to be forgotten (O3).",
    )

    def check_former(self, former: Former) -> None:
        """Refuse to go on with a LoRA of another shape.

        Raises:
            UserError: another rank or scale, or one that an initialiser has started.
        """
        if former.settings["initializer"] != "zero":
            raise UserError(
                f"start_from is {former.folder}, which started by initializer.kind {former.settings['initializer']}: half of "
                "its rank is a frozen copy, so it cannot be trained on. Start from one with initializer.kind zero."
            )
        for name, wanted, has in (
            ("r", self.r, former.config["r"]),
            ("alpha", self.alpha, former.config["lora_alpha"]),
        ):
            if wanted != has:
                raise UserError(
                    f"adapter.{name} is {wanted:g}, but {former.folder} has {has:g}: give --adapter.{name} {has:g}."
                )

    def layers(self, model: Any) -> dict[str, nn.Linear]:
        """The linear layers that the adapter goes on, by name."""
        chosen = None if self.depth is None else blocks_within(self.depth, blocks(model)[1])
        return target_layers(model, target_names(model, self.target_modules), chosen)

    def attach(self, model: Any, start: Mapping[str, Factors] | None, base: str, former: Former | None = None) -> Any:
        """Put the adapter on a loaded model.

        Args:
            model: the model.
            start: where the factors of each layer (by name) start; None: A at random, B zero. With it the adapter has
                twice the rank, and its second half, the negated start, never moves (see `alter.initializers`).
            base: the base model's name, written into the adapter's configuration.
            former: the adapter of earlier requests that is trained on, which fits (`check_former`, `Former.check`).
        """
        layers = self.layers(model)
        names = list(layers)
        turned = next((name for name, layer in layers.items() if isinstance(layer, Conv1D)), None)
        if start is not None and turned is not None:
            raise UserError(
                f"initializer.kind needs nn.Linear layers, but {turned} is a Conv1D: use initializer.kind zero, or leave it out "
                "of adapter.target_modules."
            )
        doubled = 1 if start is None else 2
        config = LoraConfig(
            r=doubled * self.r,
            lora_alpha=doubled * self.alpha,
            lora_dropout=self.dropout,
            target_modules=names,
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
        )
        tuned = get_peft_model(model, config)
        if former is not None:
            set_peft_model_state_dict(tuned, former.weights)
        if start is None:
            return tuned
        with torch.no_grad():
            for name, factors in start.items():
                layer = model.get_submodule(name)
                A, B = residual_pair(factors)
                layer.lora_A["default"].weight.copy_(A)
                layer.lora_B["default"].weight.copy_(B)
        freeze_second_halves(tuned, self.r)
        return tuned


def freeze_second_halves(model: nn.Module, r: int) -> None:
    """Zero the gradient of all but the first r rows of each lora_A and the first r columns of each lora_B."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            kept = torch.arange(len(parameter), device=parameter.device)[:, None] < r
        elif ".lora_B." in name:
            kept = torch.arange(parameter.shape[1], device=parameter.device)[None, :] < r
        else:
            continue
        parameter.register_hook(lambda grad, kept=kept: grad * kept)


class AsymLora(_Adapter):
    """HydraLoRA (Tian et al. 2024, arXiv:2404.19245), the paper's AsymLoRA: one A, several B, a router in every layer.

    y = W0 x + s sum_i softmax(W_r x)_i B_i A x, dense over all B, trained with them. One dropout serves all B (the
    authors draw one for each).
    """

    kind: Literal["asym_lora"] = "asym_lora"
    r: int = Field(8, ge=1, description="Rank of A and of every B.")
    alpha: float = Field(16, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of A.")
    experts: int = Field(4, ge=2, description="Number of B matrices.")
    target_modules: Targets = Field(None, description="Linear layers to adapt; all of the blocks' by default.")

    def attach(self, model: Any) -> Any:
        """Put the adapter on a loaded model: an `AlterConfig` with router="dense"."""
        config = AlterConfig(
            r=self.r,
            alter_alpha=self.alpha,
            alter_dropout=self.dropout,
            num_forget_experts=self.experts - 1,
            target_modules=self.target_modules,
            router="dense",
            task_type="CAUSAL_LM",
        )
        config.base_fingerprint = base_fingerprint(model)
        return get_peft_model(model, config)


class BoundedLora(_Adapter):
    """LoRA whose update is squashed element by element (Stable Forgetting, arXiv:2509.24166; methods.md 3.5).

    W = W0 + phi(frequency * s B A) / gain, a dense matrix at every step. Where the two constants stand is a reading:
    the paper's code is not public.
    """

    kind: Literal["bounded_lora"] = "bounded_lora"
    r: int = Field(8, ge=1, description="Rank.")
    alpha: float = Field(16, gt=0, description="The update is scaled by alpha / r before it is squashed.")
    bound: Literal["sine", "tanh"] = Field("sine", description="The function phi.")
    frequency: float = Field(1.0, gt=0, description="Multiplies the update before phi.")
    gain: float = Field(1.0, gt=0, description="Divides it after phi: no element exceeds 1 / gain.")
    target_modules: Targets = Field(
        ["gate_proj", "up_proj", "down_proj"], description="Linear layers to adapt; the MLP's of Llama by default."
    )

    def attach(self, model: Any) -> Any:
        """Put the adapter on a loaded model: an `AlterConfig` with router="static" and a bound."""
        # without the retention expert, one expert is left: a plain LoRA
        config = AlterConfig(
            r=self.r,
            alter_alpha=self.alpha,
            num_forget_experts=1,
            target_modules=self.target_modules,
            router="static",
            retention_expert=False,
            bound=self.bound,
            bound_frequency=self.frequency,
            bound_gain=self.gain,
            task_type="CAUSAL_LM",
        )
        config.base_fingerprint = base_fingerprint(model)
        return get_peft_model(model, config)


class AssistantLora(_Adapter):
    """An assistant: LoRA on the first blocks of the model (ULD) or on all (WHP), taken from its logits when it is used.

    The result loads with `alter.models.guards.load`, not with `PeftModel.from_pretrained`.
    """

    kind: Literal["assistant"] = "assistant"
    r: int = Field(16, ge=1, description="Rank.")
    alpha: float = Field(32, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of A.")
    target_modules: Targets = Field(None, description="Linear layers to adapt; all of the blocks' by default.")
    share: float = Field(0.25, gt=0, le=1, description="Share of the model's blocks that the assistant has.")
    rule: Literal["knowledge", "rise"] = Field(
        "knowledge",
        description="Subtract the assistant's log-probabilities (ULD), or what its logits exceed the base's (WHP).",
    )
    weight: float = Field(0.8, gt=0, description="How much of that is subtracted.")
    plausible: float = Field(
        0.01,
        gt=0,
        le=1,
        description="rule knowledge: subtract only from tokens with this share of the largest base probability.",
    )

    def size(self, model: Any) -> tuple[str, int]:
        """Name of the model's list of blocks, and how many of them the assistant has."""
        name, count = blocks(model)
        return name, max(1, round(self.share * count))

    def form(self, model: Any) -> dict[str, Any]:
        """What `alter.models.guards.load` must know."""
        where, count = self.size(model)
        how = self.model_dump(include={"rule", "weight", "plausible"})
        return {"kind": "assistant", "list": where, "blocks": count, **how}

    def attach(self, model: Any) -> Any:
        """The assistant: a model of the first blocks, which shares its weights with `model`, with a LoRA adapter."""
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=target_names(model, self.target_modules),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(first_blocks(model, *self.size(model)), config)


class PeftAdapter(_Adapter):
    """Any adapter of PEFT by its own configuration: `config` has `peft_type` and what that type's class takes."""

    kind: Literal["peft"] = "peft"
    config: dict[str, Any] = Field(
        default_factory=lambda: {"peft_type": "LORA"},
        description="The adapter_config.json of PEFT: peft_type (LORA, IA3, VERA, OFT, ...) and that type's settings.",
    )

    @field_validator("config")
    @classmethod
    def _known(cls, given: dict[str, Any]) -> dict[str, Any]:
        known = {str(name.value): config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        name = str(given.get("peft_type")).upper()
        if name not in known:
            raise ValueError(
                f"config.peft_type is {given.get('peft_type')!r}; expected one of {', '.join(sorted(known))}."
                f"{nearest(name, known)}"
            )
        if issubclass(known[name], PromptLearningConfig):
            raise ValueError(
                f"config.peft_type is {name}, which puts virtual tokens before each row, so that no logit is at its token's "
                "place: take one that changes the layers, such as LORA, IA3 or VERA"
            )
        names = [field.name for field in dataclasses.fields(known[name])]
        unknown = next((key for key in given if key not in names), None)
        if unknown is not None:
            raise ValueError(
                f"config.{unknown} is no setting of PEFT's {known[name].__name__}.{nearest(unknown, names)}"
            )
        return {**given, "peft_type": name}

    def attach(self, model: Any) -> Any:
        """Put the adapter on a loaded model; `target_modules` are all of the blocks' linear layers where it takes any.

        Raises:
            UserError: PEFT refuses the configuration for this model.
        """
        settings = {"task_type": "CAUSAL_LM", **self.config}
        made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(settings.pop("peft_type"))]
        names = [field.name for field in dataclasses.fields(made)]
        if "target_modules" in names and not settings.get("target_modules") and "feedforward_modules" not in names:
            settings["target_modules"] = target_names(model, None)
        try:
            return get_peft_model(model, made(**settings))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(
                f"PEFT refuses adapter.config for this model: {str(error).splitlines()[0]}. See the documentation of its "
                f"{made.__name__}."
            ) from error


class FullWeights(_Adapter):
    """The model's own weights, all or some, in float32; the result is a model folder, not an adapter."""

    kind: Literal["full"] = "full"
    modules: list[str] | None = Field(
        None, description="Train only parameters whose name holds one of these, such as mlp.down_proj."
    )
    depth: tuple[float, float] | None = Field(
        None, description="Train only the blocks between two shares of the depth, such as 0.0 0.375."
    )

    def attach(self, model: Any) -> Any:
        """Switch gradients on for the chosen weights and off for all others.

        Raises:
            UserError: nothing is left to train.
        """
        list_name, count = blocks(model) if self.depth is not None else ("", 0)
        inside = None if self.depth is None else {f"{list_name}.{i}." for i in blocks_within(self.depth, count)}
        chosen = 0
        for name, parameter in model.named_parameters():
            wanted = self.modules is None or any(part in name for part in self.modules)
            wanted = wanted and (inside is None or any(name.startswith(start) for start in inside))
            parameter.requires_grad_(wanted)
            chosen += wanted
        if not chosen:
            endings = sorted({name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_parameters()})
            raise UserError(
                f"adapter.modules {self.modules} names no parameter of {type(model).__name__}; its modules end in "
                f"{', '.join(endings)}."
            )
        return model


Adapter = Annotated[
    AlterAdapter | Lora | AsymLora | BoundedLora | AssistantLora | PeftAdapter | FullWeights,
    Field(discriminator="kind"),
]
