"""What a model knows of rows, as figures: of the true answers' likelihood and of what the replies say, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from alter import metrics
from alter.core import Array
from alter.evaluation.giving import broken, distinct, gives, recall_of, repeated

if TYPE_CHECKING:
    import numpy.typing as npt


def mean_interval(values: npt.ArrayLike) -> tuple[float, float]:
    """Return Student's 95 % interval of the mean of values in [-1, 1]; all of it for fewer than two."""
    from scipy import stats

    x = np.asarray(values, dtype=np.float64)
    if x.size < 2:
        return -1.0, 1.0
    spread = float(stats.t.ppf(0.975, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size))
    return float(x.mean()) - spread, float(x.mean()) + spread


def unit_interval(values: npt.ArrayLike) -> tuple[float, float]:
    """Return the 95 % interval of the mean of values in [0, 1], which lies in [0, 1] itself.

    As in tables (`metrics.samples.row_interval`); all of [0, 1] for fewer than two, and the value itself where all are equal.
    """
    x = np.asarray(values, dtype=np.float64)
    if not x.size:
        return 0.0, 1.0
    found = metrics.samples.row_interval(x)
    alone = (0.0, 1.0) if x.size < 2 else (float(x[0]), float(x[0]))
    return alone if found is None else found


@dataclass(frozen=True)
class Measures:
    """What a model knows of some rows.

    Attributes:
        probability: of the true answers, length-normalised, of each scored row, [n].
        recall: ROUGE-L recall of each reply, [m].
        said: whether each reply gives its answer, [m]; None where there is no telling.
        broken, empty: of each reply, [m].
        repetition: of each reply, [m].
        distinct: different word pairs over all, in all replies together.
        worded: probability of the true answers of some rows, by the wording that their questions were put in, [k] each.
    """

    probability: Array
    recall: Array = field(default_factory=lambda: np.empty(0))
    said: Sequence[bool | None] = ()
    broken: Sequence[bool] = ()
    empty: Sequence[bool] = ()
    repetition: Array = field(default_factory=lambda: np.empty(0))
    distinct: float = 0.0
    worded: Mapping[str, Array] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        probability: npt.ArrayLike,
        questions: Sequence[str],
        truths: Sequence[str],
        replies: Sequence[str],
        worded: Mapping[str, Array] | None = None,
    ) -> Measures:
        """Measure replies, [m], against the truths; `probability` is of all scored rows, [n], `worded` of some again."""
        rows = list(zip(questions, truths, replies, strict=True))
        return cls(
            np.asarray(probability, dtype=np.float64),
            np.array([recall_of(truth, reply) for _, truth, reply in rows], dtype=np.float64),
            [gives(*row) for row in rows],
            [broken(reply) for reply in replies],
            [not reply.strip() for reply in replies],
            np.array([repeated(reply) for reply in replies], dtype=np.float64),
            distinct(replies),
            worded or {},
        )

    @property
    def asked(self) -> int:
        """Number of replies that can be judged."""
        return sum(value is not None for value in self.said)

    @property
    def given(self) -> int:
        """Number of replies that give their answer."""
        return sum(value is True for value in self.said)

    @property
    def unusable(self) -> int:
        """Number of replies that are broken or empty."""
        return sum(a or b for a, b in zip(self.broken, self.empty, strict=True))

    def summary(self) -> dict[str, Any]:
        """Return the figures, without any text; None for those that no row has."""
        some = len(self.recall) > 0
        return {
            "probability": float(self.probability.mean()) if self.probability.size else None,
            "probability_interval": list(unit_interval(self.probability)),
            "n": int(self.probability.size),
            "worded": float(np.mean([values.mean() for values in self.worded.values()])) if self.worded else None,
            "rouge": float(self.recall.mean()) if some else None,
            "n_answers": len(self.recall),
            "said": self.given,
            "n_said": self.asked,
            "said_interval": list(metrics.samples.share_interval(self.given, self.asked)),
            "broken": sum(self.broken),
            "empty": sum(self.empty),
            "repetition": float(self.repetition.mean()) if some else None,
            "distinct_2": self.distinct if some else None,
        }
