"""Functions that measure: a benchmark, attacks, a comparison of methods or of metrics, and the page about all of it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alter.api.given import add_results, add_rows, add_subject, as_library, settings_of, several
from alter.api.runs import Run

if TYPE_CHECKING:
    from alter.attacks import Attack
    from alter.comparison import Compare
    from alter.data import GivenRows
    from alter.evaluation import Evaluation
    from alter.metaevaluation import MetaEvaluate, Table
    from alter.reporting import Report
    from alter.storage import Record


def evaluate(
    model: Any = None,
    *,
    benchmark: str = "tofu",
    tokenizer: Any = None,
    settings: Evaluation | None = None,
    **keywords: Any,
) -> list[Record]:
    """Measure a model, as `alter evaluate` does.

    Args:
        model: a `Run`, a folder, hub id or builtin:NAME (with `adapter=` if there is one), or a model in memory.
        benchmark: which benchmark; the settings' own if `settings` is given.
        tokenizer: of a model in memory.
        settings: all settings in one object, which what else is given overrides.
        keywords: further settings of the benchmark; `forget`, `retain` and `holdout` may be rows.

    Returns:
        its records, one a metric.

    Raises:
        UserError: an unknown benchmark, bad settings, data or models.
    """
    from alter.evaluation import evaluate as measure
    from alter.plugins import benchmark_of

    with contextlib.ExitStack() as stack:
        add_subject(keywords, model, tokenizer, settings, stack)
        kind = type(settings) if settings is not None else benchmark_of(benchmark)
        add_rows(keywords, stack, **{name: keywords.get(name) for name in ("forget", "retain", "holdout")})
        chosen = settings_of(kind, settings, keywords)
        stack.enter_context(as_library())
        return measure(chosen)


def attack(
    model: Any = None, *, tokenizer: Any = None, settings: Attack | None = None, **keywords: Any
) -> list[Record]:
    """Try to bring the forgotten back, as `alter attack` does.

    Args:
        model: a `Run`, whose forget set is attacked unless `forget` says otherwise; or a model, as in `evaluate`.
        tokenizer: of a model in memory.
        settings: all settings in one object, which what else is given overrides.
        keywords: further settings, such as `attacks=["relearn"]` and `retrained="folder"`.

    Returns:
        records of every attack on every model that takes part.

    Raises:
        UserError: an unknown or impossible attack, bad settings, models or rows.
    """
    from alter.attacks import Attack as Kind
    from alter.attacks import attack as run

    with contextlib.ExitStack() as stack:
        if isinstance(model, Run):
            keywords.setdefault("forget", model.record["settings"]["forget"])
            keywords.setdefault("out", str(model.folder / "attack"))
        add_subject(keywords, model, tokenizer, settings, stack)
        add_rows(keywords, stack, forget=keywords.get("forget"))
        chosen = settings_of(Kind, settings, keywords)
        stack.enter_context(as_library())
        return run(chosen)


def compare(
    settings: Compare | Mapping[str, Any] | None = None,
    *,
    forget: GivenRows | None = None,
    retain: GivenRows | None = None,
    holdout: GivenRows | None = None,
    **keywords: Any,
) -> list[Any]:
    """Compare methods with an equal budget, as `alter compare` does.

    Args:
        settings: all settings in one object, which what else is given overrides; or, as the comparison's own setting of that name,
            each row's.
        forget: rows of your own to forget in the place of TOFU's splits; they need `retain`. Those in memory become files under
            `out`/rows, which the cells' own processes read.
        retain: what every run keeps.
        holdout: questions and answers that no model saw.
        keywords: further settings of the comparison, such as `methods=["alter", "npo"]`.

    Returns:
        the rows of the table; `out` holds the table, the plot and the page.

    Raises:
        UserError: bad settings or models.
    """
    from alter.comparison import Compare as Kind
    from alter.comparison import compare as run

    if isinstance(settings, Mapping):
        keywords, settings = {**keywords, "settings": settings}, None
    with contextlib.ExitStack() as stack:
        add_rows(keywords, stack, forget=forget, retain=retain, holdout=holdout)
        chosen = settings_of(Kind, settings, keywords)
        stack.enter_context(as_library())
        return list(run(chosen))


def meta_evaluate(
    settings: MetaEvaluate | Mapping[str, Any] | None = None,
    *,
    holdout: GivenRows | None = None,
    **keywords: Any,
) -> Table:
    """Try every metric of forgetting on models that know and that do not, as `alter meta-evaluate` does.

    Args:
        settings: all settings in one object, which what else is given overrides; or, as the setting of that name, each method's.
        holdout: questions and answers that no model saw.
        keywords: further settings, such as `model="builtin:tofu-mini/original"`, `retrained=`, `out=` and `methods=["npo"]`.

    Returns:
        the table: `lines`, one a metric and the most trustworthy first, and which models they are made of.

    Raises:
        UserError: bad settings, models or rows, a folder in use, or too few models to compare.
    """
    from alter.metaevaluation import MetaEvaluate as Kind
    from alter.metaevaluation import meta_evaluate as run

    if isinstance(settings, Mapping):
        keywords, settings = {**keywords, "settings": settings}, None
    with contextlib.ExitStack() as stack:
        add_rows(keywords, stack, holdout=holdout)
        chosen = settings_of(Kind, settings, keywords)
        stack.enter_context(as_library())
        return run(chosen)


def report(
    runs: str | PathLike[str] | Run | Sequence[str | PathLike[str] | Run] = (),
    *,
    records: str | PathLike[str] | Sequence[Any] | None = None,
    attacks: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None,
    out: str | PathLike[str] | None = None,
    settings: Report | None = None,
    **keywords: Any,
) -> Path:
    """Write one page about runs and what was measured of them, as `alter report` does.

    Args:
        runs: a `Run` or its folder, or several.
        records: result files, or records in memory: what `evaluate` returned, or a list of that.
        attacks: `out` folders of attacks.
        out: the page; report.html by default.
        settings: all settings in one object, which what else is given overrides.
        keywords: further settings of `alter.reporting.settings.Report`, such as `officer=True`.

    Returns:
        the page.

    Raises:
        UserError: bad settings, nothing to report, runs that have not ended, or records of another model.
    """
    from alter.reporting import Report as Kind
    from alter.reporting import report as write

    with contextlib.ExitStack() as stack:
        if named := several(runs):
            keywords["runs"] = named
        if records is not None:
            add_results(keywords, records, stack)
        if attacks is not None:
            keywords["attacks"] = several(attacks)
        if out is not None:
            keywords["out"] = out
        chosen = settings_of(Kind, settings, keywords)
        stack.enter_context(as_library())
        return write(chosen)
