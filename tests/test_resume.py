"""What a run leaves in its folder, and that it goes on with nothing but what it was begun with."""

import json
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from alter.core.errors import UserError
from alter.data.encoding import encode
from alter.groundwork import frozen
from alter.models.loading import load_model
from alter.storage.files import to_csv
from alter.storage.running import check_free, claim
from alter.storage.tensors import keep, kept
from alter.training import data as training_data
from alter.training import folder, loss
from alter.training import run as training_run
from alter.training.run import unlearn
from alter.training.settings import Unlearn
from pico import pico, run_on, save_pico, write_jsonl, write_people


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    made = write_people(tmp_path_factory.mktemp("data"), ["Ada", "Bo"], 4, 8)
    save_pico(made / "model")
    return made


COMMON = {
    "adapter": {"r": 4, "entropy_quantile": 0.5},
    "router_fit": {"method": "logistic", "background": False, "rewordings": 0, "false_alarms": None, "steps": 20},
    "objective": {"kind": "without_truth"},
    "epochs": 2,
    "batch_size": 4,
    "save_steps": 1,
}


def settings(data, out, **changes):
    return Unlearn.model_validate({**run_on(data, out), **COMMON, **changes})


class Stop(Exception):
    """The end of a run that is cut off."""


def cut(data, out, monkeypatch, step=3, **changes):
    """A run that ends before its last step, as by a kill."""
    real = loss.UnlearnTrainer.compute_loss

    def stops(self, *args, **kwargs):
        if self.state.global_step == step:
            raise Stop
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loss.UnlearnTrainer, "compute_loss", stops)
        with pytest.raises(Stop):
            unlearn(settings(data, out, **changes))
    return out


