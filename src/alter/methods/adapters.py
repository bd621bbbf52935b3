"""What of a model is trained: ALTER's adapter, LoRA, asymmetric or bounded LoRA, an assistant, or its own weights.

`Adapter` says what a kind is asked by a run; each final class is the settings of one kind (`kind` names it in a recipe)
and its answers. `ADAPTERS` holds them by name and is open to plugins (`alter.core.plugins`). Everything but `FullWeights` is
a PEFT adapter; an assistant, and LoRA with a detector, act through `alter.models.guards`, all others load with
`PeftModel.from_pretrained`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, final

import torch
from peft import LoraConfig, PeftType, PromptLearningConfig, get_peft_model, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alter.adapter import AlterConfig
from alter.adapter.config import PAPER_THRESHOLD
from alter.adapter.model import base_fingerprint
from alter.core.errors import UserError, nearest
from alter.core.plugins import OneOf, Registry, kinds
from alter.data.encoding import Encoded
from alter.logits.entropy import check_threshold
from alter.methods.initializers import Factors, residual_pair
from alter.methods.places import Targets, blocks, blocks_within, target_layers, target_names
from alter.models import gguf
from alter.models.guards import Form, Former, first_blocks, fit_detector

_DEFAULT: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(AlterConfig)}


class Settings(Protocol):
    """What an adapter reads of a run's settings (`alter.training.settings.Unlearn`, where they are explained)."""

    model: str
    forget: str
    start_from: str | None
    experts_only: bool
    num_forget_experts: int | None
    phase_one: float
    negate: float | None
    learning_rate: float
    learning_rate_experts: float
    learning_rate_shared: float
    weight_decay: float
    quantization: Any
    initializer: Any
    objective: Any
    retain_objective: Any
    watch: Any
    seed: int


class Card(NamedTuple):
    """The words of a model card that depend on the kind: library that loads it, heading, and what it is."""

    library: str
    heading: str
    text: str


@dataclasses.dataclass(frozen=True)
class Penalty:
    """weight * sum over terms of |C M|_F^2 for constant matrices C and parameters M, which a function views."""

    weight: float
    terms: list[tuple[Tensor, nn.Parameter, bool]]
    r: int

    def __call__(self) -> Tensor:
        """The penalty now; M is lora_B's first r columns, or lora_A's first r rows transposed."""
        parts = [
            (constant @ (parameter[: self.r].t() if transposed else parameter[:, : self.r])).square().sum()
            for constant, parameter, transposed in self.terms
        ]
        return self.weight * torch.stack(parts).sum()


class FirstHalves:
    """AdamW's weight decay of the trained half of initialised LoRA factors: w <- (1 - rate * decay) w before each step.

    The other half is the frozen copy of the start, which must stay as it is.

    Args:
        named: the parameters by name.
        r: rank that is trained: the first r rows of each lora_A, the first r columns of each lora_B.
        decay: the weight decay.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], r: int, decay: float) -> None:
        self.trained = [p[:r] if ".lora_A." in name else p[:, :r] for name, p in named]
        self.decay = decay

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Shrink the trained halves at the optimizer's rate of now."""
        with torch.no_grad():
            for half in self.trained:
                half.mul_(1 - optimizer.param_groups[0]["lr"] * self.decay)


