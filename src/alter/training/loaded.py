"""The inputs of a run: its model, with the adapter that grows on it, and its encoded rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from alter.data import Encoded, Example, encode_all
from alter.groundwork.alternatives import alternatives
from alter.inference import check_embedded
from alter.models import Former, load_model
from alter.training.codes import check_codes
from alter.training.data import Data
from alter.training.sampler import Kin
from alter.training.settings import Unlearn, steps_of


@dataclass(frozen=True)
class Loaded:
    """The model of a run and its encoded rows, before anything is computed or written.

    Attributes:
        base: the model; with an adapter to grow, that is on it.
        tokenizer: its tokenizer.
        limit: longest sequence.
        forget, retain: the rows; a long one has become several.
        alternative: the forget rows rewritten as the objective asks, if it does.
        examples: of each forget row the example that it comes from.
        domain: of each forget row its sub-domain.
        former: the earlier adapter that is trained on.
        alone: steps before retain rows join.
        kin: what rows are to each other, where the sampler asks for it.
    """

    base: Any
    tokenizer: Any
    limit: int | None
    forget: list[Encoded]
    retain: list[Encoded]
    alternative: list[Encoded]
    examples: list[Example]
    domain: list[int]
    former: Former | None
    alone: int
    kin: Kin | None = None


def load_for_run(run: Unlearn) -> tuple[Any, Any]:
    """Load the model and its tokenizer, with the adapter of earlier requests on it where that grows.

    Raises:
        UserError: there is no such model or adapter.
    """
    # an adapter that is trained on comes later, from its weights: all that is measured before sees the bare base
    grown = run.start_from if run.adapter.grows else None
    return load_model(
        run.model, grown, run.adapter.dtype(run.dtype), run.device, run.quantization, run.chat_template_kwargs
    )


def encode_rows(run: Unlearn, data: Data, base: Any, tokenizer: Any, former: Former | None) -> Loaded:
    """Check that the model has what the settings name, and encode the rows.

    Raises:
        UserError: the model lacks what the settings name, or the rows do not fit it.
    """
    run.adapter.check_model(base, run, former)
    check_codes(run, base, data.forget)
    limit = run.max_length or getattr(base.config, "max_position_embeddings", None)
    forget, owner = encode_all(tokenizer, data.forget, max_length=limit, label="forget")
    retain, of_retain = encode_all(tokenizer, data.retain, max_length=limit, label="retain")
    for examples, rows, owners in ((data.forget, forget, owner), (data.retain, retain, of_retain)):
        for row, i in zip(rows, owners, strict=True):
            check_embedded(base, row.input_ids, examples[i].name, tokenizer)
    if run.retain_objective.needs.prompts:
        retain = [replace(row, labels=list(row.input_ids)) for row in retain]
    examples = [data.forget[i] for i in owner]
    kin = run.sampler.kin(data.forget, data.retain)
    kin = None if kin is None else kin.at(owner, of_retain)
    _, alone = steps_of(run, run.sampler.epoch_length(kin, len(forget), len(retain)))
    other = alternatives(run.objective, tokenizer, base, examples, forget, seed=run.seed, max_length=limit)
    domain = [data.domain[i] for i in owner]
    return Loaded(base, tokenizer, limit, forget, retain, other, examples, domain, former, alone, kin)
