"""ALTER's adapter as a run trains it: one expert per sub-domain, routed by entropy, grown by later requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from pydantic import Field

from alter.core import UserError
from alter.logits import PAPER_THRESHOLD, check_threshold
from alter.methods.adapters.base import Adapter, Beginning, Settings
from alter.methods.adapters.cards import FINGERPRINT, UNMERGED, Card, peft_card, titled
from alter.methods.adapters.configured import attach_alter
from alter.methods.places import Targets, target_layers, target_names
from alter.settings import Count, nested

if TYPE_CHECKING:
    from torch import nn

    from alter.models import Former


@final
class AlterAdapter(Adapter):
    """The paper's adapter; defaults and meanings are `AlterConfig`'s."""

    kind: Literal["alter"] = "alter"
    r: Count = Field(8, ge=1, description="Rank of A and of every expert.")
    alter_alpha: float = Field(16, gt=0, description="The update is scaled by alter_alpha / r.")
    alter_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of A.")
    target_modules: Targets = Field(None, description="Linear layers to adapt; all of the blocks' by default.")
    router: Literal["learned", "entropy", "static"] = Field(
        "learned", description="Hidden states choose the expert, the entropy alone does, or all are open."
    )
    router_memory: float | None = Field(
        None,
        ge=0,
        le=1,
        description="How much of the text so far the router's evidence keeps; unless it is given, the router's fit chooses "
        "(`router_fit.memories`).",
    )
    from_layer: int | float | None = Field(
        None,
        ge=0,
        description="First block with experts: its number, or a share of the depth. The blocks below stay the base, so that "
        "one pass routes and answers; all blocks by default.",
    )
    entropy_source: Literal["probe", "exact"] = Field(
        "probe",
        description="With from_layer: a probe fitted with the router tells high tokens from low ones, or the exact entropy, "
        "at a second pass over prompts.",
    )
    entropy_q: float = Field(1.5, gt=0, description="Tsallis order of the token entropies, above 0; 1 is Shannon's.")
    entropy_threshold: float | None = Field(None, description="Entropy above which a token is high (1.2 by default).")
    entropy_quantile: float | None = Field(
        None, gt=0, lt=1, description="Set the threshold so that this share of the retain tokens is low."
    )
    temperature_high: float = Field(0.8, gt=0, description="Temperature of the gates on high-entropy tokens.")
    temperature_low: float = Field(0.01, gt=0, description="Temperature of the gates on low-entropy tokens.")
    top_k: Count = Field(3, ge=1, description="Forget experts fused on a high-entropy token.")
    entropy_gate: bool = Field(
        True,
        description="Entropy decides between one expert and several; off: always the best one.",
    )
    retention_expert: bool = Field(True, description="Ordinary text takes a retention expert; off: the bare base.")
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
            raise ValueError("give either `adapter.entropy_threshold` or `adapter.entropy_quantile`, not both")
        if run.start_from is None and self.entropy_quantile is None:
            threshold = PAPER_THRESHOLD if self.entropy_threshold is None else self.entropy_threshold
            with nested("adapter", {name: name for name in AlterAdapter.model_fields}):
                check_threshold(self.entropy_q, threshold, None)
        if run.phase_one and not self.retention_expert:
            raise ValueError(
                "`phase_one` trains the retention expert and A through it, which `adapter.retention_expert=False` leaves "
                "out: give `phase_one` 0, or leave it on"
            )
        super().check(run)

    def check_model(self, base: Any, run: Settings, former: Former | None) -> None:
        from alter.adapter import AlterConfig

        if run.start_from is not None:
            config = base.peft_config["default"]
            if not isinstance(config, AlterConfig) or not config.routed:
                raise UserError(
                    f"`start_from` is {run.start_from!r}, which is no ALTER adapter with a router to grow."
                )
        elif self.target_modules is not None:
            target_layers(base, target_names(base, self.target_modules), None)

    def check_experts_only(self, run: Settings) -> None:
        if run.phase_one:
            raise ValueError(
                "`phase_one` trains A and the retention expert, which `experts_only` (or `start_from`) freezes"
            )
        if self.router == "static":
            raise ValueError(
                "`experts_only` needs a router that keeps the experts apart; `adapter.router` is 'static'"
            )
        needs = run.objective.needs
        if run.start_from is not None and (needs.alternative == "diversion" or set(needs.views) - {"base"}):
            raise ValueError(
                f"`objective.kind` {run.objective.kind} looks at the bare base, which `start_from` has adapted"
            )

    def check_continues(self, run: Settings) -> None:
        if self.router != "learned":
            raise ValueError(
                f"`adapter.kind` alter with router {self.router} neither grows nor merges. Continual comparisons take "
                "alter with a learned router, lora, or full"
            )
        if run.num_forget_experts == 1:
            raise ValueError(
                "`num_forget_experts` 1 gives the expert of every split the same name, so the second cannot be added: "
                "leave it out, and name the sub-domains with `domain_column`"
            )

    def continued(self, adapter: str, merged: Callable[[], str]) -> dict[str, Any]:
        # its shape is the grown adapter's own; only how it is trained remains to be said
        return {"start_from": adapter, "adapter": self.model_dump(include={"kind", "isolation"})}

    def attach(self, model: Any, run: Settings, beginning: Beginning) -> Any:
        names = beginning.names
        if run.start_from is not None:
            tuned = self._grow(model, run.start_from, names)
        else:
            experts = run.num_forget_experts or len(names)
            unset = {"router_memory"} if self.router_memory is None else set()
            tuned = attach_alter(
                model,
                {name: name for name in AlterAdapter.model_fields},
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
        """Append experts for the sub-domains `names` to the adapter that the model has."""
        config = model.peft_config["default"]
        for name in sorted(self.model_fields_set - {"kind", "isolation", "entropy_quantile"}):
            wanted, has = getattr(self, name), getattr(config, name)
            if isinstance(has, set) and isinstance(wanted, (list, tuple)):
                wanted, has = sorted(wanted), sorted(has)
            if wanted is not None and wanted != has:
                raise UserError(f"`adapter.{name}` is {wanted!r}, but {start_from} has {has!r}: leave it out.")
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
        """Give the shared A the rate eta_A and the experts eta_B, without weight decay.

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
        about = f"{titled(title)}{len(names)} sub-domains, one forgetting expert each: {shown}."
        return peft_card("ALTER adapter", run, about, FINGERPRINT, UNMERGED)
