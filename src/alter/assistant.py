"""ULD (Ji et al. 2024, arXiv:2406.08607): a small assistant that knows only what is to be forgotten, subtracted at inference.

The assistant is the first blocks of the model with its own head and a LoRA adapter: it learns the forget set and is
uniform on the retain set. The unlearned model's logits are z_base - weight * log p_assistant wherever the base finds a
token plausible. There is no adapter that does this inside one network, so the result is a model of its own: `load`, which
`alter evaluate` and `alter generate` call for `--adapter` folders that hold an assistant.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from alter.errors import UserError

FILE = "assistant.json"
"""In an adapter's folder: how many blocks the assistant has and how it is subtracted. Its LoRA is in `lora`."""


def first_blocks(model: Any, name: str, count: int) -> Any:
    """The model with only the first `count` blocks of its list `name`; all weights are shared, none is copied."""
    small = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    parent, _, last = name.rpartition(".")
    setattr(small.get_submodule(parent), last, nn.ModuleList(list(small.get_submodule(name))[:count]))
    small.config.num_hidden_layers = count
    if getattr(small.config, "layer_types", None):
        small.config.layer_types = small.config.layer_types[:count]
    return small


def difference(base: Tensor, assistant: Tensor, weight: float, plausible: float) -> Tensor:
    """z_base - weight * log p_assistant where p_base is at least `plausible` times its largest value, else z_base.

    (A reading: the authors subtract logits and mask implausible tokens out. The assistant's log-probabilities differ
    from its logits by a constant, and this way every token keeps a probability above 0.)

    Args:
        base, assistant: [..., V] logits.
    """
    wide = base.float()
    likely = wide >= wide.amax(-1, keepdim=True) + torch.tensor(plausible).log().item()
    away = torch.where(likely, torch.log_softmax(assistant.float(), dim=-1), 0.0)
    return (wide - weight * away).to(base.dtype)


class LogitDifference(PreTrainedModel, GenerationMixin):
    """A model and its assistant as one causal language model, which scores and generates like any other.

    Both keep their keys and values in one cache, the assistant's behind the base's.
    """

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, base: Any, assistant: Any, weight: float, plausible: float) -> None:
        super().__init__(base.config)
        self.base, self.assistant = base, assistant
        self.weight, self.plausible = weight, plausible
        self.generation_config = base.generation_config

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        return self.base.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the difference, at the positions that `logits_to_keep` names, as transformers' models do it.

        Raises:
            UserError: the cache is not one that grows.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        blocks = self.config.num_hidden_layers
        own = None
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            if type(past_key_values) is not DynamicCache:
                raise UserError(
                    "An assistant's model generates with a growing cache only: leave cache_implementation out."
                )
            while len(past_key_values.layers) < blocks + self.assistant.config.num_hidden_layers:
                past_key_values.layers.append(DynamicLayer())
            # the same layer objects: what is done to the rows of the whole cache is done to these
            own = DynamicCache()
            own.layers = past_key_values.layers[blocks:]
        common = {"use_cache": use_cache, "logits_to_keep": logits_to_keep}
        base = self.base(**inputs, **common, past_key_values=past_key_values).logits
        assistant = self.assistant(**inputs, **common, past_key_values=own).logits
        return CausalLMOutputWithPast(
            logits=difference(base, assistant, self.weight, self.plausible), past_key_values=past_key_values
        )


def is_assistant(folder: str) -> bool:
    """Whether an adapter's folder holds an assistant."""
    return (Path(folder).expanduser() / FILE).is_file()


def load(base: Any, folder: str) -> LogitDifference:
    """The unlearned model: a loaded base and the assistant in `folder`.

    Raises:
        UserError: the base has fewer blocks than the assistant needs.
    """
    path = Path(folder).expanduser()
    settings = json.loads((path / FILE).read_text())
    if settings["blocks"] > base.config.num_hidden_layers:
        raise UserError(
            f"The assistant in {folder} has {settings['blocks']} blocks, the model {base.config.num_hidden_layers}: give "
            "the model that it was made for."
        )
    small = first_blocks(base, settings["list"], settings["blocks"])
    # not merged: the weights are the base's own
    assistant = PeftModel.from_pretrained(small, str(path / "lora")).get_base_model()
    return LogitDifference(base, assistant, settings["weight"], settings["plausible"]).eval()
