"""Settings of `alter report`."""

from __future__ import annotations

from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict, Field

from alter.settings import Rows, Written


class Report(BaseModel):
    """Write one HTML page about one or several runs: figures, samples, curves, attacks, requests, provenance."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    runs: tyro.conf.Positional[list[str]] = Field(default_factory=list)
    """Folders of runs, as `alter unlearn` or `alter demo` wrote them."""
    out: Annotated[str, Written()] = "report.html"
    """The page."""
    records: list[str] = Field(default_factory=list)
    """Result files (`alter evaluate --json`). They go to the run whose adapter they measured and replace its records.json's figures."""
    attacks: list[str] = Field(default_factory=list)
    """Folders of attacks (`alter attack --out`)."""
    db: str | None = None
    """Database of erasure requests, as an SQLAlchemy URL."""
    request: list[str] = Field(default_factory=list)
    """Only these of its requests, each with its history; by default all. Whoever asked need not read of the others."""
    samples: Rows = Field(6, ge=0)
    """Questions to show with all answers, and who the parts of the forget set are about. They quote what was to be forgotten; 0
    leaves them out."""
    officer: bool = False
    """Two pages for whoever answers for the erasure: the summary, the counts behind it, the requests and what it rests on.
    Quotes nothing."""
    title: str | None = None
    """Heading of the page."""
