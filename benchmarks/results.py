"""benchmarks/results.csv: one line per measured number, with the hardware it was measured on."""

from __future__ import annotations

import csv
import io
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alter.storage.files import write_atomic

FILE = Path(__file__).parent / "results.csv"
COLUMNS = (
    *("benchmark", "hardware", "torch", "shape", "dtype", "settings", "variant", "metric"),
    *("value", "low", "high", "note"),
)
"""`low` and `high` are the quartiles of the rounds. A line that is measured again replaces the old one."""

KEY = COLUMNS[: COLUMNS.index("value")]


def hardware(device: str) -> str:
    """The machine in words: the GPU's name, or the processor's with its cores and the threads that are used."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name, cores = (models or [name])[0], len(models)
        return f"{name}, {cores} cores, {torch.get_num_threads()} threads"
    return f"{name}, {torch.get_num_threads()} threads"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles as columns."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"value": middle, "low": low, "high": high}


def ratios(of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """`spread` of the ratios within each round."""
    return spread([a / b for a, b in zip(of, to, strict=True)])


def read(file: Path = FILE) -> list[dict[str, str]]:
    """All lines, in the order in which they were first measured."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def add(rows: Iterable[Mapping[str, Any]], file: Path = FILE) -> None:
    """Add rows (dicts with `COLUMNS`, of which some may be missing) to the file, whole or not at all."""
    known = {tuple(row[name] for name in KEY): row for row in read(file)}
    for row in rows:
        text = {name: _text(row.get(name, "")) for name in COLUMNS}
        known[tuple(text[name] for name in KEY)] = text
    lines = io.StringIO()
    writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(known.values())
    write_atomic(file, lines.getvalue())


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
