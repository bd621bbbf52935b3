"""What axe-core finds on the report, the comparison's page and the inspector, on narrow and wide screens, light and dark.

axe-core is no part of this repository: `npm pack axe-core`, and ALTER_AXE names its axe.min.js. ALTER_SCREENSHOTS names a folder
for a picture of each page.
"""

import os
from pathlib import Path

import pytest

from alter.comparison import cells, plan
from alter.comparison import run as comparison
from alter.reporting import page as reporting
from alter.reporting.settings import Report
from alter.storage.files import folder_digest
from test_compare import data, settings, write_all  # noqa: F401
from test_inspector import Visit, browser, site  # noqa: F401
from test_page import attacked, evaluated, make_run, write_records

AXE = Path(os.environ.get("ALTER_AXE", "node_modules/axe-core/axe.min.js"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not AXE.is_file(), reason="no axe-core: npm pack axe-core, and name its axe.min.js in ALTER_AXE"
    ),
]

SCREENS = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]


def findings(page, name):
    """What is serious or critical on a page, with the elements that it is about; all that is folded is open."""
    page.eval_on_selector_all("details", "nodes => nodes.forEach(node => { node.open = true })")
    if "ALTER_SCREENSHOTS" in os.environ:
        page.screenshot(path=Path(os.environ["ALTER_SCREENSHOTS"]) / f"{name}.png", full_page=True)
    page.evaluate(f"{AXE.read_text()}; 0")
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    assert found["passes"], "axe looked at nothing"
    return [
        (each["id"], each["help"], [node["html"][:200] for node in each["nodes"]])
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    run = make_run(folder / "run")
    adapter = folder_digest(run / "adapter")
    write_records(run / "records.json", evaluated(adapter))
    reporting.report(
        Report(runs=[str(run)], attacks=[str(attacked(folder / "attacks", adapter))], out=str(folder / "r.html"))
    )
    return folder / "r.html"


def looked_at(browser, address, width, scheme, name):  # noqa: F811
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    try:
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        return findings(page, f"{name}-{width}-{scheme}")
    finally:
        page.close()


def test_axe_finds_what_is_wrong(browser):  # noqa: F811
    page = browser.new_page()
    page.set_content("<html><body><p style='color:#ccc;background:#fff'>pale</p><img src='x'></body></html>")
    assert {"color-contrast", "image-alt"} <= {name for name, *_ in findings(page, "wrong")}
    page.close()


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_the_report(browser, report, width, scheme):  # noqa: F811
    assert looked_at(browser, f"file://{report}", width, scheme, "report") == []


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_the_comparison(browser, data, tmp_path, monkeypatch, width, scheme):  # noqa: F811
    wanted = settings(data, tmp_path, methods=["npo", "graddiff", "simnpo"], splits=["forget05", "forget10"])
    made = plan.lay_out(wanted, tmp_path)
    write_all(tmp_path, made)
    monkeypatch.setattr(cells, "run_cells", lambda *_: iter(()))
    comparison.compare(wanted)
    assert looked_at(browser, f"file://{tmp_path / 'report.html'}", width, scheme, "compare") == []


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_the_inspector(browser, site, width, scheme):  # noqa: F811
    visit = Visit(browser, site, width, scheme)
    try:
        visit.ask("Who is Ada?")
        visit.page.wait_for_selector("[data-answer] .token")
        assert findings(visit.page, f"inspector-{width}-{scheme}") == []
    finally:
        visit.page.close()
