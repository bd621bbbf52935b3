"""`alter request distill`: requests distilled into the base's own weights, later ones on the new base, kills in between."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

import children
from alter.core.errors import UserError
from alter.requests import checking, evidence, handout
from alter.requests.bases import bases, present
from alter.requests.certificate.command import Certificate, certificate
from alter.requests.commands import Purge, Revoke, RunRequests, purge, revoke, run
from alter.requests.display import print_bases
from alter.requests.export import ExportRequests, export_requests
from alter.requests.intake import Init, init
from alter.requests.rebasing import DistillRequests, distill_requests
from alter.requests.records import IN_FORCE
from alter.requests.register import List, list_requests
from alter.requests.signing import Forged
from alter.requests.store import Store
from alter.requests.verification import Verify, verify
from alter.requests.versions import manifest
from alter.storage.files import folder_digest
from test_requests import ask, known_data, start

KILLED = """
import os, sys
from alter.requests import evidence, handout
from alter.requests.rebasing import DistillRequests, distill_requests
from alter.requests.store import Store
evidence.UTILITY_SHARE = 0.8
where = {"trained": (handout, "_beside"), "moved": (Store, "move")}[sys.argv[2]]
setattr(*where, lambda *_, **__: os._exit(9))
distill_requests(DistillRequests(db=sys.argv[1], final=True, recipe=sys.argv[3]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = known_data(tmp_path_factory.mktemp("data"))
    distilling = {
        "general": [str(folder / "retain.jsonl"), str(folder / "Cy.jsonl")],
        "rewordings": 0,
        "precision": "fp32",
        "device": "cpu",
        "batch_size": 6,
        "learning_rate": 5e-3,
        "max_steps": 100,
        # what no request asks for yet must be known afterwards as well
        "shares": {"forget": 0.3, "keep": 0.2, "general": 0.5},
    }
    (folder / "distill.yaml").write_text(yaml.safe_dump(distilling))
    without = distilling | {"general": [str(folder / "retain.jsonl")]}
    (folder / "later.yaml").write_text(yaml.safe_dump(without))
    return folder


def told(capsys):
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_requests_are_distilled_and_later_ones_begin_anew(data, tmp_path, capsys, monkeypatch):
    store = start(data, tmp_path, distill_every=2, distill_recipe=str(data / "distill.yaml"))
    assert "When 2 requests are in force" in told(capsys)
    home, key = tmp_path / "work", tmp_path / "key"
    certificate(Certificate(new_key=str(key)))
    ask(store, data, "Ada")
    run(RunRequests(db=store.url))
    assert "time to distil" not in told(capsys)
    ask(store, data, "Bo")
    run(RunRequests(db=store.url))
    # what it takes away is said before it happens
    said = told(capsys)
    assert "Distilling R-0001, R-0002 is final" in said
    assert "alter request distill --final" in said
    with pytest.raises(UserError, match=r"Distilling R-0001, R-0002 is final.*none of them can be revoked.*`final`"):
        distill_requests(DistillRequests(db=store.url))
    assert bases(store) == []

    # killed once the weights are trained, and once they lie in place
    short = tmp_path / "short.yaml"
    short.write_text(yaml.safe_dump(yaml.safe_load((data / "distill.yaml").read_text()) | {"max_steps": 2}))
    for where, recipe in (("trained", short), ("moved", data / "distill.yaml")):
        ended = children.Child(store.url, where, recipe, code=KILLED)
        assert ended.wait() == 9, ended.stderr[-2000:]
        assert {request.state for request in store.requests()} <= set(IN_FORCE)
        assert present(store).base == 0
        if where == "moved":
            assert (home / "bases" / "0001" / "model").is_dir()
        verify(Verify(db=store.url, chain_only=True))
        assert not list((home / "runs").glob("*"))
        assert not list((home / "bases").glob("*"))

    # too little utility would be left: nothing changes; the next try, of the same settings, has the same weights
    real, kept = handout.distill, tmp_path / "kept"

    def once(settings):
        if not kept.exists():
            shutil.copytree(real(settings), kept)
        else:
            shutil.copytree(kept, settings.out)
        return Path(settings.out)

    monkeypatch.setattr(handout, "distill", once)
    monkeypatch.setattr(evidence, "UTILITY_SHARE", 1.5)
    with pytest.raises(UserError, match=r"Nothing was changed: the new weights would keep 0\..*below 1.5"):
        distill_requests(DistillRequests(db=store.url, final=True))
    assert present(store).base == 0
    # so small a model loses about 6 % of it
    for module in (evidence, checking):
        monkeypatch.setattr(module, "UTILITY_SHARE", 0.8)
    before = [request.after for request in store.requests()]
    found = distill_requests(DistillRequests(db=store.url, final=True))
    monkeypatch.setattr(handout, "distill", real)
    assert [request.state for request in found] == ["distilled"] * 2
    project = present(store)
    assert project.base == 1
    assert Path(project.model) == home / "bases" / "0001" / "model"
    assert manifest(project)["version"] == 0
    [base] = bases(store)
    assert base.requests == ("R-0001", "R-0002")
    assert base.weights == folder_digest(project.model)
    assert not list((home / "runs").glob("*"))
    for request, old in zip(found, before, strict=True):
        assert request.after["adapter"] == old
        assert request.after["probability"] < 0.5 * request.before["probability"]
    capsys.readouterr()
    list_requests(List(db=store.url))
    said = told(capsys)
    assert "Base 1" in said
    assert "holds R-0001, R-0002; utility" in said
    assert "only the model from before" in said
    assert "The base weights still know" not in said
    with pytest.raises(UserError, match=r"R-0001 \(Ada\) is distilled, which is final"):
        revoke(Revoke(db=store.url, id="1"))
    with pytest.raises(UserError, match=r"Nothing to export.*base 1 are the folder"):
        export_requests(ExportRequests(db=store.url, out=str(tmp_path / "out")))
    with pytest.raises(UserError, match="No request is in force"):
        distill_requests(DistillRequests(db=store.url, final=True))
    assert set(verify(Verify(db=store.url))) == {"R-0001", "R-0002", "utility"}

    # later requests: the first expert again, on the new base
    ask(store, data, "Cy")
    [third] = run(RunRequests(db=store.url))
    assert third.state in IN_FORCE
    assert (third.expert, third.run["base"]) == (1, 1)
    # a share of the first model's utility, as verify measures it
    share = verify(Verify(db=store.url))["utility"]["share"]
    assert third.after["utility_share"] == pytest.approx(share)
    assert base.utility < 0.999
    assert (home / "bases" / "0001" / "adapter").is_symlink()
    verify(Verify(db=store.url))
    _certified(store, data, project, key, tmp_path)
    assert revoke(Revoke(db=store.url, id="3")).state == "revoked"
    ask(store, data, "Cy")
    run(RunRequests(db=store.url))

    distill_requests(DistillRequests(db=store.url, final=True, recipe=str(data / "later.yaml")))
    second = bases(store)[1]
    assert second.requests == ("R-0004",)
    assert set(store.get(4).after["earlier"]) == {"R-0001", "R-0002"}
    assert "not_checked" not in store.get(4).after["earlier"]["R-0001"]
    # the revoked one was of a base that is in force no more
    verify(Verify(db=store.url))
    removed, left = purge(Purge(db=store.url, id="4"))
    assert any("bases/0001" in line for line in removed)
    assert not (home / "bases" / "0001").exists()
    assert not (home / "adapters").exists()
    assert any(f"The model {data / 'model'}, from which base 2 was made, still knows" in line for line in left)
    verify(Verify(db=store.url))

    certificate(Certificate(what="1", db=store.url, key=str(key), out=str(tmp_path / "later.json")))
    assert "The figures are of base 1; the files named are those of base 2" in (tmp_path / "later.json").read_text()

    # a base whose weights were changed is not built on
    place = Path(present(store).model) / "model.safetensors"
    tensors = load_file(place)
    tensors["lm_head.weight"][0] += 1
    save_file(tensors, place, metadata={"format": "pt"})
    with pytest.raises(UserError, match="The weights of base 2"):
        verify(Verify(db=store.url))
    with pytest.raises(UserError, match=r"The weights of base 2.*Nothing was done"):
        distill_requests(DistillRequests(db=store.url, final=True))


def _certified(store, data, project, key, tmp_path):
    """Certificates of a distilled request and of one on the new base: each is about its own files."""
    for name in ("1", "3"):
        certificate(Certificate(what=name, db=store.url, key=str(key), out=str(tmp_path / f"{name}.json")))
    first, third = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1", "3"))
    assert not any("is an adapter" in line for line in first["limits"])
    assert first["state"] == "distilled"
    assert first["base"]["name"] == "model"
    assert first["result"]["base"] == 1
    assert first["base"]["files"] != first["result"]["files"] == third["base"]["files"]
    assert not any("The figures are of base" in limit for limit in first["limits"])
    given = dict(public_key=f"{key}.pub", verify=str(tmp_path / "1.json"))
    certificate(Certificate(**given, model=str(data / "model"), adapter=project.model))
    with pytest.raises(Forged):
        certificate(Certificate(**given, model=project.model))
    verify(Verify(db=store.url, chain_only=True, certificate=[given["verify"]], public_key=[f"{key}.pub"]))


@pytest.mark.slow
def test_weights_that_did_not_learn_it_change_nothing(data, tmp_path):
    weak = tmp_path / "weak.yaml"
    settings = yaml.safe_load((data / "distill.yaml").read_text()) | {"learning_rate": 1e-9, "max_steps": 1}
    weak.write_text(yaml.safe_dump(settings))
    store = start(data, tmp_path, distill_every=1, distill_recipe=str(weak))
    ask(store, data, "Ada")
    # the run itself is in force, whatever becomes of the distilling
    with pytest.raises(UserError, match="did not learn it: R-0001 NOT FORGOTTEN"):
        run(RunRequests(db=store.url, final=True))
    assert store.get(1).state in IN_FORCE
    assert present(store).base == 0
    assert not list((tmp_path / "work").glob("bases/*"))
    verify(Verify(db=store.url, chain_only=True))


def test_what_is_no_such_project(data, tmp_path):
    store = start(data, tmp_path)
    ask(store, data, "Ada")
    with pytest.raises(UserError, match="`distill_every`"):
        run(RunRequests(db=store.url, final=True))
    with pytest.raises(UserError, match="nothing to distil"):
        distill_requests(DistillRequests(db=store.url, final=True))
    bad = tmp_path / "bad.yaml"
    for content, says in (("forget: x", "which the requests decide"), ("epohcs: 3", "epochs")):
        bad.write_text(content)
        given = dict(model=str(data / "model"), retain=str(data / "retain.jsonl"), folder=str(tmp_path / "other"))
        with pytest.raises(UserError, match=says):
            init(Init(db=f"sqlite:///{tmp_path}/other.db", **given, distill_recipe=str(bad)))
        assert not (tmp_path / "other.db").exists()


def test_a_base_that_another_process_changed_is_seen(tmp_path):
    """Whoever opened the database before must not sweep away what is in force by now."""
    from alter.requests.bases import remove_unreached

    store = Store.create(f"sqlite:///{tmp_path}/requests.db", {"model": "m", "retain": "r", "folder": str(tmp_path)})
    before = present(store)
    store.add(subject="Ada", data="a", data_hash="1", row_hashes=["1"])
    for state in ("running", "trained", "forgotten"):
        store.move([1], state)
    os.makedirs(tmp_path / "bases" / "0001" / "model")
    store.move([1], "distilled", details={"base": 1, "weights": "x", "utility": 0.99})
    with pytest.raises(UserError, match="Another process has changed the base"):
        remove_unreached(store, before)
    remove_unreached(store, present(store))
    assert (tmp_path / "bases" / "0001").is_dir()
    assert present(store).kept == 0.99


def test_each_base_is_listed_with_the_requests_that_were_distilled_into_it(tmp_path, capsys):
    store = Store.create(f"sqlite:///{tmp_path}/requests.db", {"model": "m", "retain": "r", "folder": str(tmp_path)})
    for number, base in ((1, 1), (2, 1), (3, 2)):
        store.add(subject=f"Subject {number}", data="a", data_hash=str(number), row_hashes=[str(number)])
        for state in ("running", "trained", "forgotten"):
            store.move([number], state)
        store.move([number], "distilled", details={"base": base, "weights": "x", "utility": 0.99})
    print_bases(bases(store), present(store))
    said = told(capsys)
    assert "holds R-0001, R-0002; utility" in said
    assert "holds R-0003 and what base 1 holds; utility" in said
