"""Fit the router's scores, and set the level at which experts open (open-set recognition; a reading of the paper).

Forget and ordinary questions join the fit in other words as well, and so does a shipped sample of ordinary text, whatever
retain rows there are, even none. The level at which experts open is that which at most `false_alarms` of the ordinary
low-entropy tokens exceed (of the retain rows, and of the sample with equal weight for each kind), where each third of the
ordinary text, by kinds, is scored by a fit without it. That is cautious, as the fit itself has seen all kinds: where it
would leave less than `WANTED` of the forget tokens above the level, the level falls to there, as long as no more than a
fifth of `false_alarms` of the ordinary tokens exceed it in the fit that has seen them (`SEEN`). It is never lower than 98 % of the forget
tokens need, and never so high that less than `LEAST_OPEN` of the forget tokens lie above it, whatever share of ordinary
tokens then does too. All new experts share the shift.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from alter.training.evidence import OWN_WORDS, Evidence, standard

if TYPE_CHECKING:
    from alter.training.routerfit import RouterFit


FOLDS = 3
"""Parts of the ordinary text, by kinds, each of which is scored by a fit on the others."""

MOST_BELOW = 0.02
"""Share of the forget tokens that may lie below the level at which experts open, if ordinary text leaves it low."""

WANTED = 0.95
"""Share of the forget tokens that experts open for where that costs few false alarms in the fit itself."""

SEEN = 0.2
"""How many those may be, as a share of `false_alarms`: of text that no fit has seen up to five times as many open."""

LEAST_OPEN = 0.8
"""Share of the forget tokens that experts open for in any case, whatever ordinary text says."""


def caught(data: Sequence[Evidence], made: tuple[Tensor, Tensor, float]) -> float:
    """Return the share of low-entropy forget tokens (of all, if none is low) above the level, in the worst wording."""
    weight, bias, level = made
    own = next(tokens for tokens in data if tokens.name == "forget")
    over = (own.x @ weight.t() + bias).max(-1).values > level
    counted = own.low if own.low.any() else torch.ones_like(own.low)
    each = [over[counted & (own.wording == wording)] for wording in own.wording.unique()]
    return min(float(flags.float().mean()) for flags in each if len(flags))


def open_set(
    data: Sequence[Evidence], new: Sequence[int], fit: RouterFit, generator: np.random.Generator
) -> tuple[Tensor, Tensor, float]:
    """Return weights [len(new), D] and biases [len(new)] of the new experts, and the logit above which they open."""
    own = next(tokens for tokens in data if tokens.name == "forget")
    weight, bias = _scores(*_joined(data), new, fit, generator)
    if fit.false_alarms is None:
        return weight, bias, 0.0
    folds = _folds(data)
    own_words = [tokens for tokens in data if tokens.name == OWN_WORDS]
    highest = (own.x @ weight.t() + bias).max(-1).values
    ordinary: dict[str, list[Tensor]] = {}
    for i, fold in enumerate(folds):
        rest = [tokens for j, other in enumerate(folds) if j != i for tokens in other] or fold
        if not fold:
            continue
        its_weight, its_bias = _scores(*_joined([own, *own_words, *rest]), new, fit, generator)
        its_own = (own.x @ its_weight.t() + its_bias).max(-1).values
        # the scale of scores depends on the text they are fitted on: compared by the forget tokens' mean and spread
        scale = highest.std() / its_own.std().clamp_min(1e-12)
        for tokens in fold:
            logits = (tokens.x[tokens.low] @ its_weight.t() + its_bias).max(-1).values
            logits = (logits - its_own.mean()) * scale + highest.mean()
            ordinary.setdefault(tokens.name, []).append(logits)
    cautious = opening_level(highest, {kind: torch.cat(logits) for kind, logits in ordinary.items()}, fit.false_alarms)
    seen = {
        tokens.name: (tokens.x[tokens.low] @ weight.t() + bias).max(-1).values
        for tokens in data
        if tokens.name not in ("forget", OWN_WORDS)
    }
    bold = max(opening_level(highest, seen, SEEN * fit.false_alarms), float(_quantile(highest, 1 - WANTED)))
    # a router that catches less forgets nothing; the run reports what this costs in false alarms
    return weight, bias, min(cautious, bold, float(_quantile(highest, 1 - LEAST_OPEN)))


def _folds(data: Sequence[Evidence]) -> list[list[Evidence]]:
    """Split ordinary tokens into `FOLDS` parts: whole kinds, except retain rows, which are one kind and are dealt out."""
    folds: list[list[Evidence]] = [[] for _ in range(FOLDS)]
    kinds = sorted((t for t in data if t.name not in ("forget", "retain", OWN_WORDS)), key=lambda t: -len(t.y))
    for tokens in kinds:
        min(folds, key=lambda fold: sum(len(t.y) for t in fold)).append(tokens)
    for tokens in data:
        if tokens.name == "retain":
            for i, fold in enumerate(folds):
                if (tokens.row % FOLDS == i).any():
                    fold.append(tokens.part(tokens.row % FOLDS == i))
    return folds


def opening_level(own: Tensor, ordinary: Mapping[str, Tensor], false_alarms: float) -> float:
    """Return the logit above which experts open.

    Args:
        own: highest logit of each forget token [T].
        ordinary: highest logits of ordinary low-entropy tokens by kind [n]; "retain" counts by itself, the others
            together with equal weight for each kind.
        false_alarms: share of each that may lie above the level.

    Returns:
        the least level that no more than this share exceeds, but at least that which 2 % of `own` lie below.
    """
    level = float(
        torch.quantile(own[torch.randperm(len(own), generator=torch.Generator().manual_seed(0))[:100_000]], MOST_BELOW)
    )
    others = {kind: logits for kind, logits in ordinary.items() if len(logits)}
    for group in (["retain"], [kind for kind in others if kind != "retain"]):
        parts = [others[kind] for kind in group if kind in others]
        if parts:
            logits = torch.cat(parts)
            weight = torch.cat([torch.full((len(part),), 1 / len(part) / len(parts)) for part in parts]).double()
            order = logits.argsort(descending=True)
            # how much lies at or above each value; the next lower value is exceeded by exactly that
            exceeds = weight[order].cumsum(0)
            place = int((exceeds <= false_alarms + 1e-12).sum())
            level = max(level, float(logits[order[min(place, len(order) - 1)]]))
    return level


def _quantile(values: Tensor, share: float) -> Tensor:
    return values.sort().values[int(share * (len(values) - 1))]


def _joined(data: Sequence[Evidence]) -> tuple[Tensor, Tensor]:
    return torch.cat([tokens.x for tokens in data]), torch.cat([tokens.y for tokens in data])


def _scores(
    x: Tensor, y: Tensor, new: Sequence[int], fit: RouterFit, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Fit weights [len(new), D] and biases [len(new)] to tokens x [T, D] with experts y [T], 0 for ordinary ones."""
    if fit.method == "logistic":
        return _regress(x, y, new, fit, generator)
    return discriminant(x, y, new, fit.shrinkage)


