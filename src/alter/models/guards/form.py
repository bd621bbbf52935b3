"""The interface of guards: a folder with `inference.json`, and a causal language model around a base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from alter.adapter import base_fingerprint, same_base
from alter.core import UserError, as_input

FORM_FILE = "inference.json"
"""In an adapter's folder: which form it is, and its settings."""
Form = tuple[dict[str, Any], dict[str, dict[str, Tensor]]]
"""What `load_form` needs besides the LoRA: settings, and tensors by file."""


class Guard(PreTrainedModel, GenerationMixin, ABC):
    """A causal language model around another that keeps it from saying what is to be forgotten.

    It scores, generates, is served and attacked like any model, with one cache for all that it keeps, and
    `disable_adapter` gives the base, bit for bit. A kind sets `kind`, implements `read` and `unlearned`, joins by the
    decorator `alter.models.guards.guard`, and overrides `decide` if it treats prompts differently.

    Args:
        base: the untouched model, or one whose layers the guard switches.
    """

    kind: ClassVar[str]
    """The kind's name in `inference.json`."""
    decides: ClassVar[bool] = False
    """Whether it looks at the prompt first (`decide`); the decision holds for the whole answer."""
    answers_alone: ClassVar[bool] = False
    """Whether it acts on what follows a prompt alone, so that the probabilities of the prompt's own tokens are the base's."""
    reads_text: ClassVar[bool] = False
    """Whether it needs the model's tokenizer."""
    tokenizer: Any = None
    """The model's tokenizer, for guards that read text; whoever loads the guard sets it."""

    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, base: Any) -> None:
        super().__init__(base.config)
        self.base = base
        self.generation_config = base.generation_config
        self.enabled = True
        # the first pass of assisted decoding holds guesses behind the prompt: transformers refuses it then
        if self.decides:
            self._is_stateful = True

    @classmethod
    @abstractmethod
    def read(cls, base: Any, path: Path, settings: dict[str, Any]) -> Guard:
        """Make the guarded model.

        Args:
            base: the loaded base model.
            path: the folder that the guard was saved to.
            settings: what its `inference.json` says.

        Raises:
            UserError: a file is missing, broken, or of another version.
        """

    @abstractmethod
    def unlearned(self, inputs: dict[str, Any], cache: DynamicCache | None, decision: Tensor | None) -> Any:
        """Return the guarded model's output, with `logits` and, if `inputs` ask for them, `hidden_states`.

        Args:
            inputs: of the base's forward pass.
            cache: takes what has to be kept for the next token.
            decision: what `decide` found for each row, if it `decides`.
        """

    def untouched(self, inputs: dict[str, Any], cache: DynamicCache | None) -> Any:
        """Return the base's output."""
        return self.base(**inputs, **as_input(cache))

    def decide(self, ids: Tensor, mask: Tensor | None, prompts: Sequence[int] | None = None) -> Tensor:
        """Return what the guard makes of each row, [B]; of a guard that `decides`.

        Args:
            ids: [B, T] tokens of a first call.
            mask: [B, T] attention mask; None: all count.
            prompts: how many of each row's tokens were asked, where more follows them than a user could have given; None: all.
        """
        raise NotImplementedError(f"{type(self).__name__} does not look at prompts")

    def get_input_embeddings(self) -> nn.Module:
        """Return the base's."""
        embeddings: nn.Module = self.base.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> Any:
        """Return the base's."""
        return self.base.get_output_embeddings()

    def get_decoder(self) -> Any:
        """Return the base's."""
        return self.base.get_decoder()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block this is the untouched base."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        decision: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits at the positions that `logits_to_keep` names, as transformers' models give them.

        Args:
            decision: what `decide` gave for these rows; None: that of the first call with this cache, or what it gives now.

        Raises:
            UserError: the cache is not one that grows, or was filled by another model, or embeddings are given for tokens.
        """
        if inputs_embeds is not None:
            raise UserError("This model looks at the tokens of its input: give input_ids, not inputs_embeds.")
        # transformers calls it `past_key_values`, and from 5.24 on `cache`
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        if cache is not None and type(cache) is not DynamicCache:
            raise UserError("This model generates with a growing cache only: leave cache_implementation out.")
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": use_cache,
            "output_hidden_states": output_hidden_states,
            "logits_to_keep": logits_to_keep,
        }
        if not self.enabled:
            out = self.untouched(inputs, cache)
        else:
            if self.decides and decision is None:
                decision = self._decision(inputs, cache)
            out = self.unlearned(inputs, cache, decision)
        loss = None
        if labels is not None:
            loss = self.base.loss_function(logits=out.logits, labels=labels, vocab_size=out.logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=out.logits, hidden_states=out.hidden_states, **as_input(cache))

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Prepare the inputs of a step of `generate`, as transformers' models do.

        Raises:
            UserError: the guard keeps in the cache what it knows of the prompt, and `use_cache` is False: at every token it would
                take prompt and answer so far for the prompt, or not act at all.
        """
        if self.enabled and (self.decides or self.answers_alone) and kwargs.get("use_cache") is False:
            raise UserError(
                "`use_cache` is False, but this guard keeps in the cache what it knows of the prompt: leave `use_cache` out."
            )
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def _decision(self, inputs: dict[str, Any], cache: DynamicCache | None) -> Tensor:
        """Return the decision that the first call stored in this cache, behind the base's keys and values; else make it."""
        kept = None if cache is None else layers_behind(cache, self.config.num_hidden_layers, 1, OfPrompt)[0]
        if kept is not None and kept.is_initialized:
            stored: Tensor = kept.keys[:, 0, 0, 0]
            return stored
        if cache is not None and cache.get_seq_length():
            raise UserError(
                "The cache holds tokens that this model has not read, so nothing is known of the prompt: start without."
            )
        decision = self.decide(inputs["input_ids"], inputs["attention_mask"])
        if kept is not None:
            kept.update(*[decision.view(-1, 1, 1, 1)] * 2)
        return decision


