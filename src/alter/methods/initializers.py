"""LoRA initialisers: from statistics of a weight to its factors A and B.

FILA, VILA and REGLU start from factors that are not zero and put the residual W - s B A in the place of the frozen
weight, so that the model is unchanged before training. Here the frozen weight stays what it is: the adapter holds the
trained factors next to a frozen, negated copy of where they started (`residual_pair`), which computes the same function
of the same trained factors, since (W - s B0 A0) + s B A = W + s (B A - B0 A0). So "adapter off" is the original model,
one file holds both parts, and it is an ordinary LoRA of twice the rank that merges and loads on the original base.
`INITIALIZERS` holds them by name and is open to plugins (`alter.plugins`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias, final

import torch
from pydantic import BaseModel, ConfigDict, Field

from alter.plugins import OneOf, Registry, kinds
from alter.settings import Count, Rows

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-5
"""Added to retain importance and to row weights, as in the code of FILA and VILA."""
FLOOR = 1e-4
"""Added to the diagonal of a covariance, as in the code of REGLU: what it is in every direction that no row uses."""


class Factors(NamedTuple):
    """Initial factors of one layer: A [r, in] and B [out, r]."""

    A: Tensor
    B: Tensor


class Statistics(Protocol):
    """Passes over the untouched model that an initializer asks for, by kind of rows ("forget", "retain") and layer."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """[out, in] of each layer."""

    def covariances(self, rows: int) -> dict[str, dict[str, Tensor]]:
        """Return the covariance [out, out] of each layer's output, over `rows` rows of each kind."""

    def fisher(self) -> dict[str, dict[str, Tensor]]:
        """Return [out, in] mean squared gradients of each weight."""

    def variances(self, probe: Mapping[str, Factors], epochs: int) -> dict[str, tuple[dict[str, Factors], float]]:
        """Return the variances of the gradients of the factors `probe`, and the number of tokens."""


Start: TypeAlias = "tuple[dict[str, Factors], dict[str, Tensor]]"
"""Where the factors of each layer start, and the directions [out, k] that its B is kept away from, if any."""


class Initializer(BaseModel, ABC):
    """A LoRA start: which statistics it asks for, and the factors that it makes of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    gives_factors: ClassVar[bool] = True
    """Whether the factors start elsewhere than LoRA's own, beside a frozen copy."""

    def check(self, run: Any) -> None:
        """Refuse settings of a run (`alter.training.settings.Unlearn`) that do not go with this start.

        Raises:
            ValueError: says which, and what to give.
        """
        if not run.adapter.starts_from_factors:
            raise ValueError(f"`initializer.kind` {self.kind} is for `adapter.kind` lora, not {run.adapter.kind}")
        if run.adapter.dropout:
            raise ValueError(
                f"`initializer.kind` {self.kind} starts from factors that a frozen copy cancels: "
                "`adapter.dropout` must be 0"
            )
        if run.start_from is not None:
            raise ValueError(
                f"`initializer.kind` {self.kind} would replace the factors that `start_from` brings: leave it out"
            )

    def retain_rows(self, forget_rows: int) -> int:
        """Return the number of retain rows to draw: as many as forget rows, one epoch of the schedule."""
        return forget_rows

    @property
    def weight_away(self) -> float:
        """Weight of the penalty sum over layers of |B^T P|_F^2, for the directions P that `start` keeps B away from."""
        return 0.0

    @abstractmethod
    def start(self, seen: Statistics, r: int, scaling: float, seed: int) -> Start:
        """Compute where the factors of each layer start, in fp32 on the CPU.

        Args:
            seen: passes over the untouched model.
            r: rank.
            scaling: alpha / r of the adapter.
            seed: of what is drawn.
        """


def _important(importance: Mapping[str, Tensor], seen: Statistics, r: int, scaling: float, seed: int) -> Start:
    weights = seen.weights
    return {name: important_part(weight, importance[name], r, scaling, seed) for name, weight in weights.items()}, {}


@final
class Zero(Initializer):
    """LoRA's own: A Kaiming-uniform, B zero; the adapter changes nothing before training."""

    kind: Literal["zero"] = "zero"
    gives_factors: ClassVar[bool] = False

    def check(self, run: Any) -> None:
        """Accept all settings."""

    def start(self, seen: Statistics, r: int, scaling: float, seed: int) -> Start:
        return {}, {}