class Adapter(BaseModel, ABC):
    """What a run asks of what it trains.

    A kind names itself by `kind: Literal["mine"] = "mine"`, puts itself on a model in `attach`, and overrides what else
    differs: what is not said is as with a PEFT adapter that is always on, such as LoRA.
    """

    model_config = ConfigDict(extra="forbid")

    kind: str
    result: ClassVar[Literal["adapter", "model"]] = "adapter"
    """Name of the folder that the result is saved to."""
    routes: ClassVar[bool] = False
    """Whether tokens have entropies and gates, which are known before training."""
    grows: ClassVar[bool] = False
    """Whether `start_from` loads an adapter that gets new experts."""
    is_seen: ClassVar[bool] = True
    """Whether watching sees the adapter act while it trains."""
    starts_from_factors: ClassVar[bool] = False
    """Whether an initializer can say where it starts."""
    negates: ClassVar[bool] = False
    """Whether what was learned can be turned round (`negate`)."""
    rate: ClassVar[str] = "learning_rate"
    """The setting that holds the learning rate."""

    # what goes with what

    def check(self, run: Settings) -> None:
        """Refuse settings of a run that do not go with this kind.

        Raises:
            ValueError: says which, and what to give.
        """
        if not self.routes and run.objective.needs.entropy:
            raise ValueError(
                f"objective.only_low needs the token entropies of adapter.kind alter, not {self.kind}: give "
                "--objective.no-only-low"
            )
        if run.watch.on and (not self.is_seen or run.negate is not None):
            raise ValueError(
                "watch looks at an adapter on the model while it trains: not with adapter.kind full or "
                "assistant, and not with negate"
            )
        if run.phase_one and not self.routes and run.retain_objective.needs.rows:
            raise ValueError(
                f"phase_one needs the token entropies of adapter.kind alter, not {self.kind}: leave it out, or give "
                "--phase-one 0"
            )
        if run.negate is not None and not self.negates:
            raise ValueError(
                f"negate turns LoRA's B round, which adapter.kind {self.kind} does not have: take adapter.kind lora"
            )

    def check_experts_only(self, run: Settings) -> None:
        """Refuse to train new experts alone, as `experts_only` and `start_from` ask.

        Raises:
            ValueError: this kind has none, or its settings do not keep them apart.
        """
        raise ValueError(
            "experts_only is for adapter.kind alter, start_from for that and for adapter.kind lora with adapter.detector, "
            f"not for {self.kind}"
        )

    def check_model(self, base: Any, run: Settings, former: Former | None) -> None:
        """Refuse a loaded model that lacks what the settings name, before passes over it.

        Args:
            base: the model; with `grows` and `start_from` it has the earlier adapter.
            run: the run's settings.
            former: the earlier adapter that is trained on.

        Raises:
            UserError: it has no such layers, or is not the one that `former` was trained on.
        """

    def needs_whole_model(self) -> str | None:
        """The setting that needs all weights in each process, or None: a sharded model is refused with it."""
        return None

    # going on from an earlier adapter

    @property
    def trained_on(self) -> bool:
        """Whether `start_from` trains the earlier request's own weights further."""
        return False

    def former(self, start_from: str | None) -> Former | None:
        """The earlier request's adapter where it is trained on (`trained_on`), read and checked.

        Raises:
            UserError: it cannot be gone on with.
        """
        return None

    @property
    def merges(self) -> bool:
        """Whether its result can become part of the model's weights."""
        return False

    def check_continues(self, run: Settings) -> None:
        """Refuse to make a second run start from the result of a first one.

        Raises:
            ValueError: it can neither grow, be trained on, nor be merged, nor is it the model itself.
        """
        raise ValueError(
            f"adapter.kind {self.kind} neither grows nor merges. Continual comparisons take alter with a learned router, "
            "lora, or full"
        )

    def continued(self, adapter: str, merged: Callable[[], str]) -> dict[str, Any]:
        """Settings that make a second run start from a first one's adapter.

        Args:
            adapter: its folder.
            merged: saves the model with the adapter merged and returns its folder.
        """
        return {"model": merged()}

    # the run

    def dtype(self, given: str) -> str:
        """The dtype that the model is loaded in."""
        return given

    @abstractmethod
    def attach(
        self,
        model: Any,
        run: Settings,
        names: Sequence[str],
        start: Mapping[str, Factors] | None = None,
        former: Former | None = None,
    ) -> Any:
        """Put the adapter on a loaded model, or choose the weights to train.

        Args:
            model: the model; with `grows` and `start_from` it has the earlier adapter.
            run: the run's settings.
            names: names of the sub-domains.
            start: where the factors of each layer (by name) start; None: A at random, B zero.
            former: the earlier adapter that is trained on.

        Raises:
            UserError: the model, or the adapter that it has, does not go with the settings.
        """

    def routed_experts(self, model: Any) -> int:
        """How many experts tokens are routed to, the retention expert included; 0 for a kind that does not route."""
        return 0

    @property
    def isolates(self) -> bool:
        """Whether each expert learns from its own rows alone."""
        return False

    def learning_rate(self, run: Settings) -> float:
        """The learning rate that the schedule starts from."""
        return float(getattr(run, self.rate))

    def parameter_groups(self, named: Sequence[tuple[str, nn.Parameter]], run: Settings) -> list[dict[str, Any]]:
        """The optimizer's groups of the parameters that train, each with learning rate and weight decay."""
        return [
            {"params": [p for _, p in named], "lr": self.learning_rate(run), "weight_decay": run.weight_decay},
        ]

    def hook_optimizer(
        self, optimizer: torch.optim.Optimizer, named: Sequence[tuple[str, nn.Parameter]], run: Settings
    ) -> None:
        """Hook what its groups cannot say into the optimizer of the parameters that train."""

    def penalty(self, model: Any, run: Settings, away: Mapping[str, Tensor], former: Former | None) -> Penalty | None:
        """What is added to the loss for the weights alone.

        Args:
            model: with the adapter on it.
            run: the run's settings.
            away: of each layer (by name) the directions [out, k] that B is kept away from, where an initializer gives some.
            former: the earlier adapter that is trained on.
        """
        return None

    def negate(self, weights: Mapping[str, Tensor], times: float, before: Callable[[], Mapping[str, Tensor]]) -> None:
        """Turn what was learned round: theta - times * (theta' - theta) (task arithmetic, Ilharco et al. 2023).

        Args:
            weights: all of the trained model's by name, changed in place.
            times: how often.
            before: gives the untouched model's weights by name.
        """
        for name, weight in weights.items():
            if ".lora_B." in name or ".alter_B." in name:
                weight.mul_(-times)

    # the result

    def form(
        self, base: Any, run: Settings, forget: Sequence[Encoded], pad_token_id: int, former: Former | None = None
    ) -> Form | None:
        """Settings and tensors that the result needs where PEFT alone does not load it (see `alter.models.guards`).

        Raises:
            UserError: what it is made of is too little.
        """
        return None

    def card(self, run: Settings, title: str | None, names: Sequence[str]) -> Card:
        """What the model card says of the result: `title` is the method's, if it has a name; `names` the sub-domains."""
        return _peft_card("Adapter", run, f"{_before(title)}adapter.kind {self.kind}.")


