"""When an attack counts as one that brought something back; pages read it, which load no torch."""

from __future__ import annotations

from alter.storage import Record

RECOVERED = 0.05
"""Share of what was removed from which an attack counts, if its 95 % interval lies above zero."""


def recovers(record: Record) -> bool:
    """Tell whether an attack recovered something, beyond chance; what broke the model under it (no finite interval) has not."""
    low = (record.extra.get("interval") or [1.0])[0]
    return record.value is not None and record.value >= RECOVERED and low is not None and low > 0
