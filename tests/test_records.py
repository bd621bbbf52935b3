"""Provenance of records, digests of folders, and the cache: the same result once, and never another model's number."""

import json
import math
import os
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from alter import AlterConfig
from alter.core.errors import UserError
from alter.data.sources import read_rows
from alter.evaluation import run as evaluation
from alter.evaluation.run import evaluate
from alter.evaluation.tofu import benchmark, measuring, replies
from alter.storage import cache, files, provenance, records
from alter.storage.cache import Cached, recall, remember
from alter.storage.records import Record, read_records, write_records
from pico import byte_tokenizer, write_jsonl
from pico import pico as make_pico


def pico(seed=0):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return make_pico(seed, **sizes, max_position_embeddings=2048, initializer_range=0.5)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(replies, "MAX_NEW_TOKENS", 4)
    pico().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    old(tmp_path / "model")
    return tmp_path


def old(folder):
    """Make files old enough for the memo of digests, which does not trust what was written a moment ago."""
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))


def settings(folder, **more):
    given = {"model": str(folder / "model"), "split": "forget01", "limit": 2, "device": "cpu", "batch_size": 4}
    return benchmark.TofuEvaluation(**given | more)


@pytest.fixture
def measured(monkeypatch):
    """How often a model was measured."""
    count = []
    original = benchmark.TofuEvaluation.measure
    monkeypatch.setattr(benchmark.TofuEvaluation, "measure", lambda *a: count.append(1) or original(*a))
    return count


# ---- the cache


def test_the_same_evaluation_is_measured_once(folder, measured, capsys):
    first = evaluate(settings(folder))
    said = capsys.readouterr().err
    assert "`retain_records` retrained.json" in said
    assert "A result of" not in said
    second = evaluate(settings(folder))
    assert len(measured) == 1
    assert second == first
    said = capsys.readouterr().err
    assert f"A result of {first[0].provenance['measured']}, of the same model, data, settings and code" in said
    assert "`cache` off" in said
    assert "`retain_records` retrained.json" in said
    # what changes no number finds the same result; only the name is the one asked for
    (folder / "model").rename(folder / "moved")
    other = evaluate(
        settings(folder, model=str(folder / "moved"), name="mine", batch_size=1, json_path=str(folder / "r.json"))
    )
    assert len(measured) == 1
    assert {record.model for record in other} == {"mine"}
    assert [record.value for record in other] == [record.value for record in first]
    assert read_records(folder / "r.json") == other


def change_a_weight(folder):
    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})


def change_the_tokenizer(folder):
    path = folder / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"note": "other"}))


@pytest.mark.parametrize("change", [change_a_weight, change_the_tokenizer])
def test_another_content_of_the_same_folder_misses(folder, measured, change):
    evaluate(settings(folder))
    change(folder)
    old(folder / "model")
    evaluate(settings(folder))
    assert len(measured) == 2


@pytest.mark.parametrize(
    "more", [{"seed": 1}, {"limit": 3}, {"mode": "compat"}, {"split": "forget05"}, {"dtype": "bfloat16"}]
)
def test_another_setting_misses(folder, measured, more):
    evaluate(settings(folder))
    evaluate(settings(folder, **more))
    assert len(measured) == 2


@pytest.mark.parametrize("name", ["VERSION", "code_digest", "versions"])
def test_another_version_misses(folder, measured, monkeypatch, name):
    evaluate(settings(folder))
    other = {"VERSION": 99, "code_digest": lambda: "other", "versions": lambda: {"torch": "0.1"}}[name]
    monkeypatch.setattr(evaluation, name, other)
    evaluate(settings(folder))
    assert len(measured) == 2


def test_another_kind_of_device_misses(folder, measured, monkeypatch):
    evaluate(settings(folder))
    monkeypatch.setattr(benchmark.TofuEvaluation, "place", lambda self: "cuda NVIDIA H100")
    evaluate(settings(folder))
    assert len(measured) == 2


