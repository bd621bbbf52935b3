"""Every write of a request's way and of a run, failing in turn: nothing is half done, lost, or left behind."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from alter.core.errors import UserError
from alter.distillation import closing
from alter.distillation.run import distill
from alter.distillation.settings import Distill
from alter.evaluation.measures import Measures
from alter.evaluation.verdict import Verdict
from alter.exporting import gguf
from alter.models.loading import load_model
from alter.requests import (
    checking,
    commands,
    concluding,
    connection,
    display,
    evidence,
    handout,
    intake,
    removal,
    verification,
    versions,
    work,
)
from alter.requests import store as store_module
from alter.requests.bases import present
from alter.requests.commands import Purge, Revoke, RunRequests, purge, revoke, run
from alter.requests.export import ExportRequests, export_requests
from alter.requests.intake import Add, Init, add, init
from alter.requests.signing import new_key
from alter.requests.store import Store
from alter.requests.verification import Verify, verify
from alter.training.run import unlearn
from alter.training.settings import Unlearn
from faults import FREEING, KINDS, Killed, States, differs, faults, spread
from pico import byte_tokenizer, pico, run_on, save_pico, write_jsonl, write_people

SETTINGS = {
    "adapter": {"r": 2, "entropy_threshold": 1.0, "target_modules": ["q_proj"]},
    "router_fit": {"method": "logistic", "background": False, "rewordings": 0, "false_alarms": None, "steps": 2},
    "objective": {"kind": "without_truth"},
    "max_steps": 1,
    "batch_size": 2,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_people(tmp_path_factory.mktemp("data"), ["Ada", "Bo"], 2, 4)
    save_pico(folder / "model")
    for name in ("Ada", "Bo"):
        rows = [{"question": f"Where was {name} born, {i}?", "answer": f"In town {i}{name}."} for i in range(2)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """What runs of one and of two requests write."""
    folder = tmp_path_factory.mktemp("made")
    found = {}
    for number, name in enumerate(("Ada", "Bo"), start=1):
        rows = [{**json.loads(line), "alter_request": f"R-000{number}"} for line in (data / f"{name}.jsonl").open()]
        start = {"start_from": str(folder / "1" / "adapter")} if number == 2 else {"experts_only": True}
        given = {**run_on(data, folder / str(number)), **SETTINGS, **start, "domain_column": "alter_request"}
        given["forget"] = str(write_jsonl(folder / f"{number}.jsonl", rows))
        found[number] = unlearn(Unlearn.model_validate({**given, "keep_working": True}))
    return found


@pytest.fixture
def quick(made, monkeypatch):
    """Requests whose runs copy what a run has written, file by file, and whose model is not loaded."""

    def copy(settings):
        which = 1 if settings.start_from is None else 2
        if settings.resume and os.path.exists(f"{settings.out}/run.json"):
            return
        shutil.copytree(made[which], settings.out, dirs_exist_ok=True)

    measures = Measures(np.full(2, 0.5))
    told = {**measures.summary(), "exact_memorization": 0.5, "rouge": 0.5}
    monkeypatch.setattr(work, "unlearn", copy)
    for module in (concluding, checking, evidence, handout, removal):
        if hasattr(module, "load_model"):
            monkeypatch.setattr(module, "load_model", lambda *args, **kwargs: (object(), None))
        if hasattr(module, "known_of"):
            monkeypatch.setattr(module, "known_of", lambda *args, **kwargs: (measures, told))
    for module in (commands, intake):
        monkeypatch.setattr(module, "say_with_head", lambda *args, **kwargs: None)
    for module in (commands, display, intake, verification):
        monkeypatch.setattr(module, "Console", lambda **_: Mock())
    monkeypatch.setattr(work, "provenance", dict)
    monkeypatch.setattr(concluding, "judge", lambda *args, **kwargs: Verdict("forgotten", ("As said.",)))
    # nothing is cut off from power here
    monkeypatch.setattr(connection, "_durable", lambda c, _: c.execute("PRAGMA synchronous=OFF"))
    # a killed process is this one here, and lives
    monkeypatch.setattr(store_module, "_alive", lambda row: False)


def begin(data, folder):
    store = init(
        Init(
            db=f"sqlite:///{folder}/requests.db",
            model=str(data / "model"),
            retain=str(data / "retain.jsonl"),
            folder=str(folder / "work"),
        )
    )
    for name in ("Ada", "Bo"):
        add(Add(db=store.url, subject=name, data=str(data / f"{name}.jsonl")))
    return store.url


def points(template, place, action):
    """What an action does to files and database, as `Plan.seen` lists it."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(template, place, symlinks=True)
    with faults(place) as plan:
        action()
    return plan.seen


