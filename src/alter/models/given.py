"""Objects that a caller gives: models and callbacks that cannot be used, and the copy of a model that a command works on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from alter.core import UserError, memory

CAUSAL = "expected a causal language model of transformers, as AutoModelForCausalLM.from_pretrained gives it"


def check_given(model: Any, tokenizer: Any, *, bare: bool) -> None:
    """Refuse a model or a tokenizer in memory that no command can use, before anything is made.

    Args:
        model: what was given in the place of a model's name.
        tokenizer: of that model.
        bare: whether an adapter is made for it, or goes on it, so that it must not have one itself.

    Raises:
        UserError: no model, one without a language-model head, without numbers in it, or with an adapter that is in the way; no
            tokenizer.
    """
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    if not isinstance(model, (PreTrainedModel, PeftModel)):
        raise UserError(f"The model is {_named(model)}; {CAUSAL}, or a name: a folder, a hub id or builtin:NAME.")
    if tokenizer is None:
        raise UserError("A model in memory needs its tokenizer: give tokenizer=...")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(
            f"`tokenizer` is {_named(tokenizer)}; expected a tokenizer of transformers, as AutoTokenizer.from_pretrained gives it."
        )
    if model.config.is_encoder_decoder or not model.can_generate() or model.get_output_embeddings() is None:
        raise UserError(f"The model is {_named(model)}, which gives no next tokens of a text; {CAUSAL}.")
    empty = next((name for name, weight in model.named_parameters() if weight.device.type == "meta"), None)
    if empty is not None:
        raise UserError(f"The model has no numbers in it: {empty} is on the device meta. Load its weights first.")
    if bare and isinstance(model, PeftModel):
        raise UserError(
            f"The model is {_named(model)}, which has an adapter already, and what is made goes on a model without: give "
            "`model.merge_and_unload()`, which folds it in, or the model that it was made for."
        )


def _named(thing: Any) -> str:
    """Name an object by its class, or a class by itself."""
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    what = type(thing).__name__
    return f"{'an' if what[0].lower() in 'aeiou' else 'a'} {what}"


def check_held(name: str) -> None:
    """Refuse the name of a model that was in memory once and is there no longer.

    Raises:
        UserError: says how to go on with what was made of it.
    """
    if name.startswith(memory.PREFIX) and memory.held(name) is None:
        raise UserError(
            f"The model {name} was given in memory, and no folder holds it: give it again, as `model` and `tokenizer`, or save "
            "both with save_pretrained and give that folder; a run's adapter goes with either, as `adapter`."
        )


def copied(inside: tuple[Any, Any], dtype: Any) -> tuple[Any, Any]:
    """Copy a model in memory and its tokenizer, so that changes do not reach the caller's.

    Args:
        inside: both.
        dtype: number format of the copy; "auto" keeps it.

    Raises:
        UserError: another number format is asked of a model that is held in few bits.
    """
    if dtype != "auto" and getattr(inside[0], "is_quantized", False):
        raise UserError(
            f"The model is quantised, and cannot be turned into {str(dtype).removeprefix('torch.')}, in which its own weights would be "
            "trained: train an adapter (`adapter.kind`) and leave `dtype` out, or load the model without quantisation."
        )
    network, tokenizer = copy.deepcopy(inside)
    if dtype != "auto":
        network = network.to(dtype)
    return network, tokenizer


def check_callbacks(callbacks: Any) -> None:
    """Refuse callbacks that transformers would fail on once the model is loaded.

    Raises:
        UserError: they are no list, or one of them is none of transformers'.
    """
    from transformers import TrainerCallback

    given = callbacks if isinstance(callbacks, Sequence) else [callbacks]
    wrong = [each for each in given if not isinstance(each, TrainerCallback)]
    if wrong or given is not callbacks:
        what = _named((wrong or given)[0])
        raise UserError(f"`callbacks` holds {what}; expected a list of objects of transformers' TrainerCallback.")
