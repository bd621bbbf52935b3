"""Hidden states: what a linear probe still reads from them, and which model's states they resemble."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from alter import metrics
from alter.attacks.base import Bench, Impossible, Item
from alter.core import UserError
from alter.data import Encoded
from alter.inference import check_rows, hidden_states
from alter.storage import Record

RIDGE = 0.01
"""Penalty of the probe, per training token, on columns of variance 1."""

LEAST_ROWS = 4
"""Fewest rows for a probe (half of them test it) and for debiased CKA."""

Floats = npt.NDArray[np.float32]


def probe_rows(bench: Bench) -> list[int]:
    """Return the numbers of the rows whose hidden states are probed, ascending."""
    order = list(range(len(bench.rows)))
    random.Random(bench.settings.seed).shuffle(order)
    return sorted(order[: bench.settings.probe_rows])


def halves(n: int, seed: int) -> tuple[list[int], list[int]]:
    """Split the places 0 ... n - 1 into two disjoint halves by the seed, to train and to test on.

    Raises:
        Impossible: fewer than `LEAST_ROWS`.
    """
    if n < LEAST_ROWS:
        raise Impossible(f"A probe needs {LEAST_ROWS} rows or more, half of them for testing; there are {n}.")
    order = [int(i) for i in np.random.default_rng(seed).permutation(n)]
    return sorted(order[: n // 2]), sorted(order[n // 2 :])


def chosen_places(items: Sequence[Item], tokens: int, seed: int) -> list[list[int]]:
    """Draw up to `tokens` places in each item's answer by the seed, ascending."""
    draw = random.Random(seed)
    answers = [range(item.start, len(item.ids)) for item in items]
    return [sorted(draw.sample(places, min(tokens, len(places)))) for places in answers]


def _encoded(model: Any, items: Sequence[Item]) -> list[Encoded]:
    """Return the items as rows to read, which need not be among those measured.

    Raises:
        Impossible: one does not fit into the model's context.
    """
    encoded = [item.encoded for item in items]
    try:
        check_rows(model, encoded, [f"Row {item.index} of the forget set" for item in items])
    except UserError as error:
        raise Impossible(str(error)) from None
    return encoded


