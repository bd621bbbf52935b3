"""One expert of a mixture-of-experts model, and the router that leads to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from pydantic import Field, PrivateAttr

from alter.core import UserError
from alter.data import for_others
from alter.methods.adapters.base import Adapter, Beginning, Settings
from alter.methods.adapters.cards import Card

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from alter.models import Former


@final
class OneExpert(Adapter):
    """SEUF, first UOE (arXiv:2411.18797, from the paper: its code is not to be had): the expert that forget rows go to most.

    Of all blocks' experts the one with the largest affinity to the forget rows trains (`attributed`, the paper's eq. 2), with
    the router of its block; everything else stays. To the loss comes alpha |g - e|^2 (eq. 3), with g the router's softmax and
    e the one-hot vector of the expert: the router must not lead elsewhere instead. Eq. 3 is of one token; this is the mean
    over the forget rows' tokens, and g all experts' scores: with those outside the top K set to zero, as in eq. 2, an expert
    that has dropped out would have no gradient back. It goes with every objective; weight decay is the router's alone.
    """

    kind: Literal["expert"] = "expert"
    alpha: float = Field(1.0, ge=0, description="Weight of the term that keeps the router on the expert.")
    target: tuple[int, int] | None = Field(
        None, description="Block and expert to train; by default those that forget rows go to most."
    )

    result: ClassVar[Literal["adapter", "model"]] = "model"
    is_seen: ClassVar[bool] = False
    # router logits [tokens, experts] of the last forward
    _routed: list[Any] = PrivateAttr(default_factory=list)

    def check(self, run: Settings) -> None:
        super().check(run)
        if run.quantization is not None:
            raise ValueError(
                f"`quantization` {run.quantization} freezes the weights, one expert of which `adapter.kind` expert trains: leave "
                "`quantization` out"
            )

    @property
    def expert_to_find(self) -> bool:
        return self.target is None

    def check_model(self, base: Any, run: Settings, former: Former | None) -> None:
        found = mixtures(base)
        if self.target is not None:
            block, expert = self.target
            if block not in found or expert >= len(found[block].gate.weight):
                raise UserError(
                    f"`adapter.target` is block {block} and expert {expert}; the blocks with experts are "
                    f"{', '.join(map(str, found))}, with {len(next(iter(found.values())).gate.weight)} experts each."
                )

    def check_continues(self, run: Settings) -> None:
        """Accept all settings: the result is a model like any other."""

    def needs_whole_model(self) -> str | None:
        return "adapter.kind expert"

    def dtype(self, given: str) -> str:
        # small steps would be lost in the rounding of 16-bit weights
        return "float32" if given == "auto" else given

    def attach(self, model: Any, run: Settings, beginning: Beginning) -> Any:
        """Switch gradients on for the expert's weights and its router's, and off for all others."""
        assert self.target is not None
        block, expert = self.target
        mixture = mixtures(model)[block]
        model.requires_grad_(False)
        mixture.gate.weight.requires_grad_(True)
        for weight in mixture.experts.parameters():
            weight.requires_grad_(True)
            weight.register_hook(lambda grad: _only(grad, expert))
        mixture.gate.register_forward_hook(self._keep)
        return model

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._routed[:] = [_logits(module, inputs, output)]

    def parameter_groups(self, named: Sequence[tuple[str, nn.Parameter]], run: Settings) -> list[dict[str, Any]]:
        # decay would reach the other experts, which lie in the same tensors
        routers = [p for name, p in named if name.endswith("gate.weight")]
        experts = [p for name, p in named if not name.endswith("gate.weight")]
        rate = self.learning_rate(run)
        return [
            {"params": routers, "lr": rate, "weight_decay": run.weight_decay},
            {"params": experts, "lr": rate, "weight_decay": 0.0},
        ]

    def term(self, forget: Tensor) -> Tensor | None:
        """Return alpha times the mean over forget tokens of |g - e|^2: this process's share of the mean over all."""
        import torch

        from alter.methods.objectives import mean_or_zero

        if not self.alpha:
            return None
        assert self.target is not None
        scores = torch.softmax(self._routed[-1].float(), -1)[forget.reshape(-1)]
        wanted = torch.nn.functional.one_hot(torch.tensor(self.target[1]), scores.shape[-1]).to(scores)
        return self.alpha * mean_or_zero((scores - wanted).square().sum(-1))

    def card(self, run: Settings, title: str | None, names: Sequence[str]) -> Card:
        block, expert = self.target or ("?", "?")
        text = (
            f"{title or 'ALTER'}; adapter.kind expert: these are the model's own weights, of which expert {expert} of block "
            f"{block} and that block's router have changed. `AutoModelForCausalLM.from_pretrained` loads them."
        )
        return Card("transformers", f"{run.model}, made to forget {for_others(run.forget)}", text)