OWN_SPREAD = 0.2
"""Weight of the spread of the experts' own tokens beside that of ordinary ones, which are far more diverse."""


def discriminant(x: Tensor, y: Tensor, new: Sequence[int], shrinkage: float) -> tuple[Tensor, Tensor]:
    """Compute Fisher's linear discriminant of each new expert's tokens against ordinary ones, with one covariance for all.

    With the means m_e of expert e's tokens and m_0 of the ordinary ones, and the shrunken covariance S, the score of x is
    half the difference of its squared Mahalanobis distances to m_0 and to m_e: w_e = S^-1 (m_e - m_0),
    b_e = -w_e (m_e + m_0) / 2. S is the ordinary tokens' covariance plus `OWN_SPREAD` times that of the experts' tokens
    around their means, plus `shrinkage` times the mean of its diagonal on the diagonal.

    Args:
        x: evidence [T, D].
        y: expert [T]; 0 marks ordinary tokens. Without any the mean of all tokens takes the place of theirs.
        new: the experts.
        shrinkage: above 0.

    Returns:
        weights [len(new), D] and biases [len(new)], fp32.
    """
    centre, spread, _ = _moments(x, y == 0 if (y == 0).any() else torch.ones_like(y, dtype=torch.bool))
    parts = [_moments(x, y == e) for e in new]
    means = torch.stack([mean for mean, *_ in parts])
    total = sum(count for *_, count in parts)
    for _, around, count in parts:
        spread += OWN_SPREAD * around * (count / total)
    spread.diagonal().add_(shrinkage * spread.diagonal().mean().clamp_min(1e-12))
    weight = torch.linalg.solve(spread, (means - centre).t()).t()
    bias = -(weight * (means + centre)).sum(-1) / 2
    return weight.float(), bias.float()


def _moments(x: Tensor, chosen: Tensor, at_once: int = 8192) -> tuple[Tensor, Tensor, int]:
    """Return mean [D], covariance [D, D] and number of the chosen rows of x [T, D]; in fp64, a few rows at a time."""
    parts = chosen.nonzero()[:, 0].split(at_once)
    count = int(chosen.sum())
    zero = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    mean = sum((x[part].double().sum(0) for part in parts), zero) / count
    spread = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in parts:
        off = x[part].double() - mean
        spread.addmm_(off.t(), off, alpha=1 / count)
    return mean, spread, count


def _regress(
    x: Tensor, y: Tensor, new: Sequence[int], fit: RouterFit, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Fit one logistic regression for each of the `new` experts: its own rows (y [T] names it) against all others.

    Returns:
        weights [len(new), D] and biases [len(new)].
    """
    mean, std = standard(x)
    x = (x - mean) / std
    is_own = y[:, None] == torch.tensor(new)
    head = torch.nn.Linear(x.shape[1], len(new))
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW(head.parameters(), lr=fit.learning_rate, weight_decay=fit.weight_decay)
    of_forget, of_retain = (y > 0).nonzero()[:, 0], (y == 0).nonzero()[:, 0]
    for step in range(fit.steps):
        for group in optimizer.param_groups:
            group["lr"] = fit.learning_rate * (1 - step / fit.steps)
        drawn = [part[torch.from_numpy(generator.integers(len(part), size=1024))] for part in (of_forget, of_retain)]
        batch = torch.cat(drawn)
        own, logits = is_own[batch], head(x[batch])
        hit = torch.nn.functional.softplus(-logits)[own].mean()
        miss = torch.nn.functional.softplus(logits)[~own].mean()
        loss = hit + fit.retain_weight * miss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = (head.weight / std).detach()
    return weight, (head.bias - weight @ mean).detach()
