"""Second moments of what linear layers read: which directions of their inputs some text uses, and how much."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


class InputMoments:
    """Sums of w x x^T over the inputs x of layers, with w what each token counts.

    Attributes:
        sums: [in, in] of each layer, in float64 on the layer's device.
        total: sum of w over the tokens of all passes.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        self.layers = dict(layers)
        self.sums = {
            name: torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=layer.weight.device)
            for name, layer in layers.items()
        }
        self.total = 0.0

    @contextmanager
    def listening(self, weights: Tensor) -> Iterator[None]:
        """Inside the block a pass over a batch is added; `weights` [B, T] are what its tokens count, 0 for padding."""
        self.total += float(weights.sum())
        counted = weights.reshape(-1, 1).float()
        # queries, keys and values read the same tensor
        last: list[tuple[Tensor, Tensor]] = []

        def hook(name: str) -> Any:
            def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                if not last or last[0][0] is not inputs[0]:
                    read = inputs[0].detach().flatten(0, -2).float()
                    used = counted.to(read.device)
                    last[:] = [(inputs[0], (read.t() @ (used * read)).double())]
                self.sums[name] += last[0][1].to(self.sums[name].device)

            return add

        handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
