"""Passes over loaded rows that initializers and rules for gradients ask for, run on demand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from alter.core import UserError
from alter.data import Encoded
from alter.groundwork.probes import elicited_gradients, factor_variances, fisher, input_covariances, output_covariances
from alter.methods import Factors, Initializer, Start
from alter.models import plain_weight


@dataclass(frozen=True)
class MeasuredGradients:
    """The passes that rules for gradients ask for (`alter.methods.gradients.GradientPasses`), by the names of weights."""

    model: Any
    forget: Sequence[Encoded]
    retain: Sequence[Encoded]
    batch: int
    seed: int
    pad_token_id: int

    @cached_property
    def layers(self) -> dict[str, nn.Linear]:
        """The linear layers whose weights train."""
        return {
            f"{name}.weight": module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module.weight.requires_grad
        }

    def input_covariances(self) -> dict[str, Tensor]:
        """Measure `input_covariances` of the retain rows."""
        return input_covariances(
            self.model,
            self.layers,
            self.retain,
            batch=self.batch,
            pad_token_id=self.pad_token_id,
            label="retain inputs",
        )

    def elicited(self, r: int, scaling: float, learning_rate: float) -> dict[str, Tensor]:
        """Measure `elicited_gradients` of the forget rows."""
        return elicited_gradients(
            self.model,
            self.layers,
            self.forget,
            r=r,
            scaling=scaling,
            learning_rate=learning_rate,
            batch=self.batch,
            seed=self.seed,
            pad_token_id=self.pad_token_id,
        )


@dataclass(frozen=True)
class MeasuredStatistics:
    """The passes that initializers ask for (`alter.methods.initializers.Statistics`), on loaded rows."""

    model: Any
    layers: Mapping[str, nn.Linear]
    sets: Mapping[str, Sequence[Encoded]]
    scaling: float
    batch: int
    seed: int
    pad_token_id: int

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """[out, in] of each layer, unpacked where it is quantised."""
        return {name: plain_weight(layer) for name, layer in self.layers.items()}

    def covariances(self, rows: int) -> dict[str, dict[str, Tensor]]:
        """Measure `output_covariances` of the first `rows` rows of each kind."""
        return {
            name: output_covariances(
                self.model,
                self.layers,
                members[:rows],
                label=f"{name} outputs",
                batch=self.batch,
                pad_token_id=self.pad_token_id,
            )
            for name, members in self.sets.items()
        }

    def fisher(self) -> dict[str, dict[str, Tensor]]:
        """Measure `fisher` of the rows of each kind.

        Raises:
            UserError: the weights are quantised, and have no gradient.
        """
        packed = next((name for name, layer in self.layers.items() if not layer.weight.is_floating_point()), None)
        if packed is not None:
            raise UserError(
                f"`initializer.kind` fila takes gradients of weights, and those of {packed} are quantised: load the model "
                "unquantised, or take `initializer.kind` vila, reglu or zero."
            )
        return {
            name: fisher(
                self.model,
                self.layers,
                members,
                label=f"{name} gradients",
                batch=self.batch,
                pad_token_id=self.pad_token_id,
            )
            for name, members in self.sets.items()
        }

    def variances(self, probe: Mapping[str, Factors], epochs: int) -> dict[str, tuple[dict[str, Factors], float]]:
        """Measure `factor_variances` of the rows of each kind."""
        return {
            name: factor_variances(
                self.model,
                self.layers,
                members,
                probe,
                label=f"{name} gradients",
                batch=self.batch,
                pad_token_id=self.pad_token_id,
                scaling=self.scaling,
                epochs=epochs,
                seed=self.seed,
            )
            for name, members in self.sets.items()
        }


def starting_factors(
    model: Any,
    layers: Mapping[str, nn.Linear],
    initializer: Initializer,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    *,
    r: int,
    scaling: float,
    batch: int,
    seed: int,
    pad_token_id: int,
) -> Start:
    """Compute where an initializer lets the factors of each layer start, from passes over the rows.

    Returns:
        the factors in fp32 on the CPU, and the directions [out, k] that B is kept away from, if any.

    Raises:
        UserError: FILA on quantised weights, which have no gradient.
    """
    passes = MeasuredStatistics(
        model, layers, {"forget": forget, "retain": retain}, scaling, batch, seed, pad_token_id
    )
    return initializer.start(passes, r, scaling, seed)
