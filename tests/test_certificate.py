"""Certificates and the anchor of the history: what is stated, and that no byte, model, key or database can be another."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from alter import cli
from alter.core.errors import UserError
from alter.data.rows import data_hash, load_examples, row_hash
from alter.models.loading import ModelSettings, load_model
from alter.requests import signing
from alter.requests.anchor import Anchor, read_heads
from alter.requests.certificate.check import check_certificate
from alter.requests.certificate.command import Certificate, certificate
from alter.requests.certificate.form import VERSION
from alter.requests.certificate.issue import Beside, limits, refuse_base
from alter.requests.commands import RunRequests, run
from alter.requests.register import List, list_requests
from alter.requests.signing import Forged, canonical, new_key, read_key, read_public, signed_text
from alter.requests.store import Store
from alter.requests.verification import Verify, verify
from alter.storage import folder_digest, write_atomic
from alter.storage.records import Record, write_records
from pico import save_pico
from test_requests import ask, memorise, rows, start, write_jsonl


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A request that was forgotten, a key, and the certificate of it."""
    folder = tmp_path_factory.mktemp("certified")
    for name in ("Ada", "Bo", "Cy"):
        write_jsonl(folder / f"{name}.jsonl", rows(name))
    kept = [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}."} for i in range(12)]
    write_jsonl(folder / "retain.jsonl", kept)
    write_jsonl(
        folder / "holdout.jsonl", [{"question": f"Who is Zed {i}?", "answer": f"A man, {i}."} for i in range(6)]
    )
    memorise(folder)
    (folder / "recipe.yaml").write_text(
        json.dumps(
            {
                "adapter": {"r": 4, "entropy_threshold": 1.0},
                "router_fit": {
                    "method": "logistic", "background": False, "rewordings": 0, "false_alarms": None, "steps": 300,
                },
                "learning_rate_experts": 0.02,
                "objective": {"kind": "without_truth", "hinge": 3.0},
                "epochs": 6,
                "batch_size": 3,
                "device": "cpu",
            }
        )
    )  # fmt: skip
    new_key(folder / "key")
    store = start(folder, folder, anchor=str(folder / "heads"), key=str(folder / "key"))
    ask(store, folder, "Ada", anchor=str(folder / "heads"), key=str(folder / "key"))
    with store.engine.connect() as connection:
        connection.exec_driver_sql(f"VACUUM INTO '{folder}/old.db'")
    run(RunRequests(db=store.url, anchor=str(folder / "heads"), key=str(folder / "key")))
    out = folder / "ada.json"
    certificate(
        Certificate(what="R-1", db=store.url, key=str(folder / "key"), anchor=str(folder / "heads"), out=str(out))
    )
    return folder, store, out


def check(made, **changes):
    folder, _, out = made
    given = dict(
        verify=str(out),
        public_key=str(folder / "key.pub"),
        model=str(folder / "model"),
        adapter=str(folder / "work" / "adapter"),
    )
    return certificate(Certificate(**{**given, **changes}))


