"""The loss of `alter finetune`: next-token cross-entropy in float32, each label counted by its weight."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_mean(logits: Tensor, target: Tensor, weights: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return sum_t w_t l_t / sum_t w_t of `weighted_loss` for logits [n, V] of the tokens that have the targets [n]."""
    loss = torch.nn.functional.cross_entropy(logits.float(), target, reduction="none", label_smoothing=label_smoothing)
    return (loss * weights).sum() / weights.sum()


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean next-token cross-entropy over labels, each counted by its weight.

    Computes sum_t w_t l_t / sum_t w_t with l_t = -sum_v q_v log p_v in float32, where q puts 1 - s on the label and s
    evenly on the vocabulary (Szegedy et al. 2016). The logits at position t predict label t + 1.

    Args:
        logits: shape (rows, tokens, vocabulary).
        labels: shape (rows, tokens); -100 where there is none.
        weights: shape (rows, tokens), 0 or more.
        label_smoothing: s.
    """
    target, weight = labels[:, 1:], weights[:, 1:]
    labelled = (target != -100) & (weight > 0)
    return weighted_mean(logits[:, :-1][labelled], target[labelled], weight[labelled], label_smoothing)