def test_another_data_row_misses(folder, measured):
    for name in ("forget01", "retain", "real_authors", "world_facts"):
        write_jsonl(folder / f"{name}_perturbed.json", read_rows(f"builtin:{name}_perturbed")[:3])
    given = settings(folder, data=str(folder), limit=None)
    evaluate(given)
    evaluate(given)
    assert len(measured) == 1
    rows = read_rows(str(folder / "world_facts_perturbed.json"))
    rows[1]["perturbed_answer"][0] += "."
    write_jsonl(folder / "world_facts_perturbed.json", rows)
    evaluate(given)
    assert len(measured) == 2
    holdout = write_jsonl(folder / "unseen.jsonl", [{"question": "Who?", "answer": "Nobody."}] * 2)
    with_holdout = given.model_copy(update={"holdout": str(holdout)})
    evaluate(with_holdout)
    write_jsonl(folder / "unseen.jsonl", [{"question": "Who?", "answer": "Somebody."}] * 2)
    evaluate(with_holdout)
    assert len(measured) == 4


def test_another_adapter_misses(folder, measured):
    from peft import get_peft_model

    for seed in (1, 2):
        model = get_peft_model(pico(), AlterConfig(num_forget_experts=2, r=2, task_type="CAUSAL_LM"))
        torch.manual_seed(seed)
        for name, weight in model.named_parameters():
            if "alter_" in name:
                torch.nn.init.normal_(weight, std=0.2)
        model.save_pretrained(folder / "adapter")
        old(folder / "adapter")
        found = evaluate(settings(folder, adapter=str(folder / "adapter")))
        assert {record.model for record in found} == {"unlearned"}
    evaluate(settings(folder))
    assert len(measured) == 3
    evaluate(settings(folder, adapter=str(folder / "adapter")))
    assert len(measured) == 3


def test_another_retrained_model_misses(folder, measured):
    pico(1).save_pretrained(folder / "retrained")
    byte_tokenizer().save_pretrained(folder / "retrained")
    given = settings(folder, retain_records=str(folder / "retrained"))
    evaluate(given)
    pico(2).save_pretrained(folder / "retrained")
    evaluate(given)
    assert len(measured) == 2
    path = folder / "retrained.json"
    for seed in (3, 4):
        write_records(path, measuring.tofu_metrics(
            pico(seed), byte_tokenizer(), "forget01", which=("likelihood",), limit=2, progress=False
        ).records("retrained"))  # fmt: skip
        evaluate(settings(folder, retain_records=str(path)))
    assert len(measured) == 4


def test_files_that_change_while_they_are_measured_are_not_kept(folder, monkeypatch, measured, capsys):
    original = benchmark.TofuEvaluation.load

    def load(self):
        found = original(self)
        change_a_weight(folder)
        return found

    path = folder / "model" / "model.safetensors"
    before = path.read_bytes()
    monkeypatch.setattr(benchmark.TofuEvaluation, "load", load)
    (first, *_) = evaluate(settings(folder))
    assert first.provenance["weights"] == "unknown"
    assert "changed while it was measured" in capsys.readouterr().err
    monkeypatch.setattr(benchmark.TofuEvaluation, "load", original)
    path.write_bytes(before)
    evaluate(settings(folder))
    assert len(measured) == 2


def test_off_and_another_folder(folder, measured, monkeypatch):
    evaluate(settings(folder))
    evaluate(settings(folder, cache="off"))
    evaluate(settings(folder, cache=str(folder / "kept")))
    assert len(measured) == 3
    assert len(list((folder / "kept" / "results").iterdir())) == 1
    monkeypatch.setenv("ALTER_CACHE", "off")
    evaluate(settings(folder))
    assert len(measured) == 4
    monkeypatch.delenv("ALTER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "xdg"))
    assert cache.cache_folder() == folder / "xdg" / "alter"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(folder))
    assert cache.cache_folder() == folder / ".cache" / "alter"
    assert cache.cache_folder("~/x") == folder / "x"


