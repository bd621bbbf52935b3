"""Likeness of an input to the forget rows, by its hidden states, and the adapter's weight that follows from it (O3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHRINKAGE = 0.1
"""Share of the mean variance in each covariance: with fewer rows than dimensions the empirical one has no inverse."""
OFF_BELOW, STRONG_ABOVE, STRONG = 0.3, 0.9, 1.2
"""O3's bands: the adapter is off at a weight of 0.3 or less, and 1.2 times as strong above 0.9."""


def mean_states(states: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Average L hidden states [B, T, H] over the real tokens of each row (`mask` [B, T]), in float32: [B, L, H]."""
    real = mask.to(states[0].device).float()[..., None]
    return torch.stack([(state.float() * real).sum(1) / real.sum(1).clamp_min(1.0) for state in states], dim=1)


def window_means(states: Tensor, window: int) -> Tensor:
    """Average the states [T, H] of a prompt over windows of `window` tokens, in float32: [n, H].

    The windows begin at the end of the prompt and move back by a quarter of their length. The first token belongs to none:
    many models give it a state that is far longer than all others, whatever it is. A shorter prompt is one window, and one
    without tokens one of zeros.
    """
    if not len(states):
        return states.new_zeros(1, states.shape[1], dtype=torch.float32)
    rest = (states[1:] if len(states) > 1 else states).float().flip(0).t()[None]
    kernel = min(window, rest.shape[-1])
    return torch.nn.functional.avg_pool1d(rest, kernel, max(1, window // 4))[0].t()


@dataclass(frozen=True)
class Likeness:
    """Likeness of an input to a set of rows, in each of L layers: -1/2 d_Mahalanobis^2 + 1000 max cosine (O3).

    The published code subtracts the cosine; since both terms measure likeness, they are added here (a reading). The
    covariance is shrunk to (1 - a) C + a tr(C) / H I with a = `SHRINKAGE`, another one.

    Attributes:
        centre: [L, H] means of the rows.
        axes: [L, k, H] principal axes, each times the root of its share in the inverse.
        floor: [L] the variance a tr(C) / H in all directions.
        units: [L, n, H] the rows, of length 1.
    """

    centre: Tensor
    axes: Tensor
    floor: Tensor
    units: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Likeness:
        """Fit to rows [n, L, H]."""
        rows = rows.double().transpose(0, 1)
        centre = rows.mean(1)
        away = rows - centre[:, None]
        n, size = rows.shape[1:]
        floor = (SHRINKAGE * away.square().sum((1, 2)) / n / size).clamp_min(1e-12)
        # the axes of the covariance from the [n, n] products of its rows
        squares, mixing = torch.linalg.eigh(away @ away.transpose(1, 2))
        squares = squares.clamp_min(0)
        axes = mixing.transpose(1, 2) @ away / squares.sqrt().clamp_min(1e-9)[..., None]
        variance = (1 - SHRINKAGE) * squares / n
        share = variance / (variance + floor[:, None])
        units = torch.nn.functional.normalize(rows, dim=-1)
        return cls(centre.float(), (axes * share.sqrt()[..., None]).float(), floor.float(), units.float())

    def to(self, device: torch.device) -> Likeness:
        """Move all tensors to a device."""
        return Likeness(*(getattr(self, name).to(device) for name in ("centre", "axes", "floor", "units")))

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the likenesses [m, L] of rows [m, L, H]."""
        rows = rows.float().transpose(0, 1)
        away = rows - self.centre[:, None]
        inside = (away @ self.axes.transpose(1, 2)).square().sum(-1)
        distance = (away.square().sum(-1) - inside) / self.floor[:, None]
        cosine = (torch.nn.functional.normalize(rows, dim=-1) @ self.units.transpose(1, 2)).amax(-1)
        return (1000 * cosine - distance / 2).t()


@dataclass(frozen=True)
class Calibration:
    """Likeness of rows left out of the fit: mean and spread in each layer, and the spread of their joint score."""

    layer_mean: list[float]
    layer_std: list[float]
    joint_std: float

    @classmethod
    def of(cls, likeness: Tensor) -> Calibration:
        """Fit to the likeness [n, L] of rows that took no part in what measured it."""
        spread, middle = torch.std_mean(likeness.double(), dim=0, correction=0)
        spread = spread.clamp_min(1e-6)
        joint = ((likeness - middle) / spread).mean(-1)
        return cls(middle.tolist(), spread.tolist(), max(float(joint.std(correction=0)), 1e-6))

    def __call__(self, likeness: Tensor) -> Tensor:
        """Return the adapter's weight [m] for likenesses [m, L]: 0 for inputs that are unlike the forget rows, up to 1.2.

        The joint score is the mean of the layers' standardised likenesses, over its spread; c = min(1, 2 Phi(score)) is its
        tail probability, and w = sigmoid(10 c - 2); w <= 0.3 counts as 0 and w > 0.9 as 1.2. Readings: O3 fits its Gaussian to a batch of
        test inputs as well, and joins the layers by a one-class SVM, of which nothing but a direction matters here; it
        sets weights between 0.4 and 0.9 to 0, so that a likelier input could get less. Here w never falls with c.
        """
        middle, spread = (torch.tensor(value, device=likeness.device) for value in (self.layer_mean, self.layer_std))
        joint = ((likeness - middle) / spread).mean(-1)
        tail = (2 * torch.special.ndtr(joint / self.joint_std)).clamp(max=1.0)
        weight = torch.sigmoid(10 * tail - 2)
        weight = torch.where(weight > STRONG_ABOVE, STRONG, weight)
        return torch.where(weight > OFF_BELOW, weight, 0.0)


@dataclass(frozen=True)
class Detector:
    """Recognises the inputs of one request: the adapter's weight [m] for mean states [m, L, H] (see `mean_states`)."""

    likeness: Likeness
    calibration: Callable[[Tensor], Tensor]

    def __call__(self, means: Tensor) -> Tensor:
        """Return the weights."""
        return self.calibration(self.likeness(means))

    def to(self, device: torch.device) -> Detector:
        """Move all tensors to a device."""
        return Detector(self.likeness.to(device), self.calibration)
