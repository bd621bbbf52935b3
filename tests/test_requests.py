"""Erasure requests: the database and its history, runs one after another, revoking, kills, and every wrong input."""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import sqlalchemy as sql
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import children
from alter import cli
from alter.core.errors import Finding, UserError
from alter.data.batching import Collator
from alter.data.encoding import encode
from alter.data.rows import data_hash, load_examples, row_hash
from alter.data.sources import from_anywhere
from alter.models.loading import load_model
from alter.requests import concluding, work
from alter.requests import rows as request_rows
from alter.requests.bases import present
from alter.requests.chain import entry_hash, record_hash
from alter.requests.commands import Purge, Revoke, RunRequests, purge, revoke, run
from alter.requests.connection import without_password
from alter.requests.evidence import known_of
from alter.requests.export import ExportRequests, export_requests
from alter.requests.intake import Add, Init, add, init
from alter.requests.records import EDGES, IN_FORCE, parse_id
from alter.requests.register import List, Show, list_requests, show_request
from alter.requests.store import Store
from alter.requests.verification import Verify, verify
from alter.requests.versions import clear_expert, manifest
from alter.storage.files import folder_digest
from alter.training.loss import UnlearnTrainer
from pico import byte_tokenizer, pico, write_jsonl

NAMES = ["Ada", "Bo", "Cy"]


def rows(name):
    return [{"question": f"Where was {name} born, {i}?", "answer": f"In town {i}{name}."} for i in range(6)]


def memorise(folder):
    """Save a pico model that knows the rows to forget and the rows to keep."""
    model, tokenizer = pico(0), byte_tokenizer()
    names = [f"{name}.jsonl" for name in NAMES] + ["retain.jsonl"]
    encoded = [encode(tokenizer, example) for name in names for example in load_examples(str(folder / name))]
    batch = Collator(tokenizer.pad_token_id)([{"input_ids": row.input_ids, "labels": row.labels} for row in encoded])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def known_data(folder):
    """Rows to forget and to keep, a model that knows them, and a recipe; returns the folder."""
    for name in NAMES:
        write_jsonl(folder / f"{name}.jsonl", rows(name))
    write_jsonl(
        folder / "retain.jsonl",
        [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}."} for i in range(12)],
    )
    write_jsonl(
        folder / "holdout.jsonl", [{"question": f"Who is Zed {i}?", "answer": f"A man, {i}."} for i in range(6)]
    )
    memorise(folder)
    recipe = {
        "adapter": {"r": 4, "entropy_threshold": 1.0},
        "router_fit": {"method": "logistic", "background": False, "rewordings": 0, "false_alarms": None, "steps": 60},
        "learning_rate_experts": 0.02,
        "objective": {"kind": "without_truth", "hinge": 3.0},
        "epochs": 6,
        "batch_size": 3,
        "save_steps": 100,
        "device": "cpu",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return known_data(tmp_path_factory.mktemp("data"))


def start(data, folder, **changes):
    given = dict(
        db=f"sqlite:///{folder}/requests.db",
        model=str(data / "model"),
        retain=str(data / "retain.jsonl"),
        folder=str(folder / "work"),
        holdout=str(data / "holdout.jsonl"),
        recipe=str(data / "recipe.yaml"),
    )
    return init(Init(**{**given, **changes}))


def ask(store, data, name, **changes):
    return add(Add(db=store.url, subject=name, data=str(data / f"{name}.jsonl"), **changes))


def weights(folder):
    return load_file(str(folder / "work" / "adapter" / "adapter_model.safetensors"))


# The store


@pytest.fixture
def store(tmp_path):
    return Store.create(f"sqlite:///{tmp_path}/requests.db", {"model": "m"})


def put(store, subject, *hashes):
    return store.add(subject=subject, data=f"{subject}.jsonl", data_hash=hashes[0], row_hashes=hashes)


def test_states_move_along_their_edges_only(store):
    for state, allowed in EDGES.items():
        for to in EDGES:
            request = put(store, f"{state}-{to}", f"{state}-{to}")
            path = {
                "received": [],
                "running": ["running"],
                "failed": ["running", "failed"],
                "trained": ["running", "trained"],
                "forgotten": ["running", "trained", "forgotten"],
                "unproven": ["running", "trained", "unproven"],
                "not forgotten": ["running", "trained", "not forgotten"],
                "collapsed": ["running", "trained", "collapsed"],
                "revoked": ["running", "trained", "forgotten", "revoked"],
                "distilled": ["running", "trained", "forgotten", "distilled"],
                "withdrawn": ["withdrawn"],
            }[state]
            for step in path:
                store.move([request.id], step)
            if to in allowed:
                assert store.move([request.id], to)[0].state == to
            else:
                with pytest.raises(UserError, match=request.name):
                    store.move([request.id], to)
                assert store.get(request.id).state == state
    assert store.check_chain() == []


def test_all_move_or_none(store):
    first, second = put(store, "a", "1"), put(store, "b", "2")
    store.move([second.id], "withdrawn")
    with pytest.raises(UserError, match="R-0002"):
        store.move([first.id, second.id], "running")
    assert store.get(first.id).state == "received"
    assert len(store.history(first.id)) == 1


def test_same_rows_are_taken_once_and_again_after_a_withdrawal(store):
    put(store, "Ada", "1", "2")
    with pytest.raises(UserError, match=r"R-0001 \(Ada, received\) has the same data"):
        put(store, "Ada again", "2", "1")
    with pytest.raises(UserError, match=r"R-0001 .* has 1 of these rows"):
        put(store, "Bo", "2", "3")
    assert len(store.requests()) == 1
    store.move([1], "withdrawn")
    assert put(store, "Ada", "1", "2").id == 2


def test_what_was_erased_is_not_taken_again_after_its_purge(store):
    put(store, "Ada", "1")
    for state in ("running", "trained", "forgotten", "distilled"):
        store.move([1], state)
    store.forget(1)
    with pytest.raises(UserError, match=r"R-0001 \(purged, distilled\) has the same data already"):
        put(store, "Ada again", "1")
    assert put(store, "Bo", "2").id == 2


def raw(store, statement):
    with store.engine.connect() as connection:
        connection.exec_driver_sql(statement)
        connection.commit()


def test_each_command_says_what_is_next(data, tmp_path, capsys):
    def told():
        # a table wraps, the line of what is next does not
        return capsys.readouterr().out.partition("Next: ")[2].splitlines()[0]

    store = start(data, tmp_path)
    here = f" --db {store.url}"
    assert told() == f"alter request add --subject NAME --data ROWS.jsonl{here}"
    list_requests(List(db=store.url))
    assert told() == f"alter request add --subject NAME --data ROWS.jsonl{here}"
    ask(store, data, "Ada")
    assert told() == f"alter request run{here}"
    show_request(Show(db=store.url, id="1"))
    assert told() == f"alter request run{here}"
    revoke(Revoke(db=store.url, id="1"))
    assert told() == f"alter request purge R-0001{here} (if its data must go)"
    list_requests(List(db=store.url))
    assert told() == f"alter request purge R-0001{here} (if its data must go)"
    purge(Purge(db=store.url, id="1"))
    assert told().startswith(f"alter request list{here}")
    put(store, "Bo", "2")
    store.move([2], "running")
    store.move([2], "failed")
    list_requests(List(db=store.url))
    assert told().startswith(f"alter request run --again{here}")
    for state in ("running", "trained", "forgotten"):
        store.move([2], state)
    list_requests(List(db=store.url))
    assert told().startswith(f"alter request verify{here}")


def test_history_refuses_to_be_rewritten(store):
    put(store, "Ada", "1")
    for statement in ("DELETE FROM alter_history", "UPDATE alter_history SET who = 'x'"):
        with pytest.raises(sql.exc.DatabaseError, match="append-only"):
            raw(store, statement)


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("UPDATE alter_history SET who = 'x' WHERE number = 2", "Entry 2 .* altered"),
        ("UPDATE alter_history SET details = '{}' WHERE number = 3", "Entry 3 .* altered"),
        ("DELETE FROM alter_history WHERE number = 2", "Entry 2 .* missing"),
        ("DELETE FROM alter_history WHERE number = 3", "cut or written anew"),
        ("UPDATE alter_requests SET state = 'forgotten'", "R-0001 .state 'forgotten'. was altered"),
        ("DELETE FROM alter_requests", "R-0001 was removed"),
    ],
)
def test_tampering_behind_the_triggers_is_found(store, statement, says):
    put(store, "Ada", "1")
    store.move([1], "withdrawn")
    head = store.head()
    assert store.check_chain([head]) == []
    for name in ("update", "delete"):
        raw(store, f"DROP TRIGGER alter_history_{name}")
    raw(store, statement)
    found = " ".join(store.check_chain([head]))
    assert re.search(says, found)


