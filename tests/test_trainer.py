"""The run: schedule, one forward a step, isolation, resume after a real kill, and every mistake a user can make."""

import json
import os
import shutil
import statistics
import time

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

import children
from alter import cli
from alter.core.errors import UserError
from alter.data.encoding import Encoded
from alter.groundwork import frozen
from alter.inference.generation import generate
from alter.inference.scoring import score
from alter.logits import entropy
from alter.methods import objectives
from alter.methods.adapters import Beginning
from alter.training import arguments, folder, loss, saving
from alter.training.batches import Batch, Places, schedule
from alter.training.run import unlearn
from alter.training.settings import Unlearn
from pico import byte_tokenizer, pico, run_on, save_pico, write_jsonl, write_people

NAMES = ["Ada", "Bo", "Cy"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    save_pico(folder / "model")
    return write_people(folder, NAMES, 4, 15)


def settings(data, out, **changes):
    given = dict(
        **run_on(data, out),
        epochs=2,
        save_steps=2,
        adapter={"r": 4, "entropy_quantile": 0.5},
        router_fit={"steps": 20, "background": False},
        learning_rate_shared=1e-3,
    )
    return Unlearn.model_validate({**given, **changes})


def weights(out):
    return load_file(str(out / "adapter" / "adapter_model.safetensors"))


def test_schedule_takes_every_forget_row_once_an_epoch_and_cycles_the_retain_rows():
    order = schedule([5, 9, 2, 7, 4, 3, 8], list(range(10)), epochs=3, batch=2, seed=1)
    assert len(order) == 21
    for epoch in range(3):
        assert sorted(f for f, _ in order[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert sorted([r for _, r in order].count(i) for i in range(10)) == [2] * 9 + [3]
    assert order == schedule([5, 9, 2, 7, 4, 3, 8], list(range(10)), epochs=3, batch=2, seed=1)
    assert order != schedule([5, 9, 2, 7, 4, 3, 8], list(range(10)), epochs=3, batch=2, seed=2)


@pytest.mark.parametrize("alone", [2, 7, 8, 14])
def test_retain_rows_that_join_late_are_cycled_from_there(alone):
    order = schedule([5, 9, 2, 7, 4, 3, 8], list(range(10)), epochs=6, batch=2, seed=1, alone=alone)
    for epoch in range(6):
        assert sorted(f for f, _ in order[7 * epoch : 7 * epoch + 7]) == list(range(7))
    taken = [r for _, r in order[alone:]]
    assert [r for _, r in order[:alone]] == [None] * alone
    assert {taken.count(i) for i in range(10)} <= {len(taken) // 10, -(-len(taken) // 10)}


def test_batches_of_a_small_forget_set_differ_from_epoch_to_epoch_and_hold_rows_of_like_length():
    lengths = list(range(40))
    order = [f for f, _ in schedule(lengths, [1] * 99, epochs=4, batch=8, seed=0)]
    batches = {frozenset(order[i : i + 8]) for i in range(0, len(order), 8)}
    assert len(batches) == 20
    assert statistics.fmean(max(b) - min(b) for b in batches) < 0.75 * 39
    # of a large one they come out of groups of eight batches
    many = [f for f, _ in schedule(list(range(1000)), [1], epochs=1, batch=8, seed=0)]
    assert statistics.fmean(max(many[i : i + 8]) - min(many[i : i + 8]) for i in range(0, 960, 8)) < 150


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapter": {"router": "entropy"}, "phase_one": 0.5, "lr_scheduler": "constant"},
        {"adapter": {"router": "static"}, "objective": {"kind": "stopped_hinge"}},
        {"domain_column": None, "num_forget_experts": 2, "objective": {"kind": "without_truth"}},
        {
            "objective": {"kind": "without_truth", "hinge": 1.0},
            "retain_objective": {"kind": "keep_base"},
            "gradient_checkpointing": True,
        },
        {"objective": {"kind": "gradient_ascent"}, "gradient_accumulation_steps": 2, "bf16": True},
    ],
)
def test_a_run_trains_an_adapter_that_peft_loads(data, tmp_path, changes):
    out = unlearn(settings(data, tmp_path / "run", **changes))
    record = json.loads((out / "run.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(data / "model")
    ids = torch.tensor([[10, 20, 30, 40]])
    with torch.no_grad():
        before = base(input_ids=ids).logits
        model = PeftModel.from_pretrained(base, str(out / "adapter"))
        assert not torch.equal(model(input_ids=ids).logits, before)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, before)
    experts = changes.get("num_forget_experts", 3)
    assert len(record["domains"]) == experts
    card = (out / "adapter" / "README.md").read_text()
    assert "import alter" in card
    assert str(data / "model") in card
    assert record["steps"] == (3 if "gradient_accumulation_steps" in changes else 6)
    assert model.peft_config["default"].num_forget_experts == experts
    assert any(value.abs().sum() > 0 for name, value in weights(out).items() if "alter_B" in name)


def test_a_step_is_one_forward_and_the_base_runs_only_before(data, tmp_path, monkeypatch):
    counts = {"forward": 0}
    real = loss.UnlearnTrainer.compute_loss

    def counted(self, model, inputs, **kwargs):
        layer = model.base_model.model.model.layers[0]
        handle = layer.register_forward_hook(lambda *_: counts.update(forward=counts["forward"] + 1))
        before = counts["forward"]
        try:
            return real(self, model, inputs, **kwargs)
        finally:
            handle.remove()
            assert counts["forward"] == before + 1

    monkeypatch.setattr(loss.UnlearnTrainer, "compute_loss", counted)
    unlearn(settings(data, tmp_path / "run"))
    assert counts["forward"] == 6


def test_forget_rows_leave_the_retention_expert_alone_and_the_reverse(data, tmp_path):
    """beta = 0 or gamma = 0 switches one kind of row off: the other kind's experts must not have moved at all."""
    for off, moved in (({"gamma": 0.0, "lambda_": 0.0}, slice(4, None)), ({"beta": 0.0, "lambda_": 0.0}, slice(0, 4))):
        out = unlearn(settings(data, tmp_path / str(moved.start), **off))
        for name, value in weights(out).items():
            if "alter_B" in name:
                still = value.clone()
                still[:, moved] = 0
                assert still.abs().sum() == 0, name
                assert value[:, moved].abs().sum() > 0, name


def test_gradients_equal_those_of_separate_passes(data, tmp_path, monkeypatch):
    """Every expert's gradient in the joint pass is that of a pass over its own rows alone."""
    run = settings(data, tmp_path / "run", batch_size=12, lambda_=0.0, max_grad_norm=1e9)
    seen = {}
    real = loss.UnlearnTrainer.compute_loss

    def compare(self, model, inputs, **kwargs):
        if not seen:
            experts = {n: p for n, p in model.named_parameters() if ".alter_B." in n}
            for p in experts.values():
                torch.nn.init.normal_(p, std=0.1)
            joint = torch.autograd.grad(real(self, model, inputs), list(experts.values()))
            batch = inputs["batch"]
            labels = batch.labels
            low_forget = ((batch.entropy <= self.threshold) & (labels != -100))[batch.expert > 0]
            n_forget, n_retain = low_forget[:, 1:].sum(), (labels[batch.expert == 0][:, 1:] != -100).sum()
            for number in range(4):
                rows = batch.expert == number
                names = ("input_ids", "attention_mask", "labels", "gates", "entropy", "expert", "branch")
                # a mask of all rows: nothing is isolated, the separate pass does it
                alone = Batch(**{name: getattr(batch, name)[rows] for name in names})
                loss = real(self, model, {"batch": alone})
                own = (alone.entropy <= self.threshold) & (alone.labels != -100)
                share = own[:, 1:].sum() / n_forget if number else (alone.labels[:, 1:] != -100).sum() / n_retain
                for (name, p), whole in zip(experts.items(), joint, strict=True):
                    (part,) = torch.autograd.grad(loss, [p], retain_graph=True)
                    block = slice(4 * number, 4 * number + 4)
                    torch.testing.assert_close(
                        whole[:, block], (part * share)[:, block], rtol=1e-4, atol=1e-6, msg=f"{name} {number}"
                    )
            seen["done"] = True
        return real(self, model, inputs, **kwargs)

    monkeypatch.setattr(loss.UnlearnTrainer, "compute_loss", compare)
    unlearn(run)
    assert seen


def test_a_token_of_another_rows_prompt_is_not_asked_for():
    ids = torch.tensor([[3, 4, 5, 3, 6], [5, 6, 5, 3, 0]])
    labels = torch.tensor([[-100, -100, 5, 3, 6], [-100, -100, 5, 3, -100]])
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    batch = Batch(ids, real, labels, torch.ones(2), torch.zeros(2, dtype=torch.long))
    places = Places.of(batch, torch.zeros_like(ids, dtype=torch.bool), [True, True, True])
    assert places.truth.tolist() == [5, 3, 6, 5, 3]
    assert places.asked(batch).tolist() == [False, True, False, True, False]


def test_tokens_that_a_rows_prompt_has_are_told_apart(data, tmp_path, monkeypatch):
    """Against a loop over the batch; an objective that does not ask is not told."""
    forget = [json.loads(line) for line in (data / "forget.jsonl").read_text().splitlines()]
    write_jsonl(tmp_path / "forget.jsonl", [{**row, "substitute": "Nobody knows."} for row in forget])
    real, told = loss.UnlearnTrainer._labelled, []

    def look(self, name, batch, places, values, states):
        found = real(self, name, batch, places, values, states)
        if name == "forget":
            told.append((batch, found.asked))
        else:
            assert found.asked is None
        return found

    monkeypatch.setattr(loss.UnlearnTrainer, "_labelled", look)
    given = dict(epochs=1, forget=str(tmp_path / "forget.jsonl"))
    unlearn(settings(data, tmp_path / "told", objective={"kind": "substitute", "spare": True}, **given))
    assert told
    for batch, asked in told:
        expected = []
        for row, number in enumerate(batch.branch.tolist()):
            if number == 0:
                ids, labels, real_ = (t[row].tolist() for t in (batch.input_ids, batch.labels, batch.attention_mask))
                prompt = {i for i, label, there in zip(ids, labels, real_, strict=True) if label == -100 and there}
                expected += [label in prompt for label in labels[1:] if label != -100]
        assert asked.tolist() == expected
        assert True in expected
        assert False in expected
    told.clear()
    unlearn(settings(data, tmp_path / "untold", objective={"kind": "substitute"}, **given))
    assert told
    assert all(asked is None for _, asked in told)


def test_only_high_entropy_tokens_may_move_the_shared_matrix(data, tmp_path, monkeypatch):
    masks = []
    real = loss.Routing
    monkeypatch.setattr(loss, "Routing", lambda g, e, shared: masks.append(shared) or real(g, e, shared))
    out = unlearn(settings(data, tmp_path / "run", epochs=1))
    kept = load_file(str(out / "frozen.safetensors"))["entropy"]
    threshold = json.loads((out / "run.json").read_text())["router"]["entropy_threshold"]
    assert len(masks) == 3
    assert all(mask[:, 0].all() for mask in masks)
    low = sum(int((~mask).sum()) for mask in masks)
    # one epoch of twelve forget rows and twelve different retain rows: each traced row is seen once, padding is high
    assert low == int((kept <= threshold).sum()) > 0


def test_activation_checkpointing_changes_nothing(data, tmp_path):
    """Every layer trains, and ends at the weights of a run that kept its activations."""
    common = {"epochs": 1, "batch_size": 4, "objective": {"kind": "gradient_ascent"}, "lambda_": 0.0, "gamma": 0.0}
    plain = weights(unlearn(settings(data, tmp_path / "plain", **common)))
    checkpointed = weights(unlearn(settings(data, tmp_path / "gc", gradient_checkpointing=True, **common)))
    assert sum(value.abs().sum() > 0 for name, value in plain.items() if "alter_B" in name) == 14
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_the_frozen_pass_is_reused_only_for_the_same_run(data, tmp_path, monkeypatch):
    out = unlearn(settings(data, tmp_path / "run", keep_working=True))
    calls = []
    real = frozen.trace_rows
    monkeypatch.setattr(frozen, "trace_rows", lambda *a, **k: calls.append(k["label"]) or real(*a, **k))
    unlearn(settings(data, out, resume=True, keep_working=True))
    assert calls == []
    shutil.rmtree(out / "checkpoints")
    (out / "run.json").unlink()
    (out / "inputs.json").unlink()
    unlearn(settings(data, out, resume=True, adapter={"r": 4, "entropy_quantile": 0.6}))
    assert calls == ["forget rows", "retain rows", "router", "router, measured"]


def test_frozen_rows_equal_a_plain_forward_of_the_base(data, tmp_path):
    from alter.data.encoding import Encoded
    from alter.logits.entropy import entropy_from_logits

    run = settings(data, tmp_path, objective={"kind": "without_truth"})
    base = pico()
    model = run.adapter.attach(pico(), run, Beginning(NAMES))
    model.peft_config["default"].entropy_threshold = 1.0
    rows = [Encoded(list(range(5, 5 + n)), [-100] * 2 + list(range(7, 5 + n)), 2) for n in (4, 9, 3)]
    traced = frozen.trace_rows(model, rows, pad_token_id=257, features=True, gates=True, reference_k=7)
    for row, got in zip(rows, traced, strict=True):
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([row.input_ids])).logits[0]
        torch.testing.assert_close(got.entropy[1:], entropy_from_logits(logits[:-1], 1.5), rtol=1e-4, atol=1e-5)
        logp = torch.log_softmax(logits[1:-1], -1)
        torch.testing.assert_close(got.reference.logp, logp.topk(7).values, rtol=1e-4, atol=1e-5)
        assert got.gates.shape == (len(row.input_ids), 4)
        assert got.features.shape == (len(row.input_ids), 32)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"adapter": {"kind": "full"}, "objective": {"kind": "npo"}, "retain_objective": {"kind": "keep_base"}},
        {"adapter": {"kind": "lora"}, "objective": {"kind": "prefer_refusal"}, "lambda_": 0.0},
        {"adapter": {"kind": "lora"}, "objective": {"kind": "misdirect"}, "retain_objective": {"kind": "keep_hidden"}},
        {"adapter": {"kind": "lora"}, "objective": {"kind": "reinforced"}, "retain_objective": {"kind": "distil"}},
        {"adapter": {"kind": "lora"}, "objective": {"kind": "none"}, "retain_objective": {"kind": "adaptive"}},
    ],
    ids=lambda changes: changes.get("objective", {"kind": "inverted_hinge"})["kind"],
)
def test_chunks_of_the_vocabulary_change_nothing(data, tmp_path, monkeypatch, changes):
    """The run with seven tokens at a time through the head, frozen and in training, ends where that with all of them does."""
    seen = []
    real = torch.nn.functional.linear
    common = {"epochs": 1, "batch_size": 4, **changes}
    whole = unlearn(settings(data, tmp_path / "whole", **common))

    def linear(x, weight, bias=None):
        if weight.shape[0] == 300:
            seen.append(x.numel() // x.shape[-1])
        return real(x, weight, bias)

    monkeypatch.setattr(entropy, "CHUNK_BYTES", 7 * 4 * 300)
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    chunked = unlearn(settings(data, tmp_path / "chunked", **common))
    assert max(seen) <= 7
    trained = "model/model" if (whole / "model").exists() else "adapter/adapter_model"
    for name in ("frozen.safetensors", f"{trained}.safetensors"):
        expected, got = load_file(str(whole / name)), load_file(str(chunked / name))
        assert expected.keys() == got.keys()
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=2e-5, msg=f"{name} {key}")


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_where_an_unbroken_one_ends(data, tmp_path):
    changes = {"epochs": 10, "save_steps": 4}
    straight = unlearn(settings(data, tmp_path / "straight", **changes))
    broken = settings(data, tmp_path / "broken", **changes)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(broken.model_dump()))
    process = children.Child("unlearn", recipe)
    until = time.time() + 120
    while folder.last_whole_checkpoint(tmp_path / "broken" / "checkpoints") is None:
        assert time.time() < until, "no checkpoint appeared"
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "broken" / "adapter").exists()
    # what a kill while saving leaves behind: a newer folder without its last file
    (tmp_path / "broken" / "checkpoints" / "checkpoint-999").mkdir()
    assert cli.main(["unlearn", str(recipe), "--resume"]) == 0
    expected, got = weights(straight), weights(tmp_path / "broken")
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0, msg=name)


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(data, tmp_path, monkeypatch):
    real = objectives.InvertedHinge.__call__
    calls = []

    def broken(self, tokens):
        calls.append(1)
        return real(self, tokens) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(objectives.InvertedHinge, "__call__", broken)
    with pytest.raises(UserError, match="nan at step 4"):
        unlearn(settings(data, tmp_path / "run"))
    kept = folder.last_whole_checkpoint(tmp_path / "run" / "checkpoints")
    assert kept.name == "checkpoint-2"
    assert all(torch.isfinite(v).all() for v in load_file(str(kept / "adapter_model.safetensors")).values())