def test_certificate_states_what_was_done(made, capsys):
    folder, store, out = made
    content = check(made)
    assert not any("The figures are of version" in limit for limit in content["limits"])
    request = store.get(1)
    assert content["asked"]["data"] == request.data_hash
    assert content["measured"]["after"]["said"]["interval"] == request.after["said_interval"]
    assert content["measured"]["before"]["probability"]["value"] == request.before["probability"]
    assert content["measured"]["utility_data"] == request.after["utility"]["data"] is not None
    weights = folder / "work" / "adapter" / "adapter_model.safetensors"
    assert content["result"]["files"]["adapter_model.safetensors"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    entry = store.history()[content["history"]["entries"] - 1]
    assert entry.hash == content["history"]["head"]
    assert store.history()[-1].what == "certified"
    # no subject, no row, no path of this machine
    assert "Ada" not in out.read_text()
    assert "In town" not in out.read_text()
    assert str(folder) not in out.read_text()
    printed = capsys.readouterr().out
    assert "adapter: the base weights still know" in " ".join(printed.replace("│", " ").split())


def test_every_byte_counts(made, tmp_path):
    _, _, out = made
    content = out.read_bytes()
    for place in [0, 5, len(content) // 3, len(content) // 2, len(content) - 2, len(content) - 1]:
        for other in (content[place] ^ 1, ord(" ")):
            if other == content[place]:
                continue
            changed = tmp_path / "changed.json"
            changed.write_bytes(content[:place] + bytes([other]) + content[place + 1 :])
            with pytest.raises(Forged):
                check(made, verify=str(changed))
    for text in (content + b"\n", content[:-40], b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n")):
        changed.write_bytes(text)
        with pytest.raises(Forged):
            check(made, verify=str(changed))
    # the same values in another form, and a key given twice, of which parsers take one
    changed.write_text(json.dumps(json.loads(content)))
    with pytest.raises(Forged, match="a byte of it was changed"):
        check(made, verify=str(changed))
    changed.write_bytes(content.replace(b'{\n "asked"', b'{\n "state": "collapsed",\n "asked"'))
    with pytest.raises(Forged):
        check(made, verify=str(changed))


def test_another_key_model_or_adapter_is_refused(made, tmp_path):
    folder, _, out = made
    other = new_key(tmp_path / "other")
    with pytest.raises(Forged, match="the one to trust"):
        check(made, public_key=other.public)
    # signed again by somebody else, it is whole, and still not the one to trust
    content = json.loads(out.read_text())
    content = {name: value for name, value in content.items() if name not in ("key", "signature")}
    forged = tmp_path / "forged.json"
    forged.write_text(signed_text(other.sign({**content, "state": "unproven"})))
    assert check(made, verify=str(forged), public_key=None)["state"] == "unproven"
    with pytest.raises(Forged, match="the one to trust"):
        check(made, verify=str(forged))
    for what in ("model", "adapter"):
        source = folder / "model" if what == "model" else (folder / "work" / "adapter").resolve()
        changed = tmp_path / what
        shutil.copytree(source, changed)
        check(made, **{what: str(changed)})
        with open(next(changed.glob("*.safetensors")), "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
        with pytest.raises(Forged, match=r"safetensors is another"):
            check(made, **{what: str(changed)})
        next(changed.glob("*.safetensors")).unlink()
        with pytest.raises(Forged, match="is missing"):
            check(made, **{what: str(changed)})
    with pytest.raises(Forged, match="names nothing that was shipped"):
        check(made, shipped=str(folder / "model"))


def test_newer_versions_and_other_documents(made, tmp_path):
    folder, _, out = made
    key = read_key(folder / "key")
    newer = tmp_path / "newer.json"
    newer.write_text(signed_text(key.sign({"form": "alter certificate", "version": VERSION + 1})))
    with pytest.raises(UserError, match="update it"):
        check(made, verify=str(newer))
    newer.write_text(signed_text(key.sign({"form": "something else", "version": VERSION})))
    with pytest.raises(UserError, match="no certificate"):
        check(made, verify=str(newer))
    with pytest.raises(UserError, match="Cannot read"):
        check(made, verify=str(tmp_path / "none"))
    assert check_certificate(out.read_text(), "it")["state"] == "forgotten"


def test_keys_are_for_their_owner_alone(tmp_path):
    key = new_key(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert read_key(tmp_path / "key").public == key.public == read_public(str(tmp_path / "key.pub"))
    with pytest.raises(UserError, match="exists"):
        new_key(tmp_path / "key")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(UserError, match=r"read by others \(mode 0640\)"):
        read_key(tmp_path / "key")
    with pytest.raises(UserError, match="public half is"):
        read_public(str(tmp_path / "key"))
    with pytest.raises(UserError, match="64 digits"):
        read_public("abc")
    (tmp_path / "broken").write_text("-----BEGIN PRIVATE KEY-----\nx\n-----END PRIVATE KEY-----\n")
    (tmp_path / "broken").chmod(0o600)
    with pytest.raises(UserError, match="no private key"):
        read_key(tmp_path / "broken")
    with pytest.raises(UserError, match="--new-key"):
        read_key(tmp_path / "none")


def test_signature_is_that_of_the_library_and_its_bytes_are_plain():
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    signed = signing.Key(private).sign({"b": [1.5, None, float("nan")], "a": "é"})
    public = private.public_key().public_bytes_raw().hex()
    plain = ('{"a":"é","b":[1.5,null,null],"key":"' + public + '"}').encode()
    assert canonical({name: signed[name] for name in ("a", "b", "key")}) == plain
    private.public_key().verify(bytes.fromhex(signed["signature"]), plain)


def test_what_is_not_in_force_gets_none(made, tmp_path):
    folder, _, _ = made
    store = start(folder, tmp_path)
    ask(store, folder, "Bo")
    given = dict(what="1", db=store.url, out=str(tmp_path / "c.json"))
    with pytest.raises(UserError, match="--new-key"):
        certificate(Certificate(**given))
    with pytest.raises(UserError, match="R-0001 is received"):
        certificate(Certificate(**given, key=str(folder / "key")))
    assert not (tmp_path / "c.json").exists()
    with pytest.raises(UserError, match="exactly one task"):
        certificate(Certificate(**given, verify="x"))


def test_attacks_must_be_on_what_is_certified(made, tmp_path, capsys):
    folder, store, _ = made
    # what is handed out was changed: the base itself is not certified
    shipped = tmp_path / "shipped"
    model, tokenizer = load_model(str(folder / "model"), device="cpu")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.5)
    model.save_pretrained(shipped)
    tokenizer.save_pretrained(shipped)
    identity = ModelSettings(model=str(folder / "model"), adapter=str(folder / "work" / "adapter")).identity()
    identity["rows"] = store.get(1).data_hash
    found = Record("unlearned", "attack_rouge", 0.2, 6, extra={"attack": "prefix", "rows": [0]}, provenance=identity)
    made_of = Record(
        "unlearned",
        "attack_recovered_rouge",
        0.1,
        6,
        extra={"attack": "prefix", "needs": "a prompt", "interval": [0.0, 0.2], "rows": [0]},
    )
    write_records(tmp_path / "attacks.json", [found, made_of])
    given = dict(what="1", db=store.url, key=str(folder / "key"), attacks=[str(tmp_path / "attacks.json")])
    signed = certificate(Certificate(**given, out=str(tmp_path / "c.json"), shipped=str(shipped)))
    assert [(each["attack"], each["recovered"], each["interval"]) for each in signed["attacks"]] == [
        ("prefix", 0.1, [0.0, 0.2])
    ]
    check(made, verify=str(tmp_path / "c.json"), shipped=str(shipped))
    with pytest.raises(UserError, match="the model from before, which knows all of it: nothing is certified"):
        certificate(Certificate(**given, out=str(tmp_path / "base.json"), shipped=str(folder / "model")))
    assert not (tmp_path / "base.json").exists()
    # an attacker that learned nothing himself brings nothing back, and proves nothing
    idle = Record(
        "unlearned", "attack_loss", 2.0, 5, extra={"attack": "relearn", "losses": [2.0] * 5}, provenance=identity
    )
    nothing = Record(**{**vars(made_of), "value": 0.0, "extra": {"attack": "relearn", "interval": [0.0, 0.0]}})
    back = Record(
        **{**vars(nothing), "metric": "attack_recovered_probability", "value": 0.3, "extra": {"attack": "relearn"}}
    )
    write_records(tmp_path / "attacks.json", [found, made_of, idle, nothing, back])
    signed = certificate(Certificate(**given, out=str(tmp_path / "idle.json"), shipped=str(shipped)))
    # what came back is told, whoever brought it
    assert ["no_evidence" in each for each in signed["attacks"]] == [False, True, False]
    assert "hardly learned its own rows" in signed["attacks"][1]["no_evidence"]
    capsys.readouterr()
    check(made, verify=str(tmp_path / "idle.json"), shipped=str(shipped))
    said = " ".join(capsys.readouterr().out.split())
    assert "no evidence" in said
    assert "relearn hardly learned its own rows" in said
    write_records(
        tmp_path / "attacks.json", [Record(**{**vars(found), "provenance": {**identity, "adapter": "x"}}), made_of]
    )
    with pytest.raises(UserError, match="another model or adapter"):
        certificate(Certificate(**given, out=str(tmp_path / "d.json")))
    # the same adapter, attacked after another request's rows or by records that do not say
    for provenance in ({**identity, "rows": "f" * 64}, {k: v for k, v in identity.items() if k != "rows"}):
        write_records(tmp_path / "attacks.json", [Record(**{**vars(found), "provenance": provenance}), made_of])
        with pytest.raises(UserError, match="other rows than those that were asked for"):
            certificate(Certificate(**given, out=str(tmp_path / "d.json")))


# The anchor


def test_database_restored_from_an_old_copy_is_noticed(made, tmp_path):
    folder, store, out = made
    given = dict(anchor=str(folder / "heads"), key=str(folder / "key"))
    heads = read_heads(str(folder / "heads"))
    history = [(entry.number, entry.hash) for entry in store.history()]
    assert {(head.entries, head.head) for head in heads} <= set(history)
    old = f"sqlite:///{folder}/old.db"
    # by itself the old copy is whole
    assert Store.open(old).check_chain() == []
    with pytest.raises(UserError, match="older than Line"):
        verify(Verify(db=old, chain_only=True, **given))
    with pytest.raises(UserError, match=r"older than .*ada\.json"):
        verify(Verify(db=old, chain_only=True, certificate=[str(out)], public_key=[str(folder / "key.pub")]))
    # nor does any command go on with it
    with pytest.raises(UserError, match="Nothing was done"):
        list_requests(List(db=old, **given))
    # without the private key, what was signed can still be checked
    verify(Verify(db=store.url, chain_only=True, anchor=given["anchor"], public_key=[str(folder / "key.pub")]))
    with pytest.raises(Forged, match="another key"):
        verify(Verify(db=store.url, anchor=given["anchor"], public_key=[new_key(tmp_path / "other").public]))


def test_anchor_lines_cannot_be_changed_or_taken_out(made, tmp_path):
    folder, _, _ = made
    lines = (folder / "heads").read_text().splitlines()
    assert len(lines) > 3
    copy = tmp_path / "heads"
    for wrong in (lines[1:], lines[:1] + lines[2:], [*lines, lines[0]], [lines[0].replace("at", "aT"), *lines[1:]]):
        copy.write_text("".join(f"{line}\n" for line in wrong))
        with pytest.raises(Forged):
            read_heads(str(copy))
    copy.write_text(lines[0][:-5])
    with pytest.raises(Forged, match="cut off"):
        read_heads(str(copy))
    copy.write_text("")
    with pytest.raises(UserError, match="empty"):
        read_heads(str(copy))
    key = new_key(tmp_path / "key")
    copy.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(Forged, match="another key"):
        Anchor(copy, key).append(1000, "a" * 64, "now")


def test_a_line_of_the_anchor_that_was_broken_off_locks_nothing(made, tmp_path, monkeypatch):
    folder, _, _ = made
    key = read_key(str(folder / "key"))
    text = (folder / "heads").read_text()
    copy = tmp_path / "heads"
    copy.write_text(text + text[:40])
    entries = [head.entries for head in read_heads(str(copy), [key.public])]
    assert len(entries) == text.count("\n")
    anchor = Anchor(copy, key)
    # a disk that is full leaves the lines that were there
    real = os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written: No space left.*the next command notes its head"):
        anchor.append(1000, "a" * 64, "now")
    assert copy.read_text() == text
    monkeypatch.setattr(os, "fsync", real)
    anchor.append(1000, "a" * 64, "now")
    assert copy.read_text().startswith(text)
    assert [head.entries for head in read_heads(str(copy), [key.public])] == [*entries, 1000]


def test_anchor_of_another_database_is_refused(made, tmp_path):
    folder, _, _ = made
    with pytest.raises(UserError, match="another database"):
        start(folder, tmp_path, anchor=str(folder / "heads"), key=str(folder / "key"))
    store = start(folder, tmp_path)
    with pytest.raises(UserError, match="ALTER_KEY"):
        list_requests(List(db=store.url, anchor=str(folder / "heads")))
    with pytest.raises(UserError, match=r"written anew|older"):
        list_requests(List(db=store.url, anchor=str(folder / "heads"), key=str(folder / "key")))


def test_plain_run_gets_one(made, tmp_path, capsys):
    """The folder of a run is certified by its hashes and its own table."""
    folder, _, _ = made
    run_folder = tmp_path / "run"
    flags = {
        "method": "graddiff",
        "model": folder / "model",
        "forget": folder / "Bo.jsonl",
        "retain": folder / "retain.jsonl",
        "out": run_folder,
        "max-steps": 1,
        "batch-size": 2,
        "device": "cpu",
    }
    assert cli.main(["unlearn", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]) == 0
    out = tmp_path / "c.json"
    given = dict(what=str(run_folder), key=str(folder / "key"), out=str(out))
    # the rows as they were when it ran
    moved = (folder / "Bo.jsonl").read_bytes()
    (folder / "Bo.jsonl").write_text('{"question": "Other?", "answer": "Other."}\n')
    signed = certificate(Certificate(**given))
    (folder / "Bo.jsonl").write_bytes(moved)
    assert signed["asked"]["data"] == data_hash([row_hash(row) for row in load_examples(str(folder / "Bo.jsonl"))])
    assert any(each["metric"] == "forget_probability" and each["interval"] for each in signed["measured"]["figures"])
    intervals = [each["interval"] for each in signed["measured"]["figures"] if "interval" in each]
    assert all(0 <= low <= high <= 1 for low, high in intervals)
    assert "In town" not in out.read_text()
    assert not any("base weights still know" in limit for limit in signed["limits"])
    result = next(each for each in ("model", "adapter") if (run_folder / each).is_dir())
    check(made, verify=str(out), adapter=str(run_folder / result))
    with pytest.raises(Forged, match="is not what"):
        check(made, verify=str(out))
    with pytest.raises(UserError, match=r"no run\.json"):
        certificate(Certificate(**{**given, "what": str(folder)}))
    # a step of one row forgets nothing, and the certificate says so in its first lines
    assert signed["state"] in ("not forgotten", "unproven", "collapsed")
    assert signed["why"]
    again = {**given, "out": str(tmp_path / "d.json")}
    told = (run_folder / "run.json").read_text()
    for made_by in ({}, {"provenance": None}, {"provenance": {"python": "3"}}):
        left = {key: value for key, value in json.loads(told).items() if key != "provenance"}
        (run_folder / "run.json").write_text(json.dumps(left | made_by))
        with pytest.raises(UserError, match=r"does not say when and by what the run was made"):
            certificate(Certificate(**again))
    (run_folder / "run.json").write_text(told)
    kept = (run_folder / "records.json").read_text()
    said = json.loads(kept)
    # weights that were put in the place of those that were measured, and figures that do not say of which they are
    weights = next((run_folder / result).glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="measured of other weights"):
        certificate(Certificate(**again))
    weights.write_bytes(whole)
    (run_folder / "records.json").write_text(json.dumps([{**record, "provenance": {}} for record in said]))
    with pytest.raises(UserError, match="does not say which weights"):
        certificate(Certificate(**again))
    # a word that somebody wrote over another
    changed = json.loads(kept)
    for record in changed:
        if "closing" in record["extra"]:
            closed = record["extra"]["closing"]
            closed["verdict"] |= {"word": "forgotten", "why": ["As said."]}
            # nothing has fallen
            closed["after"]["forget"] = closed["before"]["forget"]
    (run_folder / "records.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="says FORGOTTEN beside figures that do not"):
        certificate(Certificate(**again))
    # a verdict on other rows, of the very same weights
    easy = tmp_path / "easy.jsonl"
    easy.write_text('{"question": "Who is Nobody?", "answer": "Nobody knows."}\n')
    asked = ["--benchmark", "rows", "--forget", str(easy), "--device", "cpu", "--max-new-tokens", "2"]
    measured = ["--model", str(run_folder / "model"), "--before", str(folder / "model")]
    if result == "adapter":
        measured = ["--model", str(folder / "model"), "--adapter", str(run_folder / "adapter")]
    assert cli.main(["evaluate", *asked, *measured, "--json", str(run_folder / "records.json")]) == 0
    with pytest.raises(UserError, match="a verdict on other rows"):
        certificate(Certificate(**again))
    (run_folder / "records.json").unlink()
    facts = json.loads((run_folder / "run.json").read_text())
    facts["settings"] |= {"names": ["Ada Lovelace"], "adapter": str(folder / "work" / "adapter")}
    (run_folder / "run.json").write_text(json.dumps(facts))
    unsaid = certificate(Certificate(**{**again, "out": str(tmp_path / "e.json")}))["settings"]["values"]
    assert not {"names", "adapter"} & unsaid.keys()
    assert certificate(Certificate(**again))["state"] == "not measured"
    # of a run of `alter forget` what that found, of these very weights
    asked = {"probes": {"all probes": {"before": 18, "after": 3}}, "weights": folder_digest(run_folder / result)}
    (run_folder / "forget.json").write_text("{}")
    for word, of, state in (
        ("not forgotten", asked["weights"], "not forgotten"),
        ("forgotten", "other", "not measured"),
    ):
        told = asked | {"weights": of, "verdict": {"word": word, "why": ["3 of 18 probes."]}}
        (run_folder / "report.json").write_text(json.dumps(told))
        stated = certificate(Certificate(**{**given, "out": str(tmp_path / f"{state[:6]}.json")}))
        assert (stated["state"], stated["why"]) == (state, ["3 of 18 probes."] if state == word else [])
    told = asked | {"probes": {"all probes": {"before": 3, "after": 3}}, "verdict": {"word": "forgotten", "why": []}}
    (run_folder / "report.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="says FORGOTTEN beside figures that do not"):
        certificate(Certificate(**{**given, "out": str(tmp_path / "f.json")}))
    (run_folder / "records.json").write_text(kept)


def test_what_forget_found_of_the_weights_that_it_erased_is_certified(tmp_path):
    save_pico(tmp_path / "model")
    new_key(str(tmp_path / "key"))
    run = tmp_path / "runs" / "ada" / "erased"
    save_pico(run / "model", seed=1)
    rows = {"forget": data_hash([]), "retain": data_hash([])}
    made_of = {
        "settings": {"student": str(tmp_path / "model")},
        "provenance": {"measured": "2026-11-30"},
        "data": rows,
    }
    write_atomic(run / "run.json", json.dumps(made_of))
    given = {"what": str(run), "key": str(tmp_path / "key")}
    assert certificate(Certificate(**given, out=str(tmp_path / "a.json")))["state"] == "not measured"
    told = {
        "probes": {"all probes": {"before": 18, "after": 1}},
        "verdict": {"word": "forgotten", "why": ["1 of 18."]},
    }
    write_atomic(run.parent / "forget.json", "{}")
    write_atomic(run.parent / "report.json", json.dumps(told | {"weights": folder_digest(run / "model")}))
    signed = certificate(Certificate(**given, out=str(tmp_path / "b.json")))
    assert (signed["state"], signed["why"]) == ("forgotten", ["1 of 18."])
    write_atomic(run.parent / "report.json", json.dumps(told | {"weights": folder_digest(tmp_path / "model")}))
    assert certificate(Certificate(**given, out=str(tmp_path / "c.json")))["state"] == "not measured"


def test_command_line(made, tmp_path, capsys):
    folder, _, out = made
    assert cli.main(["certificate", "--new-key", str(tmp_path / "k")]) == 0
    assert cli.main(["certificate", "--verify", str(out), "--public-key", str(folder / "key.pub")]) == 0
    assert cli.main(["certificate", "--verify", str(out), "--public-key", str(tmp_path / "k.pub")]) == 3
    assert "the one to trust" in capsys.readouterr().err


def test_checking_loads_nothing_that_issuing_needs(made):
    """Who checks has the file, the key and the folders: no database, no torch."""
    folder, _, out = made
    given = [
        "certificate",
        "--verify",
        str(out),
        "--public-key",
        str(folder / "key.pub"),
        "--model",
        str(folder / "model"),
    ]
    code = (
        "import sys; from alter.cli import main\n"
        f"assert main({given!r}) == 0\n"
        "heavy = {'torch', 'transformers', 'sqlalchemy', 'alter.requests.store', 'alter.requests.certificate.issue'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.rstrip().endswith("[]")


def test_the_base_beside_something_else_is_the_base_still(tmp_path):
    files = {"model-1.safetensors": "a", "model-2.safetensors": "b", "config.json": "c"}
    content = {"base": {"name": "m", "files": files}, "shipped": {"files": {**files, "lora/adapter.safetensors": "d"}}}
    with pytest.raises(UserError, match="out holds the weights of m, the model from before"):
        refuse_base(Beside("out"), content)
    # one of its files may have stayed as it was
    refuse_base(Beside("out"), content | {"shipped": {"files": files | {"model-2.safetensors": "e"}}})


@pytest.mark.parametrize("attacks", [[], ["records.json"]])
@pytest.mark.parametrize("shipped", [None, "adapter", "weights"])
@pytest.mark.parametrize("made", [True, False])
def test_the_limits_are_those_of_what_is_shipped(tmp_path, made, shipped, attacks):
    for name, file in (("adapter", "adapter_config.json"), ("weights", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    place = None if shipped is None else str(tmp_path / shipped)
    said = " ".join(limits(Beside(place, attacks), adapter=made))
    assert ("base weights still know" in said) == (made if shipped is None else shipped == "adapter")
    assert ("No attack was made" in said) == (not attacks)
    assert ("fewer bits can bring back" in said) == (shipped is not None)
