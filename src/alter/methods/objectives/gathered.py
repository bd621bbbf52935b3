"""Log-probabilities of a few tokens, with a backward pass that keeps one tensor of the vocabulary's size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alter.methods.objectives.tokens import wide


class LogProbabilities(torch.autograd.Function):
    """Log-probabilities at some ids [n, m], and of all tokens outside the last `k` of them [n]; of logits [n, V].

    All that objectives ask of a vocabulary goes through here: one [n, V] tensor besides the logits forward and one
    backward, where autograd would keep several. Computed in fp32 (fp64 for fp64 logits).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        # a wide [n, 1] makes the result wide, without a wide copy of the logits
        top = wide(logits.amax(-1, keepdim=True))
        total = (logits - top).exp_().sum(-1, keepdim=True).log_()
        logp = logits.gather(-1, ids) - top - total
        rest_top = rest_total = rest = top.new_zeros(0)
        if k:
            # not as 1 - sum, which would cancel where little is left
            others = logits.scatter(-1, ids[:, -k:], -torch.inf)
            rest_top = wide(others.amax(-1, keepdim=True))
            rest_total = (others - rest_top).exp_().sum(-1, keepdim=True).log_()
            rest = (rest_top - top + rest_total - total)[:, 0]
        ctx.k = k
        ctx.save_for_backward(logits, ids, top, total, rest_top, rest_total)
        return logp, rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logp: Tensor, of_rest: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, top, total, rest_top, rest_total = ctx.saved_tensors
        share = -of_logp.sum(-1, keepdim=True)
        if ctx.k:
            share = share - of_rest[:, None]
        grad = (logits - top).sub_(total).exp_().mul_(share)
        if ctx.k:
            others = (logits - rest_top).sub_(rest_total).exp_().mul_(of_rest[:, None])
            grad.add_(others.scatter_(-1, ids[:, -ctx.k :], 0.0))
        return grad.scatter_add_(-1, ids, of_logp).to(logits.dtype), None, None