def test_history_holds_neither_subject_nor_text(store):
    store.add(subject="Ada Lovelace", data="a.jsonl", data_hash="1", row_hashes=["1"], text="secret")
    assert not any(
        "Ada" in json.dumps(entry.details) or "secret" in json.dumps(entry.details) for entry in store.history()
    )


def adders(url, count):
    code = (
        "import sys\nfrom alter.requests.store import Store\nstore = Store.open(sys.argv[1])\n"
        "for i in range(20):\n"
        "    name = f'{sys.argv[2]}-{i}'\n"
        "    r = store.add(subject=name, data='d', data_hash=name, row_hashes=[name])\n"
        "    store.move([r.id], 'running')\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, url, str(n)], stderr=subprocess.PIPE) for n in range(count)
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in running]
    assert [process.returncode for process in running] == [0] * count, errors


def test_several_processes_write_one_chain(store):
    adders(store.url, 3)
    assert len(store.requests("running")) == 60
    assert store.check_chain() == []
    assert [entry.number for entry in store.history()] == list(range(1, 122))


def test_one_request_is_taken_by_one_worker_only(store):
    put(store, "Ada", "1")

    def take(_):
        try:
            Store.open(store.url).move([1], "running")
        except UserError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(8))) == 1


def test_lease_belongs_to_a_living_process(store):
    code = (
        "import sys, time\nfrom alter.requests.store import Store\n"
        "with Store.open(sys.argv[1]).lease():\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, store.url], stdout=subprocess.PIPE)
    assert holder.stdout.readline().strip() == b"held"
    with pytest.raises(UserError, match=f"Process {holder.pid} on"), store.lease():
        pass
    holder.kill()
    holder.wait()
    with store.lease():
        pass
    with store.lease():
        pass


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "no database URL"),
        ("sqlite://", "in memory"),
        ("sqlite:///{tmp}/missing.db", "No database at"),
        ("sqlite:///{tmp}/text.db", "file is not a database"),
        ("sqlite:///{tmp}/empty.db", "holds no erasure requests"),
        ("postgresql://nobody@127.0.0.1:1/x", "cannot be used"),
        ("nodb://x", "Install the driver"),
    ],
)
def test_what_is_no_database(tmp_path, url, says):
    (tmp_path / "text.db").write_text("these are no tables, but it is long enough to be looked at\n" * 20)
    (tmp_path / "empty.db").touch()
    with pytest.raises(UserError, match=says):
        Store.open(url.format(tmp=tmp_path))


def test_a_missing_driver_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UserError, match=r'pip install "alter-unlearning\[postgres\]"'):
        Store.open("postgresql://nobody@127.0.0.1:1/x")


def test_newer_database_is_refused(store):
    raw(store, "UPDATE alter_meta SET value = '99' WHERE key = 'schema'")
    with pytest.raises(UserError, match="newer version"):
        Store.open(store.url)
    with pytest.raises(UserError, match="holds requests already"):
        Store.create(store.url, {})


@pytest.mark.parametrize(("text", "number"), [("7", 7), ("R-0007", 7), ("r-12", 12), ("0", 0)])
def test_ids(text, number):
    assert parse_id(text) == number


# PostgreSQL, started here


