"""In a browser: what a page loses on paper, where nothing scrolls, unfolds or is clicked, and what a click sorts."""

import pytest

from alter.rendering import Point, document, folded, grid, scatter, tag
from test_inspector import browser  # noqa: F401

pytestmark = pytest.mark.slow

# what A4 leaves between the margins of `@page`, in CSS pixels
# and by how much a browser makes a page smaller that is broader than its sheet: Chromium by half at most
SHRUNK = 1.33
ACROSS, UPRIGHT = round((297 - 24) / 25.4 * 96), round((210 - 30) / 25.4 * 96)


def printed(browser, tmp_path, content, width):  # noqa: F811
    (tmp_path / "page.html").write_text(content)
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(f"file://{tmp_path / 'page.html'}")
    page.emulate_media(media="print")
    return page


def figures(columns, rows=3):
    head = ["method", *(f"forget10: answers still given ↓ {i}" for i in range(columns))]
    body = [[f"lora_without_truth_{i}", *["0.793 [0.758, 0.821]"] * columns] for i in range(rows)]
    return grid(head, body, label="Results", numbers=range(1, columns + 1), sortable=True)


@pytest.mark.parametrize("columns", [10, 21, 30])
def test_no_column_of_a_comparison_is_cut_off(browser, tmp_path, columns):  # noqa: F811
    """Three splits of seven columns, or of ten where an attacker is given rows: the last ones stood beyond the sheet."""
    content = document("x", tag("main", figures(columns), class_="broad"), sorting=True)
    page = printed(browser, tmp_path, content, ACROSS)
    assert "@page broad { size: A4 landscape" in content
    assert page.evaluate("document.querySelector('table').offsetWidth") <= SHRUNK * ACROSS
    # no figure is broken within
    heights = page.evaluate(
        "[...document.querySelectorAll('td')].map(td => { const r = document.createRange(); const t = td.firstChild;"
        "r.setStart(t, 0); r.setEnd(t, 5); return r.getClientRects().length })"
    )
    assert set(heights) == {1}


def test_long_names_are_broken_on_paper_and_short_words_are_not(browser, tmp_path):  # noqa: F811
    rows = [["w" * 300, "0.1", "v" * 400], ["short", "0.1", "some words"]]
    page = printed(browser, tmp_path, document("x", grid(["retrained", "y" * 300, "z"], rows, label="R")), UPRIGHT)
    assert page.evaluate("document.querySelector('table').offsetWidth") <= UPRIGHT
    lines = "(() => { const r = document.createRange(); r.selectNodeContents(document.querySelector('th')); return r.getClientRects().length })()"
    assert page.evaluate(lines) == 1


def test_an_interval_on_paper_is_no_larger_than_its_figure(browser, tmp_path):  # noqa: F811
    cell = tag("span", "0.5", tag("span", " [0.4, 0.6]", class_="soft small"))
    page = printed(browser, tmp_path, document("x", grid(["a", "b"], [["c", cell]], label="R", numbers=[1])), UPRIGHT)
    size = "parseFloat(getComputedStyle(document.querySelector('{}')).fontSize)"
    assert page.evaluate(size.format("td .small")) <= page.evaluate(size.format("td"))


def test_what_is_folded_is_printed(browser, tmp_path):  # noqa: F811
    page = printed(browser, tmp_path, document("x", folded("All settings", [tag("pre", "model: m")])), UPRIGHT)
    assert not page.evaluate("document.querySelector('details').open")
    assert page.evaluate("document.querySelector('pre').checkVisibility()")
    page.emulate_media(media="screen")
    assert not page.evaluate("document.querySelector('pre').checkVisibility()")


def test_a_tables_head_is_printed_on_every_sheet(browser, tmp_path):  # noqa: F811
    """Chromium leaves buttons and what is sticky out of a head that it prints again: there are to be none on paper."""
    page = printed(browser, tmp_path, document("x", tag("main", figures(3, 90)), sorting=True), UPRIGHT)
    style = "getComputedStyle(document.querySelector('{}')).{}"
    assert page.evaluate(style.format("th button", "display")) == "contents"
    assert page.evaluate(style.format("thead th", "position")) == "static"
    assert page.evaluate(style.format("thead", "display")) == "table-header-group"


def test_columns_of_words_are_sorted_too_and_what_is_missing_is_last(browser, tmp_path):  # noqa: F811
    """A click on "dominated" or "split" did nothing, and what was not measured stood first where the least was asked for."""
    rows = [
        ["1 b", "0.5 [0.1, 0.9]", "yes", "forget10"],
        ["2 a", "-", "no", "forget01"],
        ["3 c", "1,250", "yes", "forget05"],
    ]
    content = document(
        "x", grid(["name", "figure", "dominated", "split"], rows, label="R", sortable=True), sorting=True
    )
    page = printed(browser, tmp_path, content, 1000)
    page.emulate_media(media="screen")

    def click(column):
        page.keyboard.press("Tab")
        page.click(f"th:nth-child({column}) button")
        return "".join(text[0] for text in page.locator("tbody th").all_inner_texts())

    assert (click(2), click(2)) == ("312", "132")
    assert (click(3), click(4)) == ("213", "231")
    assert (click(1), click(1)) == ("213", "312")
    assert page.get_attribute("th:first-child", "aria-sort") == "descending"


@pytest.mark.parametrize(
    "up", ["↑ better: forget quality", "↑ better: forgetting that survives: 1 - leak after the attack", "x" * 90]
)
def test_the_name_of_a_charts_axis_is_not_cut_off(browser, tmp_path, up):  # noqa: F811
    drawn = scatter([Point(1, "a", 0.5, 0.5, "best")], across="utility", up=up, alt="", caption="")
    page = printed(browser, tmp_path, document("x", drawn), 390)
    ends = "(() => { const b = document.querySelector('svg .name').getBBox(); return [b.x, b.x + b.width] })()"
    left, right = page.evaluate(ends)
    assert 0 <= left < right <= 360.5
