"""`alter distill`: naive twins of the divergence and the noise, runs on pico models, what loads where, what is refused."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback

from alter import api
from alter.core import console
from alter.core.errors import Finding, UserError
from alter.data.encoding import encode
from alter.data.rows import load_examples
from alter.distillation import rows as lessons
from alter.distillation import run as module
from alter.distillation import trainer
from alter.distillation.attacker import attacked
from alter.distillation.checks import check_teacher
from alter.distillation.naming import named_rows
from alter.distillation.noise import Noise, add_noise
from alter.distillation.rows import Lesson, LessonRow, lesson
from alter.distillation.run import distill
from alter.distillation.settings import Distill, Shares, completed
from alter.distillation.teacher import Teacher, kl_of_logits, part
from alter.distillation.trainer import passes_of, weights_of
from alter.logits.head import measuring
from alter.models.loading import ModelSettings, load_model
from alter.storage.records import Record, read_records, write_records
from alter.training import folder
from pico import PAD, byte_tokenizer, pico, save_pico, write_jsonl, write_people


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    save_pico(folder / "model")
    write_people(folder, ["Ada", "Bo"], 3, 6)
    write_jsonl(folder / "text.jsonl", [{"text": f"The wind is from the west on day {i}."} for i in range(4)])
    return folder


@pytest.fixture(scope="module")
def run(data):
    """An unlearning run with an adapter that says something else than its base."""
    out = data / "run"
    api.unlearn(
        str(data / "model"), forget=str(data / "forget.jsonl"), retain=str(data / "retain.jsonl"), out=out, device="cpu",
        num_forget_experts=1, max_steps=4, batch_size=3, learning_rate_experts=0.1, closing_rows=0,
        router_fit={"background": False, "rewordings": 0, "false_alarms": None},
        adapter={"kind": "alter", "r": 4, "entropy_threshold": 1.8},
    )  # fmt: skip
    return out


def settings(data, run, out, **changes):
    given = {
        "run": run and str(run), "out": str(out), "general": [str(data / "text.jsonl")], "max_steps": 2, "batch_size": 4,
        "precision": "fp32", "device": "cpu", "closing_rows": 0, "learning_rate": 1e-3, "log_steps": 1,
    }  # fmt: skip
    return Distill.model_validate(given | changes)


# ---- arithmetic


def test_divergence_is_its_naive_twin():
    torch.manual_seed(0)
    one, other = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    for p, q, found in zip(one.tolist(), other.tolist(), kl_of_logits(one, other).tolist(), strict=True):
        sums = [math.fsum(math.exp(v) for v in row) for row in (p, q)]
        naive = math.fsum(
            math.exp(a) / sums[0] * (math.log(math.exp(a) / sums[0]) - math.log(math.exp(b) / sums[1]))
            for a, b in zip(p, q, strict=True)
        )
        assert found == pytest.approx(naive, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("tied", "vectors"), [(False, True), (True, True), (True, False)])
def test_noise_is_its_naive_twin(tied, vectors):
    model, before = pico(tie_word_embeddings=tied), pico(tie_word_embeddings=tied)
    add_noise(model, Noise(alpha=0.4, beta=0.1, vectors=vectors), seed=3)
    draw = torch.Generator().manual_seed(3)
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        if new.dim() == 1:
            torch.testing.assert_close(new, 0.6 * old if vectors else old)
            continue
        bound = math.sqrt(6 / (old.shape[0] + old.shape[1]))
        noise = torch.rand(old.shape, generator=draw)
        for i, j in ((0, 0), (old.shape[0] - 1, 1)):
            wanted = 0.6 * old[i, j].item() + 0.4 * 0.1 * (2 * float(noise[i, j]) - 1) * bound
            assert new[i, j].item() == pytest.approx(wanted, rel=1e-5, abs=1e-7)


def test_without_alpha_nothing_changes():
    model = pico()
    add_noise(model, Noise(alpha=0, beta=0.1), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), pico().parameters(), strict=True))


def test_kinds_have_their_shares_of_the_loss():
    tokens = [10, 60, 30]
    weights = weights_of(Shares(forget=0.5, keep=0.3, general=0.2), tokens)
    counted = [weight * count for weight, count in zip(weights, tokens, strict=True)]
    assert [value / sum(counted) for value in counted] == pytest.approx([0.5, 0.3, 0.2])
    assert sum(counted) / sum(tokens) == pytest.approx(1)
    # what is missing leaves its share to the others
    assert weights_of(Shares(forget=0.5, keep=0.3, general=0.2), [0, 60, 30]) == pytest.approx([0, 0.9, 1.2])
    with pytest.raises(UserError, match="give a share"):
        weights_of(Shares(forget=1, keep=0, general=0), [0, 5, 5])
    with pytest.raises(ValueError, match="all shares are 0"):
        Shares(forget=0, keep=0, general=0)


def test_an_attacker_moves_the_weights_against_the_surprise_and_leaves_no_trace():
    model, twin = pico().double(), pico().double()
    ids, mask = torch.arange(12).reshape(2, 6) + 70, torch.ones(2, 6, dtype=torch.long)
    positions = torch.zeros(2, 6, dtype=torch.bool)
    positions[0, 2:5] = positions[1, 4] = True
    batch = {"input_ids": ids, "attention_mask": mask, "positions": positions}
    before = [weight.detach().clone() for weight in model.parameters()]
    for _ in range(2):
        log_p = torch.log_softmax(twin(input_ids=ids).logits.float(), -1)
        lost = -sum(log_p[r, t, ids[r, t + 1]] for r, t in ((0, 2), (0, 3), (0, 4), (1, 4))) / 4
        twin.zero_grad()
        lost.backward()
        with torch.no_grad():
            for weight in twin.parameters():
                weight -= 0.01 * weight.grad.sign()
    with attacked(model, iter([batch, batch]), 0.01):
        for weight, wanted in zip(model.parameters(), twin.parameters(), strict=True):
            # the sign of a gradient of next to nothing is chance
            assert ((weight - wanted).abs() < 1e-6).double().mean() > 0.99
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(weight.grad is None for weight in model.parameters())


def test_what_is_kept_of_the_teacher_gives_its_logits_and_the_mean_divergence(data, run):
    teacher, tokenizer = load_model(str(data / "model"), str(run / "adapter"), device="cpu")
    student = pico(seed=5)
    rows = [tokenizer(text)["input_ids"] for text in ("Where was Ada born, 1?", "In town 1Bo.", "It is so.")]
    counted = [4, 6, 3]
    one = Teacher(teacher, PAD)
    one.keep(rows, counted)
    assert one.kept is not None
    parts, wanted, ids = [], [], torch.full((3, 30), PAD)
    positions = torch.zeros(3, 30, dtype=torch.bool)
    mask = torch.zeros(3, 30, dtype=torch.long)
    for k, (row, count) in enumerate(zip(rows, counted, strict=True)):
        with torch.no_grad():
            alone = teacher(input_ids=torch.tensor([row])).logits[0, len(row) - 1 - count : -1]
            own = student(input_ids=torch.tensor([row])).logits[0, len(row) - 1 - count : -1]
        torch.testing.assert_close(one.logits(one.kept[k]), alone, rtol=1e-4, atol=1e-4)
        wanted += kl_of_logits(alone, own).tolist()
        ids[k, : len(row)], mask[k, : len(row)] = torch.tensor(row), 1
        positions[k, len(row) - 1 - count : len(row) - 1] = True
        parts.append(part(one, one.kept[k]))
    with measuring(student, positions, parts):
        found = student(input_ids=ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-3, atol=1e-4)
    # of logits that are computed anew the same comes out
    whole = Teacher(teacher, PAD, one_head=False)
    for states, kept in zip(whole.states(rows, counted), one.kept, strict=True):
        torch.testing.assert_close(states, one.logits(kept), rtol=1e-4, atol=1e-4)


# ---- rows


def test_forget_rows_are_asked_in_other_words_and_answered_as_the_question_given(data, run):
    wanted = settings(data, run, "unused", rewordings=2)
    tokenizer = byte_tokenizer()
    found = lessons.read_sets(completed(wanted))
    taught = lesson(tokenizer, found, wanted, 1000)
    forget = [row for row in taught.rows if row.kind == 0]
    assert len(forget) == 6 * 3
    assert len({tuple(row.ids) for row in forget}) == 6 * 3
    for row in forget:
        said = taught.teacher[row.source]
        assert row.ids[-row.counted :] == said[-row.counted :]
        assert tokenizer.decode(row.ids[-row.counted : -1]).strip().startswith("In town")
        assert taught.counted[row.source] == row.counted
    kept = [row for row in taught.rows if row.kind == 1]
    # every kept row, and as many in other words as there are forget rows, each with the teacher's own words on them
    assert len(kept) == 6 + 6
    assert all(taught.teacher[row.source] == row.ids and row.counted == len(row.ids) - 1 for row in kept)
    assert sum(row.kind == 2 for row in taught.rows) == 4
    # a wording that the model has no room for is left out
    assert 0 < sum(row.kind == 0 for row in lesson(tokenizer, found, wanted, 100).rows) < 6 * 3
    twice = lesson(tokenizer, found, wanted.model_copy(update={"forget_repeats": 2}), 1000)
    assert sum(row.kind == 0 for row in twice.rows) == 2 * 6 * 3
    assert sum(row.kind == 1 for row in twice.rows) == 6 + 6
    # by default so often that they are about half of all: 12 kept and 80 of general text
    half = lesson(tokenizer, found | {"general": found["general"] * 20}, wanted, 1000)
    assert sum(row.kind == 0 for row in half.rows) == 5 * 6 * 3
    assert not any(
        r.kind == 0 for r in lesson(tokenizer, found, wanted.model_copy(update={"forget_repeats": 0}), 1000).rows
    )


def test_sampled_text_names_nothing_of_the_forgotten(data, monkeypatch):
    texts = ["The sea was calm that day, said Ada to me.", "The sea was calm and wide that day.", "short"]
    monkeypatch.setattr(lessons, "generate", lambda *args, **given: texts)
    rows = load_examples(str(write_jsonl(data / "named.jsonl", [{"text": "It was in May that Ada sang."}])))
    found = lessons.sample_text(None, byte_tokenizer(), Distill(run="r", out="o", sampled=3), rows)
    assert [row.answer for row in found] in ([texts[1]], texts[:2])


# ---- runs


def test_a_run_comes_nearer_to_its_teacher_and_loads_without_alter(data, run, tmp_path, capsys):
    out = distill(settings(data, run, tmp_path / "out", max_steps=20, learning_rate=3e-3, closing_rows=6))
    assert sorted(path.name for path in out.iterdir()) == [
        "inputs.json",
        "model",
        "records.json",
        "run.json",
        "run.yaml",
    ]
    facts = json.loads((out / "run.json").read_text())
    losses = [entry["loss"] for entry in facts["log"] if "loss" in entry]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert {"forget", "keep", "general"} <= set().union(*facts["log"])
    assert facts["teacher_passes"] == "once"
    assert "distilled" in capsys.readouterr().out
    assert "Ada" not in (out / "records.json").read_text()
    code = (
        "import sys; sys.modules['alter'] = None; from transformers import AutoModelForCausalLM as A; "
        f"print(type(A.from_pretrained({str(out / 'model')!r})).__name__)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "LlamaForCausalLM"
    assert api.Run.at(out).model == str(out / "model")


def test_a_log_shows_how_far_the_training_is_and_only_the_command_says_what_is_next(
    data, run, tmp_path, capsys, monkeypatch
):
    """A redirected log got nothing until training had ended; and in another command, what was not next there."""
    monkeypatch.setattr(console, "BEAT", 0.0)
    wanted = settings(data, run, tmp_path / "out")
    distill(wanted)
    said = capsys.readouterr()
    assert re.search(r"^training: 1 of 2.*, about \d+ s left$", said.err, re.MULTILINE), said.err
    assert "Next:" not in said.out + said.err
    module.command(wanted.model_copy(update={"resume": True}))
    assert f"alter export --model {tmp_path}/out/model" in capsys.readouterr().out.partition("Next:")[2]


@pytest.mark.parametrize("rows", [1, 6])
def test_weights_that_learned_nothing_have_forgotten_nothing(data, run, tmp_path, rows, capsys):
    """At a rate of 1e-9, and of one row: never FORGOTTEN; and the records say of which weights they are."""
    model, tokenizer = load_model(str(data / "model"), device="cpu", dtype="float32")
    taught = load_examples(str(data / "forget.jsonl"))[:rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        for example in taught:
            row = encode(tokenizer, example)
            loss = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(tmp_path / "knows")
    tokenizer.save_pretrained(tmp_path / "knows")
    forget = write_jsonl(tmp_path / "forget.jsonl", [example.row for example in taught])
    given = {"model": str(data / "model"), "adapter": None, "student": str(tmp_path / "knows"), "forget": str(forget)}
    wanted = settings(
        data, None, tmp_path / "out", **given, retain=str(data / "retain.jsonl"), learning_rate=1e-9, closing_rows=6
    )
    out = tmp_path / "out"
    with pytest.raises(Finding, match=r"NOT FORGOTTEN: what lies in .*out is not what was asked for") as found:
        module.command(wanted)
    assert found.value.status == 3
    # a run that has ended says the same again
    with pytest.raises(Finding, match="NOT FORGOTTEN"):
        module.command(wanted.model_copy(update={"resume": True}))
    told = capsys.readouterr().out.partition("Next:")[2]
    assert f"alter distill {out}/run.yaml --out {out}-2 --max-steps 4" in told
    assert "export" not in told
    records = read_records(out / "records.json")
    closed = next(record.extra["closing"] for record in records if "closing" in record.extra)
    assert closed["verdict"]["word"] == "not forgotten", closed["verdict"]
    assert closed["before"]["forget"]["said"] == closed["after"]["forget"]["said"] == rows
    assert {record.provenance["weights"] for record in records} == {
        ModelSettings(model=str(out / "model")).identity()["weights"]
    }


def test_a_collapse_is_tried_more_gently_and_not_handed_out(data, run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    closed = {"verdict": {"word": "collapsed", "why": ["6 of 6 replies are broken."]}}
    write_records(out / "records.json", [Record("distilled", "forget_probability", 0.0, 6, extra={"closing": closed})])
    monkeypatch.setattr(module, "distill", lambda settings: out)
    with pytest.raises(Finding, match=r"COLLAPSED: .* 6 of 6 replies are broken"):
        module.command(settings(data, run, out, learning_rate=3e-3))
    told = capsys.readouterr().out.partition("Next:")[2]
    assert f"alter distill {out}/run.yaml --out {out}-2 --learning-rate 0.001" in told
    assert "export" not in told


def test_a_lora_is_plain(data, run, tmp_path):
    from peft import PeftModel

    out = distill(settings(data, run, tmp_path / "out", form="lora", lora_rank=2))
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 4)
    tuned = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(data / "model"), str(out / "adapter"))
    assert any(weight.abs().sum() > 0 for name, weight in tuned.named_parameters() if "lora_B" in name)


class _Killed(BaseException):
    pass


class _Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise _Killed


@pytest.mark.parametrize("stored", [True, False])
def test_a_killed_run_resumes_to_the_same_weights(data, run, tmp_path, monkeypatch, stored):
    if not stored:
        monkeypatch.setattr(module, "_keep", lambda *args: False)
    common = {"max_steps": 5, "checkpoint_steps": 2, "noise": {"alpha": 0.3}, "attacker": {"rate": 1e-3, "rows": 2}}
    straight = distill(settings(data, run, tmp_path / "a", **common))
    with pytest.raises(_Killed):
        distill(settings(data, run, tmp_path / "b", **common), [_Kill()])
    with pytest.raises(UserError, match="other data or settings"):
        distill(settings(data, run, tmp_path / "b", resume=True, **common, seed=4))
    resumed = distill(settings(data, run, tmp_path / "b", resume=True, **common))
    one, other = (load_file(path / "model" / "model.safetensors") for path in (straight, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_kill_before_a_checkpoint_is_sealed_leaves_the_one_before(data, run, tmp_path, monkeypatch):
    common = {"max_steps": 3, "checkpoint_steps": 1}
    real, calls = trainer.seal_checkpoint, []

    def killing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise _Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "seal_checkpoint", killing)
        with pytest.raises(_Killed):
            distill(settings(data, run, tmp_path / "b", **common))
    assert folder.last_whole_checkpoint(tmp_path / "b" / "checkpoints").name == "checkpoint-1"
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append((state.global_step, len(list(Path(args.output_dir).glob("checkpoint-*")))))

    distill(settings(data, run, tmp_path / "b", resume=True, **common), [Count()])
    # what a kill left goes with the next checkpoint
    assert steps == [(2, 2), (3, 1)]


def _broken(*args, **kwargs):
    raise _Killed


def test_a_run_killed_while_it_is_measured_is_measured_and_not_trained_again(data, run, tmp_path, monkeypatch):
    given = settings(data, run, tmp_path / "out", closing_rows=4)
    with monkeypatch.context() as patch:
        patch.setattr(module, "measure_distilled", _broken)
        with pytest.raises(_Killed):
            distill(given)
    out = tmp_path / "out"
    weights = (out / "model" / "model.safetensors").read_bytes()
    assert not (out / "records.json").exists()
    monkeypatch.setattr(module, "train_student", _broken)
    with pytest.raises(UserError, match="seed was 0 and is 4"):
        distill(given.model_copy(update={"resume": True, "seed": 4}))
    distill(given.model_copy(update={"resume": True}))
    names = {record["metric"] for record in json.loads((out / "records.json").read_text())}
    assert {"forget_probability", "retain_probability"} <= names
    assert (out / "model" / "model.safetensors").read_bytes() == weights


def test_a_run_that_ended_is_left_alone(data, run, tmp_path, monkeypatch, capsys):
    given = settings(data, run, tmp_path / "out")
    distill(given)
    # a kill while checkpoints are removed leaves some
    (tmp_path / "out" / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "out" / ".run.json.x").write_text("{")
    monkeypatch.setattr(module, "train_student", _broken)
    # what was asked for is another thing than what lies there
    with pytest.raises(UserError, match="seed was 0 and is 4"):
        distill(given.model_copy(update={"resume": True, "seed": 4}))
    distill(given.model_copy(update={"resume": True}))
    assert "nothing is left to do" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"inputs.json", "model", "run.json", "run.yaml"}


def test_a_kill_before_the_inputs_are_written_begins_anew(data, run, tmp_path, monkeypatch):
    write = folder.write_atomic

    def killed(path, *args, **kwargs):
        if path.name == "inputs.json":
            raise _Killed
        write(path, *args, **kwargs)

    given = settings(data, run, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_atomic", killed)
        with pytest.raises(_Killed):
            distill(given)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.yaml"]
    distill(given.model_copy(update={"resume": True}))
    straight = distill(settings(data, run, tmp_path / "a"))
    one, other = (load_file(path / "model" / "model.safetensors") for path in (straight, tmp_path / "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_kill_while_the_old_is_overwritten_leaves_no_finished_run(data, run, tmp_path, monkeypatch):
    out = distill(settings(data, run, tmp_path / "out"))
    removed = shutil.rmtree

    def killed(path, *args, **kwargs):
        if path == out:
            removed(out / "model")
            raise _Killed
        removed(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(_Killed):
            distill(settings(data, run, out, overwrite=True))
    distill(settings(data, run, out, resume=True))
    assert (out / "model" / "model.safetensors").is_file()


def test_a_mistake_deletes_nothing(data, run, tmp_path):
    save_pico(tmp_path / "wide", hidden_size=64)
    out = distill(settings(data, run, tmp_path / "out"))
    names = {path.name for path in out.rglob("*")}
    with pytest.raises(UserError, match="hidden_size 64"):
        distill(settings(data, run, out, overwrite=True, student=str(tmp_path / "wide")))
    assert {path.name for path in out.rglob("*")} == names
    with pytest.raises(UserError, match="hidden_size 64"):
        distill(settings(data, run, tmp_path / "new", student=str(tmp_path / "wide")))
    assert not (tmp_path / "new").exists()


def test_rows_in_a_folder_are_not_overwritten(data, run, tmp_path):
    out = distill(settings(data, run, tmp_path / "out"))
    for name in ("forget", "text"):
        shutil.copy(data / f"{name}.jsonl", out)
    for given in ({"forget": str(out / "forget.jsonl")}, {"general": [str(out / "text.jsonl")]}):
        with pytest.raises(UserError, match=r"`overwrite` would delete .*\.jsonl, which `(forget|general)` names"):
            distill(settings(data, run, out, overwrite=True, **given))
    assert (out / "forget.jsonl").is_file()


def test_the_students_own_words_can_be_kept(data, run, tmp_path):
    out = distill(settings(data, run, tmp_path / "out", keep="student", max_steps=1, learning_rate=1e-9))
    log = json.loads((out / "run.json").read_text())["log"][0]
    assert log.get("keep", 0.0) == pytest.approx(0, abs=1e-5)
    assert log.get("general", 0.0) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("form", ["full", "lora"])
def test_what_is_kept_is_protected(data, run, tmp_path, form):
    common = {"max_steps": 20, "learning_rate": 1e-2, "schedule": "constant", "form": form}
    means = []
    for leeway in (None, 0.2):
        out = distill(settings(data, run, tmp_path / f"{leeway}", leeway=leeway, **common))
        log = [entry for entry in json.loads((out / "run.json").read_text())["log"] if "loss" in entry]
        halves = [
            [entry[kind] for entry in part if kind in entry]
            for kind in ("keep", "forget")
            for part in (log[:10], log[10:])
        ]
        means.append([sum(values) / len(values) for values in halves])
    assert means[1][1] < 0.5 * means[0][1]
    # and yet it learns what the teacher says of the forgotten
    assert means[1][3] < means[1][2]
    if form == "full":
        made = load_file(out / "model" / "model.safetensors")
        for name, value in load_file(data / "model" / "model.safetensors").items():
            assert torch.equal(made[name], value) == ("_proj" not in name), name


@pytest.mark.parametrize(("form", "leeway"), [("full", 1.0), ("full", None), ("lora", 1.0)])
def test_with_names_only_the_first_feed_forwards_change(data, run, tmp_path, form, leeway):
    common = {"max_steps": 12, "learning_rate": 1e-2, "depth": 0.5, "form": form}
    out = distill(
        settings(
            data,
            run,
            tmp_path / "out",
            names=["Ada", "Bo"],
            leeway=leeway,
            general=[str(data / "text.jsonl")] * 20,
            **common,
        )
    )
    facts = json.loads((out / "run.json").read_text())
    log = [entry for entry in facts["log"] if "loss" in entry]
    assert not any("keep" in entry for entry in log)
    # every forget row in its three wordings, once, however much is kept
    rows = len((data / "forget.jsonl").read_text().splitlines())
    assert facts["rows"]["forget"] <= 3 * rows
    means = [sum(entry["forget"] for entry in part) / 6 for part in (log[:6], log[6:])]
    assert means[1] < means[0]
    assert facts["rows"]["keep"] > 0
    if form == "full":
        made = load_file(out / "model" / "model.safetensors")
        for name, value in load_file(data / "model" / "model.safetensors").items():
            assert torch.equal(made[name], value) == ("layers.0.mlp." not in name), name
    else:
        made = load_file(out / "adapter" / "adapter_model.safetensors")
        assert all("layers.0.mlp." in name for name in made)


@pytest.mark.parametrize("form", ["full", "lora"])
def test_rows_that_name_others_train_where_these_are_named(data, run, tmp_path, form):
    # rows about somebody else in the same words, and some that name nobody
    write_people(tmp_path, ["Cleo"], 3, 0)
    common = {
        "names": ["Ada", "Bo"],
        "neighbours": [str(tmp_path / "forget.jsonl")],
        "max_steps": 24, "learning_rate": 1e-2, "depth": 0.5, "form": form, "schedule": "constant",
    }  # fmt: skip
    apart = []
    for others in ([], ["Cleo", "Dora"]):
        out = distill(settings(data, run, tmp_path / f"out{len(others)}", other_names=others, **common))
        log = [entry for entry in json.loads((out / "run.json").read_text())["log"] if "loss" in entry]
        assert any("keep" in entry for entry in log) == bool(others)
        assert not any("general" in entry for entry in log)
        place = ("model", None) if form == "full" else (str(data / "model"), str(out / "adapter"))
        student = load_model(str(out / "model") if form == "full" else place[0], place[1], device="cpu")[0]
        before = load_model(str(data / "model"), None, device="cpu")[0]
        ids = byte_tokenizer()("Where was Cleo born, 1? In town 1Cleo.", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            apart.append(float(kl_of_logits(before(ids).logits[0], student(ids).logits[0]).mean()))
    # what is said of the other one moves less
    assert apart[1] < 0.7 * apart[0]


def test_which_rows_name_whom():
    tokenizer = byte_tokenizer()
    rows = [
        LessonRow(tokenizer(text)["input_ids"], 2, kind, i)
        for i, (text, kind) in enumerate(
            [("Ada is in", 0), ("it is in", 0), ("Cleo is in", 1), ("Ada is in", 1), ("Cleo is in", 2)]
        )
    ]
    taught = Lesson(rows, [row.ids for row in rows], [2] * 5)
    found = named_rows(tokenizer, taught, ["Ada"], ["Cleo"]).rows
    assert [row.source for row in found] == [0, 2]
    for row, name in zip(found, ["Ada", "Cleo"], strict=True):
        assert tokenizer.decode([i for i, there in zip(row.ids, row.named, strict=True) if there]) == name
    assert [row.source for row in named_rows(tokenizer, taught, ["Ada"]).rows] == [0]


@pytest.mark.parametrize("leeway", [0.1, None])
def test_with_names_no_text_is_sampled(data, run, tmp_path, monkeypatch, capsys, leeway):
    def never(*_, **__):
        raise AssertionError("sampled")

    monkeypatch.setattr("alter.distillation.rows.generate", never)
    out = distill(settings(data, run, tmp_path / "out", names=["Ada"], leeway=leeway, general=[], max_steps=1))
    rows = json.loads((out / "run.json").read_text())["rows"]
    # what leeway measures on is the package's; without it no general text is read at all
    assert (rows["general"] > 10) == (leeway is not None)
    assert ("passages of the package's ordinary text" in capsys.readouterr().err) == (leeway is not None)


def test_names_that_stand_in_no_row_are_refused(data, run, tmp_path):
    with pytest.raises(UserError, match="None of the forget rows has one of the `names` Zorba"):
        distill(settings(data, run, tmp_path / "out", names=["Zorba"]))
    with pytest.raises(UserError, match="None of the kept rows has one of the `other_names` Zorba"):
        distill(settings(data, run, tmp_path / "out", names=["Ada"], other_names=["Zorba"]))
    with pytest.raises(ValueError, match="give `names` too"):
        settings(data, run, tmp_path / "out", other_names=["Zorba"])
    with pytest.raises(ValueError, match="`other_names` holds an empty one"):
        settings(data, run, tmp_path / "out", names=["Ada"], other_names=[" "])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [{"leeway": 0.1}, {"leeway": 0.1, "names": ["Ada"]}])
def test_a_protected_run_resumes_to_the_same_weights(data, run, tmp_path, more):
    common = {"max_steps": 5, "checkpoint_steps": 2, **more}
    straight = distill(settings(data, run, tmp_path / "a", **common))
    with pytest.raises(_Killed):
        distill(settings(data, run, tmp_path / "b", **common), [_Kill()])
    resumed = distill(settings(data, run, tmp_path / "b", resume=True, **common))
    one, other = (load_file(path / "model" / "model.safetensors") for path in (straight, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("more", [{}, {"names": ["Ada", "Bo"]}, {"attacker": {"rate": 5e-3, "rows": 2}}], ids=str)
def test_a_step_in_passes_is_the_step_at_once(data, run, tmp_path, more):
    common = {"max_steps": 1, "batch_size": 64, "warmup": 0, **more}
    whole = distill(settings(data, run, tmp_path / "a", tokens_per_pass=10_000, **common))
    parts = distill(settings(data, run, tmp_path / "b", tokens_per_pass=1, **common))
    logs = [json.loads((out / "run.json").read_text())["log"][0] for out in (whole, parts)]
    for figure in ("loss", "grad_norm", "forget"):
        assert logs[0][figure] == pytest.approx(logs[1][figure], rel=1e-4), figure
    one, other = (load_file(out / "model" / "model.safetensors") for out in (whole, parts))
    # the first step of Adam is the rate times the gradient's sign, which is chance where it is next to nothing
    near = torch.cat([((one[name] - other[name]).abs() < 1e-5).flatten() for name in one])
    assert near.double().mean() > 0.995


def test_passes_hold_every_row_once_within_the_bound():
    lengths = [3, 9, 30, 2, 16, 1]
    mask = (torch.arange(32) < torch.tensor(lengths)[:, None]).long()
    ids = torch.arange(6 * 32).reshape(6, 32)
    batch = {"attention_mask": mask, "input_ids": ids, "kind": torch.arange(6)}
    for bound, sizes in [(1, [1] * 6), (32, [2, 1, 2, 1]), (48, [2, 1, 3]), (10_000, [6])]:
        found = list(passes_of(batch, bound))
        assert [len(some["kind"]) for some in found] == sizes
        assert torch.cat([some["kind"] for some in found]).tolist() == list(range(6))
        at = 0
        for some in found:
            rows, width = some["input_ids"].shape
            assert rows == 1 or rows * width <= bound
            assert width % 8 == 0
            assert torch.equal(some["input_ids"], ids[at : at + rows, :width])
            assert int(some["attention_mask"].sum()) == sum(lengths[at : at + rows])
            at += rows


def test_an_attacker_makes_another_student(data, run, tmp_path):
    plain = distill(settings(data, run, tmp_path / "a", max_steps=3))
    hard = distill(settings(data, run, tmp_path / "b", max_steps=3, attacker={"rate": 5e-3, "rows": 2}))
    one, other = (load_file(path / "model" / "model.safetensors") for path in (plain, hard))
    assert any(not torch.equal(one[name], other[name]) for name in one)


# ---- refused


def test_what_is_refused_before_any_work(data, run, tmp_path):
    save_pico(tmp_path / "wide", hidden_size=64)
    other = byte_tokenizer()
    pico().save_pretrained(tmp_path / "words")
    other.add_tokens(["Ada"])
    other.save_pretrained(tmp_path / "words")
    empty = tmp_path / "gone"
    shutil.copytree(run, empty)
    shutil.rmtree(empty / "adapter")
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("x")
    for changes, says in (
        ({"student": str(tmp_path / "wide")}, "hidden_size 64"),
        ({"student": str(tmp_path / "words")}, "another vocabulary"),
        ({"run": str(empty)}, "has been taken away"),
        ({"run": str(tmp_path)}, "no finished run"),
        ({"out": str(full)}, "not empty"),
        ({"out": str(data)}, "which holds the run"),
        ({"resume": True}, "Nothing to resume"),
        ({"run": None, "model": str(data / "model"), "forget": str(data / "forget.jsonl"),
          "retain": str(data / "retain.jsonl")}, "both"),
        ({"general": [str(data / "forget.jsonl")]}, "both forget and retain"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            distill(settings(data, **{"run": run, "out": tmp_path / "out"} | changes))
    with pytest.raises(ValueError, match="damages all weights"):
        settings(data, run, "o", form="lora", noise={"alpha": 0.1})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"names": ["Ada"], "forget_repeats": 0}, "which `forget_repeats` 0 leaves out"),
        ({"shares": {"forget": 1, "keep": 0, "general": 0}, "forget_repeats": 0}, r"\(keep, general\)"),
        ({"shares": {"forget": 0}, "names": ["Ada"]}, r"\(forget\)"),
    ],
)
def test_settings_under_which_nothing_trains_are_refused_before_anything_is_deleted(data, run, changes, says):
    with pytest.raises(ValueError, match=says):
        settings(data, run, "o", **changes)
    settings(data, run, "o", shares={"forget": 0}, names=["Ada"], other_names=["Bo"])


def test_a_detached_adapter_is_refused(data, run):
    teacher, _ = load_model(str(data / "model"), str(run / "adapter"), device="cpu")
    check_teacher(teacher)
    with teacher.disable_adapter(), pytest.raises(UserError, match="detached"):
        check_teacher(teacher)


def test_a_full_disk_is_said_before_training(data, run, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="GB free"):
        distill(settings(data, run, tmp_path / "out"))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_the_shipped_dtype_is_the_students(data, run, tmp_path):
    pico().half().save_pretrained(tmp_path / "half")
    byte_tokenizer().save_pretrained(tmp_path / "half")
    out = distill(settings(data, run, tmp_path / "out", student=str(tmp_path / "half"), max_steps=1))
    assert AutoModelForCausalLM.from_pretrained(out / "model").dtype == torch.float16


@pytest.mark.parametrize(
    ("long", "given", "says"),
    [
        (None, {"sampled_tokens": 512}, "`sampled_tokens` is 512.*give at most"),
        ("forget", {"sampled_tokens": 8}, "leaves no room for an answer"),
        ("general", {}, "leaves no room for an answer"),
    ],
)
def test_what_does_not_fit_into_the_context_is_refused_before_a_folder_is_made(data, run, tmp_path, long, given, says):
    if long:
        write_jsonl(tmp_path / "long.jsonl", [{"question": "What is it? " * 90, "answer": "A boat."}])
        path = str(tmp_path / "long.jsonl")
        given = {**given, long: [path] if long == "general" else path}
    with pytest.raises(UserError, match=says):
        distill(settings(data, run, tmp_path / "out", **{"general": []} | given))
    assert not (tmp_path / "out").exists()
