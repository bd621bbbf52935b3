"""An assistant beside the model: LoRA on its first blocks, taken from its logits (ULD, WHP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from pydantic import Field

from alter.methods.adapters.base import Adapter, Beginning, Settings
from alter.methods.adapters.cards import Card, guarded_card
from alter.methods.places import Targets, blocks, target_names
from alter.settings import Count

if TYPE_CHECKING:
    from alter.data import Encoded
    from alter.models import Form, Former


@final
class AssistantLora(Adapter):
    """An assistant: LoRA on the first blocks of the model (ULD) or on all (WHP), taken from its logits when it is used.

    The result loads with `alter.models.guards.load_form`, not with `PeftModel.from_pretrained`.
    """

    kind: Literal["assistant"] = "assistant"
    r: Count = Field(16, ge=1, description="Rank.")
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
                f"`adapter.kind` assistant trains another model than the base, so it goes with neither `negate` nor "
                f"objectives that compare with the base{' such as ' + compares[0] if compares else ''}: take "
                "`objective.kind` learn and `retain_objective.kind` uniform"
            )
        super().check(run)

    def size(self, model: Any) -> tuple[str, int]:
        """Return the name of the model's list of blocks, and how many of them the assistant has."""
        name, count = blocks(model)
        return name, max(1, round(self.share * count))

    def attach(self, model: Any, run: Settings, beginning: Beginning) -> Any:
        """Build the assistant: the model's first blocks, with shared weights and a LoRA adapter."""
        from peft import LoraConfig, get_peft_model

        from alter.models import first_blocks

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
        from alter.adapter import base_fingerprint

        where, count = self.size(base)
        how = self.model_dump(include={"rule", "weight", "plausible"})
        return {"kind": "assistant", "list": where, "blocks": count, **how, "base": base_fingerprint(base)}, {}

    def card(self, run: Settings, title: str | None, names: Sequence[str]) -> Card:
        about = "a LoRA adapter (`lora`) that makes an assistant, which is taken from the model's logits"
        return guarded_card("Assistant", run, title, about)