def fit_probe(states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit a ridge regression and return mean, scale and weights [d + 1, e]: y = [(x - mean) / scale, 1] W.

    Minimises ||[x 1] W - y||^2 + RIDGE n ||W||^2 over the n training tokens; columns that do not vary count as 0.

    Args:
        states: [n, d], float64.
        targets: [n, e], float64.
    """
    mean, scale = states.mean(dim=0), states.std(dim=0, correction=0)
    scale = torch.where(scale > 1e-8, scale, torch.inf)
    x = torch.cat([(states - mean) / scale, torch.ones_like(states[:, :1])], dim=1)
    gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return mean, scale, torch.linalg.solve(gram, x.T @ targets)


def read_out(
    states: torch.Tensor, fitted: tuple[torch.Tensor, torch.Tensor, torch.Tensor], head: torch.Tensor
) -> torch.Tensor:
    """Return the token [n] whose row of the head [vocabulary, e] best fits the probe's output, for states [n, d]."""
    mean, scale, weights = fitted
    x = torch.cat([(states - mean) / scale, torch.ones_like(states[:, :1])], dim=1)
    return torch.cat([((part @ weights).float() @ head.T).argmax(dim=1) for part in x.split(256)])


def probe(bench: Bench) -> list[Record]:
    """Read the next token of the true answer from the hidden states with a linear probe; one record per depth.

    At each depth a ridge regression from the state that generates a token to that token's (normalised) output embedding
    is fitted on answers of half the rows, given the true tokens before; it is tested on the other half, whose facts it
    never saw: what it reads there about them is in the model. The record's per-row value is the share of a row's chosen
    tokens that it reads right. Depths are those of `alter.inference.hidden_states`.

    Raises:
        Impossible: the model has no output embeddings, there are fewer than 4 rows, or one does not fit into the context.
    """
    settings = bench.settings
    model, tokenizer = bench.shared()
    output = model.get_output_embeddings()
    if output is None:
        raise Impossible(f"{type(model).__name__} has no output embeddings for the probe: leave it out of `attacks`.")
    items = bench.items(probe_rows(bench))
    learn, test = halves(len(items), settings.seed)
    places = chosen_places(items, settings.probe_tokens, settings.seed)
    found: dict[int, Floats] = {}
    encoded = _encoded(model, items)
    for row, states in hidden_states(model, encoded, pad_token_id=tokenizer.pad_token_id, label="probe: states"):
        # the state one place before a token is the one that generates it
        found[row] = states[[place - 1 for place in places[row]]]
    with torch.no_grad():
        head = output.weight.detach().float()
        head = head / head.norm(dim=1, keepdim=True).clamp(min=1e-12)
        answers = [torch.tensor([items[row].ids[place] for place in places[row]]) for row in range(len(items))]
        labels = torch.cat([answers[row] for row in learn]).to(head.device)
        records = []
        for depth in range(found[0].shape[1]):

            def gather(rows: Sequence[int], depth: int = depth) -> torch.Tensor:
                return torch.from_numpy(np.concatenate([found[row][:, depth] for row in rows])).double()

            fitted = fit_probe(gather(learn).to(head.device), head[labels].double())
            read = read_out(gather(test).to(head.device), fitted, head).cpu()
            pieces = read.split([len(answers[row]) for row in test])
            shares = [(piece == answers[row]).double().mean() for piece, row in zip(pieces, test, strict=True)]
            rows = [items[row].index for row in test]
            records.append(bench.record("attack_probe", np.array(shares), attack="probe", depth=depth, rows=rows))
    return records


def pooled(bench: Bench) -> Floats:
    """Return each row's hidden states, averaged over the answer's tokens: [rows, depths, width].

    Raises:
        Impossible: a row does not fit into the model's context.
    """
    model, tokenizer = bench.shared()
    items = bench.items(probe_rows(bench))
    found: list[Floats] = [np.empty(0, dtype=np.float32)] * len(items)
    encoded = _encoded(model, items)
    for row, states in hidden_states(model, encoded, pad_token_id=tokenizer.pad_token_id, label="cka: states"):
        found[row] = states[items[row].start :].mean(axis=0)
    return np.stack(found)


def cka(states: Mapping[str, Floats]) -> list[Record]:
    """Return one record per pair of models: debiased linear CKA of their pooled states, mean over the depths that have one.

    Args:
        states: by model, as `pooled` gives them.

    Raises:
        Impossible: the models differ in their number of depths, or no depth has one.
    """
    records = []
    for first, second in (("unlearned", "original"), ("unlearned", "retrained"), ("original", "retrained")):
        if first not in states or second not in states:
            continue
        x, y = states[first], states[second]
        if x.shape[:2] != y.shape[:2]:
            raise Impossible(
                f"CKA compares depth by depth, but {first} and {second} have {x.shape[1]} and {y.shape[1]} depths: "
                "leave cka out of `attacks`."
            )
        by_depth = {
            debiased: [_alike(x[:, d], y[:, d], debiased) for d in range(x.shape[1])] for debiased in (True, False)
        }
        known = [value for value in by_depth[True] if value is not None]
        if not known:
            raise Impossible(
                f"CKA is not defined: at every depth the states of {first} or {second} are the same for all rows."
            )
        extra = {"attack": "cka", "pair": f"{first} ~ {second}", "depths": by_depth[True], "plain": by_depth[False]}
        records.append(Record(first, "attack_cka", float(np.mean(known)), len(x), "strict", None, None, extra))
    return records


def _alike(x: Floats, y: Floats, debiased: bool) -> float | None:
    """Return the CKA of two models' states at one depth; None where one is the same for all rows, as the embeddings of one answer are."""
    try:
        return metrics.recovery.linear_cka(x, y, debiased=debiased)
    except ValueError:
        return None
