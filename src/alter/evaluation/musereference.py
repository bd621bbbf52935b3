"""The retrained model that MUSE's PrivLeak compares with: which of its figures fits a run, and how to make it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alter.core import UserError, nearest
from alter.data import MUSE_HUB
from alter.storage import read_records

PUBLISHED_AUC = {"news": 1 - 0.4772, "books": 1 - 0.5393}
"""Min-40 % AUC of MUSE's own retrained Llama-2-7b models, as its code has them (there 1 minus this)."""


@dataclass(frozen=True)
class MuseReference:
    """The retrained model's Min-40 % AUC (ours: 1 if forgotten rows are known), and its source."""

    source: str
    auc: float


@dataclass(frozen=True)
class PrivacySettings:
    """What a run measures PrivLeak with, and the retrained model must have been measured with too.

    Attributes:
        corpus, data, mode, max_length, limit, seed: as in `alter.evaluation.muse.MuseEvaluation`.
        text_length: most tokens of a text; None: all.
    """

    corpus: str
    data: str | None
    mode: str
    max_length: int | None
    text_length: int | None
    limit: int | None
    seed: int

    @property
    def source(self) -> str:
        """Source of the rows."""
        return self.data or MUSE_HUB[self.corpus]

    def remedy(self) -> str:
        """Return the command that measures the retrained model as this run measures its own."""
        command = f"alter evaluate --model RETRAINED --benchmark muse --corpus {self.corpus} --criteria privleak"
        command += f" --data {self.data}" if self.data is not None else ""
        command += f" --mode {self.mode}" if self.mode == "compat" else ""
        command += f" --max-length {self.max_length}" if self.max_length is not None else ""
        command += f" --limit {self.limit} --seed {self.seed}" if self.limit is not None else ""
        return (
            f"Measure the retrained model once with `{command} --json retrained.json`, then give "
            "`retain_records` retrained.json."
        )


def is_model(source: str | None) -> bool:
    """Tell whether `retain_records` names a model to measure, not a file of results."""
    return source is not None and (source.startswith("builtin:") or Path(source).expanduser().is_dir())


def how_to_make_a_reference(run: PrivacySettings) -> str:
    """Return what is said where there is no retrained model to compare with."""
    return f"No privleak: it compares with a model that never saw the forgotten texts. {run.remedy()}"


def usable(reference: MuseReference, mode: str) -> MuseReference:
    """Return the reference.

    Raises:
        UserError: its AUC is 1, by which strict PrivLeak would divide by nothing.
    """
    if reference.auc == 1 and mode != "compat":
        raise UserError(
            f"{reference.source} tells every forgotten text from unseen ones (AUC 1), so PrivLeak, which divides by "
            "1 - AUC, is not defined: is it really a model that never saw the forgotten texts?"
        )
    return reference


def read_muse_reference(source: str, run: PrivacySettings, fingerprint: str) -> MuseReference:
    """Return the retrained model's AUC from a file of results, or MUSE's own for `source` "published".

    Args:
        source: the file, or "published".
        run: what it must have been measured with.
        fingerprint: of the texts that it must have been measured on.

    Raises:
        UserError: the file is none, or was made from other texts, in another mode or with another length.
    """
    if source == "published":
        if run.source != MUSE_HUB[run.corpus] or run.mode == "compat" or run.limit or run.max_length:
            raise UserError(
                '`retain_records` "published" is for the whole texts of '
                f"{MUSE_HUB[run.corpus]} in strict mode (and for Llama-2-7b). {run.remedy()}"
            )
        return MuseReference("MUSE's code", PUBLISHED_AUC[run.corpus])
    if not Path(source).expanduser().is_file():
        folder = Path(source).expanduser().parent
        near = nearest(source, [str(path) for path in folder.iterdir()] if folder.is_dir() else [])
        raise UserError(f"No result file or model at {source}.{near} {run.remedy()}")
    found = [
        record
        for record in read_records(Path(source).expanduser())
        if record.metric == "mia_min_k" and record.extra.get("benchmark") == "muse" and record.value is not None
    ]
    if len(found) != 1:
        raise UserError(
            f"{source} holds {len(found)} records of mia_min_k on MUSE; expected one, of the retrained model. "
            f"{run.remedy()}"
        )
    record = found[0]
    for name, own in (("corpus", run.corpus), ("mode", run.mode), ("max_length", run.text_length)):
        other = record.mode if name == "mode" else record.extra.get(name)
        if other != own:
            raise UserError(f"{source} was measured with {name} {other}, this run has {name} {own}. {run.remedy()}")
    if record.extra.get("fingerprint") != fingerprint:
        raise UserError(
            f"{source} was measured on other texts (of {record.extra.get('data')}) than this run's (of "
            f"{run.source}). {run.remedy()}"
        )
    assert record.value is not None
    return usable(MuseReference(source, record.value), run.mode)
