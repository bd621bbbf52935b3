"""Multiple choice: the likeliest answer, and how answers spread over the choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from alter.core import Array
from alter.metrics.arrays import floats

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True)
class Answers:
    """The spread of a model's answers to n questions over their k choices.

    Attributes:
        predicted: the likeliest choice of each question, [n]; the first of those that tie.
        counts: how often each choice is predicted, [k].
        entropy: of the predicted choices, in nats: at most log k.
        evenness: the same over log k: 1 evenly spread, 0 always the same choice.
        top_share: share of the choice predicted most.
        ties: whether another choice is exactly as likely as the predicted one, [n].
        mass: probability of all choices together, [n].
    """

    predicted: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    entropy: float
    evenness: float
    top_share: float
    ties: npt.NDArray[np.bool_]
    mass: Array


def multiple_choice(logprob: npt.ArrayLike) -> Answers:
    """Return how the answers are spread, from the log-probability of each choice of each question, [n, k], in nats.

    Raises:
        ValueError: no questions, fewer than two choices, or NaN.
    """
    values = floats(logprob)
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 2 or np.isnan(values).any():
        raise ValueError(
            f"multiple choice: expected log-probabilities [n, k >= 2] without NaN, got shape {values.shape}"
        )
    predicted = values.argmax(axis=1)
    counts = np.bincount(predicted, minlength=values.shape[1])
    share = counts[counts > 0] / len(values)
    entropy = abs(float(-(share * np.log(share)).sum()))
    ties = (values == values.max(axis=1, keepdims=True)).sum(axis=1) > 1
    mass = np.exp(values).sum(axis=1)
    return Answers(predicted, counts, entropy, entropy / np.log(values.shape[1]), float(share.max()), ties, mass)
