"""The retrained model's part: read from its records or OpenUnlearning's files, and what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alter.core import UserError, nearest
from alter.evaluation.tofu.results import TofuReference, TofuResult, TofuSet
from alter.storage import Record, from_json, read_records


def lacking(
    result: TofuResult, forget: TofuSet, data: str, limit: int | None, seed: int, holdout: str | None
) -> list[str]:
    """Return notes on figures that the retrained model's results are too little for, each with the command that helps."""
    command = f"alter evaluate --model RETRAINED --benchmark tofu --split {result.split}"
    command += f" --data {data}" if data != "builtin" else ""
    command += f" --mode {result.mode}" if result.mode != "strict" else ""
    command += f" --holdout {holdout}" if holdout is not None else ""
    command += f" --limit {limit} --seed {seed}" if limit is not None else ""
    reference = result.reference
    if reference is None:
        which = "forget_quality, mia_reference, privleak" if forget.attacks else "forget_quality"
        return [
            f"No {which}: that takes a model that never saw the forget set. Make its results once with "
            f"`{command} --json retrained.json`, then give `retain_records` retrained.json."
        ]
    if not forget.attacks:
        return []
    notes = []
    again = f"measure it again with `{command} --json retrained.json`"
    if reference.min_k_auc is None:
        taken = "privleak takes 0.5 for its AUC, as OpenUnlearning does" if result.mode == "compat" else "no privleak"
        notes.append(f"{reference.source} has no mia_min_k, so {taken}: {again}.")
    elif reference.min_k_auc == 1 and result.mode == "strict":
        notes.append(
            f"No privleak: the AUC of {reference.source} is 1, and PrivLeak divides by what is left to 1. "
            "Take holdout rows that are more like the forget set."
        )
    if reference.losses is None:
        notes.append(f"No mia_reference: {reference.source} has no mia_loss with its rows; {again}.")
    return notes


def as_reference(reference: TofuResult | TofuReference | Sequence[Record] | None) -> TofuReference | None:
    if reference is None or isinstance(reference, TofuReference):
        return reference
    if isinstance(reference, TofuResult):
        return reference.as_reference()
    return reference_from_records(reference, "the retrained model's records")


def reference_from_records(records: Sequence[Record], source: str) -> TofuReference:
    """Return the reference that a retrained model's records hold.

    Raises:
        UserError: there is no forget_truth_ratio with its rows among them, or there are several.
    """
    ratios = [record for record in records if record.metric == "forget_truth_ratio"]
    if len(ratios) != 1 or not ratios[0].per_item:
        models = sorted({record.model for record in records})
        raise UserError(
            f"{source} holds {len(ratios)} records of forget_truth_ratio with rows; expected one, of the retrained "
            f"model alone (models there: {', '.join(models) or 'none'}): write it with `alter evaluate --model "
            "RETRAINED --benchmark tofu --json FILE`."
        )
    ratio = ratios[0]
    of = {record.metric: record for record in records}
    scores = of["mia_loss"].extra.get("scores") if "mia_loss" in of else None
    return TofuReference(
        source,
        ratio.extra.get("split"),
        ratio.mode,
        ratio.extra.get("fingerprint"),
        np.array(ratio.per_item, dtype=np.float64),
        of["mia_min_k"].value if "mia_min_k" in of else None,
        None if scores is None else (np.array(scores["forget"]), np.array(scores["holdout"])),
        of["mia_loss"].extra.get("holdout") if "mia_loss" in of else None,
    )


def read_json(path: str, expected: str) -> Any:
    try:
        return from_json(Path(path).read_text())
    except FileNotFoundError:
        folder = Path(path).parent
        names = [str(folder / entry.name) for entry in folder.iterdir()] if folder.is_dir() else []
        raise UserError(f"No file at {path}; expected {expected}.{nearest(path, names)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a JSON file ({error}); expected {expected}.") from None


def from_openunlearning(content: dict[str, Any], source: str) -> TofuReference:
    """Return the reference in a retrained model's TOFU_EVAL.json."""
    items = content["forget_truth_ratio"].get("value_by_index")
    if not isinstance(items, dict) or not all(isinstance(v, dict) and "score" in v for v in items.values()):
        raise UserError(f"{source} has no forget_truth_ratio.value_by_index with scores; is it a TOFU_EVAL.json?")
    ratios = np.array([items[key]["score"] for key in sorted(items, key=int)], dtype=np.float64)
    return TofuReference(source, None, "compat", None, ratios, (content.get("mia_min_k") or {}).get("agg_value"))


def read_reference(path: str) -> TofuReference:
    """Read a retrained model's reference: records written by --json, or OpenUnlearning's TOFU_EVAL.json.

    Raises:
        UserError: neither of the two, or of another version.
    """
    content = read_json(path, "the retrained model's records")
    if isinstance(content, dict) and "forget_truth_ratio" in content:
        return from_openunlearning(content, path)
    return reference_from_records(read_records(path), path)
