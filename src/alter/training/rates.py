"""The fitted router on held-out text: false alarms on ordinary kinds, and forget rows caught in other wordings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alter import metrics
from alter.core import show
from alter.data import Encoded, apart_from, rewording
from alter.data.background import background
from alter.groundwork import frozen
from alter.training.evidence import encode_fitting, text_of

if TYPE_CHECKING:
    from alter.training.batches import RunRows


def _rate(opened: list[Tensor]) -> dict[str, Any]:
    flags = torch.cat(opened) if opened else torch.zeros(0, dtype=torch.bool)
    count, n = int(flags.sum()), len(flags)
    return {"share": count / n if n else None, "interval": list(metrics.samples.share_interval(count, n)), "tokens": n}


def measure_router(model: Any, rows: RunRows, tokenizer: Any, limit: int | None) -> dict[str, Any]:
    """Measure how often low-entropy tokens open a forget expert where they should not, and where they should.

    Returns:
        `false_alarms`: on kinds of text that no fit sees, of all of them and `by_kind`; `caught`: among the answers'
        tokens of forget rows, by wording of the question (`alter.data.rewording.MEASURED`). Each has the `share`, its
        `interval` (Wilson, 95 %, tokens taken as independent) and the number of `tokens`.
    """
    config = model.peft_config["default"]
    kinds = apart_from(background(unseen=True), [text_of(e) for e in rows.examples])
    groups: list[tuple[str, str, list[Encoded]]] = []
    for kind, examples in kinds.items():
        groups.append(("ordinary", kind, [r for r in encode_fitting(tokenizer, examples, limit) if r is not None]))
    for name, asked in rewording.to_measure(rows.examples, kinds).items():
        groups.append(("forget", name, [r for r in encode_fitting(tokenizer, asked, limit) if r is not None]))
    every = [row for *_, encoded in groups for row in encoded]
    traced = iter(
        frozen.trace_rows(model, every, pad_token_id=tokenizer.pad_token_id, gates=True, label="router, measured")
    )
    opened: dict[str, dict[str, list[Tensor]]] = {"ordinary": {}, "forget": {}}
    for side, name, encoded in groups:
        flags = opened[side].setdefault(name, [])
        for row in encoded:
            seen = next(traced)
            assert seen.entropy is not None
            assert seen.gates is not None
            counted = seen.entropy <= config.threshold
            if side == "forget":
                counted[: row.prompt_length] = False
            counted[0] = False
            flags.append((seen.gates[..., 1:] > 0).any(-1)[counted])
    alarms = _rate([flag for flags in opened["ordinary"].values() for flag in flags])
    by_kind = {kind: _rate(flags) for kind, flags in opened["ordinary"].items()}
    caught = {name: _rate(flags) for name, flags in opened["forget"].items() if flags}
    return {"false_alarms": {**alarms, "by_kind": by_kind}, "caught": caught}


def say_rates(found: Mapping[str, Any]) -> None:
    """Print what `measure_router` found."""
    alarms = found["false_alarms"]
    if alarms["tokens"]:
        low, high = alarms["interval"]
        show(
            f"Router: {alarms['share']:.2%} of {alarms['tokens']} low-entropy tokens of ordinary text of kinds that it was not "
            f"fitted on open a forget expert (95 % interval {low:.2%} to {high:.2%}).",
            stderr=True,
        )
    shares = ", ".join(
        f"{name} {rate['share']:.0%}" for name, rate in found["caught"].items() if rate["share"] is not None
    )
    if shares:
        show(
            f"Router: of the answers' low-entropy tokens it catches, by wording of the question: {shares}.",
            stderr=True,
        )