def _only(grad: torch.Tensor, expert: int) -> torch.Tensor:
    """Zero the gradient [experts, ...] of all experts but one."""
    kept = grad.new_zeros(grad.shape)
    kept[expert] = grad[expert]
    return kept


def mixtures(model: Any) -> dict[int, Any]:
    """Return each block's mixture of experts by the block's number: modules with `gate` and `experts`.

    Raises:
        UserError: the model has none whose experts' weights lie in tensors [experts, ...].
    """
    from alter.methods.places import blocks

    place, count = blocks(model)
    found = {}
    for number in range(count):
        for module in model.get_submodule(f"{place}.{number}").modules():
            experts, gate = getattr(module, "experts", None), getattr(module, "gate", None)
            weight = getattr(gate, "weight", None)
            if experts is None or weight is None:
                continue
            weights = list(experts.parameters())
            if weights and all(w.dim() == 3 and len(w) == len(weight) for w in weights):
                found[number] = module
    if not found:
        raise UserError(
            f"`adapter.kind` expert trains one expert of a mixture of experts, and {type(model).__name__} has none that it knows: "
            "take a model such as Mixtral or Qwen-MoE, or `adapter.kind` full."
        )
    return found


def _logits(gate: Any, inputs: Any, output: Any) -> Tensor:
    """Return a router's logits [tokens, experts] from what went in and came out of it.

    The first of a router's outputs is logits or their softmax, according to the version of transformers: not read.
    """
    from torch.nn.functional import linear

    if isinstance(output, tuple):
        return linear(inputs[0].reshape(-1, gate.weight.shape[-1]), gate.weight)
    return output.reshape(-1, output.shape[-1])  # type: ignore[no-any-return]


def attributed(
    model: Any, rows: Sequence[Any], *, pad_token_id: int, most: int = 100_000, seed: int = 0
) -> dict[int, Tensor]:
    """Compute each block's affinity [experts] to rows (float64): a token's router score, averaged in each row, then over rows.

    As in SEUF's eq. 2, a score is the router's softmax where the expert is among the token's top K, and else zero.

    Args:
        model: the untouched model.
        rows: encoded forget rows.
        pad_token_id: fills up shorter rows.
        most: rows are drawn until they have so many tokens.
        seed: of the draw.
    """
    import random

    import torch

    from alter.data import Collator, batches_by_length

    found = mixtures(model)
    total = {n: torch.zeros(len(m.gate.weight), dtype=torch.float64, device=model.device) for n, m in found.items()}
    seen: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(gate: Any, inputs: Any, output: Any) -> None:
            seen[number] = _logits(gate, inputs, output)

        return hook

    drawn: list[Any] = []
    tokens = 0
    for index in random.Random(seed).sample(range(len(rows)), len(rows)):
        if tokens >= most:
            break
        drawn.append(rows[index])
        tokens += len(rows[index].input_ids)
    handles = [module.gate.register_forward_hook(keep(number)) for number, module in found.items()]
    collate, per_token = Collator(pad_token_id), model.config.get_text_config().num_experts_per_tok
    try:
        with torch.no_grad():
            for group in batches_by_length([len(row.input_ids) for row in drawn], 8192):
                batch = collate([{"input_ids": drawn[i].input_ids} for i in group])
                batch = {name: value.to(model.device) for name, value in batch.items()}
                model(**batch, use_cache=False, logits_to_keep=1)
                real = batch["attention_mask"].bool()
                share = (real / real.sum(-1, keepdim=True).double()).reshape(-1, 1)
                for number, logits in seen.items():
                    scores = torch.softmax(logits.double(), -1)
                    best = scores.topk(per_token, -1)
                    total[number] += (torch.zeros_like(scores).scatter(-1, best.indices, best.values) * share).sum(0)
    finally:
        for handle in handles:
            handle.remove()
    return {number: (value / len(drawn)).cpu() for number, value in total.items()}