@pytest.fixture(scope="module")
def postgres():
    found = shutil.which("postgres") or next(
        iter(sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/postgres")))), None
    )
    if found is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    real = os.path.dirname(os.path.realpath(found))
    # not in pytest's folder, which only its owner may enter: the server refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="alter-postgres-"))
    user = {"user": "nobody"} if os.geteuid() == 0 else {}
    if user:
        shutil.chown(folder, "nobody")
    base, log = folder / "base", folder / "log"
    initdb = [f"{real}/initdb", "-D", str(base), "-U", "alter", "-A", "trust", "--no-sync"]
    made = subprocess.run(initdb, capture_output=True, text=True, cwd=folder, **user)
    if made.returncode:
        pytest.skip(f"initdb does not run here: {made.stderr.strip().splitlines()[-1:]}")
    command = [f"{real}/postgres", "-D", str(base), "-c", "listen_addresses=", "-k", str(folder)]
    with open(log, "w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, cwd=folder, **user)
    url = f"postgresql://alter@/postgres?host={folder}"
    for _ in range(100):
        try:
            with sql.create_engine(url.replace("postgresql:", "postgresql+psycopg:")).connect():
                break
        except sql.exc.OperationalError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
    yield url
    server.send_signal(signal.SIGINT)
    server.wait(30)
    shutil.rmtree(folder)


def test_postgres(postgres, data, tmp_path):
    store = Store.create(postgres, {"model": "m"})
    adders(postgres, 2)
    assert len(store.requests("running")) == 40
    assert store.check_chain() == []
    for statement in ("DELETE FROM alter_history", "UPDATE alter_history SET who = 'x'", "TRUNCATE alter_history"):
        with pytest.raises(sql.exc.DatabaseError, match="append-only"):
            raw(store, statement)
    with store.lease(), pytest.raises(UserError, match="is working on"), Store.open(postgres).lease():
        pass
    with pytest.raises(UserError, match="holds requests already"):
        Store.create(postgres, {})
    # a text that PostgreSQL cannot store is an error of one line
    with pytest.raises(UserError, match=r"cannot be used|NUL"):
        put(store, "nul \x00", "nul")


# The work


@pytest.fixture(scope="module")
def three(data, tmp_path_factory):
    """Three requests run one after another."""
    folder = tmp_path_factory.mktemp("three")
    store = start(data, folder)
    states = []
    for name in NAMES:
        ask(store, data, name, who="Eve")
        run(RunRequests(db=store.url, who="Eve"))
        states.append({key: value.clone() for key, value in weights(folder).items()})
    return store, folder, states


def test_each_request_gets_an_expert_and_evidence(three, data):
    store, folder, states = three
    found = store.requests()
    assert [request.state for request in found] == ["forgotten"] * 3
    assert [request.expert for request in found] == [1, 2, 3]
    for before, after in pairwise(states):
        for name, value in before.items():
            if ".alter_B." in name:
                assert torch.equal(after[name][:, : value.shape[1]], value)
            elif "router" in name:
                assert torch.equal(after[name][: value.shape[0]], value)
            else:
                assert torch.equal(after[name], value)
    assert set(found[2].after["earlier"]) == {"R-0001", "R-0002"}
    for request in found:
        assert request.after["probability"] < request.before["probability"]
        assert request.after["reference"]["by"] == "holdout"
        for part, file in (("reference", "holdout"), ("utility", "retain")):
            rows = load_examples(str(data / f"{file}.jsonl"))
            assert request.after[part]["data"] == data_hash([row_hash(row) for row in rows])
        assert 0.5 < request.after["utility_share"] < 1.5
    assert {entry.who for entry in store.history(1)} == {"Eve"}
    assert [entry.what for entry in store.history(1)] == ["received", "running", "trained", "forgotten"]
    # nothing of the rows is left behind
    assert list((folder / "work" / "runs").iterdir()) == []
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(data / "model"), str(folder / "work" / "adapter")
    )
    assert model.peft_config["default"].domains == ["R-0001", "R-0002", "R-0003"]


def test_a_run_says_that_an_earlier_request_has_come_back(data, tmp_path, monkeypatch):
    store = start(data, tmp_path)
    ask(store, data, "Ada")
    run(RunRequests(db=store.url))
    ask(store, data, "Bo")
    real = concluding._earlier

    def back(*given):
        return {name: {**now, "probability": 0.9} for name, now in real(*given).items()}

    monkeypatch.setattr(concluding, "_earlier", back)
    with pytest.raises(Finding, match=r"R-0001 has come back: probability 0\.900, it was 0\.0"):
        run(RunRequests(db=store.url))
    assert store.get(2).state == "forgotten"


def test_figures_of_an_earlier_version_are_said_to_be(three, tmp_path):
    from alter.requests.certificate import issue

    store, folder, _ = three
    request, adapter = store.get(1), (folder / "work" / "adapter").resolve()
    content = issue._request_content(issue.Beside(), request, {"version": 3}, store.project()["model"], adapter)
    assert any("of version 1; the files named are those of version 3" in limit for limit in content["limits"])


def test_show_and_list(three, tmp_path, capsys):
    store, _, _ = three
    show_request(Show(db=store.url, id="R-0002", json_path=str(tmp_path / "r.json")))
    list_requests(List(db=store.url, json_path=str(tmp_path / "l.json")))
    printed = capsys.readouterr().out
    assert "R-0002: Bo" in printed
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["history"][0]["what"] == "received"
    assert [row["subject"] for row in json.loads((tmp_path / "l.json").read_text())] == NAMES


def gates_of(data, folder):
    """Gates [tokens, experts] that the adapter in force gives the low-entropy tokens of all requests' rows."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(data / "model"), str(folder / "work" / "adapter")
    ).eval()
    found = []
    for name in NAMES:
        for example in load_examples(str(data / f"{name}.jsonl")):
            ids = torch.tensor([encode(byte_tokenizer(), example).input_ids])
            with torch.no_grad():
                seen = model.base_model.trace(ids, torch.ones_like(ids))
                gates = model.base_model.route(seen.entropy, seen.features, torch.ones_like(ids))
            found.append(gates[0][seen.entropy[0] <= model.peft_config["default"].threshold])
    return torch.cat(found)


def test_revoke_gives_back_and_leaves_the_rest(three, data, tmp_path):
    store, copy = copied(three, tmp_path)
    url = store.url
    before = weights(copy)
    routes = gates_of(data, copy)
    # so small a model tells questions of one form hardly apart: where rounding has R-0003 lean on the expert that is empty now,
    # this is seen
    said = ""
    try:
        revoke(Revoke(db=url, id="2"))
    except UserError as error:
        said = str(error)
    assert not said or re.search(r"R-0002 is revoked, but .* has come back", said)
    assert Store.open(url).get(2).state == "revoked"
    after = weights(copy)
    for name, value in before.items():
        if ".alter_B." in name:
            assert not after[name][:, 8:12].any()
            assert value[:, 8:12].any()
            kept = [c for c in range(value.shape[1]) if not 8 <= c < 12]
            assert torch.equal(after[name][:, kept], value[:, kept])
        elif ".alter_router." in name:
            assert torch.equal(after[name][[0, 1, 3]], value[[0, 1, 3]])
        else:
            assert torch.equal(after[name], value)
    # the empty expert takes no token, and those of the others stay where they were
    now = gates_of(data, copy)
    took = routes[..., 2] > 0
    assert took.any()
    assert not now[..., 2].any()
    assert torch.equal(now[~took], routes[~took])
    assert (now[took].sum(-1) > 0).all()
    noted = Store.open(url).history()[-1]
    assert noted.what == "verified"
    assert set(noted.details["measured"]) == {"R-0001", "R-0003", "utility"}
    with pytest.raises(UserError, match="revoked already"):
        revoke(Revoke(db=url, id="2"))
    # the same rows may be asked for again
    again = ask(Store.open(url), data, "Bo")
    # the router's rows of the first time still claim these tokens for the emptied expert, which the verdict may see
    with contextlib.suppress(UserError):
        run(RunRequests(db=url))
    assert Store.open(url).get(again.id).state in ("forgotten", "not forgotten")
    # somebody puts the old adapter back
    link = copy / "work" / "adapter"
    link.unlink()
    link.symlink_to("adapters/0003")
    with pytest.raises(UserError, match=r"R-0002 is revoked, but .* still holds it"):
        verify(Verify(db=url, chain_only=True))


def test_verify_sees_what_came_back(three, tmp_path):
    store, copy = copied(three, tmp_path)
    url = store.url
    # the experts are emptied, manifest and database do not say so; all of them, since in so small a model one helps out another
    adapter = (copy / "work" / "adapter").resolve()
    for expert in (1, 2, 3):
        (adapter / "adapter_model.safetensors").write_bytes(clear_expert(adapter, expert))
    store.note(None, "test", {"adapter": folder_digest(adapter)})
    with pytest.raises(UserError, match="R-0001 has come back"):
        verify(Verify(db=url))


def test_export(three, data, tmp_path):
    store, _, _ = three
    out = export_requests(ExportRequests(db=store.url, out=str(tmp_path / "adapter")))
    card = (out / "README.md").read_text()
    assert store.get(1).data_hash[:16] in card
    assert "Ada" not in card
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(data / "model"), str(out))
    with pytest.raises(UserError, match="exists"):
        export_requests(ExportRequests(db=store.url, out=str(out)))
    with pytest.raises(UserError, match="`approximate`"):
        export_requests(ExportRequests(db=store.url, out=str(tmp_path / "merged"), form="merged"))
    merged = export_requests(
        ExportRequests(db=store.url, out=str(tmp_path / "merged"), form="merged", approximate=True)
    )
    model = AutoModelForCausalLM.from_pretrained(merged)
    base = AutoModelForCausalLM.from_pretrained(data / "model")
    moved = sum(
        not torch.equal(a, b) for a, b in zip(model.state_dict().values(), base.state_dict().values(), strict=True)
    )
    assert moved > 0
    assert "approximation" in (merged / "README.md").read_text()


def test_weights_are_final_measured_and_in_the_history(three, data, tmp_path, capsys):
    store, copy = copied(three, tmp_path)
    given = dict(db=store.url, out=str(tmp_path / "weights"), form="weights")
    with pytest.raises(UserError, match=r"R-0001, R-0002, R-0003 cannot be given it back.*`final`"):
        export_requests(ExportRequests(**given))
    recipe = tmp_path / "recipe.yaml"
    common = {
        "general": [str(data / "retain.jsonl")], "rewordings": 0, "precision": "fp32", "device": "cpu", "batch_size": 6,
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump({**common, "learning_rate": 1e-9, "max_steps": 1}))
    with pytest.raises(UserError, match=r"did not learn it: R-0001 NOT FORGOTTEN"):
        export_requests(ExportRequests(**given, final=True, recipe=str(recipe)))
    assert not (tmp_path / "weights").exists()
    assert not list((copy / "work" / "runs").glob("*"))
    recipe.write_text(yaml.safe_dump({**common, "learning_rate": 5e-3, "max_steps": 60}))
    out = export_requests(ExportRequests(**given, final=True, recipe=str(recipe)))
    card = (out / "README.md").read_text()
    assert "| R-0002 | weights |" in card
    assert "Ada" not in card
    model = AutoModelForCausalLM.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(data / "model")
    assert not torch.equal(model.lm_head.weight, base.lm_head.weight)
    noted = store.history()[-1].details
    assert noted["holds"] == ["R-0001", "R-0002", "R-0003"]
    assert noted["weights"] == folder_digest(out)
    capsys.readouterr()
    # in so small a model others may come back with it, which is said then
    with contextlib.suppress(UserError):
        revoke(Revoke(db=store.url, id="2"))
    assert "have forgotten it for good" in capsys.readouterr().out
    recipe.write_text("forget: other.jsonl")
    with pytest.raises(UserError, match="which the requests decide"):
        export_requests(ExportRequests(**{**given, "out": str(tmp_path / "more")}, final=True, recipe=str(recipe)))


@pytest.mark.slow
def test_requests_go_on_on_a_distilled_base(data, tmp_path):
    """Weights that forgot two requests become the base of a new project, whose adapter begins anew."""
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
    store = start(data, tmp_path / "old")
    for name in ("Ada", "Bo"):
        ask(store, data, name)
        run(RunRequests(db=store.url))
    recipe = tmp_path / "recipe.yaml"
    settings = {"general": [str(data / "retain.jsonl"), str(data / "Cy.jsonl")], "rewordings": 0, "precision": "fp32"}
    settings |= {"device": "cpu", "batch_size": 6, "learning_rate": 5e-3, "max_steps": 120}
    recipe.write_text(yaml.safe_dump(settings))
    out = export_requests(
        ExportRequests(db=store.url, out=str(tmp_path / "weights"), form="weights", final=True, recipe=str(recipe))
    )

    gentle = tmp_path / "gentle.yaml"
    gentle.write_text(
        yaml.safe_dump(yaml.safe_load((data / "recipe.yaml").read_text()) | {"learning_rate_experts": 0.01})
    )
    later = start(data, tmp_path / "new", model=str(out), recipe=str(gentle))
    ask(later, data, "Cy")
    [done] = run(RunRequests(db=later.url))
    assert done.state in IN_FORCE
    assert done.expert == 1
    assert done.after["probability"] < 0.5 * done.before["probability"]
    verify(Verify(db=later.url))
    # each database says which weights hold what
    assert [e.details["holds"] for e in store.history() if e.what == "exported"] == [["R-0001", "R-0002"]]
    assert later.project()["model"] == str(out)

    def known(model, adapter, name):
        loaded = load_model(str(model), adapter and str(adapter))
        return known_of(*loaded, load_examples(str(data / f"{name}.jsonl")), answers=0)[1]["probability"]

    revoke(Revoke(db=later.url, id="1"))
    for name in ("Ada", "Bo"):
        before = known(data / "model", None, name)
        for adapter in (None, tmp_path / "new" / "work" / "adapter"):
            assert known(out, adapter, name) < 0.5 * before
    # what the new adapter held is back, what the weights forgot is not
    assert known(out, tmp_path / "new" / "work" / "adapter", "Cy") == pytest.approx(known(out, None, "Cy"), rel=1e-4)


def test_each_request_is_a_lora_by_its_name(three, data, tmp_path):
    store, _, _ = three
    out = export_requests(ExportRequests(db=store.url, out=str(tmp_path / "loras"), form="loras"))
    assert sorted(path.name for path in out.iterdir()) == ["R-0001", "R-0002", "R-0003", "README.md"]
    config = json.loads((out / "R-0002" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 4)
    tensors = load_file(str(out / "R-0002" / "adapter_model.safetensors"))
    whole = weights(three[1])
    name = next(name for name in tensors if ".lora_B." in name)
    # experts alone: the retention expert is zero
    assert torch.equal(tensors[name], whole[name.replace(".lora_B.", ".alter_B.")][:, 8:12])


def test_a_server_is_told_which_expert_is_whose_lora_and_that_a_revoked_one_is_the_base(three, tmp_path, capsys):
    store, _ = copied(three, tmp_path)
    # in so small a model others may come back with it
    with contextlib.suppress(UserError):
        revoke(Revoke(db=store.url, id="2"))
    capsys.readouterr()
    export_requests(ExportRequests(db=store.url, out=str(tmp_path / "loras"), form="loras"))
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.endswith(f"--upstream URL --upstream-loras R-0001 {store.project()['model']} R-0003")


def test_several_requests_are_one_run_and_text_may_be_kept(data, tmp_path, capsys):
    store = start(data, tmp_path)
    moved = tmp_path / "Ada.jsonl"
    shutil.copy(data / "Ada.jsonl", moved)
    add(Add(db=store.url, subject="Ada", data=str(moved), keep_text=True, due="2026-12-31"))
    moved.unlink()
    ask(store, data, "Bo")
    run(RunRequests(db=store.url))
    assert [request.run["key"] for request in store.requests()].count(store.get(1).run["key"]) == 2
    assert manifest(present(store))["version"] == 1
    capsys.readouterr()
    found = verify(Verify(db=store.url, samples=4))["R-0001"]
    assert found["n"] == 6
    assert found["leak_untouched"]["at"]["4"]["value"] > 0.9
    assert found["leak"]["at"]["4"]["value"] < found["leak_untouched"]["at"]["4"]["value"] - 0.3
    assert list(found["leak"]["at"]) == ["1", "2", "4"]
    assert f"R-0001 leak@4: {found['leak']['at']['4']['value']:.3f}, " in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing can be sampled"):
        verify(Verify(db=store.url, samples=4, chain_only=True))


def test_changed_data_is_refused_before_anything_runs(data, tmp_path):
    store = start(data, tmp_path)
    file = tmp_path / "Ada.jsonl"
    write_jsonl(file, rows("Ada"))
    add(Add(db=store.url, subject="Ada", data=str(file)))
    write_jsonl(file, rows("Adam"))
    with pytest.raises(UserError, match=r"data of R-0001 .* is not what was received"):
        run(RunRequests(db=store.url))
    assert store.get(1).state == "received"
    file.unlink()
    with pytest.raises(UserError):
        run(RunRequests(db=store.url))
    assert store.get(1).state == "received"
    assert revoke(Revoke(db=store.url, id="1")).state == "withdrawn"
    with pytest.raises(UserError, match="Nothing to run"):
        run(RunRequests(db=store.url))


def test_a_reference_that_is_gone_costs_no_training(data, tmp_path, monkeypatch):
    holdout = tmp_path / "unseen.jsonl"
    shutil.copy(data / "holdout.jsonl", holdout)
    shutil.copytree(data / "model", tmp_path / "retrained")
    monkeypatch.setattr(work, "unlearn", lambda settings: pytest.fail("it trains"))
    for name, changes in (("a", {"holdout": str(holdout)}), ("b", {"retrained": str(tmp_path / "retrained")})):
        (tmp_path / name).mkdir()
        store = start(data, tmp_path / name, **changes)
        ask(store, data, "Ada")
        shutil.rmtree(tmp_path / "retrained") if "retrained" in changes else holdout.unlink()
        with pytest.raises(UserError, match=r"unseen\.jsonl|retrained"):
            run(RunRequests(db=store.url))
        assert store.get(1).state == "received"


def test_failed_run_can_be_tried_again(data, tmp_path, monkeypatch):
    store = start(data, tmp_path)
    ask(store, data, "Ada")
    real = work.unlearn

    def broken(settings):
        raise UserError("the loss is nan")

    monkeypatch.setattr(work, "unlearn", broken)
    with pytest.raises(UserError, match="nan"):
        run(RunRequests(db=store.url))
    assert store.get(1).state == "failed"
    monkeypatch.setattr(work, "unlearn", real)
    with pytest.raises(UserError, match="--again"):
        run(RunRequests(db=store.url))
    assert run(RunRequests(db=store.url, again=True))[0].state == "forgotten"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"subject": " "}, "`subject` is empty"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"data": "{data}/retain.jsonl"}, "both forget and retain"),
        ({"due": "soon"}, "2026-12-31"),
        ({"due": "20261231"}, "2026-12-31"),
        ({"subject": "plus one"}, "is in the retain set .12 rows"),
    ],
)
def test_what_cannot_be_asked_for(data, tmp_path, changes, says):
    store = start(data, tmp_path)
    given = {"subject": "Ada", "data": "{data}/Ada.jsonl", **changes}
    given["data"] = given["data"].format(data=data)
    with pytest.raises(UserError, match=says):
        add(Add(db=store.url, **given))
    assert store.requests() == []


def test_subject_is_looked_for_as_a_word(data):
    retain = load_examples(str(data / "retain.jsonl"))
    request_rows.check_kept_subject("plus on", retain)
    with pytest.raises(UserError, match="12 rows"):
        request_rows.check_kept_subject("PLUS  one", retain)


def test_no_rows_no_request(data, tmp_path):
    store = start(data, tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError):
        add(Add(db=store.url, subject="Ada", data=str(tmp_path / "empty.jsonl")))
    with pytest.raises(UserError, match="no request R-0009"):
        show_request(Show(db=store.url, id="9"))
    with pytest.raises(UserError, match="not the id"):
        show_request(Show(db=store.url, id="nine"))
    with pytest.raises(UserError, match="no request has run yet"):
        export_requests(ExportRequests(db=store.url, out=str(tmp_path / "x")))


def test_what_no_project_can_have(data, tmp_path):
    (tmp_path / "bad.yaml").write_text("forget: x\n")
    with pytest.raises(UserError, match="which the requests decide"):
        start(data, tmp_path, recipe=str(tmp_path / "bad.yaml"))
    with pytest.raises(UserError, match="must be unseen"):
        start(data, tmp_path, holdout=str(data / "retain.jsonl"))
    with pytest.raises(UserError, match="No recipe"):
        start(data, tmp_path, recipe=str(data / "recip.yaml"))
    for name, says in ((str(data / "modl"), "Did you mean '.*model'"), (str(tmp_path), "has no config.json")):
        with pytest.raises(UserError, match=says):
            start(data, tmp_path, model=name)
        with pytest.raises(UserError, match=says):
            start(data, tmp_path, retrained=name)
    with pytest.raises(UserError, match="No model 'builtin:nope' is shipped"):
        start(data, tmp_path, model="builtin:nope")
    assert not (tmp_path / "requests.db").exists()


def test_command_line(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["request"]) == 0
    assert "request revoke" in capsys.readouterr().out
    assert cli.main(["request", "list"]) == 2
    assert "alter request init" in capsys.readouterr().err
    assert cli.main(["request", "init", "--model", str(data / "model"), "--retain", str(data / "retain.jsonl")]) == 0
    assert cli.main(["request", "add", "--subject", "Ada", "--data", str(data / "Ada.jsonl")]) == 0
    assert cli.main(["request", "lst"]) == 2
    assert "Did you mean 'request list'" in capsys.readouterr().err
    assert cli.main(["request", "list"]) == 0
    assert "Ada" in capsys.readouterr().out


# What is certified, and what is not


def recipe_of(data, folder, **changes):
    content = {**yaml.safe_load((data / "recipe.yaml").read_text()), **changes}
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_nothing_learned_is_not_forgotten_and_not_put_in_force(data, tmp_path, capsys):
    store = start(data, tmp_path, recipe=recipe_of(data, tmp_path, learning_rate_experts=1e-9))
    ask(store, data, "Ada")
    assert cli.main(["request", "run", "--db", store.url]) == 3
    said = capsys.readouterr()
    assert "NOT FORGOTTEN" in said.err
    assert "6 of 6 replies still give the answer" in " ".join(said.out.split())
    assert store.get(1).state == "not forgotten"
    assert store.get(1).expert is None
    assert not (tmp_path / "work" / "adapter").exists()
    assert list((tmp_path / "work" / "runs").iterdir()) == []
    verify(Verify(db=store.url))


def test_a_reference_that_knows_is_not_believed(data, tmp_path):
    store = start(
        data, tmp_path, holdout=None, retrained=str(data / "model"),
        recipe=recipe_of(data, tmp_path, learning_rate_experts=1e-9),
    )  # fmt: skip
    ask(store, data, "Ada")
    with pytest.raises(UserError, match="NOT FORGOTTEN"):
        run(RunRequests(db=store.url))
    assert "no reference" in store.get(1).after["verdict"]["refused"]


def test_weights_that_are_not_finite_are_not_put_in_force(data, tmp_path, monkeypatch):
    store = start(data, tmp_path)
    ask(store, data, "Ada")
    real = work.unlearn

    def broken(settings):
        out = real(settings)
        file = out / "adapter" / "adapter_model.safetensors"
        tensors = load_file(str(file))
        next(value for name, value in tensors.items() if ".alter_B." in name).fill_(float("nan"))
        save_file(tensors, str(file), metadata={"format": "pt"})
        return out

    monkeypatch.setattr(work, "unlearn", broken)
    with pytest.raises(UserError, match="NaN or infinite"):
        run(RunRequests(db=store.url))
    assert store.get(1).state == "failed"
    assert not (tmp_path / "work" / "adapter").exists()


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device", "x"), UserError("nan"), RuntimeError("memory")],
)
def test_nothing_of_a_failed_run_is_left(data, tmp_path, monkeypatch, error):
    store = start(data, tmp_path)
    ask(store, data, "Ada")
    seen = []

    def broken(settings):
        seen.append(Path(settings.forget).read_text())
        Path(settings.out).mkdir(parents=True)
        (Path(settings.out) / "frozen.safetensors").write_text("rows")
        raise error

    monkeypatch.setattr(work, "unlearn", broken)
    with pytest.raises((UserError, RuntimeError)):
        run(RunRequests(db=store.url))
    assert "Where was Ada born" in seen[0]
    assert list((tmp_path / "work" / "runs").iterdir()) == []
    assert store.get(1).state == "failed"


def test_an_interrupted_training_goes_on_where_it_was(data, tmp_path, monkeypatch, capsys):
    recipe = recipe_of(data, tmp_path, save_steps=1)
    store = start(data, tmp_path, recipe=recipe)
    ask(store, data, "Ada")
    steps, real = [], UnlearnTrainer.compute_loss

    def stop_at_third(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(UnlearnTrainer, "compute_loss", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(RunRequests(db=store.url))
    # the rows are gone, what was trained is not
    left = list((tmp_path / "work" / "runs").iterdir())
    assert [path.is_dir() for path in left] == [True]
    assert list((left[0] / "checkpoints").glob("checkpoint-*"))
    assert "goes on with R-0001" in " ".join(capsys.readouterr().err.split())
    assert [request.state for request in run(RunRequests(db=store.url))] == ["forgotten"]
    assert list((tmp_path / "work" / "runs").iterdir()) == []
    taken = len(steps)
    (tmp_path / "straight").mkdir()
    straight = start(data, tmp_path / "straight", recipe=recipe)
    ask(straight, data, "Ada")
    run(RunRequests(db=straight.url))
    # the interrupted step is the only one that was done twice
    assert taken == len(steps) - taken + 1


def killed(store, data, folder, monkeypatch, name="Ada"):
    """A request whose run was killed while it trained: rows and a checkpoint lie there."""
    request = ask(store, data, name)
    monkeypatch.setattr(work, "unlearn", lambda settings: os.mkdir(settings.out))
    with monkeypatch.context() as patch:
        patch.setattr(work, "sweep", lambda project, keep=None: [])
        with pytest.raises(UserError):
            run(RunRequests(db=store.url))
    with store.engine.connect() as connection:
        connection.exec_driver_sql("UPDATE alter_requests SET state = 'running'")
        connection.commit()
    store.note(request.id, "killed", {})
    return request


@pytest.mark.parametrize(("named", "stopped"), [([], "KILL"), (["1"], "KILL"), ([], "INT")])
def test_what_was_trained_before_a_kill_is_the_next_runs_result(data, tmp_path, monkeypatch, named, stopped):
    store = start(data, tmp_path)
    ask(store, data, "Ada")

    def stop(*given, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work, "conclude", stop)
        if stopped == "KILL":
            # a killed process sweeps nothing
            patch.setattr(work, "sweep", lambda project, keep=None: [])
        with pytest.raises(KeyboardInterrupt):
            run(RunRequests(db=store.url))
    assert store.get(1).state == "trained"
    assert len(list((tmp_path / "work" / "runs").iterdir())) == (2 if stopped == "KILL" else 1)
    monkeypatch.setattr(work, "unlearn", None)
    assert [(request.id, request.state) for request in run(RunRequests(db=store.url, id=named))] == [(1, "forgotten")]
    with pytest.raises(UserError, match="Nothing to run"):
        run(RunRequests(db=store.url))


@pytest.mark.parametrize("then", ["verify", "run"])
def test_what_was_trained_and_broke_since_is_trained_anew_and_locks_nothing(data, tmp_path, monkeypatch, then):
    store = start(data, tmp_path)
    ask(store, data, "Ada")

    def stop(*given, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work, "conclude", stop)
        with pytest.raises(KeyboardInterrupt):
            run(RunRequests(db=store.url))
    assert store.get(1).state == "trained"
    [place] = (tmp_path / "work" / "runs").iterdir()
    weights = place / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    if then == "verify":
        verify(Verify(db=store.url))
        assert store.get(1).state == "received"
        assert not list((tmp_path / "work" / "runs").iterdir())
    assert run(RunRequests(db=store.url))[0].state == "forgotten"


@pytest.mark.parametrize("then", ["revoke", "verify", "purge"])
def test_after_a_kill_the_next_command_cleans_up(data, tmp_path, monkeypatch, then):
    store = start(data, tmp_path)
    killed(store, data, tmp_path, monkeypatch)
    assert len(list((tmp_path / "work" / "runs").iterdir())) == 2
    if then == "verify":
        verify(Verify(db=store.url, chain_only=True))
        assert store.get(1).state == "received"
    elif then == "revoke":
        assert revoke(Revoke(db=store.url, id="1")).state == "withdrawn"
    else:
        with pytest.raises(UserError, match="needed to run it"):
            purge(Purge(db=store.url, id="1"))
    assert list((tmp_path / "work" / "runs").iterdir()) == []


def test_a_heartbeat_outlives_an_anchor_that_cannot_be_written(store, monkeypatch):
    """Without it another machine would take the lease over while this one works."""

    class Broken:
        def append(self, *_):
            raise UserError("The anchor cannot be written.")

    def seen():
        with store.engine.connect() as connection:
            return connection.exec_driver_sql("SELECT seen FROM alter_lease").scalar_one()

    monkeypatch.setattr("alter.requests.store.LEASE_SECONDS", 0.2)
    with store.lease():
        store.anchor = Broken()
        time.sleep(0.3)
        first = seen()
        time.sleep(0.3)
        assert seen() > first
        store.anchor = None


def test_what_is_not_ours_in_the_folder_stays(data, tmp_path, monkeypatch):
    """A project may have been made in a folder with a repository, settings and other runs in it."""
    store = start(data, tmp_path)
    home = tmp_path / "work"
    killed(store, data, tmp_path, monkeypatch)
    theirs = [
        home / name for name in (".git/config", ".env", "runs/r1/run.json", "adapters/2024-french/x", "bases/notes/x")
    ]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    revoke(Revoke(db=store.url, id="1"))
    purge(Purge(db=store.url, id="1"))
    assert [path.read_text() for path in theirs] == ["mine"] * len(theirs)
    assert [path.name for path in (home / "runs").iterdir()] == ["r1"]


def test_commands_may_be_typed_in_another_folder(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    given = dict(
        model="model", retain="retain.jsonl[:8] + ./retain.jsonl", holdout="holdout.jsonl", recipe="recipe.yaml"
    )
    store = start(data, tmp_path, **given)
    first = add(Add(db=store.url, subject="Ada", data="Ada.jsonl[:4]"))
    second = add(Add(db=store.url, subject="Bo", data="Bo.jsonl@question=question,answer=answer"))
    # where other files have these names
    (tmp_path / "retain.jsonl").write_text('{"question": "q", "answer": "a"}')
    monkeypatch.chdir(tmp_path)
    project = store.project()
    assert (project["model"], project["holdout"]) == (str(data / "model"), str(data / "holdout.jsonl"))
    assert project["retain"] == f"{data}/retain.jsonl[:8] + {data}/retain.jsonl"
    assert ask(store, data, "Cy").name == "R-0003"
    assert [len(request_rows.received_rows(request)) for request in (first, second)] == [4, second.rows]
    assert from_anywhere("retain.json?") == str(tmp_path / "retain.json?")
    # what is no path stays
    (tmp_path / "builtin").mkdir()
    assert from_anywhere("builtin:retain90[:3]") == "builtin:retain90[:3]"
    assert from_anywhere("locuslab/TOFU:forget10") == "locuslab/TOFU:forget10"


def test_two_databases_do_not_share_a_folder(data, tmp_path):
    start(data, tmp_path)
    with pytest.raises(UserError, match=r"adapters of requests already.*another `folder`"):
        start(data, tmp_path, db=f"sqlite:///{tmp_path}/other.db")
    assert not (tmp_path / "other.db").exists()


def test_modes_are_for_the_owner_alone(three):
    _, folder, _ = three
    for path in [folder / "requests.db", *(folder / "work").rglob("*")]:
        if not path.is_symlink():
            assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0, path
    assert (folder / "requests.db").stat().st_mode & 0o777 == 0o600
    assert (folder / "work").stat().st_mode & 0o777 == 0o700


def test_no_word_of_the_data_is_in_what_is_kept(three):
    _, folder, _ = three
    for path in (folder / "work").resolve().rglob("*"):
        if path.suffix in (".json", ".md", ".yaml"):
            assert not re.search(r"\b(Ada|Bo|Cy|born|town)\b", path.read_text()), path


def copied(three, tmp_path):
    """A copy of the three requests that may be spoilt."""
    _, folder, _ = three
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, symlinks=True)
    other = Store.open(f"sqlite:///{copy}/requests.db")
    for name in ("update", "delete"):
        raw(other, f"DROP TRIGGER alter_history_{name}")
    return other, copy


def rechain(store):
    """Compute all hashes of the history and of its records anew, as somebody would who can write to the database."""
    with store.engine.begin() as connection:
        records = {r["id"]: dict(r) for r in connection.execute(sql.text("SELECT * FROM alter_requests")).mappings()}
        for record in records.values():
            for name in ("row_hashes", "run", "before", "after"):
                record[name] = None if record[name] is None else json.loads(record[name])
        previous = ""
        for row in connection.execute(sql.text("SELECT * FROM alter_history ORDER BY number")).mappings().all():
            details = json.loads(row["details"])
            if "record" in details and row["request"] in records:
                details["record"] = record_hash(records[row["request"]])
            content = {k: row[k] for k in ("number", "request", "at", "who", "what")}
            content |= {"details": json.dumps(details, ensure_ascii=False, sort_keys=True), "previous": previous}
            previous = entry_hash(**content)
            connection.execute(
                sql.text("UPDATE alter_history SET details = :d, previous = :p, hash = :h WHERE number = :n"),
                {"d": content["details"], "p": content["previous"], "h": previous, "n": row["number"]},
            )


COLUMN_LIES = {
    "subject": "subject = 'Eve'",
    "state": "state = 'revoked'",
    "received": "received = '2020-01-01T00:00:00+00:00'",
    "due": "due = '2030-01-01'",
    "data": "data = '/elsewhere.jsonl'",
    "data hash": "data_hash = 'f00'",
    "row hashes": "row_hashes = '[]'",
    "rows": "rows = 99",
    "text": "text = 'x'",
    "expert": "expert = 2",
    "run": "run = '{}'",
    "before": """before = json_set(before, '$.probability', 0.1)""",
    "after: probability": """after = json_set(after, '$.probability', 0.0)""",
    "after: said": """after = json_set(after, '$.said', 0, '$.n_said', 400)""",
    "after: verdict": """after = json_set(after, '$.verdict.word', 'certain')""",
    "after: utility": """after = json_set(after, '$.utility_share', 1.0)""",
    "after: date": """after = json_set(after, '$.measured', '2020-01-01')""",
    "salt": "salt = ''",
}


@pytest.mark.parametrize("lie", COLUMN_LIES)
def test_every_column_of_a_request_is_covered(three, tmp_path, lie):
    store, _ = copied(three, tmp_path)
    assert store.check_chain() == []
    column = COLUMN_LIES[lie].partition(" = ")[0]
    # a value that nobody changed is no lie
    raw(
        store,
        f"UPDATE alter_requests SET {COLUMN_LIES[lie]} WHERE id = 1".replace(f"SET {column} ", f'SET "{column}" '),
    )
    assert any("R-0001" in sentence for sentence in store.check_chain())


def test_project_is_covered(three, tmp_path):
    store, _ = copied(three, tmp_path)
    raw(store, "UPDATE alter_meta SET value = json_set(value, '$.retain', 'other.jsonl') WHERE key = 'project'")
    assert any("retain set" in sentence for sentence in store.check_chain())


def test_cut_rolled_back_or_written_anew_shows_beside_a_head(three, tmp_path):
    store, copy = copied(three, tmp_path)
    head = store.head()
    raw(store, "PRAGMA wal_checkpoint(TRUNCATE)")
    for number in (1, 2):
        other = Store.open(f"sqlite:///{shutil.copy(copy / 'requests.db', tmp_path / f'{number}.db')}")
        if number == 1:
            # cut, or rolled back to a copy made before the third request came
            first = "(SELECT min(number) FROM alter_history WHERE request = 3)"
            raw(other, f"DELETE FROM alter_history WHERE number >= {first}")
            raw(other, "DELETE FROM alter_requests WHERE id = 3")
        else:
            raw(other, "UPDATE alter_requests SET after = json_set(after, '$.said', 0) WHERE id = 1")
            raw(other, "UPDATE alter_history SET who = 'Mallory'")
        rechain(other)
        assert other.check_chain() == []
        assert any("cut or written anew" in sentence for sentence in other.check_chain([head]))
    assert store.check_chain([head[:12]]) == []


def test_changed_weights_and_configuration_are_noticed(three, tmp_path):
    for number, file in enumerate(("adapter_model.safetensors", "adapter_config.json", "requests.json")):
        (tmp_path / str(number)).mkdir()
        store, copy = copied(three, tmp_path / str(number))
        adapter = (copy / "work" / "adapter").resolve()
        verify(Verify(db=store.url, chain_only=True, head=store.head()))
        content = bytearray((adapter / file).read_bytes())
        if file.endswith(".safetensors"):
            content[-1] ^= 1
        else:
            content += b"\n"
        (adapter / file).write_bytes(bytes(content))
        with pytest.raises(UserError, match="weights or files were changed"):
            verify(Verify(db=store.url, chain_only=True))


@pytest.mark.parametrize("change", ["weights", "folder", "link"])
def test_nothing_is_built_on_an_adapter_that_was_changed_or_lost(three, tmp_path, change):
    """The next version's digest is noted in the history, and would make what was changed look sound."""
    store, copy = copied(three, tmp_path)
    link = copy / "work" / "adapter"
    if change == "weights":
        content = bytearray((link / "adapter_model.safetensors").read_bytes())
        content[-1] ^= 1
        (link / "adapter_model.safetensors").write_bytes(bytes(content))
    elif change == "folder":
        link.resolve().rename(copy / "elsewhere")
    else:
        link.unlink()
    left = sorted((copy / "work" / "adapters").iterdir())
    assert left
    states = [request.state for request in store.requests()]
    for command in (
        lambda: run(RunRequests(db=store.url)),
        lambda: revoke(Revoke(db=store.url, id="2")),
        lambda: export_requests(ExportRequests(db=store.url, out=str(tmp_path / "out"))),
        lambda: verify(Verify(db=store.url, chain_only=True)),
    ):
        with pytest.raises(UserError, match="not the one that the history names"):
            command()
        # nothing of it is swept away as never reached
        assert sorted((copy / "work" / "adapters").iterdir()) == left
    assert [request.state for request in store.requests()] == states
    assert not (tmp_path / "out").exists()


def test_a_project_that_is_copied_or_moved_with_its_database_is_one_of_its_own(three, tmp_path):
    original, folder, _ = three
    store, copy = copied(three, tmp_path)
    before = folder_digest(folder / "work")
    verify(Verify(db=store.url))
    revoke(Revoke(db=store.url, id="1"))
    assert folder_digest(folder / "work") == before
    assert original.get(1).state == "forgotten"
    copy.rename(tmp_path / "there")
    there = Store.open(f"sqlite:///{tmp_path}/there/requests.db")
    assert verify(Verify(db=there.url)).keys() == {"R-0002", "R-0003", "utility"}
    assert revoke(Revoke(db=there.url, id="2")).state == "revoked"
    assert not copy.exists()


def test_a_folder_that_was_moved_away_from_its_database_is_named(data, tmp_path):
    store = start(data, tmp_path, db=f"sqlite:///{tmp_path}/own/requests.db")
    ask(store, data, "Ada")
    run(RunRequests(db=store.url))
    (tmp_path / "work").rename(tmp_path / "elsewhere")
    for command in (Verify(db=store.url), Verify(db=store.url, chain_only=True)):
        with pytest.raises(UserError, match=r"The folder of the adapters, .*work, is gone.*move it back"):
            verify(command)
    (tmp_path / "work").symlink_to(tmp_path / "elsewhere")
    verify(Verify(db=store.url, chain_only=True))


def test_a_copy_beside_the_versions_is_no_version(three, tmp_path):
    store, copy = copied(three, tmp_path)
    (copy / "work" / "adapters" / "0009 copy").mkdir()
    verify(Verify(db=store.url, chain_only=True))
    assert (copy / "work" / "adapters" / "0009 copy").is_dir()


def test_verify_takes_a_head_that_was_written_down(three, tmp_path):
    store, _, _ = three
    head = store.head()
    verify(Verify(db=store.url, chain_only=True, head=head))
    verify(Verify(db=store.url, chain_only=True, head=head[:12]))
    with pytest.raises(UserError, match="cut or written anew"):
        verify(Verify(db=store.url, chain_only=True, head="0" * 64))
    with pytest.raises(UserError, match="expected 12 to 64"):
        verify(Verify(db=store.url, chain_only=True, head="xyz"))


def test_data_that_was_deleted_locks_nothing(data, tmp_path, capsys):
    store = start(data, tmp_path)
    file = tmp_path / "Lovelace.jsonl"
    shutil.copy(data / "Ada.jsonl", file)
    add(Add(db=store.url, subject="Ada", data=str(file)))
    real = work.unlearn

    def then_deleted(settings):
        out = real(settings)
        file.unlink()
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "unlearn", then_deleted)
        done = run(RunRequests(db=store.url))[0]
    assert done.state == "unproven"
    assert "Evidence missing" in done.after["verdict"]["why"][0]
    assert done.expert == 1
    verify(Verify(db=store.url))
    printed = " ".join(capsys.readouterr().out.split())
    assert "Evidence missing: R-0001 was not measured" in printed
    assert "forgotten?" not in printed
    ask(store, data, "Bo")
    assert run(RunRequests(db=store.url))[0].state == "forgotten"
    assert revoke(Revoke(db=store.url, id="1")).state == "revoked"
    # where they lay is said and not written down, or purging could not remove it
    assert "Lovelace.jsonl" in capsys.readouterr().err
    purge(Purge(db=store.url, id="1"))
    for path in tmp_path.glob("requests.db*"):
        assert b"Lovelace" not in path.read_bytes()


