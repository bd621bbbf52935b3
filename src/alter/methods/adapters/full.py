"""The model's own weights, trained without an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from pydantic import Field

from alter.core import UserError
from alter.data import for_others
from alter.methods.adapters.base import Adapter, Beginning, Settings
from alter.methods.adapters.cards import Card
from alter.methods.places import Share, blocks, blocks_within
from alter.settings import Count

if TYPE_CHECKING:
    from torch import Tensor


@final
class FullWeights(Adapter):
    """The model's own weights, all or some, in float32; the result is a model folder, not an adapter."""

    kind: Literal["full"] = "full"
    modules: list[str] | None = Field(
        None, description="Train only parameters whose name holds one of these, such as mlp.down_proj."
    )
    depth: tuple[Share, Share] | None = Field(
        None, description="Train only the blocks between two shares of the depth, such as 0.0 0.375."
    )

    traced: Count | None = Field(
        None,
        ge=1,
        description="Train so many neighbouring blocks, those whose feed-forward layers carry the forget rows' answers by causal "
        "tracing; objectives then read hidden states after the last of them.",
    )

    negates: ClassVar[bool] = True
    result: ClassVar[Literal["adapter", "model"]] = "model"
    is_seen: ClassVar[bool] = False

    def check(self, run: Settings) -> None:
        super().check(run)
        if self.traced is not None and self.depth is not None:
            raise ValueError("`adapter.traced` finds the blocks that `adapter.depth` gives: leave one out")
        if run.quantization is not None:
            raise ValueError(
                f"`quantization` {run.quantization} freezes the weights, which `adapter.kind` full trains: take `adapter.kind` "
                "lora, or leave `quantization` out"
            )

    @property
    def blocks_to_trace(self) -> int | None:
        return self.traced

    def check_continues(self, run: Settings) -> None:
        """Accept all settings: the result is a model like any other."""

    def dtype(self, given: str) -> str:
        # small steps would be lost in the rounding of 16-bit weights
        return "float32" if given == "auto" else given

    def attach(self, model: Any, run: Settings, beginning: Beginning) -> Any:
        """Switch gradients on for the chosen weights and off for all others.

        Raises:
            UserError: nothing is left to train.
        """
        list_name, count = blocks(model) if self.depth is not None else ("", 0)
        inside = None if self.depth is None else {f"{list_name}.{i}." for i in blocks_within(self.depth, count)}
        chosen = 0
        for name, parameter in model.named_parameters():
            wanted = self.modules is None or any(part in name for part in self.modules)
            wanted = wanted and (inside is None or any(name.startswith(start) for start in inside))
            parameter.requires_grad_(wanted)
            chosen += wanted
        if not chosen:
            endings = sorted({name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_parameters()})
            raise UserError(
                f"`adapter.modules` {self.modules} names no parameter of {type(model).__name__}; its modules end in "
                f"{', '.join(endings)}."
            )
        return model

    def negate(self, weights: Mapping[str, Tensor], times: float, before: Callable[[], Mapping[str, Tensor]]) -> None:
        untouched = before()
        for name, weight in weights.items():
            if name in untouched:
                old = untouched[name].to(weight.device)
                weight.copy_(old - times * (weight - old))

    def card(self, run: Settings, title: str | None, names: Sequence[str]) -> Card:
        text = (
            f"{title or 'ALTER'}; adapter.kind full: these are the model's own weights, changed. "
            "`AutoModelForCausalLM.from_pretrained` loads them."
        )
        return Card("transformers", f"{run.model}, made to forget {for_others(run.forget)}", text)
