"""Tables in the terminal: never wider than it, no word broken, no figure cut; where columns do not fit, rows are stacked."""

import ast
import io
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich import box
from rich.cells import cell_len
from rich.console import Console

from alter.attacks.showing import show_recovered
from alter.rendering import FittedTable, fitted_rows
from alter.rendering.terminal import table
from alter.storage import Record

SOURCE = Path(__file__).parent.parent / "src" / "alter"


def drawn(what, width):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(what)
    return console.file.getvalue()


def figures():
    shown = FittedTable(title="What can be brought [/back]", caption="recovered: 1 all", box=box.SIMPLE_HEAD)
    shown.add_column("attack", no_wrap=True)
    for name in ("figure", "before", "after", "original", "retrained", "recovered"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_row("relearn_searched", "ROUGE\n@20", "0.111\n±0.162", "0.222", "0.333", "0.444", "-")
    shown.add_row("", "prob.", "0.555\n±0.001", "0.666", "0.777", "0.888", "0.999")
    return shown


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_every_figure_is_whole_at_every_width(width):
    shown = drawn(figures(), width)
    assert max(map(cell_len, shown.splitlines())) <= width
    numbers = re.findall(r"±?0\.\d{3}", shown)
    assert sorted(numbers) == sorted([*(f"0.{d * 3}" for d in "123456789"), "±0.162", "±0.001"])
    assert "[/back]" in " ".join(shown.split())
    assert ("original: 0.444" in shown) is (width < 60) or "original: 0.333" in shown


def test_a_stacked_row_names_its_figures_and_leaves_out_what_is_empty():
    shown = FittedTable(title="Before and after")
    for name in ("", "before", "after"):
        shown.add_column(name)
    shown.add_row("to forget (20 rows)")
    shown.add_row("  probability of the true answers", "0.001", "")
    assert drawn(shown, 24).split("\n") == [
        "Before and after",
        "to forget (20 rows)",
        "  probability of the ",
        "true answers",
        "    before: 0.001",
        "",
    ]


def test_a_table_without_a_head_is_stacked_as_names_and_values():
    shown = FittedTable(show_header=False)
    shown.add_column(style="bold")
    shown.add_column()
    shown.add_row("a name of some length", "another_value_of_it")
    assert "".join(drawn(shown, 30).split("\n")) == "a name of some length: another_value_of_it"


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.lists(st.text(st.characters(exclude_categories=["C", "Z"])), min_size=3, max_size=3), min_size=1),
    st.integers(10, 120),
)
def test_nothing_of_a_cell_is_lost_and_no_line_is_too_wide(rows, width):
    shown = drawn(fitted_rows([["x", "y", "z"], *rows]), width)
    assert max(map(cell_len, shown.splitlines()), default=0) <= width
    for row in rows:
        for value in row:
            assert not set(value) - set(shown)


@pytest.mark.parametrize(("width", "side_by_side"), [(80, True), (40, False)])
def test_three_models_stand_side_by_side_at_80_columns(width, side_by_side):
    more = {"interval": [0.95, 0.98]}
    found = [
        Record("m", name, value, 400, higher_is_better=False, extra=more)
        for name, value in (("forget_probability_reworded", 0.675), ("forget_quality", 3.4e-21))
    ]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(dict.fromkeys(("original", "unlearned", "retrained"), found)))
    shown = console.export_text()
    assert ("┏" in shown) == side_by_side
    assert "0.675" in shown
    assert "3.40e-21" in shown


def test_commands_draw_no_other_tables():
    """One of rich would cut figures where it is narrow, and read brackets in texts as markup."""
    found = [
        path.relative_to(SOURCE)
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "rich.table"
    ]
    assert found == [Path("rendering/fitted.py")]


@pytest.mark.parametrize("width", [40, 80])
def test_tables_of_results_fit(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    records = [
        Record(
            metric=metric, value=0.5, n=4, mode="strict", model=model, higher_is_better=True, per_item=None, extra={}
        )
        for model in ("original", "unlearned", "retrained")
        for metric in ("forget_rouge", "model_utility", "a_metric_of_no_catalogue")
    ]
    shown = drawn(
        table({model: [r for r in records if r.model == model] for model in ("original", "unlearned")}), width
    )
    assert max(map(cell_len, shown.splitlines())) <= width
    assert shown.count("0.500") == 6
    attacked = Record(
        metric="attack_recovered_rouge",
        value=0.25,
        n=4,
        mode="strict",
        model="unlearned",
        higher_is_better=False,
        per_item=None,
        extra={
            "attack": "prefill",
            "interval": [0.1, 0.4],
            **dict.fromkeys(("before", "after", "original_attacked", "retrained"), 0.125),
            "intervals": {key: [0.0, 0.5] for key in ("before", "after", "original_attacked", "retrained")},
        },
    )
    show_recovered([attacked], ["prefill"])
    shown = capsys.readouterr().out.partition("What the attacker needs")[0]
    assert max(map(cell_len, shown.splitlines())) <= width
    assert (shown.count("0.125"), shown.count("±0.250"), shown.count("0.25")) == (4, 4, 5)