@final
class Fila(Initializer):
    """FILA of LoKU (Cha et al. 2024, arXiv:2408.06621): the forget-important part of each weight.

    Importance is the ratio of empirical Fisher information on forget and on retain rows, from squared gradients of
    batch means with respect to the whole weights: one pass with gradients, two tensors of the weights' size.
    """

    kind: Literal["fila"] = "fila"

    def check(self, run: Any) -> None:
        super().check(run)
        if run.quantization is not None:
            raise ValueError(
                f"`initializer.kind` fila takes gradients of the weights themselves, which `quantization` {run.quantization} "
                "rounds: take `initializer.kind` vila, reglu or zero, or leave `quantization` out"
            )

    def start(self, seen: Statistics, r: int, scaling: float, seed: int) -> Start:
        found = seen.fisher()
        importance = {name: fisher_ratio(found["forget"][name], found["retain"][name]) for name in seen.weights}
        return _important(importance, seen, r, scaling, seed)


@final
class Vila(Initializer):
    """VILA (COLM 2025): FILA's importance from the variance of gradients of small random LoRA factors alone.

    The authors' code divides by the token counts twice, after which its constant 1e-5 outweighs the importance;
    `normalise` divides each product of variances by its mean instead.
    """

    kind: Literal["vila"] = "vila"
    epochs: Count = Field(10, ge=1, description="Passes over forget and retain rows, without updates.")
    std: float = Field(0.05, gt=0, description="Standard deviation of the random factors whose gradients are taken.")
    normalise: bool = Field(True, description="Scale importances to mean 1; off: as the authors' code does.")

    def start(self, seen: Statistics, r: int, scaling: float, seed: int) -> Start:
        weights = seen.weights
        generator = torch.Generator().manual_seed(seed)
        probe = {}
        for name, weight in weights.items():
            shapes = (r, weight.shape[1]), (len(weight), r)
            A, B = (torch.randn(shape, generator=generator) * self.std for shape in shapes)
            probe[name] = Factors(A.to(weight.device).requires_grad_(), B.to(weight.device).requires_grad_())
        product = {
            kind: {name: variance_product(of.B, of.A, tokens, self.normalise).cpu() for name, of in variances.items()}
            for kind, (variances, tokens) in seen.variances(probe, self.epochs).items()
        }
        importance = {name: fisher_ratio(product["forget"][name], product["retain"][name]) for name in weights}
        return _important(importance, seen, r, scaling, seed)


@final
class Reglu(Initializer):
    """REGLU (Findings of ACL 2026): the directions of each layer's output that forget rows use and retain rows do not.

    With it goes a penalty that keeps B orthogonal to the retain rows' strongest directions. Features are sums over a
    row's real tokens (the authors' code adds padding in). Directions that no row uses are not taken, although the
    authors' code would fill up with them: n rows give B n directions at most to stay away from.
    """

    kind: Literal["reglu"] = "reglu"
    beta: float = Field(0.5, ge=0, le=1, description="Weight of retain rows against forget rows.")
    rows: Rows = Field(256, ge=1, description="Rows of each kind that outputs are taken of; all if there are fewer.")
    retain_rank: Count = Field(
        128, ge=1, description="Directions of the retain rows that B must stay away from; at most those that they use."
    )
    penalty: float = Field(0.5, ge=0, description="Weight of sum over layers of |B^T P|_F^2.")

    def retain_rows(self, forget_rows: int) -> int:
        """Return as many rows as outputs are measured on."""
        return self.rows

    @property
    def weight_away(self) -> float:
        return self.penalty

    def start(self, seen: Statistics, r: int, scaling: float, seed: int) -> Start:
        """Compute the factors, and the retain directions P [out, k] that B is kept away from.

        k is `retain_rank`, or the number of directions that the retain rows' outputs use where that is smaller (at most
        the number of rows), since any further ones are arbitrary.
        """
        found, weights = seen.covariances(self.rows), seen.weights
        generator = torch.Generator().manual_seed(seed)
        start = {
            name: forget_directions(weight, found["forget"][name], found["retain"][name], r, self.beta, generator)
            for name, weight in weights.items()
        }
        return start, {
            name: top_directions(found["retain"][name], self.retain_rank, FLOOR).float() for name in weights
        }


INITIALIZERS: Registry[type[Initializer]] = Registry("initializer", kinds(Zero, Fila, Vila, Reglu))
"""Initializers by kind."""
AnyInitializer = Annotated[Initializer, OneOf(INITIALIZERS)]


