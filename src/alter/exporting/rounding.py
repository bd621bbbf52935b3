"""Rounding to 4 and 5 bits that keeps what a layer computes, so that a small change of weights is not rounded away.

The nearest step of each weight by itself loses every change that is smaller than half a step, and with it what a model was
made to forget. Here the error of each column is made up for by the columns after it, weighted by how the layer's inputs go
together (GPTQ: Frantar et al. 2023, arXiv:2210.17323), on the grids of llama.cpp's formats.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from alter.core import progress
from alter.data import Collator, batches_by_length
from alter.inference import InputMoments, evaluating

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCK = 32
"""Neighbouring weights of a row that share a scale, in all of these formats."""

BATCH_TOKENS = 2048
"""Padded tokens in one pass over the rows."""

BITS = {"q4_0": 4, "q4_1": 4, "q5_0": 5, "q5_1": 5}
"""Formats on whose grids weights are rounded, and the bits of a code."""

DAMPING = 0.01
"""Share of the inputs' mean square that is added to each square, so that the moments can be inverted (GPTQ's value)."""


@dataclass(frozen=True)
class Rounded:
    """A matrix on a format's grid: `scale` * `codes` + `offset`, a scale and an offset for 32 weights of a row.

    Attributes:
        codes: [O, I], whole numbers from 0 to 2^bits - 1.
        scale: [O, I / 32], float16.
        offset: [O, I / 32], float16; of the formats without one -2^(bits - 1) * scale.
        form: name of the format.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    form: str

    def values(self) -> Tensor:
        """Return the weights, [O, I] in float32."""
        spread = (each.float().repeat_interleave(BLOCK, 1) for each in (self.scale, self.offset))
        scale, offset = spread
        return scale * self.codes.float() + offset

    def rows(self, order: Tensor) -> Rounded:
        """Return the matrix with its rows in another order."""
        return Rounded(self.codes[order], self.scale[order], self.offset[order], self.form)

    def packed(self) -> np.ndarray:
        """Return the bytes of a GGUF file, [O, bytes of a row]: of each block scale, offset, fifth bits, pairs of low bits."""
        count = self.codes.shape[0]
        codes = self.codes.to(torch.uint8).reshape(count, -1, BLOCK).numpy()
        low, half = codes & 15, BLOCK // 2
        parts = [_bytes(self.scale)]
        if self.form.endswith("_1"):
            parts.append(_bytes(self.offset))
        if BITS[self.form] == 5:
            parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
        parts.append(low[..., :half] | (low[..., half:] << 4))
        return np.concatenate(parts, axis=-1).reshape(count, -1)


def _bytes(numbers: Tensor) -> np.ndarray:
    return numbers.to(torch.float16).numpy()[..., None].view(np.uint8)