def places(mask: Tensor) -> Tensor:
    """Return each token's place in its row [B, T], counted from the first that the mask [B, T] does not hide.

    A guard that asks the base by itself gives them as positions: of a row that is padded on the left, a model with learnt positions
    would read another prompt otherwise.
    """
    return (mask.cumsum(1) - 1).clamp(min=0).long()


class OfPrompt(DynamicLayer):
    """A cache layer of what is known of the prompt, which stays when tokens after it are taken back."""

    def crop(self, *_: Any) -> None:
        """Keep all."""


def layers_behind(cache: DynamicCache, blocks: int, count: int, kind: type[DynamicLayer] = DynamicLayer) -> list[Any]:
    """Return the `count` layers of a cache behind the base's; operations on the cache's rows act on them too."""
    while len(cache.layers) < blocks + count:
        # a cache that was made without a configuration has no layers yet: the first ones are the base's
        cache.layers.append(DynamicLayer() if len(cache.layers) < blocks else kind())
    layers: list[Any] = cache.layers
    return layers[blocks:]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors that a guard looks at prompts with.

    Raises:
        UserError: the file is missing or broken, or holds NaN or infinite values, with which a guard would recognise nothing.
    """
    try:
        tensors: dict[str, Tensor] = load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}): copy the guard's whole folder.") from None
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise UserError(
                f"{file} is broken: {name} holds NaN or infinite values, so that it would hold nothing back. Make it again."
            )
    return tensors


def is_form(folder: str) -> bool:
    """Tell whether an adapter's folder holds an inference form."""
    return (Path(folder).expanduser() / FORM_FILE).is_file()


def lora_folder(folder: str) -> Path:
    """Return the folder of the LoRA in an adapter's folder: `lora` for an inference form, else the folder itself."""
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