FINGERPRINT = "It loads on no other base: the configuration holds a fingerprint of the weights. "
UNMERGED = " A routed adapter cannot be merged."


def _before(title: str | None) -> str:
    return "" if title is None else f"{title}; "


def _alters_own(run: Settings) -> str:
    return f"""import alter

model, tokenizer = alter.load({run.model!r}, "this folder")"""


def _peft_card(what: str, run: Settings, about: str, base: str = "", merging: str = "") -> Card:
    load = f"""import alter  # registers the method with PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({run.model!r}), "this folder")"""
    if run.model.startswith("builtin:") or run.model.lower().endswith(gguf.ENDING):
        # transformers reads neither by that name
        load = _alters_own(run)
    text = f"""{about}

```python
{load}
```

{base}It is an adapter: whoever has the base
weights has the knowledge, and `disable_adapter()` brings it back.{merging}"""
    return Card("peft", f"{what}: makes {run.model} forget {run.forget}", text)


def _guarded_card(what: str, run: Settings, title: str | None, about: str) -> Card:
    text = f"""{title or "ALTER"}: {about}.

```python
{_alters_own(run)}
```"""
    return Card("peft", f"{what}: makes {run.model} forget {run.forget}", text)


def _attach_alter(model: Any, **settings: Any) -> Any:
    """Put ALTER's adapter with these settings on a model, with the fingerprint of its weights."""
    config = AlterConfig(**settings, task_type="CAUSAL_LM")
    config.base_fingerprint = base_fingerprint(model)
    return get_peft_model(model, config)


