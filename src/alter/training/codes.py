"""The sparse autoencoder of a run: which block it reads, and the mean codes of names (`Needs.codes`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from alter.adapter import base_fingerprint
from alter.core import UserError, show
from alter.data import Example
from alter.groundwork import codes_from, measure_codes, read_autoencoder, subjects
from alter.logits import Depth
from alter.methods import Codes, blocks
from alter.storage import digest
from alter.training.folder import kept_tensors
from alter.training.settings import Unlearn


def reading_at(run: Unlearn, block: int, count: int) -> Unlearn:
    """Return the settings with every hidden-state objective set to read after block `block` of `count`."""
    parts = {
        name: part.model_copy(update={"depth": (block + 0.5) / count})
        for name in ("objective", "retain_objective")
        if (part := getattr(run, name)).needs.depth is not None
    }
    return run.model_copy(update=parts)


def at_autoencoder(run: Unlearn, base: Any) -> Unlearn:
    """Return the settings with their objectives reading the block that the given autoencoder was trained on.

    Raises:
        UserError: it is not read, or was not made for such a model.
    """
    folder = getattr(run.objective, "sae", None) if run.objective.needs.codes else None
    if folder is None:
        return run
    given, block = read_autoencoder(folder)
    width, (_, count) = base.config.get_text_config().hidden_size, blocks(base)
    if len(given.encoder) != width:
        raise UserError(
            f"`objective.sae` {folder} reads states of width {len(given.encoder)}, this model's are {width} wide: give an autoencoder "
            "of this model."
        )
    if block is not None and block >= count:
        raise UserError(
            f"`objective.sae` {folder} reads block {block}, and the model has {count}: give an autoencoder of this model."
        )
    return run if block is None else reading_at(run, block, count)


def check_codes(run: Unlearn, base: Any, forget: Sequence[Example]) -> None:
    """Refuse, before any computation, what `at_autoencoder`, `codes_of` and `redirection.shift_of` cannot work with.

    Raises:
        UserError: no forget row names anybody, or the autoencoder that is given is not one of this model.
    """
    objective: Any = run.objective
    if objective.needs.codes or (objective.needs.redirected and not objective.questions):
        subjects(objective, forget)
    if objective.needs.codes:
        at_autoencoder(run, base)


def codes_of(
    run: Unlearn,
    base: Any,
    tokenizer: Any,
    forget: Sequence[Example],
    retain: Sequence[Example],
    depth: Depth | None,
    limit: int | None,
    cache: Path,
) -> tuple[list[str], Codes | None]:
    """Return the names to forget and, for an `UnknownCode` objective, the codes that it compares with; kept in `cache`.

    Raises:
        UserError: no forget row names anybody.
    """
    objective: Any = run.objective
    if not objective.needs.codes:
        return [], None
    assert depth is not None
    given = None if objective.sae is None else read_autoencoder(objective.sae)[0]
    key = digest(
        base_fingerprint(base),
        objective.model_dump(),
        run.seed,
        limit,
        None if given is None else [value.sum().item() for value in given.tensors().values()],
        [[row.prompt, row.answer] for part in (forget, retain) for row in part],
    )

    def codes() -> dict[str, Tensor]:
        found, told = measure_codes(
            base,
            tokenizer,
            objective,
            depth,
            forget,
            retain,
            given,
            seed=run.seed,
            max_length=limit,
        )
        if told is not None:
            show(
                f"Sparse autoencoder: {len(found['bias'])} features, {objective.sae_active} active, {told:.0%} of the variance.",
                stderr=True,
            )
        return found

    found = kept_tensors(cache, key, codes)
    device = next(base.parameters()).device
    return subjects(objective, forget), codes_from(found, given, objective.sae_active, device)
