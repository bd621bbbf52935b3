"""Further frozen passes that objectives ask for: after an instruction, as a persona, with the reinforced model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from alter.adapter import base_fingerprint
from alter.core import UserError
from alter.data import Encoded
from alter.groundwork import frozen, low_rank, persona_views, reinforce
from alter.methods import target_layers, target_names
from alter.storage import digest
from alter.training.factors import factors_of, flat
from alter.training.folder import kept_tensors
from alter.training.settings import Unlearn


def instructed_view(run: Unlearn, tokenizer: Any, rows: list[Encoded], base: Any) -> dict[str, frozen.View]:
    """Return DUET's teacher pass: the rows after its instruction.

    Raises:
        UserError: the objectives instruct it differently, the longest row does not fit into the context behind it, or raw text
            has no answer whose first token could be compared.
    """
    for name, part in (("objective", run.objective), ("retain_objective", run.retain_objective)):
        if getattr(part, "first", False) and any(row.prompt_length <= 1 for row in rows):
            raise UserError(
                f"`{name}.first` compares at the first token of an answer, and raw text has no question that it answers: give "
                f"`{name}.first=False`, or rows with question and answer."
            )
    said = {part.needs.instruction for part in (run.objective, run.retain_objective)} - {None}
    if len(said) > 1:
        raise UserError(
            "`objective.instruction` and `retain_objective.instruction` differ, and there is one teacher: give the same words."
        )
    words = tuple(tokenizer(str(said.pop()), add_special_tokens=False)["input_ids"])
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(row.input_ids) for row in rows)
    if limit is not None and longest + len(words) > limit:
        raise UserError(
            f"`objective.instruction` has {len(words)} tokens and the longest row {longest}; together they exceed the model's "
            f"context of {limit}: give `max_length` of at most {limit - len(words)}, or a shorter instruction."
        )
    return {"instructed": frozen.View(words, tokenizer.bos_token_id)}


def frozen_views(
    base: Any, tokenizer: Any, run: Unlearn, forget: list[Encoded], retain: list[Encoded], cache: Path
) -> dict[str, frozen.View]:
    """Return the frozen passes besides the base's own that the objectives ask for."""
    wanted = {*run.objective.needs.views, *run.retain_objective.needs.views}
    views: dict[str, frozen.View] = {}
    if "instructed" in wanted:
        views |= instructed_view(run, tokenizer, [*forget, *retain], base)
    if "expert" in wanted:
        context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
        views |= persona_views(run.objective, tokenizer, forget, context)
    if "reinforced" in wanted:
        layers = target_layers(base, target_names(base, None), None)
        key = digest(
            base_fingerprint(base),
            run.model_dump(include={"reinforcement", "batch_size", "seed"}),
            [row.input_ids for row in forget],
        )

        def make() -> dict[str, Tensor]:
            return flat(
                reinforce(
                    base,
                    layers,
                    forget,
                    r=16,
                    scaling=2.0,
                    epochs=run.reinforcement.epochs,
                    learning_rate=run.reinforcement.learning_rate,
                    batch=run.batch_size,
                    seed=run.seed,
                    pad_token_id=tokenizer.pad_token_id,
                )
            )

        factors = factors_of(kept_tensors(cache, key, make), next(base.parameters()).device)
        views["reinforced"] = frozen.View(inside=lambda: low_rank(layers, factors, 2.0))
    return views
