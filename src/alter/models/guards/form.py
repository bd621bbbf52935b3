"""What inference forms share: a folder with `inference.json`, and a causal language model around a base."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from alter.adapter.model import base_fingerprint, same_base
from alter.core.errors import UserError

FILE = "inference.json"
"""In an adapter's folder: which form it is, and its settings."""
Form = tuple[dict[str, Any], dict[str, dict[str, Tensor]]]
"""What `load_form` needs besides the LoRA: settings, and tensors by file."""


class FormModel(PreTrainedModel, GenerationMixin):
    """A causal language model around another: it scores and generates, with one cache for all that it keeps."""

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, base: Any) -> None:
        super().__init__(base.config)
        self.base = base
        self.generation_config = base.generation_config
        self.enabled = True

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        return self.base.get_input_embeddings()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block this is the untouched base."""
        self.enabled = False
        try:
            yield
        finally:
            self.enabled = True

    @abstractmethod
    def unlearned(self, inputs: dict[str, Any], cache: DynamicCache | None) -> Tensor:
        """Logits of the unlearned model; what has to be kept for the next token goes into `cache`."""

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
        """Logits at the positions that `logits_to_keep` names, as transformers' models give them.

        Raises:
            UserError: the cache is not one that grows.
        """
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and type(past_key_values) is not DynamicCache:
            raise UserError("This model generates with a growing cache only: leave cache_implementation out.")
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
        logits = self.unlearned(inputs, past_key_values)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


def layers_behind(cache: DynamicCache, blocks: int, count: int) -> list[Any]:
    """The `count` layers of a cache behind the base's: what is done to the rows of the whole is done to them."""
    while len(cache.layers) < blocks + count:
        cache.layers.append(DynamicLayer())
    return cache.layers[blocks:]


def is_form(folder: str) -> bool:
    """Whether an adapter's folder holds an inference form."""
    return (Path(folder).expanduser() / FILE).is_file()


def lora_folder(folder: str) -> Path:
    """Where the LoRA adapter in an adapter's folder is: in `lora` for an inference form, else there."""
    path = Path(folder).expanduser()
    return path / "lora" if is_form(folder) else path


def check_base(settings: Mapping[str, Any], base: Any, folder: str) -> None:
    """Refuse a base that a form was not made for, by its fingerprint.

    Raises:
        UserError: it is another one.
    """
    measured = base_fingerprint(base)
    if settings["base"] and measured and not same_base(settings["base"], measured):
        raise UserError(
            f"{folder} was made for another base model: its fingerprint is {settings['base']}, this model's is {measured}."
        )