def fisher_ratio(forget: Tensor, retain: Tensor) -> Tensor:
    """Return the importance [out, in] of a weight for forget rows over retain rows: F_f / (1e-5 + F_r)."""
    return forget / (EPSILON + retain)


def important_part(weight: Tensor, importance: Tensor, r: int, scaling: float, seed: int = 0) -> Factors:
    """Compute FILA's factors: the best rank-r approximation of a weight whose rows are weighted by their importance.

    s_i = sqrt(sum_j I_ij); U S V^T of diag(s) W cut at rank r; S <- S / scaling; A = (V sqrt(S))^T,
    B = diag(1 / (s + 1e-5)) U sqrt(S).

    Args:
        weight: [out, in].
        importance: [out, in], not negative.
        r: rank, at most min(out, in).
        scaling: alpha / r of the adapter.
        seed: of the randomised decomposition.
    """
    row = importance.sum(1).sqrt().to(weight)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # a few directions more than are kept make the randomised decomposition accurate (the authors take r)
        U, S, V = (part[..., :r] for part in torch.svd_lowrank(row[:, None] * weight, q=min(r + 10, *weight.shape)))
    root = (S / scaling).sqrt()
    return Factors((V * root).t().contiguous(), U * root / (row[:, None] + EPSILON))


def variance(total: Tensor, squares: Tensor, count: float) -> Tensor:
    """Return the variance from the sum of values and the sum of their squares, over `count` observations; never below 0."""
    return (squares / count - (total / count).square()).clamp_min(0.0)


def variance_product(of_b: Tensor, of_a: Tensor, count: float, normalise: bool) -> Tensor:
    """Compute VILA's importance [out, in] of a weight from the variances of B's [out, r] and A's [r, in] gradients."""
    product = of_b @ of_a
    return product / product.mean().clamp_min(torch.finfo(product.dtype).tiny) if normalise else product / count


def covariance(features: Tensor) -> Tensor:
    """Return H^T H / n + 1e-4 I [D, D] of features [n, D], not centred, in float64 (REGLU)."""
    wide = features.double()
    return wide.t() @ wide / len(wide) + FLOOR * torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)


def top_directions(symmetric: Tensor, k: int, floor: float) -> Tensor:
    """Return [D, at most k] orthonormal eigenvectors of the k largest eigenvalues, without those whose eigenvalue is `floor`.

    `floor` is the eigenvalue of what no row uses: any basis of that space would do, so a choice from it says nothing of
    the rows. n rows thus give n directions at most, however large k is.

    Args:
        symmetric: [D, D], a covariance or a difference of two.
        k: directions wanted.
        floor: `FLOOR` of a covariance; of a difference what is left of it.
    """
    values, vectors = (found.flip(-1)[..., :k] for found in torch.linalg.eigh(symmetric))
    # eigenvalues are known to the rounding of the largest
    rounding = len(symmetric) * torch.finfo(symmetric.dtype).eps * torch.linalg.matrix_norm(symmetric)
    kept: Tensor = vectors[:, (values - floor).abs() > rounding]
    return kept


def forget_directions(
    weight: Tensor,
    forget: Tensor,
    retain: Tensor,
    r: int,
    beta: float,
    generator: torch.Generator | None = None,
) -> Factors:
    """Compute REGLU's factors: B = Q, the top r eigenvectors of (1 - beta) C_f - beta C_r, and A = Q^T W.

    Where the rows use fewer than r directions, the rest of the rank starts as LoRA's own: A Kaiming-uniform, B zero.

    Args:
        weight: [out, in].
        forget: covariance [out, out] of the layer's output on forget rows.
        retain: that on retain rows.
        r: rank.
        beta: weight of retain rows against forget rows.
        generator: of what starts at random.
    """
    Q = top_directions((1 - beta) * forget - beta * retain, r, (1 - 2 * beta) * FLOOR).to(weight)
    left, width = r - Q.shape[1], weight.shape[1]
    # Kaiming-uniform with a = sqrt(5) is uniform within 1 / sqrt(in)
    drawn = torch.rand(left, width, generator=generator, dtype=torch.float64)
    rest = ((2 * drawn - 1) / width**0.5).to(weight)
    return Factors(torch.cat([Q.t() @ weight, rest]), torch.cat([Q, Q.new_zeros(len(Q), left)], 1))


def residual_pair(factors: Factors) -> Factors:
    """Return factors of rank 2r that add nothing, [A; A] and [B, -B]; training moves the first halves only."""
    return Factors(torch.cat([factors.A, factors.A]), torch.cat([factors.B, -factors.B], 1))
