"""The LoRA of `alter finetune` (`lora_rank`), on a frozen model whose lower blocks run once for each row."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from alter.adapter import first_block
from alter.data import IGNORE, batches_by_length
from alter.logits import Head
from alter.models import multiplies
from alter.training.trunk import trunk_below
from alter.training.weighted import weighted_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PASS_TOKENS = 4096
"""Tokens of one pass through the lower blocks, padding included."""


def add_lora(model: PreTrainedModel, rank: int, alpha: float, from_layer: int | None, precision: str) -> Any:
    """Return the model frozen, with a LoRA (Hu et al. 2022) in float32 on the linear layers of its blocks.

    With precision "bf16" the frozen weights are held in bfloat16, which autocast would otherwise make of them in every step;
    not on a CPU that is slow at it.

    Args:
        from_layer: number of the first block that gets one; None for all.

    Raises:
        UserError: the model has no such block.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    blocks: dict[str, Any] = {"target_modules": "all-linear"}
    if from_layer is not None:
        prefix, first = first_block(model, from_layer, "lora_from")
        pattern = prefix.rstrip(".").rpartition(".")[2]
        number = model.config.get_text_config().num_hidden_layers
        kinds = (torch.nn.Linear, Conv1D)
        linear = [name for name, part in model.named_modules() if isinstance(part, kinds) and prefix in name]
        blocks = {
            "target_modules": sorted({name.rpartition(".")[2] for name in linear}),
            "layers_to_transform": list(range(first, number)),
            "layers_pattern": pattern,
        }
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if precision == "bf16" and multiplies(torch.bfloat16, place):
        model = model.to(torch.bfloat16)
    lora = get_peft_model(
        model,
        LoraConfig(r=rank, lora_alpha=alpha, task_type="CAUSAL_LM", **blocks),
    )
    for parameter in lora.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return lora


class LowerBlocks:
    """The blocks below a LoRA, and their cached output for each row, which no step changes.

    Args:
        model: with a LoRA from block `from_layer`, at least 1, on; without dropout.
        rows: each with `input_ids`.
        bf16: whether passes run under autocast to bfloat16.
    """

    def __init__(self, model: Any, from_layer: int, rows: Sequence[dict[str, Any]], bf16: bool) -> None:
        inner = model.get_base_model()
        prefix, first = first_block(inner, from_layer)
        self.trunk = trunk_below(inner, prefix, first)
        self.states: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        cast = torch.autocast(model.device.type, torch.bfloat16, enabled=bf16)
        lengths = [len(row["input_ids"]) for row in rows]
        with torch.no_grad(), cast, self.trunk.reading(alone=True) as seen:
            for group in batches_by_length(lengths, PASS_TOKENS):
                # padded on the right, which no earlier token sees
                ids = pad_sequence([torch.tensor(rows[number]["input_ids"]) for number in group], batch_first=True)
                inner.get_decoder()(input_ids=ids.to(model.device), use_cache=False)
                for number, states in zip(group, seen.pop().cpu(), strict=True):
                    self.states[number] = states[: lengths[number]].clone()

    def done(self, numbers: torch.Tensor, length: int, device: torch.device) -> AbstractContextManager[None]:
        """Inside the block, passes over these rows, padded on the right to `length`, start from the cached output."""
        states = pad_sequence([self.states[number] for number in numbers.tolist()], batch_first=True)
        states = torch.nn.functional.pad(states, (0, 0, 0, length - states.shape[1]))
        return self.trunk.done(states.to(device))


class Step:
    """A training step of a LoRA: the lower blocks, if any, are left out, and only labelled positions reach the head.

    Args:
        model, from_layer, rows, bf16: as `LowerBlocks` takes them; with from_layer None every block runs.
    """

    def __init__(self, model: Any, from_layer: int | None, rows: Sequence[dict[str, Any]], bf16: bool) -> None:
        self.head = Head(model)
        self.below = None if from_layer is None else LowerBlocks(model, from_layer, rows, bf16)

    def loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        labels: torch.Tensor,
        weights: torch.Tensor,
        numbers: torch.Tensor,
        label_smoothing: float,
    ) -> torch.Tensor:
        """Return what `weighted_loss` gives for the model's logits.

        Args:
            inputs: `input_ids` and `attention_mask` [B, T].
            labels, weights: [B, T].
            numbers: [B] of the rows.
        """
        positions = torch.zeros_like(labels, dtype=torch.bool)
        positions[:, :-1] = (labels[:, 1:] != IGNORE) & (weights[:, 1:] > 0)
        below = nullcontext() if self.below is None else self.below.done(numbers, labels.shape[1], labels.device)
        with below, self.head.reading(positions) as read:
            model(**inputs, use_cache=False)
        after = positions.roll(1, 1)
        return weighted_mean(self.head.logits(read[0]), labels[after], weights[after], label_smoothing)


def save_delta(model: Any, folder: Path, base: str, dtype: torch.dtype) -> None:
    """Write a LoRA alone, its weights in `dtype`, with `base` as the name of the model that it is for."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder, save_embedding_layers=False)