def test_what_cannot_be_known_by_its_contents_is_not_cached(folder, measured, monkeypatch):
    monkeypatch.setattr(benchmark.TofuEvaluation, "data_digest", lambda self: None)
    evaluate(settings(folder))
    evaluate(settings(folder))
    assert len(measured) == 2
    monkeypatch.undo()

    def refuse(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    given = benchmark.TofuEvaluation(model="some/model")
    assert given.identity() == {"weights": "unknown", "adapter": None}
    assert evaluation.cache_key(given, given.identity(), "data") is None
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: f"/hub/snapshots/abc123/{file}")
    assert given.identity() == {"weights": "some/model@abc123", "adapter": None}


RESULT = Cached([Record("m", "x", 0.5, 2, per_item=[0.25, math.nan], extra={"a": [1, None]})], ["note"], "m")
KEY = {"a": 1, "b": ["x", None], "c": {"d": 0.1}}


def test_recall_gives_back_what_was_remembered(tmp_path):
    assert recall(tmp_path, KEY) is None
    remember(tmp_path, KEY, RESULT)
    found = recall(tmp_path, KEY)
    assert (found.notes, found.subject) == (["note"], "m")
    assert (tmp_path / "results").stat().st_mode & 0o077 == 0
    assert found.records[0].per_item[0] == 0.25
    assert math.isnan(found.records[0].per_item[1])
    assert recall(tmp_path, KEY | {"a": 2}) is None