def test_a_failed_save_leaves_the_old_adapter(data, tmp_path, monkeypatch):
    out = unlearn(settings(data, tmp_path / "run"))
    before = weights(out)
    run = settings(data, out)
    model = run.adapter.attach(pico(), run, Beginning(NAMES))

    def full(path):
        os.makedirs(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        saving.save_adapter(model, out)
    assert all(torch.equal(value, before[name]) for name, value in weights(out).items())


@pytest.mark.parametrize("kind", ["alter", "lora"])
def test_names_of_layers_are_saved_in_order(data, tmp_path, kind):
    run = settings(data, tmp_path, adapter={"kind": kind, "r": 2}, objective={"kind": "npo"})
    model = run.adapter.attach(pico(), run, Beginning(NAMES))
    # a set has the order of its hashes, which differ from process to process
    layers = ["v_proj", "k_proj", "q_proj"]
    model.peft_config["default"].target_modules = type("Unordered", (set,), {"__iter__": lambda self: iter(layers)})()
    saving.save_adapter(model, tmp_path)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["target_modules"] == sorted(layers)


def refused(data, out, capsys, *args):
    base = {"model": data / "model", "forget": data / "forget.jsonl", "retain": data / "retain.jsonl", "out": out}
    own = {key: value for key, value in base.items() if f"--{key}" not in args}
    line = ["unlearn", *(x for key, value in own.items() for x in (f"--{key}", str(value)))]
    assert cli.main([*line, *map(str, args)]) == 2
    lines = [text for text in capsys.readouterr().err.splitlines() if text.startswith("alter: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--forget", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--domain-column", "whom"], "whom"),
        (["--domain-column", "who", "--num-forget-experts", 2], "3 sub-domains"),
        (["--adapter.entropy-q", 0], "--adapter.entropy-q"),
        (["--adapter.entropy-q", 2, "--adapter.entropy-threshold", 1.2], "entropies end at 1"),
        # the threshold that nobody gave is 1.2; refused before anything is read
        (["--adapter.entropy-q", 2, "--model", "no/such/folder"], "entropies end at 1"),
        (["--phase-one", 0.1, "--adapter.no-retention-expert"], "--phase-one trains the retention expert"),
        (["--adapter.entropy-threshold", 1.2, "--adapter.entropy-quantile", 0.5], "not both"),
        (["--adapter.r", 33], "33"),
        (["--adapter.target-modules", "q_prj"], "q_proj"),
        (["--objective.kind", "inverted"], "inverted_hinge"),
        (["--resume"], "Nothing to resume"),
        (["--lr-scheduler", "polynomial", "--learning-rate-experts", 1e-7], "--learning-rate-experts is 1e-07"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_mistakes_are_one_line(data, tmp_path, capsys, args, says):
    assert says in refused(data, tmp_path / "out", capsys, *args)
    assert not (tmp_path / "out" / "adapter").exists()


def test_data_mistakes_are_one_line(data, tmp_path, capsys):
    row = {"question": "Where was Ada born, 0?", "answer": "In town 0Ada."}
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    overlap = write_jsonl(tmp_path / "overlap.jsonl", [{"question": "x", "answer": "y"}, row])
    hollow = write_jsonl(tmp_path / "hollow.jsonl", [row, {"question": "And?", "answer": ""}])
    assert "empty" in refused(data, tmp_path / "out", capsys, "--forget", empty)
    assert "row" in refused(data, tmp_path / "out", capsys, "--retain", overlap)
    assert "answer" in refused(data, tmp_path / "out", capsys, "--forget", hollow)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    said = refused(data, tmp_path / "full", capsys)
    assert "--resume" in said
    assert "--overwrite" in said
    assert (tmp_path / "full" / "file").exists()


@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "full"},
        {"kind": "peft", "config": {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm"]}},
    ],
    ids=lambda adapter: adapter["kind"],
)
def test_weights_do_not_train_in_float16(data, tmp_path, adapter):
    """AdamW moved some by 7 in four steps at a rate of 1e-4."""
    common = {"adapter": adapter, "objective": {"kind": "npo"}, "lambda_": 0.0, "max_steps": 1}
    with pytest.raises(UserError, match="weight would train in float16"):
        unlearn(settings(data, tmp_path / "run", dtype="float16", **common))
    assert not (tmp_path / "run").exists()
    assert unlearn(settings(data, tmp_path / "run", dtype="bfloat16", **common)).is_dir()


def test_a_token_without_an_embedding_is_named(data, tmp_path):
    folder = save_pico(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(9)])
    tokenizer.save_pretrained(folder)
    rows = [{"question": "Who?", "answer": "It is <new3>.", "who": "Ann"}]
    forget = write_jsonl(tmp_path / "forget.jsonl", rows)
    run = settings(data, tmp_path / "run", model=str(folder), forget=str(forget), num_forget_experts=None)
    with pytest.raises(
        UserError, match=r"forget.jsonl line 1 has the token '<new3>' 303, .* embeddings for 300 tokens"
    ):
        unlearn(run)
    assert not (tmp_path / "run").exists()
    ids = [65, 66, 303]
    row = Encoded(ids, [-100, *ids[1:]], 1)
    with pytest.raises(UserError, match="Row 0 has the token 303"):
        score(pico(), [row], pad_token_id=257)
    with pytest.raises(UserError, match="Prompt 0 has the token 303"):
        generate(pico(), tokenizer, [ids], max_new_tokens=2)


def test_training_stays_on_one_device_however_many_gpus_there_are(tmp_path, monkeypatch):
    """transformers takes all that a process sees: batches three times as large, and the model in three threads."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cpu", "cuda:2"):
        device = torch.device(name)
        made = arguments.trainer_arguments(tmp_path, device, per_device_train_batch_size=4)
        assert (made.device, made.n_gpu, made.train_batch_size) == (device, int(name != "cpu"), 4)
    # where accelerate moves the batches to
    assert chosen[-1] == torch.device("cuda:2")


def test_a_first_phase_is_for_an_adapter_that_knows_entropies(data, tmp_path):
    with pytest.raises(ValueError, match=r"`phase_one` needs the token entropies of `adapter\.kind` alter, not lora"):
        settings(data, tmp_path, adapter={"kind": "lora"}, objective={"kind": "gradient_ascent"}, phase_one=0.1)
    assert settings(data, tmp_path, phase_one=0.1).phase_one == 0.1


def test_an_adapter_on_another_base_is_refused(data, tmp_path):
    out = unlearn(settings(data, tmp_path / "run"))
    with pytest.raises(ValueError, match="base"):
        PeftModel.from_pretrained(pico(seed=1), str(out / "adapter"))


def test_weights_that_the_last_step_broke_are_not_saved(data, tmp_path):
    class Breaks(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = torch.nan

    with pytest.raises(
        UserError, match=r"holds NaN or infinite values: nothing is saved\. Lower `learning_rate_experts`"
    ):
        unlearn(settings(data, tmp_path / "run", max_steps=1), callbacks=[Breaks()])
    assert not (tmp_path / "run" / "adapter").exists()
    assert not (tmp_path / "run" / "run.json").exists()
