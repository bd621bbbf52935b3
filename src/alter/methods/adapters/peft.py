"""PEFT's own adapters, each by its PEFT configuration."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, final

from pydantic import Field, field_validator

from alter.core import UserError, nearest
from alter.methods.adapters.base import Adapter, Beginning, Settings
from alter.methods.places import target_names

CANNOT = {
    "ADALORA": "whose ranks are dealt out anew after every step by a call that its own training loop makes: take LORA",
    "ADAPTION_PROMPT": "whose wrapper calls the model past the hooks that read the loss: take LORA",
    "POLY": "which wants the number of a task beside each row: take LORA",
    "XLORA": "which mixes LoRAs that are trained already: take LORA",
    "ALTER": "which adapter.kind alter trains, with its router and its experts",
}
"""Types that no run here can train, and why."""

MOVES = ("pissa", "olora", "corda", "loftq")
"""Starts of LoRA (or what they begin with) that take what the adapter begins with out of the base."""
FROM_DATA = ("eva", "lora_ga")
"""Starts of LoRA that PEFT computes of rows which nobody gives it here; it then begins at random, as plain LoRA does."""

OWN_PLACES = ("SHADOW", "TRAINABLE_TOKENS")
"""Types that do not go on linear layers, and find their modules themselves."""


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
        from peft import PromptLearningConfig
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

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
        if name in CANNOT:
            raise ValueError(f"config.peft_type is {name}, {CANNOT[name]}")
        names = [field.name for field in dataclasses.fields(known[name])]
        unknown = next((key for key in given if key not in names), None)
        if unknown is not None:
            raise ValueError(
                f"config.{unknown} is no setting of PEFT's {known[name].__name__}.{nearest(unknown, names)}"
            )
        _check_start(given.get("init_lora_weights"))
        return {**given, "peft_type": name}

    def attach(self, model: Any, run: Settings, beginning: Beginning) -> Any:
        """Put the adapter on a loaded model; `target_modules` are all of the blocks' linear layers where it takes any.

        Raises:
            UserError: PEFT refuses the configuration for this model.
        """
        from peft import PeftType, get_peft_model
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        settings = {"task_type": "CAUSAL_LM", **self.config}
        name = settings.pop("peft_type")
        made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)]
        taken = [field.name for field in dataclasses.fields(made)]
        linear = "target_modules" in taken and "feedforward_modules" not in taken and name not in OWN_PLACES
        if linear and not settings.get("target_modules"):
            settings["target_modules"] = target_names(model, None)
        try:
            return get_peft_model(model, made(**settings))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(
                f"PEFT refuses `adapter.config` for this model: {str(error).splitlines()[0]}. See the documentation of its "
                f"{made.__name__}."
            ) from error


def _check_start(start: Any) -> None:
    """Refuse starts of LoRA under which the model without the adapter is not the one before unlearning, or that would be others.

    Raises:
        ValueError: such a start.
    """
    name = str(start).lower()
    if name.startswith(MOVES):
        raise ValueError(
            f"config.init_lora_weights is {start}, which takes the adapter's start out of the base's weights: without the adapter the model "
            "would not be the one from before unlearning, which references are computed with. Leave it out, or take `adapter.kind` lora with "
            "an `initializer`, which keeps the base whole"
        )
    if name in FROM_DATA:
        raise ValueError(
            f"config.init_lora_weights is {start}, which PEFT computes of rows in a pass of its own that is not made here: it would be plain "
            "LoRA under another name. Leave it out, or take `adapter.kind` lora with an `initializer`"
        )
