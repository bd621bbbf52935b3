"""`alter report`: one HTML page about runs, for the engineer and for the person who asked for the erasure.

The page is one file that fetches nothing and runs no script; `alter.rendering.markup` escapes every text that it shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from alter.core import UserError, show
from alter.rendering import Html, called, document, join, tag
from alter.reporting.attacks import attacks, recovered_records
from alter.reporting.origin import provenance_section, settings_of
from alter.reporting.requests import requests
from alter.reporting.runs import Reported, read
from alter.reporting.samples import sample_answers, samples
from alter.reporting.settings import Report
from alter.reporting.summary import asking, evidence, summary_section
from alter.reporting.tables import figures, side_by_side
from alter.reporting.tokens import entropies, routing
from alter.reporting.training import logged, training_section
from alter.storage import commit, versions, write_atomic


def sections(run: Reported, level: int, count: int) -> tuple[dict[str, list[Html]], list[Html]]:
    """Return a run's sections by title; a section without data is a line that names the command that makes it.

    Args:
        run: the run.
        level: of the headings within a section.
        count: questions to show as samples.
    """
    evaluate, attack, report = asking(run)
    trained = "alter unlearn RECIPE.yaml --out RUN"
    answered = bool(samples(run)[1])
    found: dict[str, list[Html]] = {"Summary": summary_section(run, level)}
    missing: list[Html] = []
    plan = (
        ("Figures", bool(run.records), lambda: figures(run), evaluate, f"{report} --records asked.json"),
        (
            "Sample answers",
            answered and count > 0,
            lambda: sample_answers(run, level, count),
            report if answered else evaluate,
            f"{report} --samples 6" if answered else f"{report} --records asked.json",
        ),
        (
            "Attacks",
            bool(recovered_records(run)),
            lambda: attacks(run, level, count),
            attack,
            f"{report} --attacks attacks",
        ),
        ("Token entropies", run.tokens is not None, lambda: entropies(run), trained, "RUN"),
        ("Routing", run.tokens is not None, lambda: routing(run), trained, "RUN"),
        ("Training", bool(logged(run)), lambda: training_section(run, level), trained, "RUN"),
        ("Settings", bool(run.written), lambda: settings_of(run), trained, "RUN"),
        (
            "Provenance",
            bool(run.facts) or any(r.provenance for r in run.records + run.attacks),
            lambda: provenance_section(run, level),
            evaluate,
            f"{report} --records asked.json",
        ),
    )
    for title, there, make, command, option in plan:
        if there:
            found[title] = make()
        elif run.facts and not run.facts["router"] and title in ("Token entropies", "Routing"):
            missing.append(tag("li", f"{title}: this run has no router."))
        else:
            where = tag("code", command), ", then ", tag("code", option)
            missing.append(tag("li", f"{title}: ", *where, ", would show them."))
    return found, missing


def _header(heading: str, runs: Sequence[Reported], links: Sequence[tuple[str, str]]) -> Html:
    """Return the page's top: heading, what it is about, when it was made, links to the sections."""
    about = runs[0].settings if len(runs) == 1 else {}
    subject = (
        f"{called(about['forget'])}, to be forgotten by {called(about['model'])}"
        if about
        else ", ".join(run.name for run in runs)
    )
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return tag(
        "header",
        tag("h1", heading),
        tag("p", f"{subject}. " if subject else "", f"Made on {made}.", class_="soft"),
        tag(
            "nav", tag("ul", *(tag("li", tag("a", name, href=f"#{to}")) for name, to in links)), aria_label="Sections"
        ),
    )


def compose(
    runs: Sequence[Reported],
    *,
    count: int = 6,
    title: str | None = None,
    asked: Sequence[Html] | None = None,
    officer: bool = False,
) -> str:
    """Return the page.

    Args:
        runs: read and brought together by `read`.
        count: questions to show as samples.
        title: heading.
        asked: the section on erasure requests, if there is one.
        officer: summary and evidence of each run alone.
    """
    heading = title or "Unlearning report"
    parts: list[Html] = []
    links: list[tuple[str, str]] = []

    def section(name: str, identity: str, content: Sequence[Html], class_: str | None = None) -> None:
        links.append((name, identity))
        parts.append(tag("section", tag("h2", name, id=identity), *content, class_=class_))

    def left_out(missing: Sequence[Html]) -> list[Html]:
        return [tag("ul", *missing, class_="small")] if missing else []

    if officer:
        for i, run in enumerate(runs):
            name = "Summary" if len(runs) == 1 else run.name
            section(name, f"run{i}", [*summary_section(run, 3, commands=False), tag("h3", "Evidence"), *evidence(run)])
    elif len(runs) == 1:
        found, missing = sections(runs[0], 3, count)
        for i, (name, content) in enumerate(found.items()):
            section(name, f"s{i}", content)
        if missing:
            section("Left out for want of data", "left-out", left_out(missing))
    elif runs:
        section("Comparison", "comparison", side_by_side(runs))
        for i, run in enumerate(runs):
            found, missing = sections(run, 4, count)
            content = [join([tag("h3", name), *inner]) for name, inner in found.items()]
            if missing:
                content.append(join([tag("h3", "Left out for want of data"), *left_out(missing)]))
            section(run.name, f"run{i}", content, "run")
    if asked is not None:
        section("Erasure requests", "requests", asked)
    version = versions().get("alter-unlearning", "unknown")
    foot = tag(
        "footer", f"Written by alter {version}, commit {commit() or 'unknown'}. Method: ALTER, arXiv:2603.01792."
    )
    main = tag("main", *parts, class_="officer" if officer else None)
    return document(heading, join([_header(heading, runs, links), main, foot], "\n"))


def report(settings: Report) -> Path:
    """Run `alter report`: read what is there, write the page.

    Raises:
        UserError: nothing to report, an output that cannot be written, or what `read` and `requests` raise.
    """
    if not (settings.runs or settings.records or settings.attacks or settings.db):
        raise UserError("Nothing to report: give the folder of a run, `records` FILE, `attacks` FOLDER or `db` URL.")
    if settings.request and settings.db is None:
        raise UserError("`request` chooses from a database of requests: give `db` as well.")
    out = Path(settings.out)
    if out.is_dir() or out.resolve().parent.is_file():
        raise UserError(f"`out` is {settings.out!r}, which cannot be written: give the path of a file.")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(
            f"`out` is {settings.out!r}; expected a name ending in .html. A browser prints the page to PDF."
        )
    runs = read(settings)
    asked = None if settings.db is None else requests(settings.db, settings.request)
    page = compose(runs, count=settings.samples, title=settings.title, asked=asked, officer=settings.officer)
    write_atomic(out, page)
    show(f"report: {out}, {len(page.encode()) / 1000:.0f} kB", stderr=True, highlight=False)
    return out
