"""A linear layer with masked weight gradients, by token and by block of inputs: gradient isolation (ALTER Eq. 5)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alter.adapter.plan import Plan, Products


class _MaskedWeightGradient(torch.autograd.Function):
    """y = x W^T with weight gradient dY^T (X ⊙ M); the gradient of x is not masked.

    x is [..., in] and W [out, in], or x [B, T, in] and W [B, out, in]. M is [..., E] bool, each entry covering an E-th of
    the columns `first` to `last` of x; the weight's other columns do not learn, and nothing is computed for them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor, first: int, last: int) -> Tensor:
        # the gradient of W needs only those columns of x
        ctx.save_for_backward(x[..., first:last], weight, mask)
        ctx.around = first, x.shape[-1] - last
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, weight, mask = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
        if ctx.needs_input_grad[1]:
            if mask.shape[-1] == 1:
                # one mask per token: mask the narrower factor, which is cheaper
                if grad.shape[-1] < x.shape[-1]:
                    grad = grad * mask.to(grad.dtype)
                else:
                    x = x * mask.to(x.dtype)
            else:
                grouped = x.unflatten(-1, (mask.shape[-1], -1)) * mask.to(x.dtype).unsqueeze(-1)
                x = grouped.flatten(-2)
            if weight.dim() == 2:
                grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
            grad_weight = grad.mT @ x
            if any(ctx.around):
                grad_weight = F.pad(grad_weight, ctx.around)
        return grad_x, grad_weight, None, None, None


def _by_columns(weight: Tensor) -> None:
    if not weight.is_contiguous() and weight.grad is not None:
        weight.data, weight.grad = weight.data.contiguous(), weight.grad.contiguous()


class MaskedLinear(nn.Linear):
    """A linear layer without bias that can compute on some blocks of its inputs, and take weight gradients from some
    tokens, only.
    """

    def __init__(self, in_features: int, out_features: int, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, bias=False, **kwargs)
        self._hooked: int | None = None

    def lay_out(self, by_expert: bool) -> None:
        """Store the weight input by input, so that each expert's block is contiguous, or else column by column."""
        weight = self.weight
        # a sharded weight (DTensor) or one on the meta device keeps its layout
        if type(weight) is nn.Parameter and weight.dim() == 2 and not weight.is_meta:
            with torch.inference_mode(False), torch.no_grad():
                weight.data = weight.data.t().contiguous().t() if by_expert else weight.data.contiguous()

    def columns_once_trained(self) -> None:
        """Store the weight column by column as soon as it gets a gradient: training in eval mode, too, keeps one layout.

        A fused optimizer goes by places in memory, in the weight as in its own state.
        """
        weight = self.weight
        # a copy of the module has a weight of its own, without the hook
        if type(weight) is nn.Parameter and weight.requires_grad and self._hooked != id(weight):
            self._hooked = id(weight)
            weight.register_post_accumulate_grad_hook(_by_columns)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        blocks: slice | Tensor | Products | None = None,
        width: int = 1,
        base: Tensor | None = None,
        scale: float = 1.0,
        learns: slice | None = None,
        rest: tuple[Plan, Tensor] | None = None,
    ) -> Tensor:
        """Return scale * x W^T, [..., in] -> [..., out], plus `base` [..., out] if it is given.

        Args:
            x: [..., in], or what the chosen blocks read of it.
            mask: [..., E] bool, with E a divisor of in: the weight's gradient counts a token only where it is true. Entry e
                covers the e-th of E equal groups of neighbouring inputs (of those in `learns`, if given). The gradient of
                x is that of a plain linear layer.
            blocks: the blocks of `width` neighbouring inputs that x holds; all others count as zero. A slice, [K] indices, or
                [B, K] indices for each row of x [B, T, K * width]. With `Products`, x [..., width] is multiplied by the
                blocks of its pairs, without gradient.
            width: inputs per block.
            base: added to the result.
            scale: multiplies the product.
            learns: the only ones of these blocks that get a gradient.
            rest: further blocks for a few tokens, and their inputs [..., in]. They are part of this call because FSDP gathers
                the weight at every call of the module, and ranks with other batches would make another number of calls.
        """
        if rest is not None:
            y = self.forward(x, mask, blocks, width, base, scale, learns)
            return self._add_rest(y, *rest, width, scale)
        if isinstance(blocks, Products):
            y = blocks.product(x, self.weight)
            return (
                scale * y.view(*x.shape[:-1], -1) if base is None else torch.add(base, y.view(base.shape), alpha=scale)
            )
        weight = self.weight
        if learns is not None and learns.stop == 0:
            weight, mask = weight.detach(), None
        weight = _columns(weight, blocks, width)
        if mask is not None:
            y = _learn_masked(x, weight, mask, scale, width, learns)
            return y if base is None else base + y.reshape(base.shape)
        if base is not None and base.dim() > 1 and base.dtype == x.dtype == weight.dtype:
            if weight.dim() == 3:
                return torch.baddbmm(base.reshape(*x.shape[:-1], -1), x, weight.mT, alpha=scale).reshape(base.shape)
            flat = torch.addmm(base.flatten(0, -2), x.flatten(0, -2), weight.t(), alpha=scale)
            return flat.view(base.shape)
        x = x if scale == 1.0 else x * scale
        y = F.linear(x, weight) if weight.dim() == 2 else x @ weight.mT
        return y if base is None else base + y.reshape(base.shape)

    def _add_rest(self, y: Tensor, plan: Plan, few: Tensor, width: int, scale: float) -> Tensor:
        """Add the plan's output for experts that few tokens take to y [..., out] at the plan's tokens, in place."""
        assert plan.tokens is not None
        part = self.forward(few, plan.expert_mask, plan.experts, width, None, scale, plan.learns).flatten(0, -2)
        # safe in place: y was just made, and no backward needs its old value
        flat = y.reshape(-1, y.shape[-1]).index_add_(0, plan.tokens.to(y.device), part.to(y.dtype))
        return flat.view(y.shape)


def _columns(weight: Tensor, blocks: slice | Tensor | None, width: int) -> Tensor:
    """Select the chosen blocks of `width` columns each: [out, K * width], or [B, out, K * width] for [B, K] indices; None: all."""
    if isinstance(blocks, slice):
        return weight[:, blocks.start * width : blocks.stop * width]
    if blocks is None:
        return weight
    chosen = weight.t().unflatten(0, (-1, width)).index_select(0, blocks.flatten().to(weight.device))
    columns: Tensor = chosen.reshape(*blocks.shape[:-1], -1, len(weight)).mT
    return columns


def _learn_masked(x: Tensor, weight: Tensor, mask: Tensor, scale: float, width: int, learns: slice | None) -> Tensor:
    """Return scale * x W^T with a masked weight gradient; arguments as in `MaskedLinear.forward`."""
    if torch.is_autocast_enabled(x.device.type):
        # autocast does not reach into autograd functions
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    # scale the narrower factor, which is cheaper
    x = x if scale == 1.0 else x * scale
    first, last = (0, x.shape[-1]) if learns is None else ((learns.start or 0) * width, learns.stop * width)
    product: Tensor = _MaskedWeightGradient.apply(x, weight, mask.to(x.device), first, last)
    return product