@final
class AlterAdapter(Adapter):
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
    router_memory: float | None = Field(
        None,
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

    negates: ClassVar[bool] = True
    routes: ClassVar[bool] = True
    grows: ClassVar[bool] = True
    rate: ClassVar[str] = "learning_rate_experts"

    def check(self, run: Settings) -> None:
        if self.entropy_threshold is not None and self.entropy_quantile is not None:
            raise ValueError("give either adapter.entropy_threshold or adapter.entropy_quantile, not both")
        if run.start_from is None and self.entropy_quantile is None:
            threshold = PAPER_THRESHOLD if self.entropy_threshold is None else self.entropy_threshold
            check_threshold(self.entropy_q, threshold, None)
        if run.phase_one and not self.retention_expert:
            raise ValueError(
                "phase_one trains the retention expert and A through it, which adapter.retention_expert false leaves "
                "out: give --phase-one 0, or leave it on"
            )
        super().check(run)

    def check_model(self, base: Any, run: Settings, former: Former | None) -> None:
        if run.start_from is not None:
            config = base.peft_config["default"]
            if not isinstance(config, AlterConfig) or not config.routed:
                raise UserError(f"start_from is {run.start_from!r}, which is no ALTER adapter with a router to grow.")
        elif self.target_modules is not None:
            target_layers(base, target_names(base, self.target_modules), None)

    def check_experts_only(self, run: Settings) -> None:
        if run.phase_one:
            raise ValueError("phase_one trains A and the retention expert, which experts_only (or start_from) freezes")
        if self.router == "static":
            raise ValueError("experts_only needs a router that keeps the experts apart; adapter.router is 'static'")
        needs = run.objective.needs
        if run.start_from is not None and (needs.alternative == "diversion" or set(needs.views) - {"base"}):
            raise ValueError(
                f"objective.kind {run.objective.kind} looks at the bare base, which start_from has adapted"
            )

    def check_continues(self, run: Settings) -> None:
        if self.router != "learned":
            raise ValueError(
                f"adapter.kind alter with router {self.router} neither grows nor merges. Continual comparisons take "
                "alter with a learned router, lora, or full"
            )
        if run.num_forget_experts == 1:
            raise ValueError(
                "num_forget_experts 1 gives the expert of every split the same name, so the second cannot be added: "
                "leave it out, and name the sub-domains with domain_column"
            )

    def continued(self, adapter: str, merged: Callable[[], str]) -> dict[str, Any]:
        # its shape is the grown adapter's own; only how it is trained remains to be said
        return {"start_from": adapter, "adapter": self.model_dump(include={"kind", "isolation"})}

    def attach(
        self,
        model: Any,
        run: Settings,
        names: Sequence[str],
        start: Mapping[str, Factors] | None = None,
        former: Former | None = None,
    ) -> Any:
        if run.start_from is not None:
            tuned = self._grow(model, run.start_from, names)
        else:
            experts = run.num_forget_experts or len(names)
            unset = {"router_memory"} if self.router_memory is None else set()
            tuned = _attach_alter(
                model,
                **self.model_dump(exclude={"kind", "isolation", *unset}),
                num_forget_experts=experts,
                domains=list(names) if len(names) == experts else None,
            )
        if run.experts_only:
            tuned.requires_grad_(False)
            for name, parameter in tuned.named_parameters():
                parameter.requires_grad_(".alter_B." in name)
        return tuned

    def _grow(self, model: Any, start_from: str, names: Sequence[str]) -> Any:
        """Make room for the sub-domains `names` in the adapter that the model has."""
        config = model.peft_config["default"]
        for name in sorted(self.model_fields_set - {"kind", "isolation", "entropy_quantile"}):
            wanted, has = getattr(self, name), getattr(config, name)
            if isinstance(has, set) and isinstance(wanted, (list, tuple)):
                wanted, has = sorted(wanted), sorted(has)
            if wanted is not None and wanted != has:
                raise UserError(f"adapter.{name} is {wanted!r}, but {start_from} has {has!r}: leave it out.")
        own = config.domains or [f"expert {d + 1}" for d in range(config.num_forget_experts)]
        taken = [name for name in names if name in own]
        if taken:
            raise UserError(f"{start_from} has an expert for {taken[0]!r} already: nothing to add for it.")
        model.base_model.resize_experts("default", len(own) + len(names), [*own, *names])
        config.inference_mode = False
        return model

    def routed_experts(self, model: Any) -> int:
        return int(model.peft_config["default"].num_forget_experts) + 1

    @property
    def isolates(self) -> bool:
        return self.isolation

    def parameter_groups(self, named: Sequence[tuple[str, nn.Parameter]], run: Settings) -> list[dict[str, Any]]:
        """eta_A for the shared A and eta_B for the experts, without weight decay.

        Weight decay would move the columns of experts that the gradient masks protect.
        """
        shared = [p for name, p in named if ".alter_A." in name]
        experts = [p for name, p in named if ".alter_A." not in name]
        groups = [
            {"params": experts, "lr": run.learning_rate_experts, "weight_decay": 0.0},
            {"params": shared, "lr": run.learning_rate_shared, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def card(self, run: Settings, title: str | None, names: Sequence[str]) -> Card:
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        about = f"{_before(title)}{len(names)} sub-domains, one forgetting expert each: {shown}."
        return _peft_card("ALTER adapter", run, about, FINGERPRINT, UNMERGED)


@final
class Lora(Adapter):
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

    negates: ClassVar[bool] = True
    starts_from_factors: ClassVar[bool] = True

    def check(self, run: Settings) -> None:
        super().check(run)
        if self.detector and run.watch.on:
            raise ValueError("watch looks at an adapter that is always on: not with adapter.detector")

    def check_experts_only(self, run: Settings) -> None:
        raise ValueError(
            "experts_only is for adapter.kind alter, start_from for that and for adapter.kind lora with adapter.detector, "
            f"not for lora{'' if self.detector else ' without'}"
        )

    def check_model(self, base: Any, run: Settings, former: Former | None) -> None:
        layers = list(self.layers(base))
        if former is not None:
            former.check(base, layers)

    def needs_whole_model(self) -> str | None:
        return "adapter.detector" if self.detector else None

    @property
    def trained_on(self) -> bool:
        return self.detector

    def former(self, start_from: str | None) -> Former | None:
        if start_from is None:
            return None
        former = Former.read(start_from)
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
        return former

    @property
    def merges(self) -> bool:
        return not self.detector

    def check_continues(self, run: Settings) -> None:
        """Nothing to refuse: it is merged or trained on."""

    def continued(self, adapter: str, merged: Callable[[], str]) -> dict[str, Any]:
        return {"start_from": adapter} if self.detector else super().continued(adapter, merged)

    def layers(self, model: Any) -> dict[str, nn.Linear]:
        """The linear layers that the adapter goes on, by name."""
        chosen = None if self.depth is None else blocks_within(self.depth, blocks(model)[1])
        return target_layers(model, target_names(model, self.target_modules), chosen)

    def attach(
        self,
        model: Any,
        run: Settings,
        names: Sequence[str],
        start: Mapping[str, Factors] | None = None,
        former: Former | None = None,
    ) -> Any:
        """Put the adapter on a loaded model.

        With `start` it has twice the rank, and its second half, the negated start, never moves (see
        `alter.methods.initializers`). `former` fits (`former`, `check_model`).
        """
        layers = self.layers(model)
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
            target_modules=list(layers),
            task_type="CAUSAL_LM",
            base_model_name_or_path=run.model,
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

    def parameter_groups(self, named: Sequence[tuple[str, nn.Parameter]], run: Settings) -> list[dict[str, Any]]:
        """One group; the frozen halves of initialised factors do not decay."""
        (group,) = super().parameter_groups(named, run)
        return [group | {"weight_decay": 0.0}] if run.initializer.gives_factors else [group]

    def hook_optimizer(
        self, optimizer: torch.optim.Optimizer, named: Sequence[tuple[str, nn.Parameter]], run: Settings
    ) -> None:
        """Let the trained halves of initialised factors decay."""
        if run.initializer.gives_factors and run.weight_decay:
            optimizer.register_step_pre_hook(FirstHalves(named, self.r, run.weight_decay))

    def penalty(self, model: Any, run: Settings, away: Mapping[str, Tensor], former: Former | None) -> Penalty | None:
        """REGLU's |B^T P|^2 over all layers, or O3's |A_earlier A^T|^2 over all earlier requests, averaged over the blocks."""
        by_layer: dict[str, dict[str, nn.Parameter]] = {"lora_A": {}, "lora_B": {}}
        for name, parameter in model.named_parameters():
            for kind, found in by_layer.items():
                if f".{kind}." in name:
                    found[name.removeprefix("base_model.model.").partition(f".{kind}.")[0]] = parameter
        if away:
            terms = [(away[name].t().to(p), p, False) for name, p in by_layer["lora_B"].items()]
            return Penalty(run.initializer.penalty, terms, self.r)
        if former is None:
            return None
        terms = [
            (earlier[f"base_model.model.{name}.lora_A.weight"].to(parameter), parameter, True)
            for earlier in former.snapshots
            for name, parameter in by_layer["lora_A"].items()
        ]
        return Penalty(self.orthogonality / blocks(model)[1], terms, self.r)

    def form(
        self, base: Any, run: Settings, forget: Sequence[Encoded], pad_token_id: int, former: Former | None = None
    ) -> Form | None:
        if not self.detector:
            return None
        settings, files = fit_detector(base, forget, pad_token_id=pad_token_id, seed=run.seed)
        form = settings | {"base": base_fingerprint(base), "initializer": run.initializer.kind}, files
        return form if former is None else former.then(form)

    def card(self, run: Settings, title: str | None, names: Sequence[str]) -> Card:
        if self.detector:
            about = (
                "a LoRA adapter (`lora`), which detectors switch for each input, one for each request so far. "
                "`detector.safetensors` holds mean hidden states of the forget rows: whoever has it can recognise them"
            )
            return _guarded_card("Adapter", run, title, about)
        about = f"{_before(title)}adapter.kind {self.kind}."
        if run.initializer.gives_factors:
            about += (
                f" It starts by {run.initializer.kind}: the second half of its rank is the negated start, frozen, in place "
                "of a changed base model, so that the adapter switched off is the original model."
            )
        return _peft_card("Adapter", run, about, merging=" It can be merged.")


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


@final
class AsymLora(Adapter):
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

    negates: ClassVar[bool] = True

    def attach(
        self,
        model: Any,
        run: Settings,
        names: Sequence[str],
        start: Mapping[str, Factors] | None = None,
        former: Former | None = None,
    ) -> Any:
        """Put the adapter on a loaded model: an `AlterConfig` with router="dense"."""
        return _attach_alter(
            model,
            r=self.r,
            alter_alpha=self.alpha,
            alter_dropout=self.dropout,
            num_forget_experts=self.experts - 1,
            target_modules=self.target_modules,
            router="dense",
        )

    def card(self, run: Settings, title: str | None, names: Sequence[str]) -> Card:
        about = f"{_before(title)}adapter.kind {self.kind}."
        return _peft_card("Adapter", run, about, FINGERPRINT, UNMERGED)


@final
class BoundedLora(Adapter):
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

    def check(self, run: Settings) -> None:
        if run.negate is not None:
            raise ValueError("negate cannot undo a bounded update: phi(-n x) is not -n phi(x); take adapter.kind lora")
        super().check(run)

    def attach(
        self,
        model: Any,
        run: Settings,
        names: Sequence[str],
        start: Mapping[str, Factors] | None = None,
        former: Former | None = None,
    ) -> Any:
        """Put the adapter on a loaded model: an `AlterConfig` with router="static" and a bound."""
        # without the retention expert, one expert is left: a plain LoRA
        return _attach_alter(
            model,
            r=self.r,
            alter_alpha=self.alpha,
            num_forget_experts=1,
            target_modules=self.target_modules,
            router="static",
            retention_expert=False,
            bound=self.bound,
            bound_frequency=self.frequency,
            bound_gain=self.gain,
        )

    def card(self, run: Settings, title: str | None, names: Sequence[str]) -> Card:
        about = f"{_before(title)}adapter.kind {self.kind}."
        return _peft_card("Adapter", run, about, FINGERPRINT, UNMERGED)


@final
class AssistantLora(Adapter):
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

    is_seen: ClassVar[bool] = False

    def check(self, run: Settings) -> None:
        compares = [
            part.kind
            for part in (run.objective, run.retain_objective)
            if part.needs.views or part.needs.base_logp or part.needs.depth is not None
        ]
        if compares or run.negate is not None:
            raise ValueError(
                f"adapter.kind assistant trains another model than the base, so it goes with neither negate nor "
                f"objectives that compare with the base{' such as ' + compares[0] if compares else ''}: take "
                "objective.kind learn and retain_objective.kind uniform"
            )
        super().check(run)

    def size(self, model: Any) -> tuple[str, int]:
        """Name of the model's list of blocks, and how many of them the assistant has."""
        name, count = blocks(model)
        return name, max(1, round(self.share * count))

    def attach(
        self,
        model: Any,
        run: Settings,
        names: Sequence[str],
        start: Mapping[str, Factors] | None = None,
        former: Former | None = None,
    ) -> Any:
        """The assistant: a model of the first blocks, which shares its weights with `model`, with a LoRA adapter."""
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=target_names(model, self.target_modules),
            task_type="CAUSAL_LM",
        )
        return get_peft_model(first_blocks(model, *self.size(model)), config)

    def form(
        self, base: Any, run: Settings, forget: Sequence[Encoded], pad_token_id: int, former: Former | None = None
    ) -> Form | None:
        where, count = self.size(base)
        how = self.model_dump(include={"rule", "weight", "plausible"})
        return {"kind": "assistant", "list": where, "blocks": count, **how, "base": base_fingerprint(base)}, {}

    def card(self, run: Settings, title: str | None, names: Sequence[str]) -> Card:
        about = "a LoRA adapter (`lora`) that makes an assistant, which is taken from the model's logits"
        return _guarded_card("Assistant", run, title, about)


@final
class PeftAdapter(Adapter):
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

    def attach(
        self,
        model: Any,
        run: Settings,
        names: Sequence[str],
        start: Mapping[str, Factors] | None = None,
        former: Former | None = None,
    ) -> Any:
        """Put the adapter on a loaded model; `target_modules` are all of the blocks' linear layers where it takes any.

        Raises:
            UserError: PEFT refuses the configuration for this model.
        """
        settings = {"task_type": "CAUSAL_LM", **self.config}
        made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(settings.pop("peft_type"))]
        taken = [field.name for field in dataclasses.fields(made)]
        if "target_modules" in taken and not settings.get("target_modules") and "feedforward_modules" not in taken:
            settings["target_modules"] = target_names(model, None)
        try:
            return get_peft_model(model, made(**settings))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(
                f"PEFT refuses adapter.config for this model: {str(error).splitlines()[0]}. See the documentation of its "
                f"{made.__name__}."
            ) from error


@final
class FullWeights(Adapter):
    """The model's own weights, all or some, in float32; the result is a model folder, not an adapter."""

    kind: Literal["full"] = "full"
    modules: list[str] | None = Field(
        None, description="Train only parameters whose name holds one of these, such as mlp.down_proj."
    )
    depth: tuple[float, float] | None = Field(
        None, description="Train only the blocks between two shares of the depth, such as 0.0 0.375."
    )

    negates: ClassVar[bool] = True
    result: ClassVar[Literal["adapter", "model"]] = "model"
    is_seen: ClassVar[bool] = False

    def check(self, run: Settings) -> None:
        super().check(run)
        if run.quantization is not None:
            raise ValueError(
                f"quantization {run.quantization} freezes the weights, which adapter.kind full trains: take adapter.kind "
                "lora, or leave quantization out"
            )

    def check_continues(self, run: Settings) -> None:
        """Nothing to refuse: the result is a model like any other."""

    def dtype(self, given: str) -> str:
        # small steps would be lost in the rounding of 16-bit weights
        return "float32" if given == "auto" else given

    def attach(
        self,
        model: Any,
        run: Settings,
        names: Sequence[str],
        start: Mapping[str, Factors] | None = None,
        former: Former | None = None,
    ) -> Any:
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

    def negate(self, weights: Mapping[str, Tensor], times: float, before: Callable[[], Mapping[str, Tensor]]) -> None:
        untouched = before()
        for name, weight in weights.items():
            if name in untouched:
                old = untouched[name].to(weight.device)
                weight.copy_(old - times * (weight - old))

    def card(self, run: Settings, title: str | None, names: Sequence[str]) -> Card:
        text = (
            f"{title or 'ALTER'}; adapter.kind full: these are the model's own weights, changed. "
            "`AutoModelForCausalLM.from_pretrained` loads them."
        )
        return Card("transformers", f"{run.model}, made to forget {run.forget}", text)


ADAPTERS: Registry[type[Adapter]] = Registry(
    "adapter", kinds(AlterAdapter, Lora, AsymLora, BoundedLora, AssistantLora, PeftAdapter, FullWeights)
)
"""Kinds of adapters by name."""
AnyAdapter = Annotated[Adapter, OneOf(ADAPTERS)]


def adapter_of(settings: Mapping[str, Any]) -> Adapter:
    """The adapter whose settings these are, with its `kind`.

    Raises:
        UserError: no adapter has that name.
    """
    kind = settings["kind"]
    if kind not in ADAPTERS:
        raise UserError(
            f"adapter.kind is {kind!r}; expected one of {', '.join(ADAPTERS)}.{nearest(str(kind), ADAPTERS)}"
        )
    return ADAPTERS[kind].model_validate(settings)
