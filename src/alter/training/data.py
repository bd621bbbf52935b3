"""What a run reads before any model is loaded: both sets of rows, their sub-domains, and what is watched."""

from __future__ import annotations

from dataclasses import dataclass, replace

from alter.core.errors import UserError
from alter.data.domains import domains
from alter.data.examples import Example, check_overlap, load_examples
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
    """The data without the retain rows that are watched, if the run is watched.

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


def clusters(first: int, count: int) -> list[str]:
    """Names of clusters by number."""
    return [f"cluster {first + i}" for i in range(count)]


def _sub_domains(run: Unlearn, forget: list[Example]) -> tuple[list[int], list[str]]:
    """Sub-domain of each forget row, and their names."""
    if run.num_forget_experts == 1:
        return [0] * len(forget), ["all"]
    if run.domain_column is None and run.num_forget_experts is not None:
        index, names = domains(forget, n=run.num_forget_experts, seed=run.seed)
    else:
        index, names = domains(forget, seed=run.seed, max_domains=run.max_domains)
    if run.domain_column is None and not run.name_clusters:
        # what a cluster is named after are words of the data, which end up in cards and configurations
        names = clusters(1, len(names))
    if run.num_forget_experts is not None and run.num_forget_experts < len(names):
        raise UserError(
            f"num_forget_experts is {run.num_forget_experts}, but column {run.domain_column!r} names {len(names)} "
            f"sub-domains. Give at least {len(names)}, or leave domain_column out to cluster into fewer."
        )
    return index, names
