"""LoRA variants of other papers that an `AlterConfig` expresses: AsymLoRA (dense router) and bounded LoRA (no router)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, final

from pydantic import Field

from alter.methods.adapters.base import Adapter, Beginning, Settings
from alter.methods.adapters.cards import FINGERPRINT, UNMERGED, Card, peft_card, titled
from alter.methods.places import Targets
from alter.settings import Count, nested

OWN_FIELDS = {"r": "r", "alter_alpha": "alpha", "target_modules": "target_modules"}
"""Fields of both adapters by the field of `AlterConfig` that each fills."""


def attach_alter(model: Any, own: Mapping[str, str], **settings: Any) -> Any:
    """Put ALTER's adapter on a model, with the fingerprint of its weights.

    Args:
        model: the base.
        own: fields of the run's `adapter` by the field of `AlterConfig` that each fills.
        settings: of the `AlterConfig`.

    Raises:
        UserError: the settings do not fit together, or not the model; it names the run's settings (`adapter.r`).
    """
    from peft import get_peft_model

    from alter.adapter import AlterConfig, base_fingerprint

    with nested("adapter", own):
        config = AlterConfig(**settings, task_type="CAUSAL_LM")
        config.base_fingerprint = base_fingerprint(model)
        return get_peft_model(model, config)


@final
class AsymLora(Adapter):
    """HydraLoRA (Tian et al. 2024, arXiv:2404.19245), the paper's AsymLoRA: one A, several B, a router in every layer.

    y = W0 x + s sum_i softmax(W_r x)_i B_i A x, dense over all B, trained with them. One dropout serves all B (the
    authors draw one for each).
    """

    kind: Literal["asym_lora"] = "asym_lora"
    r: Count = Field(8, ge=1, description="Rank of A and of every B.")
    alpha: float = Field(16, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of A.")
    experts: Count = Field(4, ge=2, description="Number of B matrices.")
    target_modules: Targets = Field(None, description="Linear layers to adapt; all of the blocks' by default.")

    negates: ClassVar[bool] = True

    def attach(self, model: Any, run: Settings, beginning: Beginning) -> Any:
        """Put the adapter on a loaded model: an `AlterConfig` with router="dense"."""
        return attach_alter(
            model,
            OWN_FIELDS | {"alter_dropout": "dropout"},
            r=self.r,
            alter_alpha=self.alpha,
            alter_dropout=self.dropout,
            num_forget_experts=self.experts - 1,
            target_modules=self.target_modules,
            router="dense",
        )

    def card(self, run: Settings, title: str | None, names: Sequence[str]) -> Card:
        about = f"{titled(title)}adapter.kind {self.kind}."
        return peft_card("Adapter", run, about, FINGERPRINT, UNMERGED)


@final
class BoundedLora(Adapter):
    """LoRA whose update is squashed element by element (Stable Forgetting, arXiv:2509.24166).

    W = W0 + phi(frequency * s B A) / gain, a dense matrix at every step. Where the two constants stand is a reading:
    the paper's code is not public.
    """

    kind: Literal["bounded_lora"] = "bounded_lora"
    r: Count = Field(8, ge=1, description="Rank.")
    alpha: float = Field(16, gt=0, description="The update is scaled by alpha / r before it is squashed.")
    bound: Literal["sine", "tanh"] = Field("sine", description="The function phi.")
    frequency: float = Field(1.0, gt=0, description="Multiplies the update before phi.")
    gain: float = Field(1.0, gt=0, description="Divides it after phi: no element exceeds 1 / gain.")
    target_modules: Targets = Field(
        ["gate_proj", "up_proj", "down_proj"], description="Linear layers to adapt; the MLP's of Llama by default."
    )

    def check(self, run: Settings) -> None:
        if run.negate is not None:
            raise ValueError(
                "`negate` cannot undo a bounded update: phi(-n x) is not -n phi(x); take `adapter.kind` lora"
            )
        super().check(run)

    def attach(self, model: Any, run: Settings, beginning: Beginning) -> Any:
        """Put the adapter on a loaded model: an `AlterConfig` with router="static" and a bound."""
        # without the retention expert, one expert is left: a plain LoRA
        return attach_alter(
            model,
            OWN_FIELDS | {"bound": "bound", "bound_frequency": "frequency", "bound_gain": "gain"},
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
        about = f"{titled(title)}adapter.kind {self.kind}."
        return peft_card("Adapter", run, about, FINGERPRINT, UNMERGED)
