"""`alter evaluate --benchmark tofu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pydantic

from alter.data import examples
from alter.evaluation.base import Evaluation, say
from alter.evaluation.leakage import Leak, leaked
from alter.evaluation.tofu.measuring import REWORDED, tofu_metrics
from alter.evaluation.tofu.reference import read_reference
from alter.evaluation.tofu.results import Mode
from alter.evaluation.tofu.sets import SETS, holdout_rows, rows_fingerprint, set_rows
from alter.models import ModelSettings
from alter.storage import Record, cache_folder, digest, file_digest


class TofuEvaluation(Evaluation):
    """Measure a model on TOFU, print the table and, with `json_path`, write the records."""

    benchmark: Literal["tofu"] = "tofu"
    """What to measure on."""
    split: Literal["forget01", "forget05", "forget10"] = "forget10"
    """Which authors were to be forgotten: the last 1, 5 or 10 percent."""
    data: str = "builtin"
    """TOFU's rows: the copy that comes with this package, a folder with its files, or a hub id."""
    mode: Mode = "strict"
    """Metrics by their definition, or with the quirks of OpenUnlearning, to compare with its numbers."""
    retain_records: str | None = None
    """The model retrained without the forgotten rows: its result file (`json_path`) or folder. Gives forget quality."""
    holdout: str | None = None
    """Rows that no model saw, for the membership attacks: a file, builtin:SPLIT, or a hub id; else TOFU's holdoutNN."""
    gradnorm: bool = False
    """Attack by the gradient's norm as well: a backward per row of the forget and the holdout set."""
    leak: Leak = pydantic.Field(default_factory=Leak)
    """Leakage over many samples of the forget set: leak@k."""

    def title(self) -> str:
        """Return the heading of the table."""
        return f"TOFU {self.split}"

    def data_digest(self) -> str | None:
        """Hash the rows of all sets, of the holdout rows, and of the retrained model or its results."""
        judge = self.leak.content()
        sets = {key: set_rows(key, self.split, self.data, self.limit, self.seed) for key in SETS}
        # asked in other words the forget set gives a figure of its own, which no other result is compared with
        reworded = [row.get(REWORDED) for row in sets["forget"]]
        rows = [*map(rows_fingerprint, sets.values()), reworded]
        unseen, _ = holdout_rows(self.split, self.data, self.holdout, self.limit, self.seed)
        return (
            None
            if judge is None
            else digest(rows, unseen and rows_fingerprint(unseen), self._reference_digest(), judge)
        )

    def _retrained(self) -> ModelSettings | None:
        """Return the retrained model if `retain_records` names a model's folder rather than a result file."""
        source = self.retain_records
        if source is None or not (source.startswith("builtin:") or Path(source).expanduser().is_dir()):
            return None
        return self.alike(source)

    def _reference_digest(self) -> str | None:
        if self.retain_records is None:
            return None
        retrained = self._retrained()
        if retrained is not None:
            return retrained.identity(cache_folder(self.cache))["weights"]
        read_reference(self.retain_records)
        return file_digest(self.retain_records)

    def measure(self, model: Any, tokenizer: Any) -> list[Record]:
        """Return the figures of TOFU's table; report on stderr what could not be computed, with the remedy."""
        common: dict[str, Any] = self.model_dump(
            include={"split", "data", "mode", "holdout", "limit", "seed", "batch_tokens", "batch_size"}
        )
        reference = None
        retrained = self._retrained()
        if retrained is not None:
            network, own_tokenizer = retrained.load()
            result = tofu_metrics(network, own_tokenizer, which=("likelihood",), sets=("forget",), **common)
            reference = result.as_reference(retrained.model)
            del network
        elif self.retain_records is not None:
            reference = read_reference(self.retain_records)
        result = tofu_metrics(model, tokenizer, reference=reference, gradnorm=self.gradnorm, **common)
        say(result.notes)
        records = result.records(self.label)
        if self.leak.samples:
            rows = examples(set_rows("forget", self.split, self.data, self.limit, self.seed))
            told = {"benchmark": "tofu", "split": self.split, "data": self.data}
            records += leaked(model, tokenizer, rows, self.leak, seed=self.seed).records(self.label, told)
        return records
