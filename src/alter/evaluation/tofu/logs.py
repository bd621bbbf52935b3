"""TOFU's figures from published per-item logs, without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydantic
import tyro

from alter.core import Array, UserError
from alter.evaluation.base import say
from alter.evaluation.tofu.reference import from_openunlearning, read_json
from alter.evaluation.tofu.results import Mode, TofuReference, TofuResult, TofuSet
from alter.storage import Record


class Aggregate(pydantic.BaseModel, extra="forbid"):
    """Settings of `alter aggregate`: TOFU's figures from published per-item logs, without a model."""

    log: tyro.conf.Positional[str]
    """The model's log, as published by TOFU's authors (eval_log_aggregated.json)."""
    retain: str | None = None
    """The retrained model's: such a log, or OpenUnlearning's TOFU_EVAL.json. Gives forget quality."""
    mode: Mode = "strict"
    """By the definition, or with OpenUnlearning's 1e-10 in the denominators."""
    name: str | None = None
    """What the records call the model; the log's file name by default."""


LOG_PARTS = {
    "forget": "eval_log_forget.json",
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
}
LOG_FIELDS = ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall")


def _read_log(path: str, mode: Mode) -> TofuResult:
    """Read a per-item log of TOFU's authors into the same result that a live evaluation gives."""
    expected = "a per-item log of TOFU (" + ", ".join(LOG_PARTS.values()) + ")"
    content = read_json(path, expected)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}; expected {expected}.")
    result = TofuResult("", path, mode, {})
    for key, part in LOG_PARTS.items():
        if not isinstance(content.get(part), dict):
            raise UserError(
                f"{path} has no {part!r}; it has {', '.join(map(repr, content)) or 'nothing'}; expected {expected}."
            )
        fields = content[part]
        missing = [name for name in LOG_FIELDS if not isinstance(fields.get(name), dict)]
        if missing:
            raise UserError(f"{path}: {part} has no {', '.join(missing)}; expected {', '.join(LOG_FIELDS)}, by item.")
        items = sorted(fields[LOG_FIELDS[0]], key=int)
        for name in LOG_FIELDS:
            if set(fields[name]) != set(items) or not items:
                raise UserError(
                    f"{path}: {part} has {len(items)} items of {LOG_FIELDS[0]} but {len(fields[name])} of {name}, "
                    "or other ones: the log is incomplete."
                )
        try:
            loss, right, wrong, rouge = (
                np.array([fields[name][item] for item in items], dtype=np.float64) for name in LOG_FIELDS
            )
        except (TypeError, ValueError):
            raise UserError(f"{path}: {part} holds something other than numbers, or ragged lists of them.") from None
        result.sets[key] = TofuSet(key, len(items), "", rouge=rouge)
        result.sets[key].set_likelihood(loss, right, wrong, compat=mode == "compat")
    return result


def aggregate(log: str, retain: str | None = None, *, mode: Mode = "strict", name: str | None = None) -> list[Record]:
    """Return TOFU's figures from a published per-item log; with the retrained model's log, forget quality as well.

    The truth ratio takes `avg_paraphrased_loss` for the right answer in every set, as the logs were made: real authors
    and world facts have no paraphrase, there it is the plain answer once more.

    Args:
        log: path of the model's log.
        retain: path of the retrained model's log, or of OpenUnlearning's TOFU_EVAL.json.
        mode: "compat" adds 1e-10 to the denominators.
        name: what the records call the model; the file's name by default.

    Raises:
        UserError: not such a log, a part or an item is missing, or the two logs differ in their number of items.
    """
    result = _read_log(log, mode)
    if retain is not None:
        content = read_json(retain, "the retrained model's log")
        if isinstance(content, dict) and "forget_truth_ratio" in content:
            ratios = from_openunlearning(content, retain).truth_ratio
        else:
            ratios = _truth_ratio(_read_log(retain, mode))
        if len(ratios) != result.sets["forget"].n:
            raise UserError(
                f"{log} has {result.sets['forget'].n} forget items but {retain} has {len(ratios)}: "
                "they are not of the same evaluation."
            )
        result.reference = TofuReference(retain, None, None, None, ratios)
    else:
        say([f"No forget_quality: give the retrained model's log as well, `alter aggregate {log} --retain LOG.json`."])
    return result.records(name or Path(log).stem)


def _truth_ratio(result: TofuResult) -> Array:
    ratios = result.sets["forget"].truth_ratio
    assert ratios is not None
    return ratios