def _grid(block: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Return scale and offset [O] of blocks [O, 32], as llama.cpp chooses them, in float16 as they are stored."""
    top = 2 ** BITS[form] - 1
    if form.endswith("_1"):
        low, high = block.amin(1), block.amax(1)
        return ((high - low) / top).half(), low.half()
    # the largest weight is a step itself, whatever its sign
    largest = block.gather(1, block.abs().argmax(1, keepdim=True))[:, 0]
    scale = (largest / -(2 ** (BITS[form] - 1))).half()
    return scale, -(2 ** (BITS[form] - 1)) * scale


def rounded(weight: Tensor, moments: Tensor, form: str) -> Rounded:
    """Round a matrix so that its outputs on inputs of these second moments change little.

    Column after column goes to the nearest step of its block's grid; with U the upper Cholesky factor of the inverse
    moments, the columns k after column j become w_k - (w_j - q_j) U_jk / U_jj.

    Args:
        weight: [O, I]; I divides into blocks of 32.
        moments: sum or mean of x x^T over the layer's inputs x, [I, I].
        form: one of `BITS`.
    """
    left = weight.detach().double().clone()
    size = left.shape[1]
    moments = moments.double()
    damped = moments + torch.eye(size, dtype=torch.float64) * (DAMPING * moments.diagonal().mean()).clamp_min(1e-12)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    codes = torch.empty(left.shape, dtype=torch.uint8)
    scales, offsets = [], []
    for start in range(0, size, BLOCK):
        stop = start + BLOCK
        block = left[:, start:stop]
        scale, offset = _grid(block, form)
        errors = torch.empty_like(block)
        for j in range(start, stop):
            column = left[:, j]
            step = torch.where(scale == 0, torch.ones_like(scale), scale).double()
            code = ((column - offset.double()) / step).round().clamp(0, 2 ** BITS[form] - 1)
            error = (column - (scale.double() * code + offset.double())) / upper[j, j]
            left[:, j + 1 : stop] -= error[:, None] * upper[j, j + 1 : stop]
            codes[:, j], errors[:, j - start] = code.to(torch.uint8), error
        left[:, stop:] -= errors @ upper[start:stop, stop:]
        scales.append(scale)
        offsets.append(offset)
    return Rounded(codes, torch.stack(scales, 1), torch.stack(offsets, 1), form)


def calibration(sources: Sequence[Sequence[list[int]]]) -> tuple[list[list[int]], list[float]]:
    """Return all rows [ids] and what each token of a row weighs, so that every source has the same share."""
    rows = [row for source in sources for row in source]
    weights = [1 / sum(map(len, source)) for source in sources for _ in source]
    return rows, weights


def round_blocks(
    model: Any,
    rows: Sequence[list[int]],
    weights: Sequence[float],
    form: str,
    pad_token_id: int,
    fine: Container[str] = (),
) -> dict[str, Rounded]:
    """Round the matrices of a model's blocks in place, block after block, each on what the rounded blocks before it put out.

    Args:
        model: its weights become the rounded ones.
        rows: token ids, on whose inputs the layers are to compute what they did.
        weights: what each token of a row counts in the moments.
        form: one of `BITS`.
        pad_token_id: fills rows up.
        fine: names of matrices that stay as they are.

    Returns:
        The matrices by the name of their weight in the state dict; those whose rows do not divide into blocks are left.
    """
    collate = Collator(pad_token_id)
    batches = []
    for numbers in batches_by_length([len(row) for row in rows], BATCH_TOKENS):
        given = collate([{"input_ids": rows[i], "labels": rows[i]} for i in numbers])
        batches.append((given, torch.tensor([weights[i] for i in numbers])[:, None] * given["attention_mask"]))
    device = next(model.parameters()).device
    blocks = _blocks(model)
    found: dict[str, Rounded] = {}
    with evaluating(model):
        calls = [_calls(model, blocks, given, device) for given, _ in batches]
        states = [call[0] for call in calls]
        for k, (name, block) in enumerate(progress(blocks, total=len(blocks), label="rounding")):
            layers = {
                weight: layer
                for own, layer in block.named_modules()
                if isinstance(layer, torch.nn.Linear)
                and layer.weight.shape[1] % BLOCK == 0
                and (weight := f"{name}.{own}.weight") not in fine
            }
            moments = InputMoments(layers)
            for (_, share), call, state in zip(batches, calls, states, strict=True):
                with moments.listening(share):
                    block(state, **call[1][k])
            for own, layer in layers.items():
                found[own] = rounded(layer.weight.cpu(), moments.sums[own].cpu(), form)
                layer.weight.copy_(found[own].values())
            states = [_hidden(block(state, **call[1][k])) for call, state in zip(calls, states, strict=True)]
    return found


def _blocks(model: Any) -> list[tuple[str, nn.Module]]:
    """Return the transformer's blocks with their names."""
    inner = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is inner)
    return [(f"{prefix}.layers.{k}".lstrip("."), block) for k, block in enumerate(inner.layers)]


def _hidden(output: Any) -> Tensor:
    """Return the hidden states of what a block returns."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _calls(
    model: Any, blocks: Sequence[tuple[str, nn.Module]], given: dict[str, Tensor], device: torch.device
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Return the first block's input of a batch, and with which further arguments each block is called."""
    first: list[Tensor] = []
    others: list[dict[str, Any]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not first:
            first.append(args[0] if args else kwargs["hidden_states"])
        others.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for _, block in blocks]
    try:
        model.get_decoder()(
            input_ids=given["input_ids"].to(device), attention_mask=given["attention_mask"].to(device), use_cache=False
        )
    finally:
        for handle in handles:
            handle.remove()
    return first[0], others


__all__ = ["BITS", "Rounded", "calibration", "round_blocks", "rounded"]
