"""Plain LoRA, optionally started by an initializer or switched by detectors (O3), with its penalties."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import torch
from pydantic import Field

from alter.core import UserError
from alter.methods.adapters.base import Adapter, Beginning, Penalty, Settings
from alter.methods.adapters.cards import Card, guarded_card, peft_card, titled
from alter.methods.initializers import residual_pair
from alter.methods.places import Share, Targets, blocks, blocks_within, target_layers, target_names
from alter.settings import Count

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alter.data import Encoded
    from alter.models import Form, Former


class FirstHalves:
    """AdamW's weight decay of the trained half of initialised LoRA factors: w <- (1 - rate * decay) w before each step.

    The other half is the frozen copy of the start, which must stay as it is.

    Args:
        named: the parameters by name.
        r: rank that is trained: the first r rows of each lora_A, the first r columns of each lora_B.
        decay: the weight decay.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], r: int, decay: float) -> None:
        self.trained = [p[:r] if ".lora_A." in name else p[:, :r] for name, p in named]
        self.decay = decay

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Shrink the trained halves at the optimizer's current rate."""
        with torch.no_grad():
            for half in self.trained:
                half.mul_(1 - optimizer.param_groups[0]["lr"] * self.decay)


@final
class Lora(Adapter):
    """Plain LoRA of PEFT (Hu et al. 2021): A Kaiming-uniform, B zero, or as the run's `initializer` says."""

    kind: Literal["lora"] = "lora"
    r: Count = Field(8, ge=1, description="Rank.")
    alpha: float = Field(16, gt=0, description="The update is scaled by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of A.")
    target_modules: Targets = Field(None, description="Linear layers to adapt; all of the blocks' by default.")
    depth: tuple[Share, Share] | None = Field(
        None, description="Adapt the blocks between two shares of the depth only, such as 0.125 0.25."
    )
    orthogonality: float = Field(
        0.1,
        ge=0,
        description="With start_from: weight of the penalty that keeps A orthogonal to earlier requests' (O3).",
    )
    detector: bool = Field(
        False,
        description="Scale the update for each input by a detector, fitted on forget rows, of what is to be forgotten (O3).",
    )

    negates: ClassVar[bool] = True
    starts_from_factors: ClassVar[bool] = True

    def check(self, run: Settings) -> None:
        super().check(run)
        if self.detector and run.watch.on:
            raise ValueError("watch looks at an adapter that is always on: not with `adapter.detector`")

    def check_experts_only(self, run: Settings) -> None:
        raise ValueError(
            "`experts_only` is for `adapter.kind` alter, `start_from` for that and for `adapter.kind` lora with `adapter.detector`, "
            f"not for lora{'' if self.detector else ' without'}"
        )

    def check_model(self, base: Any, run: Settings, former: Former | None) -> None:
        layers = list(self.layers(base))
        if former is not None:
            former.check(base, layers)

    def needs_whole_model(self) -> str | None:
        return "adapter.detector" if self.detector else None

    @property
    def trained_on(self) -> bool:
        return self.detector

    def former(self, start_from: str | None) -> Former | None:
        if start_from is None:
            return None
        from alter.models import Former

        former = Former.read(start_from)
        if former.settings["initializer"] != "zero":
            raise UserError(
                f"`start_from` is {former.folder}, which started by `initializer.kind` {former.settings['initializer']}: half of "
                "its rank is a frozen copy, so it cannot be trained on. Start from one with `initializer.kind` zero."
            )
        for name, wanted, has in (
            ("r", self.r, former.config["r"]),
            ("alpha", self.alpha, former.config["lora_alpha"]),
        ):
            if wanted != has:
                raise UserError(
                    f"`adapter.{name}` is {wanted:g}, but {former.folder} has {has:g}: give `adapter.{name}` {has:g}."
                )
        return former

    @property
    def merges(self) -> bool:
        return not self.detector

    def check_continues(self, run: Settings) -> None:
        """Accept all settings: the adapter is merged or trained on."""

    def continued(self, adapter: str, merged: Callable[[], str]) -> dict[str, Any]:
        return {"start_from": adapter} if self.detector else super().continued(adapter, merged)

    def layers(self, model: Any) -> dict[str, nn.Linear]:
        """Return the linear layers that the adapter goes on, by name."""
        chosen = None if self.depth is None else blocks_within(self.depth, blocks(model)[1])
        return target_layers(model, target_names(model, self.target_modules), chosen)

    def attach(self, model: Any, run: Settings, beginning: Beginning) -> Any:
        """Put the adapter on a loaded model.

        Started from factors it has twice the rank, and its second half, the negated start, never moves (see
        `alter.methods.initializers`). An earlier adapter fits (`former`, `check_model`).
        """
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
        from transformers.pytorch_utils import Conv1D

        start, former = beginning.factors, beginning.former
        layers = self.layers(model)
        turned = next((name for name, layer in layers.items() if isinstance(layer, Conv1D)), None)
        if start is not None and turned is not None:
            raise UserError(
                f"`initializer.kind` needs nn.Linear layers, but {turned} is a Conv1D: use `initializer.kind` zero, or leave it out "
                "of `adapter.target_modules`."
            )
        doubled = 1 if start is None else 2
        config = LoraConfig(
            r=doubled * self.r,
            lora_alpha=doubled * self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(layers),
            task_type="CAUSAL_LM",
        )
        tuned = get_peft_model(model, config)
        if former is not None:
            set_peft_model_state_dict(tuned, former.weights)
        if start is None:
            return tuned
        with torch.no_grad():
            for name, factors in start.items():
                layer = model.get_submodule(name)
                A, B = residual_pair(factors)
                layer.lora_A["default"].weight.copy_(A)
                layer.lora_B["default"].weight.copy_(B)
        freeze_second_halves(tuned, self.r)
        return tuned

    def parameter_groups(self, named: Sequence[tuple[str, nn.Parameter]], run: Settings) -> list[dict[str, Any]]:
        """Return one group; the frozen halves of initialised factors do not decay."""
        (group,) = super().parameter_groups(named, run)
        return [group | {"weight_decay": 0.0}] if run.initializer.gives_factors else [group]

    def hook_optimizer(
        self, optimizer: torch.optim.Optimizer, named: Sequence[tuple[str, nn.Parameter]], run: Settings
    ) -> None:
        """Decay the trained halves of initialised factors alone (`FirstHalves`)."""
        if run.initializer.gives_factors and run.weight_decay:
            optimizer.register_step_pre_hook(FirstHalves(named, self.r, run.weight_decay))

    def penalty(self, model: Any, run: Settings, away: Mapping[str, Tensor], former: Former | None) -> Penalty | None:
        """Return REGLU's |B^T P|^2 over all layers, or O3's |A_earlier A^T|^2 over all earlier requests, averaged over
        the blocks.
        """
        by_layer: dict[str, dict[str, nn.Parameter]] = {"lora_A": {}, "lora_B": {}}
        for name, parameter in model.named_parameters():
            for kind, found in by_layer.items():
                if f".{kind}." in name:
                    found[name.removeprefix("base_model.model.").partition(f".{kind}.")[0]] = parameter
        if away:
            terms = [(away[name].t().to(p), p, False) for name, p in by_layer["lora_B"].items()]
            return Penalty(run.initializer.weight_away, terms, self.r)
        if former is None:
            return None
        terms = [
            (earlier[f"base_model.model.{name}.lora_A.weight"].to(parameter), parameter, True)
            for earlier in former.snapshots
            for name, parameter in by_layer["lora_A"].items()
        ]
        return Penalty(self.orthogonality / blocks(model)[1], terms, self.r)

    def form(
        self, base: Any, run: Settings, forget: Sequence[Encoded], pad_token_id: int, former: Former | None = None
    ) -> Form | None:
        if not self.detector:
            return None
        from alter.adapter import base_fingerprint
        from alter.models import fit_detector

        settings, files = fit_detector(base, forget, pad_token_id=pad_token_id, seed=run.seed)
        form = settings | {"base": base_fingerprint(base), "initializer": run.initializer.kind}, files
        return form if former is None else former.then(form)

    def card(self, run: Settings, title: str | None, names: Sequence[str]) -> Card:
        if self.detector:
            about = (
                "a LoRA adapter (`lora`), which detectors switch for each input, one for each request so far. "
                "`detector.safetensors` holds mean hidden states of the forget rows: whoever has it can recognise them"
            )
            return guarded_card("Adapter", run, title, about)
        about = f"{titled(title)}adapter.kind {self.kind}."
        if run.initializer.gives_factors:
            about += (
                f" It starts by {run.initializer.kind}: the second half of its rank is the negated start, frozen, in place "
                "of a changed base model, so that the adapter switched off is the original model."
            )
        return peft_card("Adapter", run, about, merging=" It can be merged.")


def freeze_second_halves(model: nn.Module, r: int) -> None:
    """Zero the gradient of all but the first r rows of each lora_A and the first r columns of each lora_B."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            kept = torch.arange(len(parameter), device=parameter.device)[:, None] < r
        elif ".lora_B." in name:
            kept = torch.arange(parameter.shape[1], device=parameter.device)[None, :] < r
        else:
            continue
        parameter.register_hook(lambda grad, kept=kept: grad * kept)
