"""The interface of adapters: check settings, attach to the model, group parameters, save, describe."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict

from alter.methods.adapters.cards import Card, peft_card, titled

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alter.data import Encoded
    from alter.methods.initializers import Factors
    from alter.models import Form, Former


class Settings(Protocol):
    """The settings of a run that adapters read (a structural type of `alter.training.settings.Unlearn`)."""

    model: str
    forget: str
    start_from: str | None
    experts_only: bool
    num_forget_experts: int | None
    phase_one: float
    negate: float | None
    learning_rate: float
    learning_rate_experts: float
    learning_rate_shared: float
    weight_decay: float
    quantization: Any
    initializer: Any
    objective: Any
    retain_objective: Any
    watch: Any
    seed: int


@dataclasses.dataclass(frozen=True)
class Penalty:
    """weight * sum over terms of |C M|_F^2 for constant matrices C and parameters M, which a function views."""

    weight: float
    terms: list[tuple[Tensor, nn.Parameter, bool]]
    r: int

    def __call__(self) -> Tensor:
        """Compute the penalty now; M is lora_B's first r columns, or lora_A's first r rows transposed."""
        parts = [
            (constant @ (parameter[: self.r].t() if transposed else parameter[:, : self.r])).square().sum()
            for constant, parameter, transposed in self.terms
        ]
        return self.weight * torch.stack(parts).sum()


@dataclasses.dataclass(frozen=True)
class Beginning:
    """Inputs that an adapter of a run starts from.

    Attributes:
        names: of the sub-domains.
        factors: where the factors of each layer (by name) start; None: A at random, B zero.
        former: the earlier adapter that is trained on, if one is.
    """

    names: Sequence[str] = ()
    factors: Mapping[str, Factors] | None = None
    former: Former | None = None


class Adapter(BaseModel, ABC):
    """Settings of an adapter kind, and all that a run asks of it.

    A kind sets `kind: Literal["mine"] = "mine"`, implements `attach`, and overrides whatever else differs. The defaults
    describe a PEFT adapter that is always active, such as LoRA.
    """

    model_config = ConfigDict(extra="forbid")

    kind: str
    result: ClassVar[Literal["adapter", "model"]] = "adapter"
    """Name of the folder that the result is saved to."""
    routes: ClassVar[bool] = False
    """Whether tokens have entropies and gates, which are known before training."""
    grows: ClassVar[bool] = False
    """Whether `start_from` loads an adapter that gets new experts."""
    is_seen: ClassVar[bool] = True
    """Whether watching sees the adapter act while it trains."""
    starts_from_factors: ClassVar[bool] = False
    """Whether an initializer can say where it starts."""
    negates: ClassVar[bool] = False
    """Whether the learned update can be negated (`negate`)."""
    rate: ClassVar[str] = "learning_rate"
    """The setting that holds the learning rate."""

    # what goes with what

    def check(self, run: Settings) -> None:
        """Refuse settings of a run that this kind does not support.

        Raises:
            ValueError: names the setting and a valid choice.
        """
        if not self.routes and run.objective.needs.entropy:
            own = hasattr(run.objective, "only_low")
            raise ValueError(
                f"`objective.{'only_low' if own else 'kind'}` {'' if own else run.objective.kind + ' '}needs the token entropies of "
                f"`adapter.kind` alter, not {self.kind}: give {'`objective.only_low=False`' if own else '`adapter.kind` alter'}"
            )
        if run.watch.on and (not self.is_seen or run.negate is not None):
            raise ValueError(
                "watch looks at an adapter on the model while it trains: not with `adapter.kind` full or "
                "assistant, and not with `negate`"
            )
        if run.phase_one and not self.routes and run.retain_objective.needs.rows:
            raise ValueError(
                f"`phase_one` needs the token entropies of `adapter.kind` alter, not {self.kind}: leave it out, or give "
                "`phase_one` 0"
            )
        if run.negate is not None and not self.negates:
            raise ValueError(
                f"`negate` flips the sign of LoRA's B, which `adapter.kind` {self.kind} does not have: take `adapter.kind` lora"
            )

    def check_experts_only(self, run: Settings) -> None:
        """Refuse to train new experts alone, as `experts_only` and `start_from` ask.

        Raises:
            ValueError: this kind has none, or its settings do not keep them apart.
        """
        raise ValueError(
            "`experts_only` is for `adapter.kind` alter, `start_from` for that and for `adapter.kind` lora with `adapter.detector`, "
            f"not for {self.kind}"
        )

    def check_model(self, base: Any, run: Settings, former: Former | None) -> None:
        """Refuse a loaded model that lacks what the settings name, before passes over it.

        Args:
            base: the model; with `grows` and `start_from` it has the earlier adapter.
            run: the run's settings.
            former: the earlier adapter that is trained on.

        Raises:
            UserError: it has no such layers, or is not the one that `former` was trained on.
        """

    def needs_whole_model(self) -> str | None:
        """Name the setting that needs unsharded weights on each rank, or None; sharded launches are refused with it."""
        return None

    # what only the loaded model and the encoded rows show

    @property
    def blocks_to_trace(self) -> int | None:
        """Number of neighbouring blocks to train that causal tracing must find; None: none."""
        return None

    @property
    def expert_to_find(self) -> bool:
        """Whether the expert to train must be found, by where the model's own router sends forget rows."""
        return False

    # going on from an earlier adapter

    @property
    def trained_on(self) -> bool:
        """Whether `start_from` trains the earlier request's weights further."""
        return False

    def former(self, start_from: str | None) -> Former | None:
        """Read and check the earlier request's adapter, for kinds that train it further (`trained_on`).

        Raises:
            UserError: it cannot be trained further.
        """
        return None

    @property
    def merges(self) -> bool:
        """Whether the result can be merged into the base weights."""
        return False

    def check_continues(self, run: Settings) -> None:
        """Refuse settings with which a second run cannot start from the first one's result.

        Raises:
            ValueError: it can neither grow, be trained on, nor be merged, nor is it the model itself.
        """
        raise ValueError(
            f"`adapter.kind` {self.kind} neither grows nor merges. Continual comparisons take alter with a learned router, "
            "lora, or full"
        )

    def continued(self, adapter: str, merged: Callable[[], str]) -> dict[str, Any]:
        """Return the settings that start a second run from a first one's adapter.

        Args:
            adapter: its folder.
            merged: saves the model with the adapter merged and returns its folder.
        """
        return {"model": merged()}

    # the run

    def dtype(self, given: str) -> str:
        """Return the dtype in which the model is loaded."""
        return given

    @abstractmethod
    def attach(self, model: Any, run: Settings, beginning: Beginning) -> Any:
        """Put the adapter on a loaded model, or choose the weights to train.

        Args:
            model: the model; with `grows` and `start_from` it has the earlier adapter.
            run: the run's settings.
            beginning: what it starts from.

        Raises:
            UserError: the model, or the adapter that it has, does not go with the settings.
        """

    def routed_experts(self, model: Any) -> int:
        """Return the number of experts that tokens are routed to, with the retention expert; 0 for a kind that does not route."""
        return 0

    @property
    def isolates(self) -> bool:
        """Whether each expert learns from its own rows alone."""
        return False

    def learning_rate(self, run: Settings) -> float:
        """Return the peak learning rate of the schedule."""
        return float(getattr(run, self.rate))

    def parameter_groups(self, named: Sequence[tuple[str, nn.Parameter]], run: Settings) -> list[dict[str, Any]]:
        """Return the optimizer's groups of the parameters that train, each with learning rate and weight decay."""
        return [
            {"params": [p for _, p in named], "lr": self.learning_rate(run), "weight_decay": run.weight_decay},
        ]

    def hook_optimizer(
        self, optimizer: torch.optim.Optimizer, named: Sequence[tuple[str, nn.Parameter]], run: Settings
    ) -> None:
        """Register hooks on the optimizer for what parameter groups cannot express."""

    def penalty(self, model: Any, run: Settings, away: Mapping[str, Tensor], former: Former | None) -> Penalty | None:
        """Return the term of the loss that depends on the weights alone, or None.

        Args:
            model: with the adapter on it.
            run: the run's settings.
            away: of each layer (by name) the directions [out, k] that B is kept away from, where an initializer gives some.
            former: the earlier adapter that is trained on.
        """
        return None

    def term(self, forget: Tensor) -> Tensor | None:
        """Return a term of the loss that the last forward decides, as this process's share of it, or None.

        Args:
            forget: [B, T] bool, which of the step's tokens are of forget rows.
        """
        return None

    def negate(self, weights: Mapping[str, Tensor], times: float, before: Callable[[], Mapping[str, Tensor]]) -> None:
        """Negate the learned update: theta - times * (theta' - theta) (task arithmetic, Ilharco et al. 2023).

        Args:
            weights: all of the trained model's by name, changed in place.
            times: how often.
            before: gives the untouched model's weights by name.
        """
        for name, weight in weights.items():
            if ".lora_B." in name or ".alter_B." in name:
                weight.mul_(-times)

    # the result

    def form(
        self, base: Any, run: Settings, forget: Sequence[Encoded], pad_token_id: int, former: Former | None = None
    ) -> Form | None:
        """Return settings and tensors of a result that PEFT alone cannot load (see `alter.models.guards`), else None.

        Raises:
            UserError: there are too few forget rows to make it of.
        """
        return None

    def card(self, run: Settings, title: str | None, names: Sequence[str]) -> Card:
        """Return the model card's parts for the result: `title` is the method's, if it has a name; `names` the sub-domains."""
        return peft_card("Adapter", run, f"{titled(title)}adapter.kind {self.kind}.")
