"""Load or make the model that `alter finetune` starts from; set its dropout and temperature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from alter.core import UserError, nearest
from alter.training.corpora import train_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from alter.training.finetune import Finetune


def starting_model(settings: Finetune) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model in float32 and its tokenizer, from random weights or from `settings.model`.

    Raises:
        UserError: there is no such model, or `architecture` names no known one.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    transformers.set_seed(settings.seed)
    if settings.architecture:
        architecture: dict[str, Any] = dict(settings.architecture)
        kind = architecture.pop("model_type", None)
        known = list(transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        if kind not in known:
            raise UserError(f"architecture.model_type {kind!r} is unknown.{nearest(str(kind), known)}")
        context = int(architecture.get("max_position_embeddings", settings.max_length))
        tokenizer = train_tokenizer(settings.tokenizer_texts, settings.vocabulary, context)
        config = AutoConfig.for_model(
            kind,
            **architecture,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        unknown = [name for name in architecture if name not in type(config)().to_dict()]
        if unknown:
            near = nearest(unknown[0], type(config)().to_dict())
            raise UserError(f"`architecture.{unknown[0]}` is no setting of a {kind} model.{near}")
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer
    assert settings.model is not None
    from alter.models import load_model

    return load_model(settings.model, dtype="float32", device="cpu", template=settings.chat_template_kwargs)


def add_dropout(model: PreTrainedModel, probability: float) -> None:
    """Hook dropout onto the embeddings during training only, so that the saved model stays a plain one."""
    import torch

    def hook(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, probability, module.training)

    model.get_input_embeddings().register_forward_hook(hook)


def set_attention_dropout(model: PreTrainedModel, probability: float) -> None:
    """Set a model's attention dropout, in its configuration and in the modules that copied the value from there.

    Raises:
        UserError: the architecture has none.
    """
    if not hasattr(model.config, "attention_dropout"):
        raise UserError(f"`attention_dropout` is not supported for {type(model).__name__}; leave it at 0.")
    model.config.attention_dropout = probability
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = probability


def divide_logits(model: PreTrainedModel, temperature: float) -> None:
    """Fold a temperature (Guo et al. 2017) into the gain of the last norm, which the logits are linear in.

    Raises:
        UserError: the architecture's logits are not.
    """
    import torch

    norm = getattr(model.get_decoder(), "norm", None)
    head = model.get_output_embeddings()
    plain = norm is not None and getattr(norm, "weight", None) is not None and getattr(norm, "bias", None) is None
    # gemma's norm multiplies by 1 + weight
    if not plain or head.bias is not None or "gemma" in model.config.model_type:
        raise UserError(f"`temperature` is not supported for {type(model).__name__}; leave it at 1.")
    assert norm is not None
    with torch.no_grad():
        norm.weight /= temperature
