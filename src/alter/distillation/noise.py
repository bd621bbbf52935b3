"""UNDO's noise: perturb the student's weights before it learns from the teacher, so that nothing hidden survives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Tensor, nn


class Noise(BaseModel):
    """Noise on the student's weights before it learns (UNDO; Lee et al. 2025, "Distillation robustifies unlearning")."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    alpha: float = Field(0.0, ge=0, le=1)
    """Share of the weights that is taken away; 0: none. The authors try 0.1 to 0.7."""
    beta: float = Field(0.05, ge=0)
    """Size of the noise put in its place, in units of a Xavier start; the authors try 0.01 to 0.1."""
    vectors: bool = True
    """Also scale vectors (norms, biases), as published. In small models that is nearly all of the damage."""


def xavier(shape: torch.Size, draw: torch.Generator) -> Tensor:
    """Draw a matrix in float32 by Xavier's rule (Glorot and Bengio 2010), uniform within sqrt(6 / (rows + columns)).

    Args:
        shape: [..., rows, columns]; of more than two axes (experts) each matrix is drawn by itself.
        draw: source of the numbers, on the CPU.
    """
    bound: float = (6 / (shape[-2] + shape[-1])) ** 0.5
    return (torch.rand(shape, generator=draw) * 2 - 1) * bound


def add_noise(model: nn.Module, noise: Noise, seed: int) -> None:
    """Perturb all weights in place: (1 - a) W + a b X for matrices, with X as `xavier`; (1 - a) v for vectors, or v as it is.

    A weight that stands in two places (tied embeddings) is damaged once. With `alpha` 0 nothing changes.
    """
    if not noise.alpha:
        return
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() < 2 and not noise.vectors:
                continue
            weight.mul_(1 - noise.alpha)
            if weight.dim() >= 2:
                weight.add_(noise.alpha * noise.beta * xavier(weight.shape, draw).to(weight))