@pytest.fixture(scope="module")
def broken(data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return cut(data, tmp_path_factory.mktemp("broken") / "run", patch)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    return unlearn(settings(data, tmp_path_factory.mktemp("straight") / "run"))


def weights(out):
    return load_file(str(out / "adapter" / "adapter_model.safetensors"))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def rows(path, change):
    """The rows of a file with something changed in the last one, written elsewhere."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [*found[:-1], found[-1] | change]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"epochs": 3}, "epochs was 2.0 and is 3.0"),
        ({"objective": {"kind": "gradient_ascent"}}, "objective.kind was 'without_truth' and is 'gradient_ascent'"),
        ({"max_length": 64}, "max_length was None and is 64"),
    ],
    ids=str,
)
def test_other_settings_are_refused_and_nothing_is_changed(data, broken, changes, says):
    before = {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()}
    with pytest.raises(folder.OtherInputs, match=says):
        unlearn(settings(data, broken, resume=True, **changes))
    assert {path: path.read_bytes() for path in broken.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("which", ["forget", "retain"])
@pytest.mark.parametrize("change", [{"answer": "In Rome."}, {"who": "Cy"}])
def test_other_rows_are_refused(data, broken, tmp_path, which, change):
    other = write_jsonl(tmp_path / "other.jsonl", rows(data / f"{which}.jsonl", change))
    with pytest.raises(folder.OtherInputs, match=rf"other {which} rows"):
        unlearn(settings(data, broken, resume=True, **{which: str(other)}))


def test_another_base_is_refused_and_one_that_was_moved_is_not(data, straight, tmp_path, monkeypatch):
    out = cut(data, tmp_path / "run", monkeypatch)
    pico(1).save_pretrained(tmp_path / "other")
    for file in (data / "model").glob("*token*"):
        shutil.copy(file, tmp_path / "other")
    with pytest.raises(folder.OtherInputs, match="other base model"):
        unlearn(settings(data, out, resume=True, model=str(tmp_path / "other")))
    shutil.copytree(data / "model", tmp_path / "moved")
    shutil.copy(data / "forget.jsonl", tmp_path / "renamed.jsonl")
    moved = {"model": str(tmp_path / "moved"), "forget": str(tmp_path / "renamed.jsonl"), "save_steps": 7}
    assert equal(weights(unlearn(settings(data, out, resume=True, **moved))), weights(straight))


def test_clusters_go_by_the_models_states_and_a_resumed_run_keeps_them(data, tmp_path, monkeypatch):
    blind = {"domain_column": None, "num_forget_experts": 2}
    seen = []
    real = training_data.domains

    def watched(rows, *, states=None, **kwargs):
        seen.append((rows, states))
        return real(rows, states=states, **kwargs)

    monkeypatch.setattr(training_data, "domains", watched)
    out = cut(data, tmp_path / "run", monkeypatch, **blind)
    (rows, none), (_, states) = seen
    assert none is None
    model, tokenizer = load_model(str(data / "model"), device="cpu")
    for row, state in zip(rows, states, strict=True):
        ids = torch.tensor([encode(tokenizer, row).input_ids])
        with torch.no_grad():
            last = model(ids, output_hidden_states=True).hidden_states[-1][0].double()
        np.testing.assert_allclose(state, last.mean(0).numpy(), rtol=1e-4, atol=1e-5)
    whole = unlearn(settings(data, tmp_path / "whole", **blind))
    # what parts the rows otherwise on another machine must not be trained on
    monkeypatch.setattr(training_data, "by_meaning", lambda run, data, *_: replace(data, domain=data.domain[::-1]))
    monkeypatch.setattr(training_run, "by_meaning", training_data.by_meaning)
    with pytest.raises(folder.OtherInputs, match="other sub-domains"):
        unlearn(settings(data, out, resume=True, **blind))
    monkeypatch.undo()
    assert equal(weights(unlearn(settings(data, out, resume=True, **blind))), weights(whole))


def test_rows_with_labels_or_without_experts_are_not_looked_at(data, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a pass over the rows that nobody needs")

    monkeypatch.setattr(training_data, "hidden_states", never)
    unlearn(settings(data, tmp_path / "labelled", max_steps=1))
    unlearn(settings(data, tmp_path / "one", max_steps=1, domain_column=None, num_forget_experts=1))
    plain = Unlearn.model_validate(
        {**run_on(data, tmp_path / "lora"), "adapter": {"kind": "lora", "r": 2}, "domain_column": None, "max_steps": 1}
        | {"objective": {"kind": "gradient_ascent"}}
    )
    unlearn(plain)


def test_checkpoints_of_unknown_origin_are_refused(data, broken, tmp_path):
    out = shutil.copytree(broken, tmp_path / "run")
    (out / "inputs.json").write_text("{")
    with pytest.raises(folder.OtherInputs, match="is broken"):
        unlearn(settings(data, out, resume=True))
    (out / "inputs.json").unlink()
    with pytest.raises(folder.OtherInputs, match="nobody knows what they were made from"):
        unlearn(settings(data, out, resume=True))


def flip(path, place=-100):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_passed_over_and_said(broken, tmp_path, capsys, file, how):
    checkpoints = shutil.copytree(broken / "checkpoints", tmp_path / "checkpoints")
    newest, before = checkpoints / "checkpoint-3", checkpoints / "checkpoint-2"
    assert folder.last_whole_checkpoint(checkpoints) == newest
    if how == "flipped":
        flip(newest / file)
    elif how == "cut":
        (newest / file).write_bytes((newest / file).read_bytes()[:-1])
    else:
        (newest / file).unlink()
    assert folder.last_whole_checkpoint(checkpoints) == before
    told = " ".join(capsys.readouterr().err.split())
    assert f"checkpoint-3 is damaged ({file} is {'missing' if how == 'gone' else 'not what was written'})" in told
    (before / "whole.json").unlink()
    assert folder.last_whole_checkpoint(checkpoints) is None


def test_a_run_goes_on_from_the_checkpoint_before_with_a_damaged_frozen_pass(
    data, broken, straight, tmp_path, capsys, monkeypatch
):
    out = shutil.copytree(broken, tmp_path / "run")
    flip(out / "checkpoints" / "checkpoint-3" / "adapter_model.safetensors")
    flip(out / "frozen.safetensors")
    calls = []
    real = frozen.trace_rows
    monkeypatch.setattr(frozen, "trace_rows", lambda *a, **k: calls.append(1) or real(*a, **k))
    assert equal(weights(unlearn(settings(data, out, resume=True))), weights(straight))
    assert calls
    told = " ".join(capsys.readouterr().err.split())
    assert "frozen.safetensors is not what was written to it: it is made again" in told


@pytest.mark.parametrize("how", ["flipped", "header", "cut", "empty", "key"])
def test_kept_tensors_are_what_was_written_or_none(tmp_path, how, capsys):
    tensors = {"a": torch.arange(60).reshape(3, 20), "b": torch.tensor(1.5).bfloat16(), "c": torch.zeros(0, 4)}
    file = tmp_path / "t.safetensors"
    keep(file, tensors, "key", note="x")
    found = kept(file, "key")
    assert equal(found[0], tensors)
    assert found[1]["note"] == "x"
    assert file.stat().st_mode & 0o777 == 0o600
    if how == "flipped":
        flip(file, -9)
    elif how == "header":
        flip(file, 12)
    elif how in ("cut", "empty"):
        file.write_bytes(file.read_bytes()[: 0 if how == "empty" else -3])
    assert kept(file, "other" if how == "key" else "key") is None
    assert ("made again" in " ".join(capsys.readouterr().err.split())) == (how != "key")


def test_an_ended_run_leaves_nothing_that_rows_can_be_read_from(data, straight, broken):
    assert (broken / "frozen.safetensors").stat().st_mode & 0o777 == 0o600
    assert (broken / "checkpoints").stat().st_mode & 0o777 == 0o700
    whole = load_file(str(broken / "frozen.safetensors"))
    # what the answers can be read from: the likeliest tokens at each labelled position
    assert "ids" in whole
    left = load_file(str(straight / "frozen.safetensors"))
    assert sorted(left) == ["entropy", "entropy.count", "forget_rows", "gates", "gates.count", "rows"]
    assert int(left["forget_rows"]) == 8
    assert equal({name: left[name] for name in ("entropy", "gates")}, {n: whole[n] for n in ("entropy", "gates")})
    with safe_open(str(straight / "frozen.safetensors"), "pt") as file:
        assert set(file.metadata()) == {"key", "digest"}
    names = {path.name for path in straight.iterdir()}
    assert names == {"adapter", "frozen.safetensors", "inputs.json", "run.json", "run.yaml"}
    for path in straight.rglob("*"):
        if path.suffix in (".json", ".md", ".yaml"):
            assert "In town" not in path.read_text()


def test_a_run_that_has_ended_has_nothing_to_go_on_with(data, straight, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("alter.training.loaded.load_model", None)
    before = weights(straight)
    assert unlearn(settings(data, straight, resume=True)) == straight
    assert "is finished" in capsys.readouterr().err
    assert equal(weights(straight), before)
    with pytest.raises(folder.OtherInputs, match="seed was 0 and is 1"):
        unlearn(settings(data, straight, resume=True, seed=1))


def test_working_files_are_kept_where_asked_for(data, tmp_path):
    out = unlearn(settings(data, tmp_path / "run", keep_working=True, max_steps=1))
    assert folder.last_whole_checkpoint(out / "checkpoints").name == "checkpoint-1"
    assert "ids" in load_file(str(out / "frozen.safetensors"))


def test_nothing_to_resume(data, tmp_path):
    with pytest.raises(UserError, match="Nothing to resume"):
        unlearn(settings(data, tmp_path / "none", resume=True))


@pytest.mark.parametrize(
    "changes",
    [{"model": "no/such-model"}, {"adapter": {"r": 4, "target_modules": ["nowhere"]}}, {"max_length": 8}],
    ids=str,
)
def test_a_mistake_leaves_no_folder_and_deletes_none(data, straight, tmp_path, changes):
    with pytest.raises(UserError):
        unlearn(settings(data, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
    out = shutil.copytree(straight, tmp_path / "earlier")
    with pytest.raises(UserError):
        unlearn(settings(data, out, overwrite=True, **changes))
    assert equal(weights(out), weights(straight))


def test_experts_bear_no_words_of_the_rows_unless_asked(data, tmp_path):
    named = {}
    for asked in (False, True):
        out = unlearn(settings(data, tmp_path / str(asked), domain_column=None, max_steps=1, name_clusters=asked))
        told = (out / "adapter" / "README.md").read_text()
        config = json.loads((out / "adapter" / "adapter_config.json").read_text())
        named[asked] = config["domains"]
        assert json.loads((out / "run.json").read_text())["domains"] == config["domains"]
        assert all(name in told for name in config["domains"])
    assert named[False] == [f"cluster {i}" for i in range(1, len(named[True]) + 1)]
    assert all("Ada" in name or "Bo" in name for name in named[True]), named
    # an adapter that grows goes on counting
    grown = unlearn(
        settings(
            data,
            tmp_path / "grown",
            domain_column=None,
            num_forget_experts=2,
            max_steps=1,
            adapter={},
            start_from=str(tmp_path / "False" / "adapter"),
        )
    )
    config = json.loads((grown / "adapter" / "adapter_config.json").read_text())
    assert config["domains"] == [f"cluster {i}" for i in range(1, len(named[False]) + 3)]


@pytest.fixture
def other():
    """Another process, which lives."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


def claimed(folder, process, **changes):
    folder.mkdir(exist_ok=True)
    own = {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time(), **changes}
    (folder / ".running").write_text(json.dumps(own))


@pytest.mark.parametrize("how", [{"overwrite": True}, {"resume": True}, {}], ids=str)
def test_a_folder_that_a_living_process_writes_to_is_left_alone(data, broken, straight, tmp_path, other, how):
    out = shutil.copytree(broken, tmp_path / "run")
    claimed(out, other)
    before = sorted(out.rglob("*"))
    with pytest.raises(UserError, match=f"Process {other.pid} is working in"):
        unlearn(settings(data, out, **how))
    assert sorted(out.rglob("*")) == before
    # another process got the number of a dead one
    claimed(out, other, started=other.create_time() - 100)
    if how:
        assert equal(weights(unlearn(settings(data, out, **how))), weights(straight))
        assert not (out / ".running").exists()


def test_claims_of_the_dead_are_void(tmp_path, other):
    claim(tmp_path)
    check_free(tmp_path)
    claimed(tmp_path, other)
    other.kill()
    other.wait()
    check_free(tmp_path)
    (tmp_path / ".running").write_text("[")
    check_free(tmp_path)


def test_a_spreadsheet_takes_no_cell_for_a_formula():
    lines = to_csv([["=1+1", "+x", "-2", "@a", "\tb", -2, -0.5, "a=b", None]])
    assert lines == "'=1+1,'+x,'-2,'@a,'\tb,-2,-0.5,a=b,\n"
