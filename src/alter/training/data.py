"""Read the rows of a run before any model is loaded: both sets, their sub-domains, and the watched rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from alter.core import Array, UserError
from alter.data import Example, check_overlap, encode_all, have_labels, load_examples
from alter.data.domains import domains
from alter.inference import context_length, hidden_states
from alter.training.sampler import pass_length
from alter.training.settings import Unlearn, batches_of_step, steps_of
from alter.training.watched import Watched, read_watched


@dataclass(frozen=True)
class Data:
    """The rows of a run, checked.

    Attributes:
        forget, retain: both sets; without a retain set its rows come from the model (`own_rows`).
        domain: sub-domain of each forget row, a place in `names`.
        names: of the sub-domains.
        watched: rows and rule of the checks, if the run is watched.
    """

    forget: list[Example]
    retain: list[Example]
    domain: list[int]
    names: list[str]
    watched: Watched | None = None


def read_data(run: Unlearn) -> Data:
    """Read and check the rows of a run.

    Raises:
        UserError: a file cannot be read, the sets share rows, or there are too many sub-domains.
    """
    forget = load_examples(run.forget, domain_column=run.domain_column)
    retain = [] if run.retain is None else load_examples(run.retain)
    check_overlap(forget, retain)
    return Data(forget, retain, *_sub_domains(run, forget))


def set_aside(run: Unlearn, data: Data) -> Data:
    """Return the data without the retain rows that the checks of a watched run use.

    Raises:
        UserError: there are too few rows, retain rows would join after the last step, or rows do not say what the sampler
            goes by.
    """
    length = pass_length(run.sampler, data.forget, data.retain)
    steps, _ = steps_of(run, length)
    if not run.watch.on:
        return data
    watched, retain = read_watched(
        run.watch,
        data.forget,
        data.retain,
        domain_column=run.domain_column,
        seed=run.seed,
        steps=steps,
        steps_per_epoch=length / (run.batch_size * batches_of_step(run, length)),
    )
    return replace(data, retain=retain, watched=watched)


STATE_TOKENS = 2048
"""Tokens of a batch whose states at every depth are held at once."""


def by_meaning(run: Unlearn, data: Data, model: Any, tokenizer: Any) -> Data:
    """Return the data with sub-domains clustered by the model's hidden states too (`domains`).

    Args:
        model: the model as it is before the run.
        tokenizer: its tokenizer.
    """
    if not run.adapter.routes or run.num_forget_experts == 1 or len(set(data.domain)) < 2 or have_labels(data.forget):
        return data
    means = row_states(model, tokenizer, data.forget, run.max_length or context_length(model))
    domain, names = _sub_domains(run, data.forget, means)
    return replace(data, domain=domain, names=names)


def row_states(model: Any, tokenizer: Any, examples: Sequence[Example], limit: int | None) -> Array:
    """Return the mean last hidden state of each example's tokens, [examples, width].

    Args:
        limit: longest piece that an example is read in; the pieces of a long one count alike.
    """
    rows, owner = encode_all(tokenizer, examples, max_length=limit, label="forget")
    found: dict[int, list[Array]] = {}
    pad = tokenizer.pad_token_id
    for i, states in hidden_states(model, rows, pad_token_id=pad, batch_tokens=STATE_TOKENS, label="sub-domains"):
        found.setdefault(owner[i], []).append(states[:, -1].mean(axis=0, dtype=np.float64))
    return np.stack([np.mean(found[i], axis=0) for i in range(len(examples))])


def clusters(first: int, count: int) -> list[str]:
    """Return names for numbered clusters."""
    return [f"cluster {first + i}" for i in range(count)]


def _sub_domains(run: Unlearn, forget: list[Example], states: Array | None = None) -> tuple[list[int], list[str]]:
    """Return the sub-domain of each forget row, and the sub-domains' names."""
    if run.num_forget_experts == 1:
        return [0] * len(forget), ["all"]
    if run.domain_column is None and run.num_forget_experts is not None:
        index, names = domains(forget, n=run.num_forget_experts, seed=run.seed, states=states)
    else:
        index, names = domains(forget, seed=run.seed, max_domains=run.max_domains, states=states)
    if run.domain_column is None and not run.name_clusters:
        # what a cluster is named after are words of the data, which end up in cards and configurations
        names = clusters(1, len(names))
    if run.num_forget_experts is not None and run.num_forget_experts < len(names):
        raise UserError(
            f"`num_forget_experts` is {run.num_forget_experts}, but column {run.domain_column!r} names {len(names)} "
            f"sub-domains. Give at least {len(names)}, or leave `domain_column` out to cluster into fewer."
        )
    return index, names
