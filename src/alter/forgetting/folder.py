"""What a run of `alter forget` leaves in its folder: what it was begun with, rows, probes, and what was measured before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from alter.adapter import same_base
from alter.core import UserError
from alter.data import Row, local_parts
from alter.forgetting.material import Material
from alter.forgetting.measure import AgainstZero, still_known
from alter.forgetting.names import check_name
from alter.forgetting.settings import Erasing, Forget
from alter.forgetting.speaker import read_jsonl, write_jsonl
from alter.storage import digest, file_digest, read_object, to_json, write_atomic
from alter.training import OtherInputs, check_folder, check_trackers

ROWS_DEPEND_ON = {
    "subject",
    "document",
    "model",
    "kind",
    "keep",
    "retain",
    "samples",
    "answer_tokens",
    "max_passages",
    "batch_size",
    "seed",
    "writer",
}
"""Settings that decide what the rows are."""
SAID_FOLDER = "said"
"""Folder of a run that caches the model's answers."""
ERASED = "erased"
"""Folder of a run that holds the distillation."""
FILES = {
    "forget": "forget.jsonl",
    "invented": "invented.jsonl",
    "retain": "retain.jsonl",
    "probes": "probes.jsonl",
    "kept_probes": "kept.jsonl",
    "facts": "facts.jsonl",
}
"""File of each part of the material."""


def output_folder(settings: Forget) -> Path:
    """Return the run's folder after every check that needs no model.

    Raises:
        UserError: neither or both of subject and document, a folder in use, or what the writer's settings lack.
    """
    if (settings.subject is None) == (settings.document is None):
        raise UserError(
            'Say what to forget: a subject, as in `alter forget "Harry Potter" --model M --out R`, or `document` FILE; '
            + ("both were given." if settings.subject is not None else "neither was given.")
        )
    if settings.subject is not None:
        check_name(settings.subject)
    settings.writer.check()
    check_trackers(settings.report_to)
    if settings.erasing != Erasing() and not settings.erase:
        raise UserError(
            "erasing says how the knowledge is erased, which `erase` asks for: add it, or leave erasing out."
        )
    used = Path(settings.out).is_dir() and any(Path(settings.out).iterdir())
    # of a folder without anything --resume begins
    reads = [(name, getattr(settings, name)) for name in ("model", "document", "retain")]
    reads += [("erasing.general", source) for source in settings.erasing.general]
    out = check_folder(
        settings if used or settings.overwrite else settings.model_copy(update={"resume": False}), reads
    )
    if used and settings.resume:
        plan = out / "forget.json"
        if not plan.is_file() or read_object(plan, "what alter forget wrote").get("key") != rows_key(settings):
            raise UserError(
                f"{settings.out} holds no run of alter forget with these {', '.join(sorted(ROWS_DEPEND_ON))} (and the same document and rows to "
                "keep): give them as they were, another `out`, or `overwrite` to delete it."
            )
    return out


def rows_key(settings: Forget) -> str:
    """Return the key of everything that the rows depend on; of a document and of rows to keep, what the files hold."""
    sources = [source for source in (settings.document, settings.retain) if source is not None]
    files = [path for source in sources for path in local_parts(source) if path.is_file()]
    return digest(settings.model_dump(include=ROWS_DEPEND_ON), [file_digest(path) for path in files])


def check_base(out: Path, base: str | None) -> None:
    """Refuse a base with other weights than the one that the folder's rows were made of: under its name may lie another now.

    Raises:
        OtherInputs: it is another.
    """
    begun = out / "forget.json"
    then = read_object(begun, "what alter forget wrote").get("base") if begun.is_file() else None
    if then and base and not same_base(then, base):
        raise OtherInputs(
            f"{out} was begun with another base model: its weights are not those that the rows were made of. `resume` goes on "
            "with the same alone: give that model, `overwrite` to start again, or another `out`."
        )


def write_material(out: Path, material: Material, before: AgainstZero) -> None:
    """Write rows, probes and facts, and last the comparison before training, without which the folder holds no material."""
    for field in fields(Material):
        write_jsonl(out / FILES[field.name], getattr(material, field.name))
    write_atomic(
        out / "zero.json", to_json({"before": zero_figures(before, material.probes), "probes": asked_digest(material)})
    )


def read_material(out: Path) -> Material | None:
    """Read what `write_material` wrote; None if it was not written whole."""
    if not (out / "zero.json").is_file():
        return None
    return Material(**{name: read_jsonl(out / file) for name, file in FILES.items()})


def asked_digest(material: Material) -> str:
    """Return a digest of the probes as they were when the figures before were taken: all but the answers after."""
    return digest(
        [
            {key: value for key, value in row.items() if key != "after"}
            for row in (*material.probes, *material.kept_probes)
        ]
    )


def zero_figures(zero: AgainstZero, probes: Sequence[Row]) -> dict[str, Any]:
    """Return the comparison with invented subjects as what is written down of it; `probes` are those that were given to it."""
    before = np.array([probes[i].get("logprob", math.nan) for i in zero.places])
    return {
        "n": len(zero.real),
        "invented": int(zero.invented.shape[1]),
        "logprob": float(zero.real.mean()),
        "logprob_invented": float(zero.invented.mean()),
        "auc": zero.auc,
        "p": zero.pvalue,
        **dict(zip(("known", "known_of"), still_known(zero, before), strict=True)),
    }
