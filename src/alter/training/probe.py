"""The entropy probe: a logistic regression on the router's features that stands in for the entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alter.groundwork import frozen
from alter.training.evidence import standard

PROBE_TOKENS = 50_000
"""Evidence that the probe is fitted on, at most."""


def fit_entropy_probe(traced: Sequence[frozen.FrozenRow], threshold: float) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Fit a logistic regression that predicts, from the router's features, whether the next token's entropy is high.

    Every fifth row is left out of a first fit and measured; the probe that is returned is fitted on all rows.

    Args:
        traced: rows with `entropy` [T] and `features` [T, D] of each token's generating step; their first tokens have none.
        threshold: of the entropy.

    Returns:
        weight [1, D], bias [1], and of the tokens left out: `agreement`, the share on the side that the entropy says,
        `high`, the share above the threshold, and their number, `tokens`.
    """
    from sklearn.linear_model import LogisticRegression

    x, high, held = [], [], []
    for i, row in enumerate(traced):
        assert row.features is not None
        assert row.entropy is not None
        x.append(row.features[1:].float())
        high.append(row.entropy[1:] > threshold)
        held.append(torch.full((len(x[-1]),), i % 5 == 4))
    xs, ys, out = torch.cat(x), torch.cat(high), torch.cat(held)
    mean, std = standard(xs)

    def fitted(chosen: Tensor) -> tuple[Tensor, Tensor]:
        places = chosen.nonzero()[:, 0]
        places = places[:: -(-len(places) // PROBE_TOKENS)]
        own = ys[places]
        if not own.any() or own.all():
            return torch.zeros(1, xs.shape[1]), torch.tensor([1.0 if own.any() else -1.0])
        made = LogisticRegression(C=0.1, max_iter=200).fit(((xs[places] - mean) / std).numpy(), own.numpy())
        weight = torch.from_numpy(made.coef_).float() / std
        return weight, torch.from_numpy(made.intercept_).float() - weight @ mean

    measured = out if out.any() else torch.ones_like(out)
    weight, bias = fitted(~out)
    said = (xs[measured] @ weight.t() + bias)[:, 0] > 0
    found = {
        "agreement": float((said == ys[measured]).float().mean()),
        "high": float(ys[measured].float().mean()),
        "tokens": int(measured.sum()),
    }
    return *fitted(torch.ones_like(out)), found