def test_another_programs_database_is_left_alone(data, tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE customers (name)")
        other.commit()
    before = (tmp_path / "other.db").read_bytes()
    with pytest.raises(UserError, match=r"database of another program .with the table customers"):
        start(data, tmp_path, db=f"sqlite:///{tmp_path}/other.db")
    assert (tmp_path / "other.db").read_bytes() == before
    # an empty file is nobody's
    (tmp_path / "empty.db").touch()
    assert start(data, tmp_path, db=f"sqlite:///{tmp_path}/empty.db").requests() == []


def test_purge_says_when_a_reader_keeps_old_pages(tmp_path, monkeypatch):
    monkeypatch.setattr("alter.requests.connection.PATIENCE", 0.2)
    url = f"sqlite:///{tmp_path}/requests.db"
    settings = {"model": "m", "retain": "r", "folder": str(tmp_path / "work")}
    store = Store.create(url, settings)
    number = put(store, "Lovelace", "1").id
    store.move([number], "withdrawn")

    def bytes_left():
        return any(b"Lovelace" in path.read_bytes() for path in tmp_path.glob("requests.db*"))

    with contextlib.closing(sqlite3.connect(tmp_path / "requests.db")) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM alter_requests").fetchall()
        _, left = purge(Purge(db=url, id="1"))
        assert bytes_left()
        assert any("another process reads it" in line and "purge R-0001 again" in line for line in left)
    _, left = purge(Purge(db=url, id="1"))
    assert not bytes_left()
    assert not any("another process reads it" in line for line in left)


def test_after_a_purge_what_cannot_be_measured_says_why(three, tmp_path, capsys):
    store, _ = copied(three, tmp_path)
    _, left = purge(Purge(db=store.url, id="1"))
    assert any("nor can what is in force be distilled" in line for line in left)
    with pytest.raises(UserError, match=r"R-0001 \(purged\) is forgotten"):
        run(RunRequests(db=store.url, id=["1"]))
    verify(Verify(db=store.url))
    printed = capsys.readouterr()
    assert "Evidence missing: R-0001 was not measured" in " ".join(printed.out.split())
    assert "R-0001" not in printed.err
    with pytest.raises(UserError, match="rows of R-0001 were purged"):
        export_requests(ExportRequests(db=store.url, out=str(tmp_path / "out"), form="weights", final=True))


def test_purge_removes_no_adapter_beside_an_old_copy_of_the_database(three, tmp_path):
    store, copy = copied(three, tmp_path)
    # in force is what a later run made, of which this database knows nothing
    later = copy / "work" / "adapters" / "0004"
    shutil.copytree(copy / "work" / "adapters" / "0003", later)
    (later / "requests.json").write_text(json.dumps({**manifest(present(store)), "version": 4}))
    (copy / "work" / "adapter").unlink()
    (copy / "work" / "adapter").symlink_to("adapters/0004")
    there = sorted((copy / "work" / "adapters").iterdir())
    removed, left = purge(Purge(db=store.url, id="2"))
    assert "subject of R-0002 in the database" in removed
    assert not any("adapters" in line for line in removed)
    assert any("is not the one that the history names, so none was removed" in line for line in left)
    assert sorted((copy / "work" / "adapters").iterdir()) == there


def test_purge_says_what_is_gone_and_what_is_not(data, tmp_path):
    store = start(data, tmp_path)
    add(Add(db=store.url, subject="Ada Lovelace", data=str(data / "Ada.jsonl"), keep_text=True))
    run(RunRequests(db=store.url))
    revoke(Revoke(db=store.url, id="1"))
    removed, left = purge(Purge(db=store.url, id="1"))
    assert {line.partition(" of R-0001")[0] for line in removed[-4:]} == {"subject", "text", "location", "row hashes"}
    assert any(str(data / "Ada.jsonl") in line for line in left)
    # nothing keeps it from saying what was revoked
    assert any(line.endswith("still knows what it knew.") for line in left)
    for path in tmp_path.glob("requests.db*"):
        assert b"Lovelace" not in path.read_bytes()
        assert b"In town" not in path.read_bytes()
    assert store.check_chain() == []
    verify(Verify(db=store.url, chain_only=True))
    list_requests(List(db=store.url))
    assert [folder.name for folder in sorted((tmp_path / "work" / "adapters").iterdir())] == ["0002"]


def test_markup_and_escapes_in_a_subject_stay_text(data, tmp_path, capsys):
    store = start(data, tmp_path)
    add(Add(db=store.url, subject="[/] [red]Eve\x1b[2J", data=str(data / "Ada.jsonl")))
    list_requests(List(db=store.url))
    show_request(Show(db=store.url, id="1"))
    printed = capsys.readouterr().out
    assert "[red]Eve" in printed
    assert "\x1b" not in printed


@pytest.mark.parametrize(
    "url",
    ["postgresql://me:hunter2@host/name", "postgresql://me@host/name?password=hunter2", "postgresql//me:hunter2@host"],
)
def test_passwords_are_not_shown(url):
    assert "hunter2" not in without_password(url)
    with pytest.raises(UserError) as error:
        Store.open(url)
    assert "hunter2" not in str(error.value)


# Kills


def command(*args):
    return children.Child("request", *args)


@pytest.mark.slow
def test_killed_at_any_moment_nothing_is_lost_or_done_twice(data, tmp_path):
    store = start(data, tmp_path, recipe=recipe_of(data, tmp_path, save_steps=1))
    moments = random.Random(0)
    base = AutoModelForCausalLM.from_pretrained(data / "model")
    started = time.time()
    ask(store, data, "Ada")
    command("run", "--db", store.url).wait(120)
    usual = time.time() - started
    assert store.get(1).state == "forgotten"
    for name in NAMES[1:]:
        ask(store, data, name)
        for _ in range(2):
            process = command("run", "--db", store.url)
            try:
                process.wait(moments.uniform(0.3, 1.1) * usual)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert store.check_chain() == []
            if (tmp_path / "work" / "adapter").exists():
                model = PeftModel.from_pretrained(base, str(tmp_path / "work" / "adapter"))
                base = model.unload()
    if store.requests("received", "running", "trained"):
        run(RunRequests(db=store.url))
    found = store.requests()
    assert [request.state for request in found] == ["forgotten"] * 3
    inside = manifest(present(store))
    assert sorted(inside["experts"].values()) == ["R-0001", "R-0002", "R-0003"]
    verify(Verify(db=store.url, chain_only=True))


def test_what_was_missed_is_emptied_before_the_others_are_judged(data, tmp_path, monkeypatch):
    """The evidence of a request is of the adapter that goes in force, without the experts of those that were missed."""
    store = start(data, tmp_path, holdout=None)
    for name in NAMES[:2]:
        ask(store, data, name)
    judged = []
    real_load, real_judge = concluding.load_model, concluding.judge
    loaded = []
    monkeypatch.setattr(concluding, "load_model", lambda *a, **k: loaded.append(a[1:]) or real_load(*a, **k))

    def judge(before, after, **given):
        judged.append(len(loaded))
        found = real_judge(before, after, **given)
        word = "not forgotten" if len(judged) == 1 else "forgotten"
        return dataclasses.replace(found, word=word)

    monkeypatch.setattr(concluding, "judge", judge)
    with pytest.raises(UserError, match="R-0001 NOT FORGOTTEN"):
        run(RunRequests(db=store.url))
    # both with what was trained, then R-0002 alone with what is put in force
    assert judged == [1, 1, 2]
    assert [request.state for request in store.requests()] == ["not forgotten", "forgotten"]
    assert manifest(present(store))["cleared"] == [1]
    assert not next(v for k, v in weights(tmp_path).items() if ".alter_B." in k)[:, 4:8].any()
    assert not (tmp_path / "work" / ".revoked").exists()
