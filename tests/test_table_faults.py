"""Every write of `alter report`, of `alter compare`'s tables and of one of its cells, failing in turn."""

import csv
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from alter.comparison import cell as one
from alter.comparison import cells, plan
from alter.comparison import run as compare
from alter.comparison.cells import finished
from alter.core.errors import UserError, passing
from alter.reporting.page import report
from alter.reporting.settings import Report
from alter.storage import check_disk, files, to_json, write_atomic
from alter.storage.records import Record, read_records, write_records
from test_compare import _code_is_read_once, data, figures_of, settings, write_all  # noqa: F401
from test_faults import EVERY, LONG, each

TABLES = (
    "report.html",
    "table.md",
    "table.tex",
    "table.csv",
    "search.csv",
    "pareto.png",
    "records.json",
    "compare.json",
)


RUNS = files._runs


@pytest.fixture(autouse=True)
def _the_killed_are_dead(monkeypatch):
    """A killed process is this one here, and lives."""
    monkeypatch.setattr(files, "_runs", lambda process: False)


def hidden(place):
    return [path.name for path in place.rglob(".*") if path.name != ".lock"]


def whole(path):
    """Whether a file is one that was written to its end."""
    content = path.read_bytes()
    if path.suffix == ".json":
        return bool(json.loads(content))
    if path.suffix == ".csv":
        return len(set(map(len, csv.reader(content.decode().splitlines())))) == 1
    if path.suffix == ".png":
        return content.endswith(b"IEND\xaeB`\x82")
    return content.endswith((b"</html>", b"</html>\n") if path.suffix == ".html" else b"\n")


@pytest.mark.parametrize("every", EVERY)
def test_every_write_of_a_report(tmp_path, every):
    place, template = tmp_path / "place", tmp_path / "template"
    template.mkdir()
    records = [Record(model, "forget_rouge", 0.5, 3) for model in ("original", "unlearned", "retrained")]
    write_records(template / "r.json", records)
    (template / "out.html").write_text("the old page")
    shutil.copytree(template, place)

    def go():
        report(Report(records=[str(place / "r.json")], out=str(place / "out.html")))

    for fault in each(template, place, go, every or "all", least=3):
        page = place / "out.html"
        assert page.read_text() == "the old page" or whole(page), fault
        go()
        assert whole(page), fault
        assert hidden(place) == [], fault


@pytest.mark.parametrize("every", ["", pytest.param("all", marks=LONG)])
def test_every_write_of_a_comparisons_tables(data, tmp_path, every, monkeypatch):  # noqa: F811
    place, template = tmp_path / "place", tmp_path / "template"
    wanted = settings(data, place, run=False, methods=["npo"], rates=[1.0])
    write_all(place, plan.lay_out(wanted, place))
    shutil.copytree(place, template)
    monkeypatch.setattr(cells, "run_cells", lambda *_: pytest.fail("something was run"))
    # drawing takes longest, and is not what fails here
    drawn = place.parent / "drawn.png"
    real = compare.pareto

    def pareto(path, *rest):
        if not drawn.exists():
            real(drawn, *rest)
        write_atomic(path, drawn.read_bytes())

    monkeypatch.setattr(compare, "pareto", pareto)
    for fault in each(template, place, lambda: compare.compare(wanted), every):
        assert all(whole(place / name) for name in TABLES if (place / name).exists()), fault
        compare.compare(wanted)
        assert all(whole(place / name) for name in TABLES), fault
        assert hidden(place) == [], fault


@pytest.mark.parametrize("every", EVERY)
def test_every_write_of_a_cell(data, tmp_path, every, monkeypatch):  # noqa: F811
    """Whatever fails, the cell is run again and ends; a full disk is no finding about a method."""
    place, template = tmp_path / "place", tmp_path / "template"
    wanted = settings(data, place, methods=["graddiff"], rates=[1.0])
    cell = plan.lay_out(wanted, place).grid["graddiff", ("forget10",)][1.0, 1.0][0]
    folder = place / "cells" / cell.key
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(cell.spec))
    shutil.copytree(place, template)

    def unlearned(run):
        out = folder / "stage0"
        shutil.rmtree(out, ignore_errors=True)
        write_atomic(out / "adapter" / "adapter_model.safetensors", b"w" * 100)
        told = {"steps": 1, "trained_parameters": 2, "router": {}, "seconds": {"train": 1.0}}
        write_atomic(out / "run.json", to_json(told))

    def measured(*_, **__):
        ratios = SimpleNamespace(truth_ratio=np.ones(3))
        return SimpleNamespace(sets={"forget": ratios}, records=lambda name: figures_of(np.random.default_rng(0)))

    monkeypatch.setattr(one, "unlearn", unlearned)
    monkeypatch.setattr(one, "load_model", lambda *_, **__: (None, None))
    monkeypatch.setattr(one, "tofu_metrics", measured)
    for fault in each(template, place, lambda: one.work(folder, ["validation", "test"]), every):
        found = finished(place, cell, ["validation", "test"])
        assert found is None or found["status"] == "done", fault
        one.work(folder, ["validation", "test"])
        assert finished(place, cell, ["validation", "test"])["status"] == "done", fault
        for part in ("validation", "test"):
            assert read_records(folder / f"{part}-forget10.json"), fault
        assert not list(folder.glob("stage*")), fault
        assert hidden(folder) == [], fault


def test_what_the_system_refused_is_no_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(UserError, match="make room") as refused:
        check_disk(tmp_path, 2, "it takes", "or less")
    assert passing(refused.value)
    assert not passing(UserError("The loss is not finite."))


def test_what_a_killed_write_left_goes_with_the_next_one(tmp_path, monkeypatch):
    """It may hold rows; what another process is writing just now, or another machine's, stays."""
    monkeypatch.setattr(files, "_runs", lambda process: process == 7)
    names = [f".a.html.{files.HERE}-{process}-x" for process in (7, 8)]
    for name in [*names, ".a.html.00000000-8-x", ".a.html.note", f".b.html.{files.HERE}-8-x"]:
        (tmp_path / name).write_text("Ada was born")
    write_atomic(tmp_path / "a.html", "x")
    assert {path.name for path in tmp_path.iterdir()} == {
        "a.html", names[0], ".a.html.00000000-8-x", ".a.html.note", f".b.html.{files.HERE}-8-x",
    }  # fmt: skip


def test_processes_are_told_apart():
    assert [RUNS(process) for process in (os.getpid(), 1, 2**22 + 1, 10**30)] == [True, True, False, True]