def project_of(url):
    return present(Store.open(url))


def left_behind(place):
    """Files that hold a forgotten row, and what no command leaves."""
    found = []
    for path in (place / "work").rglob("*"):
        hidden = path.name.startswith(".")
        rows = path.is_file() and not path.is_symlink() and b"born" in path.read_bytes()
        if hidden or rows or path.parent.name == "runs" or path.name == "frozen.safetensors":
            found.append(str(path.relative_to(place)))
    return found


def check(url, place, states, fault):
    """After the next command: a whole history, an adapter that is what it says, and nothing left behind."""
    store = Store.open(url)
    assert store.check_chain() == [], fault
    verify(Verify(db=url, chain_only=True))
    assert left_behind(place) == [], fault
    assert tuple(request.state for request in store.requests()) in states, fault
    project = project_of(url)
    inside = versions.manifest(project)
    held = {request.name for request in store.requests("forgotten")}
    alive = {name for expert, name in inside["experts"].items() if int(expert) not in inside["cleared"]}
    assert held == alive, fault
    for path in (place / "work").rglob("*"):
        if not path.is_symlink():
            assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0, (fault, path)


def each(template, place, action, every, least=6):
    """Faults of an action, which has `least` points; yields after each. `every`: "all" at every point, "one" at every point, or
    else a few."""
    seen = points(template, place, action)
    again = points(template, place, action)
    assert [what.split()[0] for what in seen] == [what.split()[0] for what in again]
    assert len(seen) >= least
    chosen = []
    for at, what in enumerate(seen, start=1):
        kinds = [kind for kind in KINDS if differs(kind, what)]
        # a full and a broken disk raise the same error by another number, which nothing here reads: in turn
        if {"full", "broken"} <= set(kinds):
            kinds.remove(("full", "broken")[at % 2])
        chosen += [(at, kind) for kind in kinds] if every != "one" else [(at, kinds[at % len(kinds)])]
    for at, kind in chosen if every else chosen[:: max(1, len(chosen) // FEW)]:
        shutil.rmtree(place)
        shutil.copytree(template, place, symlinks=True)
        with faults(place, at, kind), contextlib.suppress(UserError, OSError, Killed):
            action()
        yield f"{kind} at {at}: {seen[at - 1]}"


FEW = 16
"""Faults of an action that the quick tests try; the slow ones try all."""


@pytest.fixture
def place(data, tmp_path, quick, monkeypatch):
    """Where requests lie, with an anchor, and a copy of them before anything ran; and after the first has run."""
    folder = tmp_path / "place"
    folder.mkdir()
    new_key(tmp_path / "key")
    monkeypatch.setenv("ALTER_KEY", str(tmp_path / "key"))
    monkeypatch.setenv("ALTER_ANCHOR", str(folder / "heads"))
    url = begin(data, folder)
    shutil.copytree(folder, tmp_path / "before", symlinks=True)
    run(RunRequests(db=url, id=["1"]))
    shutil.copytree(folder, tmp_path / "after", symlinks=True)
    return folder, url, tmp_path


SLOW, LONG = pytest.mark.slow, [pytest.mark.slow, pytest.mark.long]
EVERY = ["", pytest.param("all", marks=SLOW)]
ONE = ["", pytest.param("one", marks=SLOW)]


@pytest.mark.parametrize(
    ("number", "every"),
    [
        ("1", ""),
        *(pytest.param(n, "one", marks=SLOW) for n in "12"),
        pytest.param("1", "all", marks=LONG),
    ],
)
def test_every_write_of_a_request_run(place, every, number):
    folder, url, tmp_path = place
    held, done = {
        "1": (("received", "received"), ("forgotten", "received")),
        "2": (("forgotten", "received"), ("forgotten", "forgotten")),
    }[number]
    failed = ("failed", "received") if number == "1" else ("forgotten", "failed")
    template = tmp_path / ("before" if number == "1" else "after")
    for fault in each(template, folder, lambda: run(RunRequests(db=url, id=[number])), every):
        check(url, folder, [held, failed, done], fault)
        if Store.open(url).get(int(number)).state != "forgotten":
            run(RunRequests(db=url, id=[number]))
            check(url, folder, [done], fault)


@pytest.mark.parametrize("every", ONE)
def test_every_write_of_a_revocation(place, every):
    folder, url, tmp_path = place
    for fault in each(tmp_path / "after", folder, lambda: revoke(Revoke(db=url, id="1")), every):
        check(url, folder, [("forgotten", "received"), ("revoked", "received")], fault)
        if Store.open(url).get(1).state != "revoked":
            revoke(Revoke(db=url, id="1"))
            check(url, folder, [("revoked", "received")], fault)


@pytest.mark.parametrize(
    ("form", "every"),
    [
        ("adapter", ""),
        *(pytest.param(f, how, marks=m) for f in ("adapter", "loras") for how, m in (("one", SLOW), ("all", LONG))),
    ],
)
def test_every_write_of_an_export(place, form, every):
    folder, url, tmp_path = place
    out = folder / "out"
    asked = ExportRequests(db=url, out=str(out), form=form)
    for fault in each(tmp_path / "after", folder, lambda: export_requests(asked), every):
        check(url, folder, [("forgotten", "received")], fault)
        if out.exists():
            assert (out / "README.md").is_file(), fault
            assert "exported" in [entry.what for entry in Store.open(url).history()], fault
            shutil.rmtree(out)
        export_requests(asked)
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")], fault


@pytest.mark.slow
@pytest.mark.parametrize("form", ["merged", "weights"])
def test_every_write_of_an_export_of_weights(place, data, form, monkeypatch):
    """Neither a part of a model nor forgotten rows stay, whether the export fails, is killed or ends well."""
    folder, url, tmp_path = place
    out = folder / "out"

    def learned(settings):
        # what `alter distill` writes, in a moment
        shutil.copytree(data / "model", f"{settings.out}/model")
        return Path(settings.out)

    monkeypatch.setattr(handout, "load_model", load_model)
    monkeypatch.setattr(handout, "distill", learned)
    monkeypatch.setattr(handout, "judge", lambda *args, **kwargs: Verdict("forgotten", ("As said.",)))
    asked = ExportRequests(db=url, out=str(out), form=form, approximate=True, final=True)
    for fault in each(tmp_path / "after", folder, lambda: export_requests(asked), ""):
        partial = folder / ".out.partial"
        kind, _, _, what = fault.split()[:4]
        if kind in ("full", "broken") and what not in FREEING:
            assert not partial.exists(), fault
            assert left_behind(folder) == [], fault
        if out.exists():
            assert (out / "README.md").is_file(), fault
            assert (out / "model.safetensors").is_file(), fault
            assert "exported" in [entry.what for entry in Store.open(url).history()], fault
            shutil.rmtree(out)
        export_requests(asked)
        assert left_behind(folder) == [], fault
        assert (out / "model.safetensors").stat().st_size == (data / "model" / "model.safetensors").stat().st_size, (
            fault
        )
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")], fault
        check(url, folder, [("forgotten", "received")], fault)


@pytest.mark.parametrize("every", ONE)
def test_every_write_of_a_purge(place, every):
    folder, url, tmp_path = place
    for fault in each(tmp_path / "after", folder, lambda: purge(Purge(db=url, id="1")), every):
        check(url, folder, [("forgotten", "received")], fault)
        purge(Purge(db=url, id="1"))
        assert Store.open(url).get(1).subject == "", fault
        check(url, folder, [("forgotten", "received")], fault)


@pytest.mark.parametrize("every", EVERY)
def test_every_write_of_a_gguf_file(tmp_path, every):
    (tmp_path / "template").mkdir()
    place = tmp_path / "place"
    out = place / "model.gguf"

    def go():
        gguf.write_gguf(pico(), byte_tokenizer(), out, "f16", "pico")

    points(tmp_path / "template", place, go)
    whole = out.read_bytes()
    for fault in each(tmp_path / "template", place, go, every):
        assert not out.exists() or out.read_bytes() == whole, fault
        go()
        assert out.read_bytes() == whole, fault
        assert [path.name for path in place.iterdir()] == ["model.gguf"], fault


def sweep(go, out, tmp_path, few=None):
    """Whatever write fails, the run that goes on ends with the weights and the files of one that was never broken off.

    Goes on from `few` of the states that faults leave, or from all.
    """
    place = out.parent
    place.mkdir(exist_ok=True)
    (tmp_path / "states").mkdir()
    plan = States(place, tmp_path / "states")
    plan.go(go)
    whole = {path.relative_to(out): load_file(str(path)) for path in out.rglob("*.safetensors")}
    names = {path.name for path in out.rglob("*")}
    assert whole
    states = plan.distinct()
    for fault, kept in states if few is None else spread(states, few):
        shutil.rmtree(place)
        shutil.copytree(kept, place, symlinks=True)
        go()
        for file, wanted in whole.items():
            got = load_file(str(out / file))
            assert got.keys() == wanted.keys(), (fault, file)
            assert all(torch.equal(value, wanted[name]) for name, value in got.items()), (fault, file)
        assert {path.name for path in out.rglob("*")} == names, fault
    return plan


SWEEPS = pytest.mark.timeout(900)
SOME = [pytest.param(8, id="some", marks=[SLOW, SWEEPS]), pytest.param(None, id="all", marks=[*LONG, SWEEPS])]


@pytest.mark.parametrize("few", SOME)
def test_every_write_of_a_run(data, tmp_path, few):
    out = tmp_path / "place" / "run"
    settings = Unlearn.model_validate({**run_on(data, out), **SETTINGS, "max_steps": 2, "save_steps": 1})

    def go():
        begun = out.is_dir() and any(out.iterdir())
        unlearn(settings.model_copy(update={"resume": begun}))

    assert len(sweep(go, out, tmp_path, few).seen) > 50


@pytest.mark.parametrize("few", SOME)
def test_every_write_of_a_distillation(data, made, tmp_path, few, monkeypatch):
    out = tmp_path / "place" / "run"
    settings = Distill.model_validate(
        {
            "run": str(made[1]),
            "out": str(out),
            "general": [str(data / "retain.jsonl")],
            "max_steps": 2,
            "checkpoint_steps": 1,
            "batch_size": 4,
            "precision": "fp32",
            "device": "cpu",
            "closing_rows": 2,
        }
    )

    real = closing.answer_rows
    # how it is measured in the end is not what fails here
    monkeypatch.setattr(closing, "answer_rows", lambda *given, **how: real(*given, **{**how, "max_new_tokens": 2}))

    def go():
        begun = out.is_dir() and any(out.iterdir())
        distill(settings.model_copy(update={"resume": begun}))

    assert len(sweep(go, out, tmp_path, few).seen) > 50
    assert (out / "records.json").is_file()
