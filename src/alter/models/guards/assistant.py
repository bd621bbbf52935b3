"""Combine the logits of two networks: a base, and an assistant that is subtracted from it (ULD, WHP)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from alter.core import as_input
from alter.models.attach import attach
from alter.models.guards.form import Guard, layers_behind, lora_folder


def first_blocks(model: Any, name: str, count: int) -> Any:
    """Return a model with only the first `count` blocks of the list `name`; all weights are shared, none is copied."""
    small = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    parent, _, last = name.rpartition(".")
    setattr(small.get_submodule(parent), last, nn.ModuleList(list(small.get_submodule(name))[:count]))
    small.config.num_hidden_layers = count
    if getattr(small.config, "layer_types", None):
        small.config.layer_types = small.config.layer_types[:count]
    return small


def difference(base: Tensor, assistant: Tensor, weight: float, plausible: float) -> Tensor:
    """Return z_base - weight * log p_assistant where p_base is at least `plausible` times its largest value, else z_base (ULD).

    (A reading: the authors subtract logits and mask implausible tokens out. The assistant's log-probabilities differ
    from its logits by a constant, and this way every token keeps a probability above 0.)

    Args:
        base, assistant: [..., V] logits.
    """
    wide = base.float()
    likely = wide >= wide.amax(-1, keepdim=True) + torch.tensor(plausible).log().item()
    away = torch.where(likely, torch.log_softmax(assistant.float(), dim=-1), 0.0)
    return (wide - weight * away).to(base.dtype)


def without_rise(base: Tensor, reinforced: Tensor, weight: float) -> Tensor:
    """Return v_base - weight * relu(v_reinforced - v_base), of [..., V] logits (WHP)."""
    wide = base.float()
    return (wide - weight * torch.relu(reinforced.float() - wide)).to(base.dtype)


RULES: dict[str, Callable[[Tensor, Tensor, dict[str, Any]], Tensor]] = {
    "knowledge": lambda base, other, given: difference(base, other, given["weight"], given["plausible"]),
    "rise": lambda base, other, given: without_rise(base, other, given["weight"]),
}
"""How an assistant is taken from the base: by its log-probabilities, or by what its logits exceed the base's."""


class Subtracted(Guard):
    """A model and its assistant as one causal language model: z = RULES[rule](z_base, z_assistant).

    Both keep their keys and values in one cache, the assistant's behind the base's. Hidden states are the base's, which
    the guard leaves as they are.
    """

    kind: ClassVar[str] = "assistant"

    def __init__(self, base: Any, assistant: Any, settings: dict[str, Any]) -> None:
        super().__init__(base)
        self.assistant, self.settings = assistant, settings

    @classmethod
    def read(cls, base: Any, path: Path, settings: dict[str, Any]) -> Subtracted:
        """See `Guard.read`."""
        small = first_blocks(base, settings["list"], settings["blocks"])
        # not merged: the weights are the base's own
        return cls(base, attach(small, str(lora_folder(str(path)))).get_base_model(), settings)

    def unlearned(self, inputs: dict[str, Any], cache: DynamicCache | None, decision: Tensor | None) -> Any:
        """See `Guard.unlearned`."""
        own = None
        if cache is not None:
            own = DynamicCache()
            own.layers = layers_behind(cache, self.config.num_hidden_layers, self.assistant.config.num_hidden_layers)
        out = self.untouched(inputs, cache)
        assistant = self.assistant(**inputs | {"output_hidden_states": None}, **as_input(own)).logits
        out.logits = RULES[self.settings["rule"]](out.logits, assistant, self.settings)
        return out