def broken(text):
    return text[: len(text) // 2]


def edited(text):
    return text.replace('"value": 0.5', '"value": 0.7')


def emptied(text):
    return "[]"


def of_another_key(text):
    return text.replace('"a": 1, "b"', '"a": 7, "b"')


@pytest.mark.parametrize("spoil", [broken, edited, emptied, of_another_key])
def test_a_spoilt_file_is_measured_again_and_said(tmp_path, capsys, spoil):
    remember(tmp_path, KEY, RESULT)
    (path,) = (tmp_path / "results").iterdir()
    text = path.read_text()
    assert spoil(text) != text
    path.write_text(spoil(text))
    assert recall(tmp_path, KEY) is None
    assert "cannot be used" in capsys.readouterr().err
    remember(tmp_path, KEY, RESULT)
    assert recall(tmp_path, KEY) is not None


def test_a_spoilt_cache_never_stops_an_evaluation(folder, measured, capsys, tmp_path_factory):
    first = evaluate(settings(folder, cache=str(folder / "kept")))
    (path,) = (folder / "kept" / "results").iterdir()
    path.write_bytes(b"\xff\x00 no json")
    (folder / "kept" / "digests.json").write_text("[1")
    again = evaluate(settings(folder, cache=str(folder / "kept")))
    assert len(measured) == 2
    assert [r.value for r in again] == [r.value for r in first]
    (folder / "file").write_text("")
    evaluate(settings(folder, cache=str(folder / "file")))
    assert "cannot be" in capsys.readouterr().err


# ---- digests of folders


def test_the_memo_of_digests_sees_every_change(tmp_path, monkeypatch):
    model, memo = tmp_path / "model", tmp_path / "memo"
    model.mkdir()
    path = model / "w.safetensors"
    path.write_bytes(b"aaaa")
    (model / "optimizer.pt").write_bytes(b"not read")
    read = []
    original = files.file_digest
    monkeypatch.setattr(files, "file_digest", lambda path: read.append(path) or original(path))
    now = 10**20
    monkeypatch.setattr(files.time, "time_ns", lambda: now)
    first = files.folder_digest(model, memo)
    assert files.folder_digest(model, memo) == first == files.folder_digest(model)
    assert len(read) == 2
    state = path.stat()
    path.write_bytes(b"bbbb")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_mtime_ns == state.st_mtime_ns
    changed = files.folder_digest(model, memo)
    assert changed != first
    path.rename(model / "v.safetensors")
    assert files.folder_digest(model, memo) not in (first, changed)
    # a file written a moment ago is read each time
    path.write_bytes(b"cccc")
    monkeypatch.undo()
    monkeypatch.setattr(files, "file_digest", lambda path: read.append(path) or original(path))
    read.clear()
    for _ in range(2):
        files.folder_digest(model, tmp_path / "memo2")
    assert read.count(path) == 2


# ---- provenance


def test_records_say_where_they_come_from(folder):
    found = evaluate(settings(folder, json_path=str(folder / "r.json")))
    made = read_records(folder / "r.json")[0].provenance
    assert made == found[0].provenance
    assert all(record.provenance == made for record in found)
    assert made["settings"]["split"] == "forget01"
    assert made["settings"]["limit"] == 2
    assert (made["seed"], made["dtype"], made["adapter"]) == (0, "float32", None)
    assert made["weights"] == files.folder_digest(folder / "model")
    assert made["data"] == settings(folder).data_digest()
    assert made["device"].startswith("cpu")
    assert made["versions"]["torch"] == torch.__version__
    assert set(made) >= {"measured", "alter", "commit", "python", "machine", "metrics_version"}


def test_the_commit_is_that_of_this_package_or_none(tmp_path, monkeypatch):
    assert provenance.commit() is None or len(provenance.commit().rstrip("+")) >= 7
    # installed inside another project's working tree
    package = tmp_path / "lib" / "alter"
    package.mkdir(parents=True)
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "storage" / "provenance.py"))
    assert provenance.commit() is None
    source = tmp_path / "src" / "alter"
    source.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(source / "storage" / "provenance.py"))
    assert len(provenance.commit()) >= 7
    assert not provenance.commit().endswith("+")
    (source / "x.py").touch()
    assert provenance.commit().endswith("+")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() is None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"version": 99}, f"holds metrics of version 99, this is version {records.VERSION}"),
        ({"version": None}, "holds metrics of no version"),
        ({"speed": 3}, "unknown or no 'speed'"),
        ({"per_item": None, "value": ...}, "unknown or no 'value'"),
    ],
)
def test_records_of_another_kind_are_refused_by_name(tmp_path, row, said):
    path = tmp_path / "old.json"
    write_records(path, [Record("m", "x", 0.5, 2)])
    whole = json.loads(path.read_text())[0] | row
    path.write_text(json.dumps([{name: value for name, value in whole.items() if value is not ...}]))
    with pytest.raises(UserError, match=said) as error:
        read_records(path)
    assert "old.json" in str(error.value)


def test_nan_items_come_back_as_nan(tmp_path):
    write_records(tmp_path / "r.json", [Record("m", "x", 0.5, 2, per_item=[1.0, math.nan])])
    (found,) = read_records(tmp_path / "r.json")
    assert found.per_item[0] == 1.0
    assert math.isnan(found.per_item[1])


def test_records_are_for_their_owner_alone(tmp_path):
    write_records(tmp_path / "r.json", [Record("x", "forget_rouge", 1.0, 1, extra={"generations": ["Ilse"]})])
    assert (tmp_path / "r.json").stat().st_mode & 0o777 == 0o600


def test_a_digest_is_also_of_what_links_lead_to(tmp_path):
    """Weights behind a link to a folder are loaded like others: they are part of what is loaded."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "elsewhere" / "adapter_model.safetensors").write_bytes(b"one")
    (tmp_path / "model" / "lora").symlink_to(tmp_path / "elsewhere")
    # round in a circle
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "model")
    before = files.folder_digest(tmp_path / "model")
    (tmp_path / "elsewhere" / "adapter_model.safetensors").write_bytes(b"two")
    assert files.folder_digest(tmp_path / "model") != before
